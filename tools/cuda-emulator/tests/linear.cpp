// Products of few rows, in all formats and types, against the naive sum.

#include "emulator.hpp"

#include "linear.cu"

#include "naive.hpp"

template <class T>
using Few = void (*)(const T *, int, int, const void *, int, int, int, int, int, const float *, float, const float *, int,
                     int, void *, float *, u32 *);

// A kernel: its rows, warps and warps of a team, and the bytes of its table.
struct Kind {
    int rows, warps, team, table;
};

// Shared memory as the host counts it, tight.
static int shared_bytes(Kind kind, int slice, int value, int rows, int slots) {
    int groups = (slice + 63) / 64 * rows;
    int staged = value == 4      ? kind.table + groups * 256
                 : kind.table == 0 ? groups * 128
                                 : kind.table + std::max(0, groups - 256) * 128;
    return std::max(staged, kind.warps * rows * 128) + slots * kind.team * rows * 128;
}

// The product, the function of its first half times its second, in T.
template <class T> static double compare_gated(const Packed &w, Case c, const float *bias, const Rows<T> &x, const std::vector<T> &out) {
    double worst = 0;
    int half = w.n / 2;
    for (int row = 0; row < c.rows; row++) {
        for (int column = 0; column < half; column++) {
            double sum[2] = {0, 0}, all[2] = {0, 0};
            for (int h = 0; h < 2; h++) {
                int from = column + h * half;
                for (int i = 0; i < w.k; i++) {
                    double term = (double)x.values[(size_t)row * w.k + i] * w.values[(size_t)from * w.k + i];
                    sum[h] += term, all[h] += fabs(term);
                }
                if (bias) sum[h] += bias[from];
            }
            float gate = activate((float)sum[0], c.act);
            double expected = (double)gate * sum[1], found = widen(out[(size_t)row * half + column]);
            if (std::is_same<T, f16>::value && fabs(expected) > 60000) continue; // may be infinite
            double rounding = sizeof(T) == 4 ? 1e-6 : std::is_same<T, bf16>::value ? 1.0 / 256 : 1.0 / 2048;
            // What an error of 1e-6 of the terms becomes, and the rounding of the result.
            double allowed = 4e-6 * (all[0] * (fabs(sum[1]) + 1) * 2 + all[1] * (fabs(gate) + 1)) + rounding * fabs(expected) + 1e-6;
            double error = fabs(found - expected) / allowed * 2e-6;
            if (!(error <= worst)) worst = error;
        }
    }
    if (widen(out[(size_t)c.rows * half]) == widen(out[(size_t)c.rows * half])) worst = NAN; // written beyond the end
    return worst;
}

template <class T>
static void test(const char *name, Few<T> kernel, Packed w, Case c, Kind kind, int slice, int blocks, bool whole) {
    const bool gated = c.then == 3;
    if (gated && w.n % 64 != 0) return;
    Rows<T> x(c.rows, w.k, (w.k + 7) / 8 * 8);
    std::vector<float> bias, full((size_t)c.rows * w.n + 1), before;
    for (int i = 0; i < w.n; i++) bias.push_back(normal());
    for (float &value : full) value = c.then == 2 ? normal() : NAN;
    before = full;
    std::vector<T> half((size_t)c.rows * w.n + 1, narrow<T>(NAN));
    if (slice == 0) slice = (w.k + 63) / 64 * 64;
    int slices = (w.k + slice - 1) / slice, depth = (c.rows + kind.rows - 1) / kind.rows, tall = std::min(c.rows, kind.rows);
    int panels = (w.n + 31) / 32, tile = gated ? 2 : 1;
    int slots = whole ? (panels / tile + blocks - 1) / blocks * tile : std::min(panels, panels / blocks + 2);
    std::vector<float> sums((size_t)depth * slices * blocks * slots * tall * 32);
    std::vector<u32> counters(depth * panels / tile, 0);
    void *out = c.then == 0 || gated ? (void *)half.data() : (void *)full.data();
    const float *b = c.bias ? bias.data() : nullptr;
    int shared = shared_bytes(kind, std::min(slice, w.k), sizeof(T), tall, slots);
    double error = 0;
    auto once = [&] {
        full = before;
        std::fill(half.begin(), half.end(), narrow<T>(NAN));
        std::fill(sums.begin(), sums.end(), NAN);
        launch(kernel, {(unsigned)blocks, (unsigned)slices, (unsigned)depth}, {(unsigned)kind.warps * 32}, (size_t)shared,
               (const T *)x.data(), x.stride, c.rows, (const void *)w.data(), w.n, w.k, slice, (int)whole, slots,
               (const float *)w.table.data(), w.back, b, c.act, c.then, out, sums.data(), counters.data());
        double found = gated ? compare_gated<T>(w, c, b, x, half) : compare<T>(x.values, w, c, b, before, half, full);
        for (u32 counter : counters) {
            if (counter != 0) found = NAN;
        }
        if (!(found <= error)) error = found;
    };
    // Small ones with their threads in every order.
    if ((size_t)w.n * w.k * c.rows < 30000) {
        lnv_emulator::in_all_orders(once);
    } else {
        once();
    }
    std::string title = std::string(name) + " rows " + std::to_string(c.rows) + " n " + std::to_string(w.n) + " k " +
                        std::to_string(w.k) + " slice " + std::to_string(slice) + " blocks " + std::to_string(blocks) +
                        (whole ? " whole" : "") + " then " + std::to_string(c.then);
    judge(title, error, sizeof(T) == 2 ? 4.5e-6 : 2e-6);
}

struct Size {
    int n, k, slice, blocks;
    bool whole;
};

template <class T> static Packed floats(int n, int k) { return pack_floats<T>(n, k); }
template <class T> static Packed q8(int n, int k) { return pack_bytes(n, k, 1.0f); }
template <class T> static Packed int8(int n, int k) { return pack_bytes(n, k, 1.0f / 127.0f); }
static Packed nf4_wide(int n, int k) { return pack_nibbles(n, k, 1.0f); }
static Packed nf4_bf16(int n, int k) { return pack_nibbles(n, k, 1.437006f); }
// In f16 the table is rounded to that.
static Packed nf4_f16(int n, int k) {
    Packed w = pack_nibbles(n, k, 1.0f);
    for (float &x : w.values) x = NAN; // made again, from the rounded table
    for (float &x : w.table) x = widen(narrow<f16>(x));
    for (int column = 0; column < n; column++) {
        for (int i = 0; i < k; i++) {
            const u8 *from = w.data() + ((size_t)(column / 32) * (k / 64) + i / 64) * 1152;
            u32 place = i % 2 * 4 + i % 8 / 2;
            u32 code = from[(i % 64 / 8 * 32 + column % 32) * 4 + place / 2] >> (place % 2 * 4) & 15;
            w.values[(size_t)column * k + i] = w.table[code] * ((const float *)(from + 1024))[column % 32];
        }
    }
    return w;
}

#define ALL(format, T, pack, team, table, rounded)                                                                           \
    for (Size s : sizes) {                                                                                             \
        int k = rounded ? (s.k + 63) / 64 * 64 : s.k;                                                                  \
        for (Case c : cases) {                                                                                         \
            if (c.rows <= 8)                                                                                           \
                test<T>("few8_" #format "_" #T, few8_##format##_##T, pack(s.n, k), c, {8, 32, team == 1 ? 1 : 8, table}, s.slice, s.blocks, s.whole); \
            if (c.rows > 2 && c.rows <= 16)                                                                            \
                test<T>("few16_" #format "_" #T, few16_##format##_##T, pack(s.n, k), c, {16, 16, team == 1 ? 1 : 8, table}, s.slice, s.blocks, s.whole); \
            if (c.rows > 2)                                                                                            \
                test<T>("few32_" #format "_" #T, few32_##format##_##T, pack(s.n, k), c, {32, 12, team == 1 ? 1 : 2, table}, s.slice, s.blocks, s.whole); \
        }                                                                                                              \
    }
#define ALL_FLOAT(format, pack, team, table, rounded)                                                                        \
    for (Size s : sizes) {                                                                                             \
        int k = rounded ? (s.k + 63) / 64 * 64 : s.k;                                                                  \
        for (Case c : cases) {                                                                                         \
            if (c.rows == 1)                                                                                           \
                test<float>("few1_" #format "_f32", few1_##format##_f32, pack(s.n, k), c, {1, 16, team, table}, s.slice, s.blocks, s.whole); \
            test<float>("few8_" #format "_f32", few8_##format##_f32, pack(s.n, k), c, {8, 16, team, table}, s.slice, s.blocks, s.whole); \
        }                                                                                                              \
    }

int main(int count, char **) {
    // rows, act, then, bias
    const std::vector<Case> cases = {{1, 5, 0, false}, {1, 0, 1, true}, {2, 3, 2, true}, {7, 1, 0, true},
                                     {8, 2, 1, false}, {13, 5, 2, false}, {16, 4, 0, true}, {37, 5, 2, true},
                                     {1, 0, 3, false}, {5, 2, 3, true}, {33, 0, 3, false}};
    {
        const std::vector<Size> sizes = {{1, 8, 0, 1, true}, {33, 40, 0, 3, false}, {70, 200, 64, 2, false}, {64, 2056, 0, 1, true}, {128, 520, 0, 3, false}, {192, 136, 0, 3, true}, {160, 1032, 512, 2, false}, {320, 72, 64, 2, false}};
        ALL(floats, bf16, pack_floats<bf16>, 8, 0, false)
        ALL(floats, f16, pack_floats<f16>, 8, 0, false)
        ALL_FLOAT(floats, pack_floats<float>, 8, 0, false)
    }
    {
        const std::vector<Size> sizes = {{1, 1, 0, 1, true}, {33, 37, 0, 3, false}, {70, 199, 64, 2, false}, {64, 2053, 0, 1, true}, {128, 517, 0, 3, false}, {192, 134, 0, 3, true}, {160, 1030, 512, 2, false}, {320, 70, 64, 2, false}};
        ALL(bytes, bf16, q8<bf16>, 1, 0, false)
        ALL(bytes, f16, int8<f16>, 1, 0, false)
        ALL_FLOAT(bytes, q8<float>, 1, 0, false)
        ALL(nibbles, bf16, nf4_bf16, 1, PAIR_TABLE, true)
        ALL(nibbles, f16, nf4_f16, 1, PAIR_TABLE, true)
        ALL_FLOAT(nibbles, nf4_wide, 1, 2048, true)
        ALL(levels, bf16, pack_levels, 1, PAIR_TABLE, false)
        ALL(levels, f16, pack_levels, 1, PAIR_TABLE, false)
        ALL_FLOAT(levels, pack_levels, 1, 2048, false)
    }
    printf("%d failures\n", failures);
    return failures != 0;
}
