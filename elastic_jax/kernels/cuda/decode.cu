// A decoder layer and the language-model head for a few generated tokens, called by XLA (jax.ffi).
//
// A layer is eight launches on one stream: norm, qkv, attention, join, o, norm, gate_up, down; ten where there are more
// than two tokens, whose activations are packed before o and down by kernels of their own. On Hopper each may start
// before its predecessor ends (programmatic dependent launch) and fills its ring of weights meanwhile. A layer's last
// product is left unadded: the next norm adds it, so that splitting a contraction costs no launch.
//
// decode_cuda.py describes arguments and results, and names the sizes.

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <mutex>
#include <string>

#include "activations.cuh"
#include "attention.cuh"
#include "products.cuh"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace elastic {
namespace {

struct Device {
  int multiprocessors;
  int shared;  // bytes of shared memory of a multiprocessor
  bool overlaps;
};

const Device& device() {
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

ffi::Error failed(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInternal, "elastic decode: " + what); }

template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared, cudaStream_t stream,
                   const Arguments& arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = device().overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

// Sizes of one product.
struct Tiles {
  int row_tiles, depth, parts;
};

template <typename Weight, int kMTiles, int kRowTiles, int kDepth, bool kSwiGlu>
cudaError_t launch_product(const ProductArguments& a, cudaStream_t stream, int* blocks) {
  auto* const kernel = &product<Weight, kMTiles, kRowTiles, kDepth, kSwiGlu>;
  static const cudaError_t allowed = [kernel] {
    int id = 0, most = 0;
    cudaGetDevice(&id);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }();
  if (allowed != cudaSuccess) return allowed;
  const int tiles = a.outputs / (kTileRows * kRowTiles);
  const int walkers = std::min(tiles, std::max(1, device().multiprocessors / a.parts));
  *blocks = walkers * a.parts;
  // Started early, two blocks could share a multiprocessor and leave another idle: more than half of its memory each
  // keeps them apart.
  const int shared = std::max(product_shared_bytes<Weight, kRowTiles, kDepth>(a.tokens, a.row_bytes, a.parts),
                              device().shared / 2 + 1024);
  return launch(kernel, dim3(*blocks), kThreads, shared, stream, a);
}

template <typename Weight, int kMTiles, bool kSwiGlu>
cudaError_t choose_product(const ProductArguments& a, const Tiles& tiles, cudaStream_t stream, int* blocks) {
  const int key = 100 * tiles.row_tiles + tiles.depth;
  if constexpr (!kSwiGlu) {
    if (key == 108) return launch_product<Weight, kMTiles, 1, 8, kSwiGlu>(a, stream, blocks);
    if (key == 112) return launch_product<Weight, kMTiles, 1, 12, kSwiGlu>(a, stream, blocks);
  }
  if (key == 203) return launch_product<Weight, kMTiles, 2, 3, kSwiGlu>(a, stream, blocks);
  if (key == 204) return launch_product<Weight, kMTiles, 2, 4, kSwiGlu>(a, stream, blocks);
  if (key == 206) return launch_product<Weight, kMTiles, 2, 6, kSwiGlu>(a, stream, blocks);
  if (key == 208) return launch_product<Weight, kMTiles, 2, 8, kSwiGlu>(a, stream, blocks);
  if (key == 404) return launch_product<Weight, kMTiles, 4, 4, kSwiGlu>(a, stream, blocks);
  if (key == 406) return launch_product<Weight, kMTiles, 4, 6, kSwiGlu>(a, stream, blocks);
  if (key == 403) return launch_product<Weight, kMTiles, 4, 3, kSwiGlu>(a, stream, blocks);
  return cudaErrorInvalidValue;
}

template <bool kSwiGlu>
cudaError_t run_product(bool quantized, const ProductArguments& a, const Tiles& tiles, cudaStream_t stream,
                        int* blocks) {
  if (!quantized) return choose_product<Bf16, 1, kSwiGlu>(a, tiles, stream, blocks);
  if (a.tokens <= 8) return choose_product<Int8, 1, kSwiGlu>(a, tiles, stream, blocks);
  return choose_product<Int8, 2, kSwiGlu>(a, tiles, stream, blocks);
}

cudaError_t run_norm(bool quantized, const NormArguments& a, cudaStream_t stream) {
  auto* const kernel = quantized ? &norm<Int8> : &norm<Bf16>;
  return launch(kernel, dim3(a.tokens), kNormThreads, a.hidden * static_cast<int>(sizeof(float)), stream, a);
}

template <int kDim, int kGroup>
cudaError_t launch_attention(const AttentionArguments& a, cudaStream_t stream) {
  const cudaError_t status = launch(&attention<kDim, kGroup>, dim3(a.tokens, a.kv_heads, a.splits), kAttentionThreads, 0,
                                    stream, a);
  if (status != cudaSuccess) return status;
  return launch(&join_pieces<kDim, kGroup>, dim3(a.tokens, a.kv_heads), kAttentionThreads, 0, stream, a);
}

cudaError_t run_attention(int dim, int group, const AttentionArguments& a, cudaStream_t stream) {
  const int key = 10 * dim + group;
  if (key == 641) return launch_attention<64, 1>(a, stream);
  if (key == 643) return launch_attention<64, 3>(a, stream);
  if (key == 644) return launch_attention<64, 4>(a, stream);
  if (key == 1281) return launch_attention<128, 1>(a, stream);
  if (key == 1284) return launch_attention<128, 4>(a, stream);
  return cudaErrorInvalidValue;
}

// Tokens up to which a product packs float32 rows for itself, and saves a launch.
constexpr int kPackedInProduct = 2;

cudaError_t run_pack(bool quantized, const PackArguments& a, cudaStream_t stream) {
  auto* const kernel = quantized ? &pack_rows<Int8> : &pack_rows<Bf16>;
  const dim3 grid((a.contraction + kPackPiece - 1) / kPackPiece, a.tokens);
  return launch(kernel, grid, kPackThreads, 0, stream, a);
}

// A weight [out, in] as it comes: int8 with scales, or bf16 with none.
struct Weight {
  const uint8_t* values;
  const float* scales;
  int outputs;
  int contraction;
  bool quantized;

  Weight(ffi::AnyBuffer buffer, ffi::AnyBuffer scale)
      : values(static_cast<const uint8_t*>(buffer.untyped_data())),
        scales(static_cast<const float*>(scale.untyped_data())),
        outputs(static_cast<int>(buffer.dimensions()[0])),
        contraction(static_cast<int>(buffer.dimensions()[1])),
        quantized(buffer.element_type() == ffi::DataType::S8) {}

  ProductArguments product(int tokens, int parts, float* out) const {
    ProductArguments a = {};
    a.weight = values;
    a.weight_scales = scales;
    a.outputs = outputs;
    a.row_bytes = static_cast<int64_t>(contraction) * (quantized ? 1 : 2);
    a.tokens = tokens;
    a.parts = parts;
    a.out = out;
    return a;
  }
};

// Hands out aligned pieces of one buffer.
struct Scratch {
  uint8_t* next;
  uint8_t* end;

  explicit Scratch(ffi::Result<ffi::AnyBuffer>& buffer)
      : next(static_cast<uint8_t*>(buffer->untyped_data())), end(next + buffer->size_bytes()) {}

  template <typename T>
  T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(next);
    next += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return piece;
  }

  bool exceeded() const { return next > end; }
};

template <typename T>
T* data(ffi::AnyBuffer buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

#define ELASTIC_RUN(call, what)                                                                          \
  if (const cudaError_t status = (call); status != cudaSuccess)                                          \
    return failed(std::string(what) + ": " + cudaGetErrorString(status));

ffi::Error decode_layer(cudaStream_t stream, ffi::AnyBuffer residual, ffi::AnyBuffer added, ffi::AnyBuffer attention_norm,
                        ffi::AnyBuffer mlp_norm, ffi::AnyBuffer frequency, ffi::AnyBuffer position, ffi::AnyBuffer slot,
                        ffi::AnyBuffer row, ffi::AnyBuffer block_table, ffi::AnyBuffer context_length,
                        ffi::AnyBuffer kv_in, ffi::AnyBuffer qkv_values, ffi::AnyBuffer qkv_scales,
                        ffi::AnyBuffer o_values, ffi::AnyBuffer o_scales, ffi::AnyBuffer gate_up_values,
                        ffi::AnyBuffer gate_up_scales, ffi::AnyBuffer down_values, ffi::AnyBuffer down_scales,
                        ffi::Result<ffi::AnyBuffer> residual_out, ffi::Result<ffi::AnyBuffer> added_out,
                        ffi::Result<ffi::AnyBuffer> kv_out, ffi::Result<ffi::AnyBuffer> scratch_out, float eps,
                        int32_t page_size, int32_t splits, ffi::Span<const int32_t> tiles) {
  const Weight qkv(qkv_values, qkv_scales), o(o_values, o_scales), gate_up(gate_up_values, gate_up_scales),
      down(down_values, down_scales);
  const int tokens = static_cast<int>(residual.dimensions()[0]), hidden = static_cast<int>(residual.dimensions()[1]);
  if (tiles.size() != 12 || tokens > kMostTokens || splits > kMostSplits) return failed("sizes out of range");
  if (kv_in.untyped_data() != kv_out->untyped_data()) return failed("the cache was copied");
  auto tiles_of = [&](int i) { return Tiles{tiles[3 * i], tiles[3 * i + 1], tiles[3 * i + 2]}; };

  const auto cache = kv_in.dimensions();
  const int kv_heads = static_cast<int>(cache[2]), dim = static_cast<int>(cache[3]);
  const int heads = o.contraction / dim, intermediate = down.contraction;

  Scratch scratch(scratch_out);
  auto* const middle = scratch.take<__nv_bfloat16>(tokens * hidden);
  const int widest = std::max({hidden, heads * dim, intermediate});
  auto* const packed = scratch.take<uint8_t>(static_cast<int64_t>(2) * tokens * widest);
  auto* const token_scales = scratch.take<float>(tokens);
  auto* const projected = scratch.take<float>(static_cast<int64_t>(tiles_of(0).parts) * tokens * qkv.outputs);
  auto* const partial = scratch.take<float>(static_cast<int64_t>(tokens) * splits * heads * dim);
  auto* const state = scratch.take<float>(static_cast<int64_t>(tokens) * splits * heads * 2);
  auto* const attended = scratch.take<float>(static_cast<int64_t>(tokens) * heads * dim);
  auto* const attended_maxima = scratch.take<float>(kv_heads * tokens);
  auto* const o_out = scratch.take<float>(static_cast<int64_t>(tiles_of(1).parts) * tokens * hidden);
  auto* const activated = scratch.take<float>(static_cast<int64_t>(tokens) * intermediate);
  auto* const activated_maxima = scratch.take<float>(static_cast<int64_t>(device().multiprocessors) * tokens);
  if (scratch.exceeded()) return failed("too little scratch memory");

  // Activations as float32 rows with the maxima of their magnitudes, for a product.
  auto give_rows = [&](const Weight& weight, ProductArguments& p, const float* rows, const float* maxima, int count) {
    if (tokens <= kPackedInProduct) {
      p.rows = rows;
      p.maxima = maxima;
      p.maxima_count = count;
      return cudaSuccess;
    }
    p.packed = packed;
    p.token_scales = token_scales;
    return run_pack(weight.quantized, {rows, maxima, count, tokens, weight.contraction, packed, token_scales}, stream);
  };

  int blocks = 0;
  NormArguments n = {data<__nv_bfloat16>(residual), data<float>(added), static_cast<int>(added.dimensions()[0]),
                     data<__nv_bfloat16>(attention_norm), eps, tokens, hidden, middle, packed, token_scales};
  ELASTIC_RUN(run_norm(qkv.quantized, n, stream), "norm before attention");

  ProductArguments p = qkv.product(tokens, tiles_of(0).parts, projected);
  p.packed = packed;
  p.token_scales = token_scales;
  ELASTIC_RUN(run_product<false>(qkv.quantized, p, tiles_of(0), stream, &blocks), "qkv");

  AttentionArguments a = {};
  a.qkv = projected;
  a.parts = tiles_of(0).parts;
  a.frequency = data<float>(frequency);
  a.position = data<int>(position);
  a.slot = data<int>(slot);
  a.row = data<int>(row);
  a.block_table = data<int>(block_table);
  a.context_length = data<int>(context_length);
  a.kv = data<__nv_bfloat16>(kv_in);
  a.tokens = tokens;
  a.rows = static_cast<int>(block_table.dimensions()[0]);
  a.pages = static_cast<int>(block_table.dimensions()[1]);
  a.page_size = page_size;
  a.slots = static_cast<int>(cache[0]);
  a.kv_heads = kv_heads;
  a.splits = splits;
  a.partial = partial;
  a.state = state;
  a.out = attended;
  a.maxima = attended_maxima;
  ELASTIC_RUN(run_attention(dim, heads / kv_heads, a, stream), "attention");

  p = o.product(tokens, tiles_of(1).parts, o_out);
  ELASTIC_RUN(give_rows(o, p, attended, attended_maxima, kv_heads), "packing for o");
  ELASTIC_RUN(run_product<false>(o.quantized, p, tiles_of(1), stream, &blocks), "o");

  n.residual = middle;
  n.added = o_out;
  n.parts = tiles_of(1).parts;
  n.weight = data<__nv_bfloat16>(mlp_norm);
  n.out = data<__nv_bfloat16>(*residual_out);
  ELASTIC_RUN(run_norm(gate_up.quantized, n, stream), "norm before the MLP");

  p = gate_up.product(tokens, 1, activated);
  p.packed = packed;
  p.token_scales = token_scales;
  p.out_maxima = activated_maxima;
  ELASTIC_RUN(run_product<true>(gate_up.quantized, p, tiles_of(2), stream, &blocks), "gate_up");

  p = down.product(tokens, tiles_of(3).parts, data<float>(*added_out));
  ELASTIC_RUN(give_rows(down, p, activated, activated_maxima, blocks), "packing for down");
  ELASTIC_RUN(run_product<false>(down.quantized, p, tiles_of(3), stream, &blocks), "down");
  return ffi::Error::Success();
}

ffi::Error decode_head(cudaStream_t stream, ffi::AnyBuffer residual, ffi::AnyBuffer norm_weight, ffi::AnyBuffer values,
                       ffi::AnyBuffer scales, ffi::Result<ffi::AnyBuffer> logits,
                       ffi::Result<ffi::AnyBuffer> scratch_out, float eps, ffi::Span<const int32_t> tiles) {
  const Weight head(values, scales);
  const int tokens = static_cast<int>(residual.dimensions()[0]), hidden = static_cast<int>(residual.dimensions()[1]);
  if (tiles.size() != 3 || tiles[2] != 1 || tokens > kMostTokens) return failed("sizes out of range");
  Scratch scratch(scratch_out);
  auto* const out = scratch.take<__nv_bfloat16>(tokens * hidden);
  auto* const packed = scratch.take<uint8_t>(static_cast<int64_t>(2) * tokens * hidden);
  auto* const token_scales = scratch.take<float>(tokens);
  if (scratch.exceeded()) return failed("too little scratch memory");
  const NormArguments n = {data<__nv_bfloat16>(residual), nullptr, 0,   data<__nv_bfloat16>(norm_weight), eps, tokens,
                           hidden, out, packed, token_scales};
  ELASTIC_RUN(run_norm(head.quantized, n, stream), "norm before the head");
  ProductArguments p = head.product(tokens, 1, data<float>(*logits));
  p.packed = packed;
  p.token_scales = token_scales;
  int blocks = 0;
  ELASTIC_RUN(run_product<false>(head.quantized, p, Tiles{tiles[0], tiles[1], tiles[2]}, stream, &blocks), "head");
  return ffi::Error::Success();
}

}  // namespace
}  // namespace elastic

using Buffer = ffi::AnyBuffer;

#pragma GCC visibility push(default)

// sha256 of the sources that this library was built from (build.sh).
extern "C" const char ElasticDecodeSources[] = ELASTIC_SOURCES;

XLA_FFI_DEFINE_HANDLER_SYMBOL(ElasticDecodeLayer, elastic::decode_layer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
                                  .Attr<float>("eps")
                                  .Attr<int32_t>("page_size")
                                  .Attr<int32_t>("splits")
                                  .Attr<ffi::Span<const int32_t>>("tiles"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(ElasticDecodeHead, elastic::decode_head,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Ret<Buffer>().Ret<Buffer>()
                                  .Attr<float>("eps")
                                  .Attr<ffi::Span<const int32_t>>("tiles"));

#pragma GCC visibility pop
