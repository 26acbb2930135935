// What all kernels of decode are launched with, and what they are given: weights, scratch memory, one layer's buffers.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "attention.cuh"

namespace elastic {

struct Device {
  int multiprocessors;
  int shared;  // bytes of shared memory of a multiprocessor
  bool hopper;   // or later: kernels overlap, and blocks form clusters
  bool streams;  // Hopper itself, whose instructions streamed.cuh has
};

inline const Device& device() {
  static const Device found = [] {
    int id = 0, multiprocessors = 1, shared = 0, major = 0;
    cudaGetDevice(&id);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, id);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
    return Device{multiprocessors, shared, major >= 9, major == 9};
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

// Sizes of one product. With `kStreamed` row tiles or more it is a streamed one (streamed.cuh), whose depth follows.
struct Tiles {
  int row_tiles, depth, parts;

  static constexpr int kStreamed = 16;
  bool streamed() const { return row_tiles >= kStreamed; }
};

// A weight [out, in]: int8 with scales, or bf16 with none.
struct Weight {
  const uint8_t* values;
  const float* scales;
  int outputs;
  int contraction;
  bool quantized;

  int64_t row_bytes() const { return static_cast<int64_t>(contraction) * (quantized ? 1 : 2); }
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

struct HeadArguments {
  NormInput input;
  Weight weight;
  Tiles tiles;
  float* logits;
  void* scratch;
  int64_t scratch_bytes;
};

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
  return launch(kernel, dim3(a.tokens, a.kv_heads, a.splits), kAttentionThreads, 0, stream, a,
                a.clusters ? a.splits : 1);
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

}  // namespace elastic
