// Products of matrices for many rows on Hopper. Of int8: out = ending((x * row_scales) @ (values * scales).T), with exact
// integer sums; of bf16: out = ending(x @ values.T), with float sums.
//
// A block is three warpgroups: one thread of the first fetches tiles of both operands into shared memory, always
// kStages - 1 ahead of the two others, which multiply 64 rows each with all outputs of the tile. Blocks are as many as
// multiprocessors and walk over tiles, so that the next tile's operands arrive while the last one's sums are scaled and
// stored. Sums of one warpgroup are stored while the other's products keep the tensor cores busy: they may be
// kStages - 1 steps apart.

#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "hopper.cuh"

namespace elastic {

enum class Ending {
  kPlain,     // the product, float32
  kAdded,     // residual + the product, both bf16
  kActivated  // SwiGLU of the product, whose first half of columns are gates; bf16
};

struct DotArguments {
  const void* x;            // [rows, row_bytes]
  const float* row_scales;  // [rows, blocks], of int8 only
  const void* values;       // [outputs, row_bytes]
  const float* scales;      // [outputs], of int8 only
  const __nv_bfloat16* residual;  // [rows, outputs], for Ending::kAdded
  void* out;                      // [rows, outputs or half of them]
  int rows, outputs, row_bytes, blocks;
  int together;  // tiles of rows that are walked for one tile of outputs after the other, for the L2 cache's sake
};

constexpr int kTileRows = 128, kStep = kOperandBytes;
constexpr int kMultipliers = 2;  // warpgroups
constexpr int kDotThreads = (kMultipliers + 1) * kWarpgroup;

// What is fetched at once, and how often ahead.
template <int kWidth>
struct Ring {
  static constexpr int kStages = kWidth == 256 ? 4 : 6;
  static constexpr int kLeft = kTileRows * kStep, kRight = kWidth * kStep, kStage = kLeft + kRight;
  // Behind the operands, which are aligned to 1024 bytes.
  struct Barriers {
    uint64_t full[kStages], empty[kStages];
  };
  static constexpr int kBytes = 1024 + kStages * kStage + static_cast<int>(sizeof(Barriers));
};

// Which tile of rows and outputs a number stands for: groups of `together` tiles of rows walk over all outputs, every
// other group backwards, which finds the last group's last weights in the cache.
struct TileOrder {
  int row_tiles, out_tiles, together;

  __device__ int count() const { return row_tiles * out_tiles; }
  __device__ void find(int number, int* row_tile, int* out_tile) const {
    const int group = number / (together * out_tiles), inside = number - group * together * out_tiles;
    const int height = min(together, row_tiles - group * together), out = inside / height;
    *row_tile = group * together + inside - out * height;
    *out_tile = group % 2 == 0 ? out : out_tiles - 1 - out;
  }
};

// Four threads have four words each: afterwards each has one of every thread, and thread t those that were words[t].
__device__ inline void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int first = 0; first < 4; ++first) {
      if (first & distance) continue;
      uint32_t &low = words[first], &high = words[first | distance];
      const uint32_t other = __shfl_xor_sync(0xffffffff, upper ? low : high, distance);
      (upper ? low : high) = other;
    }
  }
}

// Rounded to nearest as one bf16 each.
__device__ inline uint32_t packed(float first, float second) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ inline uint32_t added(uint32_t a, uint32_t b) {
  const auto numbers = [](uint32_t word) { return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&word)); };
  const float2 left = numbers(a), right = numbers(b);
  return packed(left.x + right.x, left.y + right.y);
}

__device__ inline float activated(float gate, float up) {
  float silu;
  asm("div.full.f32 %0, %1, %2;" : "=f"(silu) : "f"(gate), "f"(1.0f + __expf(-gate)));
  return silu * up;
}

// Scales (if kScaled) and stores what a warpgroup has of a tile. `total(j, k)` is number k of the thread's four of eight columns j,
// two of one row and two of the row 8 below, without the outputs' scales.
template <int kWidth, Ending kEnding, bool kScaled, typename Total>
__device__ inline void store_tile(const DotArguments& a, int row, int out_tile, const Total& total) {
  constexpr int kOctets = kWidth / 8, kStored = kEnding == Ending::kActivated ? kOctets / 2 : kOctets;
  const int lane = threadIdx.x % 32, quarter = lane % 4, first = out_tile * kStored * 8;
  const int columns = kEnding == Ending::kActivated ? a.outputs / 2 : a.outputs;
#pragma unroll
  for (int four = 0; four < kStored; four += 4) {
    uint32_t words[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = four + i, column = first + 8 * j + 2 * quarter;
      float2 scale = {1, 1}, up_scale = {1, 1};
      if constexpr (kScaled) {
        scale = __ldg(reinterpret_cast<const float2*>(a.scales + column));
        if constexpr (kEnding == Ending::kActivated)
          up_scale = __ldg(reinterpret_cast<const float2*>(a.scales + columns + column));
      }
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        float2 found = {total(j, 2 * below) * scale.x, total(j, 2 * below + 1) * scale.y};
        if constexpr (kEnding == Ending::kActivated) {
          found.x = activated(found.x, total(j + kStored, 2 * below) * up_scale.x);
          found.y = activated(found.y, total(j + kStored, 2 * below + 1) * up_scale.y);
        }
        if constexpr (kEnding == Ending::kPlain) {
          float* const to = static_cast<float*>(a.out) + static_cast<size_t>(row + 8 * below) * columns + column;
          if (row + 8 * below < a.rows) *reinterpret_cast<float2*>(to) = found;
        } else {
          words[below][i] = packed(found.x, found.y);
        }
      }
    }
    if constexpr (kEnding != Ending::kPlain) {
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        transpose_quad(words[below]);  // pieces of 16 bytes, of which a row has 64 in a quad
        if (row + 8 * below >= a.rows) continue;
        uint32_t(&w)[4] = words[below];
        const size_t at = static_cast<size_t>(row + 8 * below) * columns + first + 8 * (four + quarter);
        if constexpr (kEnding == Ending::kAdded) {
          // As `quantization.add_product`: the product is rounded before it is added.
          const uint4 there = __ldg(reinterpret_cast<const uint4*>(a.residual + at));
          w[0] = added(there.x, w[0]);
          w[1] = added(there.y, w[1]);
          w[2] = added(there.z, w[2]);
          w[3] = added(there.w, w[3]);
        }
        *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(a.out) + at) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }
}

// Sum: int32_t of int8 operands, float of bf16. kBlocked: a row has several scales.
template <typename Sum, int kWidth, Ending kEnding, bool kBlocked>
__global__ void __launch_bounds__(kDotThreads, 1)
    prompt_dot(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap values_map,
                const __grid_constant__ DotArguments a) {
  using Ring = elastic::Ring<kWidth>;
  constexpr bool kScaled = std::is_same_v<Sum, int32_t>;
  constexpr int kHalf = kWidth / 2;  // outputs that are fetched at once; with a gate, those of one half
  extern __shared__ uint8_t unaligned[];
  uint8_t* const operands = unaligned + (-shared_address(unaligned) & 1023);
  auto& barriers = *reinterpret_cast<typename Ring::Barriers*>(operands + Ring::kStages * Ring::kStage);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Ring::kStages; ++stage) {
      init_barrier(&barriers.full[stage], 1);
      init_barrier(&barriers.empty[stage], kMultipliers * kWarpgroup / 32);
    }
    fence_barriers();
  }
  __syncthreads();

  const TileOrder order = {(a.rows + kTileRows - 1) / kTileRows, a.outputs / kWidth, a.together};
  const int warpgroup = threadIdx.x / kWarpgroup, steps = a.row_bytes / kStep;
  RingPlace<Ring::kStages> at;
  if (warpgroup == 0) {
    leave_registers<40>();
    if (threadIdx.x != 0) return;
    for (int number = blockIdx.x; number < order.count(); number += gridDim.x) {
      int row_tile, out_tile;
      order.find(number, &row_tile, &out_tile);
      const bool paired = kEnding == Ending::kActivated;
      const int first = out_tile * (paired ? kHalf : kWidth), second = first + (paired ? a.outputs / 2 : kHalf);
      for (int step = 0; step < steps; ++step, at.advance()) {
        uint8_t* const left = operands + at.stage * Ring::kStage;
        uint64_t* const full = &barriers.full[at.stage];
        wait(&barriers.empty[at.stage], at.turn ^ 1);
        arrive_expecting(full, Ring::kStage);
        fetch<false>(left, &x_map, step * kStep, row_tile * kTileRows, full);
        fetch<false>(left + Ring::kLeft, &values_map, step * kStep, first, full);
        fetch<false>(left + Ring::kLeft + kHalf * kStep, &values_map, step * kStep, second, full);
      }
    }
    return;
  }

  take_registers<232>();
  const int lane = threadIdx.x % 32, block_steps = steps / a.blocks;
  const int inside = (warpgroup - 1) * 64 + threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
  Sum sums[kHalf] = {};
  float totals[kBlocked ? kHalf : 1];
  for (int number = blockIdx.x; number < order.count(); number += gridDim.x) {
    int row_tile, out_tile;
    order.find(number, &row_tile, &out_tile);
    const int row = row_tile * kTileRows + inside;
    float scale = 1, scale_below = 1;
    if constexpr (kBlocked) {
#pragma unroll
      for (float& total : totals) total = 0;
    }
    for (int block = 0; block < a.blocks; ++block) {
      if constexpr (kScaled) {
        if (row < a.rows) scale = __ldg(a.row_scales + static_cast<size_t>(row) * a.blocks + block);
        if (row + 8 < a.rows) scale_below = __ldg(a.row_scales + static_cast<size_t>(row + 8) * a.blocks + block);
      }
      uint64_t* unfinished = nullptr;
      for (int step = 0; step < block_steps; ++step, at.advance()) {
        const uint8_t* const left = operands + at.stage * Ring::kStage;
        const uint64_t x = describe(left + (warpgroup - 1) * 64 * kStep), values = describe(left + Ring::kLeft);
        wait(&barriers.full[at.stage], at.turn);
        pin(sums);
        begin_products();
#pragma unroll
        for (int part = 0; part < kStep / 32; ++part)
          multiply_tiles(sums, x + 2 * part, values + 2 * part, step > 0 || part > 0);
        commit_products();
        // Products of one step follow those of the last without a gap; what the last read may then be overwritten.
        wait_products<1>();
        pin(sums);
        if (unfinished != nullptr && lane == 0) arrive(unfinished);
        unfinished = &barriers.empty[at.stage];
      }
      wait_products<0>();
      pin(sums);
      if (lane == 0) arrive(unfinished);
      if constexpr (kBlocked) {
#pragma unroll
        for (int i = 0; i < kHalf; ++i) totals[i] += static_cast<float>(sums[i]) * (i % 4 < 2 ? scale : scale_below);
      }
    }
    store_tile<kWidth, kEnding, kScaled>(a, row, out_tile, [&](int j, int k) {
      if constexpr (kBlocked) return totals[4 * j + k];
      return static_cast<float>(sums[4 * j + k]) * (k < 2 ? scale : scale_below);
    });
    __syncwarp();  // Products are begun by whole warps.
  }
}

// -- launches ---------------------------------------------------------------------------------------------------------

struct Launched {
  const char* what;  // was tried, where it failed
  cudaError_t error;
};

template <typename Sum, int kWidth, Ending kEnding, bool kBlocked>
Launched launch_dot(const DotArguments& a, cudaStream_t stream) {
  auto* const kernel = &prompt_dot<Sum, kWidth, kEnding, kBlocked>;
  CUtensorMap x_map, values_map;
  cudaError_t error = describe_matrix(&x_map, a.x, a.rows, a.row_bytes, kTileRows);
  if (error == cudaSuccess) error = describe_matrix(&values_map, a.values, a.outputs, a.row_bytes, kWidth / 2);
  if (error != cudaSuccess) return {"describing operands", error};
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Ring<kWidth>::kBytes);
  if (error != cudaSuccess) return {"taking shared memory", error};
  int id = 0, multiprocessors = 1;
  cudaGetDevice(&id);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, id);
  const int tiles = (a.rows + kTileRows - 1) / kTileRows * (a.outputs / kWidth);
  kernel<<<std::min(tiles, multiprocessors), kDotThreads, Ring<kWidth>::kBytes, stream>>>(x_map, values_map, a);
  return {"launching", cudaGetLastError()};
}

template <typename Sum, int kWidth, bool kBlocked>
Launched launch_dot(const DotArguments& a, Ending ending, cudaStream_t stream) {
  switch (ending) {
    case Ending::kPlain: return launch_dot<Sum, kWidth, Ending::kPlain, kBlocked>(a, stream);
    case Ending::kAdded: return launch_dot<Sum, kWidth, Ending::kAdded, kBlocked>(a, stream);
    default: return launch_dot<Sum, kWidth, Ending::kActivated, kBlocked>(a, stream);
  }
}

// In tiles of `width` outputs, 256 or 128; 128 with scales of blocks, which take twice the registers. The width divides
// the outputs, the length of a step divides that of a block, and there are rows. Of bf16 where there are no scales.
inline Launched run_dot(const DotArguments& a, Ending ending, int width, cudaStream_t stream) {
  const bool fits = a.rows > 0 && a.blocks > 0 && a.outputs % width == 0 && a.row_bytes % (a.blocks * kStep) == 0 &&
                    a.row_bytes > 0 && a.together > 0 && (width == 128 || (width == 256 && a.blocks == 1));
  if (!fits) return {"sizes", cudaErrorInvalidValue};
  if (a.scales == nullptr) {
    if (a.blocks != 1) return {"sizes", cudaErrorInvalidValue};
    return width == 256 ? launch_dot<float, 256, false>(a, ending, stream) : launch_dot<float, 128, false>(a, ending, stream);
  }
  if (width == 256) return launch_dot<int32_t, 256, false>(a, ending, stream);
  return a.blocks == 1 ? launch_dot<int32_t, 128, false>(a, ending, stream)
                       : launch_dot<int32_t, 128, true>(a, ending, stream);
}

}  // namespace elastic
