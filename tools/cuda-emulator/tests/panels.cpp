// Panels to rows, gathered rows, casts and rotations against naive ones.

#include "emulator.hpp"

#include "panels.cu"

#include "naive.hpp"

static void rotate_naively(float *row, int k) {
    for (int start = 0; start < k;) {
        int size = 512;
        while (size > k - start) size /= 2;
        for (int stride = size / 2; stride > 0; stride /= 2) {
            for (int i = 0; i < size; i++) {
                if (i & stride) continue;
                float a = row[start + i], b = row[start + i + stride];
                row[start + i] = a + b, row[start + i + stride] = a - b;
            }
        }
        for (int i = 0; i < size; i++) row[start + i] *= 1.0f / sqrtf((float)size);
        start += size;
    }
}

template <class T>
static void rows_of(const std::string &name, void (*dequantise)(const void *, int, int, int, const float *, float, T *),
                    void (*gather)(const void *, int, const float *, float, const u32 *, int, void *), Packed w) {
    int stride = (w.k + 7) / 8 * 8;
    T *out = (T *)guarded((size_t)w.n * stride * sizeof(T));
    memset((void *)out, 0xff, (size_t)w.n * stride * sizeof(T));
    const float *table = w.table.empty() ? nullptr : w.table.data();
    launch(dequantise, {(unsigned)(stride + 255) / 256, (unsigned)(w.n + 31) / 32}, {256}, 16 * WARP * 4, (const void *)w.data(), w.n, w.k,
           stride, table, w.back, out);
    double wrong = 0;
    for (int row = 0; row < w.n; row++) {
        for (int i = 0; i < stride; i++) {
            float expected = i < w.k ? widen(narrow<T>(w.values[(size_t)row * w.k + i])) : 0.0f;
            wrong += !(widen(out[(size_t)row * stride + i]) == expected);
        }
    }
    std::string shape = " n " + std::to_string(w.n) + " k " + std::to_string(w.k);
    judge("dequantise_" + name + shape, wrong, 0);
    std::vector<u32> ids = {(u32)w.n - 1, 0, (u32)w.n / 2};
    for (int to_half = 0; to_half < 2; to_half++) {
        std::vector<T> half(ids.size() * w.k);
        std::vector<float> full(ids.size() * w.k);
        launch(gather, {(unsigned)ids.size(), (unsigned)(w.k + 255) / 256}, {256}, 0, (const void *)w.data(), w.k, table, w.back,
               (const u32 *)ids.data(), to_half, to_half ? (void *)half.data() : (void *)full.data());
        wrong = 0;
        for (size_t i = 0; i < full.size(); i++) {
            float expected = w.values[(size_t)ids[i / w.k] * w.k + i % w.k];
            wrong += to_half ? !(widen(half[i]) == widen(narrow<T>(expected))) : !(full[i] == expected);
        }
        judge("gather_" + name + shape, wrong, 0);
    }
}

template <class T>
static void activations(const std::string &name, void (*cast)(const void *, int, int, int, T *),
                        void (*rotate)(const void *, int, int, int, int, void *), int k) {
    const int rows = 3, stride = (k + 7) / 8 * 8;
    for (int from_float = 0; from_float < 2; from_float++) {
        for (int to_half = 0; to_half < 2; to_half++) {
            std::vector<float> x(rows * k), full(rows * stride, NAN);
            std::vector<T> narrowed, half(rows * stride, narrow<T>(NAN));
            for (float &value : x) {
                narrowed.push_back(narrow<T>(value = normal()));
                if (!from_float) value = widen(narrowed.back());
            }
            const void *from = from_float ? (const void *)x.data() : (const void *)narrowed.data();
            double wrong = 0;
            if (to_half) {
                launch(cast, {rows, (unsigned)(stride + 255) / 256}, {256}, 0, from, from_float, k, stride, half.data());
                for (int i = 0; i < rows * stride; i++) {
                    float expected = i % stride < k ? widen(narrow<T>(x[i / stride * k + i % stride])) : 0.0f;
                    wrong += !(widen(half[i]) == expected);
                }
                judge("cast_" + name + " k " + std::to_string(k), wrong, 0);
            }
            std::vector<float> rotated = x;
            for (int row = 0; row < rows; row++) rotate_naively(rotated.data() + row * k, k);
            unsigned blocks = (unsigned)(k / 512 + __builtin_popcount(k % 512) + 1);
            launch(rotate, {rows, (blocks + 7) / 8}, {256}, 0, from, from_float, k, stride, to_half,
                   to_half ? (void *)half.data() : (void *)full.data());
            wrong = 0;
            for (int i = 0; i < rows * stride; i++) {
                float expected = i % stride < k ? rotated[i / stride * k + i % stride] : 0.0f;
                wrong += to_half ? !(widen(half[i]) == widen(narrow<T>(expected))) : !(full[i] == expected);
            }
            judge("rotate_" + name + " k " + std::to_string(k), wrong, 0);
        }
    }
}

#define OF(T)                                                                                                          \
    for (auto [n, k] : {std::pair(1, 1), {33, 37}, {70, 199}, {64, 600}}) {                                            \
        rows_of<T>("bytes_" #T, dequantise_bytes_##T, gather_bytes_##T, pack_bytes(n, k, 1.0f / 127.0f));              \
        rows_of<T>("nibbles_" #T, dequantise_nibbles_##T, gather_nibbles_##T, pack_nibbles(n, (k + 63) / 64 * 64, 1.0f)); \
        rows_of<T>("levels_" #T, dequantise_levels_##T, gather_levels_##T, pack_levels(n, k));                         \
    }                                                                                                                  \
    for (int k : {1, 7, 64, 130, 511, 512, 1536, 1999, 11008}) activations<T>(#T, cast_##T, rotate_##T, k);

int main() {
    OF(f32)
    OF(bf16)
    OF(f16)
    printf("%d failures\n", failures);
    return failures != 0;
}
