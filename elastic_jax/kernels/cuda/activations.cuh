// What packs activations for products of more than a few tokens: RMSNorm of the residual stream, and rows as they are.

#pragma once

#include "products.cuh"

namespace elastic {

constexpr int kNormThreads = 1024;

struct NormArguments {
  NormInput input;
  uint8_t* packed;
  float* token_scales;  // [tokens], int8 only
};

// One block a token.
template <typename Weight>
__global__ void __launch_bounds__(kNormThreads) norm(const NormArguments a) {
  __shared__ float scratch[2 * kNormThreads / 32];
  const int token = blockIdx.x;
  release_successor();
  uint2 weights[kNormVectors];
  load_norm_weights<kNormThreads>(a.input, weights);
  wait_for_predecessor();
  float values[kNormVectors][4], scale;
  const float factor = normalize<kNormThreads>(a.input, weights, token, true, values, scale, scratch);
  if (Weight::kPlanes == 2 && threadIdx.x == 0) a.token_scales[token] = scale;
  const Packing packing(a.input.tokens, Weight::kPlanes);
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v) {
    const int k = (v * kNormThreads + static_cast<int>(threadIdx.x)) * 4;
    if (k >= a.input.hidden) break;
    const float x[4] = {values[v][0] * factor, values[v][1] * factor, values[v][2] * factor, values[v][3] * factor};
    pack4<Weight>(a.packed, packing, token, k, x, 1.0f / scale);
  }
}

constexpr int kPackThreads = 256;
constexpr int kPackPiece = 4 * kPackThreads;

struct PackArguments {
  const float* rows;    // [tokens][contraction]
  const float* maxima;  // [maxima_count][tokens], int8 only
  int maxima_count;
  int tokens;
  int contraction;
  uint8_t* packed;
  float* token_scales;
};

// One block for kPackPiece values of a token. Products pack a few tokens for themselves (`Input::kRows`), but
// every block of theirs would do the same for many.
template <typename Weight>
__global__ void __launch_bounds__(kPackThreads) pack_rows(const PackArguments a) {
  const int token = blockIdx.y, k = blockIdx.x * kPackPiece + 4 * threadIdx.x;
  release_successor();
  wait_for_predecessor();
  float4 v = make_float4(0, 0, 0, 0);
  if (k < a.contraction) v = *reinterpret_cast<const float4*>(a.rows + static_cast<int64_t>(token) * a.contraction + k);
  float scale = 1;
  if constexpr (Weight::kPlanes == 2) {
    float most = 0;
    for (int i = threadIdx.x % 32; i < a.maxima_count; i += 32) most = larger(most, a.maxima[i * a.tokens + token]);
#pragma unroll
    for (int d = 16; d; d /= 2) most = larger(most, __shfl_xor_sync(~0u, most, d));
    scale = plane_scale(most);
    if (k == 0) a.token_scales[token] = scale;
  }
  const float x[4] = {v.x, v.y, v.z, v.w};
  if (k < a.contraction) pack4<Weight>(a.packed, Packing(a.tokens, Weight::kPlanes), token, k, x, 1.0f / scale);
}

}  // namespace elastic
