// Attention of prompt tokens over the paged cache on Hopper: causal, chunks of several rows one after the other.
//
// It is FlashAttention (Dao, arXiv:2205.14135) as Hopper wants it (Shah et al., arXiv:2407.08608): one thread fetches by
// TMA, two warpgroups multiply 64 rows each, by turns with their softmax, so that one's products hide the other's
// exponentials. A tile's rows are some tokens of one chunk times all query heads of one key-value head: keys and values are
// read once for the group, and the triangle that causality leaves unused is small. A block of keys is fetched page by page
// through the block table. Blocks are as many as multiprocessors and go from tile to tile, a chunk's longest first; the
// next tile's queries and first keys arrive while the last one's sums are stored.
//
// Softmax's weights are rounded to bf16 before they multiply the values, and stay in registers.

#pragma once

#include <cuda_bf16.h>

#include <algorithm>

#include "hopper.cuh"

namespace elastic {

constexpr int kHeadDim = 128;
constexpr int kQueryRows = 128, kKeyBlock = 128;
constexpr int kPagePiece = 64;  // keys that are fetched at once: all of one page
constexpr int kAttentionThreads = 3 * kWarpgroup;

struct PromptAttentionArguments {
  const int* table;  // [rows][pages]
  const int4* work;  // [tiles]: first token, tokens, row, position of the first; negative of padding
  float* out;        // [tokens][heads][kHeadDim]
  int tiles, heads, kv_heads, pages, page_size;
};

// A tile's operands in shared memory: 64 numbers of each row, then the other 64.
struct AttentionRing {
  static constexpr int kStages = 2;
  static constexpr int kHalf = 128 * kOperandBytes, kOperand = 2 * kHalf;
  struct Barriers {
    uint64_t query_full, query_empty;
    uint64_t keys_full[kStages], keys_empty[kStages], values_full[kStages], values_empty[kStages];
  };
  static constexpr int kBytes = 1024 + (1 + 2 * kStages) * kOperand + static_cast<int>(sizeof(Barriers));
};

struct AttentionTile {
  int first_token, tokens, row, position, head, end, blocks;

  __device__ AttentionTile(const PromptAttentionArguments& a, int number) {
    const int4 found = __ldg(a.work + number / a.kv_heads);
    first_token = found.x;
    tokens = found.y;
    row = found.z;
    position = found.w;
    head = number % a.kv_heads;
    end = max(position + tokens, 0);
    blocks = tokens > 0 ? (end + kKeyBlock - 1) / kKeyBlock : 0;
  }
};

__device__ inline float power_of_two(float x) {
  float found;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(x));
  return found;
}

// kGroup: query heads of a key-value head.
template <int kGroup>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    prompt_attention(const __grid_constant__ CUtensorMap query_map, const __grid_constant__ CUtensorMap kv_map,
                     const __grid_constant__ PromptAttentionArguments a) {
  using Ring = AttentionRing;
  constexpr int kStages = Ring::kStages;
  extern __shared__ uint8_t unaligned[];
  uint8_t* const query = unaligned + (-shared_address(unaligned) & 1023);
  uint8_t* const keys = query + Ring::kOperand;
  uint8_t* const values = keys + kStages * Ring::kOperand;
  auto& barriers = *reinterpret_cast<Ring::Barriers*>(values + kStages * Ring::kOperand);
  constexpr int kArrivals = 2 * kWarpgroup / 32;
  if (threadIdx.x == 0) {
    init_barrier(&barriers.query_full, 1);
    init_barrier(&barriers.query_empty, kArrivals);
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(&barriers.keys_full[stage], 1);
      init_barrier(&barriers.keys_empty[stage], kArrivals);
      init_barrier(&barriers.values_full[stage], 1);
      init_barrier(&barriers.values_empty[stage], kArrivals);
    }
    fence_barriers();
  }
  __syncthreads();

  const int count = a.tiles * a.kv_heads, warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0);
  RingPlace<kStages> at;
  uint32_t turn = 0;  // of the queries
  if (warpgroup == 0) {
    leave_registers<24>();
    if (threadIdx.x != 0) return;
    for (int number = blockIdx.x; number < count; number += gridDim.x) {
      const AttentionTile tile(a, number);
      if (tile.blocks == 0) continue;
      wait(&barriers.query_empty, turn ^ 1);
      arrive_expecting(&barriers.query_full, Ring::kOperand);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        fetch(query + half * Ring::kHalf, &query_map, half * kHeadDim / 2, tile.head * kGroup, tile.first_token,
              &barriers.query_full);
      turn ^= 1;
      const int* const table = a.table + static_cast<int64_t>(tile.row) * a.pages;
      for (int block = 0; block < tile.blocks; ++block, at.advance()) {
        int slots[kKeyBlock / kPagePiece], pieces = 0;
#pragma unroll
        for (int piece = 0; piece < kKeyBlock / kPagePiece; ++piece) {
          const int key = block * kKeyBlock + piece * kPagePiece;
          if (key >= tile.end) break;
          slots[piece] = __ldg(table + key / a.page_size) * a.page_size + key % a.page_size;
          ++pieces;
        }
        auto fetch_all = [&](uint8_t* to, int which, uint64_t* full, uint64_t* empty) {
          wait(empty, at.turn ^ 1);
          arrive_expecting(full, pieces * kPagePiece * 2 * kOperandBytes);
#pragma unroll
          for (int piece = 0; piece < kKeyBlock / kPagePiece; ++piece) {
            if (piece >= pieces) break;
#pragma unroll
            for (int half = 0; half < 2; ++half)
              fetch(to + half * Ring::kHalf + piece * kPagePiece * kOperandBytes, &kv_map, half * kHeadDim / 2,
                    which * a.kv_heads + tile.head, slots[piece], full);
          }
        };
        const int place = at.stage * Ring::kOperand;
        fetch_all(keys + place, 0, &barriers.keys_full[at.stage], &barriers.keys_empty[at.stage]);
        fetch_all(values + place, 1, &barriers.values_full[at.stage], &barriers.values_empty[at.stage]);
      }
    }
    return;
  }

  take_registers<240>();
  const int lane = threadIdx.x % 32, quarter = lane % 4;
  // Of the tile's rows this thread has `inside` and 8 below, and of every 8 columns two.
  const int inside = (warpgroup - 1) * 64 + threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
  const uint64_t left = describe(query + (warpgroup - 1) * 64 * kOperandBytes);
  const float scale = 1.44269504088896f * rsqrtf(static_cast<float>(kHeadDim));  // of a softmax in base 2

  for (int number = blockIdx.x; number < count; number += gridDim.x) {
    const AttentionTile tile(a, number);
    float out[kHeadDim / 2] = {}, total[2] = {}, largest[2] = {-1e30f, -1e30f};
    float scores[kKeyBlock / 2] = {};
    uint32_t weights[kKeyBlock / 4];

    auto begin_scores = [&](int stage) {
      const uint64_t right = describe(keys + stage * Ring::kOperand);
      pin(scores);
      begin_products();
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        const int step = k / 4 * (Ring::kHalf >> 4) + k % 4 * 2;
        multiply_tiles(scores, left + step, right + step, k > 0);
      }
      commit_products();
    };
    auto begin_out = [&](int stage) {
      const uint64_t right = describe_columns(values + stage * Ring::kOperand, Ring::kHalf);
      pin(out);
      pin(weights);
      begin_products();
#pragma unroll
      for (int k = 0; k < kKeyBlock / 16; ++k)
        multiply_columns(out, weights[4 * k], weights[4 * k + 1], weights[4 * k + 2], weights[4 * k + 3],
                         right + k * (16 * kOperandBytes >> 4));
      commit_products();
    };
    auto soften = [&](int block) {
      if ((block + 1) * kKeyBlock > tile.position + 1) {
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const int last = tile.position + (inside + 8 * below) / kGroup - block * kKeyBlock - 2 * quarter;
#pragma unroll
          for (int j = 0; j < kKeyBlock / 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (8 * j + e > last) scores[4 * j + 2 * below + e] = -1e30f;
        }
      }
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        float most = largest[below];
#pragma unroll
        for (int j = 0; j < kKeyBlock / 8; ++j)
          most = fmaxf(most, fmaxf(scores[4 * j + 2 * below], scores[4 * j + 2 * below + 1]));
#pragma unroll
        for (int d = 1; d < 4; d *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
        const float shrink = power_of_two((largest[below] - most) * scale), offset = most * scale;
        largest[below] = most;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < kKeyBlock / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& each = scores[4 * j + 2 * below + e];
            each = power_of_two(each * scale - offset);
            sum += each;
          }
        total[below] = total[below] * shrink + sum;
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j) {
          out[4 * j + 2 * below] *= shrink;
          out[4 * j + 2 * below + 1] *= shrink;
        }
      }
#pragma unroll
      for (int i = 0; i < kKeyBlock / 4; ++i) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(scores[2 * i], scores[2 * i + 1]);
        weights[i] = *reinterpret_cast<const uint32_t*>(&pair);
      }
    };
    // What lies behind the last key may be anything, and no weight of zero makes a NaN harmless.
    auto clear_unwritten = [&](int stage, int written) {
      uint8_t* const of_stage = values + stage * Ring::kOperand;
      for (int i = threadIdx.x - kWarpgroup + written * 8; i < kKeyBlock * 8; i += 2 * kWarpgroup)
#pragma unroll
        for (int half = 0; half < 2; ++half) *reinterpret_cast<uint4*>(of_stage + half * Ring::kHalf + i * 16) = uint4{};
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      wait_for_threads<2 * kWarpgroup>();
    };

    if (tile.blocks > 0) {
      wait(&barriers.query_full, turn);
      turn ^= 1;
      wait(&barriers.keys_full[at.stage], at.turn);
      begin_scores(at.stage);
      wait_products<0>();
      pin(scores);
      if (lane == 0) arrive(&barriers.keys_empty[at.stage]);
      for (int block = 0; block + 1 < tile.blocks; ++block) {
        soften(block);
        const int stage = at.stage;
        wait(&barriers.values_full[stage], at.turn);
        begin_out(stage);
        at.advance();
        wait(&barriers.keys_full[at.stage], at.turn);
        begin_scores(at.stage);
        wait_products<0>();
        pin(out);
        pin(scores);
        if (lane == 0) {
          arrive(&barriers.values_empty[stage]);
          arrive(&barriers.keys_empty[at.stage]);
        }
      }
      if (lane == 0) arrive(&barriers.query_empty);
      const int block = tile.blocks - 1, written = tile.end - block * kKeyBlock;
      soften(block);
      wait(&barriers.values_full[at.stage], at.turn);
      if (written < kKeyBlock) clear_unwritten(at.stage, written);
      begin_out(at.stage);
      wait_products<0>();
      pin(out);
      if (lane == 0) arrive(&barriers.values_empty[at.stage]);
      at.advance();
    }
#pragma unroll
    for (int below = 0; below < 2; ++below) {
#pragma unroll
      for (int d = 1; d < 4; d *= 2) total[below] += __shfl_xor_sync(~0u, total[below], d);
      const float inverse = total[below] == 0 ? 1.0f : 1.0f / total[below];
      const int row = inside + 8 * below, token = row / kGroup;
      if (token >= tile.tokens) continue;
      float* const to =
          a.out + (static_cast<int64_t>(tile.first_token + token) * a.heads + tile.head * kGroup + row % kGroup) * kHeadDim;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j)
        *reinterpret_cast<float2*>(to + 8 * j + 2 * quarter) = {out[4 * j + 2 * below] * inverse,
                                                               out[4 * j + 2 * below + 1] * inverse};
    }
    __syncwarp();
  }
}

// -- launches ---------------------------------------------------------------------------------------------------------

template <int kGroup>
cudaError_t launch_prompt_attention(const CUtensorMap& query_map, const CUtensorMap& kv_map,
                                    const PromptAttentionArguments& a, cudaStream_t stream) {
  auto* const kernel = &prompt_attention<kGroup>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, AttentionRing::kBytes);
  if (error != cudaSuccess) return error;
  int id = 0, multiprocessors = 1;
  cudaGetDevice(&id);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, id);
  const int blocks = std::min(a.tiles * a.kv_heads, multiprocessors);
  kernel<<<blocks, kAttentionThreads, AttentionRing::kBytes, stream>>>(query_map, kv_map, a);
  return cudaGetLastError();
}

// Queries [tokens][heads][kHeadDim] and a cache [slots][2][kv_heads][kHeadDim], both bf16. Heads of a group divide a
// tile's rows, pages divide into pieces.
inline cudaError_t run_prompt_attention(const void* query, const void* kv, int tokens, int slots,
                                        const PromptAttentionArguments& a, cudaStream_t stream) {
  const int group = a.heads / std::max(1, a.kv_heads);
  if (a.tiles < 1 || tokens < 1 || a.heads % a.kv_heads || a.page_size % kPagePiece) return cudaErrorInvalidValue;
  CUtensorMap query_map, kv_map;
  constexpr int kHalf = kHeadDim / 2;
  cudaError_t error = describe_heads(&query_map, query, kHeadDim, a.heads, tokens, kHalf, group, kQueryRows / group);
  if (error == cudaSuccess) error = describe_heads(&kv_map, kv, kHeadDim, 2 * a.kv_heads, slots, kHalf, 1, kPagePiece);
  if (error != cudaSuccess) return error;
  switch (group) {
    case 1: return launch_prompt_attention<1>(query_map, kv_map, a, stream);
    case 2: return launch_prompt_attention<2>(query_map, kv_map, a, stream);
    case 4: return launch_prompt_attention<4>(query_map, kv_map, a, stream);
    case 8: return launch_prompt_attention<8>(query_map, kv_map, a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace elastic
