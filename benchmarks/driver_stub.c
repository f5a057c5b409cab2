/* What Triton's launcher calls of the CUDA driver, on a machine without one: every call succeeds, and a kernel
   that is launched is counted. Enough of an H100 for Triton to be content. */
#include <stddef.h>
#include <stdint.h>

enum { MAX_THREADS = 1024, MULTIPROCESSORS = 132, SHARED_BYTES = 232448, VERSION = 13000 };
enum { DEVICE_MULTIPROCESSOR_COUNT = 16, FUNCTION_MAX_THREADS = 0 };
static char context, function, module;
long launches = 0;

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "the driver's stub"; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == DEVICE_MULTIPROCESSOR_COUNT ? MULTIPROCESSORS : SHARED_BYTES;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **made, int device) { *made = &context; return 0; }
int cuCtxGetCurrent(void **current) { *current = &context; return 0; }
int cuCtxSetCurrent(void *current) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuModuleLoadData(void **loaded, const void *image) { *loaded = &module; return 0; }
int cuModuleUnload(void *loaded) { return 0; }
int cuModuleGetFunction(void **found, void *loaded, const char *name) { *found = &function; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *of) {
  *value = attribute == FUNCTION_MAX_THREADS ? MAX_THREADS : 0;
  return 0;
}
int cuFuncSetAttribute(void *of, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *of, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int *clusters, void *of, const void *config) { *clusters = 1; return 0; }
int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) {
  *(uint64_t *)value = pointer;
  return 0;
}
int cuTensorMapEncodeTiled(void *map) { return 0; }
int cuTensorMapEncodeIm2col(void *map) { return 0; }
int cuLaunchKernelEx(const void *config, void *of, void **parameters, void **extra) { launches++; return 0; }
