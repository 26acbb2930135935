// Descriptions of tensors for TMA, on a CPU: the address, rows and their bytes, and what is fetched at once.

#pragma once

#include <cstdint>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

struct alignas(64) CUtensorMap {
  const uint8_t* at;
  int64_t columns, rows, apart;
  int wide, high;
};

enum CUresult { CUDA_SUCCESS };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void* at,
                                       const cuuint64_t* sizes, const cuuint64_t* apart, const cuuint32_t* box,
                                       const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  *map = {static_cast<const uint8_t*>(at), static_cast<int64_t>(sizes[0]), static_cast<int64_t>(sizes[1]),
          static_cast<int64_t>(apart[0]), static_cast<int>(box[0]), static_cast<int>(box[1])};
  return CUDA_SUCCESS;
}
