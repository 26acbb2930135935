// Products of int8 matrices for the many rows of prompts (integer_dot.cuh), called by XLA (jax.ffi);
// integer_dot_cuda.py describes arguments and results.

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "integer_dot.cuh"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace elastic {
namespace {

template <typename T>
T* data(ffi::AnyBuffer buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// `residual` is empty where nothing is added.
ffi::Error prompt_dot(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer row_scales, ffi::AnyBuffer values,
                      ffi::AnyBuffer scales, ffi::AnyBuffer residual, ffi::Result<ffi::AnyBuffer> out, int32_t gated,
                      int32_t width, int32_t together) {
  DotArguments a = {};
  a.x = data<int8_t>(x);
  a.row_scales = data<float>(row_scales);
  a.values = data<int8_t>(values);
  a.scales = data<float>(scales);
  a.residual = data<__nv_bfloat16>(residual);
  a.out = out->untyped_data();
  a.rows = static_cast<int>(x.dimensions()[0]);
  a.outputs = static_cast<int>(values.dimensions()[0]);
  a.contraction = static_cast<int>(values.dimensions()[1]);
  a.blocks = static_cast<int>(row_scales.dimensions()[1]);
  a.together = together;
  const Ending ending =
      gated != 0 ? Ending::kActivated : residual.element_count() > 0 ? Ending::kAdded : Ending::kScaled;
  const Launched launched = run_dot(a, ending, width, stream);
  if (launched.error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal,
                    std::string("elastic integer dot: ") + launched.what + ": " + cudaGetErrorString(launched.error));
}

}  // namespace
}  // namespace elastic

using Buffer = ffi::AnyBuffer;

#pragma GCC visibility push(default)

// sha256 of the sources that this library was built from (build.sh).
extern "C" const char ElasticPromptSources[] = ELASTIC_SOURCES;

XLA_FFI_DEFINE_HANDLER_SYMBOL(ElasticPromptDot, elastic::prompt_dot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Attr<int32_t>("gated")
                                  .Attr<int32_t>("width")
                                  .Attr<int32_t>("together"));

#pragma GCC visibility pop
