// What kernels need of Hopper (compute capability 9.0), one function an instruction: barriers in
// shared memory, tensors fetched by the tensor memory accelerator (TMA), products of a warpgroup. The PTX ISA, from 8.0
// on, describes them. For a CPU there are none here: the test that runs kernels on one brings its own.
//
// An operand of a product is rows of 128 bytes, one after the other, each eight of which (1024 bytes, aligned so) are
// swizzled as TMA does it: 16-byte pieces of row r are exchanged by XOR with r % 8.

#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace elastic {

constexpr int kOperandBytes = 128;  // of a row: the widest that is swizzled
constexpr int kWarpgroup = 128;     // threads that multiply together

__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// -- barriers ---------------------------------------------------------------------------------------------------------

#ifdef __CUDACC__

__device__ inline void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Until so many threads of the block are here, of which all are in whole warps.
template <int kThreads>
__device__ inline void wait_for_threads() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// Initialized barriers become visible to TMA.
__device__ inline void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ inline void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Until the phase of that parity is over. A new barrier's phase is 0, and the one before it (parity 1) is over.
__device__ inline void wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\n"
      "bra again;\n"
      "done:\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

#endif

// A place in a ring of stages, and the parity of the turn: of the phase in which what is fetched there arrives.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t turn = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      turn ^= 1;
    }
  }
};

// -- tensors ----------------------------------------------------------------------------------------------------------

#ifdef __CUDACC__

// A box of a matrix, from a column and a row on; what lies outside is zero, and counts as fetched. With kOnce it is the
// first to leave the L2 cache.
template <bool kOnce>
__device__ inline void fetch(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  if constexpr (kOnce) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], "
        "[%2], %5;" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "l"(policy)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
        : "memory");
  }
}

// A box of a tensor of three axes, likewise.
__device__ inline void fetch(void* to, const CUtensorMap* map, int column, int row, int slice, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(slice)
      : "memory");
}

// Some bytes, a multiple of 16; both addresses are too.
__device__ inline void fetch_bytes(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

#endif

// -- products of a warpgroup ------------------------------------------------------------------------------------------

// Describes an operand in shared memory: its address, the bytes between groups of eight rows, the swizzle of 128 bytes.
// 32 bytes further along the rows are 2 more. The distance in bits 16 to 29 does not matter for operands that lie so.
__device__ inline uint64_t describe(const void* operand) {
  constexpr uint64_t kGroup = 8 * kOperandBytes >> 4, kSwizzled = 1;
  return (shared_address(operand) & 0x3ffff) >> 4 | uint64_t{1} << 16 | kGroup << 32 | kSwizzled << 62;
}

// Describes a right operand that lies the other way: rows of 128 bytes are its columns' numbers, so that 16 rows are one
// step of the contraction; `apart` are the bytes between the first 64 columns and the next.
__device__ inline uint64_t describe_columns(const void* operand, int apart) {
  constexpr uint64_t kGroup = 8 * kOperandBytes >> 4, kSwizzled = 1;
  return (shared_address(operand) & 0x3ffff) >> 4 | static_cast<uint64_t>(apart >> 4) << 16 | kGroup << 32 | kSwizzled << 62;
}

#ifdef __CUDACC__

template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kUnfinished>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kUnfinished) : "memory");
}

// The compiler must neither move nor copy what products that have begun write, nor write what they read later than they
// begin.
template <int kCount>
__device__ inline void pin(int32_t (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(sums[i])::"memory");
}

template <int kCount>
__device__ inline void pin(uint32_t (&operand)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(operand[i])::"memory");
}

template <int kCount>
__device__ inline void pin(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

#define ELASTIC_SUMS4(kind, i) kind(sums[(i)]), kind(sums[(i) + 1]), kind(sums[(i) + 2]), kind(sums[(i) + 3])
#define ELASTIC_SUMS16(kind, i) \
  ELASTIC_SUMS4(kind, i), ELASTIC_SUMS4(kind, (i) + 4), ELASTIC_SUMS4(kind, (i) + 8), ELASTIC_SUMS4(kind, (i) + 12)

// Begins the products of 64 rows with twice as many others as there are sums, 32 bytes of each, of int8 or of bf16; `add`
// says whether `sums` counts. Of row 16 * (t / 32) + t % 32 / 4, thread t has the columns 8 * j + 2 * (t % 4) and the next
// in sums[4 * j] and the next; of the row 8 below, in the two after.
__device__ inline void multiply_tiles(int32_t (&sums)[8], uint64_t left, uint64_t right, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, "
      "%8, %9, p;\n}\n"
      : ELASTIC_SUMS4("+r", 0), ELASTIC_SUMS4("+r", 4)
      : "l"(left), "l"(right), "r"(add));
}

__device__ inline void multiply_tiles(int32_t (&sums)[16], uint64_t left, uint64_t right, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "%16, %17, p;\n}\n"
      : ELASTIC_SUMS16("+r", 0)
      : "l"(left), "l"(right), "r"(add));
}

__device__ inline void multiply_tiles(int32_t (&sums)[32], uint64_t left, uint64_t right, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p;\n}\n"
      : ELASTIC_SUMS16("+r", 0), ELASTIC_SUMS16("+r", 16)
      : "l"(left), "l"(right), "r"(add));
}

__device__ inline void multiply_tiles(int32_t (&sums)[64], uint64_t left, uint64_t right, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p;\n}\n"
      : ELASTIC_SUMS16("+r", 0), ELASTIC_SUMS16("+r", 16), ELASTIC_SUMS16("+r", 32), ELASTIC_SUMS16("+r", 48)
      : "l"(left), "l"(right), "r"(add));
}

__device__ inline void multiply_tiles(int32_t (&sums)[128], uint64_t left, uint64_t right, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, p;\n}\n"
      : ELASTIC_SUMS16("+r", 0), ELASTIC_SUMS16("+r", 16), ELASTIC_SUMS16("+r", 32), ELASTIC_SUMS16("+r", 48),
        ELASTIC_SUMS16("+r", 64), ELASTIC_SUMS16("+r", 80), ELASTIC_SUMS16("+r", 96), ELASTIC_SUMS16("+r", 112)
      : "l"(left), "l"(right), "r"(add));
}

__device__ inline void multiply_tiles(float (&sums)[4], uint64_t left, uint64_t right, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3}, "
      "%4, %5, p, 1, 1, 0, 0;\n}\n"
      : ELASTIC_SUMS4("+f", 0)
      : "l"(left), "l"(right), "r"(add));
}

__device__ inline void multiply_tiles(float (&sums)[8], uint64_t left, uint64_t right, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, "
      "%8, %9, p, 1, 1, 0, 0;\n}\n"
      : ELASTIC_SUMS4("+f", 0), ELASTIC_SUMS4("+f", 4)
      : "l"(left), "l"(right), "r"(add));
}

__device__ inline void multiply_tiles(float (&sums)[16], uint64_t left, uint64_t right, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "%16, %17, p, 1, 1, 0, 0;\n}\n"
      : ELASTIC_SUMS16("+f", 0)
      : "l"(left), "l"(right), "r"(add));
}

__device__ inline void multiply_tiles(float (&sums)[32], uint64_t left, uint64_t right, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 0, 0;\n}\n"
      : ELASTIC_SUMS16("+f", 0), ELASTIC_SUMS16("+f", 16)
      : "l"(left), "l"(right), "r"(add));
}

__device__ inline void multiply_tiles(float (&sums)[64], uint64_t left, uint64_t right, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, 0, 0;\n}\n"
      : ELASTIC_SUMS16("+f", 0), ELASTIC_SUMS16("+f", 16), ELASTIC_SUMS16("+f", 32), ELASTIC_SUMS16("+f", 48)
      : "l"(left), "l"(right), "r"(add));
}

__device__ inline void multiply_tiles(float (&sums)[128], uint64_t left, uint64_t right, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, p, 1, 1, 0, 0;\n}\n"
      : ELASTIC_SUMS16("+f", 0), ELASTIC_SUMS16("+f", 16), ELASTIC_SUMS16("+f", 32), ELASTIC_SUMS16("+f", 48),
        ELASTIC_SUMS16("+f", 64), ELASTIC_SUMS16("+f", 80), ELASTIC_SUMS16("+f", 96), ELASTIC_SUMS16("+f", 112)
      : "l"(left), "l"(right), "r"(add));
}

// Begins the products of 64 rows of 16 bf16 each, in registers as sums of two octets of columns would be, with 128
// columns (`describe_columns`); adds them to `sums`.
__device__ inline void multiply_columns(float (&sums)[64], uint32_t left0, uint32_t left1, uint32_t left2, uint32_t left3,
                                        uint64_t right) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"
      : ELASTIC_SUMS16("+f", 0), ELASTIC_SUMS16("+f", 16), ELASTIC_SUMS16("+f", 32), ELASTIC_SUMS16("+f", 48)
      : "r"(left0), "r"(left1), "r"(left2), "r"(left3), "l"(right));
}

#undef ELASTIC_SUMS16
#undef ELASTIC_SUMS4

#endif

// -- matrices for TMA -------------------------------------------------------------------------------------------------

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Of the driver, which is not linked.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
    const bool known = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return reinterpret_cast<EncodeTiled>(known ? entry : nullptr);
  }();
  return found;
}

// A matrix of rows of so many bytes as TMA fetches it: 128 bytes of `height` rows at once.
inline cudaError_t describe_matrix(CUtensorMap* map, const void* matrix, int rows, int64_t columns, int height) {
  if (encode_tiled() == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t apart[] = {static_cast<cuuint64_t>(columns)};
  const cuuint32_t box[] = {kOperandBytes, static_cast<cuuint32_t>(height)}, every[] = {1, 1};
  const CUresult result = encode_tiled()(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(matrix), sizes,
                                         apart, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// A tensor [slices][rows][columns] of bf16 as TMA fetches it: so many of each at once, columns of 128 bytes.
inline cudaError_t describe_heads(CUtensorMap* map, const void* tensor, int columns, int rows, int slices, int wide,
                                  int high, int deep) {
  if (encode_tiled() == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(slices)};
  const cuuint64_t apart[] = {sizes[0] * 2, sizes[0] * sizes[1] * 2};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(wide), static_cast<cuuint32_t>(high), static_cast<cuuint32_t>(deep)};
  const cuuint32_t every[] = {1, 1, 1};
  const CUresult result = encode_tiled()(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(tensor), sizes,
                                         apart, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace elastic
