// CUDA as decode's kernels use it, on a CPU: blocks run one after the other, and a block's threads are contexts that take
// turns. One runs until it waits for others of its warp or block; which goes first is a matter of `descending`, so a wait
// that is missing shows as a difference. What C++ calls thread_local is what a block shares: all its threads are contexts
// of one thread.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local

using std::max;
using std::min;

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// -- threads ----------------------------------------------------------------------------------------------------------

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr size_t kStack = 64 << 10;
constexpr int kWarp = 32;

// Threads that wait for each other.
struct Group {
  int members = 0, arrived = 0, generation = 0;

  void arrive() {
    if (++arrived >= members) {
      arrived = 0;
      ++generation;
    }
  }

  void leave() {
    --members;
    if (members > 0 && arrived >= members) {
      arrived = 0;
      ++generation;
    }
  }
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  const Group* waits_for = nullptr;
  int until = 0;  // its generation
  bool polls = false;  // it looked in vain for what others do, and nothing else since
  bool done = false;
};

struct Exchange {  // what lanes show each other; two, so that one may be written while the other is still read
  uint64_t words[2][kWarp][4];
  int turn[kWarp];
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Group> warps;
  std::vector<Exchange> exchanges;
  Group all, some;  // `some`: those of a barrier that not all threads take part in
  ucontext_t scheduler;
  int now = 0;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;

  void wait(Group& group) {
    Thread& mine = threads[now];
    mine.waits_for = &group;
    mine.until = group.generation + 1;
    group.arrive();
    if (group.generation < mine.until) swapcontext(&mine.context, &scheduler);
    mine.waits_for = nullptr;
  }

  // Lets the others go on, until something has happened.
  template <typename Happened>
  void poll(const Happened& happened) {
    for (bool before = false; !happened(); before = true) {
      threads[now].polls = before;
      swapcontext(&threads[now].context, &scheduler);
    }
    threads[now].polls = false;
  }
};

inline thread_local Block* block = nullptr;
inline bool descending = false;

inline void enter() {
  block->body(block->arguments);
  Thread& mine = block->threads[block->now];
  mine.done = true;
  block->warps[block->now / kWarp].leave();
  block->all.leave();
  swapcontext(&mine.context, &block->scheduler);
}

// Whether all threads came to their ends; otherwise they wait for each other.
inline bool run_block(int count, void (*body)(void*), void* arguments) {
  static thread_local std::vector<Thread> kept;  // stacks are used again
  Block here;
  here.threads.swap(kept);
  if (static_cast<int>(here.threads.size()) < count) here.threads.resize(count);
  here.warps.assign((count + kWarp - 1) / kWarp, {});
  here.exchanges.assign(here.warps.size(), {});
  here.all.members = count;
  here.body = body;
  here.arguments = arguments;
  block = &here;
  for (int at = 0; at < count; ++at) {
    Thread& thread = here.threads[at];
    thread.done = thread.polls = false;
    thread.waits_for = nullptr;
    ++here.warps[at / kWarp].members;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, enter, 0);
  }
  bool progress = true;
  for (int left = count; left && progress;) {
    progress = false;
    for (int i = 0; i < count; ++i) {
      const int at = descending ? count - 1 - i : i;
      Thread& thread = here.threads[at];
      if (thread.done || (thread.waits_for != nullptr && thread.waits_for->generation < thread.until)) continue;
      here.now = at;
      threadIdx = dim3(at, 0, 0);
      swapcontext(&here.scheduler, &thread.context);
      left -= thread.done;
      progress |= !thread.polls;
    }
  }
  kept.swap(here.threads);
  block = nullptr;
  return progress;
}

inline int lane() { return block->now % kWarp; }

// Shows the other lanes of the warp up to 32 bytes, and gives what all of them show; `T` is a plain type.
template <typename T>
const T* shown(const T& mine, T (&all)[kWarp]) {
  static_assert(sizeof(T) <= sizeof(Exchange::words[0][0]));
  const int warp = block->now / kWarp, me = lane();
  Exchange& exchange = block->exchanges[warp];
  const int turn = exchange.turn[me]++ % 2;
  std::memcpy(exchange.words[turn][me], &mine, sizeof(T));
  block->wait(block->warps[warp]);
  for (int i = 0; i < kWarp; ++i) std::memcpy(&all[i], exchange.words[turn][i], sizeof(T));
  return all;
}

}  // namespace emulation

inline void __syncthreads() { emulation::block->wait(emulation::block->all); }
inline void __syncwarp() { emulation::block->wait(emulation::block->warps[emulation::block->now / emulation::kWarp]); }
inline void __threadfence() {}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  T all[emulation::kWarp];
  return emulation::shown(value, all)[emulation::lane() ^ distance];
}

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  T all[emulation::kWarp];
  return emulation::shown(value, all)[from];
}

inline bool __any_sync(unsigned, bool value) {
  bool all[emulation::kWarp];
  emulation::shown(value, all);
  return std::any_of(all, all + emulation::kWarp, [](bool each) { return each; });
}

inline uint32_t atomicAdd(uint32_t* to, uint32_t value) {
  const uint32_t before = *to;
  *to += value;
  return before;
}

inline uint32_t atomicMax(uint32_t* to, uint32_t value) {
  const uint32_t before = *to;
  *to = max(before, value);
  return before;
}

namespace emulation {

constexpr size_t kShared = 227 << 10;

}

namespace elastic {

// What kernels declare as `extern`; a launch says how much of it they take.
thread_local __attribute__((aligned(1024))) uint8_t shared[emulation::kShared];

}  // namespace elastic

inline uintptr_t __cvta_generic_to_shared(const void* at) { return static_cast<const uint8_t*>(at) - elastic::shared; }

template <typename T>
T __ldg(const T* from) {
  return *from;
}

template <typename T>
T __ldcg(const T* from) {
  return *from;
}

// -- numbers ----------------------------------------------------------------------------------------------------------

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }

// What is no number becomes 0, and what is too large the largest, as on a GPU.
inline int __float2int_rn(float x) {
  if (std::isnan(x)) return 0;
  if (x >= 0x1p31f) return INT32_MAX;
  return x < -0x1p31f ? INT32_MIN : static_cast<int>(std::nearbyint(x));
}

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t select) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) found |= static_cast<uint32_t>(bytes >> 8 * (select >> 4 * i & 7) & 255) << 8 * i;
  return found;
}

// -- the runtime ------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation, cudaErrorNotSupported, cudaErrorUnknown };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t error) {
  static const char* const names[] = {"success", "invalid value", "memory", "not supported", "threads wait for each other"};
  return names[error];
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};

namespace emulation {

inline int generation = 8;  // of the GPU: an A100, or an H100, but for the number of multiprocessors

inline size_t most_shared() { return generation == 8 ? 163 << 10 : kShared; }  // of a block

}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMultiProcessorCount) *value = 3;
  if (attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor) *value = emulation::most_shared() + 1024;
  if (attribute == cudaDevAttrComputeCapabilityMajor) *value = emulation::generation;
  if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) *value = emulation::most_shared();
  return cudaSuccess;
}

enum cudaFuncAttribute {
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->sharedSizeBytes = 0;
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};

namespace emulation {

void forget_copies();  // those that nobody waited for

}

template <typename Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments), const Arguments& arguments) {
  std::pair<void (*)(Arguments), const Arguments*> call(kernel, &arguments);
  auto body = [](void* given) {
    const auto* const called = static_cast<decltype(call)*>(given);
    called->first(*called->second);
  };
  if (config->dynamicSmemBytes > emulation::most_shared()) return cudaErrorInvalidValue;
  if (config->numAttrs > 1) return cudaErrorNotSupported;  // clusters
  const dim3 blocks = gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (unsigned z = 0; z < blocks.z; ++z)
    for (unsigned y = 0; y < blocks.y; ++y)
      for (unsigned x = 0; x < blocks.x; ++x) {
        blockIdx = dim3(x, y, z);
        std::memset(elastic::shared, 0xa5, config->dynamicSmemBytes);  // it is not zeros on a GPU
        emulation::forget_copies();
        if (!emulation::run_block(config->blockDim.x, body, &call)) return cudaErrorUnknown;
      }
  return cudaSuccess;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
constexpr int cudaEnableDefault = 0;

// Of the only function that is asked for.
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned, int, cudaDriverEntryPointQueryResult* found);
