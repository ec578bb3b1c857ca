/* Two equal devices. */
#include "fake.h"

static int initialised;

/* True if the device exists. */
CUresult fake_checked(CUdevice device) {
    if (!initialised) return fake_broken(CUDA_ERROR_NOT_INITIALIZED, "cuInit was not called");
    return device < 0 || device >= DEVICES ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

CUresult fake_cuInit(unsigned int flags) {
    initialised = 1;
    return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult fake_cuDriverGetVersion(int *version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

CUresult fake_cuDeviceGetCount(int *count) {
    *count = DEVICES;
    return fake_checked(0);
}

CUresult fake_cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return fake_checked(ordinal);
}

CUresult fake_cuDeviceGetName(char *name, int length, CUdevice device) {
    snprintf(name, length, "Fake GPU %d", device);
    return fake_checked(device);
}

CUresult fake_cuDeviceGetPCIBusId(char *id, int length, CUdevice device) {
    snprintf(id, length, "0000:%02x:00.0", device + 1);
    return fake_checked(device);
}

CUresult fake_cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    *bytes = fake_memory_total;
    return fake_checked(device);
}

CUresult fake_cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: *value = 2; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: *value = 1; break;
    default: return fake_broken(CUDA_ERROR_NOT_SUPPORTED, "the fake driver does not know attribute %d", attribute);
    }
    return fake_checked(device);
}

CUresult fake_cuDeviceComputeCapability(int *major, int *minor, CUdevice device) {
    *major = 9;
    *minor = 0;
    return fake_checked(device);
}
