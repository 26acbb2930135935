// How activations are laid out for the tensor cores.
//
// A weight [out, in] is read in chunks: 8 outputs times 64 bytes of the contraction, 16 bytes a lane. Such a chunk is the
// right operand of the tensor cores (m16n8k32 for int8, m16n8k16 for bf16), as it lies: the order of the contraction's
// elements inside a chunk is any, if the activations have the same. Their rows are the left operand, and few of its 16
// rows are used, which costs nothing while reading is the limit.
//
// Activations are laid out for that ("packed"): [chunk][octet][token of the octet][64 bytes]. An octet is one half of the
// left operand's rows. With int8 weights a token has two rows, the high and low plane of a 16-bit activation
// (quantization.py): octets 2m and 2m + 1 are the planes of tokens 8m to 8m + 7. With bf16 weights it has one.

#pragma once

#include "instructions.cuh"

namespace elastic {

constexpr int kChunkBytes = 64;  // of one output's row
constexpr int kTileRows = 8;     // outputs of one chunk
constexpr int kLaneChunk = kTileRows * kChunkBytes;

struct Int8 {
  using Sum = int32_t;
  static constexpr int kPlanes = 2;

  __device__ static void multiply(Sum (&sum)[4], const uint32_t (&x)[4], uint32_t w0, uint32_t w1) {
    multiply_operands(sum, x, w0, w1);
  }
};

struct Bf16 {
  using Sum = float;
  static constexpr int kPlanes = 1;

  __device__ static void multiply(Sum (&sum)[4], const uint32_t (&x)[4], uint32_t w0, uint32_t w1) {
    multiply_operands(sum, x, w0, w1);
  }
};

// What RMSNorm takes.
struct NormInput {
  const __nv_bfloat16* residual;  // [tokens][hidden]
  const float* added;             // [parts][tokens][hidden], a product that the residual stream lacks yet; parts may be 0
  int parts;
  const __nv_bfloat16* weight;  // [hidden]
  float eps;
  int tokens;
  int hidden;
  __nv_bfloat16* out;  // [tokens][hidden], the residual stream with `added`
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


// The larger of two magnitudes; NaN if one is, unlike fmaxf's, so that a step with one reports it. The bits of floats that
// are not negative are in their order, and NaN above them all.
__device__ __forceinline__ float larger(float a, float b) {
  return __uint_as_float(max(__float_as_uint(a), __float_as_uint(b)));
}

constexpr float kPlaneMax = 127.0f * 256.0f;  // largest 16-bit activation (quantization.py)

__device__ __forceinline__ float plane_scale(float largest) {
  const float scale = largest / kPlaneMax;
  return scale < 1.17549435e-38f ? 1.0f : scale;
}

// Tokens in whole octets.
__host__ __device__ constexpr int padded_tokens(int tokens) { return (tokens + 7) / 8 * 8; }

// The high and low planes of an activation that is divided by its scale.
__device__ __forceinline__ void split_plane(float x, int& high, int& low) {
  const int q = __float2int_rn(fminf(fmaxf(x, -kPlaneMax), kPlaneMax));
  high = (q + 128) >> 8;
  low = q - (high << 8);
}

// Those of 4 activations, as bytes of two words.
__device__ __forceinline__ void split_planes(const float (&x)[4], float inverse, uint32_t& high, uint32_t& low) {
  high = low = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int h, l;
    split_plane(x[i] * inverse, h, l);
    high |= static_cast<uint32_t>(h & 255) << (8 * i);
    low |= static_cast<uint32_t>(l & 255) << (8 * i);
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

constexpr int kScaled = 128;  // activations of `Rows` that share a scale

// Activations of some tokens, as a streamed product takes them.
struct Rows {
  uint8_t* values;    // [plane and token][bytes]
  float* scales;      // [contraction / kScaled][padded], for int8 weights only
  int64_t bytes;      // of a row
  int padded;         // tokens: 8, 16, 32 or 64
  bool quantized;     // into planes; bf16 otherwise

  __device__ void write(int token, int64_t k, float x, float scale) const {
    if (quantized) {
      int high, low;
      split_plane(x / scale, high, low);
      values[token * bytes + k] = static_cast<uint8_t>(high);
      values[(padded + token) * bytes + k] = static_cast<uint8_t>(low);
    } else {
      *reinterpret_cast<__nv_bfloat16*>(values + token * bytes + 2 * k) = __float2bfloat16_rn(x);
    }
  }

  // Four from index k on.
  __device__ void write4(int token, int64_t k, const float (&x)[4], float scale) const {
    if (quantized) {
      uint32_t high, low;
      split_planes(x, 1.0f / scale, high, low);
      *reinterpret_cast<uint32_t*>(values + token * bytes + k) = high;
      *reinterpret_cast<uint32_t*>(values + (padded + token) * bytes + k) = low;
    } else {
      *reinterpret_cast<uint2*>(values + token * bytes + 2 * k) = make_uint2(bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]));
    }
  }
};

// Sum and largest magnitude over a block; `scratch` holds 2 floats a warp.
__device__ __forceinline__ void reduce_block(float& sum, float& largest, float* scratch) {
#pragma unroll
  for (int d = 16; d; d /= 2) {
    sum += __shfl_xor_sync(~0u, sum, d);
    largest = larger(largest, __shfl_xor_sync(~0u, largest, d));
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
    largest = larger(largest, __shfl_xor_sync(~0u, largest, d));
  }
}

}  // namespace elastic
