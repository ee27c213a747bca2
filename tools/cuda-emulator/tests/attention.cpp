// Tests of the attention kernels: each against the naive sum in f64 over the same rounded inputs, on shapes whose
// sizes divide nothing, with blocks out of order and NaN wherever nothing should be read.
//
// Bounds: weights and results are rounded to T once each, so an error is at most T's half step times the sum of
// |weight * value| and |result|; what f32 adds is small beside it.

#include "emulator.hpp"

namespace any {
#include "attention.cu"
} // namespace any
#undef KERNELS_OF_TYPE
namespace flash {
#include "flash_attention.cu"
} // namespace flash
#undef KERNELS_OF_TYPE
namespace decode {
#include "decode_attention.cu"
} // namespace decode
#undef KERNELS_OF_TYPE
namespace single {
#include "single_attention.cu"
} // namespace single

#include <array>
#include <cstring>
#include <random>
#include <string>
#include <vector>

typedef std::array<int, 2> Span; // q_len, kv_len
static const int NO_WINDOW = 0x7fffffff;
static int failures = 0;
static std::mt19937 generator(7);

// Half a step of a type, for 1; of f32 what its sums may be wrong by.
static double step_of(float) { return 4e-7; }
static double step_of(bf16) { return 1.0 / 256; }
static double step_of(f16) { return 1.0 / 2048; }

template <class T> static std::vector<T> normal(size_t n, float size) {
    std::normal_distribution<float> of(0.0f, size);
    std::vector<T> x(n);
    for (T &v : x) v = narrow<T>(of(generator));
    return x;
}

// Sequences in a cache, and what a kernel takes of them.
template <class T> struct Setup {
    int heads, kv_heads, dim, kind, window;
    std::vector<Span> spans;
    int rows = 0, blocks_count = 0;
    float scale;
    std::vector<T> qkv, out;
    std::vector<unsigned char> cache;
    std::vector<u32> table, blocks, work;

    int all() const { return heads + 2 * kv_heads; }
    size_t element() const { return kind == 0 ? sizeof(T) : kind == 1 ? 4 : 1; }
    size_t record_bytes() const { return 128 * dim * element() + (kind == 2 ? 512 : 0); }
    unsigned char *record(int span, int j, int kv_head) {
        size_t block = blocks[table[4 * span + 3] + j / 64];
        return cache.data() + (block * kv_heads + kv_head) * record_bytes();
    }
    // Value i of key (of = 0) or value (of = 1) j.
    void put(int span, int j, int kv_head, int of, int i, float x) {
        unsigned char *r = record(span, j, kv_head);
        size_t at = (size_t)(of * 64 + j % 64) * dim + i;
        if (kind == 0) ((T *)r)[at] = narrow<T>(x);
        if (kind == 1) ((float *)r)[at] = x;
        if (kind == 2) ((signed char *)r)[at] = (signed char)fmaxf(-127, fminf(127, rintf(x * 40)));
    }
    float get(int span, int j, int kv_head, int of, int i) {
        unsigned char *r = record(span, j, kv_head);
        size_t at = (size_t)(of * 64 + j % 64) * dim + i;
        if (kind == 0) return widen(((T *)r)[at]);
        if (kind == 1) return ((float *)r)[at];
        return ((signed char *)r)[at] * ((float *)(r + 128 * dim))[of * 64 + j % 64];
    }

    Setup(int heads, int kv_heads, int dim, int kind, int window, std::vector<Span> spans, int queries)
        : heads(heads), kv_heads(kv_heads), dim(dim), kind(kind), window(window), spans(spans) {
        scale = 1.0f / sqrtf((float)dim);
        int row = 1; // a row before and one between spans belong to nobody
        for (Span s : spans) {
            table.insert(table.end(), {(u32)row, (u32)s[0], (u32)s[1], (u32)blocks_count});
            row += s[0] + 1;
            blocks_count += (s[1] + 63) / 64;
        }
        rows = row;
        for (int i = 0; i < blocks_count; i++) blocks.push_back(i * 7 % blocks_count);
        if (blocks_count % 7 == 0)
            for (int i = 0; i < blocks_count; i++) blocks[i] = blocks_count - 1 - i;
        qkv = normal<T>((size_t)rows * all() * dim, 1.5f);
        out.assign((size_t)rows * heads * dim, narrow<T>(77.0f));
        cache.assign((size_t)blocks_count * kv_heads * record_bytes(), 0xff); // NaN
        std::normal_distribution<float> of(0.0f, 1.0f);
        for (size_t s = 0; s < spans.size(); s++)
            for (int j = 0; j < spans[s][1]; j++)
                for (int h = 0; h < kv_heads; h++)
                    for (int which = 0; which < 2; which++) {
                        if (kind == 2)
                            ((float *)(record(s, j, h) + 128 * dim))[which * 64 + j % 64] =
                                0.02f + 0.01f * fabsf(of(generator));
                        // A sink and a rising tail, so that references change.
                        float size = which == 0 && (j == 0 || j % 97 == 50) ? 6.0f : 1.0f;
                        for (int i = 0; i < dim; i++) put(s, j, h, which, i, of(generator) * size);
                    }
        for (size_t s = 0; s < spans.size(); s++)
            for (int q = (spans[s][0] - 1) / queries * queries; q >= 0; q -= queries)
                work.insert(work.end(), {(u32)s, (u32)q});
    }

    void expect(const char *what, std::vector<float> *weights = nullptr, int of_span = 0) {
        double worst = 0;
        std::vector<char> written(rows, 0);
        for (size_t s = 0; s < spans.size(); s++)
            for (int i = 0; i < spans[s][0]; i++)
                for (int h = 0; h < heads; h++) {
                    int row = table[4 * s] + i, kv_len = spans[s][1], q_len = spans[s][0];
                    written[row] = 1;
                    int end = kv_len - q_len + i + 1, first = std::max(0, window == NO_WINDOW ? 0 : end - window);
                    std::vector<double> p(end);
                    double high = -1e300, sum = 0;
                    for (int j = first; j < end; j++) {
                        double x = 0;
                        for (int d = 0; d < dim; d++)
                            x += (double)widen(qkv[((size_t)row * all() + h) * dim + d]) *
                                 get(s, j, h / (heads / kv_heads), 0, d);
                        p[j] = x * scale;
                        high = std::max(high, p[j]);
                    }
                    for (int j = first; j < end; j++) sum += p[j] = exp(p[j] - high);
                    for (int j = first; j < end; j++) p[j] /= sum;
                    if (weights && (int)s == of_span)
                        for (int j = 0; j < kv_len; j++) {
                            double w = (*weights)[((size_t)h * q_len + i) * kv_len + j];
                            double e = j >= first && j < end ? p[j] : 0;
                            if (!(fabs(w - e) <= 1e-5)) worst = std::max(worst, 1e9);
                        }
                    if (weights && (int)s != of_span) {
                        written[row] = 0;
                        continue;
                    }
                    for (int d = 0; d < dim; d++) {
                        double x = 0, size = 0;
                        for (int j = first; j < end; j++) {
                            double v = p[j] * get(s, j, h / (heads / kv_heads), 1, d);
                            x += v;
                            size += fabs(v);
                        }
                        double found = widen(out[((size_t)row * heads + h) * dim + d]);
                        double bound = step_of(T()) * (size + fabs(x)) + 1e-5;
                        double error = fabs(found - x) / bound;
                        worst = std::max(worst, error == error ? error : 1e9);
                    }
                }
        for (int r = 0; r < rows; r++)
            if (!written[r])
                for (int i = 0; i < heads * dim; i++)
                    if (widen(out[(size_t)r * heads * dim + i]) != widen(narrow<T>(77.0f))) worst = 1e10;
        printf("%-34s heads %d/%d dim %d kind %d window %d: error %.3f of the bound\n", what, heads, kv_heads, dim,
               kind, window == NO_WINDOW ? 0 : window, worst);
        if (!(worst <= 1)) failures++, printf("FAILED\n");
    }
    void clear() { out.assign(out.size(), narrow<T>(77.0f)); }
};

static const std::vector<Span> MIXED = {{70, 70}, {1, 200}, {5, 64}, {133, 333}, {1, 1}};

template <class T, class K> static void general(K kernel, const char *what) {
    struct Shape {
        int heads, kv_heads, dim, kind, window;
    };
    for (Shape s : {Shape{4, 2, 18, 0, NO_WINDOW}, Shape{3, 1, 40, 1, 50}, Shape{2, 2, 256, 2, NO_WINDOW},
                    Shape{2, 1, 128, 2, 70}}) {
        Setup<T> t(s.heads, s.kv_heads, s.dim, s.kind, s.window, {{7, 70}, {1, 200}, {5, 5}}, 64);
        launch(kernel, {7, (unsigned)t.heads, 3}, {128}, 0, t.qkv.data(), t.cache.data(), t.table.data(),
               t.blocks.data(), t.out.data(), t.heads, t.kv_heads, t.dim, t.scale, t.window, t.kind);
        t.expect(what);
    }
}

template <class T, class K> static void eager(K kernel, const char *what) {
    for (int kind : {0, 1, 2}) {
        Setup<T> t(4, 2, 18, kind, kind == 1 ? 50 : NO_WINDOW, {{3, 70}, {9, 130}}, 64);
        std::vector<float> weights(4 * 9 * 130, NAN);
        launch(kernel, {9, 4}, {128}, 0, t.qkv.data(), t.cache.data(), t.table.data(), 1, t.blocks.data(),
               t.out.data(), weights.data(), t.heads, t.kv_heads, t.dim, t.scale, t.window, kind);
        t.expect(what, &weights, 1);
    }
}

template <class T, class K> static void prefill(K kernel, int dim, int queries, const char *what) {
    for (int window : {NO_WINDOW, 100}) {
        Setup<T> t(4, 2, dim, 0, window, MIXED, queries);
        int stride = dim + 8, places = queries == 64 ? 128 : queries + 128;
        lnv_emulator::in_all_orders([&] {
            t.clear();
            launch(kernel, {4, (unsigned)t.work.size() / 2}, {128}, (size_t)places * stride * 2, t.qkv.data(),
                   (T *)t.cache.data(), t.table.data(), t.blocks.data(), t.work.data(), t.out.data(), t.heads,
                   t.kv_heads, t.scale, t.window);
            t.expect(what);
        });
    }
}

// Full attention as a span's whose keys all are seen: the twin is the same, with each row at the end.
template <class T, class K> static void full(K kernel, int dim, int len, int queries, const char *what) {
    int heads = 4, kv_heads = 2, segments = 2, all = heads + 2 * kv_heads;
    auto qkv = normal<T>((size_t)segments * len * all * dim, 1.5f);
    std::vector<T> out((size_t)segments * len * heads * dim, narrow<T>(NAN));
    float scale = 1.0f / sqrtf((float)dim);
    if constexpr (std::is_same<K, void (*)(const T *, T *, int, int, int, int, float)>::value) {
        launch(kernel, {(unsigned)len, (unsigned)heads, (unsigned)segments}, {128}, 0, qkv.data(), out.data(), len,
               heads, kv_heads, dim, scale);
    } else {
        int wide = (dim + 15) / 16 * 16;
        launch(kernel, {(unsigned)(len + queries - 1) / queries, (unsigned)heads, (unsigned)segments}, {128},
               (size_t)(queries + 128) * (wide + 8) * 2, qkv.data(), out.data(), len, heads, kv_heads, scale);
    }
    double worst = 0;
    for (int row = 0; row < segments * len; row += len > 300 ? 7 : 1)
        for (int h = 0; h < heads; h++) {
            int start = row / len * len, kv = h / (heads / kv_heads);
            auto at = [&](int r, int head, int d) { return (double)widen(qkv[((size_t)r * all + head) * dim + d]); };
            std::vector<double> p(len);
            double high = -1e300, sum = 0;
            for (int j = 0; j < len; j++) {
                double x = 0;
                for (int d = 0; d < dim; d++) x += at(row, h, d) * at(start + j, heads + kv, d);
                p[j] = x * scale;
                high = std::max(high, p[j]);
            }
            for (double &x : p) sum += x = exp(x - high);
            for (int d = 0; d < dim; d++) {
                double x = 0, size = 0;
                for (int j = 0; j < len; j++) {
                    double v = p[j] / sum * at(start + j, heads + kv_heads + kv, d);
                    x += v;
                    size += fabs(v);
                }
                double error = fabs(widen(out[((size_t)row * heads + h) * dim + d]) - x) /
                               (step_of(T()) * (size + fabs(x)) + 1e-5);
                worst = std::max(worst, error == error ? error : 1e9);
            }
        }
    printf("%-34s dim %d, segments of %d: error %.3f of the bound\n", what, dim, len, worst);
    if (!(worst <= 1)) failures++, printf("FAILED\n");
}

template <class T, int dim, class C, class K, class M>
static void decoding(K kernel, M merge, int kind, const char *what) {
    size_t shared = sizeof(decode::DecodeShared<decode::Lanes<T, C, dim>, dim>);
    struct Shape {
        int heads, kv_heads, window, splits;
    };
    for (Shape s : {Shape{2, 2, NO_WINDOW, 1}, Shape{7, 1, NO_WINDOW, 3}, Shape{20, 2, 130, 2},
                    Shape{4, 1, NO_WINDOW, 9}, Shape{8, 1, 1, 1}}) {
        Setup<T> t(s.heads, s.kv_heads, dim, kind, s.window, {{1, 70}, {1, 1}, {1, 400}, {1, 128}, {1, 129}}, 64);
        size_t entries = t.spans.size() * s.heads * s.splits;
        unsigned groups = (s.heads / s.kv_heads + 7) / 8;
        lnv_emulator::in_all_orders([&] {
            t.clear();
            std::vector<float> stats(2 * entries, NAN), sums(entries * dim, NAN);
            launch(kernel, {(unsigned)s.splits, s.kv_heads * groups, (unsigned)t.spans.size()}, {128}, shared,
                   t.qkv.data(), t.cache.data(), t.table.data(), t.blocks.data(), stats.data(), sums.data(),
                   t.out.data(), t.heads, t.kv_heads, t.scale, t.window);
            if (s.splits > 1)
                launch(merge, {(unsigned)s.heads, (unsigned)t.spans.size()}, {128}, 0, stats.data(),
                       sums.data(), t.table.data(), t.out.data(), t.heads, dim, s.splits);
            t.expect(what);
        });
    }
}

template <class T, int dim, class K> static void singly(K kernel, int kind, const char *what) {
    struct Shape {
        int heads, window, splits;
    };
    for (Shape s : {Shape{2, NO_WINDOW, 1}, Shape{3, NO_WINDOW, 3}, Shape{2, 130, 2}, Shape{1, NO_WINDOW, 37},
                    Shape{2, 1, 1}}) {
        Setup<T> t(s.heads, s.heads, dim, kind, s.window, {{1, 70}, {1, 1}, {1, 400}, {1, 128}, {1, 129}}, 64);
        size_t lists = t.spans.size() * s.heads, entries = lists * s.splits;
        std::vector<u32> counters(lists, 0);
        std::vector<T> first;
        lnv_emulator::in_all_orders([&] {
            t.clear();
            std::vector<float> stats(2 * entries, NAN), sums(entries * dim, NAN);
            launch(kernel, {(unsigned)s.splits, (unsigned)s.heads, (unsigned)t.spans.size()}, {128}, 0, t.qkv.data(),
                   t.cache.data(), t.table.data(), t.blocks.data(), stats.data(), sums.data(), counters.data(),
                   t.out.data(), t.heads, t.scale, t.window);
            t.expect(what);
            for (u32 counter : counters) failures += counter != 0;
            // The order of blocks is to be seen nowhere.
            if (first.empty()) first = t.out;
            if (memcmp(first.data(), t.out.data(), first.size() * sizeof(T)) != 0) failures++, printf("FAILED: bits\n");
        });
    }
}

template <class T, class K> static void rope(K kernel, int dim, int kind, const char *what) {
    int heads = 3, kv_heads = 2, all = heads + 2 * kv_heads, rows = 5;
    auto qkv = normal<T>((size_t)rows * all * dim, 2.0f), before = qkv;
    std::vector<float> cos_sin(rows * dim);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < dim / 2; i++) {
            cos_sin[r * dim + i] = cosf(r * 0.7f + i);
            cos_sin[r * dim + dim / 2 + i] = sinf(r * 0.7f + i);
        }
    Setup<T> t(heads, kv_heads, dim, kind, NO_WINDOW, {{1, 150}}, 64);
    std::vector<u32> slots;
    for (int r = 0; r < rows; r++) {
        int j = r * 31 + 3;
        slots.insert(slots.end(), {t.blocks[j / 64], (u32)j % 64});
    }
    auto old = t.cache;
    launch(kernel, {(unsigned)rows, (unsigned)(all + 3) / 4}, {128}, 0, qkv.data(), cos_sin.data(), t.cache.data(),
           slots.data(), heads, kv_heads, dim, kind);
    double worst = 0;
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < all; h++) {
            std::vector<double> x(dim);
            double size = 0;
            for (int i = 0; i < dim; i++) x[i] = widen(before[((size_t)r * all + h) * dim + i]);
            if (h < heads + kv_heads) {
                for (int i = 0; i < dim / 2; i++) {
                    double a = x[i], b = x[i + dim / 2], c = cos_sin[r * dim + i], s = cos_sin[r * dim + dim / 2 + i];
                    x[i] = a * c - b * s;
                    x[i + dim / 2] = b * c + a * s;
                }
            }
            for (double v : x) size = std::max(size, fabs(v));
            for (int i = 0; i < dim; i++) {
                double found = widen(qkv[((size_t)r * all + h) * dim + i]);
                worst = std::max(worst, fabs(found - x[i]) / (step_of(T()) * fabs(x[i]) + 1e-6));
                if (h < heads) continue;
                double half = kind == 0 ? step_of(T()) * fabs(x[i]) : kind == 1 ? 0 : size / 127 * 0.501;
                double kept = t.get(0, r * 31 + 3, (h - heads) % kv_heads, (h - heads) / kv_heads, i);
                worst = std::max(worst, fabs(kept - x[i]) / (half + 1e-6));
            }
        }
    // All else is as it was.
    size_t changed = 0;
    for (size_t i = 0; i < old.size(); i++) changed += old[i] != t.cache[i];
    size_t most = (size_t)rows * kv_heads * 2 * (dim * t.element() + (kind == 2 ? 4 : 0));
    printf("%-34s dim %d kind %d: error %.3f of the bound\n", what, dim, kind, worst);
    if (!(worst <= 1) || changed > most) failures++, printf("FAILED\n");
}

template <class T, class K> static void copied(K kernel, int kind, const char *what) {
    Setup<T> t(2, 2, 18, kind, NO_WINDOW, {{1, 130}}, 64);
    std::vector<T> to((size_t)3 * 2 * 128 * 18);
    launch(kernel, {3, 2}, {128}, 0, t.cache.data(), t.blocks.data(), to.data(), 2, 18, kind);
    bool same = true;
    for (int j = 0; j < 130; j++)
        for (int h = 0; h < 2; h++)
            for (int of = 0; of < 2; of++)
                for (int i = 0; i < 18; i++) {
                    T found = to[((size_t)(j / 64 * 2 + h) * 128 + of * 64 + j % 64) * 18 + i];
                    same &= widen(found) == widen(narrow<T>(t.get(0, j, h, of, i)));
                }
    printf("%-34s kind %d: %s\n", what, kind, same ? "the same" : "FAILED");
    failures += !same;
}

int main() {
#define ROPE(T, name)                                                                                                \
    for (int kind : {0, 1, 2})                                                                                       \
        for (int dim : {18, 128, 40, 6}) rope<T>(any::rope_write_kv_##name, dim, kind, "rope_write_kv_" #name);
    ROPE(float, f32) ROPE(bf16, bf16) ROPE(f16, f16)
#define ANY(T, name)                                                                                                 \
    general<T>(any::paged_attention_any_##name, "paged_attention_any_" #name);                                       \
    eager<T>(any::paged_attention_eager_##name, "paged_attention_eager_" #name);                                     \
    full<T>(any::full_attention_any_##name, 18, 37, 0, "full_attention_any_" #name);                                 \
    for (int kind : {1, 2}) copied<T>(any::cache_as_##name, kind, "cache_as_" #name);
    ANY(float, f32) ANY(bf16, bf16) ANY(f16, f16)
#define FLASH(T, name)                                                                                               \
    prefill<T>(flash::prefill_attention_64_of_128_##name, 64, 128, "prefill_attention_64_of_128_" #name);            \
    prefill<T>(flash::prefill_attention_128_of_128_##name, 128, 128, "prefill_attention_128_of_128_" #name);         \
    prefill<T>(flash::prefill_attention_128_of_64_##name, 128, 64, "prefill_attention_128_of_64_" #name);            \
    full<T>(flash::full_attention_64_##name, 64, 577, 128, "full_attention_64_" #name);                              \
    full<T>(flash::full_attention_64_##name, 64, 128, 128, "full_attention_64_" #name);                              \
    full<T>(flash::full_attention_72_##name, 72, 131, 128, "full_attention_72_" #name);
    FLASH(bf16, bf16) FLASH(f16, f16)
#define DECODING(T, name)                                                                                            \
    decoding<T, 64, T>(decode::decode_attention_64_##name, decode::combine_attention_##name, 0, "decode_64_" #name);   \
    decoding<T, 128, T>(decode::decode_attention_128_##name, decode::combine_attention_##name, 0,                    \
                        "decode_128_" #name);                                                                        \
    decoding<T, 64, i8>(decode::decode_attention_64_int8_##name, decode::combine_attention_##name, 2,                \
                        "decode_64_int8_" #name);                                                                    \
    decoding<T, 128, i8>(decode::decode_attention_128_int8_##name, decode::combine_attention_##name, 2,              \
                         "decode_128_int8_" #name);
    DECODING(bf16, bf16) DECODING(f16, f16)
#define SINGLY(T, name)                                                                                              \
    singly<T, 64>(single::single_attention_64_##name, 0, "single_64_" #name);                                         \
    singly<T, 128>(single::single_attention_128_##name, 0, "single_128_" #name);                                      \
    singly<T, 64>(single::single_attention_64_int8_##name, 2, "single_64_int8_" #name);                               \
    singly<T, 128>(single::single_attention_128_int8_##name, 2, "single_128_int8_" #name);
    SINGLY(bf16, bf16) SINGLY(f16, f16)
    printf("%d failed\n", failures);
    return failures != 0;
}
