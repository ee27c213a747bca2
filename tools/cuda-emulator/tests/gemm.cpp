// Products of many rows against the naive sum, and what comes after cuBLASLt's.

#include "emulator.hpp"

#include "gemm.cu"

#include "naive.hpp"

template <class T> using Gemm = void (*)(const T *, const T *, int, int, int, const float *, int, int, void *);

template <class T> static void test(const char *name, Gemm<T> kernel, int n, int k, Case c, size_t shared) {
    Packed w = pack_floats<T>(n, k);
    Rows<T> x(c.rows, k, k);
    std::vector<float> bias, full((size_t)c.rows * n), before;
    for (int i = 0; i < n; i++) bias.push_back(normal());
    for (float &value : full) value = c.then == 2 ? normal() : NAN;
    before = full;
    std::vector<T> half((size_t)c.rows * n, narrow<T>(NAN));
    void *out = c.then == 0 ? (void *)half.data() : (void *)full.data();
    const float *b = c.bias ? bias.data() : nullptr;
    unsigned tiles = (unsigned)((c.rows + 127) / 128 * ((n + 127) / 128));
    double error = 0;
    auto once = [&] {
        full = before;
        std::fill(half.begin(), half.end(), narrow<T>(NAN));
        launch(kernel, {tiles}, {256}, shared, (const T *)x.data(), (const T *)w.data(), c.rows, n, k, b, c.act, c.then, out);
        double found = compare<T>(x.values, w, c, b, before, half, full);
        if (!(found <= error)) error = found;
    };
    // Small ones with their threads in every order.
    if ((size_t)n * k * c.rows < 1500000) {
        lnv_emulator::in_all_orders(once);
    } else {
        once();
    }
    judge(std::string(name) + " rows " + std::to_string(c.rows) + " n " + std::to_string(n) + " k " + std::to_string(k) +
              " then " + std::to_string(c.then),
          error, sizeof(T) == 2 ? 4.5e-6 : 4e-6);
}

template <class T> static void after(void (*kernel)(void *, int, int, const float *, int), const char *name, int n) {
    const int rows = 5;
    for (int act = 0; act < 6; act++) {
        for (int half = 0; half < 2; half++) {
            std::vector<float> x(rows * n), bias(n), expected;
            std::vector<T> narrowed;
            for (float &value : bias) value = normal();
            for (float &value : x) narrowed.push_back(narrow<T>(value = normal()));
            for (int i = 0; i < rows * n; i++) expected.push_back(naive_activation((half ? widen(narrowed[i]) : x[i]) + bias[i % n], act));
            void *in_place = half ? (void *)narrowed.data() : (void *)x.data();
            launch(kernel, {rows}, {64}, 0, in_place, half, n, (const float *)bias.data(), act);
            double largest = 0;
            for (int i = 0; i < rows * n; i++) {
                double found = half ? widen(narrowed[i]) : x[i];
                largest = fmax(largest, fabs(found - expected[i]) / (half && sizeof(T) == 2 ? 1e3 * fabs(expected[i]) + 0.1 : 1.0));
            }
            judge(std::string("epilogue_") + name + " act " + std::to_string(act), largest, 4.5e-6);
        }
    }
}

int main() {
    const std::vector<Case> cases = {{1, 5, 0, false}, {33, 0, 1, true}, {129, 3, 2, true}, {200, 1, 0, true}, {300, 5, 2, false}};
    const size_t staged = (size_t)TILE * STAGED_STRIDE * 4;
    for (auto [n, k] : {std::pair(1, 8), {130, 72}, {128, 32}, {260, 584}, {2306, 40}}) {
        for (Case c : cases) {
            test<bf16>("gemm_bf16", gemm_bf16, n, k, c, staged);
            test<f16>("gemm_f16", gemm_f16, n, k, c, staged);
        }
    }
    for (auto [n, k] : {std::pair(1, 1), {131, 37}, {128, 16}, {70, 147}}) {
        for (Case c : cases) {
            test<float>("gemm_plain_f32", gemm_plain_f32, n, k, c, staged);
            test<bf16>("gemm_plain_bf16", gemm_plain_bf16, n, k, c, staged);
            test<f16>("gemm_plain_f16", gemm_plain_f16, n, k, c, staged);
        }
    }
    for (int n : {77, 1040}) {
        after<float>(epilogue_f32, "f32", n);
        after<bf16>(epilogue_bf16, "bf16", n);
        after<f16>(epilogue_f16, "f16", n);
    }
    printf("%d failures\n", failures);
    return failures != 0;
}
