// A CUDA driver that says it is of an H100, launches nothing, and refuses what that one would refuse of a launch or of a
// descriptor of tiles (https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TENSOR__MEMORY.html). Built by ahead_of_time.py.

#include "cuda.h"
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { SHARED = 232448, THREADS = 1024, REGISTERS = 65536, MULTIPROCESSORS = 132, SIDE = 256 };

static char said[512] = "refused";

#define REFUSE(...) return snprintf(said, sizeof said, __VA_ARGS__), CUDA_ERROR_INVALID_VALUE

CUresult cuGetErrorString(CUresult error, const char **text) { return *text = said, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)1, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  return *function = (CUfunction)strdup(name), CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  return *clusters = 1, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)data = pointer, CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute *attributes, void **data, CUdeviceptr pointer) {
  for (unsigned i = 0; i < n; i++)
    if (attributes[i] == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)data[i] = pointer;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = MULTIPROCESSORS; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? THREADS : 0, CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *sizes,
    const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  unsigned item = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2, inner = box[0] * item;
  unsigned widest = swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64 : 128;
  if (type != CU_TENSOR_MAP_DATA_TYPE_FLOAT32 && type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 &&
      type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16)
    REFUSE("descriptor of type %d", type);
  if ((uintptr_t)map % 64 || (uintptr_t)address % 16) REFUSE("descriptor at %p of %p", (void *)map, address);
  if (rank != 2) REFUSE("descriptor of %u dimensions", rank);
  for (unsigned i = 0; i < rank; i++)
    if (!sizes[i] || sizes[i] > 1ull << 32 || !box[i] || box[i] > SIDE)
      REFUSE("descriptor of size %llu, tile %u", (unsigned long long)sizes[i], box[i]);
  if (strides[0] % 16 || strides[0] >= 1ull << 40 || strides[0] < sizes[0] * item)
    REFUSE("descriptor of rows %llu bytes apart", (unsigned long long)strides[0]);
  if (inner % 16 || (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && inner > widest))
    REFUSE("descriptor of tiles %u bytes wide, swizzle %d", inner, swizzle);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  unsigned x = config->gridDimX, y = config->gridDimY, z = config->gridDimZ;
  if (!x || x > INT32_MAX || !y || y > 65535 || !z || z > 65535)
    REFUSE("%s: grid %u, %u, %u", (char *)function, x, y, z);
  if (config->blockDimX > THREADS) REFUSE("%s: %u threads", (char *)function, config->blockDimX);
  if (config->sharedMemBytes > SHARED) REFUSE("%s: %u bytes of shared memory", (char *)function, config->sharedMemBytes);
  return CUDA_SUCCESS;
}
