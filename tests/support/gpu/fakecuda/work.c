/* Queued work: checked when it is queued, and again when it runs.
 *
 * Work runs only when it is waited for, and only as far as needed, which reveals a forgotten wait. With
 * execution threads each stream runs as soon as it can.
 */
#include "fake.h"

static int overlaps(CUdeviceptr address, size_t size, const object *memory) {
    return address && address < memory->address + memory->size && memory->address < address + size;
}

int fake_uses(const op *work, const object *memory) {
    if (memory->kind == PINNED_MEMORY) {
        const unsigned char *at = work->host;
        return at && at >= memory->bytes && at < memory->bytes + memory->size;
    }
    if (overlaps(work->device, work->size, memory) || overlaps(work->from, work->size, memory)) return 1;
    for (int i = 0; i < work->count; i++)
        if (overlaps(work->addresses[i], work->sizes[i], memory)) return 1;
    return 0;
}

/* True if work that has not run yet uses this memory. */
int fake_in_use(const object *memory) {
    for (object *each = fake_objects; each; each = each->next) {
        if (each->kind != STREAM || !each->alive || each->context->sticky) continue;
        for (op *work = each->first; work; work = work->next)
            if (fake_uses(work, memory)) return 1;
    }
    return 0;
}

static CUresult check(const op *work) {
    CUresult result = CUDA_SUCCESS;
    if (work->device) result = fake_check_device(work->device, work->size, "the device memory");
    if (!result && work->from) result = fake_check_device(work->from, work->size, "the source");
    if (!result && work->host) result = fake_check_pinned(work->host, work->size);
    char what[32];
    for (int i = 0; !result && i < work->count; i++) {
        snprintf(what, sizeof what, "the memory of tensor %d", i);
        result = fake_check_device(work->addresses[i], work->sizes[i], what);
    }
    return result;
}

static op *copy_of(const op *work) {
    op *made = malloc(sizeof *made);
    *made = *work;
    made->next = NULL;
    if (!work->count) return made;
    made->addresses = malloc(work->count * sizeof *made->addresses);
    made->sizes = malloc(work->count * sizeof *made->sizes);
    memcpy(made->addresses, work->addresses, work->count * sizeof *made->addresses);
    memcpy(made->sizes, work->sizes, work->count * sizeof *made->sizes);
    return made;
}

static void free_op(op *work) {
    if (work->count) free(work->addresses), free(work->sizes);
    free(work);
}

void fake_free_work(object *owner) {
    for (op *work = owner->first, *next; work; work = next) {
        next = work->next;
        free_op(work);
    }
    owner->first = owner->last = NULL;
}

/* Add a copy of the work to a stream or graph. */
void fake_append(object *owner, const op *work) {
    op *made = copy_of(work);
    if (owner->last) owner->last->next = made;
    else owner->first = made;
    owner->last = made;
}

/* An asynchronous fault: the context becomes unusable, and the next call that can returns the error. */
static void fault(object *context, CUresult code) { fake_spoil(context, code); }

static const char *const points[] = {"exec:htod", "exec:dtoh", "exec:dtod", "exec:memset",
                                     "exec:kernel", "exec:host", "exec:record", "exec:wait"};

/* Under the lock: true if the work may run; otherwise its context becomes unusable. */
static int may_run(op *work, object *context) {
    CUresult planted = fake_injected(points[work->work]);
    CUresult wrong = planted ? planted : check(work);
    if (!wrong && work->host && work->sum != fake_sum(work->host, work->size))
        wrong = fake_broken(CUDA_ERROR_ILLEGAL_ADDRESS, "the host buffer was written to before its copy had run");
    if (!wrong) return 1;
    fault(context, fake_is_sticky(wrong) ? wrong : CUDA_ERROR_ILLEGAL_ADDRESS);
    return 0;
}

static double now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

/* Without the lock: the work itself. */
static CUresult perform(op *work, unsigned char *device, unsigned char *from) {
    switch (work->work) {
    case COPY_IN: memcpy(device, work->host, work->size); break;
    case COPY_OUT: memcpy(work->host, from, work->size); break;
    case COPY_DEVICE: memmove(device, from, work->size); break;
    case FILL: memset(device, work->value, work->size); break;
    case KERNEL: return work->kernel(work->user);
    case HOST_FUNCTION: work->function(work->argument); break;
    case RECORD: work->event->time_ms = now_ms(); break;
    case WAIT: break;
    }
    return CUDA_SUCCESS;
}

/* Run the stream's first piece of work. Holds the lock, but not while the work runs. */
static void run_first(object *stream) {
    op *work = stream->first;
    object *context = stream->context;
    stream->busy = 1;
    if (work->work == WAIT && work->awaited) fake_drain(work->awaited, work->awaited_seq);
    const char *before = fake_call_name;
    fake_call_name = points[work->work];
    if (!context->sticky && context->alive && may_run(work, context)) {
        unsigned char *device = work->device ? fake_bytes(work->device) : NULL;
        unsigned char *from = work->from ? fake_bytes(work->from) : NULL;
        pthread_mutex_unlock(&fake_lock);
        CUresult result = perform(work, device, from);
        pthread_mutex_lock(&fake_lock);
        if (result) fault(context, result);
    }
    fake_call_name = before;
    stream->first = work->next;
    if (!stream->first) stream->last = NULL;
    stream->done = work->seq;
    stream->busy = 0;
    free_op(work);
    pthread_cond_broadcast(&fake_changed);
}

/* Wait until the stream's work up to `until` has run; run it here without an execution thread. */
CUresult fake_drain(object *stream, uint64_t until) {
    while (stream->done < until && stream->first) {
        if (stream->threaded || stream->busy) pthread_cond_wait(&fake_changed, &fake_lock);
        else run_first(stream);
    }
    return stream->context->sticky;
}

void fake_finish(object *context) {
    for (object *each = fake_objects; each; each = each->next)
        if (each->kind == STREAM && each->context == context && each->alive) fake_drain(each, each->queued);
}

/* True if work of this context is queued; and if some is running. */
int fake_pending(const object *context) {
    for (object *each = fake_objects; each; each = each->next)
        if (each->kind == STREAM && each->context == context && each->first) return 1;
    return 0;
}

int fake_running(const object *context) {
    for (object *each = fake_objects; each; each = each->next)
        if (each->kind == STREAM && each->context == context && each->busy) return 1;
    return 0;
}

static void *run_stream(void *argument) {
    object *stream = argument;
    pthread_mutex_lock(&fake_lock);
    for (;;) {
        if (stream->first) run_first(stream);
        else if (!stream->alive) break;
        else pthread_cond_wait(&fake_changed, &fake_lock);
    }
    stream->threaded = 0;
    pthread_mutex_unlock(&fake_lock);
    return NULL;
}

static void start_thread(object *stream) {
    pthread_t thread;
    stream->threaded = 1;
    pthread_create(&thread, NULL, run_stream, stream);
    pthread_detach(thread);
}

/* Queue checked work. A copy out poisons its target, which reveals a read that is too early. */
CUresult fake_push(object *stream, op *work) {
    work->stream = stream;
    work->seq = ++stream->queued;
    if (work->work == COPY_OUT) memset(work->host, fake_poison, work->size);
    if (work->host) work->sum = fake_sum(work->host, work->size);
    fake_append(stream, work);
    if (fake_threaded && !stream->threaded) start_thread(stream);
    pthread_cond_broadcast(&fake_changed);
    return CUDA_SUCCESS;
}

/* Queue work, or add it to the graph that the stream captures. */
CUresult fake_queue(CUstream handle, op *work) {
    CUresult result;
    object *stream = fake_stream(handle, &result);
    if (!result) result = check(work);
    if (result) {
        if (stream && stream->capture) stream->capture_broken = 1;
        return result;
    }
    if (!stream->capture) return fake_push(stream, work);
    fake_append(stream->capture, work);
    return CUDA_SUCCESS;
}

/* For the stand-ins: queue `kernel(user)`, which reads and writes these ranges. */
CUresult fake_enqueueV3(CUstream stream, CUresult (*kernel)(uint64_t), uint64_t user, int count,
                        CUdeviceptr *addresses, size_t *sizes) {
    op work = {.work = KERNEL, .kernel = kernel, .user = user, .count = count, .addresses = addresses, .sizes = sizes};
    return fake_queue(stream, &work);
}
