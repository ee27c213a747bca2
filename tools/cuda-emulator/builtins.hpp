// What CUDA C++ has built in, for kernels compiled for the processor: keywords, indices, barriers, operations of
// a warp, atomics and arithmetic. All that this project's kernels use, and their nearest kin; what is missing does
// not compile and is added here.
//
// Decision: results are those that CUDA promises. Where it promises only closeness (`__expf`, `rsqrtf`), they are
// the processor's, so results agree with a GPU's to rounding and not to the bit.
#pragma once

#include "runtime.hpp"

#include <math.h>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __constant__ static
// Each thread of the operating system runs one block, and has its own.
#define __shared__ static thread_local __attribute__((section("lnv_shared")))

using dim3 = lnv_emulator::Dim;
#define threadIdx (::lnv_emulator::self->thread)
#define blockIdx (::lnv_emulator::self->worker->index)
#define blockDim (::lnv_emulator::self->worker->launch->block)
#define gridDim (::lnv_emulator::self->worker->launch->grid)
#define warpSize 32

#define LNV_VECTOR(type, name, align2, align4)                                                                        \
    struct __align__(align2) name##2 {                                                                                \
        type x, y;                                                                                                    \
    };                                                                                                                \
    struct name##3 {                                                                                                  \
        type x, y, z;                                                                                                 \
    };                                                                                                                \
    struct __align__(align4) name##4 {                                                                                \
        type x, y, z, w;                                                                                              \
    };                                                                                                                \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                                  \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                                       \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
LNV_VECTOR(float, float, 8, 16)
LNV_VECTOR(int, int, 8, 16)
LNV_VECTOR(unsigned int, uint, 8, 16)
LNV_VECTOR(short, short, 4, 8)
LNV_VECTOR(unsigned short, ushort, 4, 8)
LNV_VECTOR(signed char, char, 2, 4)
LNV_VECTOR(unsigned char, uchar, 2, 4)
#undef LNV_VECTOR

// ---- barriers and fences ----

inline void __syncthreads() { lnv_emulator::barrier(); }
inline int __syncthreads_count(int predicate) {
    lnv_emulator::barrier(predicate != 0);
    return lnv_emulator::self->worker->barrier_result[0];
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) > 0; }
inline int __syncthreads_and(int predicate) {
    lnv_emulator::barrier(predicate != 0);
    const int *result = lnv_emulator::self->worker->barrier_result;
    return result[0] == result[1];
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) {}
inline void __trap() { lnv_emulator::fail("__trap"); }

// ---- operations of a warp ----

namespace lnv_emulator {

template <class T> struct Shuffle {
    T value, result;
    int source;
};
template <class T> void shuffle_all(uint32_t members, void *const *operands) {
    for (unsigned lane = 0; lane < LANES; lane++) {
        if (!(members >> lane & 1)) continue;
        auto &mine = *(Shuffle<T> *)operands[lane];
        if (members >> mine.source & 1) {
            mine.result = ((const Shuffle<T> *)operands[mine.source])->value;
        } else {
            memset((void *)&mine.result, 0xff, sizeof(T)); // CUDA leaves it undefined
        }
    }
}
template <class T> T shuffle(const char *name, uint32_t mask, T value, int source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    Shuffle<T> mine = {value, value, source};
    collective(name, mask, &mine, shuffle_all<T>);
    return mine.result;
}
inline int own_lane() { return (int)self->lane; }
inline void check_width(int width) {
    if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail("a shuffle's width is no power of two up to 32");
}

struct Vote {
    bool predicate;
    uint32_t ballot, members;
};
inline void vote_all(uint32_t members, void *const *operands) {
    uint32_t ballot = 0;
    for (unsigned lane = 0; lane < LANES; lane++) {
        if (members >> lane & 1 && ((const Vote *)operands[lane])->predicate) ballot |= 1u << lane;
    }
    for (unsigned lane = 0; lane < LANES; lane++) {
        if (!(members >> lane & 1)) continue;
        ((Vote *)operands[lane])->ballot = ballot;
        ((Vote *)operands[lane])->members = members;
    }
}
inline Vote vote(const char *name, uint32_t mask, bool predicate) {
    Vote mine = {predicate, 0, 0};
    collective(name, mask, &mine, vote_all);
    return mine;
}

template <class T, T (*OF_TWO)(T, T)> void reduce_all(uint32_t members, void *const *operands) {
    T all{};
    bool first = true;
    for (unsigned lane = 0; lane < LANES; lane++) {
        if (!(members >> lane & 1)) continue;
        T x = *(const T *)operands[lane];
        all = first ? x : OF_TWO(all, x);
        first = false;
    }
    for (unsigned lane = 0; lane < LANES; lane++) {
        if (members >> lane & 1) *(T *)operands[lane] = all;
    }
}
template <class T> T sum_of(T a, T b) { return (T)((uint32_t)a + (uint32_t)b); }
template <class T> T max_of(T a, T b) { return a > b ? a : b; }
template <class T> T min_of(T a, T b) { return a < b ? a : b; }
template <class T> T or_of(T a, T b) { return a | b; }
template <class T> T and_of(T a, T b) { return a & b; }

inline void nothing_all(uint32_t, void *const *) {}

} // namespace lnv_emulator

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    lnv_emulator::collective("__syncwarp", mask, nullptr, lnv_emulator::nothing_all);
}
// Which lane is read is PTX's rule for shfl (.idx, .up, .down, .bfly) with a width.
template <class T> T __shfl_sync(unsigned mask, T x, int source, int width = 32) {
    lnv_emulator::check_width(width);
    int lane = lnv_emulator::own_lane();
    return lnv_emulator::shuffle("__shfl_sync", mask, x, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T> T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32) {
    lnv_emulator::check_width(width);
    int lane = lnv_emulator::own_lane(), source = lane - (int)delta;
    return lnv_emulator::shuffle("__shfl_up_sync", mask, x, source >= (lane & ~(width - 1)) ? source : lane);
}
template <class T> T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32) {
    lnv_emulator::check_width(width);
    int lane = lnv_emulator::own_lane(), source = lane + (int)delta;
    return lnv_emulator::shuffle("__shfl_down_sync", mask, x, source <= (lane | (width - 1)) ? source : lane);
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int with, int width = 32) {
    lnv_emulator::check_width(width);
    int lane = lnv_emulator::own_lane(), source = lane ^ with;
    return lnv_emulator::shuffle("__shfl_xor_sync", mask, x, source <= (lane | (width - 1)) ? source & 31 : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return lnv_emulator::vote("__ballot_sync", mask, predicate != 0).ballot;
}
inline int __any_sync(unsigned mask, int predicate) {
    return lnv_emulator::vote("__any_sync", mask, predicate != 0).ballot != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
    auto all = lnv_emulator::vote("__all_sync", mask, predicate != 0);
    return all.ballot == all.members;
}
#define LNV_REDUCE(name, type, of_two)                                                                                \
    inline type name(unsigned mask, type x) {                                                                         \
        lnv_emulator::collective(#name, mask, &x, lnv_emulator::reduce_all<type, lnv_emulator::of_two<type>>);        \
        return x;                                                                                                     \
    }
LNV_REDUCE(__reduce_add_sync, unsigned, sum_of)
LNV_REDUCE(__reduce_add_sync, int, sum_of)
LNV_REDUCE(__reduce_max_sync, unsigned, max_of)
LNV_REDUCE(__reduce_max_sync, int, max_of)
LNV_REDUCE(__reduce_min_sync, unsigned, min_of)
LNV_REDUCE(__reduce_min_sync, int, min_of)
LNV_REDUCE(__reduce_or_sync, unsigned, or_of)
LNV_REDUCE(__reduce_and_sync, unsigned, and_of)
#undef LNV_REDUCE

// ---- atomics: blocks run on several threads ----

namespace lnv_emulator {
// Replaces *at by change(*at), as one step, and gives what was there.
template <class T, class F> T exchange(T *at, F change) {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    static_assert(sizeof(T) == sizeof(Bits), "atomics of 4 or 8 bytes");
    Bits before = __atomic_load_n((Bits *)at, __ATOMIC_SEQ_CST);
    while (true) {
        T old, now;
        memcpy(&old, &before, sizeof(T));
        now = change(old);
        Bits after;
        memcpy(&after, &now, sizeof(T));
        if (__atomic_compare_exchange_n((Bits *)at, &before, after, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return old;
    }
}
template <class T> struct Same {
    using Type = T;
};
template <class T> using Plain = typename Same<T>::Type; // an argument that takes no part in deducing T
} // namespace lnv_emulator

template <class T> T atomicAdd(T *at, lnv_emulator::Plain<T> x) {
    return lnv_emulator::exchange(at, [x](T y) { return (T)(y + x); });
}
template <class T> T atomicSub(T *at, lnv_emulator::Plain<T> x) {
    return lnv_emulator::exchange(at, [x](T y) { return (T)(y - x); });
}
template <class T> T atomicMax(T *at, lnv_emulator::Plain<T> x) {
    return lnv_emulator::exchange(at, [x](T y) { return y < x ? x : y; });
}
template <class T> T atomicMin(T *at, lnv_emulator::Plain<T> x) {
    return lnv_emulator::exchange(at, [x](T y) { return x < y ? x : y; });
}
template <class T> T atomicOr(T *at, lnv_emulator::Plain<T> x) {
    return lnv_emulator::exchange(at, [x](T y) { return (T)(y | x); });
}
template <class T> T atomicAnd(T *at, lnv_emulator::Plain<T> x) {
    return lnv_emulator::exchange(at, [x](T y) { return (T)(y & x); });
}
template <class T> T atomicExch(T *at, lnv_emulator::Plain<T> x) {
    return lnv_emulator::exchange(at, [x](T) { return x; });
}
template <class T> T atomicCAS(T *at, lnv_emulator::Plain<T> expected, lnv_emulator::Plain<T> x) {
    return lnv_emulator::exchange(at, [expected, x](T y) { return y == expected ? x : y; });
}
inline unsigned atomicInc(unsigned *at, unsigned limit) {
    return lnv_emulator::exchange(at, [limit](unsigned y) { return y >= limit ? 0 : y + 1; });
}

// ---- bits ----

template <class To, class From> inline To lnv_bit_cast(From x) {
    static_assert(sizeof(To) == sizeof(From), "");
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
inline unsigned __float_as_uint(float x) { return lnv_bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return lnv_bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return lnv_bit_cast<float>(x); }
inline float __int_as_float(int x) { return lnv_bit_cast<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
    return y;
}
// Each of the selector's lower four nibbles picks a byte of y:x by its lower three bits.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    uint64_t bytes = (uint64_t)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned pick = selector >> 4 * i & 15;
        unsigned byte = (unsigned)(bytes >> 8 * (pick & 7)) & 255;
        result |= byte << 8 * i;
    }
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((uint64_t)high << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((uint64_t)high << 32 | low) >> (shift & 31));
}
inline int __mulhi(int a, int b) { return (int)((int64_t)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline int __mul24(int a, int b) { return (int)((unsigned)(a << 8 >> 8) * (unsigned)(b << 8 >> 8)); }
inline int __dp4a(int a, int b, int c) {
    unsigned sum = (unsigned)c;
    for (int i = 0; i < 4; i++) sum += (unsigned)((int)(int8_t)(a >> 8 * i) * (int)(int8_t)(b >> 8 * i));
    return (int)sum;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; i++) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
    return c;
}

// ---- memory ----

template <class T> T __ldg(const T *at) { return *at; }
template <class T> T __ldcs(const T *at) { return *at; }
template <class T> T __ldcg(const T *at) { return *at; }
template <class T> void __stcs(T *at, lnv_emulator::Plain<T> x) { *at = x; }
template <class T> void __stcg(T *at, lnv_emulator::Plain<T> x) { *at = x; }

// ---- arithmetic: what <math.h> does not have ----

#define LNV_MIN_MAX(type)                                                                                             \
    inline type min(type a, type b) { return b < a ? b : a; }                                                         \
    inline type max(type a, type b) { return a < b ? b : a; }
LNV_MIN_MAX(int)
LNV_MIN_MAX(unsigned)
LNV_MIN_MAX(long)
LNV_MIN_MAX(unsigned long)
LNV_MIN_MAX(long long)
LNV_MIN_MAX(unsigned long long)
#undef LNV_MIN_MAX
inline unsigned min(int a, unsigned b) { return min((unsigned)a, b); }
inline unsigned min(unsigned a, int b) { return min(a, (unsigned)b); }
inline unsigned max(int a, unsigned b) { return max((unsigned)a, b); }
inline unsigned max(unsigned a, int b) { return max(a, (unsigned)b); }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __frsqrt_rn(float x) { return (float)(1.0 / sqrt((double)x)); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __tanhf(float x) { return tanhf(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
// To integers: what does not fit becomes the nearest that does, and NaN 0.
inline int lnv_saturated_int(float x) {
    if (x != x) return 0;
    return x >= 2147483648.0f ? 2147483647 : x < -2147483648.0f ? -2147483647 - 1 : (int)x;
}
inline unsigned lnv_saturated_uint(float x) { return !(x > 0.0f) ? 0u : x >= 4294967296.0f ? 4294967295u : (unsigned)x; }
inline int __float2int_rn(float x) { return lnv_saturated_int(nearbyintf(x)); }
inline int __float2int_rz(float x) { return lnv_saturated_int(x); }
inline int __float2int_rd(float x) { return lnv_saturated_int(floorf(x)); }
inline int __float2int_ru(float x) { return lnv_saturated_int(ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return lnv_saturated_uint(nearbyintf(x)); }
inline unsigned __float2uint_rz(float x) { return lnv_saturated_uint(x); }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }
