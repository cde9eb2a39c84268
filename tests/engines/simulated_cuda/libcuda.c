/* A simulated CUDA driver: the part of libcuda.so.1 that pycuda, cuda-python and the engine call,
 * in host memory, for tests on machines without a GPU. It computes nothing by itself.
 *
 * It is stricter than the real one where that finds mistakes:
 * - device addresses lie in a region that no program may touch, so reading one on the CPU crashes;
 * - queued work runs only when somebody waits for it, so that a result read too early is stale;
 * - fresh memory is filled with 0xA5; freed host memory becomes untouchable;
 * - whatever breaks CUDA's rules (double free, use after free, copies from unpinned memory, calls
 *   that spoil a capture, CUDA calls in a host function) is counted, with a line of text.
 *
 * Everything named simulated_ is for the tests: counters, memory size, and failure on demand.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define EXPORT __attribute__((visibility("default")))
enum { MAX_DEVICES = 4, MAX_DEPTH = 64, POISON = 0xA5 };
enum { ALIVE = 0x51A11FE, DEAD = 0xDEAD };

typedef enum { DEVICE, PINNED, MAPPED } Kind;
typedef struct Range {
    struct Range *next;
    Kind kind;
    uintptr_t device; /* 0: the device cannot see it */
    char *host;       /* what lies behind */
    size_t size;
} Range;

typedef enum { COPY_IN, COPY_OUT, CALL_HOST, RECORD } OpKind;
typedef struct Op {
    struct Op *next;
    OpKind kind;
    uintptr_t device;
    void *host;
    size_t size;
    CUhostFn function;
    void *data;
    CUevent event;
} Op;

struct CUctx_st { int device, retains; };
struct CUstream_st {
    int magic, running, capture; /* capture: 0 none, 1 recording, 2 spoiled */
    CUstreamCaptureMode mode;
    pthread_t capturer;
    Op *queue;
    CUgraph graph;
    CUstream next;
};
struct CUgraph_st { int magic; Op *ops; };
struct CUgraphExec_st { int magic; Op *ops; };
struct CUevent_st { int magic, recorded, pending; double time; };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t moved = PTHREAD_COND_INITIALIZER;
static Range *ranges;
static struct CUctx_st contexts[MAX_DEVICES];
static struct CUstream_st null_stream = {.magic = ALIVE};
static CUstream streams = &null_stream;
static uintptr_t next_address;
static size_t memory_total = (size_t)1 << 30, memory_used;
static int devices = 1, integrated, initialised, major = 8, minor = 7;
static char device_name[128] = "Simulated GPU";
static double now_ms;
static __thread CUcontext stack[MAX_DEPTH];
static __thread int depth, in_host_function;

static struct {
    long calls, errors, allocations, host_allocations, streams, events, graphs, graph_execs;
    long launches, host_calls, copies, captures, fail_at, fail_code;
} count;
static char last_error[512], failed_call[64];

static void report(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    count.errors++;
    fprintf(stderr, "simulated CUDA: %s\n", last_error);
}

/* Every call that may fail passes here once; false: it shall fail now with *result. */
static int begin(const char *name, CUresult *result) {
    pthread_mutex_lock(&mutex);
    count.calls++;
    *result = CUDA_SUCCESS;
    if (in_host_function) {
        report("%s inside a host function", name);
        *result = CUDA_ERROR_NOT_PERMITTED;
    } else if (count.fail_at && count.calls == count.fail_at) {
        snprintf(failed_call, sizeof failed_call, "%s", name);
        *result = (CUresult)count.fail_code;
    }
    if (*result) pthread_mutex_unlock(&mutex);
    return *result == CUDA_SUCCESS;
}

static CUresult end(CUresult result) {
    pthread_mutex_unlock(&mutex);
    return result;
}

#define BEGIN                                                                                      \
    CUresult result;                                                                               \
    if (!begin(__func__, &result)) return result

#define BEGIN_IN_CONTEXT                                                                           \
    BEGIN;                                                                                         \
    if ((result = current(__func__))) return end(result)

static CUresult current(const char *name) {
    if (depth == 0) {
        report("%s without a current context", name);
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    if (stack[depth - 1]->retains == 0) {
        report("%s in a context that was released", name);
        return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    }
    return CUDA_SUCCESS;
}

/* Memory. */

static uintptr_t take_addresses(size_t size) {
    const size_t region = (size_t)1 << 40;
    if (next_address == 0) {
        void *start = mmap(NULL, region, PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (start == MAP_FAILED) abort();
        next_address = (uintptr_t)start;
    }
    uintptr_t address = next_address;
    next_address += (size + 0x1fff) & ~(uintptr_t)0xfff; /* an empty page lies between any two */
    return address;
}

static Range *find_device(uintptr_t address, size_t size) {
    for (Range *range = ranges; range; range = range->next)
        if (range->device && address >= range->device &&
            address + size <= range->device + range->size)
            return range;
    return NULL;
}

static Range *find_host(const void *pointer, size_t size) {
    for (Range *range = ranges; range; range = range->next)
        if (range->kind != DEVICE && (const char *)pointer >= range->host &&
            (const char *)pointer + size <= range->host + range->size)
            return range;
    return NULL;
}

static int unlink_range(Range *gone) {
    for (Range **at = &ranges; *at; at = &(*at)->next)
        if (*at == gone) {
            *at = gone->next;
            return 1;
        }
    return 0;
}

static void check_unused(const Range *range, const char *name) {
    for (CUstream stream = streams; stream; stream = stream->next)
        for (const Op *op = stream->queue; op; op = op->next)
            if ((op->kind == COPY_IN || op->kind == COPY_OUT) &&
                ((range->device && op->device >= range->device &&
                  op->device < range->device + range->size) ||
                 ((char *)op->host >= range->host && (char *)op->host < range->host + range->size)))
                report("%s of memory that queued work still uses", name);
}

/* Allocating, freeing and waiting are forbidden while this thread captures, and spoil it. */
static int forbidden(void) {
    int spoiled = 0;
    for (CUstream stream = streams; stream; stream = stream->next)
        if (stream->capture && stream->mode != CU_STREAM_CAPTURE_MODE_RELAXED &&
            (stream->mode == CU_STREAM_CAPTURE_MODE_GLOBAL ||
             pthread_equal(stream->capturer, pthread_self()))) {
            stream->capture = 2;
            spoiled = 1;
        }
    return spoiled;
}

EXPORT CUresult cuMemAlloc(CUdeviceptr *pointer, size_t size) {
    BEGIN_IN_CONTEXT;
    if (forbidden()) return end(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    if (size == 0) return end(CUDA_ERROR_INVALID_VALUE);
    if (memory_used + size > memory_total) return end(CUDA_ERROR_OUT_OF_MEMORY);
    Range *range = calloc(1, sizeof *range);
    *range = (Range){ranges, DEVICE, take_addresses(size), malloc(size), size};
    memset(range->host, POISON, size);
    ranges = range;
    memory_used += size;
    count.allocations++;
    *pointer = range->device;
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuMemFree(CUdeviceptr pointer) {
    pthread_mutex_lock(&mutex);
    CUresult result = current(__func__);
    if (result) return end(result);
    if (forbidden()) return end(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    Range *range = find_device(pointer, 0);
    if (!range || range->device != pointer || range->kind != DEVICE) {
        report("cuMemFree of %p, which is not allocated", (void *)(uintptr_t)pointer);
        return end(CUDA_ERROR_INVALID_VALUE);
    }
    check_unused(range, __func__);
    unlink_range(range);
    memory_used -= range->size;
    count.allocations--;
    free(range->host);
    free(range);
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuMemHostAlloc(void **pointer, size_t size, unsigned flags) {
    BEGIN_IN_CONTEXT;
    if (forbidden()) return end(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    if (size == 0) return end(CUDA_ERROR_INVALID_VALUE);
    if (integrated && memory_used + size > memory_total) return end(CUDA_ERROR_OUT_OF_MEMORY);
    char *host = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (host == MAP_FAILED) return end(CUDA_ERROR_OUT_OF_MEMORY);
    memset(host, POISON, size);
    int mapped = (flags & CU_MEMHOSTALLOC_DEVICEMAP) != 0;
    Range *range = calloc(1, sizeof *range);
    *range = (Range){ranges, mapped ? MAPPED : PINNED, mapped ? take_addresses(size) : 0, host,
                     size};
    ranges = range;
    if (integrated) memory_used += size;
    count.host_allocations++;
    *pointer = host;
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuMemHostGetDevicePointer(CUdeviceptr *pointer, void *host, unsigned flags) {
    (void)flags;
    BEGIN_IN_CONTEXT;
    Range *range = find_host(host, 0);
    if (!range || range->kind != MAPPED) {
        report("cuMemHostGetDevicePointer of memory that is not mapped");
        return end(CUDA_ERROR_INVALID_VALUE);
    }
    *pointer = range->device + ((char *)host - range->host);
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuMemFreeHost(void *host) {
    pthread_mutex_lock(&mutex);
    CUresult result = current(__func__);
    if (result) return end(result);
    if (forbidden()) return end(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    Range *range = find_host(host, 0);
    if (!range || range->host != host) {
        report("cuMemFreeHost of %p, which is not allocated", host);
        return end(CUDA_ERROR_INVALID_VALUE);
    }
    check_unused(range, __func__);
    unlink_range(range);
    if (integrated) memory_used -= range->size;
    count.host_allocations--;
    mprotect(range->host, range->size, PROT_NONE);
    free(range);
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuMemGetInfo(size_t *available, size_t *total) {
    BEGIN_IN_CONTEXT;
    *available = memory_total - memory_used;
    *total = memory_total;
    return end(CUDA_SUCCESS);
}

/* Device and primary context. */

EXPORT CUresult cuInit(unsigned flags) {
    (void)flags;
    BEGIN;
    const char *text;
    if (!initialised) {
        if ((text = getenv("SIMULATED_CUDA_NAME")))
            snprintf(device_name, sizeof device_name, "%s", text);
        if ((text = getenv("SIMULATED_CUDA_CAPABILITY"))) sscanf(text, "%d.%d", &major, &minor);
        if ((text = getenv("SIMULATED_CUDA_INTEGRATED"))) integrated = atoi(text);
        if ((text = getenv("SIMULATED_CUDA_MEMORY"))) memory_total = strtoull(text, NULL, 10);
        if ((text = getenv("SIMULATED_CUDA_DEVICES"))) devices = atoi(text);
        initialised = 1;
    }
    return end(devices ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE);
}

EXPORT CUresult cuDriverGetVersion(int *version) {
    BEGIN;
    *version = 12060;
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuDeviceGetCount(int *number) {
    BEGIN;
    *number = devices;
    return end(initialised ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED);
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    BEGIN;
    if (!initialised) return end(CUDA_ERROR_NOT_INITIALIZED);
    if (ordinal < 0 || ordinal >= devices) return end(CUDA_ERROR_INVALID_DEVICE);
    *device = ordinal;
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    (void)device;
    BEGIN;
    snprintf(name, (size_t)length, "%s", device_name);
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) {
    (void)device;
    BEGIN;
    *bytes = memory_total;
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    (void)device;
    BEGIN;
    switch ((int)attribute) {
    case CU_DEVICE_ATTRIBUTE_INTEGRATED: *value = integrated; break;
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = major; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = minor; break;
    default: *value = 0;
    }
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    BEGIN;
    contexts[device].device = device;
    contexts[device].retains++;
    *context = &contexts[device];
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
    pthread_mutex_lock(&mutex);
    if (contexts[device].retains == 0) {
        report("cuDevicePrimaryCtxRelease once too often");
        return end(CUDA_ERROR_INVALID_CONTEXT);
    }
    contexts[device].retains--;
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuCtxPushCurrent(CUcontext context) {
    pthread_mutex_lock(&mutex);
    if (depth == MAX_DEPTH) abort();
    stack[depth++] = context;
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuCtxPopCurrent(CUcontext *context) {
    pthread_mutex_lock(&mutex);
    if (depth == 0) {
        report("cuCtxPopCurrent once too often");
        return end(CUDA_ERROR_INVALID_CONTEXT);
    }
    *context = stack[--depth];
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = depth ? stack[depth - 1] : NULL;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    BEGIN_IN_CONTEXT;
    *device = stack[depth - 1]->device;
    return end(CUDA_SUCCESS);
}

/* Streams. */

static Op *copy_ops(const Op *ops) {
    Op *head = NULL, **tail = &head;
    for (; ops; ops = ops->next) {
        *tail = malloc(sizeof **tail);
        **tail = *ops;
        (*tail)->next = NULL;
        tail = &(*tail)->next;
    }
    return head;
}

static void append(Op **queue, Op *ops) {
    while (*queue) queue = &(*queue)->next;
    *queue = ops;
}

static CUstream checked(CUstream stream, const char *name) {
    if (stream == NULL) return &null_stream;
    if (stream->magic == ALIVE) return stream;
    report("%s on a stream that was destroyed", name);
    return NULL;
}

static CUresult enqueue(CUstream stream, Op op) {
    if (stream->capture == 2) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    op.next = NULL;
    append(stream->capture ? &stream->graph->ops : &stream->queue, copy_ops(&op));
    if (op.event && !stream->capture) op.event->pending++;
    return CUDA_SUCCESS;
}

static void execute(Op *op) {
    Range *range;
    now_ms += 0.001;
    switch (op->kind) {
    case COPY_IN:
    case COPY_OUT:
        count.copies++;
        range = find_device(op->device, op->size);
        if (!range || !find_host(op->host, op->size)) {
            report("a copy ran after its memory was freed");
            break;
        }
        char *device = range->host + (op->device - range->device);
        if (op->kind == COPY_IN) memcpy(device, op->host, op->size);
        else memcpy(op->host, device, op->size);
        break;
    case CALL_HOST:
        /* Unlocked: it may need a lock (Python's) that somebody waiting for ours holds. */
        count.host_calls++;
        now_ms += 1;
        pthread_mutex_unlock(&mutex);
        in_host_function = 1;
        op->function(op->data);
        in_host_function = 0;
        pthread_mutex_lock(&mutex);
        break;
    case RECORD:
        op->event->time = now_ms;
        op->event->recorded = 1;
        op->event->pending--;
    }
}

static void drain(CUstream stream) {
    while (stream->queue || stream->running) {
        if (stream->running) {
            pthread_cond_wait(&moved, &mutex);
            continue;
        }
        Op *op = stream->queue;
        stream->queue = op->next;
        stream->running = 1;
        execute(op);
        free(op);
        stream->running = 0;
        pthread_cond_broadcast(&moved);
    }
}

EXPORT CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    (void)flags;
    BEGIN_IN_CONTEXT;
    *stream = calloc(1, sizeof **stream);
    (*stream)->magic = ALIVE;
    (*stream)->next = streams;
    streams = *stream;
    count.streams++;
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuStreamDestroy(CUstream stream) {
    pthread_mutex_lock(&mutex);
    CUresult result = current(__func__);
    if (result) return end(result);
    if (!stream || !(stream = checked(stream, __func__))) return end(CUDA_ERROR_INVALID_HANDLE);
    if (stream->capture) report("cuStreamDestroy of a stream that captures");
    drain(stream);
    stream->magic = DEAD;
    count.streams--;
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuStreamSynchronize(CUstream stream) {
    BEGIN_IN_CONTEXT;
    if (!(stream = checked(stream, __func__))) return end(CUDA_ERROR_INVALID_HANDLE);
    if (stream->capture) {
        stream->capture = 2;
        return end(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    drain(stream);
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuStreamQuery(CUstream stream) {
    BEGIN_IN_CONTEXT;
    if (!(stream = checked(stream, __func__))) return end(CUDA_ERROR_INVALID_HANDLE);
    return end(stream->queue || stream->running ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS);
}

EXPORT CUresult cuCtxSynchronize(void) {
    BEGIN_IN_CONTEXT;
    for (CUstream stream = streams; stream; stream = stream->next) drain(stream);
    return end(CUDA_SUCCESS);
}

static CUresult copy(CUstream stream, OpKind kind, CUdeviceptr device, void *host, size_t size,
                     const char *name) {
    if (!(stream = checked(stream, name))) return CUDA_ERROR_INVALID_HANDLE;
    if (!find_device(device, size)) {
        report("%s: device memory out of bounds", name);
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (!find_host(host, size)) {
        report("%s: host memory is not pinned", name);
        return CUDA_ERROR_INVALID_VALUE;
    }
    return enqueue(stream, (Op){.kind = kind, .device = device, .host = host, .size = size});
}

EXPORT CUresult cuMemcpyHtoDAsync(CUdeviceptr device, const void *host, size_t size,
                                  CUstream stream) {
    BEGIN_IN_CONTEXT;
    return end(copy(stream, COPY_IN, device, (void *)(uintptr_t)host, size, __func__));
}

EXPORT CUresult cuMemcpyDtoHAsync(void *host, CUdeviceptr device, size_t size, CUstream stream) {
    BEGIN_IN_CONTEXT;
    return end(copy(stream, COPY_OUT, device, host, size, __func__));
}

EXPORT CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void *data) {
    BEGIN_IN_CONTEXT;
    if (!(stream = checked(stream, __func__))) return end(CUDA_ERROR_INVALID_HANDLE);
    return end(enqueue(stream, (Op){.kind = CALL_HOST, .function = function, .data = data}));
}

/* Events. Time is simulated: a microsecond for a copy, a millisecond for a host function. */

EXPORT CUresult cuEventCreate(CUevent *event, unsigned flags) {
    (void)flags;
    BEGIN_IN_CONTEXT;
    *event = calloc(1, sizeof **event);
    (*event)->magic = ALIVE;
    count.events++;
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuEventDestroy(CUevent event) {
    pthread_mutex_lock(&mutex);
    CUresult result = current(__func__);
    if (result) return end(result);
    if (event->magic != ALIVE) {
        report("cuEventDestroy twice");
        return end(CUDA_ERROR_INVALID_HANDLE);
    }
    event->magic = DEAD;
    count.events--;
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuEventRecord(CUevent event, CUstream stream) {
    BEGIN_IN_CONTEXT;
    if (!(stream = checked(stream, __func__))) return end(CUDA_ERROR_INVALID_HANDLE);
    return end(enqueue(stream, (Op){.kind = RECORD, .event = event}));
}

EXPORT CUresult cuEventSynchronize(CUevent event) {
    BEGIN_IN_CONTEXT;
    for (CUstream stream = streams; stream && event->pending; stream = stream->next) drain(stream);
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuEventQuery(CUevent event) {
    BEGIN_IN_CONTEXT;
    return end(event->pending ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS);
}

EXPORT CUresult cuEventElapsedTime(float *milliseconds, CUevent from, CUevent to) {
    BEGIN_IN_CONTEXT;
    if (!from->recorded || !to->recorded) return end(CUDA_ERROR_INVALID_HANDLE);
    if (from->pending || to->pending) return end(CUDA_ERROR_NOT_READY);
    *milliseconds = (float)(to->time - from->time);
    return end(CUDA_SUCCESS);
}

/* Graphs. */

EXPORT CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
    BEGIN_IN_CONTEXT;
    if (!stream || !(stream = checked(stream, __func__)) || stream->capture)
        return end(CUDA_ERROR_ILLEGAL_STATE);
    stream->capture = 1;
    stream->mode = mode;
    stream->capturer = pthread_self();
    stream->graph = calloc(1, sizeof *stream->graph);
    stream->graph->magic = ALIVE;
    count.captures++;
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    BEGIN_IN_CONTEXT;
    *status = stream->capture == 0   ? CU_STREAM_CAPTURE_STATUS_NONE
              : stream->capture == 1 ? CU_STREAM_CAPTURE_STATUS_ACTIVE
                                     : CU_STREAM_CAPTURE_STATUS_INVALIDATED;
    return end(CUDA_SUCCESS);
}

/* When made to fail it still ends the capture, as the real one does. */
EXPORT CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph) {
    CUresult result;
    int fine = begin(__func__, &result);
    if (!fine) pthread_mutex_lock(&mutex);
    *graph = NULL;
    if (!stream->capture) return end(CUDA_ERROR_ILLEGAL_STATE);
    if (fine && stream->capture == 2) result = CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    stream->capture = 0;
    if (result) return end(result);
    *graph = stream->graph;
    count.graphs++;
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuGraphInstantiate(CUgraphExec *exec, CUgraph graph, unsigned long long flags) {
    (void)flags;
    BEGIN_IN_CONTEXT;
    if (graph->magic != ALIVE) return end(CUDA_ERROR_INVALID_HANDLE);
    *exec = calloc(1, sizeof **exec);
    (*exec)->magic = ALIVE;
    (*exec)->ops = copy_ops(graph->ops);
    count.graph_execs++;
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuGraphDestroy(CUgraph graph) {
    pthread_mutex_lock(&mutex);
    if (graph->magic != ALIVE) {
        report("cuGraphDestroy twice");
        return end(CUDA_ERROR_INVALID_HANDLE);
    }
    graph->magic = DEAD;
    count.graphs--;
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuGraphExecDestroy(CUgraphExec exec) {
    pthread_mutex_lock(&mutex);
    if (exec->magic != ALIVE) {
        report("cuGraphExecDestroy twice");
        return end(CUDA_ERROR_INVALID_HANDLE);
    }
    exec->magic = DEAD;
    count.graph_execs--;
    return end(CUDA_SUCCESS);
}

EXPORT CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream) {
    BEGIN_IN_CONTEXT;
    if (!(stream = checked(stream, __func__))) return end(CUDA_ERROR_INVALID_HANDLE);
    if (exec->magic != ALIVE) {
        report("cuGraphLaunch of a graph that was destroyed");
        return end(CUDA_ERROR_INVALID_HANDLE);
    }
    count.launches++;
    append(&stream->queue, copy_ops(exec->ops));
    return end(CUDA_SUCCESS);
}

/* How cuda-python finds functions, and error texts. */

EXPORT CUresult cuGetProcAddress(const char *symbol, void **function, int version, cuuint64_t flags,
                                 CUdriverProcAddressQueryResult *status) {
    static const char *const suffixes[] = {"_v4", "_v3", "_v2", ""};
    (void)version, (void)flags;
    Dl_info self;
    dladdr((void *)(uintptr_t)&cuGetProcAddress, &self);
    void *library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    *function = NULL;
    if (!strcmp(symbol, "cuGraphInstantiate")) symbol = "cuGraphInstantiateWithFlags";
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes && !*function; i++) {
        char name[128];
        snprintf(name, sizeof name, "%s%s", symbol, suffixes[i]);
        *function = dlsym(library, name);
    }
    if (status)
        *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

EXPORT CUresult cuGetErrorString(CUresult code, const char **text) {
    *text = code == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "a simulated failure";
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorName(CUresult code, const char **text) {
    (void)code;
    *text = "CUDA_ERROR_SIMULATED";
    return CUDA_SUCCESS;
}

/* For the tests. */

static long queued(void) {
    long number = 0;
    for (CUstream stream = streams; stream; stream = stream->next)
        for (const Op *op = stream->queue; op; op = op->next) number++;
    return number;
}

EXPORT long simulated_count(const char *name) {
    pthread_mutex_lock(&mutex);
    long value = !strcmp(name, "calls")              ? count.calls
                 : !strcmp(name, "errors")           ? count.errors
                 : !strcmp(name, "allocations")      ? count.allocations
                 : !strcmp(name, "host_allocations") ? count.host_allocations
                 : !strcmp(name, "streams")          ? count.streams
                 : !strcmp(name, "events")           ? count.events
                 : !strcmp(name, "graphs")           ? count.graphs
                 : !strcmp(name, "graph_execs")      ? count.graph_execs
                 : !strcmp(name, "launches")         ? count.launches
                 : !strcmp(name, "host_calls")       ? count.host_calls
                 : !strcmp(name, "copies")           ? count.copies
                 : !strcmp(name, "captures")         ? count.captures
                 : !strcmp(name, "used")             ? (long)memory_used
                 : !strcmp(name, "retains")          ? contexts[0].retains
                 : !strcmp(name, "queued")           ? queued()
                 : !strcmp(name, "depth")            ? depth
                                                     : -1;
    pthread_mutex_unlock(&mutex);
    return value;
}

EXPORT const char *simulated_last_error(void) { return last_error; }
EXPORT const char *simulated_failed_call(void) { return failed_call; }
EXPORT void simulated_set_memory(size_t bytes) { memory_total = bytes; }
EXPORT void simulated_set_integrated(int value) { integrated = value; }

EXPORT void simulated_forget_errors(void) {
    pthread_mutex_lock(&mutex);
    count.errors = 0;
    last_error[0] = 0;
    pthread_mutex_unlock(&mutex);
}

/* The call number ``after`` from now fails with ``code``; 0: none. */
EXPORT void simulated_fail(long after, int code) {
    pthread_mutex_lock(&mutex);
    failed_call[0] = 0;
    count.fail_at = after ? count.calls + after : 0;
    count.fail_code = code;
    pthread_mutex_unlock(&mutex);
}

/* What lies behind device memory, for the simulated TensorRT; NULL and an error when it is not
 * allocated. */
EXPORT void *simulated_backing(uintptr_t address, size_t size) {
    pthread_mutex_lock(&mutex);
    Range *range = find_device(address, size);
    if (!range) report("a kernel touches %zu bytes at %p, out of bounds", size, (void *)address);
    void *pointer = range ? range->host + (address - range->device) : NULL;
    pthread_mutex_unlock(&mutex);
    return pointer;
}

EXPORT void simulated_report(const char *text) {
    pthread_mutex_lock(&mutex);
    report("%s", text);
    pthread_mutex_unlock(&mutex);
}
