/* Contexts, and the registry of all objects with a handle. */
#include "fake.h"

object *fake_objects = NULL;
void fake_forget_rules(void);

static object *primaries[DEVICES];
static __thread object *stack[STACK];
static __thread int depth;
static const char *const kind_names[KINDS] = {"context", "stream", "event", "device memory",
                                              "page-locked memory", "graph", "executable graph"};
/* Objects that were alive when their context ended. */
static int orphans[KINDS];

object *fake_current(void) { return depth ? stack[depth - 1] : NULL; }

object *fake_new(enum kind kind) {
    object *made = calloc(1, sizeof *made);
    made->kind = kind;
    made->alive = 1;
    made->thread = fake_thread();
    made->context = fake_current();
    made->next = fake_objects;
    return fake_objects = made;
}

/* The object with this handle, dead or alive. */
object *fake_find(enum kind kind, const void *handle) {
    for (object *each = fake_objects; each; each = each->next)
        if (each == handle && each->kind == kind) return each;
    return NULL;
}

/* The object with this handle if it is alive, of the current context, and created on this thread. */
CUresult fake_own(enum kind kind, const void *handle, object **found) {
    object *own = *found = fake_find(kind, handle);
    const char *what = kind_names[kind];
    if (!own) return fake_broken(CUDA_ERROR_INVALID_HANDLE, "%p is no %s", handle, what);
    if (!own->alive) return fake_broken(CUDA_ERROR_INVALID_HANDLE, "the %s is used after its end", what);
    if (own->thread != fake_thread())
        return fake_broken(CUDA_ERROR_INVALID_HANDLE, "the %s belongs to another thread", what);
    if (own->context && own->context != fake_current())
        return fake_broken(CUDA_ERROR_INVALID_CONTEXT, "the %s belongs to another context", what);
    return CUDA_SUCCESS;
}

CUresult fake_spoil(object *context, CUresult code) {
    if (!context->sticky) context->sticky = code;
    return code;
}

/* Does not wait: the caller may hold Python's lock, which a running kernel needs. */
void fake_end_context(object *context) {
    if (!context->sticky && fake_pending(context))
        fake_broken(CUDA_ERROR_UNKNOWN, "work is still queued in the context that ends");
    for (object *each = fake_objects; each; each = each->next) {
        if (each->context != context || !each->alive || each->kind == CONTEXT) continue;
        orphans[each->kind]++;
        each->alive = 0;
        if (each->kind == DEVICE_MEMORY || each->kind == PINNED_MEMORY) fake_end_memory(each);
    }
    context->alive = 0;
    pthread_cond_broadcast(&fake_changed);
}

/* Only the primary context may be current on several threads. */
static CUresult hold(object *context) {
    if (!context->primary && context->holders && context->holder != fake_thread())
        return fake_broken(CUDA_ERROR_CONTEXT_ALREADY_IN_USE, "the context is current on another thread");
    context->holder = fake_thread();
    context->holders++;
    return CUDA_SUCCESS;
}

static CUresult push(object *context) {
    if (depth == STACK) return fake_broken(CUDA_ERROR_INVALID_CONTEXT, "%d contexts are on the stack", STACK);
    CUresult result = hold(context);
    if (!result) stack[depth++] = context;
    return result;
}

static CUresult pop(void) {
    if (!depth) return fake_broken(CUDA_ERROR_INVALID_CONTEXT, "no context is current on this thread");
    stack[--depth]->holders--;
    return CUDA_SUCCESS;
}

static CUresult living(CUcontext handle, object **found) {
    object *context = *found = fake_find(CONTEXT, handle);
    if (!context) return fake_broken(CUDA_ERROR_INVALID_CONTEXT, "%p is no context", (void *)handle);
    if (!context->alive) return fake_broken(CUDA_ERROR_INVALID_CONTEXT, "the context is used after its end");
    return CUDA_SUCCESS;
}

static object *make_context(int device, int primary) {
    object *context = fake_new(CONTEXT);
    context->context = NULL;
    context->device = device;
    context->primary = primary;
    context->references = 1;
    return context;
}

CUresult fake_cuDevicePrimaryCtxRetain(CUcontext *handle, CUdevice device) {
    CUresult result = fake_checked(device);
    if (result) return result;
    if (primaries[device]) primaries[device]->references++;
    else primaries[device] = make_context(device, 1);
    *handle = (CUcontext)primaries[device];
    return CUDA_SUCCESS;
}

CUresult fake_cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    CUresult result = fake_checked(device);
    if (result) return result;
    object *context = primaries[device];
    if (!context) return fake_broken(CUDA_ERROR_INVALID_CONTEXT, "the primary context was not retained");
    if (--context->references == 0) {
        primaries[device] = NULL;
        fake_end_context(context);
    }
    return CUDA_SUCCESS;
}

CUresult fake_cuDevicePrimaryCtxReset_v2(CUdevice device) {
    CUresult result = fake_checked(device);
    if (result) return result;
    if (primaries[device]) fake_end_context(primaries[device]);
    primaries[device] = NULL;
    return CUDA_SUCCESS;
}

CUresult fake_cuDevicePrimaryCtxGetState(CUdevice device, unsigned int *flags, int *active) {
    CUresult result = fake_checked(device);
    *flags = 0;
    *active = !result && primaries[device];
    return result;
}

CUresult fake_cuCtxCreate_v4(CUcontext *handle, CUctxCreateParams *parameters, unsigned int flags, CUdevice device) {
    (void)parameters, (void)flags;
    CUresult result = fake_checked(device);
    if (result) return result;
    object *context = make_context(device, 0);
    *handle = (CUcontext)context;
    return push(context);
}

CUresult fake_cuCtxCreate_v2(CUcontext *handle, unsigned int flags, CUdevice device) {
    return fake_cuCtxCreate_v4(handle, NULL, flags, device);
}

CUresult fake_cuCtxDestroy_v2(CUcontext handle) {
    object *context;
    CUresult result = living(handle, &context);
    if (result) return result;
    if (context->primary) return fake_broken(CUDA_ERROR_INVALID_CONTEXT, "a primary context is released");
    if (context->holders && context->holder != fake_thread())
        return fake_broken(CUDA_ERROR_CONTEXT_ALREADY_IN_USE, "the context is current on another thread");
    if (fake_current() == context) pop();
    fake_end_context(context);
    return CUDA_SUCCESS;
}

CUresult fake_cuCtxDetach(CUcontext handle) { return fake_cuCtxDestroy_v2(handle); }

CUresult fake_cuCtxPushCurrent_v2(CUcontext handle) {
    object *context;
    CUresult result = living(handle, &context);
    return result ? result : push(context);
}

CUresult fake_cuCtxPopCurrent_v2(CUcontext *handle) {
    if (handle) *handle = (CUcontext)fake_current();
    return pop();
}

CUresult fake_cuCtxSetCurrent(CUcontext handle) {
    object *context = NULL;
    CUresult result = handle ? living(handle, &context) : CUDA_SUCCESS;
    if (result) return result;
    if (depth) pop();
    return context ? push(context) : CUDA_SUCCESS;
}

CUresult fake_cuCtxGetCurrent(CUcontext *handle) {
    *handle = (CUcontext)fake_current();
    return CUDA_SUCCESS;
}

CUresult fake_cuCtxGetDevice(CUdevice *device) {
    *device = fake_current()->device;
    return CUDA_SUCCESS;
}

CUresult fake_cuCtxGetApiVersion(CUcontext handle, unsigned int *version) {
    object *context;
    *version = CUDA_VERSION;
    return living(handle, &context);
}

CUresult fake_cuCtxSynchronize(void) {
    object *context = fake_current();
    fake_finish(context);
    return context->sticky;
}

/* The controls, for control.py. */

/* The number of live objects of this kind, in all contexts. */
int fakeLive(int kind) {
    int count = 0;
    pthread_mutex_lock(&fake_lock);
    for (object *each = fake_objects; each; each = each->next)
        count += (int)each->kind == kind && each->alive && !each->legacy;
    pthread_mutex_unlock(&fake_lock);
    return count;
}

int fakeOrphans(int kind) { return orphans[kind]; }

const char *fakeKind(int kind) { return kind < KINDS ? kind_names[kind] : NULL; }

/* The device of the context that is current on this thread, -1 without one. */
int fakeCurrentDevice(void) { return depth && stack[depth - 1]->alive ? stack[depth - 1]->device : -1; }

static uint64_t generation;

/* The number of resets: objects from before a reset belong to no test any more. */
uint64_t fakeGeneration(void) { return generation; }

void fakeReset(void) {
    pthread_mutex_lock(&fake_lock);
    generation++;
    for (object *each = fake_objects; each; each = each->next) {
        if (each->kind != CONTEXT || !each->alive) continue;
        fake_finish(each);
        fake_end_context(each);
    }
    for (object *each = fake_objects; each; each = each->next) {
        each->alive = 0;
        if (each->kind == PINNED_MEMORY && !each->registered) free(each->bytes);
        if (each->kind == PINNED_MEMORY) each->bytes = NULL;
        if (each->kind == PINNED_MEMORY) each->size = 0;
    }
    memset(primaries, 0, sizeof primaries);
    memset(orphans, 0, sizeof orphans);
    depth = 0;
    fake_memory_total = (size_t)1 << 30;
    fake_forget_rules();
    pthread_mutex_unlock(&fake_lock);
}
