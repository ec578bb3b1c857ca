/* Device memory, page-locked memory, and copies that do not go through a stream. */
#include "fake.h"

#define ALIGNMENT 512

size_t fake_memory_total = (size_t)1 << 30;
/* The top 16 bits of a real address are equal, so these are never valid addresses of the process. */
static CUdeviceptr next_address = 0x00d0000000000000ull;

static size_t memory_used(int device) {
    size_t used = 0;
    for (object *each = fake_objects; each; each = each->next)
        if (each->kind == DEVICE_MEMORY && each->alive && each->context->device == device) used += each->size;
    return used;
}

/* The allocation that holds this range, dead or alive; NULL if none does. */
object *fake_device_memory(CUdeviceptr address, size_t size) {
    for (object *each = fake_objects; each; each = each->next)
        if (each->kind == DEVICE_MEMORY && address >= each->address && address + size <= each->address + each->size)
            return each;
    return NULL;
}

object *fake_pinned(const void *host, size_t size) {
    const unsigned char *at = host;
    for (object *each = fake_objects; each; each = each->next)
        if (each->kind == PINNED_MEMORY && each->bytes && at >= each->bytes && at + size <= each->bytes + each->size)
            return each;
    return NULL;
}

CUresult fake_check_device(CUdeviceptr address, size_t size, const char *what) {
    object *memory = fake_device_memory(address, size);
    if (!memory && fake_device_memory(address, 1))
        return fake_broken(CUDA_ERROR_INVALID_VALUE, "%s is too small for %zu bytes", what, size);
    if (!memory) return fake_broken(CUDA_ERROR_INVALID_VALUE, "%s is no device memory", what);
    if (!memory->alive) return fake_broken(CUDA_ERROR_INVALID_VALUE, "%s was freed", what);
    if (fake_current() && memory->context != fake_current())
        return fake_broken(CUDA_ERROR_INVALID_VALUE, "%s belongs to another context", what);
    return CUDA_SUCCESS;
}

CUresult fake_check_pinned(const void *host, size_t size) {
    object *memory = fake_pinned(host, size);
    if (!memory) return fake_broken(CUDA_ERROR_INVALID_VALUE, "host memory of an asynchronous copy is not page-locked");
    if (!memory->alive) return fake_broken(CUDA_ERROR_INVALID_VALUE, "the page-locked memory was freed");
    return CUDA_SUCCESS;
}

/* The host address of a device address, which must have been checked. */
unsigned char *fake_bytes(CUdeviceptr address) {
    object *memory = fake_device_memory(address, 1);
    return memory && memory->bytes ? memory->bytes + (address - memory->address) : NULL;
}

uint64_t fake_sum(const void *bytes, size_t size) {
    const unsigned char *at = bytes;
    uint64_t sum = 0x9e3779b97f4a7c15ull ^ size, word;
    for (; size >= 8; at += 8, size -= 8) {
        memcpy(&word, at, 8);
        sum = (sum ^ word) * 0x100000001b3ull;
        sum ^= sum >> 29;
    }
    for (; size; at++, size--) sum = (sum ^ *at) * 0x100000001b3ull;
    return sum;
}

/* Freed page-locked memory is poisoned but stays readable; device memory is freed. */
void fake_end_memory(object *memory) {
    memory->alive = 0;
    if (memory->kind == PINNED_MEMORY) {
        if (!memory->registered) memset(memory->bytes, fake_poison, memory->size);
        return;
    }
    /* A kernel in Python may still use it; then the process keeps it. */
    if (!fake_running(memory->context)) free(memory->bytes);
    memory->bytes = NULL;
}

CUresult fake_cuMemGetInfo_v2(size_t *available, size_t *total) {
    *total = fake_memory_total;
    *available = fake_memory_total - memory_used(fake_current()->device);
    return CUDA_SUCCESS;
}

CUresult fake_cuMemAlloc_v2(CUdeviceptr *address, size_t size) {
    if (!size) return CUDA_ERROR_INVALID_VALUE;
    if (size > fake_memory_total - memory_used(fake_current()->device)) return CUDA_ERROR_OUT_OF_MEMORY;
    object *memory = fake_new(DEVICE_MEMORY);
    memory->size = size;
    memory->bytes = malloc(size);
    memset(memory->bytes, fake_poison, size);
    memory->address = *address = next_address;
    next_address += (size / ALIGNMENT + 2) * ALIGNMENT; /* a gap after each allocation reveals overruns */
    return CUDA_SUCCESS;
}

CUresult fake_cuMemFree_v2(CUdeviceptr address) {
    object *memory = fake_device_memory(address, 1);
    if (!memory || memory->address != address)
        return fake_broken(CUDA_ERROR_INVALID_VALUE, "%#llx is no allocation", address);
    CUresult result = fake_own(DEVICE_MEMORY, memory, &memory);
    if (result) return result;
    if (fake_in_use(memory)) return fake_broken(CUDA_ERROR_INVALID_VALUE, "queued work still uses the device memory");
    fake_end_memory(memory);
    return CUDA_SUCCESS;
}

CUresult fake_cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr address) {
    CUresult result = fake_check_device(address, 1, "the address");
    if (result) return result;
    object *memory = fake_device_memory(address, 1);
    if (base) *base = memory->address;
    if (size) *size = memory->size;
    return CUDA_SUCCESS;
}

static CUresult host_alloc(void **host, size_t size) {
    if (!size) return CUDA_ERROR_INVALID_VALUE;
    object *memory = fake_new(PINNED_MEMORY);
    memory->size = size;
    memory->bytes = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    memset(memory->bytes, fake_poison, size);
    *host = memory->bytes;
    return CUDA_SUCCESS;
}

CUresult fake_cuMemHostAlloc(void **host, size_t size, unsigned int flags) {
    (void)flags;
    return host_alloc(host, size);
}

CUresult fake_cuMemAllocHost_v2(void **host, size_t size) { return host_alloc(host, size); }

static CUresult end_pinned(void *host, int registered) {
    object *memory = fake_pinned(host, 1);
    if (!memory || memory->bytes != host || memory->registered != registered)
        return fake_broken(CUDA_ERROR_INVALID_VALUE, "%p is no page-locked allocation", host);
    CUresult result = fake_own(PINNED_MEMORY, memory, &memory);
    if (result) return result;
    if (fake_in_use(memory))
        return fake_broken(CUDA_ERROR_INVALID_VALUE, "queued work still uses the page-locked memory");
    fake_end_memory(memory);
    return CUDA_SUCCESS;
}

CUresult fake_cuMemFreeHost(void *host) { return end_pinned(host, 0); }

CUresult fake_cuMemHostRegister_v2(void *host, size_t size, unsigned int flags) {
    (void)flags;
    object *memory = fake_pinned(host, 1);
    if (memory && memory->alive) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    memory = fake_new(PINNED_MEMORY);
    memory->bytes = host;
    memory->size = size;
    memory->registered = 1;
    return CUDA_SUCCESS;
}

CUresult fake_cuMemHostUnregister(void *host) {
    CUresult result = end_pinned(host, 1);
    object *memory = result ? NULL : fake_pinned(host, 1);
    if (memory) memory->bytes = NULL;
    return result;
}

/* Waits as the default stream does, then copies at once. */
static CUresult synchronous(CUdeviceptr address, size_t size) {
    CUresult result = fake_check_device(address, size, "the device memory");
    if (result) return result;
    object *context = fake_current();
    for (object *each = fake_objects; each; each = each->next)
        if (each->kind == STREAM && each->alive && each->context == context && !each->non_blocking)
            fake_drain(each, each->queued);
    return context->sticky;
}

CUresult fake_cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t size) {
    CUresult result = synchronous(to, size);
    if (!result) memcpy(fake_bytes(to), from, size);
    return result;
}

CUresult fake_cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t size) {
    CUresult result = synchronous(from, size);
    if (!result) memcpy(to, fake_bytes(from), size);
    return result;
}

CUresult fake_cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t size) {
    CUresult result = synchronous(to, size);
    if (!result) result = fake_check_device(from, size, "the source");
    if (!result) memmove(fake_bytes(to), fake_bytes(from), size);
    return result;
}

CUresult fake_cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t size) {
    CUresult result = synchronous(to, size);
    if (!result) memset(fake_bytes(to), value, size);
    return result;
}

CUresult fake_cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr address) {
    object *memory = fake_device_memory(address, 1);
    if (!memory || !memory->alive) return CUDA_ERROR_INVALID_VALUE;
    if (attribute != CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
        return fake_broken(CUDA_ERROR_NOT_SUPPORTED, "the fake driver does not know attribute %d", attribute);
    *(unsigned int *)data = CU_MEMORYTYPE_DEVICE;
    return CUDA_SUCCESS;
}

/* The controls, for control.py and the stand-ins. */

void fakeMemory(size_t total) { fake_memory_total = total; }

/* The host address of a live device range, for a kernel in Python; NULL if it is invalid. */
void *fakeBytes(CUdeviceptr address, size_t size) {
    pthread_mutex_lock(&fake_lock);
    object *memory = fake_device_memory(address, size);
    void *bytes = memory && memory->alive ? fake_bytes(address) : NULL;
    pthread_mutex_unlock(&fake_lock);
    return bytes;
}

/* The bytes from a device address to its allocation's end; 0 if it is invalid or freed. */
size_t fakeRoom(CUdeviceptr address) {
    pthread_mutex_lock(&fake_lock);
    object *memory = fake_device_memory(address, 1);
    size_t room = memory && memory->alive ? memory->size - (address - memory->address) : 0;
    pthread_mutex_unlock(&fake_lock);
    return room;
}
