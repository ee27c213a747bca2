// Attention of many queries, on the tensor cores: prompts over the paged cache, and pictures over themselves.
//
// Decision: FlashAttention-2's form. A block of four warps has a tile of queries of one head, 32 (or 16) to a
// warp, and walks over tiles of 64 keys, which is a block of the cache: scores, softmax and the weighted sum
// stay in registers, keys and values pass through shared memory. One buffer for the keys and one for the
// values: while a tile's scores are computed its values come in, and while its values are summed the next
// keys do. Two blocks on a multiprocessor fill each other's gaps. Warps of 32 queries, because shared memory
// would be the limit with 16: each fragment of a key then serves two products.
//
// Pictures with heads of 64 are bound by exponentials and by the turns that a warp must wait: there a tile's keys are
// taken by halves, which leaves registers for three blocks, and shared memory for two tiles, with one barrier each.
//
// Tiles go from the last to the first, so that those on the diagonal, which need a mask, come first. The
// running maximum is a reference only: sums are rescaled when a score exceeds it by 2^8, which the final
// division makes up for, and which hardly ever happens after the first tiles.
//
// Refused: f32, a cache of another type (cache_as copies it), head sizes without an instance below.

#define KEYS 64
#define FLASH_WARPS 4
#define LOG2_E 1.4426950408889634f
#define LOWEST bits_to_float(0xff800000u) // minus infinity
// The reference before any score: below them all, yet finite, so that it can be subtracted from LOWEST.
#define NOTHING -1e30f
// How far, as a power of two, a weight may exceed the reference's.
#define SLACK 8.0f

// Rows of D values in shared memory, an odd number of pieces of 16 bytes long: then eight rows at the same
// column lie in different banks, and every place is a constant away from a lane's first.
template <int D> struct Tile {
    static const int WIDE = (D + 15) / 16 * 16; // columns of the products; those beyond D are zero
    static const int PIECES = WIDE / 8;
    static const int STRIDE = WIDE + 8;

    static DEVICE int at(int row, int piece) { return row * STRIDE + piece * 8; }

    // Begins to copy ROWS rows, of which `valid` exist; zeros for the others.
    template <int ROWS, class T, class Stride>
    static DEVICE void copy(T *to, const T *from, Stride stride, int valid) {
        const int THREADS = FLASH_WARPS * WARP;
        if constexpr (THREADS % PIECES == 0) {
            // A thread keeps to one column.
            u32 row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
            to += at(row, piece);
            from += row * stride + piece * 8;
            if (valid >= ROWS) {
#pragma unroll
                for (u32 r = 0; r < ROWS; r += THREADS / PIECES)
                    copy_async(to + r * STRIDE, from + r * stride, true);
            } else {
#pragma unroll
                for (u32 r = 0; r < ROWS; r += THREADS / PIECES)
                    copy_async(to + r * STRIDE, from + r * stride, (int)(r + row) < valid);
            }
        } else {
#pragma unroll
            for (u32 i = 0; i < ROWS * PIECES; i += THREADS) {
                u32 index = i + threadIdx.x, row = index / PIECES, piece = index % PIECES;
                copy_async(to + at(row, piece), from + row * stride + piece * 8,
                           (int)row < valid && piece < D / 8);
            }
        }
    }
};

// One head of a sequence in the paged cache.
template <class T, int D> struct PagedTiles {
    const T *cache;
    const u32 *blocks;
    int kv_heads, kv_head;

    DEVICE const T *keys(int tile) const {
        return cache + ((size_t)blocks[tile] * kv_heads + kv_head) * (2 * KEYS * D);
    }
    DEVICE const T *values(int tile) const { return keys(tile) + KEYS * D; }
    DEVICE u32 stride() const { return D; }
};

// One head of consecutive rows of qkv.
template <class T> struct PlainTiles {
    const T *first_key, *first_value;
    size_t row;

    DEVICE const T *keys(int tile) const { return first_key + tile * KEYS * row; }
    DEVICE const T *values(int tile) const { return first_value + tile * KEYS * row; }
    DEVICE size_t stride() const { return row; }
};

// The keys that a query sees: the first, and one beyond the last. Queries of a tile are consecutive.
struct Sight {
    int position; // of the tile's query 0; without a mask: of no meaning
    int window, keys;
    bool causal;

    DEVICE int end(int row) const { return causal ? min(keys, position + row + 1) : keys; }
    DEVICE int first(int row) const { return causal ? max(0, position + row + 1 - window) : 0; }
};

// MT 16-row tiles of queries in a warp, and as many keys of a tile at once as PART says.
template <class T, int D, int MT, int PART = KEYS> struct Flash {
    typedef Tile<D> Form;
    static const int WIDE = Form::WIDE;
    static const int ROWS = FLASH_WARPS * 16 * MT;
    static const int STEPS = WIDE / 16;
    // Queries that fit stay in registers; a few need no place of their own then, but borrow the values'.
    static const bool KEEPS_QUERIES = D <= 64 || MT == 1;
    static const bool BORROWS = MT == 1 || PART < KEYS;
    // Where registers are scarce, exponentials are taken just before their products.
    static const bool SOFTENS_LATE = D * MT >= 256;

    T *queries, *keys, *values; // in shared memory; the queries are the warp's
    // Where a lane's part of the first fragment lies.
    const T *query_lane, *key_lane, *value_lane;
    u32 q[KEEPS_QUERIES ? STEPS : 1][MT][4];
    float scores[MT][PART / 8][4];
    float sum[MT][D / 8][4];
    float reference[MT][2], weight[MT][2];

    static DEVICE int lane() { return threadIdx.x % WARP; }

    DEVICE void query_fragment(u32 (&a)[4], int m, int step) const {
        ldmatrix(a, query_lane + Form::at(m * 16, 2 * step));
    }

    DEVICE void start() {
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int n = 0; n < D / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) sum[m][n][e] = 0.0f;
            reference[m][0] = reference[m][1] = NOTHING;
            weight[m][0] = weight[m][1] = 0.0f;
        }
    }

    // scores = q k, of the tile's keys from `first` on.
    DEVICE void multiply_keys(int first) {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < PART / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) scores[m][n][e] = 0.0f;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u32 a[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++) {
                if constexpr (KEEPS_QUERIES) {
#pragma unroll
                    for (int e = 0; e < 4; e++) a[m][e] = q[step][m][e];
                } else {
                    query_fragment(a[m], m, step);
                }
            }
#pragma unroll
            for (int n = 0; n < PART / 16; n++) {
                u32 b[4];
                ldmatrix(b, key_lane + Form::at(first + n * 16, 2 * step));
                u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    Half<T>::mma(scores[m][2 * n], a[m], left);
                    Half<T>::mma(scores[m][2 * n + 1], a[m], right);
                }
            }
        }
    }

    // Minus infinity for what a query does not see. `row`: of the warp's first query in its tile.
    DEVICE void mask(const Sight &sight, int row, int first_key) {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int r = row + m * 16 + half * 8 + lane() / 4, j = first_key + lane() % 4 * 2;
                int from = sight.first(r) - j, to = sight.end(r) - j;
#pragma unroll
                for (int n = 0; n < PART / 8; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        int at = n * 8 + e;
                        if (at < from || at >= to) scores[m][n][half * 2 + e] = LOWEST;
                    }
            }
    }

    // Raises the references that are too low for the scores. Lanes ask each other only when there are some.
    DEVICE void raise(float factor) {
        float highest[MT][2];
        bool low = false;
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float high = LOWEST;
#pragma unroll
                for (int n = 0; n < PART / 8; n++)
                    high = fmaxf(high, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
                highest[m][half] = high * factor;
                low |= highest[m][half] > reference[m][half] + SLACK;
            }
        if (__any_sync(FULL, low)) rescale(highest);
    }

    // `highest`: of the lane's scores.
    DEVICE void rescale(const float (&highest)[MT][2]) {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float before = reference[m][half], now = fmaxf(before, highest[m][half]);
                now = fmaxf(now, __shfl_xor_sync(FULL, now, 1));
                now = fmaxf(now, __shfl_xor_sync(FULL, now, 2));
                float shrink = exp2_fast(before - now);
                reference[m][half] = now;
                weight[m][half] *= shrink;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    sum[m][n][half * 2] *= shrink;
                    sum[m][n][half * 2 + 1] *= shrink;
                }
            }
    }

    // Two neighbouring scores' weights, 2^(factor score - reference).
    DEVICE void soften(int m, int n, int half, float factor) {
        float part = 0.0f;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float &s = scores[m][n][half * 2 + e];
            s = exp2_fast(s * factor - reference[m][half]);
            part += s;
        }
        weight[m][half] += part;
    }

    DEVICE void soften_all(float factor) {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < PART / 8; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) soften(m, n, half, factor);
    }

    // sum += softened scores v, of the tile's values from `first` on.
    DEVICE void add_values(int first, float factor) {
        if constexpr (!SOFTENS_LATE) soften_all(factor);
#pragma unroll
        for (int step = 0; step < PART / 16; step++) {
            u32 a[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int n = 2 * step + e / 2, half = e % 2;
                    if constexpr (SOFTENS_LATE) soften(m, n, half, factor);
                    a[m][e] = Half<T>::pack(scores[m][n][half * 2], scores[m][n][half * 2 + 1]);
                }
#pragma unroll
            for (int n = 0; n < WIDE / 16; n++) {
                u32 b[4];
                ldmatrix_transposed(b, value_lane + Form::at(first + step * 16, 2 * n));
                u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    Half<T>::mma(sum[m][2 * n], a[m], left);
                    if (2 * n + 1 < D / 8) Half<T>::mma(sum[m][2 * n + 1], a[m], right);
                }
            }
        }
    }

    // Divides by the weights and writes the warp's `valid` rows, by way of the queries' place: whole pieces.
    DEVICE void finish(T *out, size_t stride, int valid) {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float whole = weight[m][half];
                whole += __shfl_xor_sync(FULL, whole, 1);
                whole += __shfl_xor_sync(FULL, whole, 2);
                float factor = 1.0f / whole;
                int row = m * 16 + half * 8 + lane() / 4;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    const float(&s)[4] = sum[m][n];
                    *(u32 *)(queries + Form::at(row, n) + lane() % 4 * 2) =
                        Half<T>::pack(s[half * 2] * factor, s[half * 2 + 1] * factor);
                }
            }
        __syncwarp();
        for (int i = lane(); i < 16 * MT * (D / 8); i += WARP) {
            int row = i / (D / 8), piece = i % (D / 8);
            if (row >= valid) break;
            *(Quad *)(out + row * stride + piece * 8) = *(const Quad *)(queries + Form::at(row, piece));
        }
    }

    // The warp's first query in its block's tile.
    static DEVICE int first_row() { return threadIdx.x / WARP * 16 * MT; }

    // The sums and weights for `valid` consecutive queries.
    template <class Tiles>
    DEVICE void run(unsigned char *shared, const T *from, size_t from_stride, int valid, const Tiles &tiles,
                    const Sight &sight, float factor) {
        keys = (T *)shared;
        values = keys + KEYS * Form::STRIDE;
        T *all_queries = BORROWS ? values : values + KEYS * Form::STRIDE;
        queries = all_queries + first_row() * Form::STRIDE;
        query_lane = queries + Form::at(lane() % 16, lane() / 16);
        key_lane = keys + Form::at(lane() / 16 * 8 + lane() % 8, lane() / 8 % 2);
        value_lane = values + Form::at(lane() % 16, lane() / 16);
        int tile = (sight.end(valid - 1) - 1) / KEYS;
        Form::template copy<ROWS>(all_queries, from, from_stride, valid);
        Form::template copy<KEYS>(keys, tiles.keys(tile), tiles.stride(), sight.keys - tile * KEYS);
        copy_commit();
        start();
        if constexpr (KEEPS_QUERIES) {
            copy_wait<0>();
            __syncthreads();
#pragma unroll
            for (int step = 0; step < STEPS; step++)
#pragma unroll
                for (int m = 0; m < MT; m++) query_fragment(q[step][m], m, step);
        }
        for (int last = sight.first(0) / KEYS; tile >= last; tile--) {
            copy_wait<0>();
            __syncthreads();
            Form::template copy<KEYS>(values, tiles.values(tile), tiles.stride(), sight.keys - tile * KEYS);
            copy_commit();
            // Those beyond the last query's sight need no products; the others of the warp may.
            bool sees = tile * KEYS < sight.end(first_row() + 16 * MT - 1) && first_row() < valid;
            if (sees) multiply_keys(0);
            copy_wait<0>();
            __syncthreads();
            if (tile > last) Form::template copy<KEYS>(keys, tiles.keys(tile - 1), tiles.stride(), KEYS);
            copy_commit();
            if (sees) {
                if (tile * KEYS + KEYS > sight.end(first_row()) ||
                    tile * KEYS < sight.first(first_row() + 16 * MT - 1))
                    mask(sight, first_row(), tile * KEYS);
                raise(factor);
                add_values(0, factor);
            }
        }
        if constexpr (BORROWS) __syncthreads();
    }

    // The same without a mask but the end of the keys, for all of them. Two buffers for keys and values, of which the
    // queries borrow the second, and one barrier for each tile.
    template <class Tiles>
    DEVICE void run_doubled(unsigned char *shared, const T *from, size_t from_stride, int valid, const Tiles &tiles,
                            int count, float factor) {
        const int STAGE = 2 * KEYS * Form::STRIDE;
        static_assert(KEEPS_QUERIES && BORROWS && ROWS <= 2 * KEYS, "queries find room in a buffer");
        T *first_stage = (T *)shared;
        queries = first_stage + STAGE + first_row() * Form::STRIDE;
        query_lane = queries + Form::at(lane() % 16, lane() / 16);
        int key_at = Form::at(lane() / 16 * 8 + lane() % 8, lane() / 8 % 2);
        int value_at = Form::at(KEYS + lane() % 16, lane() / 16);
        auto fetch = [&](int tile, T *to) {
            Form::template copy<KEYS>(to, tiles.keys(tile), tiles.stride(), count - tile * KEYS);
            Form::template copy<KEYS>(to + KEYS * Form::STRIDE, tiles.values(tile), tiles.stride(),
                                      count - tile * KEYS);
            copy_commit();
        };
        Form::template copy<ROWS>(first_stage + STAGE, from, from_stride, valid);
        int tile = (count - 1) / KEYS;
        fetch(tile, first_stage);
        start();
        copy_wait<0>();
        __syncthreads();
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int m = 0; m < MT; m++) query_fragment(q[step][m], m, step);
        int stage = 0; // where the tile is
        for (; tile >= 0; tile--) {
            copy_wait<0>();
            __syncthreads();
            if (tile > 0) fetch(tile - 1, first_stage + (STAGE - stage));
            if (first_row() < valid) {
                key_lane = first_stage + stage + key_at;
                value_lane = first_stage + stage + value_at;
#pragma unroll 1
                for (int first = 0; first < min(KEYS, count - tile * KEYS); first += PART) {
                    multiply_keys(first);
                    int left = count - tile * KEYS - first;
                    if (left < PART) mask({0, 0, left, false}, 0, 0);
                    raise(factor);
                    add_values(first, factor);
                }
            }
            stage = STAGE - stage;
        }
        __syncthreads();
    }
};

// A span in the table: its first row, how many, tokens of its sequence, its first place in `blocks`.
struct SpanEntry {
    int q_start, q_len, kv_len, blocks;
};

// Causal attention over a cache of T. work: pairs of a span and its first query in the tile, the longest
// first. Grid (heads, tiles).
template <class T, int D, int MT>
DEVICE void prefill_attention(unsigned char *shared, const T *qkv, const T *cache, const u32 *spans,
                              const u32 *blocks, const u32 *work, T *out, int heads, int kv_heads, float scale,
                              int window) {
    typedef Flash<T, D, MT> Core;
    SpanEntry span = ((const SpanEntry *)spans)[work[2 * blockIdx.y]];
    int first = work[2 * blockIdx.y + 1], head = blockIdx.x;
    size_t row = span.q_start + first, stride = (size_t)(heads + 2 * kv_heads) * D;
    PagedTiles<T, D> tiles = {cache, blocks + span.blocks, kv_heads, head / (heads / kv_heads)};
    Sight sight = {span.kv_len - span.q_len + first, window, span.kv_len, true};
    int valid = min((int)Core::ROWS, span.q_len - first);
    Core core;
    core.run(shared, qkv + row * stride + head * D, stride, valid, tiles, sight, scale * LOG2_E);
    core.finish(out + ((row + Core::first_row()) * heads + head) * D, (size_t)heads * D,
                valid - Core::first_row());
}

// Each segment of `len` rows with itself. Grid (tiles, heads, segments).
template <class T, int D, int MT, int PART>
DEVICE void full_attention(unsigned char *shared, const T *qkv, T *out, int len, int heads, int kv_heads,
                           float scale) {
    typedef Flash<T, D, MT, PART> Core;
    int first = blockIdx.x * Core::ROWS, head = blockIdx.y, kv_head = head / (heads / kv_heads);
    size_t stride = (size_t)(heads + 2 * kv_heads) * D, start = (size_t)blockIdx.z * len, row = start + first;
    const T *keys = qkv + start * stride + (size_t)(heads + kv_head) * D, *queries = qkv + row * stride + head * D;
    PlainTiles<T> tiles = {keys, keys + (size_t)kv_heads * D, stride};
    int valid = min((int)Core::ROWS, len - first);
    Core core;
    if constexpr (PART < KEYS)
        core.run_doubled(shared, queries, stride, valid, tiles, len, scale * LOG2_E);
    else
        core.run(shared, queries, stride, valid, tiles, Sight{0, 0, len, false}, scale * LOG2_E);
    core.finish(out + ((row + Core::first_row()) * heads + head) * D, (size_t)heads * D,
                valid - Core::first_row());
}

// `name` tells the queries of a block: 64 MT.
// What a kernel begins with: see prelude.cu.
#define BEGIN()                                                                                                 \
    let_next_begin();                                                                                           \
    wait_for_previous()

#define PREFILL(name, D, MT, T)                                                                                 \
    GLOBAL(BOUNDS(128, 2) prefill_attention_##name##_##T)                                                       \
    (const T *qkv, const T *cache, const u32 *spans, const u32 *blocks, const u32 *work, T *out, int heads,     \
     int kv_heads, float scale, int window) {                                                                   \
        BEGIN();                                                                                                \
        SHARED_BYTES(shared);                                                                                   \
        prefill_attention<T, D, MT>(shared, qkv, cache, spans, blocks, work, out, heads, kv_heads, scale,       \
                                    window);                                                                    \
    }
#define FULL_ROWS(D, PART, BLOCKS, T)                                                                           \
    GLOBAL(BOUNDS(128, BLOCKS) full_attention_##D##_##T)                                                          \
    (const T *qkv, T *out, int len, int heads, int kv_heads, float scale) {                                     \
        BEGIN();                                                                                                \
        SHARED_BYTES(shared);                                                                                   \
        full_attention<T, D, 2, PART>(shared, qkv, out, len, heads, kv_heads, scale);                           \
    }
#define KERNELS_OF_TYPE(T)                                                                                      \
    PREFILL(64_of_128, 64, 2, T)                                                                                \
    PREFILL(128_of_128, 128, 2, T)                                                                              \
    PREFILL(128_of_64, 128, 1, T)                                                                               \
    FULL_ROWS(64, 32, 3, T)                                                                                     \
    FULL_ROWS(72, 64, 2, T)

KERNELS_OF_TYPE(bf16)
KERNELS_OF_TYPE(f16)
