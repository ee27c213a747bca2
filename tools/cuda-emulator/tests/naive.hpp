// What the tests of products share: random numbers, weights packed into panels as the crate packs them, and comparison.
// Included after emulator.hpp.

#include <sys/mman.h>

#include <random>
#include <string>
#include <vector>

static int failures = 0;
static std::mt19937 random_numbers(7);
static float normal() {
    static std::normal_distribution<float> of;
    return of(random_numbers);
}
static u32 random_below(u32 n) { return (u32)(random_numbers() % n); }

static const float LEVELS[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};
static const float NF4[16] = {-1.0f,        -0.6961928f,   -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f,
                              -0.091050036f, 0.0f,         0.0795803f,   0.1609302f,  0.2461123f,   0.33791524f,
                              0.44070983f,  0.562617f,     0.72295684f,  1.0f};

// Memory that ends where no memory is, so that what is read beyond it faults; a multiple of 16 bytes.
static u8 *guarded(size_t bytes) {
    size_t page = 4096, all = (bytes + page - 1) / page * page;
    u8 *at = (u8 *)mmap(nullptr, all + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(at + all, page, PROT_NONE);
    return at + all - (bytes + 15) / 16 * 16;
}

// A weight as the device has it, and its values [n][k] in f32.
struct Packed {
    int n, k;
    std::vector<float> values;
    u8 *bytes = nullptr;
    float back = 1.0f;
    std::vector<float> table;

    u8 *data() { return bytes; }
    void reserve(size_t count) { bytes = guarded(count); }
};

template <class T> static Packed pack_floats(int n, int k) {
    Packed w{n, k, {}};
    w.reserve((size_t)n * k * sizeof(T));
    for (int i = 0; i < n * k; i++) {
        T value = narrow<T>(normal());
        ((T *)w.data())[i] = value;
        w.values.push_back(widen(value));
    }
    return w;
}
// q8.rs and int8.rs: `back` 1 or 1 / 127.
static Packed pack_bytes(int n, int k, float back) {
    Packed w{n, k, std::vector<float>((size_t)n * k)};
    w.back = back;
    int panels = (n + 31) / 32;
    size_t panel = (size_t)((k + 3) / 4 + 1) * 128;
    w.reserve(panels * panel);
    memset(w.data(), 128, panels * panel);
    for (int column = 0; column < panels * 32; column++) {
        u8 *from = w.data() + column / 32 * panel;
        float scale = column < n ? 0.01f + random_below(100) * 0.001f : 0.0f;
        ((float *)(from + panel))[column % 32 - 32] = scale;
        for (int i = 0; i < k && column < n; i++) {
            int code = (int)random_below(255) - 127;
            from[(i / 4 * 32 + column % 32) * 4 + i % 4] = (u8)(code + 128);
            w.values[(size_t)column * k + i] = code * (scale * back);
        }
    }
    return w;
}
// bnb4.rs; products multiply with `table` / back.
static Packed pack_nibbles(int n, int k, float factor) {
    Packed w{n, k, std::vector<float>((size_t)n * k)};
    w.back = 1.0f / factor;
    for (float x : NF4) w.table.push_back(factor == 1.0f ? x : widen(narrow<bf16>(x * factor)));
    int panels = (n + 31) / 32, groups = k / 64;
    w.reserve((size_t)panels * groups * 1152);
    for (int column = 0; column < n; column++) {
        for (int group = 0; group < groups; group++) {
            u8 *from = w.data() + ((size_t)(column / 32) * groups + group) * 1152;
            float scale = 0.5f + random_below(100) * 0.01f;
            ((float *)(from + 1024))[column % 32] = scale;
            for (int i = 0; i < 64; i++) {
                u32 code = random_below(16), place = i % 2 * 4 + i % 8 / 2;
                from[(i / 8 * 32 + column % 32) * 4 + place / 2] |= code << (place % 2 * 4);
                w.values[(size_t)column * k + group * 64 + i] = w.table[code] * w.back * scale;
            }
        }
    }
    return w;
}
// q4.rs.
static Packed pack_levels(int n, int k) {
    Packed w{n, k, std::vector<float>((size_t)n * k)};
    w.table.assign(LEVELS, LEVELS + 16);
    int panels = (n + 31) / 32, groups = (k + 63) / 64;
    w.reserve((size_t)panels * groups * 1088);
    for (int column = 0; column < panels * 32; column++) {
        for (int group = 0; group < groups; group++) {
            u8 *from = w.data() + ((size_t)(column / 32) * groups + group) * 1088;
            f16 scale = narrow<f16>(column < n ? (random_below(2) ? -1.0f : 1.0f) * (0.5f + random_below(100) * 0.01f) : 0.0f);
            ((f16 *)(from + 1024))[column % 32] = scale;
            for (int i = 0; i < 64; i++) {
                bool there = column < n && group * 64 + i < k;
                u32 code = there ? random_below(16) : 7;
                from[(i / 8 * 32 + column % 32) * 4 + i % 4] |= code << (i / 4 % 2 * 4);
                if (there) w.values[(size_t)column * k + group * 64 + i] = LEVELS[code] * widen(scale);
            }
        }
    }
    return w;
}

// x [rows][stride] with zeros from k on, aligned to 16 bytes.
template <class T> struct Rows {
    T *held;
    std::vector<float> values; // [rows][k]
    int stride;
    Rows(int rows, int k, int stride_) : stride(stride_) {
        held = (T *)guarded((size_t)rows * stride * sizeof(T));
        for (int row = 0; row < rows; row++) {
            for (int i = 0; i < k; i++) {
                T value = narrow<T>(normal());
                data()[(size_t)row * stride + i] = value;
                values.push_back(widen(value));
            }
        }
    }
    T *data() { return held; }
};

static float naive_activation(float x, int act) {
    switch (act) {
    case 0: return x / (1.0f + expf(-x));
    case 1: return 0.5f * x * (1.0f + erff(x / sqrtf(2.0f)));
    case 2: return 0.5f * x * (1.0f + tanhf(sqrtf(2.0f / 3.14159265f) * (x + 0.044715f * x * x * x)));
    case 3: return x / (1.0f + expf(-1.702f * x));
    case 4: return x > 0.0f ? x : 0.0f;
    default: return x;
    }
}

// Results of a product and what they should be; `largest` is the largest error, in units of `sqrt(k)`.
struct Case {
    int rows, act, then; // then: 0 T, 1 f32, 2 added to f32
    bool bias;
};
template <class T>
static double compare(const std::vector<float> &x, const Packed &w, const Case &c, const float *bias, const std::vector<float> &before,
                      const std::vector<T> &half, const std::vector<float> &full) {
    double largest = 0;
    for (int row = 0; row < c.rows; row++) {
        for (int column = 0; column < w.n; column++) {
            double sum = 0, square = 0;
            for (int i = 0; i < w.k; i++) {
                double product = (double)x[(size_t)row * w.k + i] * w.values[(size_t)column * w.k + i];
                sum += product, square += product * product;
            }
            if (bias) sum += bias[column];
            sum = naive_activation((float)sum, c.act);
            size_t at = (size_t)row * w.n + column;
            if (c.then == 2) sum += before[at];
            double found = c.then == 0 ? widen(half[at]) : full[at];
            double unit = sqrt(square) + 1e-3 + (c.then == 0 && sizeof(T) == 2 ? fabs(sum) * 1e3 : 0) + fabs(sum) * 1e-2;
            if (c.then == 2) unit += fabs(before[at]) * 2e-2;
            double error = fabs(found - sum) / unit;
            if (!(error <= largest)) largest = error; // NaN too
        }
    }
    return largest;
}
static void judge(const std::string &name, double error, double bound) {
    bool good = error <= bound;
    printf("%s %-60s %.2e of %.1e\n", good ? "ok    " : "FAILED", name.c_str(), error, bound);
    if (!good) failures++;
}
