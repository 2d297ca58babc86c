// Fibers in the place of a block's threads, and their barriers.
#include "device.h"
#include <sys/mman.h>
#include <vector>
namespace emu {
Fiber *current;
Dim block_idx, block_dim, grid_dim;
char *shared;
static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static unsigned arrived, generation, alive;
static void *main_sp;
static void (*body)(void **);
static void **params;
static char *stacks;
static size_t stack_size, room;

extern "C" void emu_switch(void **from, void *to);
asm(R"(
.globl emu_switch
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

Warp &warp() { return warps[current->linear / 32]; }
static Fiber *next(Fiber *f) {
    unsigned n = fibers.size(), i = f->linear;
    for (unsigned k = 1; k <= n; k++) {
        Fiber &g = fibers[(i + k) % n];
        if (!g.done) return &g;
    }
    return nullptr;
}
void yield() {
    Fiber *self = current, *to = next(self);
    if (to == self) return;
    current = to;
    emu_switch(&self->sp, to->sp);
}
static void wait(unsigned &arrived, unsigned &generation, unsigned &alive) {
    unsigned g = generation;
    if (++arrived >= alive) {
        arrived = 0;
        generation++;
        return;
    }
    unsigned long spins = 0;
    while (generation == g) {
        yield();
        if (arrived >= alive) { arrived = 0; generation++; } // the others have ended
        if (++spins > 10000000) { fprintf(stderr, "emulated: a barrier that not all reach\n"); abort(); }
    }
}
void sync_threads() { wait(arrived, generation, alive); }
void sync_warp() { Warp &w = warp(); wait(w.arrived, w.generation, w.alive); }
static void start() {
    body(params);
    Fiber *self = current;
    self->done = true;
    alive--;
    warp().alive--;
    Fiber *to = next(self);
    void *unused;
    current = to;
    emu_switch(&unused, to ? to->sp : main_sp);
    __builtin_unreachable();
}
void run(const unsigned *grid, const unsigned *block, unsigned shared_bytes, void (*f)(void **), void **p) {
    unsigned n = block[0] * block[1] * block[2];
    body = f, params = p, stack_size = 256 << 10;
    if (!shared) shared = (char *)mmap(0, 256 << 10, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    if (room < n) {
        stacks = (char *)mmap(0, n * stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        room = n;
    }
    grid_dim = {grid[0], grid[1], grid[2]}, block_dim = {block[0], block[1], block[2]};
    fibers.resize(n);
    warps.resize((n + 31) / 32);
    for (unsigned z = 0; z < grid[2]; z++) for (unsigned y = 0; y < grid[1]; y++) for (unsigned x = 0; x < grid[0]; x++) {
        block_idx = {x, y, z};
        memset(shared, 0xff, shared_bytes); // NaN to whoever reads what nobody wrote
        arrived = 0, alive = n;
        for (auto &w : warps) w.arrived = 0, w.alive = 0;
        for (unsigned i = 0; i < n; i++) {
            warps[i / 32].alive++;
            uint64_t *sp = (uint64_t *)(stacks + (i + 1) * stack_size) - 2;
            *--sp = 0;
            *--sp = (uint64_t)&start;
            for (int k = 0; k < 6; k++) *--sp = 0;
            fibers[i] = {sp, {i % block[0], i / block[0] % block[1], i / block[0] / block[1]}, i, false};
        }
        current = &fibers[0];
        emu_switch(&main_sp, current->sp);
    }
}
} // namespace emu
