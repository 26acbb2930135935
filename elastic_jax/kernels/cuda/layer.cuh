// Launches the kernels of one decoder layer, or of the language-model head, on a stream.
//
// A layer of one or two tokens is five launches: qkv, attention, o, gate_up, down; its products normalize and pack
// activations for themselves. Of more tokens it is nine: norm before qkv and gate_up, and packing before o and down, are
// kernels of their own, since every block would do the same. On Hopper each may start before its predecessor ends
// (programmatic dependent launch). A layer's last product is left unadded: what normalizes next adds it, so that splitting
// a contraction costs no launch.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "activations.cuh"
#include "attention.cuh"
#include "products.cuh"

namespace elastic {

struct Device {
  int multiprocessors;
  int shared;  // bytes of shared memory of a multiprocessor
  bool hopper;  // or later: kernels overlap, and blocks form clusters
};

inline const Device& device() {
  static const Device found = [] {
    int id = 0, multiprocessors = 1, shared = 0, major = 0;
    cudaGetDevice(&id);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, id);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
    return Device{multiprocessors, shared, major >= 9};
  }();
  return found;
}

// One division of a multiprocessor's memory for all kernels: it changes only while the multiprocessor is empty, and a
// successor could not start early.
template <typename Kernel>
cudaError_t allow_shared_memory(Kernel* kernel) {
  int id = 0, most = 0;
  cudaGetDevice(&id);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                 cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  cudaFuncAttributes attributes = {};
  if (const cudaError_t known = cudaFuncGetAttributes(&attributes, kernel); known != cudaSuccess) return known;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              most - static_cast<int>(attributes.sharedSizeBytes));
}

template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared, cudaStream_t stream,
                   const Arguments& arguments, int cluster = 1) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {1, 1, static_cast<unsigned>(cluster)};
  config.attrs = attributes;
  config.numAttrs = !device().hopper ? 0 : cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

// Sizes of one product.
struct Tiles {
  int row_tiles, depth, parts;
};

template <typename Weight, int kMTiles, int kRowTiles, int kDepth, bool kSwiGlu, Input kInput, int kTokens>
cudaError_t launch_product(const ProductArguments& a, cudaStream_t stream, int* blocks) {
  auto* const kernel = &product<Weight, kMTiles, kRowTiles, kDepth, kSwiGlu, kInput, kTokens>;
  static const cudaError_t allowed = allow_shared_memory(kernel);
  if (allowed != cudaSuccess) return allowed;
  const int tiles = a.outputs / (kTileRows * kRowTiles);
  const int walkers = std::min(tiles, std::max(1, device().multiprocessors / a.parts));
  *blocks = walkers * a.parts;
  // Started early, two blocks could share a multiprocessor and leave another idle: more than half of its memory each
  // keeps them apart.
  const int shared = std::max(product_shared_bytes<Weight, kMTiles, kRowTiles, kDepth>(a.tokens, a.row_bytes, a.parts),
                              device().shared / 2 + 1024);
  return launch(kernel, dim3(*blocks), 32 * kWarpsFor<kMTiles>, shared, stream, a);
}

// Tokens up to which products normalize and pack for themselves, and save launches.
constexpr int kPackedInProduct = 2;

template <typename Weight, int kMTiles, int kRowTiles, int kDepth, bool kSwiGlu>
cudaError_t choose_input(const ProductArguments& a, cudaStream_t stream, int* blocks) {
  constexpr Input kPacked = Input::kPacked, kRows = Input::kRows, kResidual = Input::kResidual;
  if (a.input == kPacked) return launch_product<Weight, kMTiles, kRowTiles, kDepth, kSwiGlu, kPacked, 0>(a, stream, blocks);
  if constexpr (kMTiles == 1) {
    static_assert(kPackedInProduct == 2);
    if constexpr (!kSwiGlu) {
      if (a.input == kRows && a.tokens == 1)
        return launch_product<Weight, 1, kRowTiles, kDepth, false, kRows, 1>(a, stream, blocks);
      if (a.input == kRows && a.tokens == 2)
        return launch_product<Weight, 1, kRowTiles, kDepth, false, kRows, 2>(a, stream, blocks);
    }
    if (a.input == kResidual && a.tokens == 1)
      return launch_product<Weight, 1, kRowTiles, kDepth, kSwiGlu, kResidual, 1>(a, stream, blocks);
    if (a.input == kResidual && a.tokens == 2)
      return launch_product<Weight, 1, kRowTiles, kDepth, kSwiGlu, kResidual, 2>(a, stream, blocks);
  }
  return cudaErrorInvalidValue;
}

// The sizes that kernels are built for; decode_cuda.py has the same list.
template <typename Weight, int kMTiles, bool kSwiGlu>
cudaError_t choose_product(const ProductArguments& a, const Tiles& tiles, cudaStream_t stream, int* blocks) {
  const int key = 100 * tiles.row_tiles + tiles.depth;
  if (key == 204) return choose_input<Weight, kMTiles, 2, 4, kSwiGlu>(a, stream, blocks);
  if (key == 206) return choose_input<Weight, kMTiles, 2, 6, kSwiGlu>(a, stream, blocks);
  if (key == 208) return choose_input<Weight, kMTiles, 2, 8, kSwiGlu>(a, stream, blocks);
  if (key == 403) return choose_input<Weight, kMTiles, 4, 3, kSwiGlu>(a, stream, blocks);
  if (key == 404) return choose_input<Weight, kMTiles, 4, 4, kSwiGlu>(a, stream, blocks);
  if constexpr (kMTiles == 1) {
    if (key == 203) return choose_input<Weight, 1, 2, 3, kSwiGlu>(a, stream, blocks);
  } else {
    if (key == 207) return choose_input<Weight, kMTiles, 2, 7, kSwiGlu>(a, stream, blocks);
    if (key == 212) return choose_input<Weight, kMTiles, 2, 12, kSwiGlu>(a, stream, blocks);
    if (key == 408) return choose_input<Weight, kMTiles, 4, 8, kSwiGlu>(a, stream, blocks);
  }
  return cudaErrorInvalidValue;
}

template <bool kSwiGlu>
cudaError_t run_product(bool quantized, const ProductArguments& a, const Tiles& tiles, cudaStream_t stream,
                        int* blocks) {
  if (!quantized) return choose_product<Bf16, 1, kSwiGlu>(a, tiles, stream, blocks);
  if (a.tokens <= 8) return choose_product<Int8, 1, kSwiGlu>(a, tiles, stream, blocks);
  return choose_product<Int8, 2, kSwiGlu>(a, tiles, stream, blocks);
}

inline cudaError_t run_norm(bool quantized, const NormArguments& a, cudaStream_t stream) {
  auto* const kernel = quantized ? &norm<Int8> : &norm<Bf16>;
  static const cudaError_t allowed[2] = {allow_shared_memory(&norm<Bf16>), allow_shared_memory(&norm<Int8>)};
  if (allowed[quantized] != cudaSuccess) return allowed[quantized];
  return launch(kernel, dim3(a.input.tokens), kNormThreads, 0, stream, a);
}

template <int kDim, int kGroup, bool kInt8>
cudaError_t launch_attention_of(const AttentionArguments& a, cudaStream_t stream) {
  auto* const kernel = &attention<kDim, kGroup, kInt8>;
  static const cudaError_t allowed = allow_shared_memory(kernel);
  if (allowed != cudaSuccess) return allowed;
  if (device().hopper) {  // clusters of 16 are more than all devices need to have
    static const cudaError_t large =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (large != cudaSuccess) return large;
  }
  return launch(kernel, dim3(a.tokens, a.kv_heads, a.splits), kAttentionThreads, 0, stream, a, a.splits);
}

template <int kDim, int kGroup>
cudaError_t launch_attention(const AttentionArguments& a, cudaStream_t stream) {
  if (a.int8_kv != nullptr) return launch_attention_of<kDim, kGroup, true>(a, stream);
  return launch_attention_of<kDim, kGroup, false>(a, stream);
}

inline cudaError_t run_attention(int dim, int group, const AttentionArguments& a, cudaStream_t stream) {
  const int key = 10 * dim + group;
  if (key == 641) return launch_attention<64, 1>(a, stream);
  if (key == 643) return launch_attention<64, 3>(a, stream);
  if (key == 644) return launch_attention<64, 4>(a, stream);
  if (key == 1281) return launch_attention<128, 1>(a, stream);
  if (key == 1284) return launch_attention<128, 4>(a, stream);
  return cudaErrorInvalidValue;
}

inline cudaError_t run_pack(bool quantized, const PackArguments& a, cudaStream_t stream) {
  auto* const kernel = quantized ? &pack_rows<Int8> : &pack_rows<Bf16>;
  static const cudaError_t allowed[2] = {allow_shared_memory(&pack_rows<Bf16>), allow_shared_memory(&pack_rows<Int8>)};
  if (allowed[quantized] != cudaSuccess) return allowed[quantized];
  const dim3 grid((a.contraction + kPackPiece - 1) / kPackPiece, a.tokens);
  return launch(kernel, grid, kPackThreads, 0, stream, a);
}


// A weight [out, in]: int8 with scales, or bf16 with none.
struct Weight {
  const uint8_t* values;
  const float* scales;
  int outputs;
  int contraction;
  bool quantized;

  int64_t row_bytes() const { return static_cast<int64_t>(contraction) * (quantized ? 1 : 2); }

  ProductArguments product(int tokens, const Tiles& tiles, float* out) const {
    ProductArguments a = {};
    a.weight = values;
    a.weight_scales = scales;
    a.outputs = outputs;
    a.row_bytes = row_bytes();
    a.tokens = tokens;
    a.parts = tiles.parts;
    a.out = out;
    return a;
  }
};

// Hands out aligned pieces of one buffer.
struct Scratch {
  uint8_t* next;
  uint8_t* end;

  Scratch(void* begin, int64_t bytes) : next(static_cast<uint8_t*>(begin)), end(next + bytes) {}

  template <typename T>
  T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(next);
    next += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return piece;
  }

  bool exceeded() const { return next > end; }
};

// What failed, if something did.
struct Status {
  cudaError_t error = cudaSuccess;
  const char* what = nullptr;
};

#define ELASTIC_RUN(call, name) \
  if (const cudaError_t error = (call); error != cudaSuccess) return Status{error, name};

// Tokens as packed activations have them: beyond 8, those of whole octets.
inline int64_t padded_tokens(int tokens) { return tokens <= 8 ? tokens : (tokens + 7) / 8 * 8; }

// Normalizes what a product takes, in the product or before it.
inline cudaError_t give_normalized(const Weight& weight, ProductArguments& p, const NormInput& input, uint8_t* packed,
                                   float* token_scales, cudaStream_t stream) {
  if (input.tokens <= kPackedInProduct && input.hidden <= kNormVectors * 4 * 32 * kWarpsFor<1>) {
    p.input = Input::kResidual;
    p.norm = input;
    return cudaSuccess;
  }
  p.input = Input::kPacked;
  p.packed = packed;
  p.token_scales = token_scales;
  return run_norm(weight.quantized, {input, packed, token_scales}, stream);
}

// Gives a product float32 rows with the maxima of their magnitudes.
inline cudaError_t give_rows(const Weight& weight, ProductArguments& p, const float* rows, const float* maxima, int count,
                             uint8_t* packed, float* token_scales, cudaStream_t stream) {
  if (p.tokens <= kPackedInProduct) {
    p.input = Input::kRows;
    p.rows = rows;
    p.maxima = maxima;
    p.maxima_count = count;
    return cudaSuccess;
  }
  p.input = Input::kPacked;
  p.packed = packed;
  p.token_scales = token_scales;
  return run_pack(weight.quantized, {rows, maxima, count, p.tokens, weight.contraction, packed, token_scales}, stream);
}

struct LayerArguments {
  NormInput input;  // of attention; its `out` is the layer's own
  const __nv_bfloat16* mlp_norm;
  Weight qkv, o, gate_up, down;
  Tiles tiles[4];                // of the weights in that order
  AttentionArguments attention;  // but for what scratch memory holds
  int dim;
  __nv_bfloat16* residual_out;  // after attention; the MLP's product stays in `added_out`
  float* added_out;             // [parts of down][tokens][hidden]
  void* scratch;
  int64_t scratch_bytes;
};

inline Status run_layer(LayerArguments l, cudaStream_t stream) {
  const int tokens = l.input.tokens, hidden = l.input.hidden;
  const int kv_heads = l.attention.kv_heads, heads = l.o.contraction / l.dim, splits = l.attention.splits;
  const int intermediate = l.down.contraction, width = heads * l.dim;

  Scratch scratch(l.scratch, l.scratch_bytes);
  auto* const middle = scratch.take<__nv_bfloat16>(static_cast<int64_t>(tokens) * hidden);
  auto* const packed = scratch.take<uint8_t>(2 * padded_tokens(tokens) * std::max({hidden, width, intermediate}));
  auto* const token_scales = scratch.take<float>(tokens);
  auto* const projected = scratch.take<float>(static_cast<int64_t>(l.tiles[0].parts) * tokens * l.qkv.outputs);
  auto* const partial = scratch.take<float>(static_cast<int64_t>(tokens) * splits * width);
  auto* const state = scratch.take<float>(static_cast<int64_t>(tokens) * splits * heads * 2);
  auto* const attended = scratch.take<float>(static_cast<int64_t>(tokens) * width);
  auto* const attended_maxima = scratch.take<float>(kv_heads * tokens);
  auto* const ended = scratch.take<uint32_t>(kv_heads * tokens);
  auto* const o_out = scratch.take<float>(static_cast<int64_t>(l.tiles[1].parts) * tokens * hidden);
  auto* const activated = scratch.take<float>(static_cast<int64_t>(tokens) * intermediate);
  auto* const activated_maxima = scratch.take<float>(static_cast<int64_t>(device().multiprocessors) * tokens);
  if (scratch.exceeded()) return Status{cudaErrorMemoryAllocation, "scratch memory"};

  int blocks = 0;
  ProductArguments p = l.qkv.product(tokens, l.tiles[0], projected);
  NormInput n = l.input;
  n.out = middle;
  p.counters = ended;
  p.counters_count = kv_heads * tokens;
  ELASTIC_RUN(give_normalized(l.qkv, p, n, packed, token_scales, stream), "norm before attention");
  ELASTIC_RUN(run_product<false>(l.qkv.quantized, p, l.tiles[0], stream, &blocks), "qkv");

  AttentionArguments a = l.attention;
  a.qkv = projected;
  a.parts = l.tiles[0].parts;
  a.partial = partial;
  a.state = state;
  a.out = attended;
  a.maxima = attended_maxima;
  a.ended = ended;
  ELASTIC_RUN(run_attention(l.dim, heads / kv_heads, a, stream), "attention");

  p = l.o.product(tokens, l.tiles[1], o_out);
  ELASTIC_RUN(give_rows(l.o, p, attended, attended_maxima, kv_heads, packed, token_scales, stream), "packing for o");
  ELASTIC_RUN(run_product<false>(l.o.quantized, p, l.tiles[1], stream, &blocks), "o");

  p = l.gate_up.product(tokens, l.tiles[2], activated);
  n.residual = middle;
  n.added = o_out;
  n.parts = l.tiles[1].parts;
  n.weight = l.mlp_norm;
  n.out = l.residual_out;
  p.out_maxima = activated_maxima;
  ELASTIC_RUN(give_normalized(l.gate_up, p, n, packed, token_scales, stream), "norm before the MLP");
  ELASTIC_RUN(run_product<true>(l.gate_up.quantized, p, l.tiles[2], stream, &blocks), "gate_up");

  p = l.down.product(tokens, l.tiles[3], l.added_out);
  ELASTIC_RUN(give_rows(l.down, p, activated, activated_maxima, blocks, packed, token_scales, stream), "packing for down");
  ELASTIC_RUN(run_product<false>(l.down.quantized, p, l.tiles[3], stream, &blocks), "down");
  return {};
}

struct HeadArguments {
  NormInput input;
  Weight weight;
  Tiles tiles;
  float* logits;
  void* scratch;
  int64_t scratch_bytes;
};

inline Status run_head(HeadArguments h, cudaStream_t stream) {
  Scratch scratch(h.scratch, h.scratch_bytes);
  const int64_t size = static_cast<int64_t>(h.input.tokens) * h.input.hidden;
  h.input.out = scratch.take<__nv_bfloat16>(size);
  auto* const packed = scratch.take<uint8_t>(2 * padded_tokens(h.input.tokens) * h.input.hidden);
  auto* const token_scales = scratch.take<float>(h.input.tokens);
  if (scratch.exceeded()) return Status{cudaErrorMemoryAllocation, "scratch memory"};
  ProductArguments p = h.weight.product(h.input.tokens, h.tiles, h.logits);
  int blocks = 0;
  ELASTIC_RUN(give_normalized(h.weight, p, h.input, packed, token_scales, stream), "norm before the head");
  ELASTIC_RUN(run_product<false>(h.weight.quantized, p, h.tiles, stream, &blocks), "head");
  return {};
}

#undef ELASTIC_RUN

}  // namespace elastic
