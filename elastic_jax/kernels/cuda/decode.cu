// What XLA calls (jax.ffi): a decoder layer and the language-model head for up to 64 generated tokens.
//
// decode_cuda.py describes arguments and results, and names the sizes; layer.cuh has the launches.

#include <cstdint>
#include <string>

#include "layer.cuh"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace elastic {
namespace {

ffi::Error failed(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInternal, "elastic decode: " + what); }

ffi::Error finished(const Status& status) {
  if (status.error == cudaSuccess) return ffi::Error::Success();
  return failed(std::string(status.what) + ": " + cudaGetErrorString(status.error));
}

template <typename T>
T* data(ffi::AnyBuffer buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

Weight weight_of(ffi::AnyBuffer values, ffi::AnyBuffer scales) {
  return {data<uint8_t>(values), data<float>(scales), static_cast<int>(values.dimensions()[0]),
          static_cast<int>(values.dimensions()[1]), values.element_type() == ffi::DataType::S8};
}

constexpr int kTileNumbers = 3;

Tiles tiles_of(ffi::Span<const int32_t> numbers, int weight) {
  const int32_t* const at = numbers.begin() + kTileNumbers * weight;
  return {at[0], at[1], at[2]};
}

ffi::Error decode_layer(cudaStream_t stream, ffi::AnyBuffer residual, ffi::AnyBuffer added, ffi::AnyBuffer attention_norm,
                        ffi::AnyBuffer mlp_norm, ffi::AnyBuffer cosine, ffi::AnyBuffer sine, ffi::AnyBuffer slot,
                        ffi::AnyBuffer row, ffi::AnyBuffer block_table, ffi::AnyBuffer context_length,
                        ffi::AnyBuffer kv_in, ffi::AnyBuffer kv_scales_in, ffi::AnyBuffer qkv_values, ffi::AnyBuffer qkv_scales,
                        ffi::AnyBuffer o_values, ffi::AnyBuffer o_scales, ffi::AnyBuffer gate_up_values,
                        ffi::AnyBuffer gate_up_scales, ffi::AnyBuffer down_values, ffi::AnyBuffer down_scales,
                        ffi::Result<ffi::AnyBuffer> residual_out, ffi::Result<ffi::AnyBuffer> added_out,
                        ffi::Result<ffi::AnyBuffer> kv_out, ffi::Result<ffi::AnyBuffer> kv_scales_out,
                        ffi::Result<ffi::AnyBuffer> scratch, float eps,
                        int32_t page_size, int32_t splits, ffi::Span<const int32_t> tiles) {
  const int tokens = static_cast<int>(residual.dimensions()[0]), hidden = static_cast<int>(residual.dimensions()[1]);
  if (tiles.size() != 4 * kTileNumbers || splits > kMostSplits) return failed("sizes out of range");
  const bool int8_kv = kv_in.element_type() == ffi::DataType::S8;  // otherwise there are no scales
  if (kv_in.untyped_data() != kv_out->untyped_data()) return failed("the cache was copied");
  if (int8_kv && kv_scales_in.untyped_data() != kv_scales_out->untyped_data()) return failed("the cache was copied");

  LayerArguments l = {};
  l.input = {data<__nv_bfloat16>(residual), data<float>(added), static_cast<int>(added.dimensions()[0]),
             data<__nv_bfloat16>(attention_norm), eps, tokens, hidden, nullptr};
  l.mlp_norm = data<__nv_bfloat16>(mlp_norm);
  l.qkv = weight_of(qkv_values, qkv_scales);
  l.o = weight_of(o_values, o_scales);
  l.gate_up = weight_of(gate_up_values, gate_up_scales);
  l.down = weight_of(down_values, down_scales);
  for (int i = 0; i < 4; ++i) {
    l.tiles[i] = tiles_of(tiles, i);
    if (tokens > most_tokens(l.tiles[i])) return failed("sizes out of range");
  }
  const auto cache = kv_in.dimensions();
  AttentionArguments& a = l.attention;
  a.cosine = data<float>(cosine);
  a.sine = data<float>(sine);
  a.slot = data<int>(slot);
  a.row = data<int>(row);
  a.block_table = data<int>(block_table);
  a.context_length = data<int>(context_length);
  if (int8_kv) {
    a.int8_kv = data<int8_t>(kv_in);
    a.kv_scales = data<float>(kv_scales_in);
  } else {
    a.kv = data<__nv_bfloat16>(kv_in);
  }
  a.tokens = tokens;
  a.rows = static_cast<int>(block_table.dimensions()[0]);
  a.pages = static_cast<int>(block_table.dimensions()[1]);
  a.page_size = page_size;
  a.slots = static_cast<int>(cache[0]);
  a.kv_heads = static_cast<int>(cache[2]);
  a.splits = splits;
  l.dim = static_cast<int>(cache[3]);
  l.residual_out = data<__nv_bfloat16>(*residual_out);
  l.added_out = data<float>(*added_out);
  l.scratch = scratch->untyped_data();
  l.scratch_bytes = static_cast<int64_t>(scratch->size_bytes());
  return finished(run_layer(l, stream));
}

ffi::Error decode_head(cudaStream_t stream, ffi::AnyBuffer residual, ffi::AnyBuffer norm_weight, ffi::AnyBuffer values,
                       ffi::AnyBuffer scales, ffi::Result<ffi::AnyBuffer> logits, ffi::Result<ffi::AnyBuffer> scratch,
                       float eps, ffi::Span<const int32_t> tiles) {
  const int tokens = static_cast<int>(residual.dimensions()[0]), hidden = static_cast<int>(residual.dimensions()[1]);
  if (tiles.size() != kTileNumbers || tiles[2] != 1 || tokens > most_tokens(tiles_of(tiles, 0))) return failed("sizes out of range");
  HeadArguments h = {};
  h.input = {data<__nv_bfloat16>(residual), nullptr, 0, data<__nv_bfloat16>(norm_weight), eps, tokens, hidden, nullptr};
  h.weight = weight_of(values, scales);
  h.tiles = tiles_of(tiles, 0);
  h.logits = data<float>(*logits);
  h.scratch = scratch->untyped_data();
  h.scratch_bytes = static_cast<int64_t>(scratch->size_bytes());
  return finished(run_head(h, stream));
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
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
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
