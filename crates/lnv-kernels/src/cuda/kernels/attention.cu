// Rotary embedding, and attention for every shape.
//
// Decision: the kernels here take any even head size up to 256, any type of the cache, a window and groups of
// heads, and compute in f32: four warps for a query and a head, each lane a key for the scores, each lane
// some columns for the sum. They are what f32 runs on, and whatever flash_attention.cu has no kernel for. The
// eager form leaves its softmax weights in memory for whoever wants to look at them.
//
// A record of the cache, one head of a block of 64 tokens: keys [64][dim], then values [64][dim]; of int8
// also 64 scales of the keys and 64 of the values, after both.
//
// Refused: speed for long prompts, and odd head sizes.

#define KV_BLOCK 64
#define ANY_WARPS 4
#define ANY_MAX_DIM 256
#define LOG2_E 1.4426950408889634f
#define LOWEST bits_to_float(0xff800000u) // minus infinity

// How the cache keeps its values: the parameter `cache_kind`.
#define CACHE_T 0
#define CACHE_F32 1
#define CACHE_INT8 2

template <class C> struct Scaled {
    static const bool value = false;
};
template <> struct Scaled<i8> {
    static const bool value = true;
};

template <class C> DEVICE size_t record_bytes(int dim) {
    return (size_t)2 * KV_BLOCK * dim * sizeof(C) + (Scaled<C>::value ? 2 * KV_BLOCK * sizeof(float) : 0);
}

// ---- two neighbours at once: head sizes are even ----

template <class T> DEVICE void read_two(const T *from, float &a, float &b) {
    u32 pair = *(const u32 *)from;
    a = Half<T>::low(pair);
    b = Half<T>::high(pair);
}
template <> DEVICE void read_two<float>(const float *from, float &a, float &b) {
    Pair pair = *(const Pair *)from;
    a = bits_to_float(pair.x);
    b = bits_to_float(pair.y);
}
template <> DEVICE void read_two<i8>(const i8 *from, float &a, float &b) {
    u32 pair = *(const u16 *)from;
    a = (float)(i8)(pair & 0xff);
    b = (float)(i8)(pair >> 8);
}

template <class T> DEVICE void write_two(T *to, float a, float b) { *(u32 *)to = Half<T>::pack(a, b); }
template <> DEVICE void write_two<float>(float *to, float a, float b) {
    Pair pair;
    pair.x = float_to_bits(a);
    pair.y = float_to_bits(b);
    *(Pair *)to = pair;
}
template <> DEVICE void write_two<i8>(i8 *to, float a, float b) {
    *(u16 *)to = (u16)(((u32)(int)a & 0xff) | ((u32)(int)b & 0xff) << 8);
}

template <class T> DEVICE void write_one(T *to, float a) { *to = narrow<T>(a); }
template <> DEVICE void write_one<i8>(i8 *to, float a) { *to = (i8)(int)a; }

// V neighbours, 1 or 2.
template <int V, class T> DEVICE void read_some(const T *from, float (&x)[V]) {
    if constexpr (V == 2)
        read_two(from, x[0], x[1]);
    else
        x[0] = widen(from[0]);
}
template <int V, class T> DEVICE void write_some(T *to, const float (&x)[V]) {
    if constexpr (V == 2)
        write_two(to, x[0], x[1]);
    else
        write_one(to, x[0]);
}

// ---- rotary embedding ----

// One head of a row, of which a lane has places i and i + dim / 2.
template <class T, int V> struct RopeHead {
    T *x;
    const float *angles;
    int half;
    bool turns;

    DEVICE void get(int i, float (&low)[V], float (&high)[V]) const {
        read_some(x + i, low);
        read_some(x + half + i, high);
        if (!turns) return;
        float cos[V], sin[V];
        read_some(angles + i, cos);
        read_some(angles + half + i, sin);
#pragma unroll
        for (int e = 0; e < V; e++) {
            float a = low[e], b = high[e];
            low[e] = a * cos[e] - b * sin[e];
            high[e] = b * cos[e] + a * sin[e];
        }
    }
};

// The larger size; what is no number stays.
DEVICE float larger_size(float size, float x) {
    x = fabsf(x);
    return x <= size || size != size ? size : x;
}

// Turns the head, if that is asked for, and copies it to `cached`, if there is such a place.
template <class T, int V, class C> DEVICE void rope_copy(const RopeHead<T, V> &head, C *cached) {
    int lane = threadIdx.x % WARP;
    for (int i = lane * V; i < head.half; i += WARP * V) {
        float low[V], high[V];
        head.get(i, low, high);
        if (head.turns) {
            write_some(head.x + i, low);
            write_some(head.x + head.half + i, high);
        }
        if (cached) {
            write_some(cached + i, low);
            write_some(cached + head.half + i, high);
        }
    }
}

// The same as codes: a 127th of the largest size is the scale.
template <class T, int V> DEVICE void rope_quantise(const RopeHead<T, V> &head, i8 *cached, float *scale_at) {
    int lane = threadIdx.x % WARP;
    float size = 0.0f;
    for (int i = lane * V; i < head.half; i += WARP * V) {
        float low[V], high[V];
        head.get(i, low, high);
#pragma unroll
        for (int e = 0; e < V; e++) size = larger_size(larger_size(size, low[e]), high[e]);
    }
    for (int step = WARP / 2; step > 0; step /= 2)
        size = larger_size(size, __shfl_xor_sync(FULL, size, step));
    float scale = size / 127.0f;
    float factor = scale > 0.0f ? 1.0f / scale : 0.0f;
    if (lane == 0) *scale_at = scale;
    for (int i = lane * V; i < head.half; i += WARP * V) {
        float low[V], high[V], codes[2][V];
        head.get(i, low, high);
#pragma unroll
        for (int e = 0; e < V; e++) {
            codes[0][e] = fminf(fmaxf(rintf(low[e] * factor), -127.0f), 127.0f);
            codes[1][e] = fminf(fmaxf(rintf(high[e] * factor), -127.0f), 127.0f);
        }
        write_some(cached + i, codes[0]);
        write_some(cached + head.half + i, codes[1]);
        if (head.turns) {
            write_some(head.x + i, low);
            write_some(head.x + head.half + i, high);
        }
    }
}

template <class T, int V>
DEVICE void rope_head(T *qkv, const float *cos_sin, unsigned char *cache, const u32 *slots, int heads,
                      int kv_heads, int dim, int cache_kind) {
    int row = blockIdx.x, all = heads + 2 * kv_heads;
    int index = blockIdx.y * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (index >= all) return;
    bool is_value = index >= heads + kv_heads;
    RopeHead<T, V> head = {qkv + ((size_t)row * all + index) * dim, cos_sin + (size_t)row * dim, dim / 2,
                           !is_value};
    if (index < heads) return rope_copy(head, (T *)0);
    size_t kv_head = index - heads - (is_value ? kv_heads : 0);
    size_t record = (size_t)slots[2 * row] * kv_heads + kv_head;
    int offset = slots[2 * row + 1], place = (offset + (is_value ? KV_BLOCK : 0)) * dim;
    if (cache_kind == CACHE_INT8) {
        unsigned char *at = cache + record * record_bytes<i8>(dim);
        float *scales = (float *)(at + 2 * KV_BLOCK * dim);
        rope_quantise(head, (i8 *)at + place, scales + offset + (is_value ? KV_BLOCK : 0));
    } else if (cache_kind == CACHE_F32) {
        rope_copy(head, (float *)(cache + record * record_bytes<float>(dim)) + place);
    } else {
        rope_copy(head, (T *)(cache + record * record_bytes<T>(dim)) + place);
    }
}

// qkv [rows][(heads + 2 kv_heads) dim]: turns q and k in place, then writes k and v to the cache.
// cos_sin [rows][dim]; slots: a block and a place in it for each row. One warp a head; grid (rows, heads / warps).
template <class T>
DEVICE void rope_write_kv(T *qkv, const float *cos_sin, unsigned char *cache, const u32 *slots, int heads,
                          int kv_heads, int dim, int cache_kind) {
    if (dim % 4 == 0)
        rope_head<T, 2>(qkv, cos_sin, cache, slots, heads, kv_heads, dim, cache_kind);
    else
        rope_head<T, 1>(qkv, cos_sin, cache, slots, heads, kv_heads, dim, cache_kind);
}

// ---- where keys and values lie ----

// One head of a sequence in the paged cache.
template <class C> struct PagedRows {
    const unsigned char *cache;
    const u32 *blocks;
    int kv_heads, kv_head, dim;

    DEVICE const C *record(u32 j) const {
        size_t index = (size_t)blocks[j / KV_BLOCK] * kv_heads + kv_head;
        return (const C *)(cache + index * record_bytes<C>(dim));
    }
    DEVICE const C *key(u32 j) const { return record(j) + j % KV_BLOCK * dim; }
    DEVICE const C *value(u32 j) const { return record(j) + (KV_BLOCK + j % KV_BLOCK) * dim; }
    DEVICE float scale(u32 j, int of) const {
        if constexpr (Scaled<C>::value)
            return ((const float *)(record(j) + 2 * KV_BLOCK * dim))[of * KV_BLOCK + j % KV_BLOCK];
        else
            return 1.0f;
    }
};

// One head of consecutive rows of qkv.
template <class T> struct PlainRows {
    const T *keys, *values;
    size_t stride;

    DEVICE const T *key(u32 j) const { return keys + j * stride; }
    DEVICE const T *value(u32 j) const { return values + j * stride; }
    DEVICE float scale(u32, int) const { return 1.0f; }
};

// A query's product with key j.
template <class Rows> DEVICE float key_product(const float *query, const Rows &rows, int j, int dim) {
    auto key = rows.key(j);
    float sums[2] = {0.0f, 0.0f};
    for (int d = 0; d < dim; d += 2) {
        float a, b;
        read_two(key + d, a, b);
        sums[0] += query[d] * a;
        sums[1] += query[d + 1] * b;
    }
    return (sums[0] + sums[1]) * rows.scale(j, 0);
}

template <class T> DEVICE void read_query(float *query, const T *from, int dim, float factor) {
    for (int d = threadIdx.x; d < dim; d += blockDim.x) query[d] = widen(from[d]) * factor;
    __syncthreads();
}

// ---- one query, any shape ----

// out [dim] = softmax(scale q k) v over keys first .. end; the block's warps share the keys.
template <class T, class Rows>
DEVICE void attend_any(const T *q, const Rows &rows, int first, int end, int dim, float scale, T *out) {
    __shared__ float query[ANY_MAX_DIM];
    __shared__ float sums[ANY_WARPS][ANY_MAX_DIM];
    __shared__ float highest[ANY_WARPS], weights[ANY_WARPS];
    const int PAIRS = ANY_MAX_DIM / 2 / WARP;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    read_query(query, q, dim, scale * LOG2_E);

    float high = LOWEST, weight = 0.0f, sum[2 * PAIRS];
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; i++) sum[i] = 0.0f;
    for (int start = first + warp * WARP; start < end; start += ANY_WARPS * WARP) {
        int count = min(WARP, end - start);
        float score = lane < count ? key_product(query, rows, start + lane, dim) : LOWEST;
        float now = fmaxf(high, warp_max(score));
        float before = exp2_fast(high - now);
        float p = exp2_fast(score - now);
        high = now;
        weight = weight * before + p;
        if (lane < count) p *= rows.scale(start + lane, 1);
#pragma unroll
        for (int i = 0; i < 2 * PAIRS; i++) sum[i] *= before;
        for (int j = 0; j < count; j++) {
            float share = __shfl_sync(FULL, p, j);
            auto value = rows.value(start + j);
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                int d = 2 * (i * WARP + lane);
                if (d >= dim) break;
                float a, b;
                read_two(value + d, a, b);
                sum[2 * i] += share * a;
                sum[2 * i + 1] += share * b;
            }
        }
    }

    weight = warp_sum(weight);
    if (lane == 0) highest[warp] = high, weights[warp] = weight;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        int d = 2 * (i * WARP + lane);
        if (d < dim) sums[warp][d] = sum[2 * i], sums[warp][d + 1] = sum[2 * i + 1];
    }
    __syncthreads();
    float of_all = LOWEST, whole = 0.0f, factor[ANY_WARPS];
#pragma unroll
    for (int w = 0; w < ANY_WARPS; w++) of_all = fmaxf(of_all, highest[w]);
#pragma unroll
    for (int w = 0; w < ANY_WARPS; w++) {
        factor[w] = exp2_fast(highest[w] - of_all);
        whole += weights[w] * factor[w];
    }
    for (int d = threadIdx.x; d < dim; d += blockDim.x) {
        float x = 0.0f;
#pragma unroll
        for (int w = 0; w < ANY_WARPS; w++) x += sums[w][d] * factor[w];
        out[d] = narrow<T>(x / whole);
    }
}

// A span in the table: its first row, how many, tokens of its sequence, its first place in `blocks`.
struct SpanEntry {
    int q_start, q_len, kv_len, blocks;
};

// Grid (the longest q_len, heads, spans), ANY_WARPS warps.
template <class T, class C>
DEVICE void paged_any(const T *qkv, const unsigned char *cache, const u32 *spans, const u32 *blocks, T *out,
                      int heads, int kv_heads, int dim, float scale, int window) {
    SpanEntry span = ((const SpanEntry *)spans)[blockIdx.z];
    int i = blockIdx.x, head = blockIdx.y;
    if (i >= span.q_len) return;
    int end = span.kv_len - span.q_len + i + 1, first = max(0, end - window);
    size_t row = span.q_start + i;
    PagedRows<C> rows = {cache, blocks + span.blocks, kv_heads, head / (heads / kv_heads), dim};
    attend_any(qkv + (row * (heads + 2 * kv_heads) + head) * dim, rows, first, end, dim, scale,
               out + (row * heads + head) * dim);
}

template <class T>
DEVICE void paged_attention_any(const T *qkv, const unsigned char *cache, const u32 *spans, const u32 *blocks,
                                T *out, int heads, int kv_heads, int dim, float scale, int window,
                                int cache_kind) {
    if (cache_kind == CACHE_INT8)
        paged_any<T, i8>(qkv, cache, spans, blocks, out, heads, kv_heads, dim, scale, window);
    else if (cache_kind == CACHE_F32)
        paged_any<T, float>(qkv, cache, spans, blocks, out, heads, kv_heads, dim, scale, window);
    else
        paged_any<T, T>(qkv, cache, spans, blocks, out, heads, kv_heads, dim, scale, window);
}

// Each segment of `len` rows with itself. Grid (len, heads, segments), ANY_WARPS warps.
template <class T>
DEVICE void full_attention_any(const T *qkv, T *out, int len, int heads, int kv_heads, int dim, float scale) {
    int head = blockIdx.y, kv_head = head / (heads / kv_heads);
    size_t stride = (size_t)(heads + 2 * kv_heads) * dim, start = (size_t)blockIdx.z * len;
    const T *keys = qkv + start * stride + (size_t)(heads + kv_head) * dim;
    PlainRows<T> rows = {keys, keys + (size_t)kv_heads * dim, stride};
    size_t row = start + blockIdx.x;
    attend_any(qkv + row * stride + head * dim, rows, 0, len, dim, scale, out + (row * heads + head) * dim);
}

// ---- the eager form ----

// The largest (or the sum) over the block of each thread's x.
template <bool LARGEST> DEVICE float over_block(float x) {
    __shared__ float parts[ANY_WARPS];
    x = LARGEST ? warp_max(x) : warp_sum(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    float whole = parts[0];
    for (int w = 1; w < ANY_WARPS; w++) whole = LARGEST ? fmaxf(whole, parts[w]) : whole + parts[w];
    return whole;
}

template <class T, class C>
DEVICE void paged_eager(const T *qkv, const unsigned char *cache, const u32 *spans, int span_index,
                        const u32 *blocks, T *out, float *weights, int heads, int kv_heads, int dim,
                        float scale, int window) {
    __shared__ float query[ANY_MAX_DIM];
    SpanEntry span = ((const SpanEntry *)spans)[span_index];
    int i = blockIdx.x, head = blockIdx.y;
    int end = span.kv_len - span.q_len + i + 1, first = max(0, end - window);
    size_t row = span.q_start + i;
    PagedRows<C> rows = {cache, blocks + span.blocks, kv_heads, head / (heads / kv_heads), dim};
    read_query(query, qkv + (row * (heads + 2 * kv_heads) + head) * dim, dim, scale);
    float *line = weights + ((size_t)head * span.q_len + i) * span.kv_len;

    float high = LOWEST, sum = 0.0f;
    for (int j = first + threadIdx.x; j < end; j += blockDim.x) {
        line[j] = key_product(query, rows, j, dim);
        high = fmaxf(high, line[j]);
    }
    high = over_block<true>(high);
    for (int j = first + threadIdx.x; j < end; j += blockDim.x) {
        line[j] = expf(line[j] - high);
        sum += line[j];
    }
    sum = over_block<false>(sum);
    for (int j = threadIdx.x; j < span.kv_len; j += blockDim.x)
        line[j] = j >= first && j < end ? line[j] / sum : 0.0f;
    __syncthreads();
    for (int d = 2 * threadIdx.x; d < dim; d += 2 * blockDim.x) {
        float x = 0.0f, y = 0.0f;
        for (int j = first; j < end; j++) {
            float a, b, weight = line[j] * rows.scale(j, 1);
            read_two(rows.value(j) + d, a, b);
            x += weight * a;
            y += weight * b;
        }
        T *to = out + (row * heads + head) * dim + d;
        write_two(to, x, y);
    }
}

// One span; also its softmax weights [heads][q_len][kv_len]. Grid (q_len, heads), ANY_WARPS warps.
template <class T>
DEVICE void paged_attention_eager(const T *qkv, const unsigned char *cache, const u32 *spans, int span_index,
                                  const u32 *blocks, T *out, float *weights, int heads, int kv_heads, int dim,
                                  float scale, int window, int cache_kind) {
    if (cache_kind == CACHE_INT8)
        paged_eager<T, i8>(qkv, cache, spans, span_index, blocks, out, weights, heads, kv_heads, dim, scale,
                           window);
    else if (cache_kind == CACHE_F32)
        paged_eager<T, float>(qkv, cache, spans, span_index, blocks, out, weights, heads, kv_heads, dim, scale,
                              window);
    else
        paged_eager<T, T>(qkv, cache, spans, span_index, blocks, out, weights, heads, kv_heads, dim, scale,
                          window);
}

// ---- a cache of another type, as T ----

template <class T, class C>
DEVICE void widen_record(const unsigned char *cache, size_t from, T *to, int dim) {
    const C *record = (const C *)(cache + from * record_bytes<C>(dim));
    for (int i = 2 * threadIdx.x; i < 2 * KV_BLOCK * dim; i += 2 * blockDim.x) {
        float a, b, scale = 1.0f;
        if constexpr (Scaled<C>::value) scale = ((const float *)(record + 2 * KV_BLOCK * dim))[i / dim];
        read_two(record + i, a, b);
        write_two(to + i, a * scale, b * scale);
    }
}

// Copies the listed blocks into `to`, one after the other, as a cache of T. Grid (blocks, kv_heads).
template <class T>
DEVICE void cache_as(const unsigned char *cache, const u32 *blocks, T *to, int kv_heads, int dim,
                     int cache_kind) {
    size_t from = (size_t)blocks[blockIdx.x] * kv_heads + blockIdx.y;
    to += ((size_t)blockIdx.x * kv_heads + blockIdx.y) * 2 * KV_BLOCK * dim;
    if (cache_kind == CACHE_INT8)
        widen_record<T, i8>(cache, from, to, dim);
    else
        widen_record<T, float>(cache, from, to, dim);
}

// What a kernel begins with: see prelude.cu.
#define BEGIN()                                                                                                 \
    let_next_begin();                                                                                           \
    wait_for_previous()

#define KERNELS_OF_TYPE(T)                                                                                      \
    GLOBAL(rope_write_kv_##T)                                                                                   \
    (T *qkv, const float *cos_sin, unsigned char *cache, const u32 *slots, int heads, int kv_heads, int dim,    \
     int cache_kind) {                                                                                          \
        BEGIN();                                                                                                \
        rope_write_kv<T>(qkv, cos_sin, cache, slots, heads, kv_heads, dim, cache_kind);                         \
    }                                                                                                           \
    GLOBAL(paged_attention_any_##T)                                                                             \
    (const T *qkv, const unsigned char *cache, const u32 *spans, const u32 *blocks, T *out, int heads,          \
     int kv_heads, int dim, float scale, int window, int cache_kind) {                                          \
        BEGIN();                                                                                                \
        paged_attention_any<T>(qkv, cache, spans, blocks, out, heads, kv_heads, dim, scale, window,             \
                               cache_kind);                                                                     \
    }                                                                                                           \
    GLOBAL(full_attention_any_##T)                                                                              \
    (const T *qkv, T *out, int len, int heads, int kv_heads, int dim, float scale) {                            \
        BEGIN();                                                                                                \
        full_attention_any<T>(qkv, out, len, heads, kv_heads, dim, scale);                                      \
    }                                                                                                           \
    GLOBAL(paged_attention_eager_##T)                                                                           \
    (const T *qkv, const unsigned char *cache, const u32 *spans, int span_index, const u32 *blocks, T *out,     \
     float *weights, int heads, int kv_heads, int dim, float scale, int window, int cache_kind) {               \
        BEGIN();                                                                                                \
        paged_attention_eager<T>(qkv, cache, spans, span_index, blocks, out, weights, heads, kv_heads, dim,     \
                                 scale, window, cache_kind);                                                    \
    }                                                                                                           \
    GLOBAL(cache_as_##T)                                                                                        \
    (const unsigned char *cache, const u32 *blocks, T *to, int kv_heads, int dim, int cache_kind) {             \
        BEGIN();                                                                                                \
        cache_as<T>(cache, blocks, to, kv_heads, dim, cache_kind);                                              \
    }

typedef float f32;
KERNELS_OF_TYPE(f32)
KERNELS_OF_TYPE(bf16)
KERNELS_OF_TYPE(f16)
