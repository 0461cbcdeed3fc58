/* A CUDA driver that launches nothing: it counts launches and keeps what the last one was given. tests/stub_driver.py
 * loads it.
 *
 * Here is what the C sources of Triton 3.6 to 3.9 link against (driver.c, and 3.6's launchers), and no more: a module
 * of Python's is loaded with all its symbols or not at all. Every function answers CUDA_SUCCESS. Those under "linked"
 * are never called by a launch. */

#include <stddef.h>

typedef int Result; /* CUresult, whose 0 is CUDA_SUCCESS */
typedef unsigned long long Pointer;

long launches = 0;
unsigned last_grid = 0;
/* The first `watched` arguments of the last launch, all of them addresses: how many there are a driver is not told. */
int watched = 0;
Pointer last_addresses[64];

/* -- The launch. Both versions look this one up at run time; the grid is what its config begins with. */

Result cuLaunchKernelEx(const unsigned *config, void *function, void **arguments, void **extra) {
    launches++;
    last_grid = config[0];
    for (int i = 0; i < watched; i++) last_addresses[i] = *(Pointer *)arguments[i];
    return 0;
}

/* -- Before it: one device with a context, a module with a function. Handles are not null, or they count as absent. */

Result cuDeviceGet(int *device, int ordinal) {
    *device = 0;
    return 0;
}

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 10: *value = 32; break;     /* threads of a warp */
    case 75: *value = 9; break;      /* compute capability */
    case 76: *value = 0; break;
    case 97: *value = 232448; break; /* bytes of shared memory that a block may ask for: more than any kernel's */
    default: *value = 1024;          /* rates and counts that only reports read */
    }
    return 0;
}

Result cuCtxGetCurrent(void **context) {
    *context = (void *)1;
    return 0;
}

Result cuModuleLoadData(void **module, const void *image) {
    *module = (void *)2;
    return 0;
}

Result cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = (void *)3;
    return 0;
}

Result cuModuleUnload(void *module) { return 0; }

Result cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == 0 ? 1024 : 0; /* threads that a block may have; registers and spills, which are not judged */
    return 0;
}

/* Where a launch is handed tensors. A driver fails on a host's address; here every address is the device's own. */
Result cuPointerGetAttribute(Pointer *value, int attribute, Pointer address) {
    *value = address;
    return 0;
}

/* -- Linked. */

Result cuCtxGetDevice(int *device) {
    *device = 0;
    return 0;
}
Result cuCtxSetCurrent(void *context) { return 0; }
Result cuCtxGetLimit(size_t *value, int limit) {
    *value = 0;
    return 0;
}
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = (void *)1;
    return 0;
}
Result cuDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
Result cuGetErrorString(Result error, const char **text) {
    *text = "the stub driver does not fail";
    return 0;
}
Result cuStreamIsCapturing(void *stream, int *status) {
    *status = 0;
    return 0;
}
