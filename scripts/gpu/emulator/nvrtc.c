// NVIDIA's run-time compiler in software: a kernel's source becomes a library of the host, kept by its hash. Built as
// libnvrtc.so.
//   EMULATOR            this folder
//   EMULATED_CACHE      where sources and libraries are kept
//   EMULATED_COMPILES   so many are compiled, later ones are kernels that do nothing (see EMULATED_RUNS)
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, COMPILATION = 6 };
typedef struct {
    char *source, log[512], path[256];
    int none;
} Program;

int nvrtcVersion(int *major, int *minor) { return *major = 12, *minor = 9, SUCCESS; }
const char *nvrtcGetErrorString(int error) { return "emulated"; }
int nvrtcCreateProgram(Program **p, const char *source, const char *name, int n, const char *const *headers,
                       const char *const *names) {
    *p = calloc(1, sizeof **p);
    (*p)->source = strdup(source);
    return SUCCESS;
}
int nvrtcDestroyProgram(Program **p) {
    free((*p)->source);
    free(*p);
    return SUCCESS;
}
int nvrtcCompileProgram(Program *p, int n, const char *const *options) {
    static long compiled;
    const char *compiles = getenv("EMULATED_COMPILES");
    char name[300], command[1000];
    uint64_t hash = 14695981039346656037u; // FNV-1a
    for (const char *c = p->source; *c; c++) hash = (hash ^ (unsigned char)*c) * 1099511628211u;
    snprintf(p->path, sizeof p->path, "%s/%016lx", getenv("EMULATED_CACHE"), hash);
    p->none = compiles && compiled++ >= atol(compiles);
    snprintf(name, sizeof name, "%s.so", p->path);
    if (!p->none && !access(name, R_OK)) return SUCCESS;
    snprintf(name, sizeof name, "%s.cu", p->path);
    FILE *file = fopen(name, "w");
    if (!file) return COMPILATION;
    fputs(p->source, file);
    fclose(file);
    snprintf(command, sizeof command, "LD_LIBRARY_PATH= %s/compile %s", getenv("EMULATOR"), p->path);
    if (p->none || !system(command)) return SUCCESS;
    snprintf(p->log, sizeof p->log, "see %s.log", p->path);
    fprintf(stderr, "emulator: %s\n", p->log);
    return COMPILATION;
}
int nvrtcGetProgramLogSize(Program *p, size_t *n) { return *n = strlen(p->log) + 1, SUCCESS; }
int nvrtcGetProgramLog(Program *p, char *to) { return strcpy(to, p->log), SUCCESS; }
int nvrtcGetPTXSize(Program *p, size_t *n) { return *n = strlen(p->path) + 9, SUCCESS; }
int nvrtcGetPTX(Program *p, char *to) {
    sprintf(to, p->none ? "NONE:%s" : "HOST:%s.so", p->path);
    return SUCCESS;
}
