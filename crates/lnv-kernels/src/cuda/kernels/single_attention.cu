// Attention of one query for each sequence where every head of queries has keys and values of its own: the cache is
// read once, and nothing else takes time.
//
// Decision: no tensor cores and no shared memory on the way. A product of matrices would be one row in eight here,
// and what passes through shared memory is moved twice. Keys go from memory to registers, 16 bytes a lane at a time,
// and are multiplied in f32. A warp takes a unit of keys at a time, whose rows are consecutive in the cache: 512 bytes
// for each load of a warp. While a unit's keys are multiplied its values are on the way, and while those are summed
// the next unit's keys are: volatile loads, whose order the compiler keeps. Four blocks on a multiprocessor so have
// 64 KiB on the way at least, which is what its share of the memory's bandwidth takes.
//
// A row is several lanes', so a key's score is a sum over lanes. Sums of several keys are made at once: lanes trade
// halves of what they have, as a butterfly, until each has one key's; then one exponential serves the whole unit.
//
// A sequence's units are shared out evenly over its blocks' warps. Blocks leave their sums in memory, and the one
// that comes last merges them, always in the same order: results do not depend on which it is.
//
// int8: a code c is put into the bits of a float that is 2^15 + 128 + c. For a value that is taken off again; for a
// key's score once for all terms, which costs it at most 2^-9 of a step of the codes for each.
//
// Lengths are read from the table on the device, and a share may be empty: a captured graph stays good while
// sequences grow. The table is written by copies, never by a kernel, so that it may be read before the kernel ahead
// has ended.
//
// Refused: f32, head sizes but 64 and 128.

#define KV_BLOCK 64
#define WARPS 4
#define LOG2_E 1.4426950408889634f
#define LOWEST bits_to_float(0xff800000u) // minus infinity
#define NOTHING -1e30f                    // the reference before any score; finite
#define SLACK 8.0f                        // how far, as a power of two, a weight may exceed the reference's

// A row of D elements C of the cache, 16 bytes to a lane.
template <class T, class C, int D> struct Row;

template <class T, int D> struct Row<T, T, D> {
    static const int COLUMNS = 8, LOADS = 8, SCALES = 0;
    static constexpr float BIAS = 0.0f;
    static DEVICE float value(const Quad &q, int i) {
        u32 word = i / 2 == 0 ? q.x : i / 2 == 1 ? q.y : i / 2 == 2 ? q.z : q.w;
        return i % 2 ? Half<T>::high(word) : Half<T>::low(word);
    }
};

template <class T, int D> struct Row<T, i8, D> {
    static const int COLUMNS = 16, LOADS = 4, SCALES = 2 * KV_BLOCK;
    static constexpr float BIAS = 32768.0f + 128.0f;
    // The code, and BIAS.
    static DEVICE float value(const Quad &q, int i) {
        u32 word = (i / 4 == 0 ? q.x : i / 4 == 1 ? q.y : i / 4 == 2 ? q.z : q.w) ^ 0x80808080u;
        return bits_to_float(__byte_perm(word, 0x47000000u, 0x7604 | i % 4 << 4));
    }
};

// A warp's sums over keys.
template <class T, class C, int D> struct Single {
    typedef Row<T, C, D> Of;
    static const int COLUMNS = Of::COLUMNS, LOADS = Of::LOADS;
    static const int LANES = D / COLUMNS;     // of a row
    static const int AT_ONCE = WARP / LANES;  // rows of a load
    static const int UNIT = AT_ONCE * LOADS;  // keys
    static const int REPEAT = LANES / LOADS;  // lanes that have a key's score
    static const int ROW_BYTES = D * sizeof(C), RECORD_BYTES = 2 * KV_BLOCK * ROW_BYTES + Of::SCALES * 4;
    static_assert(LANES >= LOADS && KV_BLOCK % UNIT == 0, "a key's score is one lane's, a unit one record's");

    float query[COLUMNS], bias; // what a score begins with
    float sum[COLUMNS];
    float reference, weight; // the weight is this lane's share
    Quad keys[LOADS], values[LOADS];
    u32 key_scale, value_scale; // of the lane's key

    static DEVICE int lane() { return threadIdx.x % WARP; }
    // Which of a unit's keys the lane has the score of.
    static DEVICE int own_key() { return lane() % LANES / REPEAT * AT_ONCE + lane() / LANES; }

    DEVICE void start(const T *from) {
        Quad part[COLUMNS / 8];
        bias = 0.0f;
#pragma unroll
        for (int i = 0; i < COLUMNS / 8; i++)
            part[i] = load_once(from + lane() % LANES * COLUMNS + i * 8);
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            query[i] = Row<T, T, D>::value(part[i / 8], i % 8);
            bias -= query[i] * Of::BIAS;
            sum[i] = 0.0f;
        }
        reference = NOTHING;
        weight = 0.0f;
    }

    // Keys first .. first + UNIT of a record, whatever there is.
    DEVICE void fetch_keys(const unsigned char *record, int first) {
        const unsigned char *from = record + first * ROW_BYTES + lane() * 16;
#pragma unroll
        for (int i = 0; i < LOADS; i++) keys[i] = load_once(from + i * 512);
        if (Of::SCALES > 0)
            key_scale = load_once_word(record + 2 * KV_BLOCK * ROW_BYTES + (first + own_key()) * 4);
    }
    // Values, of which `count` exist: twice the last one rather than one that may be anything.
    DEVICE void fetch_values(const unsigned char *record, int first, int count) {
        const unsigned char *from = record + (KV_BLOCK + first) * ROW_BYTES + lane() % LANES * 16;
        int row = lane() / LANES;
        if (count >= UNIT) {
            from += row * ROW_BYTES;
#pragma unroll
            for (int i = 0; i < LOADS; i++) values[i] = load_once(from + i * 512);
        } else {
#pragma unroll
            for (int i = 0; i < LOADS; i++)
                values[i] = load_once(from + min(i * AT_ONCE + row, count - 1) * ROW_BYTES);
        }
        if (Of::SCALES > 0) {
            int own = min(own_key(), count - 1);
            value_scale = load_once_word(record + 2 * KV_BLOCK * ROW_BYTES + (KV_BLOCK + first + own) * 4);
        }
    }

    // N sums over 2 STEP lanes, of which each lane gets the one that is its.
    template <int N, int STEP> static DEVICE void add_lanes(float (&x)[LOADS]) {
        if constexpr (N > 1) {
            bool upper = lane() & STEP;
#pragma unroll
            for (int i = 0; i < N / 2; i++) {
                float mine = upper ? x[i + N / 2] : x[i], other = upper ? x[i] : x[i + N / 2];
                x[i] = mine + __shfl_xor_sync(FULL, other, STEP);
            }
            add_lanes<N / 2, STEP / 2>(x);
        } else if constexpr (STEP > 0) {
            x[0] += __shfl_xor_sync(FULL, x[0], STEP);
            add_lanes<1, STEP / 2>(x);
        }
    }

    // The score of the lane's key.
    DEVICE float multiply_keys() const {
        float x[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            x[i] = bias;
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) x[i] += query[j] * Of::value(keys[i], j);
        }
        add_lanes<LOADS, LANES / 2>(x);
        return Of::SCALES > 0 ? x[0] * bits_to_float(key_scale) : x[0];
    }

    // The weight of the lane's key, whose score this is.
    DEVICE float soften(float score) {
        if (__any_sync(FULL, score > reference + SLACK)) {
            float now = fmaxf(reference, warp_max(score)), shrink = exp2_fast(reference - now);
            reference = now;
            weight *= shrink;
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) sum[i] *= shrink;
        }
        float p = exp2_fast(score - reference);
        weight += p;
        return p;
    }

    DEVICE void add_values(float own) {
        if (Of::SCALES > 0) own *= bits_to_float(value_scale);
        float p[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; i++) p[i] = __shfl_sync(FULL, own, i * REPEAT, LANES);
#pragma unroll
        for (int i = 0; i < LOADS; i++)
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) sum[j] += p[i] * (Of::value(values[i], j) - Of::BIAS);
    }
};

// The sums of a block's warps, in shared memory.
template <int D> struct Parts {
    float sums[WARPS][D];
    float references[WARPS], weights[WARPS];
    int last; // whether this block is the last of its head

    // Of column d: the sum, its weight and their reference.
    DEVICE float merged(int d, float &reference, float &weight) const {
        float x = 0.0f;
        reference = NOTHING, weight = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) reference = fmaxf(reference, references[w]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float factor = exp2_fast(references[w] - reference);
            weight += factor * weights[w];
            x += factor * sums[w][d];
        }
        return x;
    }
};

// A warp's part of `splits` sums that blocks have left: every WARPS-th of them.
template <int D> DEVICE void gather(Parts<D> &parts, const float *stats, const float *sums, int splits) {
    const int AT_ONCE = 8; // on the way
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const float *from = sums + lane % (D / 4) * 4;
    float reference = NOTHING, weight = 0.0f, sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int first = warp; first < splits; first += AT_ONCE * WARPS) {
        float4 rows[AT_ONCE];
        float2 stat[AT_ONCE]; // a reference and a weight
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int s = min(first + i * WARPS, splits - 1);
            stat[i] = __ldcg((const float2 *)stats + s);
            rows[i] = __ldcg((const float4 *)(from + (size_t)s * D));
        }
        float now = reference;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) now = fmaxf(now, stat[i].x);
        float shrink = exp2_fast(reference - now);
        reference = now;
        weight *= shrink;
#pragma unroll
        for (int j = 0; j < 4; j++) sum[j] *= shrink;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            float factor = first + i * WARPS < splits ? exp2_fast(stat[i].x - now) : 0.0f;
            weight += factor * stat[i].y;
            sum[0] += factor * rows[i].x;
            sum[1] += factor * rows[i].y;
            sum[2] += factor * rows[i].z;
            sum[3] += factor * rows[i].w;
        }
    }
    if (lane == 0) parts.references[warp] = reference, parts.weights[warp] = weight;
    if (lane < D / 4) {
#pragma unroll
        for (int j = 0; j < 4; j++) parts.sums[warp][lane * 4 + j] = sum[j];
    }
}

// A span in the table: its first row, how many, tokens of its sequence, its first place in `blocks`.
struct SpanEntry {
    int q_start, q_len, kv_len, blocks;
};

// stats [spans][heads][splits]: a reference, as a power of two, and a weight; sums [spans][heads][splits][D];
// counters [spans][heads]: zeros, before and after. None of them is used where nothing is split.
// Grid (splits, heads, spans).
template <class T, class C, int D>
DEVICE void single_attention(const T *qkv, const unsigned char *cache, const u32 *spans, const u32 *blocks,
                             float *stats, float *sums, u32 *counters, T *out, int heads, float scale, int window) {
    typedef Single<T, C, D> Core;
    __shared__ Parts<D> parts;
    SpanEntry span = ((const SpanEntry *)spans)[blockIdx.z];
    int head = blockIdx.y, splits = gridDim.x, split = blockIdx.x;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    size_t row = (size_t)span.q_start * heads + head; // of out

    // The warp's units of those that the query sees.
    int from = max(0, span.kv_len - window), low = from / Core::UNIT;
    int all = ceil_div(span.kv_len, Core::UNIT) - low, share = split * WARPS + warp, shares = splits * WARPS;
    int unit = low + all * share / shares, end = low + all * (share + 1) / shares;
    blocks += span.blocks;
    const int UNITS = KV_BLOCK / Core::UNIT; // of a block of the cache
    auto index_of = [&](int u) { return u < end ? blocks[u / UNITS] : 0; };
    auto record_of = [&](u32 index) { return cache + ((size_t)index * heads + head) * Core::RECORD_BYTES; };
    u32 index = index_of(unit), ahead = index_of(unit + 1);

    wait_for_previous();
    Core core;
    const unsigned char *record = record_of(index);
    if (unit < end) {
        core.fetch_keys(record, unit % UNITS * Core::UNIT);
        core.fetch_values(record, unit % UNITS * Core::UNIT, span.kv_len - unit * Core::UNIT);
    }
    core.start(qkv + ((size_t)span.q_start * 3 * heads + head) * D);
    for (; unit < end; unit++) {
        bool more = unit + 1 < end;
        int next = (unit + 1) % UNITS * Core::UNIT, key = unit * Core::UNIT + Core::own_key();
        record = record_of(ahead);
        ahead = index_of(unit + 2);
        float score = core.multiply_keys() * (scale * LOG2_E);
        if (more) core.fetch_keys(record, next);
        core.add_values(core.soften(key < from || key >= span.kv_len ? LOWEST : score));
        if (more) core.fetch_values(record, next, span.kv_len - (unit + 1) * Core::UNIT);
    }

    float weight = warp_sum(core.weight) * (1.0f / Core::REPEAT);
    if (lane == 0) parts.references[warp] = core.reference, parts.weights[warp] = weight;
#pragma unroll
    for (int i = 0; i < Core::COLUMNS; i++) {
        float x = core.sum[i];
#pragma unroll
        for (int step = Core::LANES; step < WARP; step *= 2) x += __shfl_xor_sync(FULL, x, step);
        if (lane < Core::LANES) parts.sums[warp][lane * Core::COLUMNS + i] = x;
    }
    __syncthreads();
    int d = threadIdx.x % D;
    float reference, x = parts.merged(d, reference, weight);
    if (splits > 1) {
        size_t first = ((size_t)blockIdx.z * heads + head) * splits;
        if (threadIdx.x == 0) stats[2 * (first + split)] = reference, stats[2 * (first + split) + 1] = weight;
        if (threadIdx.x < D) sums[(first + split) * D + d] = x;
        __syncthreads();
        if (threadIdx.x == 0)
            parts.last = arrive(&counters[blockIdx.z * heads + head], splits - 1) == (u32)splits - 1;
        __syncthreads();
        if (!parts.last) return;
        gather(parts, stats + 2 * first, sums + first * D, splits);
        __syncthreads();
        x = parts.merged(d, reference, weight);
    }
    if (threadIdx.x < D) out[row * D + d] = narrow<T>(x / weight);
}

#define SINGLE(name, D, C, T)                                                                                   \
    GLOBAL(BOUNDS(128, 4) single_attention_##name##_##T)                                                        \
    (const T *qkv, const unsigned char *cache, const u32 *spans, const u32 *blocks, float *stats, float *sums,  \
     u32 *counters, T *out, int heads, float scale, int window) {                                               \
        let_next_begin();                                                                                       \
        single_attention<T, C, D>(qkv, cache, spans, blocks, stats, sums, counters, out, heads, scale, window); \
    }
#define KERNELS_OF_TYPE(T)                                                                                      \
    SINGLE(64, 64, T, T)                                                                                        \
    SINGLE(128, 128, T, T)                                                                                      \
    SINGLE(64_int8, 64, i8, T)                                                                                  \
    SINGLE(128_int8, 128, i8, T)

KERNELS_OF_TYPE(bf16)
KERNELS_OF_TYPE(f16)
