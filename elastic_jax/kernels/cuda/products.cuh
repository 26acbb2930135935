// Products of a few tokens with a weight, bound by reading the weight once.
//
// A block keeps the activations of its part of the contraction in shared memory (packing.cuh) and walks over tiles of
// outputs; its warps share every tile's chunks, each with its own ring of chunks in flight, and add their sums in shared
// memory. Weights never change, so the ring is filled before the kernel waits for its predecessor in the stream: the
// memory is not idle while activations are made.
//
// Activations come packed (activations.cuh); or, of one or two tokens, as what every block packs for itself: float32 rows,
// or a residual stream that wants RMSNorm. Everything waits for that, so a kernel is built for each kind and for each of
// these numbers of tokens, without the others' code, and all its loads are under way before the first is used.

#pragma once

#include "packing.cuh"

namespace elastic {

// Warps of a block. Many tokens leave little shared memory for the ring, and few warps waste less of it on sums.
template <int kMTiles>
constexpr int kWarpsFor = kMTiles == 1 ? 16 : 8;

constexpr int kNormVectors = 3;  // of 4 values that a thread has of a residual stream at most

// Weights of a norm, of which a thread has these. They may be loaded before the predecessor ends.
template <int kThreads>
__device__ __forceinline__ void load_norm_weights(const NormInput& n, uint2 (&weights)[kNormVectors]) {
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v) {
    const int k = (v * kThreads + static_cast<int>(threadIdx.x)) * 4;
    if (k < n.hidden) weights[v] = *reinterpret_cast<const uint2*>(n.weight + k);
  }
}

// RMSNorm of one token by a block of kThreads: each thread's values, still to be multiplied by the factor that it returns,
// and the scale of 16-bit activations. The largest normalized value needs no second pass: it is the largest of
// x * weight, scaled. `scratch` holds 2 floats a warp.
template <int kThreads>
__device__ __forceinline__ float normalize(const NormInput& n, const uint2 (&weights)[kNormVectors], int token, bool writes,
                                           float (&values)[kNormVectors][4], float& scale, float* scratch) {
  const int64_t size = static_cast<int64_t>(n.tokens) * n.hidden, first = static_cast<int64_t>(token) * n.hidden;
  auto index = [&](int v) { return (v * kThreads + static_cast<int>(threadIdx.x)) * 4; };
  uint2 residual[kNormVectors] = {};
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v)
    if (index(v) < n.hidden) residual[v] = *reinterpret_cast<const uint2*>(n.residual + first + index(v));
  float added[kNormVectors][4] = {};
#pragma unroll 2
  for (int part = 0; part < n.parts; ++part) {
    float4 product[kNormVectors] = {};
#pragma unroll
    for (int v = 0; v < kNormVectors; ++v)
      if (index(v) < n.hidden) product[v] = *reinterpret_cast<const float4*>(n.added + part * size + first + index(v));
#pragma unroll
    for (int v = 0; v < kNormVectors; ++v) {
      added[v][0] += product[v].x;
      added[v][1] += product[v].y;
      added[v][2] += product[v].z;
      added[v][3] += product[v].w;
    }
  }
  float square = 0, largest = 0;
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v) {
    if (index(v) >= n.hidden) break;
    __nv_bfloat16 x[4], weight[4];
    *reinterpret_cast<uint2*>(x) = residual[v];
    *reinterpret_cast<uint2*>(weight) = weights[v];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Both roundings are the model's: the product becomes bf16, and so does the residual stream.
      x[i] = __float2bfloat16_rn(__bfloat162float(x[i]) + __bfloat162float(__float2bfloat16_rn(added[v][i])));
      const float value = __bfloat162float(x[i]);
      square += value * value;
      values[v][i] = value * __bfloat162float(weight[i]);
      largest = larger(largest, fabsf(values[v][i]));
    }
    if (writes) *reinterpret_cast<uint2*>(n.out + first + index(v)) = *reinterpret_cast<uint2*>(x);
  }
  reduce_block(square, largest, scratch);
  const float factor = rsqrtf(square / n.hidden + n.eps);
  scale = plane_scale(largest * factor);
  return factor;
}

// What a product takes.
enum class Input {
  kPacked,    // packed activations and, for int8, their scales
  kRows,      // float32 rows, and for int8 the maxima of their magnitudes
  kResidual,  // a residual stream, which is normalized
};

struct ProductArguments {
  const uint8_t* weight;       // [outputs][row_bytes]
  const float* weight_scales;  // [outputs], int8 only
  int outputs;
  int64_t row_bytes;
  int tokens;
  int parts;  // of the contraction, each computed by other blocks
  Input input;
  const uint8_t* packed;
  const float* token_scales;  // [tokens], of `packed`
  const float* rows;          // [tokens][contraction]
  const float* maxima;        // [maxima_count][tokens], whose largest is each row's
  int maxima_count;
  NormInput norm;
  // Plain: out [parts][tokens][outputs]. SwiGlu: out [tokens][outputs / 2] = silu(first half) * second half, and
  // out_maxima [blocks][tokens], the largest magnitude that each block wrote.
  float* out;
  float* out_maxima;
  // Counters of a later kernel, which the first block sets to zero.
  uint32_t* counters;
  int counters_count;
};

template <int kMTiles, int kRowTiles, int kDepth>
__host__ __device__ constexpr int ring_bytes() {
  return kWarpsFor<kMTiles> * kDepth * kRowTiles * kLaneChunk;
}

// Of sums: a tile's are added up while the next one's are made, where there is room for both.
__host__ __device__ constexpr int sum_buffers(int tokens) { return tokens <= 8 ? 2 : 1; }

template <int kMTiles, int kRowTiles>
__host__ __device__ constexpr int sums_bytes(int tokens) {
  return sum_buffers(tokens) * kWarpsFor<kMTiles> * kRowTiles * kTileRows * tokens * static_cast<int>(sizeof(float));
}

constexpr int kPackedAtOnce = 4;
constexpr int kMostPacked = 16;  // tokens
constexpr int kScalesBytes = 2 * kMostPacked * sizeof(float);

template <typename Weight, int kMTiles, int kRowTiles, int kDepth>
int product_shared_bytes(int tokens, int64_t row_bytes, int parts) {
  const int chunks = static_cast<int>(row_bytes / kChunkBytes) / parts;
  return ring_bytes<kMTiles, kRowTiles, kDepth>() + sums_bytes<kMTiles, kRowTiles>(tokens) + kScalesBytes +
         chunks * Packing(tokens, Weight::kPlanes).chunk_bytes();
}

// Packs float32 rows of some tokens, from index `first` on, `length` values each.
template <typename Weight, int kThreads>
__device__ __forceinline__ void pack_float_rows(const ProductArguments& a, const Packing& packing, int first, int length,
                                                float* scales, uint8_t* activations) {
  constexpr int kPlanes = Weight::kPlanes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t contraction = a.row_bytes * kPlanes / 2;
  const int quads = length / 4, all = a.tokens * quads;
  float4 v[kPackedAtOnce];  // loaded together, and with the maxima: each load alone would take as long
  auto load = [&](int begin) {
#pragma unroll
    for (int j = 0; j < kPackedAtOnce; ++j) {
      const int i = begin + j * kThreads;
      if (i < all) v[j] = *reinterpret_cast<const float4*>(a.rows + first + (i / quads) * contraction + i % quads * 4);
    }
  };
  load(threadIdx.x);
  if constexpr (kPlanes == 2) {
    for (int token = warp; token < a.tokens; token += kThreads / 32) {
      float most = 0;
#pragma unroll 8
      for (int i = lane; i < a.maxima_count; i += 32) most = larger(most, a.maxima[i * a.tokens + token]);
#pragma unroll
      for (int d = 16; d; d /= 2) most = larger(most, __shfl_xor_sync(~0u, most, d));
      if (lane == 0) scales[token] = plane_scale(most);
    }
    __syncthreads();
  }
  for (int begin = threadIdx.x; begin < all; begin += kPackedAtOnce * kThreads) {
#pragma unroll
    for (int j = 0; j < kPackedAtOnce; ++j) {
      const int i = begin + j * kThreads;
      if (i >= all) break;
      const int token = i / quads;
      const float x[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
      pack4<Weight>(activations, packing, token, i % quads * 4, x, kPlanes == 2 ? 1.0f / scales[token] : 1.0f);
    }
    load(begin + kPackedAtOnce * kThreads);
  }
}

// The same for a residual stream, normalized. The sums' memory is scratch.
template <typename Weight, int kThreads>
__device__ __forceinline__ void pack_normalized(const ProductArguments& a, const Packing& packing, int first, int length,
                                                const uint2 (&weights)[kNormVectors], float* scales,
                                                uint8_t* activations, float* scratch) {
  for (int token = 0; token < a.tokens; ++token) {
    float values[kNormVectors][4], scale;
    const float factor = normalize<kThreads>(a.norm, weights, token, blockIdx.x == 0, values, scale,
                                             scratch + token * 2 * kThreads / 32);
    if (threadIdx.x == 0) scales[token] = scale;
#pragma unroll
    for (int v = 0; v < kNormVectors; ++v) {
      const int k = (v * kThreads + static_cast<int>(threadIdx.x)) * 4 - first;
      if (k < 0 || k >= length) continue;
      const float x[4] = {values[v][0] * factor, values[v][1] * factor, values[v][2] * factor, values[v][3] * factor};
      pack4<Weight>(activations, packing, token, k, x, 1.0f / scale);
    }
  }
}

// kTokens is the number of tokens, or 0 for any.
template <typename Weight, int kMTiles, int kRowTiles, int kDepth, bool kSwiGlu, Input kInput, int kTokens>
__global__ void __launch_bounds__(32 * kWarpsFor<kMTiles>, kMTiles == 1 ? 2 : 1) product(const ProductArguments given) {
  ProductArguments a = given;
  if (kTokens) a.tokens = a.norm.tokens = kTokens;
  extern __shared__ __align__(128) uint8_t shared[];
  constexpr int kWarps = kWarpsFor<kMTiles>, kThreads = 32 * kWarps;
  constexpr int kPlanes = Weight::kPlanes;
  constexpr int kPairs = kSwiGlu ? 2 : 1;
  constexpr int kEach = kRowTiles / kPairs;
  constexpr int kReduced = (kEach * kTileRows * (kMTiles == 2 || kPlanes == 1 ? kMostPacked : 8) + kThreads - 1) / kThreads;
  static_assert(kRowTiles % kPairs == 0);
  const Packing packing(a.tokens, kPlanes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, quad = lane % 4;

  uint8_t* const ring = shared + warp * kDepth * kRowTiles * kLaneChunk + lane * 16;
  float* const sums = reinterpret_cast<float*>(shared + ring_bytes<kMTiles, kRowTiles, kDepth>());
  float* const scales = sums + sums_bytes<kMTiles, kRowTiles>(a.tokens) / sizeof(float);
  uint32_t* const largest = reinterpret_cast<uint32_t*>(scales + kMostPacked);
  uint8_t* const activations = reinterpret_cast<uint8_t*>(largest + kMostPacked);

  release_successor();

  const int part = blockIdx.x % a.parts, walker = blockIdx.x / a.parts, walkers = gridDim.x / a.parts;
  const int chunks = static_cast<int>(a.row_bytes / kChunkBytes) / a.parts;
  const int first_chunk = part * chunks;
  const int half = a.outputs / kPairs;
  const int tiles = half / (kTileRows * kEach);

  // A tile's row of chunks number r begins at this output.
  auto first_output = [&](int tile, int r) { return (r / kEach) * half + (tile * kEach + r % kEach) * kTileRows; };

  // What this warp reads next: every kWarps-th chunk of the tiles laid end to end, so that warps share them evenly.
  int next_tile = walker, next_chunk = warp, next_slot = 0;
  auto fill = [&]() {
    while (next_chunk >= chunks && next_tile < tiles) {
      next_chunk -= chunks;
      next_tile += walkers;
    }
    if (next_tile < tiles) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const int64_t row = first_output(next_tile, r) + group;
        copy_async(ring + (next_slot * kRowTiles + r) * kLaneChunk,
                   a.weight + row * a.row_bytes + static_cast<int64_t>(first_chunk + next_chunk) * kChunkBytes + quad * 16);
      }
    }
    commit_copies();
    next_chunk += kWarps;
    next_slot = next_slot + 1 == kDepth ? 0 : next_slot + 1;
  };
#pragma unroll
  for (int i = 0; i < kDepth - 1; ++i) fill();

  uint2 norm_weights[kNormVectors];
  if constexpr (kInput == Input::kResidual) load_norm_weights<kThreads>(a.norm, norm_weights);
  wait_for_predecessor();

  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < a.counters_count; i += kThreads) a.counters[i] = 0;
  const int length = chunks * kChunkBytes * kPlanes / 2;
  if constexpr (kInput == Input::kPacked) {
    const int held = chunks * packing.chunk_bytes();
    const uint8_t* const mine = a.packed + static_cast<int64_t>(first_chunk) * packing.chunk_bytes();
    for (int at = threadIdx.x * 16; at < held; at += kThreads * 16) copy_async(activations + at, mine + at);
    commit_copies();
    if (kPlanes == 2 && threadIdx.x < a.tokens) scales[threadIdx.x] = a.token_scales[threadIdx.x];
    await_copies<0>();
  } else if constexpr (kInput == Input::kRows) {
    pack_float_rows<Weight, kThreads>(a, packing, part * length, length, scales, activations);
  } else {
    pack_normalized<Weight, kThreads>(a, packing, part * length, length, norm_weights, scales, activations, sums);
  }
  if (threadIdx.x < kMostPacked) largest[threadIdx.x] = 0;
  __syncthreads();

  typename Weight::Sum sum[kMTiles][kRowTiles][4];
  int chunk = warp, slot = 0;
  for (int tile = walker, turn = 0; tile < tiles; tile += walkers, ++turn) {
    // Few threads add up a tile's sums; another warp's take each turn, so that none falls behind. What they scale with is
    // loaded now: memory is busy, and takes its time.
    const int reducer = (threadIdx.x + kThreads - 32 * (turn % kWarps)) % kThreads;
    const int count = kEach * kTileRows * a.tokens;
    float output_scales[kReduced][kPairs] = {};
    if constexpr (kPlanes == 2) {
#pragma unroll
      for (int j = 0; j < kReduced; ++j)
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          const int i = reducer + j * kThreads;
          if (i < count)
            output_scales[j][p] = a.weight_scales[first_output(tile, i / (kTileRows * a.tokens) + p * kEach) + i % kTileRows];
        }
    }

#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][r][i] = 0;

    for (; chunk < chunks; chunk += kWarps) {
      fill();
      await_copies<kDepth - 1>();
      uint4 x[kMTiles][2];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int octet = 2 * m + h;
          x[m][h] = make_uint4(0, 0, 0, 0);
          if (octet < packing.octets && group < packing.octet_tokens) {
            const int at = ((chunk * packing.octets + octet) * packing.octet_tokens + group) * kChunkBytes + quad * 16;
            x[m][h] = *reinterpret_cast<const uint4*>(activations + at);
          }
        }
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const uint4 w = *reinterpret_cast<const uint4*>(ring + (slot * kRowTiles + r) * kLaneChunk);
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          const uint32_t first[4] = {x[m][0].x, x[m][1].x, x[m][0].y, x[m][1].y};
          const uint32_t second[4] = {x[m][0].z, x[m][1].z, x[m][0].w, x[m][1].w};
          Weight::multiply(sum[m][r], first, w.x, w.y);
          Weight::multiply(sum[m][r], second, w.z, w.w);
        }
      }
      slot = slot + 1 == kDepth ? 0 : slot + 1;
    }
    chunk -= chunks;

    // sums[buffer][warp][row tile][token][output of the tile]
    const int buffer = turn % sum_buffers(a.tokens) * kWarps;
    auto place = [&](int w, int r, int token) {
      return sums + (((buffer + w) * kRowTiles + r) * a.tokens + token) * kTileRows;
    };
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const auto& s = sum[m][r];
        if constexpr (kPlanes == 2) {
          const int token = 8 * m + group;
          if (token < a.tokens) {
            // 256 times a sum may exceed int32, so the planes are joined in float32.
            *reinterpret_cast<float2*>(place(warp, r, token) + 2 * quad) =
                make_float2(256.0f * static_cast<float>(s[0]) + static_cast<float>(s[2]),
                            256.0f * static_cast<float>(s[1]) + static_cast<float>(s[3]));
          }
        } else {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int token = 16 * m + 8 * h + group;
            if (token < a.tokens) {
              *reinterpret_cast<float2*>(place(warp, r, token) + 2 * quad) = make_float2(s[2 * h], s[2 * h + 1]);
            }
          }
        }
      }
    __syncthreads();

#pragma unroll
    for (int j = 0; j < kReduced; ++j) {
      const int i = reducer + j * kThreads;
      if (i >= count) break;
      const int column = i % kTileRows, token = i / kTileRows % a.tokens, r = i / (kTileRows * a.tokens);
      auto total = [&](int pair) {
        float value = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) value += place(w, r + pair * kEach, token)[column];
        if constexpr (kPlanes == 2) value *= scales[token] * output_scales[j][pair];
        return value;
      };
      const int output = first_output(tile, r) + column;
      if constexpr (kSwiGlu) {
        const float gate = total(0), up = total(1);
        float value = gate / (1.0f + __expf(-gate)) * up;
        if constexpr (kPlanes == 1) value = __bfloat162float(__float2bfloat16_rn(value));  // as quantization.py's `dot`
        a.out[static_cast<int64_t>(token) * half + output] = value;
        atomicMax(largest + token, __float_as_uint(fabsf(value)));
      } else {
        a.out[(static_cast<int64_t>(part) * a.tokens + token) * a.outputs + output] = total(0);
      }
    }
    if (sum_buffers(a.tokens) == 1) __syncthreads();
  }
  if constexpr (kSwiGlu) {
    __syncthreads();
    if (threadIdx.x < a.tokens) a.out_maxima[blockIdx.x * a.tokens + threadIdx.x] = __uint_as_float(largest[threadIdx.x]);
  }
}

}  // namespace elastic
