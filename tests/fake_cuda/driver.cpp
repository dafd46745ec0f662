// A libcuda.so.1 that is none: the functions of CUDA's driver that tilewise calls, on the host's memory. The real binding,
// cuda.bindings, finds it and hands its arguments over as it would to the real one; a log tells what arrived.
//
// FAKE_CUDA_LOG: the log's file. FAKE_CUDA_FAIL: "function=status", which then fails. FAKE_CUDA_POOLS=0: no memory pools.
// FAKE_CUDA_RATES=0: no clocks.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <string>
#include <vector>

namespace {

std::vector<void *> contexts;
void *const PRIMARY[2] = {reinterpret_cast<void *>(0x1000), reinterpret_cast<void *>(0x1001)};

template <typename... A> void log(const char *format, A... values) {
    const char *path = getenv("FAKE_CUDA_LOG");
    FILE *file = path ? fopen(path, "a") : nullptr;
    if (!file) return;
    fprintf(file, format, values...);
    fputc('\n', file);
    fclose(file);
}

int status_of(const char *function) {
    const char *wanted = getenv("FAKE_CUDA_FAIL");
    const size_t length = strlen(function);
    return wanted && !strncmp(wanted, function, length) && wanted[length] == '=' ? atoi(wanted + length + 1) : 0;
}

}   // namespace

#define CALL(name) if (const int failed = status_of(name)) return failed

extern "C" {

int cuInit(unsigned) { CALL("cuInit"); return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal < 2 ? 0 : 101; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGetName(char *name, int length, int device) { snprintf(name, length, "Fake GPU %d", device); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int) {
    const char *pools = getenv("FAKE_CUDA_POOLS"), *major = getenv("FAKE_CUDA_MAJOR");
    const char *rates = getenv("FAKE_CUDA_RATES");
    const bool told = !rates || atoi(rates);
    switch (attribute) {
    case 75: *value = major ? atoi(major) : 9; break;
    case 16: *value = 132; break;
    case 115: *value = !pools || atoi(pools); break;
    case 13: *value = told ? 1980000 : 0; break;   // kHz
    case 36: *value = told ? 2619000 : 0; break;
    case 37: *value = 5120; break;                 // bits of the memory's bus
    default: *value = 0;
    }
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int) { *bytes = 80ull << 30; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = PRIMARY[device]; log("context of %d", device); return 0; }
int cuCtxGetCurrent(void **context) { *context = contexts.empty() ? nullptr : contexts.back(); return 0; }
int cuCtxPushCurrent_v2(void *context) { contexts.push_back(context); log("push %p", context); return 0; }
int cuCtxPopCurrent_v2(void **context) { *context = contexts.back(); contexts.pop_back(); log("pop"); return 0; }
int cuCtxSynchronize() { CALL("cuCtxSynchronize"); return 0; }
int cuMemAllocAsync(uint64_t *pointer, size_t bytes, void *stream) {
    CALL("cuMemAllocAsync");
    *pointer = reinterpret_cast<uint64_t>(malloc(bytes));
    log("allocate %zu stream %p", bytes, stream);
    return 0;
}
int cuMemFreeAsync(uint64_t pointer, void *stream) { free(reinterpret_cast<void *>(pointer)); log("free stream %p", stream); return 0; }
int cuMemAlloc_v2(uint64_t *pointer, size_t bytes) { *pointer = reinterpret_cast<uint64_t>(malloc(bytes)); log("plain allocate %zu", bytes); return 0; }
int cuMemFree_v2(uint64_t pointer) { free(reinterpret_cast<void *>(pointer)); log("plain free"); return 0; }
int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes) { memcpy(reinterpret_cast<void *>(to), from, bytes); log("write %zu", bytes); return 0; }
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes) { CALL("cuMemcpyDtoH"); memcpy(to, reinterpret_cast<void *>(from), bytes); log("read %zu", bytes); return 0; }
int cuThreadExchangeStreamCaptureMode(int *mode) { log("capture mode %d", *mode); *mode = 0; return 0; }
int cuModuleLoadData(void **module, const void *image) {
    CALL("cuModuleLoadData");
    log("load %zu bytes ending in %d", strlen(static_cast<const char *>(image)), static_cast<const char *>(image)[strlen(static_cast<const char *>(image))]);
    *module = reinterpret_cast<void *>(0x2000);
    return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) { log("function %s of %p", name, module); *function = reinterpret_cast<void *>(0x3000); return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { CALL("cuFuncSetAttribute"); log("attribute %d of %p is %d", attribute, function, value); return 0; }
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz, unsigned shared,
                   void *stream, void **parameters, void **extra) {
    CALL("cuLaunchKernel");
    // activate_all(x, y, slope, count, vectors, code)
    log("launch %p grid %u %u %u block %u %u %u shared %u stream %p extra %p: %d %d %g %ld %ld %d", function, x, y, z, tx, ty, tz, shared,
        stream, static_cast<void *>(extra), **static_cast<void ***>(static_cast<void *>(parameters)) != nullptr, 1,
        static_cast<double>(*static_cast<float *>(parameters[2])), *static_cast<long *>(parameters[3]),
        *static_cast<long *>(parameters[4]), *static_cast<int *>(parameters[5]));
    memcpy(*static_cast<void **>(parameters[1]), *static_cast<void **>(parameters[0]), 4 * *static_cast<long *>(parameters[3]));
    return 0;
}
int cuGetErrorName(int status, const char **name) {
    *name = status == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : status == 222 ? "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" : status == 101 ? "CUDA_ERROR_INVALID_DEVICE" : status == 100 ? "CUDA_ERROR_NO_DEVICE" : status == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : nullptr;
    return *name ? 0 : 1;
}
int cuGetErrorString(int status, const char **text) { *text = status == 2 ? "out of memory" : "text"; return 0; }

int cuGetProcAddress_v2(const char *name, void **pointer, int, uint64_t, int *found) {
    for (const char *suffix : {"_v2", ""})
        if ((*pointer = dlsym(RTLD_DEFAULT, (std::string(name) + suffix).c_str()))) break;
    if (!*pointer) {
        void *self = dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_LAZY);
        for (const char *suffix : {"_v2", ""})
            if (self && (*pointer = dlsym(self, (std::string(name) + suffix).c_str()))) break;
    }
    if (found) *found = *pointer ? 0 : 1;
    return *pointer ? 0 : 500;
}
}
