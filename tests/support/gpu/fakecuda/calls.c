/* The steps common to all calls: counts, planted errors, general rules. */
#include "fake.h"

#define CALLS 2048
#define KEPT 256
#define INJECTIONS 64

pthread_mutex_t fake_lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t fake_changed = PTHREAD_COND_INITIALIZER;
unsigned char fake_poison = 0xCB;
int fake_threaded = 0;
__thread const char *fake_call_name = "";

static uint64_t counts[CALLS];
static char *violations[KEPT];
static int violation_count;
static struct { char name[64]; CUresult code; int nth; } injections[INJECTIONS];
static int injection_count;

long fake_thread(void) {
    static __thread long thread = 0;
    if (!thread) thread = syscall(SYS_gettid);
    return thread;
}

/* In a process started by a test, FAKE_CUDA_REPORT names a file for broken rules. */
static void keep(const char *text) {
    const char *report = getenv("FAKE_CUDA_REPORT");
    FILE *file = report ? fopen(report, "a") : NULL;
    if (file) {
        fprintf(file, "%s\n", text);
        fclose(file);
    }
    if (violation_count < KEPT) violations[violation_count++] = strdup(text);
}

CUresult fake_broken(CUresult answer, const char *format, ...) {
    char text[512];
    int length = snprintf(text, sizeof text, "%s: ", fake_call_name);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text + length, sizeof text - length, format, arguments);
    va_end(arguments);
    keep(text);
    return answer;
}

int fake_is_sticky(CUresult code) {
    return code == 214 || code == 700 || code == 702 || code == 710 || (code >= 714 && code <= 719);
}

/* True if `planted` names the call `name`, with or without its version. */
static int is_named(const char *name, const char *planted) {
    size_t length = strlen(planted);
    if (strncmp(name, planted, length) != 0) return 0;
    return !name[length] || (strncmp(name + length, "_v", 2) == 0 && strlen(name + length) == 3);
}

/* The error that a test planted for the call or point of execution with this name. */
CUresult fake_injected(const char *name) {
    for (int i = 0; i < injection_count; i++) {
        if (!is_named(name, injections[i].name) || --injections[i].nth > 0) continue;
        CUresult code = injections[i].code;
        injections[i] = injections[--injection_count];
        return code;
    }
    return CUDA_SUCCESS;
}

static int was_told(const object *context) {
    for (int i = 0; i < context->told_count; i++)
        if (context->told[i] == fake_thread()) return 1;
    return 0;
}

/* This thread has received the context's sticky error: from now on it may only clean up. */
void fake_tell(object *context) {
    if (!was_told(context) && context->told_count < TOLD) context->told[context->told_count++] = fake_thread();
}

/* The stream that this thread captures; calls that would disturb it end the capture. */
static object *capturing(void) {
    for (object *each = fake_objects; each; each = each->next)
        if (each->kind == STREAM && each->alive && each->capture && each->thread == fake_thread()) return each;
    return NULL;
}

static CUresult refusal(int call) {
    const char *name = fake_names[call];
    int needs = fake_needs[call];
    CUresult planted = fake_injected(name);
    object *context = fake_current();
    if (planted) {
        if (!fake_is_sticky(planted) || !context) return planted;
        fake_spoil(context, planted);
    }
    if (!(needs & NEEDS_CONTEXT)) return planted;
    if (!context) return fake_broken(CUDA_ERROR_INVALID_CONTEXT, "no context is current on this thread");
    if (!context->alive) return fake_broken(CUDA_ERROR_CONTEXT_IS_DESTROYED, "the current context was destroyed");
    if (context->sticky) {
        if (was_told(context) && !(needs & CLEANS_UP))
            fake_broken(context->sticky, "called after sticky error %d", context->sticky);
        fake_tell(context);
        return context->sticky;
    }
    object *stream = needs & UNSAFE_IN_CAPTURE ? capturing() : NULL;
    if (stream && stream->capture_mode != CU_STREAM_CAPTURE_MODE_RELAXED) {
        stream->capture_broken = 1;
        return fake_broken(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "called while this thread captures a stream");
    }
    return CUDA_SUCCESS;
}

CUresult fake_enter(int call) {
    pthread_mutex_lock(&fake_lock);
    fake_call_name = fake_names[call];
    counts[call]++;
    return refusal(call);
}

CUresult fake_leave(int call, CUresult result) {
    (void)call;
    object *context = fake_current();
    if (result && context && context->sticky == result) fake_tell(context);
    pthread_mutex_unlock(&fake_lock);
    return result;
}

/* The result of the generated code for a call that the C files do not define. */
CUresult fake_unknown(int call) {
    CUresult result = fake_enter(call);
    if (!result) result = fake_broken(CUDA_ERROR_NOT_SUPPORTED, "the fake driver does not have this call");
    return fake_leave(call, result);
}

/* The controls, for control.py. */

int fakeViolations(void) { return violation_count; }

const char *fakeViolation(int index) { return violations[index]; }

void fakeViolate(const char *text) {
    pthread_mutex_lock(&fake_lock);
    keep(text);
    pthread_mutex_unlock(&fake_lock);
}

int fakeInject(const char *name, int code, int nth) {
    pthread_mutex_lock(&fake_lock);
    int fits = injection_count < INJECTIONS;
    if (fits) {
        snprintf(injections[injection_count].name, sizeof injections[0].name, "%s", name);
        injections[injection_count].code = code;
        injections[injection_count++].nth = nth;
    }
    pthread_mutex_unlock(&fake_lock);
    return fits;
}

/* The same controls for a process started by a test: FAKE_CUDA_INJECT is "call=code=nth,...". */
__attribute__((constructor)) static void read_environment(void) {
    fake_threaded = getenv("FAKE_CUDA_THREADED") != NULL;
    char *planted = getenv("FAKE_CUDA_INJECT") ? strdup(getenv("FAKE_CUDA_INJECT")) : NULL;
    char name[64];
    int code, nth;
    for (char *each = planted ? strtok(planted, ",") : NULL; each; each = strtok(NULL, ","))
        if (sscanf(each, "%63[^=]=%d=%d", name, &code, &nth) == 3) fakeInject(name, code, nth);
    free(planted);
}

int fakeCalls(void) { return fake_call_count; }

const char *fakeCallName(int call) { return fake_names[call]; }

uint64_t fakeCallCount(int call) { return counts[call]; }

void fakeForgetCalls(void) { memset(counts, 0, sizeof counts); }

void fakePoison(int byte) { fake_poison = (unsigned char)byte; }

void fakeThreaded(int on) { fake_threaded = on; }

void fake_forget_rules(void) {
    for (int i = 0; i < violation_count; i++) free(violations[i]);
    violation_count = injection_count = 0;
    fake_poison = 0xCB;
    fake_threaded = 0;
    fakeForgetCalls();
}
