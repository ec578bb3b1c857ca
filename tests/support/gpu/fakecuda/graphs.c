/* Capturing a stream into a graph, and launching it. */
#include "fake.h"

CUresult fake_cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
    CUresult result;
    object *stream = fake_stream(handle, &result);
    if (result) return result;
    if (stream->legacy) return fake_broken(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "the default stream cannot be captured");
    if (stream->capture) return fake_broken(CUDA_ERROR_ILLEGAL_STATE, "the stream is being captured already");
    stream->capture = fake_new(GRAPH);
    stream->capture_broken = 0;
    stream->capture_mode = mode;
    return CUDA_SUCCESS;
}

CUresult fake_cuStreamEndCapture(CUstream handle, CUgraph *graph) {
    CUresult result;
    object *stream = fake_stream(handle, &result);
    *graph = NULL;
    if (result) return result;
    object *captured = stream->capture;
    if (!captured) return fake_broken(CUDA_ERROR_ILLEGAL_STATE, "the stream is not being captured");
    stream->capture = NULL;
    if (stream->capture_broken) {
        captured->alive = 0;
        fake_free_work(captured);
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    }
    *graph = (CUgraph)captured;
    return CUDA_SUCCESS;
}

CUresult fake_cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus *status) {
    CUresult result;
    object *stream = fake_stream(handle, &result);
    if (result) return result;
    *status = !stream->capture          ? CU_STREAM_CAPTURE_STATUS_NONE
              : stream->capture_broken ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                       : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    return CUDA_SUCCESS;
}

CUresult fake_cuGraphInstantiateWithFlags(CUgraphExec *handle, CUgraph graph_handle, unsigned long long flags) {
    object *graph;
    CUresult result = fake_own(GRAPH, graph_handle, &graph);
    if (result) return result;
    if (flags) return fake_broken(CUDA_ERROR_NOT_SUPPORTED, "the fake driver does not know flags %llu", flags);
    object *made = fake_new(GRAPH_EXEC);
    for (op *work = graph->first; work; work = work->next) fake_append(made, work);
    *handle = (CUgraphExec)made;
    return CUDA_SUCCESS;
}

CUresult fake_cuGraphLaunch(CUgraphExec handle, CUstream stream) {
    object *graph;
    CUresult result = fake_own(GRAPH_EXEC, handle, &graph);
    for (op *work = graph ? graph->first : NULL; work && !result; work = work->next) {
        op launched = *work;
        result = fake_queue(stream, &launched);
    }
    return result;
}

CUresult fake_cuGraphUpload(CUgraphExec handle, CUstream stream) {
    object *graph;
    CUresult result = fake_own(GRAPH_EXEC, handle, &graph);
    if (!result) fake_stream(stream, &result);
    return result;
}

static CUresult destroy(enum kind kind, const void *handle) {
    object *graph;
    CUresult result = fake_own(kind, handle, &graph);
    if (result) return result;
    graph->alive = 0;
    fake_free_work(graph);
    return CUDA_SUCCESS;
}

CUresult fake_cuGraphDestroy(CUgraph handle) { return destroy(GRAPH, handle); }

CUresult fake_cuGraphExecDestroy(CUgraphExec handle) { return destroy(GRAPH_EXEC, handle); }

CUresult fake_cuGraphGetNodes(CUgraph handle, CUgraphNode *nodes, size_t *count) {
    object *graph;
    CUresult result = fake_own(GRAPH, handle, &graph);
    if (result) return result;
    if (nodes) return fake_broken(CUDA_ERROR_NOT_SUPPORTED, "the fake driver only counts nodes");
    *count = 0;
    for (op *work = graph->first; work; work = work->next) ++*count;
    return CUDA_SUCCESS;
}

/* For the stand-ins: true if this stream is being captured. */
int fakeIsCapturing(const void *handle) {
    pthread_mutex_lock(&fake_lock);
    object *stream = fake_find(STREAM, handle);
    int captured = stream && stream->capture;
    pthread_mutex_unlock(&fake_lock);
    return captured;
}
