// CUDA's driver in software, as far as cubecl calls it: memory is the host's, a stream's work is done at once, a
// graph is a list of calls. Built as libcuda.so.1.
//   EMULATED_ARCH    what the device says it is: 80, 90 (by default)
//   EMULATED_MEMORY  bytes that it has (140 GiB)
//   EMULATED_LOST    after so many launches the device is lost
//   EMULATED_TRACE   set: every launch is printed
//   EMULATED_RUNS    so many launches run, later ones do nothing: what is left is the host's time
#define _GNU_SOURCE
#include <dlfcn.h>
#include <limits.h>
#include <malloc.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef uint64_t Ptr;
enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_FOUND = 500, NO_BINARY = 209, OUT_OF_MEMORY = 2, LAUNCH_FAILED = 719 };

typedef int (*Entry)(const unsigned *grid, const unsigned *block, unsigned shared, void **params);
typedef struct {
    Entry entry; // null: nothing runs
    const unsigned *sizes; // of the parameters, ends with 0
    char *name;
} Function;
typedef struct {
    void *lib;
    char name[64];
} Module;
typedef struct Op {
    struct Op *next;
    enum { LAUNCH, COPY, SET } kind;
    Function *f;
    unsigned grid[3], block[3], shared;
    void **params;
    void *to;
    const void *from;
    size_t bytes;
    int value;
} Op;
typedef struct {
    Op *first, **last;
    size_t n;
} Graph;
typedef struct {
    Graph *capture;
} Stream;

static Stream none;
static int arch = 90, traced;
static long runs = LONG_MAX, lost = LONG_MAX;
static size_t memory = (size_t)140 << 30, used;
__attribute__((constructor)) static void settings(void) {
    const char *text;
    if ((text = getenv("EMULATED_ARCH"))) arch = atoi(text);
    if ((text = getenv("EMULATED_RUNS"))) runs = atol(text);
    if ((text = getenv("EMULATED_LOST"))) lost = atol(text);
    if ((text = getenv("EMULATED_MEMORY"))) memory = strtoull(text, 0, 10);
    traced = getenv("EMULATED_TRACE") != 0;
}
static Stream *of(void *s) { return s ? (Stream *)s : &none; }
static void record(Graph *g, Op op) {
    Op *new = malloc(sizeof *new);
    *new = op;
    new->next = 0;
    *g->last = new;
    g->last = &new->next;
    g->n++;
}
static void run(const Op *op) {
    static long done;
    switch (op->kind) {
    case LAUNCH:
        if (op->f->entry && done++ < runs) op->f->entry(op->grid, op->block, op->shared, op->params);
        break;
    case COPY: memmove(op->to, op->from, op->bytes); break;
    case SET: memset(op->to, op->value, op->bytes); break;
    }
}
static int is_lost;
static CUresult submit(void *stream, Op op) {
    static long submitted;
    Stream *s = of(stream);
    if (op.kind == LAUNCH && submitted++ >= lost) is_lost = 1;
    if (is_lost) return LAUNCH_FAILED;
    if (s->capture) record(s->capture, op);
    else run(&op);
    return SUCCESS;
}

CUresult cuGetExportTable(const void **t, const void *id) { *t = 0; return NOT_FOUND; }
CUresult cuInit(unsigned flags) { return SUCCESS; }
CUresult cuDriverGetVersion(int *v) { *v = 12090; return SUCCESS; }
CUresult cuDeviceGetCount(int *n) { *n = 1; return SUCCESS; }
CUresult cuDeviceGet(int *d, int i) { *d = i; return i == 0 ? SUCCESS : 101; }
CUresult cuDeviceGetName(char *name, int len, int d) { snprintf(name, len, "NVIDIA H200 (emulated)"); return SUCCESS; }
CUresult cuDeviceGetUuid(char *u, int d) { memset(u, 1, 16); return SUCCESS; }
CUresult cuDeviceGetUuid_v2(char *u, int d) { memset(u, 1, 16); return SUCCESS; }
CUresult cuDeviceGetPCIBusId(char *id, int len, int d) { snprintf(id, len, "0000:01:00.0"); return SUCCESS; }
CUresult cuDeviceTotalMem_v2(size_t *b, int d) { *b = memory; return SUCCESS; }
CUresult cuDeviceGetAttribute(int *v, int a, int d) {
    switch (a) {
    case 75: *v = arch / 10; break;
    case 76: *v = arch % 10; break;
    case 10: *v = 32; break; // warp
    case 97: *v = 227 * 1024; break; // shared, opt in
    case 8: *v = 48 * 1024; break;
    case 1: case 2: case 3: *v = 1024; break;
    case 4: *v = 64; break;
    case 5: *v = 2147483647; break;
    case 6: case 7: *v = 65535; break;
    case 16: *v = 132; break;
    default: *v = 1;
    }
    return SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)0x1000; return SUCCESS; }
CUresult cuDevicePrimaryCtxRelease_v2(int d) { return SUCCESS; }
CUresult cuCtxSetCurrent(void *c) { return SUCCESS; }
CUresult cuCtxGetCurrent(void **c) { *c = (void *)0x1000; return SUCCESS; }
CUresult cuCtxSynchronize(void) { return is_lost ? LAUNCH_FAILED : SUCCESS; }
CUresult cuCtxGetStreamPriorityRange(int *l, int *g) { *l = *g = 0; return SUCCESS; }
CUresult cuMemGetInfo_v2(size_t *f, size_t *t) { *t = memory; *f = memory > used ? memory - used : 0; return SUCCESS; }
CUresult cuGetErrorName(int e, const char **s) { *s = "emulated"; return SUCCESS; }
CUresult cuGetErrorString(int e, const char **s) { *s = "emulated"; return SUCCESS; }

CUresult cuStreamCreate(void **s, unsigned f) { *s = calloc(1, sizeof(Stream)); return SUCCESS; }
CUresult cuStreamCreateWithPriority(void **s, unsigned f, int p) { return cuStreamCreate(s, f); }
CUresult cuStreamDestroy_v2(void *s) { free(s); return SUCCESS; }
CUresult cuStreamSynchronize(void *s) { return is_lost ? LAUNCH_FAILED : SUCCESS; }
CUresult cuStreamWaitEvent(void *s, void *e, unsigned f) { return SUCCESS; }
CUresult cuStreamQuery(void *s) { return SUCCESS; }
CUresult cuEventCreate(void **e, unsigned f) { *e = malloc(8); return SUCCESS; }
CUresult cuEventDestroy_v2(void *e) { free(e); return SUCCESS; }
CUresult cuEventRecord(void *e, void *s) { return is_lost ? LAUNCH_FAILED : SUCCESS; }
CUresult cuEventSynchronize(void *e) { return is_lost ? LAUNCH_FAILED : SUCCESS; }
CUresult cuEventQuery(void *e) { return SUCCESS; }
CUresult cuEventElapsedTime_v2(float *ms, void *a, void *b) { *ms = 0.001f; return SUCCESS; }
CUresult cuEventElapsedTime(float *ms, void *a, void *b) { *ms = 0.001f; return SUCCESS; }

CUresult cuMemAlloc_v2(Ptr *p, size_t n) {
    void *m;
    if (used + n > memory || posix_memalign(&m, 512, n)) return OUT_OF_MEMORY;
    *p = (Ptr)m;
    __atomic_fetch_add(&used, malloc_usable_size(m), __ATOMIC_RELAXED);
    return SUCCESS;
}
CUresult cuMemAllocAsync(Ptr *p, size_t n, void *s) { return cuMemAlloc_v2(p, n); }
CUresult cuMemFree_v2(Ptr p) {
    __atomic_fetch_sub(&used, malloc_usable_size((void *)p), __ATOMIC_RELAXED);
    free((void *)p);
    return SUCCESS;
}
CUresult cuMemFreeAsync(Ptr p, void *s) { return cuMemFree_v2(p); }
CUresult cuMemAllocHost_v2(void **p, size_t n) { return posix_memalign(p, 512, n) ? OUT_OF_MEMORY : SUCCESS; }
CUresult cuMemFreeHost(void *p) { free(p); return SUCCESS; }
static CUresult copy(void *to, const void *from, size_t n, void *s) {
    return submit(s, (Op){.kind = COPY, .to = to, .from = from, .bytes = n});
}
CUresult cuMemcpyHtoDAsync_v2(Ptr to, const void *from, size_t n, void *s) { return copy((void *)to, from, n, s); }
CUresult cuMemcpyDtoHAsync_v2(void *to, Ptr from, size_t n, void *s) { return copy(to, (void *)from, n, s); }
CUresult cuMemcpyDtoDAsync_v2(Ptr to, Ptr from, size_t n, void *s) { return copy((void *)to, (void *)from, n, s); }
CUresult cuMemsetD8Async(Ptr to, unsigned char v, size_t n, void *s) {
    return submit(s, (Op){.kind = SET, .to = (void *)to, .bytes = n, .value = v});
}
typedef struct {
    size_t srcX, srcY;
    int srcType;
    const void *srcHost;
    Ptr srcDevice;
    void *srcArray;
    size_t srcPitch, dstX, dstY;
    int dstType;
    void *dstHost;
    Ptr dstDevice;
    void *dstArray;
    size_t dstPitch, width, height;
} Copy2d;
CUresult cuMemcpy2DAsync_v2(const Copy2d *c, void *s) {
    const char *from = c->srcType == 1 ? c->srcHost : (void *)c->srcDevice;
    char *to = c->dstType == 1 ? c->dstHost : (void *)c->dstDevice;
    for (size_t y = 0; y < c->height; y++)
        copy(to + (c->dstY + y) * c->dstPitch + c->dstX, from + (c->srcY + y) * c->srcPitch + c->srcX, c->width, s);
    return SUCCESS;
}

CUresult cuModuleLoadData(void **m, const char *data) {
    Module *module = calloc(1, sizeof *module);
    if (!strncmp(data, "HOST:", 5)) {
        module->lib = dlopen(data + 5, RTLD_NOW | RTLD_LOCAL);
        if (!module->lib) {
            fprintf(stderr, "%s\n", dlerror());
            return NO_BINARY;
        }
    }
    *m = module;
    return SUCCESS;
}
CUresult cuModuleUnload(void *m) { return SUCCESS; }
CUresult cuModuleGetFunction(void **f, void *m, const char *name) {
    Module *module = m;
    Function *function = calloc(1, sizeof *function);
    function->name = strdup(name);
    if (module->lib) {
        function->entry = (Entry)dlsym(module->lib, "emulated_entry");
        const unsigned *(*sizes)(void) = dlsym(module->lib, "emulated_sizes");
        if (sizes) function->sizes = sizes();
        if (!function->entry || !function->sizes) return NOT_FOUND;
    }
    *f = function;
    return SUCCESS;
}
CUresult cuFuncSetAttribute(void *f, int a, int v) { return SUCCESS; }
CUresult cuFuncGetAttribute(int *v, int a, void *f) { *v = 0; return SUCCESS; }
CUresult cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                        void *stream, void **params, void **extra) {
    Function *function = f;
    Op op = {.kind = LAUNCH, .f = function, .grid = {gx, gy, gz}, .block = {bx, by, bz}, .shared = shared, .params = params};
    if (traced)
        fprintf(stderr, "%s %u %u %u%s\n", function->name, gx, gy, gz, of(stream)->capture ? ", recorded" : "");
    if (!gx || !gy || !gz || gy > 65535 || gz > 65535) return INVALID_VALUE;
    Stream *s = of(stream);
    if (s->capture && function->sizes) {
        unsigned n = 0;
        while (function->sizes[n]) n++;
        op.params = calloc(n + 1, sizeof(void *));
        for (unsigned i = 0; i < n; i++) {
            if (posix_memalign(&op.params[i], 128, function->sizes[i])) return OUT_OF_MEMORY;
            memcpy(op.params[i], params[i], function->sizes[i]);
        }
    }
    return submit(stream, op);
}

CUresult cuStreamBeginCapture_v2(void *s, int mode) {
    Graph *g = calloc(1, sizeof *g);
    g->last = &g->first;
    of(s)->capture = g;
    return SUCCESS;
}
CUresult cuStreamEndCapture(void *s, void **g) {
    *g = of(s)->capture;
    of(s)->capture = 0;
    return SUCCESS;
}
CUresult cuGraphGetNodes(void *g, void **nodes, size_t *n) {
    size_t i = 0;
    if (nodes)
        for (Op *op = ((Graph *)g)->first; op && i < *n; op = op->next) nodes[i++] = op;
    *n = ((Graph *)g)->n;
    return SUCCESS;
}
CUresult cuGraphNodeGetType(void *node, int *type) { *type = ((Op *)node)->kind; return SUCCESS; }
CUresult cuGraphInstantiateWithFlags(void **exec, void *g, unsigned long long flags) { *exec = g; return SUCCESS; }
CUresult cuGraphInstantiate_v2(void **exec, void *g, unsigned long long flags) { *exec = g; return SUCCESS; }
CUresult cuGraphDestroy(void *g) { return SUCCESS; } // the executable is the graph
CUresult cuGraphExecDestroy(void *g) { return SUCCESS; }
CUresult cuGraphUpload(void *g, void *s) { return SUCCESS; }
CUresult cuGraphLaunch(void *g, void *s) {
    if (is_lost) return LAUNCH_FAILED;
    if (traced) fprintf(stderr, "graph of %zu\n", ((Graph *)g)->n);
    for (Op *op = ((Graph *)g)->first; op; op = op->next) run(op);
    return SUCCESS;
}
typedef struct { // as the kernels read it
    uint64_t address, rank, dims[5], strides[5];
    unsigned box[5], element, swizzle;
} Map;
CUresult cuTensorMapEncodeTiled(void *map, int dtype, unsigned rank, void *address, const uint64_t *dims, const uint64_t *strides,
                                const unsigned *box, const unsigned *element_strides, int interleave, int swizzle, int l2, int oob) {
    static const unsigned sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    _Static_assert(sizeof(Map) <= 128, "");
    Map m = {(uint64_t)address, rank, .element = sizes[dtype], .swizzle = swizzle};
    if (rank > 5 || dtype > 12 || interleave || (uint64_t)address % 16) return INVALID_VALUE;
    for (unsigned i = 0; i < rank; i++) {
        m.dims[i] = dims[i], m.box[i] = box[i];
        if (i + 1 < rank) m.strides[i] = strides[i];
        if (!box[i] || box[i] > 256 || element_strides[i] != 1 || (i + 1 < rank && strides[i] % 16)) return INVALID_VALUE;
    }
    if (box[0] * m.element % 16) return INVALID_VALUE;
    memcpy(map, &m, sizeof m);
    return SUCCESS;
}
