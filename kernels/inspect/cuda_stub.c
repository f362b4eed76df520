// A libcuda that loads every module, starts nothing, and writes down what it was asked to start.
//
// Triton's own NVIDIA driver and launcher are linked to it (stub_driver.py). The names and codes are
// those of CUDA's driver API; handles count up from 1.
#include <stdint.h>
#include <string.h>

#define API __attribute__((visibility("default")))
#define MAX_PARAMETERS 64
#define MAX_FUNCTIONS 4096
#define MAX_RECORDS 65536

typedef int CUresult;
typedef uint64_t CUdeviceptr;

typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
  void *stream, *attributes;
  unsigned number_of_attributes;
} Config;

typedef struct {
  uint64_t function, stream;
  uint32_t grid[3], block[3], shared, parameters;
  uint64_t values[MAX_PARAMETERS];
} Record;

// What stub_driver.py sets and reads.
API int stub_capability[2] = {9, 0};
API int stub_multiprocessors = 132;
API int stub_shared_memory = 232448;
API uint64_t stub_launches;
API int stub_recording;
API Record stub_records[MAX_RECORDS];

static uint64_t handles;
static int counts[MAX_FUNCTIONS];
static unsigned char sizes[MAX_FUNCTIONS][MAX_PARAMETERS];

// Says how many parameters a function has and how many bytes each takes.
API void stub_signature(uint64_t function, int count, const unsigned char *bytes) {
  if (function >= MAX_FUNCTIONS || count > MAX_PARAMETERS) return;
  counts[function] = count;
  memcpy(sizes[function], bytes, count);
}

API CUresult cuInit(unsigned flags) { return 0; }
API CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
API CUresult cuGetErrorString(CUresult error, const char **text) { *text = "stub"; return 0; }
API CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
API CUresult cuDeviceGetCount(int *count) { *count = 1; return 0; }

API CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 10: *value = 32; break;                    // WARP_SIZE
    case 16: *value = stub_multiprocessors; break;  // MULTIPROCESSOR_COUNT
    case 75: *value = stub_capability[0]; break;    // COMPUTE_CAPABILITY_MAJOR
    case 76: *value = stub_capability[1]; break;    // COMPUTE_CAPABILITY_MINOR
    case 82: *value = 65536; break;                 // MAX_REGISTERS_PER_MULTIPROCESSOR
    case 97: *value = stub_shared_memory; break;    // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    default: *value = 1024;
  }
  return 0;
}

API CUresult cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
API CUresult cuCtxGetDevice(int *device) { *device = 0; return 0; }
API CUresult cuCtxSetCurrent(void *context) { return 0; }
API CUresult cuCtxSetLimit(int limit, size_t value) { return 0; }
API CUresult cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
API CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }

API CUresult cuModuleLoadData(void **module, const void *image) { *module = (void *)++handles; return 0; }
API CUresult cuModuleUnload(void *module) { return 0; }
API CUresult cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = module;
  return 0;
}
API CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
API CUresult cuFuncSetCacheConfig(void *function, int config) { return 0; }
API CUresult cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0;  // MAX_THREADS_PER_BLOCK
  return 0;
}
API CUresult cuOccupancyMaxActiveClusters(int *clusters, void *function, void *config) {
  *clusters = 1;
  return 0;
}
API CUresult cuTensorMapEncodeTiled(void *map, ...) { return 0; }
API CUresult cuTensorMapEncodeIm2col(void *map, ...) { return 0; }

// A device's pointers are CPU tensors' addresses.
API CUresult cuPointerGetAttribute(void *data, int attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return 0;
}

API CUresult cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  uint64_t launch = stub_launches++, handle = (uint64_t)function;
  if (!stub_recording || launch >= MAX_RECORDS || handle >= MAX_FUNCTIONS) return 0;
  Record *record = &stub_records[launch];
  record->function = handle;
  record->stream = (uint64_t)config->stream;
  uint32_t grid[3] = {config->grid_x, config->grid_y, config->grid_z};
  uint32_t block[3] = {config->block_x, config->block_y, config->block_z};
  memcpy(record->grid, grid, sizeof grid);
  memcpy(record->block, block, sizeof block);
  record->shared = config->shared;
  record->parameters = counts[handle];
  for (int i = 0; i < counts[handle]; i++) {
    record->values[i] = 0;
    memcpy(&record->values[i], parameters[i], sizes[handle][i]);
  }
  return 0;
}
