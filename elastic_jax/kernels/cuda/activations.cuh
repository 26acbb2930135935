// What packs activations for a product (products.cuh): RMSNorm of the residual stream, and rows as they are.

#pragma once

#include "products.cuh"

namespace elastic {

constexpr int kNormThreads = 512;

struct NormArguments {
  const __nv_bfloat16* residual;  // [tokens][hidden]
  const float* added;             // [parts][tokens][hidden], a product that the residual stream lacks yet; parts may be 0
  int parts;
  const __nv_bfloat16* weight;  // [hidden]
  float eps;
  int tokens;
  int hidden;
  __nv_bfloat16* out;   // [tokens][hidden], the residual stream with `added`
  uint8_t* packed;      // its norm
  float* token_scales;  // [tokens], int8 only
};

// Sum and largest value over a block; `scratch` holds 2 floats a warp.
__device__ __forceinline__ void reduce_block(float& sum, float& largest, float* scratch) {
#pragma unroll
  for (int d = 16; d; d /= 2) {
    sum += __shfl_xor_sync(~0u, sum, d);
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (lane == 0) {
    scratch[2 * warp] = sum;
    scratch[2 * warp + 1] = largest;
  }
  __syncthreads();
  sum = lane < warps ? scratch[2 * lane] : 0;
  largest = lane < warps ? scratch[2 * lane + 1] : 0;
#pragma unroll
  for (int d = 16; d; d /= 2) {
    sum += __shfl_xor_sync(~0u, sum, d);
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
  }
}

// One block a token. The largest normalized value needs no second pass: it is the largest of x * weight, scaled.
template <typename Weight>
__global__ void __launch_bounds__(kNormThreads) norm(const NormArguments a) {
  extern __shared__ __align__(16) float row[];  // [hidden]
  __shared__ float scratch[2 * kNormThreads / 32];
  const int token = blockIdx.x;
  release_successor();
  wait_for_predecessor();

  float square = 0, largest = 0;
  for (int k = threadIdx.x * 4; k < a.hidden; k += kNormThreads * 4) {
    const int64_t at = static_cast<int64_t>(token) * a.hidden + k;
    float added[4] = {0, 0, 0, 0};
#pragma unroll 8
    for (int part = 0; part < a.parts; ++part) {
      const float4 v =
          *reinterpret_cast<const float4*>(a.added + static_cast<int64_t>(part) * a.tokens * a.hidden + at);
      added[0] += v.x;
      added[1] += v.y;
      added[2] += v.z;
      added[3] += v.w;
    }
    __nv_bfloat16 x[4], weight[4];
    *reinterpret_cast<uint2*>(x) = *reinterpret_cast<const uint2*>(a.residual + at);
    *reinterpret_cast<uint2*>(weight) = *reinterpret_cast<const uint2*>(a.weight + k);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Both roundings are the model's: the product becomes bf16, and so does the residual stream.
      x[i] = __float2bfloat16_rn(__bfloat162float(x[i]) + __bfloat162float(__float2bfloat16_rn(added[i])));
      const float value = __bfloat162float(x[i]);
      square += value * value;
      const float scaled = value * __bfloat162float(weight[i]);
      largest = fmaxf(largest, fabsf(scaled));
      row[k + i] = scaled;
    }
    *reinterpret_cast<uint2*>(a.out + at) = *reinterpret_cast<const uint2*>(x);
  }
  reduce_block(square, largest, scratch);
  const float factor = rsqrtf(square / a.hidden + a.eps);
  const float scale = plane_scale(largest * factor);
  if (Weight::kPlanes == 2 && threadIdx.x == 0) a.token_scales[token] = scale;
  const Packing packing(a.tokens, Weight::kPlanes);
  for (int k = threadIdx.x * 4; k < a.hidden; k += kNormThreads * 4) {
    const float x[4] = {row[k] * factor, row[k + 1] * factor, row[k + 2] * factor, row[k + 3] * factor};
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

// One block for kPackPiece values of a token. Products pack a few tokens for themselves (`ProductArguments::rows`), but
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
    for (int i = threadIdx.x % 32; i < a.maxima_count; i += 32) most = fmaxf(most, a.maxima[i * a.tokens + token]);
#pragma unroll
    for (int d = 16; d; d /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
    scale = plane_scale(most);
    if (k == 0) a.token_scales[token] = scale;
  }
  const float x[4] = {v.x, v.y, v.z, v.w};
  if (k < a.contraction) pack4<Weight>(a.packed, Packing(a.tokens, Weight::kPlanes), token, k, x, 1.0f / scale);
}

}  // namespace elastic
