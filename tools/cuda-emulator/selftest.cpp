// Tests of the emulator itself, by kernels made for it: every twin against its naive meaning, and every trap by a
// kernel that runs into it (in a process of its own, whose words are read). `run_test.sh selftest.cpp` runs it.

#include "emulator.hpp"

#include <sys/wait.h>

#include <random>
#include <string>

static int failures = 0;
static void check(bool holds, const char *what) {
    if (holds) return;
    printf("FAILED: %s\n", what);
    failures++;
}

// ---- products of matrices ----

// c += a b, row-major, each fragment read by PTX's tables, element by element: for i in 0..8, element i of a.
template <class T> DEVICE void product(const u16 *a, const u16 *b, float *c) {
    u32 lane = threadIdx.x % 32, group = lane >> 2, in_group = lane % 4;
    u16 af[8], bf[4];
    for (u32 i = 0; i < 8; i++) {
        u32 row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        u32 column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        af[i] = a[row * 16 + column];
    }
    for (u32 i = 0; i < 4; i++) bf[i] = b[(in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)) * 8 + group];
    u32 ra[4], rb[2];
    for (u32 i = 0; i < 4; i++) ra[i] = (u32)af[2 * i] | (u32)af[2 * i + 1] << 16;
    for (u32 i = 0; i < 2; i++) rb[i] = (u32)bf[2 * i] | (u32)bf[2 * i + 1] << 16;
    float rc[4];
    for (u32 i = 0; i < 4; i++) rc[i] = c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
    Half<T>::mma(rc, ra, rb);
    for (u32 i = 0; i < 4; i++) c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = rc[i];
}
GLOBAL(product_bf16)(const u16 *a, const u16 *b, float *c) { product<bf16>(a, b, c); }
GLOBAL(product_f16)(const u16 *a, const u16 *b, float *c) { product<f16>(a, b, c); }

template <class T> static void products(void (*kernel)(const u16 *, const u16 *, float *), const char *what) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    u16 a[16 * 16], b[16 * 8];
    float c[16 * 8], expected[16 * 8];
    for (u16 &x : a) x = narrow<T>(normal(random)).bits;
    for (u16 &x : b) x = narrow<T>(normal(random)).bits;
    for (float &x : c) x = normal(random);
    for (int row = 0; row < 16; row++) {
        for (int column = 0; column < 8; column++) {
            float sum = c[row * 8 + column];
            for (int k = 0; k < 16; k++) sum += widen(T{a[row * 16 + k]}) * widen(T{b[k * 8 + column]});
            expected[row * 8 + column] = sum;
        }
    }
    launch(kernel, {1}, {32}, 0, a, b, c);
    bool same = true;
    for (int i = 0; i < 16 * 8; i++) same = same && fabsf(c[i] - expected[i]) <= 1e-5f;
    check(same, what);
}

// ---- ldmatrix ----

GLOBAL(load_matrices)(const u16 *from, u32 *plain, u32 *transposed) {
    SHARED_BYTES(memory);
    u16 *tile = (u16 *)memory; // 16 x 16 in rows of 24
    for (u32 i = threadIdx.x; i < 256; i += 32) tile[i / 16 * 24 + i % 16] = from[i];
    __syncwarp();
    u32 lane = threadIdx.x, r[4];
    const u16 *row = tile + (lane % 16) * 24 + lane / 16 * 8; // upper left, lower left, upper right, lower right
    ldmatrix(r, row);
    for (u32 i = 0; i < 4; i++) plain[lane * 4 + i] = r[i];
    ldmatrix_transposed(r, row);
    for (u32 i = 0; i < 4; i++) transposed[lane * 4 + i] = r[i];
}
static void matrices() {
    u16 from[256];
    u32 plain[128], transposed[128];
    for (int i = 0; i < 256; i++) from[i] = (u16)i;
    launch(load_matrices, {1}, {32}, 16 * 24 * 2, from, plain, transposed);
    bool same = true, turned = true;
    for (u32 lane = 0; lane < 32; lane++) {
        for (u32 i = 0; i < 4; i++) {
            u32 top = i % 2 * 8, left = i / 2 * 8;
            u32 row = lane / 4, pair = lane % 4 * 2;
            u32 low = (top + row) * 16 + left + pair;
            same = same && plain[lane * 4 + i] == (low | (low + 1) << 16);
            u32 first = (top + pair) * 16 + left + row;
            turned = turned && transposed[lane * 4 + i] == (first | (first + 16) << 16);
        }
    }
    check(same, "ldmatrix gives each lane its two elements of a row");
    check(turned, "ldmatrix_transposed gives each lane its two elements of a column");
}

// ---- shuffles, votes, barriers ----

GLOBAL(shuffles)(int *out) {
    int lane = (int)threadIdx.x;
    int *mine = out + lane * 8;
    mine[0] = __shfl_sync(FULL, lane, 5);
    mine[1] = __shfl_up_sync(FULL, lane, 3);
    mine[2] = __shfl_down_sync(FULL, lane, 3, 8);
    mine[3] = __shfl_xor_sync(FULL, lane, 16);
    mine[4] = (int)__ballot_sync(FULL, lane % 3 == 0);
    mine[5] = (int)warp_sum((float)lane);
    mine[6] = lane < 10 ? __shfl_sync(0x3ffu, lane * 2, 9) : __shfl_xor_sync(~0x3ffu, lane * 3, 1);
    mine[7] = __any_sync(FULL, lane == 7) + 2 * __all_sync(FULL, lane < 32) + 4 * __all_sync(FULL, lane != 3);
}
static void warps() {
    int out[256];
    u32 thirds = 0;
    for (u32 lane = 0; lane < 32; lane++) thirds |= (u32)(lane % 3 == 0) << lane;
    launch(shuffles, {1}, {32}, 0, out);
    bool same = true;
    for (int lane = 0; lane < 32; lane++) {
        int expected[8] = {5,           lane < 3 ? lane : lane - 3,    lane % 8 < 5 ? lane + 3 : lane,
                           lane ^ 16,   (int)thirds,                   31 * 32 / 2,
                           lane < 10 ? 18 : (lane ^ 1) * 3,            3};
        for (int i = 0; i < 8; i++) {
            if (out[lane * 8 + i] != expected[i]) printf("lane %d, %d: %d, not %d\n", lane, i, out[lane * 8 + i], expected[i]);
            same = same && out[lane * 8 + i] == expected[i];
        }
    }
    check(same, "shuffles and votes");
}

// Sums over a block by way of a static array, some threads leaving early; several blocks add into one place.
GLOBAL(block_sum)(const float *x, int count, float *sum, u32 *blocks) {
    __shared__ float parts[8];
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    float part = warp_sum(i < count ? x[i] : 0.0f);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = part;
    if (__syncthreads_count(1) != 256) return;
    if (threadIdx.x >= 32) return;
    float all = 0.0f;
    if (threadIdx.x < 8) all = parts[threadIdx.x];
    all = warp_sum(all);
    __syncthreads(); // the others have left
    if (threadIdx.x == 0) {
        atomicAdd(sum, all);
        atomicAdd(blocks, 1);
    }
}
static void blocks() {
    std::vector<float> x(1000);
    for (size_t i = 0; i < x.size(); i++) x[i] = (float)i;
    lnv_emulator::in_all_orders([&] {
        float sum = 0.0f;
        u32 count = 0;
        launch(block_sum, {4}, {256}, 0, x.data(), 1000, &sum, &count);
        check(sum == 999.0f * 1000.0f / 2.0f && count == 4, "the sum over blocks");
    });
}

// Each thread reads what its neighbour wrote, without a barrier between.
GLOBAL(race)(u32 *out) {
    __shared__ u32 fixed[256];
    fixed[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = fixed[(threadIdx.x + 1) % 256];
}
static void races() {
    u32 wrong = 0;
    lnv_emulator::in_all_orders([&] {
        u32 out[256];
        launch(race, {1}, {256}, 0, out);
        for (u32 i = 0; i < 256; i++) wrong += out[i] == 0xffffffffu;
    });
    check(wrong > 256, "a race reads what nobody wrote");
}

GLOBAL(untouched)(u32 *out) {
    SHARED_BYTES(memory);
    __shared__ u32 fixed[64];
    out[threadIdx.x] = fixed[threadIdx.x];
    out[64 + threadIdx.x] = ((u32 *)memory)[threadIdx.x];
    __syncthreads();
    fixed[threadIdx.x] = ((u32 *)memory)[threadIdx.x] = 1;
}
static void fills() {
    u32 out[128];
    bool all = true;
    for (int again = 0; again < 3; again++) {
        launch(untouched, {8}, {64}, 64 * 4, out);
        for (u32 x : out) all = all && x == 0xffffffffu;
    }
    check(all, "shared memory begins as NaN in each block");
}

// ---- cp.async ----

GLOBAL(copies)(const float *from, float *out) {
    SHARED_BYTES(memory);
    float *tile = (float *)memory;
    copy_async(tile, from, true);
    copy_commit();
    copy_async(tile + 4, from + 4, true);
    copy_async(tile + 8, nullptr, false);
    copy_commit();
    out[0] = tile[0]; // nothing waited for
    copy_wait<1>();
    out[1] = tile[0];
    out[2] = tile[4]; // still under way
    copy_wait<0>();
    out[3] = tile[4];
    out[4] = tile[8];
    out[5] = tile[12]; // never written
}
static void asynchronous() {
    alignas(16) float from[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    float out[6];
    launch(copies, {1}, {1}, 64, from, out);
    check(isnan(out[0]) && out[1] == 1.0f && isnan(out[2]) && out[3] == 5.0f && out[4] == 0.0f && isnan(out[5]),
          "cp.async is effective at the wait, and not before");
    lnv_emulator::options().copy_early = true;
    launch(copies, {1}, {1}, 64, from, out);
    lnv_emulator::options().copy_early = false;
    check(out[0] == 1.0f && out[2] == 5.0f && isnan(out[5]), "cp.async is effective at once if that is asked for");
}

// ---- numbers ----

static void numbers() {
    bool same = true;
    for (u32 bits = 0; bits < 0x10000; bits++) {
        f16 x{(u16)bits};
        float wide = widen(x);
        u32 exponent = bits >> 10 & 31, fraction = bits & 1023;
        double expected = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024.0 + fraction, (int)exponent - 25);
        if (exponent == 31) {
            same = same && (fraction ? isnan(wide) : isinf(wide)) && (signbit(wide) != 0) == (bits >> 15 != 0);
            continue;
        }
        same = same && (double)wide == (bits >> 15 ? -expected : expected) && narrow_f16(wide).bits == bits;
        // Halfway to the next: to the even one.
        float next = exponent == 30 && fraction == 1023 ? 65536.0f * (bits >> 15 ? -1 : 1) : widen(f16{(u16)(bits + 1)});
        float half = (float)(((double)wide + (double)next) / 2);
        same = same && narrow_f16(half).bits == (bits % 2 ? bits + 1 : bits);
        same = same && narrow_f16(nextafterf(half, wide)).bits == bits;
        same = same && narrow_f16(nextafterf(half, next)).bits == bits + 1;
    }
    check(same, "f16 to f32 and back, and rounding");
    same = true;
    for (u32 bits = 0; bits < 0x7f80; bits++) {
        float x = bits_to_float(bits << 16), half = bits_to_float(bits << 16 | 0x8000);
        same = same && narrow<bf16>(x).bits == bits && narrow<bf16>(half).bits == bits + bits % 2;
        same = same && narrow<bf16>(bits_to_float(bits << 16 | 0x8001)).bits == bits + 1;
    }
    check(same, "f32 to bf16");
    check(pack_bf16(1.0f, 2.0f) == 0x40003f80u && pack_f16(1.0f, 2.0f) == 0x40003c00u, "the first value is the lower half");
    check(__byte_perm(0x33221100u, 0x77665544u, 0x7250u) == 0x77225500u, "__byte_perm");
    check(__dp4a((int)0x80ff017fu, (int)0x7f02ff01, 10) == -128 * 127 - 2 - 1 + 127 + 10, "__dp4a");
    check(__float2int_rn(2.5f) == 2 && __float2int_rn(-3.5f) == -4, "__float2int_rn");
    check(exp2_fast(-INFINITY) == 0.0f && exp2_fast(3.0f) == 8.0f && exp2_fast(-130.0f) == 0.0f, "exp2_fast");
}

// ---- traps ----

GLOBAL(lonely_barrier)(int *) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __shfl_sync(FULL, 1, threadIdx.x < 40 ? 0 : 1);
        if (threadIdx.x < 40) __syncwarp();
        else __shfl_sync(0xffff0000u | 0xff00u, 1, 20), __ballot_sync(FULL, 1);
    }
}
GLOBAL(other_masks)(int *) {
    if (threadIdx.x % 2) __syncwarp(FULL);
    else __syncwarp(0x55555555u), __syncthreads();
}
GLOBAL(mma_without_lanes)(int *) {
    float c[4] = {};
    u32 a[4] = {}, b[2] = {};
    if (threadIdx.x < 31) mma_bf16(c, a, b);
}
GLOBAL(beyond_shared)(int *out) {
    SHARED_BYTES(memory);
    out[0] = ((volatile int *)memory)[32];
}
GLOBAL(deep)(int *out) {
    volatile char large[200000];
    for (size_t i = 0; i < sizeof large; i += 1000) large[i] = 1;
    out[0] = large[5000];
}
GLOBAL(not_shared)(int *out) {
    u32 r[4];
    ldmatrix(r, (const void *)(((u64)out + 15) / 16 * 16));
}
GLOBAL(not_aligned)(int *out) {
    SHARED_BYTES(memory);
    copy_async(memory + 8, out, true);
}
GLOBAL(odd_quad)(int *out) {
    const Quad *from = (const Quad *)(out + 1);
    out[0] = (int)from->x;
}
GLOBAL(overflow)(int *out) { out[0] = (int)(threadIdx.x + 2000000000) + 2000000000 + out[1]; }

// What a kernel says that ends the program.
static std::string last_words(void (*kernel)(int *), unsigned block) {
    int ends[2];
    if (pipe(ends) != 0) return "";
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        alignas(16) static int out[64];
        lnv_emulator::launch_named("trapped", kernel, {1}, {block}, 128, out);
        _exit(0);
    }
    close(ends[1]);
    std::string words;
    char buffer[4096];
    ssize_t count;
    while ((count = read(ends[0], buffer, sizeof buffer)) > 0) words.append(buffer, (size_t)count);
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? "nothing happened" : words;
}
static void trap(void (*kernel)(int *), unsigned block, std::vector<const char *> expected, const char *what) {
    std::string words = last_words(kernel, block);
    for (const char *part : expected) {
        if (words.find(part) == std::string::npos) {
            printf("\"%s\" is not in: %s\n", part, words.c_str());
            check(false, what);
        }
    }
}
static void traps() {
    trap(lonely_barrier, 64, {"deadlock", "kernel trapped, block (0,0,0), thread (0,0,0)", "waits for __syncthreads",
                              "thread (40,0,0)", "waits for __ballot_sync", "waits for __syncwarp"}, "a deadlock is named");
    trap(other_masks, 32, {"deadlock", "__syncwarp", "__syncthreads"}, "masks that differ never meet");
    trap(mma_without_lanes, 32, {"whole warp"}, "mma needs all lanes");
    trap(beyond_shared, 1, {"thread (0,0,0)", "behind dynamic shared memory"}, "beyond dynamic shared memory");
    trap(deep, 1, {"thread (0,0,0)", "the stack overflows"}, "a stack that overflows");
    trap(not_shared, 32, {"ldmatrix", "not shared memory"}, "ldmatrix of global memory");
    trap(not_aligned, 1, {"copy_async", "no multiple of 16"}, "cp.async to an odd address");
#ifdef __clang__ // other compilers' traps do not say why
    trap(odd_quad, 1, {"not aligned to its type"}, "16 bytes at an odd address");
    trap(overflow, 1, {"an int overflows"}, "an int that overflows");
#endif
}

int main() {
    traps(); // first: they fork, before there are other threads
    products<bf16>(product_bf16, "mma_bf16");
    products<f16>(product_f16, "mma_f16");
    matrices();
    warps();
    blocks();
    races();
    fills();
    asynchronous();
    numbers();
    printf(failures ? "%d tests failed\n" : "the emulator's tests passed\n", failures);
    return failures != 0;
}
