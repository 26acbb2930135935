// Decode of up to 64 tokens on Hopper, bound by reading weights once: the kernels around attention.
//
// products.cuh keeps the activations of a block's part of the contraction in shared memory, and those of many tokens leave
// little of it for weights in flight. Here both operands stream through it: a block computes some hundred outputs at once,
// so that beside 128 bytes of each of their rows, which one thread fetches by TMA, the same 128 bytes of all tokens are
// few, or half as many with 64. Two warpgroups multiply (wgmma), with weights as the left operand and tokens as the right. The ring takes nearly all
// shared memory and is filled with weights before the kernel waits for its predecessor: a block has microseconds of
// reading under way while activations are made.
//
// Activations are rows [plane and token][contraction] (`Rows`): for bf16 weights the tokens; for int8 weights the high
// planes of all tokens, padded to 8, 16, 32 or 64, and then the low ones. 16-bit activations have a scale for each token and 128
// of the contraction, which is what is multiplied between two waits anyway: finer than one for a token, and whoever makes
// 128 of them can round them without knowing the others. So nothing is launched only to round, and RMSNorm needs no
// exchange between blocks: its factor is applied to the product.

#pragma once

#include "hopper.cuh"
#include "packing.cuh"

namespace elastic {

constexpr int kMultipliers = 2;      // warpgroups
constexpr int kStreamedRows = 64;    // outputs of a tile: what a warpgroup multiplies at once
constexpr int kMostStreamed = 64;    // tokens
// Of shared memory for the ring at most: an attention's block fits beside it. So do the registers of both, up to 16 tokens
// (of bf16 32).
constexpr int kStreamedBytes = 204 << 10;

// -- RMSNorm ----------------------------------------------------------------------------------------------------------

constexpr int kStreamedNormThreads = 256;
constexpr int kPartsAtOnce = 8;

struct StreamedNormArguments {
  NormInput input;
  Rows rows;       // residual stream times weight
  float* squares;  // [tokens][hidden / kScaled], sums over the residual stream
};

// A warp does kScaled of a token.
__global__ void __launch_bounds__(kStreamedNormThreads) streamed_norm(const StreamedNormArguments arguments) {
  const NormInput& a = arguments.input;
  const Rows& rows = arguments.rows;
  release_successor();
  const int lane = threadIdx.x % 32, block = blockIdx.x * (kStreamedNormThreads / 32) + threadIdx.x / 32;
  const int token = blockIdx.y, k = block * kScaled + 4 * lane;
  const bool inside = k < a.hidden;
  const int64_t size = static_cast<int64_t>(a.tokens) * a.hidden, at = static_cast<int64_t>(token) * a.hidden + k;
  uint2 weights = {};
  if (inside) weights = *reinterpret_cast<const uint2*>(a.weight + k);
  wait_for_predecessor();
  if (!inside) return;
  uint2 residual = *reinterpret_cast<const uint2*>(a.residual + at);
  float added[4] = {};
  for (int first = 0; first < a.parts; first += kPartsAtOnce) {
    float4 product[kPartsAtOnce];
#pragma unroll
    for (int p = 0; p < kPartsAtOnce; ++p)
      product[p] = first + p < a.parts ? *reinterpret_cast<const float4*>(a.added + (first + p) * size + at) : float4{};
#pragma unroll
    for (int p = 0; p < kPartsAtOnce; ++p) {
      added[0] += product[p].x;
      added[1] += product[p].y;
      added[2] += product[p].z;
      added[3] += product[p].w;
    }
  }
  __nv_bfloat16 x[4], weight[4];
  *reinterpret_cast<uint2*>(x) = residual;
  *reinterpret_cast<uint2*>(weight) = weights;
  float values[4], square = 0, largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Both roundings are the model's: the product becomes bf16, and so does the residual stream.
    x[i] = __float2bfloat16_rn(__bfloat162float(x[i]) + __bfloat162float(__float2bfloat16_rn(added[i])));
    const float value = __bfloat162float(x[i]);
    square += value * value;
    values[i] = value * __bfloat162float(weight[i]);
    largest = larger(largest, fabsf(values[i]));
  }
  *reinterpret_cast<uint2*>(a.out + at) = *reinterpret_cast<uint2*>(x);
#pragma unroll
  for (int d = 16; d; d /= 2) {
    square += __shfl_xor_sync(~0u, square, d);
    largest = larger(largest, __shfl_xor_sync(~0u, largest, d));
  }
  const float scale = plane_scale(largest);
  rows.write4(token, k, values, scale);
  if (lane != 0) return;
  arguments.squares[token * (a.hidden / kScaled) + block] = square;
  if (rows.quantized) rows.scales[block * rows.padded + token] = scale;
}

// -- products ---------------------------------------------------------------------------------------------------------

struct StreamedArguments {
  CUtensorMap weight;       // [outputs][row_bytes]
  CUtensorMap activations;  // [rows][row_bytes]
  const float* weight_scales;  // [outputs], int8 only
  const float* row_scales;     // [steps][padded], int8 only
  const float* squares;        // [tokens][hidden / kScaled] of normalized activations; otherwise null
  int hidden;
  float eps;
  int outputs, steps, tokens;
  int parts;  // of the contraction, each computed by other blocks
  float* out;  // [parts][tokens][outputs]
  Rows activated;  // of SwiGLU instead: silu(first half) * second half
  // Counters of a later kernel, which the first block sets to zero.
  uint32_t* counters;
  int counters_count;
};

// Tokens with those that fill the right operand.
__host__ __device__ constexpr int streamed_tokens(int tokens) {
  return tokens <= 8 ? 8 : tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64;
}

// What is fetched at once, and how often ahead, and by how many threads. kTiles: of outputs; kPadded: tokens.
template <typename Weight, int kTiles, int kPadded>
struct Stream {
  static constexpr int kColumns = kPadded * Weight::kPlanes;
  static constexpr int kTile = kStreamedRows * kOperandBytes;
  static constexpr int kActivations = kTiles * kTile;  // where they begin in a stage
  static constexpr int kScaleBytes = Weight::kPlanes == 2 ? kPadded * static_cast<int>(sizeof(float)) : 0;
  static constexpr int kRows = kColumns * kOperandBytes + kScaleBytes;
  static constexpr int kStage = kActivations + (kColumns * kOperandBytes + 1023) / 1024 * 1024;
  static constexpr int kStages = kStreamedBytes / kStage;
  static constexpr int kBytes = 1024 + kStages * kStage;
  static constexpr int kEach = (kTiles + kMultipliers - 1) / kMultipliers;  // tiles of a warpgroup at most
  // Sums of both planes and the totals of 64 tokens take more registers than all threads may have: those that fetch are
  // then a warpgroup, and leave the others theirs.
  static constexpr bool kManyRegisters = kEach * kColumns / 2 * (Weight::kPlanes + 1) / Weight::kPlanes > 160;
  static constexpr int kThreads = kMultipliers * kWarpgroup + (kManyRegisters ? kWarpgroup : 64);
  static_assert(kStages >= 2);
};

// Until all threads that multiply are here.
__device__ __forceinline__ void wait_for_multipliers() {
  wait_for_threads<kMultipliers * kWarpgroup>();
}

template <typename Weight, int kTiles, int kPadded, bool kSwiGlu>
__global__ void __launch_bounds__(Stream<Weight, kTiles, kPadded>::kThreads, 1) streamed_product(const __grid_constant__ StreamedArguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Stream = elastic::Stream<Weight, kTiles, kPadded>;
  using Sum = typename Weight::Sum;
  constexpr int kStages = Stream::kStages, kEach = Stream::kEach, kPlanes = Weight::kPlanes, kOctets = kPadded / 8;
  static_assert(!kSwiGlu || kTiles % (2 * kMultipliers) == 0);
  extern __shared__ uint8_t unaligned[];
  __shared__ uint64_t weights_there[kStages], rows_there[kStages], empty[kStages];
  __shared__ __align__(16) float row_scales[kStages][kPadded];
  __shared__ float factors[kPadded];
  uint8_t* const ring = unaligned + (-shared_address(unaligned) & 1023);
  release_successor();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(&weights_there[stage], 1);
      init_barrier(&rows_there[stage], 1);
      init_barrier(&empty[stage], kMultipliers * kWarpgroup / 32);
    }
    fence_barriers();
  }
  __syncthreads();

  const int part = blockIdx.x % a.parts, walker = blockIdx.x / a.parts, walkers = gridDim.x / a.parts;
  const int first_step = part * a.steps / a.parts, steps = (part + 1) * a.steps / a.parts - first_step;
  const int groups = a.outputs / (kTiles * kStreamedRows), half = a.outputs / 2;
  auto first_output = [&](int group, int tile) {
    if (!kSwiGlu) return (group * kTiles + tile) * kStreamedRows;
    return tile % 2 * half + (group * kTiles + tile) / 2 * kStreamedRows;  // gates and what they multiply take turns
  };
  RingPlace<kStages> at;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0);  // known to be one for a warp

  if (warpgroup == kMultipliers) {
    if constexpr (Stream::kManyRegisters) leave_registers<24>();
    if (lane != 0 || warp % 4 >= 2) return;
    const int all = (groups - walker + walkers - 1) / walkers * steps;
    int group = walker, step = 0;
    auto next = [&](int i) {
      if (i >= kStages) at.advance();
      if (++step == steps) {
        step = 0;
        group += walkers;
      }
    };
    if (warp % 2 == 0) {
      for (int i = 0; i < all; next(i), ++i) {
        const int stage = i < kStages ? i : at.stage;
        if (i >= kStages) {
          wait(&empty[stage], at.turn);
        } else if (i > 0) {
          // One stage after the other: all at once, they would keep the predecessor's small loads waiting.
          wait(&weights_there[i - 1], 0);
        }
        arrive_expecting(&weights_there[stage], Stream::kActivations);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
          fetch<kPadded == 8>(ring + stage * Stream::kStage + tile * Stream::kTile, &a.weight,
                              (first_step + step) * kOperandBytes, first_output(group, tile), &weights_there[stage]);
      }
    } else {
      wait_for_predecessor();
      for (int i = 0; i < all; next(i), ++i) {
        const int stage = i < kStages ? i : at.stage;
        if (i >= kStages) wait(&empty[stage], at.turn);
        arrive_expecting(&rows_there[stage], Stream::kRows);
        fetch<false>(ring + stage * Stream::kStage + Stream::kActivations, &a.activations, (first_step + step) * kOperandBytes,
                     0, &rows_there[stage]);
        if constexpr (kPlanes == 2)
          fetch_bytes(row_scales[stage], a.row_scales + (first_step + step) * kPadded, Stream::kScaleBytes,
                      &rows_there[stage]);
      }
    }
    return;
  }

  if constexpr (Stream::kManyRegisters) take_registers<240>();
  // Of a tile this thread has the rows `inside` and 8 below, and of every 8 tokens two.
  const int inside = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4, pair = lane % 4 * 2;
  auto tile_at = [&](int i) { return kSwiGlu ? 4 * (i / 2) + 2 * warpgroup + i % 2 : kMultipliers * i + warpgroup; };
  float weight_scales[kEach][2];
  auto load_weight_scales = [&](int group) {
    if constexpr (kPlanes == 2) {
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int below = 0; below < 2; ++below)
          if (tile_at(i) < kTiles)
            weight_scales[i][below] = __ldg(a.weight_scales + first_output(group, tile_at(i)) + inside + 8 * below);
    }
  };
  load_weight_scales(walker);
  wait_for_predecessor();
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < a.counters_count; i += kMultipliers * kWarpgroup) a.counters[i] = 0;
  {
    constexpr int kLanes = kMultipliers * kWarpgroup / kPadded;  // that sum up one token's squares
    const int token = threadIdx.x / kLanes, blocks = a.hidden / kScaled;
    float sum = 0;
    if (a.squares != nullptr && token < a.tokens)
      for (int i = threadIdx.x % kLanes; i < blocks; i += kLanes) sum += a.squares[token * blocks + i];
#pragma unroll
    for (int d = kLanes / 2; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (threadIdx.x % kLanes == 0) factors[token] = a.squares == nullptr ? 1.0f : rsqrtf(sum / a.hidden + a.eps);
  }
  wait_for_multipliers();

  for (int group = walker; group < groups; group += walkers) {
    if (group != walker) load_weight_scales(group);
    // totals[tile][octet of tokens][row 8 below][of two tokens]
    float totals[kEach][kOctets][2][2] = {};
    using Sums = Sum[kEach][Stream::kColumns / 2];
    auto pin_all = [&](Sums& sums) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) pin(sums[i]);
    };
    auto multiply = [&](Sums& sums, bool fresh) {
      const uint8_t* const stage = ring + at.stage * Stream::kStage;
      const uint64_t activations = describe(stage + Stream::kActivations);
      wait(&weights_there[at.stage], at.turn);
      wait(&rows_there[at.stage], at.turn);
      pin_all(sums);
      begin_products();
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        // Of an odd number the last is multiplied twice: products in a branch would wait for each other.
        const uint64_t rows = describe(stage + min(tile_at(i), kTiles - 1) * Stream::kTile);
#pragma unroll
        for (int k = 0; k < kOperandBytes / 32; ++k)
          multiply_tiles(sums[i], rows + 2 * k, activations + 2 * k, !fresh || k > 0);
      }
      commit_products();
      at.advance();
    };
    if constexpr (kPlanes == 2) {
      Sums sums = {};
      for (int step = 0; step < steps; ++step) {
        const int stage = at.stage;
        multiply(sums, true);
        wait_products<0>();
        pin_all(sums);
        float2 scales[kOctets];
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet)
          scales[octet] = *reinterpret_cast<const float2*>(&row_scales[stage][8 * octet + pair]);
        __syncwarp();
        if (lane == 0) arrive(&empty[stage]);
#pragma unroll
        for (int i = 0; i < kEach; ++i)
#pragma unroll
          for (int octet = 0; octet < kOctets; ++octet)
#pragma unroll
            for (int below = 0; below < 2; ++below)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const int high = 4 * octet + 2 * below + e, low = high + 4 * kOctets;
                // 128 products of a plane are below 2**21, so both planes together fit into 32 bits.
                totals[i][octet][below][e] += static_cast<float>(256 * sums[i][high] + sums[i][low]) *
                                              (e ? scales[octet].y : scales[octet].x);
              }
      }
    } else {
      Sums sums = {};
      uint64_t* unfinished = nullptr;
      for (int step = 0; step < steps; ++step) {
        uint64_t* const now = &empty[at.stage];
        multiply(sums, step == 0);
        wait_products<1>();
        pin_all(sums);
        if (unfinished != nullptr && lane == 0) arrive(unfinished);
        unfinished = now;
      }
      wait_products<0>();
      pin_all(sums);
      if (lane == 0) arrive(unfinished);
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet)
#pragma unroll
          for (int below = 0; below < 2; ++below)
#pragma unroll
            for (int e = 0; e < 2; ++e) totals[i][octet][below][e] = sums[i][4 * octet + 2 * below + e];
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i)
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet)
#pragma unroll
        for (int below = 0; below < 2; ++below)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            totals[i][octet][below][e] *=
                factors[8 * octet + pair + e] * (kPlanes == 2 ? weight_scales[i][below] : 1.0f);

    if constexpr (kSwiGlu) {
      // A pair of each warpgroup makes kScaled activations.
      constexpr int kBlocks = kEach / 2, kRow = 2 * kScaled;
      static_assert(kMultipliers * kStreamedRows == kScaled);
      __shared__ uint32_t largest[kBlocks][kPadded];
      __shared__ __align__(16) uint8_t staged[kBlocks][kPadded][kRow];  // both planes of a token, or bf16
      if (threadIdx.x < kBlocks * kPadded) (&largest[0][0])[threadIdx.x] = 0;
      wait_for_multipliers();
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float most = 0;
#pragma unroll
            for (int below = 0; below < 2; ++below) {
              const float gate = totals[2 * b][octet][below][e];
              float& value = totals[2 * b][octet][below][e];
              value = gate / (1.0f + __expf(-gate)) * totals[2 * b + 1][octet][below][e];
              if constexpr (kPlanes == 1) value = __bfloat162float(__float2bfloat16_rn(value));  // as quantization.py's `dot`
              most = larger(most, fabsf(value));
            }
            if (!a.activated.quantized) continue;
#pragma unroll
            for (int d = 4; d < 32; d *= 2) most = larger(most, __shfl_xor_sync(~0u, most, d));
            if (lane < 4) atomicMax(&largest[b][8 * octet + pair + e], __float_as_uint(most));
          }
      wait_for_multipliers();
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int token = 8 * octet + pair + e;
            const float inverse = 1.0f / plane_scale(__uint_as_float(largest[b][token]));
#pragma unroll
            for (int below = 0; below < 2; ++below) {
              const int k = warpgroup * kStreamedRows + inside + 8 * below;
              const float value = totals[2 * b][octet][below][e];
              if (a.activated.quantized) {
                int high, low;
                split_plane(value * inverse, high, low);
                staged[b][token][k] = static_cast<uint8_t>(high);
                staged[b][token][kScaled + k] = static_cast<uint8_t>(low);
              } else {
                *reinterpret_cast<__nv_bfloat16*>(&staged[b][token][2 * k]) = __float2bfloat16_rn(value);
              }
            }
          }
      wait_for_multipliers();
      for (int i = threadIdx.x; i < kBlocks * a.tokens * (kRow / 16); i += kMultipliers * kWarpgroup) {
        const int piece = i % (kRow / 16), token = i / (kRow / 16) % a.tokens, b = i / (kRow / 16) / a.tokens;
        const int64_t k = (static_cast<int64_t>(group) * kBlocks + b) * kScaled;
        const uint4 found = *reinterpret_cast<const uint4*>(&staged[b][token][16 * piece]);
        const Rows& to = a.activated;
        const int plane = to.quantized ? 16 * piece / kScaled : 0, inside_row = 16 * piece - plane * kScaled;
        *reinterpret_cast<uint4*>(to.values + (plane * to.padded + token) * to.bytes + (to.quantized ? k : 2 * k) +
                                  inside_row) = found;
        if (piece == 0 && to.quantized)
          to.scales[k / kScaled * to.padded + token] = plane_scale(__uint_as_float(largest[b][token]));
      }
      wait_for_multipliers();
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (tile_at(i) >= kTiles) continue;
        const int output = first_output(group, tile_at(i)) + inside;
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int token = 8 * octet + pair + e;
            if (token >= a.tokens) continue;
#pragma unroll
            for (int below = 0; below < 2; ++below)
              a.out[(static_cast<int64_t>(part) * a.tokens + token) * a.outputs + output + 8 * below] =
                  totals[i][octet][below][e];
          }
      }
    }
    __syncwarp();  // products are begun by whole warps
  }
#endif
}

}  // namespace elastic
