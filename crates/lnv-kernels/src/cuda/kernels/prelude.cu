// What every kernel file begins with: names of types, conversions, and one function for each machine
// instruction that CUDA C has no name for.
//
// Decision: no header is included, so that NVRTC compiles a kernel with nothing but its library, on a
// machine without CUDA. Kernels contain no inline assembly of their own: it is all here, so that the
// emulator (tools/cuda-emulator), which defines LNV_EMULATED and brings its own twin of each function
// below the line, can run the same sources on a processor.
//
// T is the type of activations, and of weights that are not quantised: one of float, bf16 and f16. Each
// kernel is a template over it, and has one name for each: KERNEL_OF_TYPES at the end of its file.

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};
// 16 bytes, moved at once.
struct __align__(16) Quad {
    u32 x, y, z, w;
};
struct __align__(8) Pair {
    u32 x, y;
};

#define WARP 32
#define FULL 0xffffffffu
#define DEVICE __device__ __forceinline__

#ifndef LNV_EMULATED

#define GLOBAL(name) extern "C" __global__ void name
#define BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
// The dynamic shared memory of a block, as bytes, aligned to 128.
#define SHARED_BYTES(name) extern __shared__ __align__(128) unsigned char name[]

DEVICE float bits_to_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 float_to_bits(float x) { return __float_as_uint(x); }

DEVICE float widen(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
DEVICE f16 narrow_f16(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
// Two values side by side, the first in the lower half, rounded to nearest even.
DEVICE u32 pack_bf16(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
DEVICE u32 pack_f16(float low, float high) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// c += a b: a 16x16 (rows), b 16x8 (columns), c 16x8, as mma.m16n8k16 lays them out over a warp.
DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE u32 shared_address(const void *pointer) { return (u32)__cvta_generic_to_shared(pointer); }
// Four 8x8 matrices of 16-bit values from shared memory; lane l gives the address of row l % 8 of matrix
// l / 8, 16 bytes each, aligned to 16.
DEVICE void ldmatrix(u32 (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// The same, each matrix transposed.
DEVICE void ldmatrix_transposed(u32 (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Begins to copy 16 bytes from global to shared memory; zeros if not `valid`, and nothing is read then.
DEVICE void copy_async(void *to, const void *from, bool valid) {
    u32 bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(bytes)
                 : "memory");
}
// Ends a group of copies.
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N groups of this thread's copies are under way.
template <int N> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Reads what is read once: past the first-level cache.
DEVICE Quad load_stream(const void *from) {
    Quad q;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w)
                 : "l"(from));
    return q;
}

// The same, 8 bytes.
DEVICE Pair load_stream_pair(const void *from) {
    Pair p;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];"
                 : "=r"(p.x), "=r"(p.y)
                 : "l"(from));
    return p;
}

// The same of what the kernel ahead may have written while this one waited for it.
DEVICE Quad load_once(const void *from) {
    Quad q;
    asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w)
                 : "l"(from));
    return q;
}
// The same, 4 bytes.
DEVICE u32 load_once_word(const void *from) {
    u32 x;
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
}

// Counts an arrival and gives how many came before; after `last` of them the counter is zero again. What this thread
// wrote or saw written comes before, what it and those it tells of this read comes after.
DEVICE u32 arrive(u32 *counter, u32 last) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter), "r"(last)
                 : "memory");
    return before;
}

// Sums of two pairs, each value rounded to nearest even.
DEVICE u32 add_pair_bf16(u32 a, u32 b) {
    u32 y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(0x3f803f80u), "r"(b));
    return y;
}
DEVICE u32 add_pair_f16(u32 a, u32 b) {
    u32 y;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

// Kernels may begin before the one ahead of them in the stream has ended, on GPUs that can do that (9.0): what that
// one writes may be read, and what it reads be written, after this only.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel begin as soon as all thread blocks of this one have come here, and there is room.
DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// 2^x, with 2^-inf = 0.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif // LNV_EMULATED

// ---- below: the same for both ----

DEVICE float widen(bf16 x) { return bits_to_float((u32)x.bits << 16); }
DEVICE float widen(float x) { return x; }

template <class T> struct Half; // the 16-bit types
template <> struct Half<bf16> {
    static DEVICE u32 pack(float low, float high) { return pack_bf16(low, high); }
    static DEVICE void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_bf16(c, a, b); }
    static DEVICE float low(u32 pair) { return bits_to_float(pair << 16); }
    static DEVICE float high(u32 pair) { return bits_to_float(pair & 0xffff0000u); }
};
template <> struct Half<f16> {
    static DEVICE u32 pack(float low, float high) { return pack_f16(low, high); }
    static DEVICE void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_f16(c, a, b); }
    static DEVICE float low(u32 pair) {
        f16 x;
        x.bits = (u16)pair;
        return widen(x);
    }
    static DEVICE float high(u32 pair) {
        f16 x;
        x.bits = (u16)(pair >> 16);
        return widen(x);
    }
};

// x in T, to nearest even.
template <class T> DEVICE T narrow(float x);
template <> DEVICE float narrow<float>(float x) { return x; }
template <> DEVICE bf16 narrow<bf16>(float x) {
    bf16 y;
    y.bits = (u16)pack_bf16(x, 0.0f);
    return y;
}
template <> DEVICE f16 narrow<f16>(float x) { return narrow_f16(x); }

DEVICE float warp_sum(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(FULL, x, step);
    return x;
}
DEVICE float warp_max(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL, x, step));
    return x;
}
DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Functions of one value: Silu, Gelu, GeluTanh, QuickGelu, Relu in the order of `Activation`; 5: none.
DEVICE float activate(float x, int act) {
    switch (act) {
    case 0: return x / (1.0f + expf(-x));
    case 1: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case 2: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case 3: return x / (1.0f + expf(-1.702f * x));
    case 4: return x < 0.0f ? 0.0f : x;
    default: return x;
    }
}

// The same for a result in T: where that has 16 bits, with the quick exponential and division, whose error is far
// below T's rounding.
template <class T> DEVICE float activate_as(float x, int act) {
    switch (act) {
    case 0: return __fdividef(x, 1.0f + __expf(-x));
    case 3: return __fdividef(x, 1.0f + __expf(-1.702f * x));
    default: return activate(x, act);
    }
}
template <> DEVICE float activate_as<float>(float x, int act) { return activate(x, act); }
