/* Streams, events and asynchronous copies. */
#include "fake.h"

/* Each context has one default stream, created on first use. */
object *fake_default_stream(object *context) {
    for (object *each = fake_objects; each; each = each->next)
        if (each->kind == STREAM && each->legacy && each->context == context) return each;
    object *made = fake_new(STREAM);
    made->legacy = 1;
    return made;
}

/* The stream with this handle; NULL, with the reason, if it cannot be used. */
object *fake_stream(CUstream handle, CUresult *why) {
    object *stream = NULL;
    if (handle == NULL || handle == CU_STREAM_LEGACY) {
        *why = CUDA_SUCCESS;
        return fake_default_stream(fake_current());
    }
    *why = fake_own(STREAM, handle, &stream);
    return *why ? NULL : stream;
}

CUresult fake_cuStreamCreate(CUstream *handle, unsigned int flags) {
    object *stream = fake_new(STREAM);
    stream->non_blocking = flags & CU_STREAM_NON_BLOCKING;
    *handle = (CUstream)stream;
    return CUDA_SUCCESS;
}

CUresult fake_cuStreamCreateWithPriority(CUstream *handle, unsigned int flags, int priority) {
    (void)priority;
    return fake_cuStreamCreate(handle, flags);
}

CUresult fake_cuStreamDestroy_v2(CUstream handle) {
    object *stream;
    CUresult result = fake_own(STREAM, handle, &stream);
    if (result) return result;
    /* Its work still runs, without a wait: a kernel may need Python's lock, which the caller holds. */
    if (!stream->threaded) fake_drain(stream, stream->queued);
    stream->alive = 0;
    pthread_cond_broadcast(&fake_changed);
    return CUDA_SUCCESS;
}

/* A stream or event that is being captured cannot be waited for. */
static CUresult waits(object *stream) {
    if (!stream->capture) return CUDA_SUCCESS;
    stream->capture_broken = 1;
    return fake_broken(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "the stream is being captured");
}

CUresult fake_cuStreamSynchronize(CUstream handle) {
    CUresult result;
    object *stream = fake_stream(handle, &result);
    if (!result) result = waits(stream);
    return result ? result : fake_drain(stream, stream->queued);
}

/* A query runs one piece of work, so that polling ends. */
static CUresult progress(object *stream, uint64_t until) {
    if (stream->done < until && stream->first && !stream->threaded && !stream->busy)
        fake_drain(stream, stream->done + 1);
    if (stream->context->sticky) return stream->context->sticky;
    return stream->done < until ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

CUresult fake_cuStreamQuery(CUstream handle) {
    CUresult result;
    object *stream = fake_stream(handle, &result);
    if (!result) result = waits(stream);
    return result ? result : progress(stream, stream->queued);
}

CUresult fake_cuEventCreate(CUevent *handle, unsigned int flags) {
    object *event = fake_new(EVENT);
    event->untimed = (flags & CU_EVENT_DISABLE_TIMING) != 0;
    *handle = (CUevent)event;
    return CUDA_SUCCESS;
}

CUresult fake_cuEventDestroy_v2(CUevent handle) {
    object *event;
    CUresult result = fake_own(EVENT, handle, &event);
    if (!result) event->alive = 0;
    return result;
}

CUresult fake_cuEventRecord(CUevent handle, CUstream stream_handle) {
    object *event, *stream;
    CUresult result = fake_own(EVENT, handle, &event);
    if (!result) stream = fake_stream(stream_handle, &result);
    if (result) return result;
    op work = {.work = RECORD, .event = event};
    result = fake_queue(stream_handle, &work);
    event->captured = stream->capture != NULL;
    if (event->captured) return result;
    event->recorded_on = stream;
    event->recorded_seq = stream->queued;
    return result;
}

static CUresult waitable(CUevent handle, object **event) {
    CUresult result = fake_own(EVENT, handle, event);
    if (!result && (*event)->captured)
        return fake_broken(CUDA_ERROR_CAPTURED_EVENT, "the event was recorded in a capture");
    return result;
}

CUresult fake_cuEventSynchronize(CUevent handle) {
    object *event;
    CUresult result = waitable(handle, &event);
    if (result || !event->recorded_on) return result;
    return fake_drain(event->recorded_on, event->recorded_seq);
}

CUresult fake_cuEventQuery(CUevent handle) {
    object *event;
    CUresult result = waitable(handle, &event);
    if (result || !event->recorded_on) return result;
    return progress(event->recorded_on, event->recorded_seq);
}

CUresult fake_cuEventElapsedTime_v2(float *ms, CUevent from_handle, CUevent to_handle) {
    object *from, *to;
    CUresult result = waitable(from_handle, &from);
    if (!result) result = waitable(to_handle, &to);
    if (result) return result;
    if (from->untimed || to->untimed || !from->recorded_on || !to->recorded_on) return CUDA_ERROR_INVALID_HANDLE;
    if (from->recorded_on->done < from->recorded_seq || to->recorded_on->done < to->recorded_seq)
        return CUDA_ERROR_NOT_READY;
    *ms = (float)(to->time_ms - from->time_ms);
    return CUDA_SUCCESS;
}

CUresult fake_cuEventElapsedTime(float *ms, CUevent from, CUevent to) {
    return fake_cuEventElapsedTime_v2(ms, from, to);
}

CUresult fake_cuStreamWaitEvent(CUstream stream, CUevent handle, unsigned int flags) {
    (void)flags;
    object *event;
    CUresult result = fake_own(EVENT, handle, &event);
    if (result) return result;
    op work = {.work = WAIT, .awaited = event->recorded_on, .awaited_seq = event->recorded_seq};
    return fake_queue(stream, &work);
}

CUresult fake_cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
    op work = {.work = COPY_IN, .device = to, .host = (void *)from, .size = size};
    return fake_queue(stream, &work);
}

CUresult fake_cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, CUstream stream) {
    op work = {.work = COPY_OUT, .from = from, .host = to, .size = size};
    return fake_queue(stream, &work);
}

CUresult fake_cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
    op work = {.work = COPY_DEVICE, .device = to, .from = from, .size = size};
    return fake_queue(stream, &work);
}

CUresult fake_cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t size, CUstream stream) {
    op work = {.work = FILL, .device = to, .value = value, .size = size};
    return fake_queue(stream, &work);
}

CUresult fake_cuLaunchHostFunc(CUstream stream, CUhostFn function, void *argument) {
    op work = {.work = HOST_FUNCTION, .function = function, .argument = argument};
    return fake_queue(stream, &work);
}
