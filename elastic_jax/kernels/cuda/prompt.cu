// Products of matrices and attention for the many rows of prompts (prompt_dot.cuh, prompt_attention.cuh), called by XLA
// (jax.ffi); prompt_dot_cuda.py and prompt_attention_cuda.py describe arguments and results.

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "prompt_attention.cuh"
#include "prompt_dot.cuh"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace elastic {
namespace {

template <typename T>
T* data(ffi::AnyBuffer buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// `residual` is empty where nothing is added; so are the scales of bf16.
ffi::Error call_prompt_dot(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer row_scales, ffi::AnyBuffer values,
                           ffi::AnyBuffer scales, ffi::AnyBuffer residual, ffi::Result<ffi::AnyBuffer> out,
                           int32_t gated, int32_t width, int32_t together) {
  const bool quantized = values.element_type() == ffi::DataType::S8;
  DotArguments a = {};
  a.x = x.untyped_data();
  a.row_scales = data<float>(row_scales);
  a.values = values.untyped_data();
  a.scales = quantized ? data<float>(scales) : nullptr;
  a.residual = data<__nv_bfloat16>(residual);
  a.out = out->untyped_data();
  a.rows = static_cast<int>(x.dimensions()[0]);
  a.outputs = static_cast<int>(values.dimensions()[0]);
  a.row_bytes = static_cast<int>(values.dimensions()[1]) * (quantized ? 1 : 2);
  a.blocks = quantized ? static_cast<int>(row_scales.dimensions()[1]) : 1;
  a.together = together;
  const Ending ending =
      gated != 0 ? Ending::kActivated : residual.element_count() > 0 ? Ending::kAdded : Ending::kPlain;
  const Launched launched = run_dot(a, ending, width, stream);
  if (launched.error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal,
                    std::string("elastic prompt dot: ") + launched.what + ": " + cudaGetErrorString(launched.error));
}

ffi::Error call_prompt_attention(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer kv, ffi::AnyBuffer block_table,
                                 ffi::AnyBuffer work, ffi::Result<ffi::AnyBuffer> out, int32_t page_size) {
  const auto queries = query.dimensions(), cache = kv.dimensions();
  if (queries[2] != kHeadDim) return ffi::Error(ffi::ErrorCode::kInternal, "elastic prompt attention: the head's size");
  PromptAttentionArguments a = {};
  a.table = data<int>(block_table);
  a.work = data<int4>(work);
  a.out = data<float>(*out);
  a.tiles = static_cast<int>(work.dimensions()[0]);
  a.heads = static_cast<int>(queries[1]);
  a.kv_heads = static_cast<int>(cache[2]);
  a.pages = static_cast<int>(block_table.dimensions()[1]);
  a.page_size = page_size;
  const cudaError_t error = run_prompt_attention(query.untyped_data(), kv.untyped_data(), static_cast<int>(queries[0]),
                                                 static_cast<int>(cache[0]), a, stream);
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal, std::string("elastic prompt attention: ") + cudaGetErrorString(error));
}

}  // namespace
}  // namespace elastic

using Buffer = ffi::AnyBuffer;

#pragma GCC visibility push(default)

// sha256 of the sources that this library was built from (build.sh).
extern "C" const char ElasticPromptSources[] = ELASTIC_SOURCES;

XLA_FFI_DEFINE_HANDLER_SYMBOL(ElasticPromptDot, elastic::call_prompt_dot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<int32_t>("gated")
                                  .Attr<int32_t>("width")
                                  .Attr<int32_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(ElasticPromptAttention, elastic::call_prompt_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<int32_t>("page_size"));

#pragma GCC visibility pop
