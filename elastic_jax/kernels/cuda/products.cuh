// Products of a few tokens with a weight, bound by reading the weight once.
//
// A weight [out, in] is read in chunks: 8 outputs times 64 bytes of the contraction, 16 bytes a lane. Such a chunk is the
// right operand of the tensor cores (m16n8k32 for int8, m16n8k16 for bf16), as it lies: the order of the contraction's
// elements inside a chunk is any, if the activations have the same. Their rows are the left operand, and few of its 16
// rows are used, which costs nothing while reading is the limit.
//
// Activations are laid out for that ("packed"): [chunk][octet][token of the octet][64 bytes]. An octet is one half of the
// left operand's rows. With int8 weights a token has two rows, the high and low plane of a 16-bit activation
// (quantization.py): octets 2m and 2m + 1 are the planes of tokens 8m to 8m + 7. With bf16 weights it has one.
//
// A block keeps the activations of its part of the contraction in shared memory and walks over tiles of outputs; its
// warps share every tile's chunks, each with its own ring of chunks in flight, and add their sums in shared memory. The
// ring is filled before the kernel waits for its predecessor in the stream: weights never change.
//
// Activations arrive packed (activations.cuh), or as float32 rows that every block packs for itself.

#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace elastic {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kChunkBytes = 64;  // of one output's row
constexpr int kTileRows = 8;     // outputs of one chunk
constexpr int kLaneChunk = kTileRows * kChunkBytes;

// Lets the next kernel of the stream start, as far as its `wait_for_predecessor`.
__device__ __forceinline__ void release_successor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until everything that the kernel before wrote can be read; nothing but weights may be touched earlier.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

struct Int8 {
  using Sum = int32_t;
  static constexpr int kPlanes = 2;

  __device__ static void multiply(Sum (&sum)[4], const uint32_t (&x)[4], uint32_t w0, uint32_t w1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(w0), "r"(w1));
  }
};

struct Bf16 {
  using Sum = float;
  static constexpr int kPlanes = 1;

  __device__ static void multiply(Sum (&sum)[4], const uint32_t (&x)[4], uint32_t w0, uint32_t w1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(w0), "r"(w1));
  }
};

// How activations of some tokens are packed.
struct Packing {
  int tokens;
  int octets;
  int octet_tokens;  // 8, or all tokens where they are fewer

  __host__ __device__ Packing(int tokens_, int planes)
      : tokens(tokens_), octets(planes * ((tokens_ + 7) / 8)), octet_tokens(tokens_ < 8 ? tokens_ : 8) {}

  __host__ __device__ int chunk_bytes() const { return octets * octet_tokens * kChunkBytes; }

  // Where 64 bytes of one token's plane begin.
  __device__ int64_t at(int chunk, int plane, int planes, int token) const {
    const int octet = token / 8 * planes + plane;
    return (static_cast<int64_t>(chunk * octets + octet) * octet_tokens + token % 8) * kChunkBytes;
  }
};


constexpr float kPlaneMax = 127.0f * 256.0f;  // largest 16-bit activation (quantization.py)

__device__ __forceinline__ float plane_scale(float largest) {
  const float scale = largest / kPlaneMax;
  return scale < 1.17549435e-38f ? 1.0f : scale;
}

// The high and low planes of 4 activations, as bytes of two words.
__device__ __forceinline__ void split_planes(const float (&x)[4], float inverse, uint32_t& high, uint32_t& low) {
  high = low = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float bounded = fminf(fmaxf(x[i] * inverse, -kPlaneMax), kPlaneMax);
    const int q = __float2int_rn(bounded);
    const int h = (q + 128) >> 8;
    high |= static_cast<uint32_t>(h & 255) << (8 * i);
    low |= static_cast<uint32_t>((q - (h << 8)) & 255) << (8 * i);
  }
}

__device__ __forceinline__ uint32_t bf16_pair(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Writes 4 activations of one token, at contracted index k (a multiple of 4 of this block's part), into packed ones.
template <typename Weight>
__device__ __forceinline__ void pack4(uint8_t* packed, const Packing& packing, int token, int k, const float (&x)[4],
                                      float inverse) {
  if constexpr (Weight::kPlanes == 2) {
    const int chunk = k / kChunkBytes, byte = k % kChunkBytes;
    uint32_t high, low;
    split_planes(x, inverse, high, low);
    *reinterpret_cast<uint32_t*>(packed + packing.at(chunk, 0, 2, token) + byte) = high;
    *reinterpret_cast<uint32_t*>(packed + packing.at(chunk, 1, 2, token) + byte) = low;
  } else {
    const int chunk = 2 * k / kChunkBytes, byte = 2 * k % kChunkBytes;
    *reinterpret_cast<uint2*>(packed + packing.at(chunk, 0, 1, token) + byte) =
        make_uint2(bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]));
  }
}

struct ProductArguments {
  const uint8_t* weight;       // [outputs][row_bytes]
  const float* weight_scales;  // [outputs], int8 only
  int outputs;
  int64_t row_bytes;
  int tokens;
  int parts;  // of the contraction, each computed by other blocks
  // Either packed activations and, for int8, their scales [tokens]...
  const uint8_t* packed;
  const float* token_scales;
  // ... or rows [tokens][contraction], and for int8 maxima [maxima_count][tokens] whose largest is each row's.
  const float* rows;
  const float* maxima;
  int maxima_count;
  // Plain: out [parts][tokens][outputs]. SwiGlu: out [tokens][outputs / 2] = silu(first half) * second half, and
  // out_maxima [blocks][tokens], the largest magnitude that each block wrote.
  float* out;
  float* out_maxima;
};

template <int kRowTiles, int kDepth>
__host__ __device__ constexpr int ring_bytes() {
  return kWarps * kDepth * kRowTiles * kLaneChunk;
}

template <int kRowTiles>
__host__ __device__ constexpr int sums_bytes(int tokens) {
  return kWarps * kRowTiles * kTileRows * tokens * static_cast<int>(sizeof(float));
}

constexpr int kMostTokens = 16;
constexpr int kPackedAtOnce = 8;
constexpr int kScalesBytes = 2 * kMostTokens * sizeof(float);

template <typename Weight, int kRowTiles, int kDepth>
int product_shared_bytes(int tokens, int64_t row_bytes, int parts) {
  const int chunks = static_cast<int>(row_bytes / kChunkBytes) / parts;
  return ring_bytes<kRowTiles, kDepth>() + sums_bytes<kRowTiles>(tokens) + kScalesBytes +
         chunks * Packing(tokens, Weight::kPlanes).chunk_bytes();
}

template <typename Weight, int kMTiles, int kRowTiles, int kDepth, bool kSwiGlu>
__global__ void __launch_bounds__(kThreads, kMTiles == 1 ? 2 : 1) product(const ProductArguments a) {
  extern __shared__ __align__(128) uint8_t shared[];
  constexpr int kPlanes = Weight::kPlanes;
  constexpr int kPairs = kSwiGlu ? 2 : 1;
  static_assert(kRowTiles % kPairs == 0);
  const Packing packing(a.tokens, kPlanes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, quad = lane % 4;

  uint8_t* const ring = shared + warp * kDepth * kRowTiles * kLaneChunk + lane * 16;
  float* const sums = reinterpret_cast<float*>(shared + ring_bytes<kRowTiles, kDepth>());
  float* const scales = sums + sums_bytes<kRowTiles>(a.tokens) / sizeof(float);
  uint32_t* const largest = reinterpret_cast<uint32_t*>(scales + kMostTokens);
  uint8_t* const activations = reinterpret_cast<uint8_t*>(largest + kMostTokens);

  release_successor();

  const int part = blockIdx.x % a.parts, walker = blockIdx.x / a.parts, walkers = gridDim.x / a.parts;
  const int chunks = static_cast<int>(a.row_bytes / kChunkBytes) / a.parts;
  const int first_chunk = part * chunks;
  const int half = a.outputs / kPairs;
  const int tiles = half / (kTileRows * kRowTiles / kPairs);

  // A tile's row of chunks number r begins at this output.
  auto first_output = [&](int tile, int r) {
    if constexpr (!kSwiGlu) return (tile * kRowTiles + r) * kTileRows;
    constexpr int kEach = kRowTiles / kPairs;
    return (r / kEach) * half + (tile * kEach + r % kEach) * kTileRows;
  };

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

  wait_for_predecessor();

  if (a.packed) {
    const int held = chunks * packing.chunk_bytes();
    const uint8_t* const mine = a.packed + static_cast<int64_t>(first_chunk) * packing.chunk_bytes();
    for (int at = threadIdx.x * 16; at < held; at += kThreads * 16) copy_async(activations + at, mine + at);
    commit_copies();
    if (kPlanes == 2 && threadIdx.x < a.tokens) scales[threadIdx.x] = a.token_scales[threadIdx.x];
    await_copies<0>();
  } else {
    if constexpr (kPlanes == 2) {
      for (int token = warp; token < a.tokens; token += kWarps) {
        float most = 0;
        for (int i = lane; i < a.maxima_count; i += 32) most = fmaxf(most, a.maxima[i * a.tokens + token]);
#pragma unroll
        for (int d = 16; d; d /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
        if (lane == 0) scales[token] = plane_scale(most);
      }
      __syncthreads();
    }
    const int length = chunks * kChunkBytes * kPlanes / 2;
    const int64_t contraction = a.row_bytes * kPlanes / 2;
    const float* const mine = a.rows + static_cast<int64_t>(part) * length;
    const int quads = length / 4, all = a.tokens * quads;
    for (int first = threadIdx.x; first < all; first += kPackedAtOnce * kThreads) {
      float4 v[kPackedAtOnce];  // loaded together: each load alone would take as long
#pragma unroll
      for (int j = 0; j < kPackedAtOnce; ++j) {
        const int i = first + j * kThreads;
        if (i < all) v[j] = *reinterpret_cast<const float4*>(mine + (i / quads) * contraction + i % quads * 4);
      }
#pragma unroll
      for (int j = 0; j < kPackedAtOnce; ++j) {
        const int i = first + j * kThreads;
        if (i >= all) break;
        const int token = i / quads;
        const float x[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
        pack4<Weight>(activations, packing, token, i % quads * 4, x, kPlanes == 2 ? 1.0f / scales[token] : 1.0f);
      }
    }
  }
  if (threadIdx.x < kMostTokens) largest[threadIdx.x] = 0;
  __syncthreads();

  typename Weight::Sum sum[kMTiles][kRowTiles][4];
  int chunk = warp, slot = 0;
  for (int tile = walker, turn = 0; tile < tiles; tile += walkers, ++turn) {
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

    // sums[warp][row tile][token][output of the tile]
    auto place = [&](int w, int r, int token) { return sums + ((w * kRowTiles + r) * a.tokens + token) * kTileRows; };
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

    // Few threads are needed; another warp's take each turn, so that none falls behind.
    const int count = kRowTiles / kPairs * kTileRows * a.tokens;
    for (int i = (threadIdx.x + kThreads - 32 * (turn % kWarps)) % kThreads; i < count; i += kThreads) {
      const int column = i % kTileRows, token = i / kTileRows % a.tokens, r = i / (kTileRows * a.tokens);
      auto total = [&](int row_tile) {
        float value = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) value += place(w, row_tile, token)[column];
        if constexpr (kPlanes == 2) value *= scales[token] * a.weight_scales[first_output(tile, row_tile) + column];
        return value;
      };
      const int output = first_output(tile, r) + column;
      if constexpr (kSwiGlu) {
        const float gate = total(r), up = total(r + kRowTiles / kPairs);
        const float value = gate / (1.0f + __expf(-gate)) * up;
        a.out[static_cast<int64_t>(token) * half + output] = value;
        atomicMax(largest + token, __float_as_uint(fabsf(value)));
      } else {
        a.out[(static_cast<int64_t>(part) * a.tokens + token) * a.outputs + output] = total(r);
      }
    }
    __syncthreads();
  }
  if constexpr (kSwiGlu) {
    if (threadIdx.x < a.tokens) a.out_maxima[blockIdx.x * a.tokens + threadIdx.x] = __uint_as_float(largest[threadIdx.x]);
  }
}

}  // namespace elastic
