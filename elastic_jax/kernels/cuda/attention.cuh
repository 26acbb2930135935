// Attention of generated tokens over the paged cache, with what surrounds it: joining the parts of the qkv product,
// rotary embedding, and writing this step's keys and values.
//
// A token's context is cut into at most `splits` pieces of whole pages, one block each per key-value head: a block
// serves all query heads of its group, so keys and values are read once. A warp takes 16 keys at a time through the tensor
// cores (m16n8k16): keys are the left operand, and the group's queries the few used columns of the right one; then values,
// transposed, are the left operand and softmax's weights the right one. Lanes load both operands as they need them, 8
// numbers at once, so nothing goes through shared memory; which numbers of a head are one step of the contraction is any,
// if both operands have the same. Weights are two bf16 numbers each, high and low, which hold 16 bits of them. The next
// keys are on their way while this turn's values are used. Before the kernel waits for its predecessor it loads the first
// of older steps, and asks the L2 cache for the next.
//
// The cache is bf16, or int8 with a scale for each slot and head (kv_cache.py): scores are multiplied by the scales of
// keys, weights by those of values.
//
// The pieces are joined at the end (flash-decoding): the blocks of a context are a cluster, whose first reads the others'
// shared memory, or the block that ends last reads them from global memory. A cluster joins faster, if it does not have to
// wait for as many multiprocessors.
//
// The result is float32 rows, or activations rounded for the next product (`Rows`).

#pragma once

#include "packing.cuh"

namespace elastic {

constexpr int kAttentionWarps = 8;
constexpr int kAttentionThreads = 32 * kAttentionWarps;
constexpr int kMostSplits = 16;
constexpr int kWarpKeys = 16;                      // keys of a warp's turn, of one page
constexpr int kTurn = kWarpKeys * kAttentionWarps;  // of a block's

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
  Rows into;      // of [tokens][heads * dim]; where its values are not null, instead of both
  bool clusters;  // a context's blocks are one; where not:
  float* partial;   // [tokens][splits][heads][dim], sums of exp2(score - largest) * value
  float* state;     // [tokens][splits][heads][2], largest score and the sum of exp2
  uint32_t* ended;  // [tokens][kv_heads], zero: pieces that are done
};

__device__ __forceinline__ int context_of(const AttentionArguments& a, int token) {
  const int row = a.row[token];
  return row < a.rows ? a.context_length[row] : 0;
}

// Tokens of a piece. Short contexts are cut into whole pages, so that a block reads one; and where blocks have much else
// in the way, not into less than a turn of its warps. Long ones are cut evenly.
__device__ __forceinline__ int piece_length(const AttentionArguments& a, int context) {
  const int least = a.into.values == nullptr ? a.page_size : max(a.page_size, kTurn);
  return max(least, (context + kWarpKeys * a.splits - 1) / (kWarpKeys * a.splits) * kWarpKeys);
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

// Eight numbers as pairs of bf16, which int8 fits into exactly.
__device__ __forceinline__ uint4 pairs_of(const uint4& v) { return v; }

__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ uint4 pairs_of(const uint2& v) {
  float x[8];
  unpack8(v, x);
  return {pair_of(x[0], x[1]), pair_of(x[2], x[3]), pair_of(x[4], x[5]), pair_of(x[6], x[7])};
}

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

// The pieces of one token and key-value head, joined. `state(piece, g, which)` and `partial(piece, g, d)` load them.
template <int kDim, int kGroup, typename State, typename Partial>
__device__ __forceinline__ void join_pieces(const AttentionArguments& a, int token, int head, int pieces,
                                            const State& state, const Partial& partial) {
  constexpr int kEach = (kGroup * kDim + kAttentionThreads - 1) / kAttentionThreads;
  constexpr int kScales = (kGroup * kDim + kScaled - 1) / kScaled;
  __shared__ float by[kGroup][kMostSplits];
  __shared__ uint32_t largest[kScales];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x < kScales) largest[threadIdx.x] = 0;
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
  float sums[kEach];
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = e * kAttentionThreads + static_cast<int>(threadIdx.x);
    sums[e] = 0;
    if (i >= kGroup * kDim) continue;
#pragma unroll 8
    for (int s = 0; s < pieces; ++s) sums[e] += by[i / kDim][s] * partial(s, i / kDim, i % kDim);
    float most = fabsf(sums[e]);  // a warp's have one scale
#pragma unroll
    for (int d = 16; d; d /= 2) most = larger(most, __shfl_xor_sync(~0u, most, d));
    if (lane == 0) atomicMax(&largest[i / kScaled], __float_as_uint(most));
  }
  __syncthreads();
  const int width = a.kv_heads * kGroup * kDim, first = head * kGroup * kDim;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = e * kAttentionThreads + static_cast<int>(threadIdx.x);
    if (i >= kGroup * kDim) continue;
    if (a.into.values == nullptr) {
      a.out[static_cast<int64_t>(token) * width + first + i] = sums[e];
      continue;
    }
    const float scale = plane_scale(__uint_as_float(largest[i / kScaled]));
    a.into.write(token, first + i, sums[e], scale);
    if (i % kScaled == 0 && a.into.quantized) a.into.scales[(first + i) / kScaled * a.into.padded + token] = scale;
  }
  if (threadIdx.x == 0 && a.into.values == nullptr) {
    uint32_t most = 0;
    for (const uint32_t each : largest) most = max(most, each);
    a.maxima[head * a.tokens + token] = __uint_as_float(most);
  }
}

// At most 128 registers a thread: the next product's blocks start beside these, if they are for few tokens.
template <int kDim, int kGroup, bool kInt8>
__global__ void __launch_bounds__(kAttentionThreads, 2) attention(const AttentionArguments a) {
  constexpr int kKeyOctets = kDim / 32;        // of each of a lane's 2 keys
  constexpr int kValueOctets = kDim / 64;      // of each of a lane's 4 values
  static_assert(kDim % 64 == 0 && kGroup <= 8);
  using Number = typename Octet<kInt8>::Number;
  using Eight = typename Octet<kInt8>::Type;
  __shared__ __align__(16) __nv_bfloat16 query[kGroup][kDim];
  __shared__ __align__(16) float merged[kAttentionWarps][kGroup][kDim];
  __shared__ float states[kAttentionWarps][kGroup][2];
  __shared__ __align__(16) Number newest_kv[2][kDim];
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
    for (int i = threadIdx.x; i < kGroup * kDim; i += kAttentionThreads) {
      const int k = head * kGroup * kDim + i;
      if (a.into.values == nullptr) {
        a.out[static_cast<int64_t>(token) * heads * kDim + k] = 0;
        continue;
      }
      a.into.write(token, k, 0, 1);
      if (k % kScaled == 0 && a.into.quantized) a.into.scales[k / kScaled * a.into.padded + token] = 1;
    }
    if (threadIdx.x == 0 && a.into.values == nullptr) a.maxima[head * a.tokens + token] = 0;
  }
  if (begin >= end) return;

  // What a lane holds of the operands: keys `eighth` and `eighth + 8` of 16, and values 2 * quarter, the next one, and
  // both 8 on.
  const int eighth = lane / 4, quarter = lane % 4;
  const int* const table = a.block_table + static_cast<int64_t>(a.row[token]) * a.pages;
  const int stride = 2 * a.kv_heads * kDim;
  const Number* cache_of_head = nullptr;
  if constexpr (kInt8) {
    cache_of_head = a.int8_kv + head * kDim;
  } else {
    cache_of_head = a.kv + head * kDim;
  }
  auto page_at = [&](int first) { return first < end ? table[first / a.page_size] : 0; };
  auto slot_at = [&](int page, int first) { return static_cast<int64_t>(page) * a.page_size + first % a.page_size; };
  auto is_old = [&](int key) { return key < end && key != context - 1; };  // this step's is not in the cache yet
  auto value_at = [&](int i) { return 2 * quarter + i % 2 + i / 2 * 8; };
  Eight keys[2][kKeyOctets], values[4][kValueOctets];
  float key_scales[2], value_scales[2];
  auto load_keys = [&](int page, int first) {
    const int64_t slot = slot_at(page, first);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = eighth + 8 * i;
      const bool old = is_old(first + key);
      const Number* const from = cache_of_head + (slot + key) * stride + quarter * 8;
#pragma unroll
      for (int j = 0; j < kKeyOctets; ++j)
        keys[i][j] = old ? *reinterpret_cast<const Eight*>(from + 32 * j) : Eight{};
      if constexpr (kInt8) {
        const float* const scales = a.kv_scales + (slot + key) * 2 * a.kv_heads + head;
        key_scales[i] = old ? scales[0] : 0.0f;
        value_scales[i] = old ? scales[a.kv_heads] : 0.0f;
      }
    }
  };
  auto load_values = [&](int page, int first) {
    const int64_t slot = slot_at(page, first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool old = is_old(first + value_at(i));
      const Number* const from = cache_of_head + (slot + value_at(i)) * stride + a.kv_heads * kDim + eighth * 8;
#pragma unroll
      for (int j = 0; j < kValueOctets; ++j)
        values[i][j] = old ? *reinterpret_cast<const Eight*>(from + 64 * j) : Eight{};
    }
  };
  // A key and a value of 16 are asked for by two lanes each.
  auto ask_for = [&](int page, int first) {
    const int key = lane / 2;
    if (!is_old(first + key)) return;
    const Number* const from = cache_of_head + (slot_at(page, first) + key) * stride + lane % 2 * (kDim / 2);
    prefetch(from);
    prefetch(from + a.kv_heads * kDim);
  };
  const int start = begin + warp * kWarpKeys;
  int page = page_at(start), later = page_at(start + kTurn);
  load_keys(page, start);
  load_values(page, start);
  page = later;
  ask_for(page, start + kTurn);
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
      query[which][d] = low;
      query[which][d + kHalf] = high;
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

  uint4 q[kKeyOctets];  // column `eighth` of the right operand
#pragma unroll
  for (int j = 0; j < kKeyOctets; ++j)
    q[j] = eighth < kGroup ? *reinterpret_cast<const uint4*>(&query[eighth][32 * j + 8 * quarter]) : uint4{};
  // Of heads 2 * quarter and 2 * quarter + 1; `out` is of the numbers that a lane's values have, in their order.
  float out[4 * kValueOctets][4] = {}, largest[2] = {-1e30f, -1e30f}, total[2] = {};
  const float factor = rsqrtf(static_cast<float>(kDim)) * 1.44269504088896f;

  for (int first = start; first < end; first += kTurn) {
    if (const int now = context - 1 - first; now >= 0 && now < 16) {  // where this step's token is
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (now != eighth + 8 * i) continue;
#pragma unroll
        for (int j = 0; j < kKeyOctets; ++j)
          keys[i][j] = *reinterpret_cast<const Eight*>(&newest_kv[0][32 * j + 8 * quarter]);
        if constexpr (kInt8) {
          key_scales[i] = newest_scales[0];
          value_scales[i] = newest_scales[1];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (now != value_at(i)) continue;
#pragma unroll
        for (int j = 0; j < kValueOctets; ++j)
          values[i][j] = *reinterpret_cast<const Eight*>(&newest_kv[1][64 * j + 8 * eighth]);
      }
    }
    float scores[4] = {};  // [key `eighth` or 8 on][head]
#pragma unroll
    for (int j = 0; j < kKeyOctets; ++j) {
      const uint4 one = pairs_of(keys[0][j]), other = pairs_of(keys[1][j]);
      Bf16::multiply(scores, {one.x, other.x, one.y, other.y}, q[j].x, q[j].y);
      Bf16::multiply(scores, {one.z, other.z, one.w, other.w}, q[j].z, q[j].w);
    }
    float weight_scales[2] = {1.0f, 1.0f};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[i] *= factor;
      if constexpr (kInt8) {
        scores[i] *= key_scales[i / 2];
        weight_scales[i / 2] = value_scales[i / 2];
      }
      if (first + eighth + i / 2 * 8 >= end) scores[i] = -1e30f;
    }
    load_keys(page, first + kTurn);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = fmaxf(scores[h], scores[h + 2]);
#pragma unroll
      for (int d = 4; d < 32; d *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
      most = fmaxf(most, largest[h]);
      const float shrink = exp2f(largest[h] - most);
      largest[h] = most;
#pragma unroll
      for (int i = h; i < 4; i += 2) scores[i] = scores[i] <= -1e29f ? 0.0f : exp2f(scores[i] - most);  // NaN stays
      total[h] = total[h] * shrink + scores[h] + scores[h + 2];
#pragma unroll
      for (float(&each)[4] : out) {
        each[h] *= shrink;
        each[h + 2] *= shrink;
      }
    }
    uint32_t high[2], low[2];  // of the weights of 8 keys
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x = scores[2 * i] * weight_scales[i], y = scores[2 * i + 1] * weight_scales[i];
      const uint32_t rounded = pair_of(x, y);
      high[i] = transposed(rounded);
      low[i] = transposed(
          pair_of(x - __uint_as_float(rounded << 16), y - __uint_as_float(rounded & 0xffff0000u)));
    }
#pragma unroll
    for (int j = 0; j < kValueOctets; ++j) {
      const uint4 rows[4] = {pairs_of(values[0][j]), pairs_of(values[1][j]), pairs_of(values[2][j]), pairs_of(values[3][j])};
      auto use = [&](float(&sum)[4], uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3) {
        // From two numbers of one key to one number of two keys.
        const uint32_t x[4] = {__byte_perm(v0, v1, 0x5410), __byte_perm(v0, v1, 0x7632), __byte_perm(v2, v3, 0x5410),
                               __byte_perm(v2, v3, 0x7632)};
        Bf16::multiply(sum, x, high[0], high[1]);
        Bf16::multiply(sum, x, low[0], low[1]);
      };
      use(out[4 * j], rows[0].x, rows[1].x, rows[2].x, rows[3].x);
      use(out[4 * j + 1], rows[0].y, rows[1].y, rows[2].y, rows[3].y);
      use(out[4 * j + 2], rows[0].z, rows[1].z, rows[2].z, rows[3].z);
      use(out[4 * j + 3], rows[0].w, rows[1].w, rows[2].w, rows[3].w);
    }
    load_values(page, first + kTurn);
    page = page_at(first + 2 * kTurn);
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int d = 4; d < 32; d *= 2) total[h] += __shfl_xor_sync(~0u, total[h], d);
    const int g = 2 * quarter + h;
    if (g >= kGroup) continue;
#pragma unroll
    for (int i = 0; i < 4 * kValueOctets; ++i) {
      const int d = 8 * (eighth + i / 4 * 8) + i % 4 * 2;
      *reinterpret_cast<float2*>(&merged[warp][g][d]) = {out[i][h], out[i][h + 2]};
    }
    if (eighth == 0) {
      states[warp][g][0] = largest[h];
      states[warp][g][1] = total[h];
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
  if (a.clusters) {
    wait_for_cluster();
    if (split == 0) {
      join_pieces<kDim, kGroup>(
          a, token, head, pieces, [&](int s, int g, int which) { return load_of_cluster(&joined_state[g][which], s); },
          [&](int s, int g, int d) { return load_of_cluster(&merged[0][g][d], s); });
    }
    wait_for_cluster();  // nobody's memory may go before it is read
    return;
  }
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
}

}  // namespace elastic
