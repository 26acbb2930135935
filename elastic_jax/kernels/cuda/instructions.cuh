// Instructions that C++ does not name, one function each, of all GPUs that decode runs on; hopper.cuh has Hopper's. The
// PTX ISA describes them. For a CPU there are none here: the test that runs kernels on one brings its own
// (decode_emulation.cpp).

#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#ifdef __CUDACC__

namespace elastic {

// -- kernels of one stream --------------------------------------------------------------------------------------------

// Lets the next kernel of the stream start, as far as its `wait_for_predecessor`.
__device__ __forceinline__ void release_successor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until everything that the kernel before wrote can be read; earlier, only what older steps wrote may be touched.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// -- memory -----------------------------------------------------------------------------------------------------------

// 16 bytes, without waiting for them.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}

// Those so far are a group, which may be empty.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all groups of this thread but the last so many are there.
template <int kPending>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Asks for a line of memory to be brought into the L2 cache.
__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at) : "memory"); }

// -- clusters of blocks -----------------------------------------------------------------------------------------------

// Waits for all blocks of the cluster; what they wrote to their shared memory can be read.
__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A float of the shared memory of the cluster's block number `rank`.
__device__ __forceinline__ float load_of_cluster(const float* mine, int rank) {
  float value = 0;
#if __CUDA_ARCH__ >= 900
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(mine));
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];\n}"
               : "=f"(value)
               : "r"(address), "r"(rank)
               : "memory");
#endif
  return value;
}

// -- tensor cores -----------------------------------------------------------------------------------------------------

// A warp's product of 16 rows (`x`) and 8 (`w0`, `w1`), 32 bytes of each: 32 int8, or 16 bf16.
__device__ __forceinline__ void multiply_operands(int32_t (&sum)[4], const uint32_t (&x)[4], uint32_t w0, uint32_t w1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(w0), "r"(w1));
}

__device__ __forceinline__ void multiply_operands(float (&sum)[4], const uint32_t (&x)[4], uint32_t w0, uint32_t w1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(w0), "r"(w1));
}

// The transpose of an 8x8 matrix of bf16 that the lanes of a warp hold in pairs.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t found;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(found) : "r"(pair));
  return found;
}

}  // namespace elastic

#endif
