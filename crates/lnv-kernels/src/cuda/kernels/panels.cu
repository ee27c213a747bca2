// Quantised panels to rows, rows of a weight by their number, the rotation of 8-bit weights' k, and activations
// from f32 to T.
//
// Decision: a product of many rows with a quantised weight makes a row-major T copy of it in scratch and lets the
// GEMM have that: written and read once more, which many rows pay for. A warp takes 32 outputs and 32 k at a
// time, laid over its lanes as in linear.cu, so that it reads whole lines and writes 64 bytes (in T) of each of
// 8 rows at once. 4-bit values are the table's in f32, with one rounding, after the scale.
//
// 8-bit weights stay rotated; activations are rotated to meet them. Only `gather` gives values that have to be
// rotated back.

#define PANEL 32
#define GROUP 64

// ---- formats: `value` is value `at` of k of a column, `eight` those from `at`, a multiple of 8, on ----
//
// The table's value of code c is values[c * step].

struct Bytes {
    static DEVICE float of(u32 word, u32 at) { return (float)((int)(word >> (at % 4 * 8) & 0xff) - 128); }
    static DEVICE const u32 *words(const void *w, u32 column, u32 k) {
        return (const u32 *)w + column / PANEL * (size_t)((k + 3) / 4 + 1) * PANEL + column % PANEL;
    }
    static DEVICE float scale(const u32 *words, u32 k, float back) {
        return bits_to_float(words[(k + 3) / 4 * PANEL]) * back;
    }
    static DEVICE float value(const void *w, u32 column, u32 at, u32 k, const float *, u32, float back) {
        const u32 *from = words(w, column, k);
        return of(from[at / 4 * PANEL], at) * scale(from, k, back);
    }
    static DEVICE void eight(float (&v)[8], const void *w, u32 column, u32 at, u32 k, const float *, u32, float back) {
        const u32 *from = words(w, column, k);
        const float times = scale(from, k, back);
        u32 word[2] = {from[at / 4 * PANEL], at + 4 < k ? from[(at / 4 + 1) * PANEL] : 0};
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = of(word[j / 4], j) * times;
    }
};
// 4-bit codes, eight in a word, in groups of 64 k: the order in a word, the scale's type, and where both lie.
struct OfNibbles {
    static const u32 WORDS = (GROUP / 2 + 4) * PANEL / 4; // of a group
    static DEVICE u32 code(u32 word, u32 at) { return word >> (at % 2 * 16 + at % 8 / 2 * 4) & 15; }
    static DEVICE float scale(const u32 *group, u32 column) { return bits_to_float(group[GROUP / 8 * PANEL + column]); }
};
struct OfLevels {
    static const u32 WORDS = (GROUP / 2 + 2) * PANEL / 4;
    static DEVICE u32 code(u32 word, u32 at) { return word >> (at % 4 * 8 + at % 8 / 4 * 4) & 15; }
    static DEVICE float scale(const u32 *group, u32 column) {
        return widen(((const f16 *)(group + GROUP / 8 * PANEL))[column]);
    }
};
template <class O> struct Codes {
    static DEVICE const u32 *group(const void *w, u32 column, u32 at, u32 k) {
        return (const u32 *)w + ((size_t)(column / PANEL) * ((k + GROUP - 1) / GROUP) + at / GROUP) * O::WORDS;
    }
    static DEVICE float value(const void *w, u32 column, u32 at, u32 k, const float *values, u32 step, float) {
        const u32 *from = group(w, column, at, k);
        u32 word = from[at % GROUP / 8 * PANEL + column % PANEL];
        return values[O::code(word, at) * step] * O::scale(from, column % PANEL);
    }
    static DEVICE void eight(float (&v)[8], const void *w, u32 column, u32 at, u32 k, const float *values, u32 step,
                             float) {
        const u32 *from = group(w, column, at, k);
        const u32 word = from[at % GROUP / 8 * PANEL + column % PANEL];
        const float times = O::scale(from, column % PANEL);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = values[O::code(word, j) * step] * times;
    }
};
typedef Codes<OfNibbles> Nibbles;
typedef Codes<OfLevels> Levels;
template <class T> struct Floats {
    static DEVICE float value(const void *w, u32 column, u32 at, u32 k, const float *, u32, float) {
        return widen(((const T *)w)[(size_t)column * k + at]);
    }
};

// ---- panels to rows ----

DEVICE void store8(float *to, const float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        Quad q = {float_to_bits(v[i]), float_to_bits(v[i + 1]), float_to_bits(v[i + 2]), float_to_bits(v[i + 3])};
        *(Quad *)(to + i) = q;
    }
}
template <class T> DEVICE void store8(T *to, const float (&v)[8]) {
    Quad q = {Half<T>::pack(v[0], v[1]), Half<T>::pack(v[2], v[3]), Half<T>::pack(v[4], v[5]),
              Half<T>::pack(v[6], v[7])};
    *(Quad *)to = q;
}

#define DEQUANTISE_WARPS 8

// out: [n][stride], zeros from k to stride, a multiple of 8. The grid: stride / (32 * 8), panels. The table is copied
// once for each lane, so that no two lanes meet in a bank.
template <class F, class T>
DEVICE void dequantise(const void *w, int n, int k, int stride, const float *values, float back, T *out) {
    SHARED_BYTES(shared);
    float *const table = (float *)shared; // [16][WARP]
    wait_for_previous();
    if (values) {
        for (int i = threadIdx.x; i < 16 * WARP; i += DEQUANTISE_WARPS * WARP) table[i] = values[i / WARP];
    }
    __syncthreads();
    const u32 lane = threadIdx.x % WARP;
    const u32 at = (blockIdx.x * DEQUANTISE_WARPS + threadIdx.x / WARP) * 32 + lane % 4 * 8;
    if (at >= stride) return;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 column = blockIdx.y * PANEL + lane / 4 * 4 + i;
        if (column >= n) return;
        float v[8] = {};
        if (at < k) F::eight(v, w, column, at, k, table + lane, WARP, back);
        if (at + 8 > k) {
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] = at + j < k ? v[j] : 0.0f;
        }
        store8(out + (size_t)column * stride + at, v);
    }
}

// ---- rows of a weight ----

// out[i] = W[ids[i]], [ids][k] of f32 or T. The grid: ids, k / threads.
template <class F, class T>
DEVICE void gather(const void *w, int k, const float *values, float back, const u32 *ids, int to_half, void *out) {
    int at = blockIdx.y * blockDim.x + threadIdx.x;
    wait_for_previous();
    if (at >= k) return;
    float value = F::value(w, ids[blockIdx.x], at, k, values, 1, back);
    size_t place = (size_t)blockIdx.x * k + at;
    if (to_half) {
        ((T *)out)[place] = narrow<T>(value);
    } else {
        ((float *)out)[place] = value;
    }
}

// ---- activations ----

// x [rows][k] of f32 or T to out [rows][stride] of T, zeros from k to stride. The grid: rows, stride / threads.
template <class T> DEVICE void cast(const void *x, int from_float, int k, int stride, T *out) {
    int at = blockIdx.y * blockDim.x + threadIdx.x;
    let_next_begin();
    wait_for_previous();
    if (at >= stride) return;
    size_t from = (size_t)blockIdx.x * k + at;
    float value = at >= k ? 0.0f : from_float ? ((const float *)x)[from] : widen(((const T *)x)[from]);
    out[(size_t)blockIdx.x * stride + at] = narrow<T>(value);
}

#define LARGEST 512
#define HELD (LARGEST / WARP)

// The rotation of rotate.rs: a warp takes a block of up to 512 values, of which lane l holds l, l + 32 and so on, all
// levels from the widest stride to the narrowest. x [rows][k] of f32 or T to out [rows][stride] of f32 or T, zeros
// from k to stride. The grid: rows, blocks of a row (one more if stride > k) / warps.
template <class T>
DEVICE void rotate(const void *x, int from_float, int k, int stride, int to_half, void *out) {
    let_next_begin();
    const int lane = threadIdx.x % WARP;
    int block = blockIdx.y * (blockDim.x / WARP) + threadIdx.x / WARP;
    int start = min(block, k / LARGEST) * LARGEST, size = LARGEST;
    block -= k / LARGEST;
    if (block >= 0) { // the smaller powers of two at the row's end
        for (size = LARGEST / 2; size > 0; size /= 2) {
            if (!(k & size)) continue;
            if (block-- == 0) break;
            start += size;
        }
    }
    const size_t row_in = (size_t)blockIdx.x * k, row_out = (size_t)blockIdx.x * stride;
    wait_for_previous();
    if (size == 0) { // beyond the last block: the zeros
        for (int at = k + lane; block == 0 && at < stride; at += WARP) {
            if (to_half) {
                ((T *)out)[row_out + at] = narrow<T>(0.0f);
            } else {
                ((float *)out)[row_out + at] = 0.0f;
            }
        }
        return;
    }
    float v[HELD];
#pragma unroll
    for (int j = 0; j < HELD; j++) {
        int at = j * WARP + lane;
        size_t from = row_in + start + at;
        v[j] = at >= size ? 0.0f : from_float ? ((const float *)x)[from] : widen(((const T *)x)[from]);
    }
#pragma unroll
    for (int stride_j = HELD / 2; stride_j > 0; stride_j /= 2) {
        if (stride_j * WARP >= size) continue;
#pragma unroll
        for (int j = 0; j < HELD; j++) {
            if (j & stride_j) continue;
            float a = v[j], b = v[j + stride_j];
            v[j] = a + b, v[j + stride_j] = a - b;
        }
    }
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        if (step >= size) continue;
#pragma unroll
        for (int j = 0; j < HELD; j++) {
            float other = __shfl_xor_sync(FULL, v[j], step);
            v[j] = lane & step ? other - v[j] : v[j] + other;
        }
    }
    const float scale = 1.0f / sqrtf((float)size);
#pragma unroll
    for (int j = 0; j < HELD; j++) {
        int at = j * WARP + lane;
        if (at >= size) continue;
        if (to_half) {
            ((T *)out)[row_out + start + at] = narrow<T>(v[j] * scale);
        } else {
            ((float *)out)[row_out + start + at] = v[j] * scale;
        }
    }
}

// ---- names ----

#define OF_FORMAT(format, T, F)                                                                                       \
    GLOBAL(BOUNDS(DEQUANTISE_WARPS *WARP, 1) dequantise_##format##_##T)(const void *w, int n, int k, int stride,      \
                                                                        const float *values, float back, T *out) {    \
        dequantise<F, T>(w, n, k, stride, values, back, out);                                                         \
    }                                                                                                                 \
    GLOBAL(gather_##format##_##T)(const void *w, int k, const float *values, float back, const u32 *ids, int to_half, \
                                  void *out) {                                                                        \
        gather<F, T>(w, k, values, back, ids, to_half, out);                                                          \
    }
#define OF_TYPE(T)                                                                                                    \
    OF_FORMAT(bytes, T, Bytes)                                                                                        \
    OF_FORMAT(nibbles, T, Nibbles)                                                                                    \
    OF_FORMAT(levels, T, Levels)                                                                                      \
    GLOBAL(gather_floats_##T)(const void *w, int k, const float *values, float back, const u32 *ids, int to_half,     \
                              void *out) {                                                                            \
        gather<Floats<T>, T>(w, k, values, back, ids, to_half, out);                                                  \
    }                                                                                                                 \
    GLOBAL(cast_##T)(const void *x, int from_float, int k, int stride, T *out) {                                      \
        cast<T>(x, from_float, k, stride, out);                                                                       \
    }                                                                                                                 \
    GLOBAL(rotate_##T)(const void *x, int from_float, int k, int stride, int to_half, void *out) {                    \
        rotate<T>(x, from_float, k, stride, to_half, out);                                                            \
    }
typedef float f32;
OF_TYPE(f32)
OF_TYPE(bf16)
OF_TYPE(f16)
