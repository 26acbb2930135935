// Choosing tokens from logits (sampling.cuh), called by XLA (jax.ffi); sampling_cuda.py describes arguments and results.
//
// One cooperative launch for all rows, or several where a small GPU cannot hold a block of each at once: the blocks of a
// row wait for each other.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "sampling.cuh"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace elastic {
namespace {

constexpr int kChoiceThreads = 512;
constexpr int kLeastShare = 2048;  // tokens of a block, below which more blocks gain nothing

struct CudaTeam {
  static constexpr int kThreads = kChoiceThreads;
  uint32_t* arrived;
  int block_, blocks_;
  uint32_t awaited = 0;

  __device__ int thread() const { return threadIdx.x; }
  __device__ int block() const { return block_; }
  __device__ int blocks() const { return blocks_; }
  __device__ void sync() { __syncthreads(); }

  __device__ void sync_row() {
    awaited += blocks_;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(arrived, 1u);
      while (*static_cast<volatile uint32_t*>(arrived) < awaited) {
      }
      __threadfence();
    }
    __syncthreads();
  }

  __device__ static uint32_t add(uint32_t* to, uint32_t value) { return atomicAdd(to, value); }
  __device__ static void add(uint64_t* to, uint64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
  }
  __device__ static void add(float* to, float value) { atomicAdd(to, value); }
  __device__ static void most(uint32_t* to, uint32_t value) { atomicMax(to, value); }
  __device__ static void most(uint64_t* to, uint64_t value) {
    atomicMax(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
  }
  __device__ static uint32_t load(const uint32_t* from) { return __ldcg(from); }
  __device__ static uint64_t load(const uint64_t* from) {
    return __ldcg(reinterpret_cast<const unsigned long long*>(from));
  }
};

__global__ void __launch_bounds__(kChoiceThreads) choose(const ChoiceArguments a, int first, int blocks) {
  __shared__ ChoiceShared<kChoiceThreads> shared;
  const int output = first + static_cast<int>(blockIdx.x) / blocks;
  CudaTeam team = {&a.scratch[output].arrived, static_cast<int>(blockIdx.x) % blocks, blocks};
  choose_row(team, shared, a, output);
}

// Blocks that can run at once.
int resident_blocks() {
  static const int found = [] {
    int id = 0, multiprocessors = 1, each = 1;
    cudaGetDevice(&id);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, id);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, choose, kChoiceThreads, 0);
    return std::max(1, multiprocessors * each);
  }();
  return found;
}

ffi::Error failed(const std::string& what) {
  return ffi::Error(ffi::ErrorCode::kInternal, "elastic sampling: " + what);
}

template <typename T>
T* data(ffi::AnyBuffer buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

ffi::Error run(cudaStream_t stream, ChoiceArguments a, ffi::AnyBuffer logits, ffi::Result<ffi::AnyBuffer> token,
               ffi::Result<ffi::AnyBuffer> log_probability, ffi::Result<ffi::AnyBuffer> finite,
               ffi::Result<ffi::AnyBuffer> scratch) {
  const int outputs = static_cast<int>(logits.dimensions()[0]);
  a.logits = data<float>(logits);
  a.vocab = static_cast<int>(logits.dimensions()[1]);
  a.token = data<int>(*token);
  a.log_probability = data<float>(*log_probability);
  a.finite = data<bool>(*finite);
  a.scratch = data<ChoiceScratch>(*scratch);
  if (scratch->size_bytes() < outputs * sizeof(ChoiceScratch)) return failed("too little scratch memory");
  cudaError_t status = cudaMemsetAsync(a.scratch, 0, outputs * sizeof(ChoiceScratch), stream);
  const int resident = resident_blocks(), together = std::min(outputs, resident);
  int blocks = std::min({kMostBlocks, resident / together, (a.vocab + kLeastShare - 1) / kLeastShare});
  for (int first = 0; first < outputs && status == cudaSuccess; first += together) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(std::min(together, outputs - first) * blocks);
    config.blockDim = dim3(kChoiceThreads);
    config.stream = stream;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    status = cudaLaunchKernelEx(&config, choose, a, first, blocks);
  }
  return status == cudaSuccess ? ffi::Error::Success() : failed(cudaGetErrorString(status));
}

ffi::Error most_likely(cudaStream_t stream, ffi::AnyBuffer logits, ffi::Result<ffi::AnyBuffer> token,
                       ffi::Result<ffi::AnyBuffer> log_probability, ffi::Result<ffi::AnyBuffer> finite,
                       ffi::Result<ffi::AnyBuffer> scratch) {
  return run(stream, ChoiceArguments{}, logits, token, log_probability, finite, scratch);
}

ffi::Error sample(cudaStream_t stream, ffi::AnyBuffer logits, ffi::AnyBuffer row, ffi::AnyBuffer position,
                  ffi::AnyBuffer key, ffi::AnyBuffer counts, ffi::AnyBuffer prompt_mask, ffi::AnyBuffer temperature,
                  ffi::AnyBuffer top_k, ffi::AnyBuffer top_p, ffi::AnyBuffer min_p, ffi::AnyBuffer repetition_penalty,
                  ffi::AnyBuffer presence_penalty, ffi::AnyBuffer frequency_penalty, ffi::AnyBuffer choice,
                  ffi::AnyBuffer bias_token, ffi::AnyBuffer bias, ffi::AnyBuffer allowed,
                  ffi::Result<ffi::AnyBuffer> token, ffi::Result<ffi::AnyBuffer> log_probability,
                  ffi::Result<ffi::AnyBuffer> finite, ffi::Result<ffi::AnyBuffer> scaled,
                  ffi::Result<ffi::AnyBuffer> scratch) {
  ChoiceArguments a = {};
  a.row = data<int>(row);
  a.position = data<int>(position);
  a.scaled = data<float>(*scaled);
  a.by_row = {data<float>(temperature),
              data<int>(top_k),
              data<float>(top_p),
              data<float>(min_p),
              data<float>(repetition_penalty),
              data<float>(presence_penalty),
              data<float>(frequency_penalty),
              data<int>(choice),
              data<int>(bias_token),
              data<float>(bias),
              data<uint32_t>(allowed),
              data<uint32_t>(key),
              data<int>(counts),
              data<uint32_t>(prompt_mask),
              static_cast<int>(counts.dimensions()[0]),
              static_cast<int>(allowed.dimensions()[1]),
              static_cast<int>(bias_token.dimensions()[1])};
  return run(stream, a, logits, token, log_probability, finite, scratch);
}

}  // namespace
}  // namespace elastic

using Buffer = ffi::AnyBuffer;

#pragma GCC visibility push(default)

// sha256 of the sources that this library was built from (build.sh).
extern "C" const char ElasticSamplingSources[] = ELASTIC_SOURCES;

extern "C" const int64_t ElasticSamplingScratchBytes = sizeof(elastic::ChoiceScratch);

XLA_FFI_DEFINE_HANDLER_SYMBOL(ElasticMostLikely, elastic::most_likely,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(ElasticSample, elastic::sample,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Arg<Buffer>().Arg<Buffer>()
                                  .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>());

#pragma GCC visibility pop
