// What a kernel in CUDA C++ sees of the device, on the host: the threads of a block are fibers of one thread
// (fibers.cpp); a warp's operations exchange values between barriers of the warp.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <tuple>
using std::min;
using std::max;
using std::isnan;
using std::isinf;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
#define __align__(n) alignas(n)

#include <cuda_fp16.h>
#include <cuda_bf16.h>

namespace emu {
struct Dim { unsigned x, y, z; };
struct Fiber { void *sp; Dim tid; unsigned linear; bool done; };
struct Warp { unsigned arrived, generation, alive; uint64_t slots[32][4]; alignas(64) unsigned char matrix[3][32 * 128]; };
extern Fiber *current;
extern Dim block_idx, block_dim, grid_dim;
extern char *shared;
void sync_threads();
void sync_warp();
Warp &warp();
void yield();
inline unsigned lane() { return current->linear % 32; }

template <class T> T shuffle(T value, unsigned from) {
    static_assert(sizeof(T) <= 32, "");
    Warp &w = warp();
    memcpy(w.slots[lane()], &value, sizeof(T));
    sync_warp();
    T out;
    memcpy(&out, w.slots[from % 32], sizeof(T));
    sync_warp();
    return out;
}
inline unsigned ballot(bool p) {
    unsigned out = 0;
    Warp &w = warp();
    w.slots[lane()][0] = p;
    sync_warp();
    for (unsigned i = 0; i < 32; i++) out |= unsigned(w.slots[i][0] & 1) << i;
    sync_warp();
    return out;
}
template <class T> float number(T x) { return float(x); }
template <> inline float number(__nv_bfloat16 x) { return __bfloat162float(x); }
template <> inline float number(__half x) { return __half2float(x); }
template <class T> T bits(uint32_t x, unsigned i) {
    T out;
    memcpy(&out, (char *)&x + i * sizeof(T), sizeof(T));
    return out;
}
template <class T> uint32_t word(T x) { static_assert(sizeof(T) == 4, ""); uint32_t y; memcpy(&y, &x, 4); return y; }

// PTX's mma.sync.m16n8kK.row.col with f32 sums.
template <class T, unsigned K, class... In> void mma(std::tuple<float &, float &, float &, float &> out, In... in) {
    constexpr unsigned per = 4 / sizeof(T), NA = 16 * K / 32 / per, NB = 8 * K / 32 / per;
    static_assert(sizeof...(In) == NA + NB + 4, "");
    uint32_t r[] = {word(in)...};
    Warp &w = warp();
    T *a = (T *)w.matrix[0], *b = (T *)w.matrix[1];
    unsigned g = lane() / 4, t = lane() % 4;
    for (unsigned i = 0; i < NA; i++)
        for (unsigned j = 0; j < per; j++) a[(g + 8 * (i % 2)) * K + t * per + j + (i / 2) * 4 * per] = bits<T>(r[i], j);
    for (unsigned i = 0; i < NB; i++)
        for (unsigned j = 0; j < per; j++) b[g * K + t * per + j + i * 4 * per] = bits<T>(r[NA + i], j);
    sync_warp();
    float d[4];
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = g + 8 * (i / 2), col = t * 2 + i % 2;
        float c;
        memcpy(&c, &r[NA + NB + i], 4);
        for (unsigned k = 0; k < K; k++) c += number(a[row * K + k]) * number(b[col * K + k]);
        d[i] = c;
    }
    sync_warp();
    std::get<0>(out) = d[0], std::get<1>(out) = d[1], std::get<2>(out) = d[2], std::get<3>(out) = d[3];
}
// PTX's ldmatrix.m8n8.xN.b16: lane i has the address of row i.
template <bool TRANS, class... Out> void ldmatrix(uint64_t address, Out &...out) {
    constexpr unsigned N = sizeof...(Out);
    Warp &w = warp();
    w.slots[lane()][0] = address;
    sync_warp();
    uint32_t r[N];
    for (unsigned m = 0; m < N; m++) {
        uint16_t pair[2];
        for (unsigned j = 0; j < 2; j++) {
            unsigned row = lane() / 4, col = lane() % 4 * 2 + j;
            if (TRANS) std::swap(row, col);
            pair[j] = ((const uint16_t *)w.slots[m * 8 + row][0])[col];
        }
        memcpy(&r[m], pair, 4);
    }
    sync_warp();
    unsigned m = 0;
    (void)std::initializer_list<int>{(memcpy(&out, &r[m++], 4), 0)...};
}
template <bool TRANS, class... In> void stmatrix(uint64_t address, In... in) {
    constexpr unsigned N = sizeof...(In);
    uint32_t r[] = {word(in)...};
    Warp &w = warp();
    w.slots[lane()][0] = address;
    sync_warp();
    for (unsigned m = 0; m < N; m++) {
        uint16_t pair[2];
        memcpy(pair, &r[m], 4);
        for (unsigned j = 0; j < 2; j++) {
            unsigned row = lane() / 4, col = lane() % 4 * 2 + j;
            if (TRANS) std::swap(row, col);
            ((uint16_t *)w.slots[m * 8 + row][0])[col] = pair[j];
        }
    }
    sync_warp();
}
template <class T, class P, class V> T atomic_add(P p, V v) { T old = *(T *)(uintptr_t)p; *(T *)(uintptr_t)p = old + (T)v; return old; }
template <class T, class P, class V> T atomic_max(P p, V v) { T old = *(T *)(uintptr_t)p; *(T *)(uintptr_t)p = old > (T)v ? old : (T)v; return old; }
template <class T, class P, class V> T atomic_min(P p, V v) { T old = *(T *)(uintptr_t)p; *(T *)(uintptr_t)p = old < (T)v ? old : (T)v; return old; }
} // namespace emu

#define threadIdx (emu::current->tid)
#define blockIdx (emu::block_idx)
#define blockDim (emu::block_dim)
#define gridDim (emu::grid_dim)
static const int warpSize = 32;
inline void __syncthreads() { emu::sync_threads(); }
inline void __syncwarp(unsigned = 0) { emu::sync_warp(); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline unsigned __activemask() { return ~0u; }
template <class T> T __shfl_sync(unsigned, T v, int lane) { return emu::shuffle(v, lane); }
template <class T> T __shfl_xor_sync(unsigned, T v, int mask) { return emu::shuffle(v, emu::lane() ^ mask); }
template <class T> T __shfl_up_sync(unsigned, T v, unsigned d) { return emu::shuffle(v, emu::lane() >= d ? emu::lane() - d : emu::lane()); }
template <class T> T __shfl_down_sync(unsigned, T v, unsigned d) { return emu::shuffle(v, emu::lane() + d < 32 ? emu::lane() + d : emu::lane()); }
inline unsigned __ballot_sync(unsigned, int p) { return emu::ballot(p); }
inline int __any_sync(unsigned, int p) { return emu::ballot(p) != 0; }
inline int __all_sync(unsigned, int p) { return emu::ballot(p) == ~0u; }
inline unsigned __cvta_generic_to_shared(const void *p) { return (unsigned)(uintptr_t)p; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return 1 / sqrtf(a); }
inline float rsqrtf(float a) { return 1 / sqrtf(a); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __sinf(float a) { return sinf(a); }
inline float __cosf(float a) { return cosf(a); }
inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t(a) * b) >> 32; }
template <class T> T atomicAdd(T *p, T v) { T old = *p; *p = old + v; return old; }
template <class T> T atomicMax(T *p, T v) { T old = *p; *p = old > v ? old : v; return old; }
template <class T> T atomicMin(T *p, T v) { T old = *p; *p = old < v ? old : v; return old; }
template <class T> T atomicExch(T *p, T v) { T old = *p; *p = v; return old; }
template <class T> T atomicCAS(T *p, T c, T v) { T old = *p; if (old == c) *p = v; return old; }
template <class T> T atomicOr(T *p, T v) { T old = *p; *p = old | v; return old; }

namespace nvcuda { namespace wmma {
struct matrix_a; struct matrix_b; struct accumulator; struct row_major; struct col_major;
namespace precision { struct tf32; }
enum layout_t { mem_row_major, mem_col_major };
template <class T> struct Stored { using type = T; };
template <> struct Stored<precision::tf32> { using type = float; };
inline float __float_to_tf32(float x) { uint32_t y; memcpy(&y, &x, 4); y = (y + 0x1000) & 0xffffe000; memcpy(&x, &y, 4); return x; }
template <class U, int M, int N, int K, class T, class L = void> struct fragment {
    static constexpr int rows = std::is_same<U, matrix_b>::value ? K : M, cols = std::is_same<U, matrix_a>::value ? K : N;
    static constexpr int num_elements = rows * cols / 32;
    typename Stored<T>::type x[num_elements];
    using Layout = L;
};
template <class F, class S> void load(F &f, const S *p, unsigned ld, bool row) {
    for (int e = 0; e < F::num_elements; e++) {
        int i = e * 32 + emu::lane(), r = i / F::cols, c = i % F::cols;
        f.x[e] = row ? p[r * ld + c] : p[c * ld + r];
    }
    emu::sync_warp();
}
template <class U, int M, int N, int K, class T, class L, class S> void load_matrix_sync(fragment<U, M, N, K, T, L> &f, const S *p, unsigned ld) {
    load(f, p, ld, std::is_same<L, row_major>::value);
}
template <class U, int M, int N, int K, class T, class L, class S> void load_matrix_sync(fragment<U, M, N, K, T, L> &f, const S *p, unsigned ld, layout_t l) {
    load(f, p, ld, l == mem_row_major);
}
template <class F, class S> void store_matrix_sync(S *p, const F &f, unsigned ld, layout_t l) {
    for (int e = 0; e < F::num_elements; e++) {
        int i = e * 32 + emu::lane(), r = i / F::cols, c = i % F::cols;
        (l == mem_row_major ? p[r * ld + c] : p[c * ld + r]) = f.x[e];
    }
    emu::sync_warp();
}
template <class F, class S> void fill_fragment(F &f, S v) { for (auto &x : f.x) x = v; }
template <int M, int N, int K, class D, class A, class LA, class B, class LB, class C>
void mma_sync(fragment<accumulator, M, N, K, D> &d, const fragment<matrix_a, M, N, K, A, LA> &a, const fragment<matrix_b, M, N, K, B, LB> &b,
              const fragment<accumulator, M, N, K, C> &c) {
    emu::Warp &w = emu::warp();
    auto *pa = (typename Stored<A>::type *)w.matrix[0];
    auto *pb = (typename Stored<B>::type *)w.matrix[1];
    for (int e = 0; e < a.num_elements; e++) pa[e * 32 + emu::lane()] = a.x[e];
    for (int e = 0; e < b.num_elements; e++) pb[e * 32 + emu::lane()] = b.x[e];
    emu::sync_warp();
    for (int e = 0; e < d.num_elements; e++) {
        int i = e * 32 + emu::lane(), r = i / N, col = i % N;
        float sum = emu::number(c.x[e]);
        for (int k = 0; k < K; k++) sum += emu::number(pa[r * K + k]) * emu::number(pb[k * N + col]);
        d.x[e] = sum;
    }
    emu::sync_warp();
}
}} // namespace nvcuda::wmma

// Hopper's barriers and bulk copies; a copy is done at once.
namespace cuda {
enum thread_scope { thread_scope_block };
template <thread_scope> struct barrier {
    int32_t bytes;
    uint32_t pending : 12, expected : 12, phase : 1;
    using arrival_token = uint32_t;
    void settle() { if (!pending && !bytes) phase ^= 1, pending = expected; }
    arrival_token arrive(uint32_t n = 1) { arrival_token now = phase; pending -= n; settle(); return now; }
    void wait_parity(uint32_t parity) { while (phase == parity) emu::yield(); }
    void wait(arrival_token token) { while (phase == token) emu::yield(); }
    void arrive_and_wait() { wait(arrive()); }
};
static_assert(sizeof(barrier<thread_scope_block>) == 8, "");
inline void init(barrier<thread_scope_block> *b, uint32_t n) { b->bytes = 0, b->pending = b->expected = n, b->phase = 0; }
namespace device {
using Barrier = barrier<thread_scope_block>;
inline uint32_t barrier_arrive_tx(Barrier &b, uint32_t n, int32_t bytes) { b.bytes += bytes; return b.arrive(n); }
inline void barrier_expect_tx(Barrier &b, int32_t bytes) { b.bytes += bytes; }
namespace experimental {
inline void fence_proxy_async_shared_cta() {}
struct Map { // as the driver writes it
    uint64_t address, rank, dims[5], strides[5];
    uint32_t box[5];
    uint32_t element, swizzle;
};
template <class M> void bulk(void *to, const M *map, const int *at, Barrier &b) {
    const Map &m = *(const Map *)map;
    uint64_t n = 1;
    for (unsigned d = 0; d < m.rank; d++) n *= m.box[d];
    for (uint64_t i = 0; i < n; i++) {
        uint64_t rest = i, from = m.address;
        bool inside = true;
        for (unsigned d = 0; d < m.rank; d++) {
            int64_t c = at[d] + int64_t(rest % m.box[d]);
            rest /= m.box[d];
            inside &= c >= 0 && c < (int64_t)m.dims[d];
            from += c * (d ? m.strides[d - 1] : m.element);
        }
        uint64_t place = (uint64_t)to + i * m.element;
        if (m.swizzle == 1) place ^= (place >> 7 & 1) << 4;
        if (m.swizzle == 2) place ^= (place >> 7 & 3) << 4;
        if (m.swizzle == 3) place ^= (place >> 7 & 7) << 4;
        if (inside) memcpy((void *)place, (void *)from, m.element);
        else memset((void *)place, 0, m.element);
    }
    b.bytes -= n * m.element;
    b.settle();
}
template <class M> void cp_async_bulk_tensor_2d_global_to_shared(void *to, const M *m, int a, int b, Barrier &bar) { int at[] = {a, b}; bulk(to, m, at, bar); }
template <class M> void cp_async_bulk_tensor_3d_global_to_shared(void *to, const M *m, int a, int b, int c, Barrier &bar) { int at[] = {a, b, c}; bulk(to, m, at, bar); }
} // namespace experimental
} // namespace device
} // namespace cuda

// A kernel by its signature.
namespace emu {
template <class... A, size_t... I> void call(void (*f)(A...), void **params, std::index_sequence<I...>) {
    f(*(typename std::remove_const<typename std::remove_reference<A>::type>::type *)params[I]...);
}
template <class... A> struct Sizes { static const unsigned value[sizeof...(A) + 1]; };
template <class... A> const unsigned Sizes<A...>::value[] = {unsigned(sizeof(A))..., 0};
template <class... A> const unsigned *sizes(void (*)(A...)) { return Sizes<A...>::value; }
template <class... A> void invoke(void (*f)(A...), void **params) { call(f, params, std::index_sequence_for<A...>{}); }
} // namespace emu
