// Attention of one query for each sequence over the paged cache, where heads of queries share keys and values (where
// none does: single_attention.cu): reading the cache is all there is to it.
//
// Decision: flash-decoding. A block takes one head of keys and values, up to eight of the heads of queries that
// share it, and a share of the sequence's blocks of the cache; its four warps take 16 keys each of every block.
// Partial sums are merged by combine_attention, or written at once where nothing is split.
//
// The products are the tensor cores', so that eight heads of queries cost what one does. Keys and values pass
// through shared memory only to be under way in numbers, two turns of a warp at once, 16 bytes a lane at a time;
// each lane gets back what it has fetched, so there is no barrier and no conflict of banks. This works because the
// order of a sum is free: which columns of a key are a product's "first 16" may be chosen to suit the loads.
//
//   scores: rows are heads, columns keys. Column g of a product of 8 is key g, its quarter c of the sum is what
//           lane 4 g + c has read of that key. Queries are read in the same order.
//   sums:   rows are columns of the values, columns heads; summed over the keys 2c, 2c+1, 2c+8, 2c+9 of lane
//           4 g + c, whose rows g and g + 8 are two neighbouring columns that the lane has read.
//
// int8: codes are exact in T; a key's scale is applied to its score, a value's to its weight.
//
// Lengths are read from the table on the device, and a share of nothing says so by a maximum of minus
// infinity: a captured graph stays good while sequences grow.
//
// Refused: f32, and head sizes but 64 and 128.

#define KV_BLOCK 64
#define DECODE_WARPS 4
#define WARP_KEYS 16
#define GROUP 8           // heads of queries in a block
#define MOST_SPLITS 128   // a thread of combine_attention for each
#define MOST_COLUMNS 128
#define LOG2_E 1.4426950408889634f
#define LOWEST bits_to_float(0xff800000u) // minus infinity
#define NOTHING -1e30f                    // the reference before any score; finite
#define SLACK 8.0f                        // how far, as a power of two, a weight may exceed the reference's

// A lane's part of keys, values and queries, for elements C of the cache and D columns, as T multiplies them. Of a
// turn's 16 keys, lane 4 g + c has pieces (of 16 bytes) of keys g and g + 8, and of the values 2c, 2c + 1, 2c + 8
// and 2c + 9. A unit is a piece for each lane.
template <class T, class C, int D> struct Lanes;

// 16-bit elements: pieces of 8 columns.
template <class T, int D> struct Lanes<T, T, D> {
    static const int KEY_PIECES = D / 32, VALUE_PIECES = D / 64;
    static const int KEY_BYTES = D * 2, RECORD_BYTES = 2 * KV_BLOCK * D * 2;
    static const int SCALES = 0;
    // Where in a key's bytes piece i begins; in a value's.
    static DEVICE int key_piece(int i, int c) { return (i * 4 + c) * 16; }
    static DEVICE int value_piece(int i, int g) { return (i * 8 + g) * 16; }
    static DEVICE bool fetches_value(int) { return true; }
    // The four columns that lane c multiplies in product `step` are these and the next three.
    static DEVICE int columns(int step, int c) { return (step / 2 * 4 + c) * 8 + step % 2 * 4; }
    static DEVICE void key_pairs(u32 (&b)[2], const Quad (&key)[KEY_PIECES], int step) {
        const Quad &q = key[step / 2];
        b[0] = step % 2 ? q.z : q.x;
        b[1] = step % 2 ? q.w : q.y;
    }
    // The two columns of tile `tile` of lane g are this and the next.
    static DEVICE int column(int tile, int g) { return (tile / 4 * 8 + g) * 8 + tile % 4 * 2; }
    struct Value {
        Quad quads[VALUE_PIECES];
    };
    // `units`: the value's.
    static DEVICE void read(Value &v, const Quad *units, int lane) {
#pragma unroll
        for (int i = 0; i < VALUE_PIECES; i++) v.quads[i] = units[i * WARP + lane];
    }
    static DEVICE u32 pair(const Value &v, int tile) {
        const Quad &q = v.quads[tile / 4];
        return tile % 4 == 0 ? q.x : tile % 4 == 1 ? q.y : tile % 4 == 2 ? q.z : q.w;
    }
};

// Codes: pieces of 16 columns; of a value a lane needs D / 8 columns, which is half a piece if D is 64.
template <class T, int D> struct Lanes<T, i8, D> {
    static const int KEY_PIECES = D / 64, VALUE_PIECES = 1;
    static const int KEY_BYTES = D, RECORD_BYTES = 2 * KV_BLOCK * D + 2 * KV_BLOCK * 4;
    static const int SCALES = 2 * WARP_KEYS;
    static DEVICE int key_piece(int i, int c) { return (i * 4 + c) * 16; }
    static DEVICE int value_piece(int, int g) { return g * 16; }
    static DEVICE bool fetches_value(int g) { return g < D / 16; }
    static DEVICE int columns(int step, int c) { return (step / 4 * 4 + c) * 16 + step % 4 * 4; }
    // Two codes of a word as T, exactly: a byte in the lowest bits of 2^23 is a float.
    static DEVICE u32 codes(u32 word, int half) {
        word ^= 0x80808080u;
        float low = bits_to_float(__byte_perm(word, 0x4b000000u, half ? 0x7442 : 0x7440)) - 8388736.0f;
        float high = bits_to_float(__byte_perm(word, 0x4b000000u, half ? 0x7443 : 0x7441)) - 8388736.0f;
        return Half<T>::pack(low, high);
    }
    static DEVICE void key_pairs(u32 (&b)[2], const Quad (&key)[KEY_PIECES], int step) {
        const Quad &q = key[step / 4];
        u32 word = step % 4 == 0 ? q.x : step % 4 == 1 ? q.y : step % 4 == 2 ? q.z : q.w;
        b[0] = codes(word, 0);
        b[1] = codes(word, 1);
    }
    static DEVICE int column(int tile, int g) { return g * (D / 8) + tile * 2; }
    struct Value {
        u32 words[D / 32];
    };
    static DEVICE void read(Value &v, const Quad *units, int lane) {
        if constexpr (D == 128) {
            Quad q = units[lane];
            v.words[0] = q.x, v.words[1] = q.y, v.words[2] = q.z, v.words[3] = q.w;
        } else {
            Pair p = ((const Pair *)(units + lane / 8 * 4 + lane % 4))[lane / 4 % 2];
            v.words[0] = p.x, v.words[1] = p.y;
        }
    }
    static DEVICE u32 pair(const Value &v, int tile) { return codes(v.words[tile / 2], tile % 2); }
};

// What a warp has of a turn in shared memory.
template <class Of> struct Stage {
    Quad keys[2][Of::KEY_PIECES][WARP];
    Quad values[4][Of::VALUE_PIECES][WARP];
    float scales[Of::SCALES ? Of::SCALES : 4]; // of keys, then of values

    // Begins to fetch keys first .. first + 16 of a record, of which `count` exist: twice the last value rather
    // than one that may be anything.
    DEVICE void fetch(const unsigned char *record, int first, int count) {
        int lane = threadIdx.x % WARP, g = lane / 4, c = lane % 4;
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < Of::KEY_PIECES; i++)
                copy_async(&keys[n][i][lane],
                           record + (first + n * 8 + g) * Of::KEY_BYTES + Of::key_piece(i, c), true);
        if (Of::fetches_value(g)) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int row = KV_BLOCK + first + min(2 * c + e / 2 * 8 + e % 2, count - 1);
#pragma unroll
                for (int i = 0; i < Of::VALUE_PIECES; i++)
                    copy_async(&values[e][i][lane], record + row * Of::KEY_BYTES + Of::value_piece(i, g), true);
            }
        }
        if (lane < Of::SCALES / 4) {
            int row = first + lane % 4 * 4 + (lane < 4 ? 0 : KV_BLOCK);
            copy_async(scales + lane * 4, record + 2 * KV_BLOCK * Of::KEY_BYTES + row * 4, true);
        }
    }
    // Of key (or 16 + value) j.
    DEVICE float scale(int j) const {
        if constexpr (Of::SCALES > 0)
            return scales[j];
        else
            return 1.0f;
    }
};

// The queries of up to 8 heads as fragments of products, for all warps: for each product rows of 16 bytes, a head
// each, of the first and the third quarter of a fragment; the others are zero.
template <int D> struct Queries {
    Quad rows[D / 16][2][GROUP];
    Quad zero;
};

template <class T, class C, int D> struct Decode {
    typedef Lanes<T, C, D> Of;
    static const int STEPS = D / 16, TILES = D / 16;

    int g, c; // the lane is 4 g + c
    const Quad *query; // the lane's row of the first fragment, and how far it is to the next
    int query_step;
    float sum[TILES][4]; // columns by heads 2c, 2c + 1
    float reference, weight; // of head g; this lane's share of the weight

    // Queries of `count` heads.
    DEVICE void start(Queries<D> &shared, const T *queries, int count) {
        int lane = threadIdx.x % WARP;
        g = lane / 4;
        c = lane % 4;
        for (int step = threadIdx.x / WARP; step < STEPS; step += DECODE_WARPS) {
            Pair pair = {0, 0};
            if (g < count) pair = *(const Pair *)(queries + g * D + Of::columns(step, c));
            ((u32 *)&shared.rows[step][0][g])[c] = pair.x;
            ((u32 *)&shared.rows[step][1][g])[c] = pair.y;
        }
        if (threadIdx.x < 4) ((u32 *)&shared.zero)[threadIdx.x] = 0;
        __syncthreads();
        query = lane / 8 % 2 ? &shared.zero : &shared.rows[0][lane / 16][lane % 8];
        query_step = lane / 8 % 2 ? 0 : 2 * GROUP;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int e = 0; e < 4; e++) sum[tile][e] = 0.0f;
        reference = NOTHING;
        weight = 0.0f;
    }

    // The keys of a turn, of which those from .. to are seen.
    DEVICE void add(const Stage<Of> &stage, int from, int to, float factor) {
        int lane = 4 * g + c;
        float scores[2][4];
        Quad key[2][Of::KEY_PIECES];
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int i = 0; i < Of::KEY_PIECES; i++) key[n][i] = stage.keys[n][i][lane];
#pragma unroll
            for (int e = 0; e < 4; e++) scores[n][e] = 0.0f;
        }
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u32 a[4], b[2];
            ldmatrix(a, query + step * query_step);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                Of::key_pairs(b, key[n], step);
                Half<T>::mma(scores[n], a, b);
            }
        }
        // Of head g: keys 2c, 2c + 1, 2c + 8, 2c + 9.
        float s[4], high = LOWEST;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int j = 2 * c + e / 2 * 8 + e % 2;
            s[e] = scores[e / 2][e % 2] * factor * stage.scale(j);
            if (j < from || j >= to) s[e] = LOWEST;
            high = fmaxf(high, s[e]);
        }
        high = fmaxf(high, __shfl_xor_sync(FULL, high, 1));
        high = fmaxf(high, __shfl_xor_sync(FULL, high, 2));
        if (__any_sync(FULL, high > reference + SLACK)) rescale(fmaxf(high, reference));
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int j = 2 * c + e / 2 * 8 + e % 2;
            s[e] = exp2_fast(s[e] - reference);
            weight += s[e];
            s[e] *= stage.scale(WARP_KEYS + min(j, to - 1));
        }
        typename Of::Value v[4];
#pragma unroll
        for (int e = 0; e < 4; e++) Of::read(v[e], stage.values[e][0], lane);
        u32 p[2] = {Half<T>::pack(s[0], s[1]), Half<T>::pack(s[2], s[3])};
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            u32 a[4];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                u32 x = Of::pair(v[2 * e], tile), y = Of::pair(v[2 * e + 1], tile);
                a[2 * e] = __byte_perm(x, y, 0x5410);
                a[2 * e + 1] = __byte_perm(x, y, 0x7632);
            }
            Half<T>::mma(sum[tile], a, p);
        }
    }

    DEVICE void rescale(float now) {
        float shrink = exp2_fast(reference - now);
        reference = now;
        weight *= shrink;
        float left = __shfl_sync(FULL, shrink, 8 * c), right = __shfl_sync(FULL, shrink, 8 * c + 4);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            sum[tile][0] *= left;
            sum[tile][1] *= right;
            sum[tile][2] *= left;
            sum[tile][3] *= right;
        }
    }
};

// A span in the table: its first row, how many, tokens of its sequence, its first place in `blocks`.
struct SpanEntry {
    int q_start, q_len, kv_len, blocks;
};

// The shared memory of a block: first what is read, then the warps' sums.
template <class Of, int D> union DecodeShared {
    struct {
        Stage<Of> stages[DECODE_WARPS][2];
        Queries<D> queries;
    } reading;
    struct {
        float sums[DECODE_WARPS][GROUP][D + 4]; // heads 2c of the four c in different banks
        float references[DECODE_WARPS][GROUP], weights[DECODE_WARPS][GROUP];
    } merging;
};

// stats [spans][heads][splits]: a maximum, as a power of two, and a weight; sums [spans][heads][splits][D].
// Grid (splits, kv_heads * groups of 8 heads, spans). Written to out where there is one split.
template <class T, class C, int D>
DEVICE void decode_attention(unsigned char *memory, const T *qkv, const unsigned char *cache, const u32 *spans,
                             const u32 *blocks, float *stats, float *sums, T *out, int heads, int kv_heads,
                             float scale, int window) {
    typedef Lanes<T, C, D> Of;
    DecodeShared<Of, D> &shared = *(DecodeShared<Of, D> *)memory;
    SpanEntry span = ((const SpanEntry *)spans)[blockIdx.z];
    int shared_by = heads / kv_heads, groups = ceil_div(shared_by, GROUP);
    int kv_head = blockIdx.y / groups, group = blockIdx.y % groups * GROUP;
    int first_head = kv_head * shared_by + group, count = min(GROUP, shared_by - group);
    int splits = gridDim.x, split = blockIdx.x, warp = threadIdx.x / WARP;
    size_t entry = ((size_t)blockIdx.z * heads + first_head) * splits + split; // the next head's: splits on

    // This split's blocks of those that the query sees.
    int from = max(0, span.kv_len - window);
    int low = from / KV_BLOCK, all = ceil_div(span.kv_len, KV_BLOCK) - low, share = ceil_div(all, splits);
    int block = low + split * share, end = low + min(all, (split + 1) * share);
    if (block >= end) {
        if (splits > 1 && (int)threadIdx.x < count) stats[2 * (entry + threadIdx.x * splits)] = LOWEST;
        return;
    }

    // Of a block the warp has 16 keys, which may be before or beyond what the query sees.
    auto first_key = [&](int b) { return b * KV_BLOCK + warp * WARP_KEYS; };
    auto sees = [&](int b) { return first_key(b) < span.kv_len && first_key(b) + WARP_KEYS > from; };
    auto fetch = [&](int b, u32 index) {
        const unsigned char *record = cache + ((size_t)index * kv_heads + kv_head) * Of::RECORD_BYTES;
        if (sees(b))
            shared.reading.stages[warp][b % 2].fetch(record, warp * WARP_KEYS, span.kv_len - first_key(b));
    };
    blocks += span.blocks;
    u32 ahead = block + 1 < end ? blocks[block + 1] : 0;
    fetch(block, blocks[block]);
    copy_commit();
    Decode<T, C, D> state;
    state.start(shared.reading.queries,
                qkv + (size_t)span.q_start * (heads + 2 * kv_heads) * D + first_head * D, count);
    for (; block < end; block++) {
        if (block + 1 < end) fetch(block + 1, ahead);
        copy_commit();
        if (block + 2 < end) ahead = blocks[block + 2];
        copy_wait<1>();
        __syncwarp();
        if (sees(block))
            state.add(shared.reading.stages[warp][block % 2], from - first_key(block),
                      span.kv_len - first_key(block), scale * LOG2_E);
        __syncwarp();
    }

    __syncthreads(); // the sums lie where the stages did
    auto &merged = shared.merging.sums;
    auto &references = shared.merging.references, &weights = shared.merging.weights;
    int g = state.g, c = state.c;
    float whole = state.weight;
    whole += __shfl_xor_sync(FULL, whole, 1);
    whole += __shfl_xor_sync(FULL, whole, 2);
    if (c == 0) references[warp][g] = state.reference, weights[warp][g] = whole;
#pragma unroll
    for (int tile = 0; tile < D / 16; tile++) {
        // In the order of tiles, which the reader undoes.
        float *to = &merged[warp][2 * c][tile * 16 + 2 * g];
        to[0] = state.sum[tile][0];
        to[1] = state.sum[tile][2];
        to[D + 4] = state.sum[tile][1];
        to[D + 4 + 1] = state.sum[tile][3];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * (D / 2); i += DECODE_WARPS * WARP) {
        int head = i / (D / 2), pair = i % (D / 2);
        float top = NOTHING, weight = 0.0f, x = 0.0f, y = 0.0f;
#pragma unroll
        for (int w = 0; w < DECODE_WARPS; w++) top = fmaxf(top, references[w][head]);
#pragma unroll
        for (int w = 0; w < DECODE_WARPS; w++) {
            float factor = exp2_fast(references[w][head] - top);
            weight += factor * weights[w][head];
            x += factor * merged[w][head][2 * pair];
            y += factor * merged[w][head][2 * pair + 1];
        }
        int column = Of::column(pair / 8, pair % 8);
        if (splits == 1) {
            T *to = out + ((size_t)span.q_start * heads + first_head + head) * D + column;
            *(u32 *)to = Half<T>::pack(x / weight, y / weight);
            continue;
        }
        size_t at = entry + (size_t)head * splits;
        if (pair == 0) stats[2 * at] = top, stats[2 * at + 1] = weight;
        Pair both = {float_to_bits(x), float_to_bits(y)};
        *(Pair *)(sums + at * D + column) = both;
    }
}

// Merges the splits' sums, at most MOST_SPLITS. Grid (heads, spans), DECODE_WARPS warps, which share the splits.
template <class T>
DEVICE void combine_attention(const float *stats, const float *sums, const u32 *spans, T *out, int heads, int dim,
                              int splits) {
    __shared__ float factors[MOST_SPLITS], highest[DECODE_WARPS], weights[DECODE_WARPS];
    __shared__ float parts[DECODE_WARPS][MOST_COLUMNS];
    int q_start = ((const SpanEntry *)spans)[blockIdx.y].q_start, head = blockIdx.x;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    size_t entry = ((size_t)blockIdx.y * heads + head) * splits;

    // A split for each thread.
    Pair mine = {float_to_bits(LOWEST), 0};
    if ((int)threadIdx.x < splits) mine = ((const Pair *)stats)[entry + threadIdx.x];
    float high = bits_to_float(mine.x), top = warp_max(high);
    if (lane == 0) highest[warp] = top;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < DECODE_WARPS; w++) top = fmaxf(top, highest[w]);
    float factor = high == LOWEST ? 0.0f : exp2_fast(high - top); // where nothing was written
    factors[threadIdx.x] = factor;
    float weight = factor == 0.0f ? 0.0f : factor * bits_to_float(mine.y);
    weight = warp_sum(weight);
    if (lane == 0) weights[warp] = weight;
    __syncthreads();

    float sum[MOST_COLUMNS / WARP];
#pragma unroll
    for (int i = 0; i < MOST_COLUMNS / WARP; i++) sum[i] = 0.0f;
#pragma unroll 4
    for (int s = warp; s < splits; s += DECODE_WARPS) {
        float share = factors[s];
        const float *from = sums + (entry + s) * dim + 2 * lane;
#pragma unroll
        for (int i = 0; i < MOST_COLUMNS / WARP / 2; i++) {
            Pair both = {0, 0};
            if (share != 0.0f && i * 2 * WARP < dim) both = *(const Pair *)(from + i * 2 * WARP);
            sum[2 * i] += share * bits_to_float(both.x);
            sum[2 * i + 1] += share * bits_to_float(both.y);
        }
    }
#pragma unroll
    for (int i = 0; i < MOST_COLUMNS / WARP; i++) parts[warp][i / 2 * 2 * WARP + 2 * lane + i % 2] = sum[i];
    __syncthreads();
    int d = threadIdx.x;
    if (d >= dim) return;
    float x = 0.0f, whole = 0.0f;
#pragma unroll
    for (int w = 0; w < DECODE_WARPS; w++) {
        x += parts[w][d];
        whole += weights[w];
    }
    out[((size_t)q_start * heads + head) * dim + d] = narrow<T>(x / whole);
}

// What a kernel begins with: see prelude.cu.
#define BEGIN()                                                                                                 \
    let_next_begin();                                                                                           \
    wait_for_previous()

#define DECODE(name, D, C, T)                                                                                   \
    GLOBAL(BOUNDS(128, 3) decode_attention_##name##_##T)                                                        \
    (const T *qkv, const unsigned char *cache, const u32 *spans, const u32 *blocks, float *stats, float *sums,  \
     T *out, int heads, int kv_heads, float scale, int window) {                                                \
        BEGIN();                                                                                                \
        SHARED_BYTES(shared);                                                                                   \
        decode_attention<T, C, D>(shared, qkv, cache, spans, blocks, stats, sums, out, heads, kv_heads, scale,  \
                                  window);                                                                      \
    }
#define KERNELS_OF_TYPE(T)                                                                                      \
    DECODE(64, 64, T, T)                                                                                        \
    DECODE(128, 128, T, T)                                                                                      \
    DECODE(64_int8, 64, i8, T)                                                                                  \
    DECODE(128_int8, 128, i8, T)                                                                                \
    GLOBAL(combine_attention_##T)                                                                               \
    (const float *stats, const float *sums, const u32 *spans, T *out, int heads, int dim, int splits) {         \
        BEGIN();                                                                                                \
        combine_attention<T>(stats, sums, spans, out, heads, dim, splits);                                      \
    }

KERNELS_OF_TYPE(bf16)
KERNELS_OF_TYPE(f16)
