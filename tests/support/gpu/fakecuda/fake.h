/* A CUDA driver in memory that checks the rules of CUDA.
 *
 * The generated code of every exported call first calls `fake_enter`, which counts the call, returns planted
 * errors, and refuses calls without a context or after a sticky error. A broken rule makes the call return an
 * error and is recorded, so that a test sees it even if the error was ignored. All but queued work runs under
 * one lock.
 *
 * Device addresses are no addresses of this process. They are never reused, so a stale one is always found, and
 * host code that dereferences one crashes.
 */
#ifndef FAKE_H
#define FAKE_H

#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define DEVICES 2
#define STACK 32
#define TOLD 64

enum kind { CONTEXT, STREAM, EVENT, DEVICE_MEMORY, PINNED_MEMORY, GRAPH, GRAPH_EXEC, KINDS };
enum work { COPY_IN, COPY_OUT, COPY_DEVICE, FILL, KERNEL, HOST_FUNCTION, RECORD, WAIT };
/* Requirements of a call, from the generator's table. */
enum need { NOTHING = 0, NEEDS_CONTEXT = 1, CLEANS_UP = 2, UNSAFE_IN_CAPTURE = 4 };

typedef struct object object;
typedef struct op op;

/* A piece of queued work. A launch copies a graph's work into the stream. */
struct op {
    enum work work;
    object *stream;
    uint64_t seq;
    CUdeviceptr device, from;
    void *host;
    size_t size;
    unsigned char value;
    uint64_t sum;
    object *event;
    object *awaited;
    uint64_t awaited_seq;
    CUresult (*kernel)(uint64_t user);
    CUhostFn function;
    void *argument;
    uint64_t user;
    int count;
    CUdeviceptr *addresses;
    size_t *sizes;
    op *next;
};

/* Any object with a handle. Never freed, so that a use after its end is recognised. */
struct object {
    enum kind kind;
    int alive;
    long thread;
    object *context;
    object *next;
    /* context */
    int device, primary, references, holders;
    long holder;
    CUresult sticky;
    long told[TOLD];
    int told_count;
    /* memory */
    CUdeviceptr address;
    unsigned char *bytes;
    size_t size;
    int registered;
    /* stream; a graph's work is in `first` too */
    op *first, *last;
    uint64_t queued, done;
    int busy, threaded, legacy, non_blocking;
    object *capture;
    int capture_broken;
    CUstreamCaptureMode capture_mode;
    /* event */
    object *recorded_on;
    uint64_t recorded_seq;
    int captured, untimed;
    double time_ms;
};

extern pthread_mutex_t fake_lock;
extern pthread_cond_t fake_changed;
extern object *fake_objects;
extern unsigned char fake_poison;
extern int fake_threaded;
extern size_t fake_memory_total;

long fake_thread(void);

/* calls.c */
CUresult fake_enter(int call);
CUresult fake_leave(int call, CUresult result);
CUresult fake_broken(CUresult answer, const char *format, ...) __attribute__((format(printf, 2, 3)));
CUresult fake_injected(const char *name);
int fake_is_sticky(CUresult code);
void fake_tell(object *context);
extern __thread const char *fake_call_name;

/* devices.c */
CUresult fake_checked(CUdevice device);

/* contexts.c */
object *fake_new(enum kind kind);
object *fake_find(enum kind kind, const void *handle);
CUresult fake_own(enum kind kind, const void *handle, object **found);
object *fake_current(void);
CUresult fake_spoil(object *context, CUresult code);
void fake_end_context(object *context);

/* memory.c */
object *fake_device_memory(CUdeviceptr address, size_t size);
object *fake_pinned(const void *host, size_t size);
CUresult fake_check_device(CUdeviceptr address, size_t size, const char *what);
CUresult fake_check_pinned(const void *host, size_t size);
unsigned char *fake_bytes(CUdeviceptr address);
uint64_t fake_sum(const void *bytes, size_t size);
void fake_end_memory(object *memory);

/* work.c */
object *fake_default_stream(object *context);
CUresult fake_queue(CUstream handle, op *work);
CUresult fake_push(object *stream, op *work);
CUresult fake_drain(object *stream, uint64_t until);
void fake_finish(object *context);
int fake_pending(const object *context);
int fake_running(const object *context);
void fake_append(object *owner, const op *work);
void fake_free_work(object *owner);
int fake_uses(const op *work, const object *memory);
int fake_in_use(const object *memory);

/* streams.c */
object *fake_stream(CUstream handle, CUresult *why);

/* The generated part. */
extern const char *const fake_names[];
extern const unsigned char fake_needs[];
extern const int fake_call_count;

#endif
