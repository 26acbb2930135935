// Attention of generated tokens over the paged cache, with what surrounds it: joining the parts of the qkv product,
// rotary embedding, and writing this step's keys and values.
//
// A token's context is cut into at most `splits` pieces of whole pages, one block each per key-value head: a block
// serves all query heads of its group, so keys and values are read once. `dim / 8` lanes hold one key, 16 bytes each. Keys
// and values of older steps are loaded before the kernel waits for its predecessor.
//
// The cache is bf16, or int8 with a scale for each slot and head (kv_cache.py): scores are multiplied by the scales of
// keys, weights by those of values.
//
// The pieces are joined at the end (flash-decoding): on Hopper the blocks of a context are a cluster, whose first reads
// the others' shared memory; before, the block that ends last reads them from global memory.

#pragma once

#include "packing.cuh"

namespace elastic {

constexpr int kAttentionWarps = 8;
constexpr int kAttentionThreads = 32 * kAttentionWarps;
constexpr int kMostSplits = 16;

struct AttentionArguments {
  const float* qkv;  // [parts][tokens][(heads + 2 * kv_heads) * dim]
  int parts;
  const float* cosine;  // [tokens][dim / 2], of the rotary embedding
  const float* sine;
  const int* slot;  // [tokens]; `slots` for none
  const int* row;   // [tokens]; `rows` for padding
  const int* block_table;  // [rows][pages]
  const int* context_length;  // [rows], with this step's token
  __nv_bfloat16* kv;          // [slots][2][kv_heads][dim]; or, where `int8_kv` is not null, that instead
  int8_t* int8_kv;
  float* kv_scales;  // [slots][2][kv_heads], of int8
  int tokens, rows, pages, page_size, slots, kv_heads, splits;
  float* out;     // [tokens][heads][dim]
  float* maxima;  // [kv_heads][tokens], largest magnitude of `out`
  // Where there are no clusters:
  float* partial;   // [tokens][splits][heads][dim], sums of exp2(score - largest) * value
  float* state;     // [tokens][splits][heads][2], largest score and the sum of exp2
  uint32_t* ended;  // [tokens][kv_heads], zero: pieces that are done
};

__device__ __forceinline__ int context_of(const AttentionArguments& a, int token) {
  const int row = a.row[token];
  return row < a.rows ? a.context_length[row] : 0;
}

// Tokens of a piece: whole pages, so that a block reads one page after the other.
__device__ __forceinline__ int piece_length(const AttentionArguments& a, int context) {
  const int pages = (context + a.page_size - 1) / a.page_size;
  return max(1, (pages + a.splits - 1) / a.splits) * a.page_size;
}

__device__ __forceinline__ void unpack8(const uint4& v, float (&x)[8]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

// From int8, by full-rate instructions: a byte becomes the lowest of the mantissa of 2**23.
__device__ __forceinline__ void unpack8(const uint2& v, float (&x)[8]) {
  const uint32_t words[2] = {v.x ^ 0x80808080u, v.y ^ 0x80808080u};  // from 0 to 255 instead of from -128 to 127
#pragma unroll
  for (int i = 0; i < 8; ++i)
    x[i] = __uint_as_float(__byte_perm(words[i / 4], 0x4b000000u, 0x7540u | i % 4)) - (8388608.0f + 128.0f);
}

// Eight numbers of a key or value, as a lane loads them.
template <bool kInt8>
struct Octet {
  using Type = uint4;
  using Number = __nv_bfloat16;
};

template <>
struct Octet<true> {
  using Type = uint2;
  using Number = int8_t;
};

// This step's key or value [kDim] as kv_cache.py's `write` rounds it, by one warp; gives the scale. What is no number
// makes the scale none, so that the step reports it.
template <int kDim>
__device__ __forceinline__ float quantize_head(const float* from, int8_t* to) {
  constexpr int kEach = kDim / 32;
  const int first = static_cast<int>(threadIdx.x) % 32 * kEach;
  float most = 0;
  bool broken = false;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    most = fmaxf(most, fabsf(from[first + i]));
    broken |= from[first + i] != from[first + i];
  }
#pragma unroll
  for (int d = 16; d; d /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
  float scale = most / 127.0f;
  if (scale < 1.17549435e-38f) scale = 1;
  if (__any_sync(~0u, broken)) scale = __uint_as_float(0x7fffffffu);
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    to[first + i] = static_cast<int8_t>(fminf(fmaxf(rintf(from[first + i] / scale), -127.0f), 127.0f));
  return scale;
}

// Waits for all blocks of the cluster; what they wrote to their shared memory can be read.
__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A float of the shared memory of the cluster's block number `rank`.
__device__ __forceinline__ float load_of_cluster(const float* mine, int rank) {
  float value = 0;
#if __CUDA_ARCH__ >= 900
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(mine));
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];\n}"
               : "=f"(value)
               : "r"(address), "r"(rank)
               : "memory");
#endif
  return value;
}

// The pieces of one token and key-value head, joined. `state(piece, g, which)` and `partial(piece, g, d)` load them.
template <int kDim, int kGroup, typename State, typename Partial>
__device__ __forceinline__ void join_pieces(const AttentionArguments& a, int token, int head, int pieces,
                                            const State& state, const Partial& partial) {
  __shared__ float by[kGroup][kMostSplits];
  __shared__ uint32_t largest;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) largest = 0;
  static_assert(kMostSplits <= 32 && kGroup <= kAttentionWarps);
  if (warp < kGroup) {
    const float mine = lane < pieces ? state(lane, warp, 0) : -1e30f;
    float all = lane < pieces ? state(lane, warp, 1) : 0.0f, most = mine;
#pragma unroll
    for (int d = 16; d; d /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
    const float weight = exp2f(mine - most);
    all *= weight;
#pragma unroll
    for (int d = 16; d; d /= 2) all += __shfl_xor_sync(~0u, all, d);
    if (lane < kMostSplits) by[warp][lane] = weight / all;
  }
  __syncthreads();
  float most = 0;
  for (int i = threadIdx.x; i < kGroup * kDim; i += kAttentionThreads) {
    const int g = i / kDim, d = i % kDim;
    float sum = 0;
#pragma unroll 8
    for (int s = 0; s < pieces; ++s) sum += by[g][s] * partial(s, g, d);
    a.out[(static_cast<int64_t>(token) * a.kv_heads * kGroup + head * kGroup + g) * kDim + d] = sum;
    most = fmaxf(most, fabsf(sum));
  }
#pragma unroll
  for (int d = 16; d; d /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
  if (lane == 0) atomicMax(&largest, __float_as_uint(most));
  __syncthreads();
  if (threadIdx.x == 0) a.maxima[head * a.tokens + token] = __uint_as_float(largest);
}

// At most 128 registers a thread: the next product's blocks start beside these.
template <int kDim, int kGroup, bool kInt8>
__global__ void __launch_bounds__(kAttentionThreads, 2) attention(const AttentionArguments a) {
  constexpr int kLanes = kDim / 8;            // of one key
  constexpr int kAtOnce = 32 / kLanes;        // keys of a warp
  constexpr int kBlock = 64 / kAttentionWarps;  // keys of a warp in 64 of context
  constexpr int kTurns = kBlock / kAtOnce;
  static_assert(kTurns >= 1);
  __shared__ __align__(16) float query[kGroup][kDim];
  __shared__ __align__(16) float merged[kAttentionWarps][kGroup][kDim];
  __shared__ float states[kAttentionWarps][kGroup][2];
  __shared__ __align__(16) typename Octet<kInt8>::Number newest_kv[2][kDim];
  __shared__ float newest_exact[2][kInt8 ? kDim : 1], newest_scales[2];
  __shared__ float joined_state[kGroup][2];
  const int token = blockIdx.x, head = blockIdx.y, split = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int heads = a.kv_heads * kGroup;
  release_successor();

  const int context = context_of(a, token);
  const int piece = piece_length(a, context);
  const int begin = split * piece, end = min(context, begin + piece);
  if (context == 0 && split == 0) {  // padding
    wait_for_predecessor();
    for (int i = threadIdx.x; i < kGroup * kDim; i += kAttentionThreads)
      a.out[(static_cast<int64_t>(token) * heads + head * kGroup) * kDim + i] = 0;
    if (threadIdx.x == 0) a.maxima[head * a.tokens + token] = 0;
  }
  if (begin >= end) return;

  const int part = lane % kLanes, mine = lane / kLanes;
  const int* const table = a.block_table + static_cast<int64_t>(a.row[token]) * a.pages;
  const int64_t stride = static_cast<int64_t>(2 * a.kv_heads) * kDim;
  using Eight = typename Octet<kInt8>::Type;
  Eight keys[kTurns], values[kTurns];
  float key_scales[kTurns], value_scales[kTurns];
  auto load = [&](int first) {
    const bool any = first < end;
    const int page = any ? table[first / a.page_size] : 0;
    const int64_t slots_before = static_cast<int64_t>(page) * a.page_size + first % a.page_size + mine;
    const typename Octet<kInt8>::Number* from = nullptr;
    if constexpr (kInt8) {
      from = a.int8_kv;
    } else {
      from = a.kv;
    }
    from += slots_before * stride + head * kDim + part * 8;
#pragma unroll
    for (int t = 0; t < kTurns; ++t) {
      const int key = first + t * kAtOnce + mine;
      const bool old = any && key < end && key != context - 1;  // this step's is not in the cache yet
      keys[t] = values[t] = Eight{};
      if (old) keys[t] = *reinterpret_cast<const Eight*>(from + t * kAtOnce * stride);
      if (old) values[t] = *reinterpret_cast<const Eight*>(from + t * kAtOnce * stride + a.kv_heads * kDim);
      if constexpr (kInt8) {
        const float* const scales = a.kv_scales + (slots_before + t * kAtOnce) * 2 * a.kv_heads + head;
        key_scales[t] = old ? scales[0] : 0.0f;
        value_scales[t] = old ? scales[a.kv_heads] : 0.0f;
      }
    }
  };
  load(begin + warp * kBlock);
  const int slot = a.slot[token];
  constexpr int kRotated = ((kGroup + 2) * kDim / 2 + kAttentionThreads - 1) / kAttentionThreads;
  float cosines[kRotated], sines[kRotated];
#pragma unroll
  for (int e = 0; e < kRotated; ++e) {
    const int at = token * (kDim / 2) + (e * kAttentionThreads + static_cast<int>(threadIdx.x)) % (kDim / 2);
    cosines[e] = a.cosine[at];
    sines[e] = a.sine[at];
  }
  wait_for_predecessor();

  const int width = (heads + 2 * a.kv_heads) * kDim;
  auto qkv = [&](int at) {
    float sum = 0;
    for (int part = 0; part < a.parts; ++part) sum += a.qkv[(static_cast<int64_t>(part) * a.tokens + token) * width + at];
    return sum;
  };
  const bool newest = end == context;
  // Pairs (d, d + dim / 2) of the group's queries, the key and the value; all loads are under way before the first is used.
  constexpr int kHalf = kDim / 2, kPairs = (kGroup + 2) * kHalf;
  constexpr int kEach = (kPairs + kAttentionThreads - 1) / kAttentionThreads;
  float pair[kEach][2];
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = e * kAttentionThreads + static_cast<int>(threadIdx.x), which = i / kHalf;
    if (i >= kPairs || (which >= kGroup && !newest)) continue;
    const int from = which < kGroup ? head * kGroup + which : heads + (which - kGroup) * a.kv_heads + head;
    pair[e][0] = qkv(from * kDim + i % kHalf);
    pair[e][1] = qkv(from * kDim + i % kHalf + kHalf);
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = e * kAttentionThreads + static_cast<int>(threadIdx.x), which = i / kHalf, d = i % kHalf;
    if (i >= kPairs || (which >= kGroup && !newest)) continue;
    const bool rotates = which <= kGroup;  // all but the value
    const float cosine = rotates ? cosines[e] : 1.0f, sine = rotates ? sines[e] : 0.0f;
    const float first = pair[e][0] * cosine - pair[e][1] * sine, second = pair[e][1] * cosine + pair[e][0] * sine;
    const __nv_bfloat16 low = __float2bfloat16_rn(first), high = __float2bfloat16_rn(second);
    if (which < kGroup) {
      query[which][d] = __bfloat162float(low);
      query[which][d + kHalf] = __bfloat162float(high);
      continue;
    }
    if constexpr (kInt8) {
      newest_exact[which - kGroup][d] = first;
      newest_exact[which - kGroup][d + kHalf] = second;
    } else {
      newest_kv[which - kGroup][d] = low;
      newest_kv[which - kGroup][d + kHalf] = high;
      if (slot >= a.slots) continue;
      __nv_bfloat16* const cache = a.kv + ((static_cast<int64_t>(slot) * 2 + which - kGroup) * a.kv_heads + head) * kDim;
      cache[d] = low;
      cache[d + kHalf] = high;
    }
  }
  __syncthreads();
  if constexpr (kInt8) {
    if (newest && warp < 2) {  // the key's, and the value's
      const float scale = quantize_head<kDim>(newest_exact[warp], newest_kv[warp]);
      if (lane == 0) newest_scales[warp] = scale;
      __syncwarp();
      if (slot < a.slots) {
        const int64_t place = (static_cast<int64_t>(slot) * 2 + warp) * a.kv_heads + head;
#pragma unroll
        for (int d = lane; d < kDim; d += 32) a.int8_kv[place * kDim + d] = newest_kv[warp][d];
        if (lane == 0) a.kv_scales[place] = scale;
      }
    }
    __syncthreads();
  }

  float q[kGroup][8], out[kGroup][8], largest[kGroup], total[kGroup];
  const float factor = rsqrtf(static_cast<float>(kDim)) * 1.44269504088896f;
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    largest[g] = -1e30f;
    total[g] = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      q[g][i] = query[g][part * 8 + i] * factor;
      out[g][i] = 0;
    }
  }

  for (int first = begin + warp * kBlock; first < end; first += 64) {
    const int now = context - 1 - first - mine;  // where this step's token is
#pragma unroll
    for (int t = 0; t < kTurns; ++t) {
      if (now != t * kAtOnce) continue;
      keys[t] = *reinterpret_cast<const Eight*>(&newest_kv[0][part * 8]);
      values[t] = *reinterpret_cast<const Eight*>(&newest_kv[1][part * 8]);
      if constexpr (kInt8) {
        key_scales[t] = newest_scales[0];
        value_scales[t] = newest_scales[1];
      }
    }
    float scores[kTurns][kGroup];
#pragma unroll
    for (int t = 0; t < kTurns; ++t) {
      float key[8];
      unpack8(keys[t], key);
      const bool live = first + t * kAtOnce + mine < end;
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        float score = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) score += q[g][i] * key[i];
#pragma unroll
        for (int d = kLanes / 2; d; d /= 2) score += __shfl_xor_sync(~0u, score, d);
        if constexpr (kInt8) score *= key_scales[t];
        scores[t][g] = live ? score : -1e30f;
      }
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      float most = largest[g];
#pragma unroll
      for (int t = 0; t < kTurns; ++t) most = fmaxf(most, scores[t][g]);
      const float shrink = exp2f(largest[g] - most);
      largest[g] = most;
      total[g] *= shrink;
#pragma unroll
      for (int i = 0; i < 8; ++i) out[g][i] *= shrink;
#pragma unroll
      for (int t = 0; t < kTurns; ++t) {
        scores[t][g] = scores[t][g] > -1e29f ? exp2f(scores[t][g] - most) : 0.0f;
        total[g] += scores[t][g];
      }
    }
#pragma unroll
    for (int t = 0; t < kTurns; ++t) {
      float value[8];
      unpack8(values[t], value);
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        float weight = scores[t][g];
        if constexpr (kInt8) weight *= value_scales[t];
#pragma unroll
        for (int i = 0; i < 8; ++i) out[g][i] += weight * value[i];
      }
    }
    load(first + 64);
  }

  // The keys of a warp, then the warps.
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
#pragma unroll
    for (int d = kLanes; d < 32; d *= 2) {
      const float other = __shfl_xor_sync(~0u, largest[g], d);
      const float most = fmaxf(largest[g], other);
      const float mine_by = exp2f(largest[g] - most), other_by = exp2f(other - most);
      total[g] = total[g] * mine_by + __shfl_xor_sync(~0u, total[g], d) * other_by;
#pragma unroll
      for (int i = 0; i < 8; ++i) out[g][i] = out[g][i] * mine_by + __shfl_xor_sync(~0u, out[g][i], d) * other_by;
      largest[g] = most;
    }
    if (mine == 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) merged[warp][g][part * 8 + i] = out[g][i];
      if (part == 0) {
        states[warp][g][0] = largest[g];
        states[warp][g][1] = total[g];
      }
    }
  }
  __syncthreads();
  // The warps' sums, in the first's place.
  for (int i = threadIdx.x; i < kGroup * kDim; i += kAttentionThreads) {
    const int g = i / kDim, d = i % kDim;
    float most = -1e30f;
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) most = fmaxf(most, states[w][g][0]);
    float sum = 0, all = 0;
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      const float by = exp2f(states[w][g][0] - most);
      sum += merged[w][g][d] * by;
      all += states[w][g][1] * by;
    }
    merged[0][g][d] = sum;
    if (d == 0) {
      joined_state[g][0] = most;
      joined_state[g][1] = all;
    }
  }
  const int pieces = (context + piece - 1) / piece;
#if __CUDA_ARCH__ >= 900
  wait_for_cluster();
  if (split == 0) {
    join_pieces<kDim, kGroup>(
        a, token, head, pieces, [&](int s, int g, int which) { return load_of_cluster(&joined_state[g][which], s); },
        [&](int s, int g, int d) { return load_of_cluster(&merged[0][g][d], s); });
  }
  wait_for_cluster();  // nobody's memory may go before it is read
#else
  __shared__ bool last;
  __syncthreads();
  const int64_t place = static_cast<int64_t>(token) * a.splits * heads + head * kGroup;
  for (int i = threadIdx.x; i < kGroup * kDim; i += kAttentionThreads)
    a.partial[(place + static_cast<int64_t>(split) * heads) * kDim + i] = merged[0][i / kDim][i % kDim];
  if (threadIdx.x < 2 * kGroup)
    a.state[(place + static_cast<int64_t>(split) * heads) * 2 + threadIdx.x] = joined_state[threadIdx.x / 2][threadIdx.x % 2];
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(a.ended + token * a.kv_heads + head, 1u) + 1 == static_cast<uint32_t>(pieces);
  __syncthreads();
  if (!last) return;
  __threadfence();
  auto at = [&](int s, int g) { return place + static_cast<int64_t>(s) * heads + g; };
  join_pieces<kDim, kGroup>(
      a, token, head, pieces, [&](int s, int g, int which) { return __ldcg(a.state + at(s, g) * 2 + which); },
      [&](int s, int g, int d) { return __ldcg(a.partial + at(s, g) * kDim + d); });
#endif
}

}  // namespace elastic
