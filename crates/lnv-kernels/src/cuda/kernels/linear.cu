// Products of few rows (1 to 32, and some more for quantised weights) with a weight: out = x W^T. Decoding.
//
// Decision: the weight is read once, at the speed of memory, and everything else has to fit into the time of
// that. So the tensor cores multiply even a single row, with 16 outputs of W as the rows of their first
// operand and x as their 8 columns: that costs an instruction for 256 weights, where a multiplication for
// each weight would be the limit for 4-bit ones. No weight goes through shared memory. The order of k within a
// product is free as long as x and W agree, and so is which output is which row of the operand: of 32
// outputs and 32 values of k, which is a block, lane l takes the outputs 4 (l / 4) to + 3 and the k 8 (l % 4)
// to + 7, which are 16 contiguous bytes of 4-bit panels, two times 16 of 8-bit ones and four times 16 of
// floats, and makes its part of the operand from its own bytes alone. Pieces of them are requested DEPTH
// ahead, in registers; DEEPER with 32 rows, where there are fewer warps.
//
// 4-bit codes become values by a table in shared memory of the pairs of values that a byte stands for, once for
// each lane, so that no two lanes meet in a bank. A pair starts at 256 times its byte: one permutation of bytes
// makes the address. The table fills every other 128 bytes so, and rows of x the ones between. Sums of a group of 64
// k are scaled in f32. 8-bit codes become values exactly, by setting them into the mantissa of a power of two and
// subtracting that.
//
// Who does what: all steps (a panel of 32 outputs times STEP k) of a weight stand in one line, panel after panel. Each
// thread block of about as many as there are multiprocessors takes a run of it, and each of its teams of warps a run
// of that. A warp goes through its team's steps, every TEAM-th, across panels' ends, with its requests always ahead,
// and meets nobody before its end: its sums of a panel that ended wait in shared memory. So the table and x are
// brought into shared memory once, all warps have the same to do whatever the shape is, and there is no last wave.
// A team of one reads contiguous panels; rows of floats are read by several warps side by side, as memory likes it.
// Then the thread block adds up the sums of its panels in the order of k. A panel that it shares with other thread
// blocks has its sums in global memory then, and the last to come adds those up, in order too: results do not depend
// on who comes first. x is copied to shared memory whole; where there is no room for that, k is cut into slices,
// and each has a line of its own.
//
// The weight is requested before the kernel ahead has ended, where GPUs allow that: only x waits for that one.
//
// In f32, `few*_f32` does the same with plain multiplications for those who want exact results, not fast ones.
//
// What the host sees to: x starts at a multiple of 16 bytes, and so does each row; if k is no multiple of 8, x
// is followed by zeros up to one, and weights are not floats (for those there is gemm.cu's plain kernel). A
// slice is a multiple of 64. `slots` is at least the number of panels that a thread block's run touches. Counters
// are zeros, and are left so. GATED takes a weight of two halves of whole panels, and out is in T.

#define PANEL 32
#define BLOCK_K 32
#define GROUP 64

// What becomes of sums: `then`.
#define STORE_HALF 0
#define STORE_FLOAT 1
#define ADD_FLOAT 2
// The function of the first half of outputs, times the second half.
#define GATED 3

// ---- formats ----
//
// Each is a struct that knows, for one lane, where its bytes of a panel of 32 outputs are. A Piece is what is
// requested at once, STEP values of k. `pairs` makes values of a block's 8 k of one of the lane's four outputs, as
// four pairs, and `arrange` brings the 8 k of x, which come in order, into the order of those pairs.

// The lane's place in a block.
DEVICE int lane_column() { return threadIdx.x % WARP / 4 * 4; }
DEVICE int lane_k() { return threadIdx.x % 4 * 8; }

DEVICE u32 word(const Quad &q, int i) { return i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w; }

DEVICE Quad no_quad() {
    Quad q = {0, 0, 0, 0};
    return q;
}

// The 16-bit values of two pairs: both lower ones, both upper ones.
DEVICE u32 lower(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
DEVICE u32 upper(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

// Rows of 16-bit floats.
template <class T> struct Floats {
    static const int STEP = 32, DEPTH = 2, DEEPER = 3, TABLE = 0, TEAM = 8;
    static const bool GROUPS = false, COLUMNS = false;
    struct Piece {
        Quad q[4];
    };
    const u8 *from;
    int last; // how far below the first output's row the last row is

    DEVICE void seek(const void *w, int n, int k, int panel, int at) {
        const int first = min(panel * PANEL + lane_column(), n - 1);
        last = n - 1 - first;
        from = (const u8 *)w + (size_t)first * (u32)(k * 2) + (lane_k() + at) * 2;
    }
    static DEVICE void fill_table(unsigned char *, const float *) {}
    DEVICE void load(Piece &piece, int at, int k) const {
        if (at + lane_k() >= k) return;
#pragma unroll
        for (int i = 0; i < 4; i++) piece.q[i] = load_stream(from + (size_t)(u32)min(i, last) * (u32)(k * 2));
    }
    DEVICE void advance(int by) { from += by * 2; }
    DEVICE void pairs(u32 (&p)[4], const Piece &piece, int, int i, const unsigned char *) const {
        p[0] = piece.q[i].x, p[1] = piece.q[i].y, p[2] = piece.q[i].z, p[3] = piece.q[i].w;
    }
    static DEVICE void arrange(u32 (&p)[4], const Quad &x) { p[0] = x.x, p[1] = x.y, p[2] = x.z, p[3] = x.w; }
    DEVICE float scale(const Piece &, int) const { return 1.0f; }
    static DEVICE float column_scale(const void *, int, int, float) { return 1.0f; }
};

// Bytes 0 and 2 of a word of codes + 128 as a pair.
template <class T> DEVICE u32 codes_to_pair(u32 word);
// 0x4300 is 128, with steps of 1: the lower 7 bits of a code are added to it, and 256 or 128 taken away.
template <> DEVICE u32 codes_to_pair<bf16>(u32 word) {
    u32 above = word & 0x007f007fu | 0x43004300u;
    u32 below = word & 0x00800080u ^ 0xc380c380u;
    return add_pair_bf16(above, below);
}
// 0x6400 is 1024, with steps of 1; 0xe480 is -1152.
template <> DEVICE u32 codes_to_pair<f16>(u32 word) {
    return add_pair_f16(word & 0x00ff00ffu | 0x64006400u, 0xe480e480u);
}

// The panels of q8.rs and int8.rs.
struct Bytes {
    static const int STEP = 32, DEPTH = 3, DEEPER = 4, TABLE = 0, TEAM = 1;
    static const bool GROUPS = false, COLUMNS = true;
    struct Piece {
        Quad q[2];
    };
    const u8 *from;

    DEVICE void seek(const void *w, int, int k, int panel, int at) {
        from = (const u8 *)w + panel * panel_bytes(k) + (at + lane_k()) * PANEL + lane_column() * 4;
    }
    static DEVICE size_t panel_bytes(int k) { return (size_t)(ceil_div(k, 4) + 1) * (4 * PANEL); }
    static DEVICE void fill_table(unsigned char *, const float *) {}
    DEVICE void load(Piece &piece, int at, int k) const {
        if (at + lane_k() >= k) return;
        piece.q[0] = load_stream(from);
        // A panel's scales follow its last codes: if k ends in between, this is not beyond the weight.
        piece.q[1] = load_stream(from + 4 * PANEL);
    }
    DEVICE void advance(int by) { from += by * PANEL; }
    template <class T>
    DEVICE void pairs(T, u32 (&p)[4], const Piece &piece, int i) const {
        u32 first = word(piece.q[0], i), second = word(piece.q[1], i);
        p[0] = codes_to_pair<T>(first), p[1] = codes_to_pair<T>(first >> 8);
        p[2] = codes_to_pair<T>(second), p[3] = codes_to_pair<T>(second >> 8);
    }
    static DEVICE void arrange(u32 (&p)[4], const Quad &x) {
        p[0] = lower(x.x, x.y), p[1] = upper(x.x, x.y), p[2] = lower(x.z, x.w), p[3] = upper(x.z, x.w);
    }
    // 8 values in f32, in order.
    DEVICE void floats(float (&v)[8], const Piece &piece, int, int i, const unsigned char *) const {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            u32 code = word(piece.q[j / 4], i) >> (j % 4 * 8) & 0xff;
            v[j] = (float)((int)code - 128);
        }
    }
    DEVICE float scale(const Piece &, int) const { return 1.0f; }
    static DEVICE float column_scale(const void *w, int k, int column, float back) {
        const u8 *end = (const u8 *)w + (column / PANEL + 1) * panel_bytes(k);
        return ((const float *)end)[column % PANEL - PANEL] * back;
    }
};
template <class T> struct HalfBytes : Bytes {
    DEVICE void pairs(u32 (&p)[4], const Piece &piece, int, int i, const unsigned char *) const {
        Bytes::pairs(T(), p, piece, i);
    }
};

// A lane's entries of the table start at its bank; byte e of a word finds its pair at e * 256. What lies between is
// left to rows of x.
#define PAIR_BYTES 256
#define PAIR_TABLE (256 * PAIR_BYTES)

template <class T> DEVICE void fill_pairs(unsigned char *table, const float *values) {
#pragma unroll 2
    for (int i = threadIdx.x; i < 256 * 8; i += blockDim.x) {
        int e = i / 8;
        u32 pair = Half<T>::pack(values[e & 15], values[e >> 4]);
        Quad four = {pair, pair, pair, pair};
        *(Quad *)(table + e * PAIR_BYTES + i % 8 * 16) = four;
    }
}
DEVICE u32 look_up(const unsigned char *table, u32 codes, int byte) {
    u32 lane = threadIdx.x % WARP * 4; // its other bytes are zeros
    return *(const u32 *)(table + __byte_perm(codes, lane, 0x7704 | byte << 4));
}

// The panels of bnb4.rs. In byte j of a word lie k and k + 2, with k = 0, 4, 1, 5.
struct Nibbles {
    static const int STEP = GROUP, DEPTH = 2, DEEPER = 2, TEAM = 1;
    static const bool GROUPS = true, COLUMNS = true;
    static const int BYTES = GROUP / 2 * PANEL + 4 * PANEL;
    struct Piece {
        Quad q[2];
        Quad scales;
    };
    const u8 *from;

    DEVICE void seek(const void *w, int, int k, int panel, int at) {
        from = (const u8 *)w + ((size_t)panel * ceil_div(k, GROUP) + at / GROUP) * BYTES + lane_k() * 16 +
               lane_column() * 4;
    }
    DEVICE void load(Piece &piece, int, int) const {
        piece.q[0] = load_stream(from);
        piece.q[1] = load_stream(from + 512);
        piece.scales = load_stream(from + (1024 - lane_k() * 16));
    }
    DEVICE void advance(int by) { from += by / GROUP * BYTES; }
    static DEVICE void arrange(u32 (&p)[4], const Quad &x) {
        p[0] = lower(x.x, x.y), p[1] = lower(x.z, x.w), p[2] = upper(x.x, x.y), p[3] = upper(x.z, x.w);
    }
    static DEVICE u32 code(u32 word, int k) { return word >> (k % 2 * 16 + k / 2 * 4) & 15; }
    DEVICE float scale(const Piece &piece, int i) const { return bits_to_float(word(piece.scales, i)); }
    static DEVICE float column_scale(const void *, int, int, float back) { return back; }
};
// Those of q4.rs. In byte j of a word lie k = j and j + 4.
struct Levels {
    static const int STEP = GROUP, DEPTH = 2, DEEPER = 2, TEAM = 1;
    static const bool GROUPS = true, COLUMNS = false;
    static const int BYTES = GROUP / 2 * PANEL + 2 * PANEL;
    struct Piece {
        Quad q[2];
        Pair scales;
    };
    const u8 *from;

    DEVICE void seek(const void *w, int, int k, int panel, int at) {
        from = (const u8 *)w + ((size_t)panel * ceil_div(k, GROUP) + at / GROUP) * BYTES + lane_k() * 16 +
               lane_column() * 4;
    }
    DEVICE void load(Piece &piece, int, int) const {
        piece.q[0] = load_stream(from);
        piece.q[1] = load_stream(from + 512);
        piece.scales = load_stream_pair(from + (1024 - lane_k() * 16 - lane_column() * 2));
    }
    DEVICE void advance(int by) { from += by / GROUP * BYTES; }
    static DEVICE void arrange(u32 (&p)[4], const Quad &x) {
        p[0] = lower(x.x, x.z), p[1] = upper(x.x, x.z), p[2] = lower(x.y, x.w), p[3] = upper(x.y, x.w);
    }
    static DEVICE u32 code(u32 word, int k) { return word >> (k % 4 * 8 + k / 4 * 4) & 15; }
    DEVICE float scale(const Piece &piece, int i) const {
        f16 x;
        x.bits = (u16)((i < 2 ? piece.scales.x : piece.scales.y) >> (i % 2 * 16));
        return widen(x);
    }
    static DEVICE float column_scale(const void *, int, int, float) { return 1.0f; }
};
template <class F, class T> struct HalfCodes : F {
    static const int TABLE = PAIR_TABLE;
    static DEVICE void fill_table(unsigned char *table, const float *values) { fill_pairs<T>(table, values); }
    DEVICE void pairs(u32 (&p)[4], const typename F::Piece &piece, int b, int i, const unsigned char *table) const {
        u32 codes = word(piece.q[b], i);
#pragma unroll
        for (int j = 0; j < 4; j++) p[j] = look_up(table, codes, j);
    }
};

// ---- who does what ----

// The numbers from 0 to `count` in runs of about the same length, in order.
struct Runs {
    int each, longer; // the first `longer` runs have one more

    DEVICE Runs(int count, int runs) : each(count / runs), longer(count % runs) {}
    DEVICE int begin(int run) const { return run * each + min(run, longer); }
    // The run that a number is in.
    DEVICE int of(int i) const {
        const int border = longer * (each + 1);
        return i < border ? i / (each + 1) : longer + (i - border) / each;
    }
};

// The line of steps of a slice, and the runs of the thread blocks. A tile is a panel, or two that are multiplied with
// each other in the end. If `whole`, runs are of whole tiles.
struct Line {
    int tile, tiles, steps, unit;
    Runs runs;

    DEVICE Line(int n, int k, int step, int slice, int index, bool whole, int then)
        : tile(then == GATED ? 2 : 1), tiles(ceil_div(n, PANEL) >> (then == GATED)),
          steps(ceil_div(min(slice, k - index * slice), step)), unit(whole ? steps * tile : 1),
          runs(whole ? tiles : tiles * tile * steps, gridDim.x) {}
    DEVICE int begin(int block) const { return runs.begin(block) * unit; }
    DEVICE int block_of(int step) const { return runs.of(step / unit); }
    // The panel of the weight that is here the panel-th.
    DEVICE int place(int panel) const { return tile == 1 ? panel : panel / 2 + panel % 2 * tiles; }
};

// A thread block's run, and its teams.
struct Run {
    int first, end;
    Runs teams;

    DEVICE Run(const Line &line, int block, int teams)
        : first(line.begin(block)), end(line.begin(block + 1)), teams(end - first, teams) {}
    DEVICE int begin(int team) const { return first + teams.begin(team); }
};

// A warp's way along the line, as far as its team goes.
template <int TEAM> struct Way {
    int panel, step, left; // the panel and the step in it, and how many steps there are for this warp from here on

    DEVICE Way(const Line &line, const Run &run, int warp) {
        const int begin = run.begin(warp / TEAM) + warp % TEAM, end = run.begin(warp / TEAM + 1);
        panel = begin / line.steps, step = begin % line.steps;
        left = max(0, ceil_div(end - begin, TEAM));
    }
    // Goes on by a step, but not beyond the last; whether this is another panel then.
    DEVICE bool go_on(const Line &line) {
        if (--left <= 0) return false;
        step += TEAM;
        if (step < line.steps) return false;
        do {
            step -= line.steps, panel++;
        } while (step >= line.steps);
        return true;
    }
};

// A way that requests weights.
template <class F, int TEAM> struct Requests {
    Way<TEAM> way;
    F weight;

    DEVICE Requests(const Line &line, const Way<TEAM> &from, const void *w, int n, int k, int begin) : way(from) {
        weight.seek(w, n, k, line.place(way.panel), begin + way.step * F::STEP);
    }
    DEVICE void next(typename F::Piece &piece, const Line &line, const void *w, int n, int k, int begin) {
        if (way.left <= 0) return;
        weight.load(piece, begin + way.step * F::STEP, k);
        if (way.go_on(line)) {
            weight.seek(w, n, k, line.place(way.panel), begin + way.step * F::STEP);
        } else {
            weight.advance(TEAM * F::STEP);
        }
    }
};

// How a thread block keeps sums, each [rows][32]: those of panels that ended in a team, [panel][warp of the team], and,
// where the table and x were, one of each warp for the panel in whose midst its team ended.
struct Kept {
    float *ended, *open;
    int first_panel, rows;

    template <int TEAM> DEVICE float *ended_at(int panel, int warp) const {
        return ended + ((panel - first_panel) * TEAM + warp % TEAM) * rows * PANEL;
    }
    DEVICE float *open_at(int warp) const { return open + warp * rows * PANEL; }
    // Warps of a team that have no step of a panel leave nothing there.
    template <int TEAM> DEVICE void clear(int slots) const {
        const int quads = TEAM == 1 ? 0 : slots * TEAM * rows * (PANEL / 4);
        for (int i = threadIdx.x; i < quads; i += blockDim.x) ((Quad *)ended)[i] = no_quad();
    }
};

// ---- results ----

// The sum of a thread block's part of a panel, in the order of the warps.
template <int TEAM, int WARPS>
DEVICE float sum_of_warps(const Kept &kept, const Line &line, const Run &run, int panel, int at) {
    const int begin = panel * line.steps, end = begin + line.steps;
    // The teams that end in its midst, and the one that ends it.
    int warp = begin <= run.first ? 0 : run.teams.of(begin - run.first) * TEAM;
    const bool ended = end <= run.end;
    const int last = ended ? run.teams.of(end - 1 - run.first) * TEAM : WARPS;
    float sum = 0.0f;
#pragma unroll 4
    for (; warp < last; warp++) sum += kept.open_at(warp)[at];
    if (ended) {
#pragma unroll
        for (int i = 0; i < TEAM; i++) sum += kept.ended_at<TEAM>(panel, i)[at];
    }
    return sum;
}

struct Result {
    const void *w;
    int n, k;
    float back;
    const float *bias;
    int act, then;
    void *out;
};

// The sums of a tile's panels to a result.
template <class F, class T> DEVICE void put(const Result &to, float (&sum)[2], int row, int column) {
    const int half = to.n / 2, width = to.then == GATED ? half : to.n;
    if (column >= width) return;
    const size_t at = (size_t)row * width + column;
    if (F::COLUMNS) sum[0] *= F::column_scale(to.w, to.k, column, to.back);
    if (to.bias) sum[0] += to.bias[column];
    sum[0] = activate(sum[0], to.act);
    if (to.then == GATED) {
        if (F::COLUMNS) sum[1] *= F::column_scale(to.w, to.k, column + half, to.back);
        if (to.bias) sum[1] += to.bias[column + half];
        ((T *)to.out)[at] = narrow<T>(sum[0] * sum[1]);
    } else if (to.then == STORE_HALF) {
        ((T *)to.out)[at] = narrow<T>(sum[0]);
    } else if (to.then == STORE_FLOAT) {
        ((float *)to.out)[at] = sum[0];
    } else {
        ((float *)to.out)[at] += sum[0];
    }
}

// Adds up what the warps of a thread block found, and passes it on: to the results, or, for tiles that other thread
// blocks have parts of, to `sums`, [rows / ROWS][slice][thread block][slots][rows][32]; the last of a tile then does
// the rest.
template <class F, class T, int ROWS, int TEAM, int WARPS>
DEVICE void gather_sums(const Kept &kept, const Line &line, const Run &run, int all_rows, const Result &to, int slice,
                        bool whole, int slots, float *sums, u32 *counters, int *arrived) {
    if (run.first == run.end) return;
    const int rows = kept.rows, row0 = blockIdx.z * ROWS, size = min(all_rows, ROWS) * PANEL;
    const int last_panel = (run.end - 1) / line.steps;
    const int first = kept.first_panel / line.tile, tiles = last_panel / line.tile - first + 1;
    const int tile_steps = line.tile * line.steps, lane = threadIdx.x % WARP;
    const int part = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    auto complete = [&](int tile) {
        return gridDim.y == 1 && tile * tile_steps >= run.first && (tile + 1) * tile_steps <= run.end;
    };
    for (int i = threadIdx.x / WARP; i < tiles * rows; i += WARPS) {
        const int tile = first + i / rows, row = i % rows, at = row * PANEL + lane;
        const bool done = complete(tile);
        float sum[2] = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int panel = tile * line.tile + half;
            if (half == line.tile || panel < kept.first_panel || panel > last_panel) continue;
            sum[half] = sum_of_warps<TEAM, WARPS>(kept, line, run, panel, at);
            if (!done) sums[((size_t)part * slots + panel - kept.first_panel) * size + at] = sum[half];
        }
        if (done) put<F, T>(to, sum, row0 + row, tile * PANEL + lane);
    }
    if (complete(first) && complete(first + tiles - 1)) return;

    __threadfence();
    __syncthreads();
    if ((int)threadIdx.x < tiles) {
        const int tile = first + threadIdx.x;
        u32 others = ~0u; // parts of the tile but one
        for (int y = 0; y < (int)gridDim.y; y++) {
            const Line there(to.n, to.k, F::STEP, slice, y, whole, to.then);
            const int begin = tile * there.tile * there.steps, end = begin + there.tile * there.steps;
            others += there.block_of(end - 1) - there.block_of(begin) + 1;
        }
        // At `others` the counter is set back to zero.
        u32 *counter = counters + blockIdx.z * line.tiles + tile;
        arrived[threadIdx.x] = !complete(tile) && atomicInc(counter, others) == others;
    }
    __syncthreads();
    __threadfence();
    for (int i = threadIdx.x / WARP; i < tiles * rows; i += WARPS) {
        const int tile = first + i / rows, row = i % rows, at = row * PANEL + lane;
        if (!arrived[tile - first]) continue;
        float sum[2] = {};
        for (int y = 0; y < (int)gridDim.y; y++) {
            const Line there(to.n, to.k, F::STEP, slice, y, whole, to.then);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (half == line.tile) break;
                const int panel = tile * line.tile + half, begin = panel * there.steps;
                const int last = there.block_of(begin + there.steps - 1);
                for (int x = there.block_of(begin); x <= last; x++) {
                    const size_t from = (size_t)(blockIdx.z * gridDim.y + y) * gridDim.x + x;
                    const int slot = panel - there.begin(x) / there.steps;
                    sum[half] += *(const volatile float *)&sums[(from * slots + slot) * size + at];
                }
            }
        }
        put<F, T>(to, sum, row0 + row, tile * PANEL + lane);
    }
}

// ---- the product ----

// Where the 64 k of a group of a row of x begin, in shared memory: after those before, in the gaps of the table first.
template <class F> DEVICE int group_at(int index) {
    return F::TABLE == 0 ? index * 128 : index < 256 ? index * PAIR_BYTES + 128 : index * 128 + 256 * 128;
}
template <class F> DEVICE int staged_bytes(int groups) { return max(F::TABLE, group_at<F>(groups - 1) + 128); }

// The rows of x that a thread block needs, from k `begin` on, zeros beyond k, arranged as the weight's pairs are.
// The halves of a group are swapped in each other row: the rows of an access start in both halves of the banks.
template <class F, class T, int THREADS>
DEVICE void stage_rows(unsigned char *to, const T *x, int x_stride, int rows, int begin, int groups, int k) {
#pragma unroll 4
    for (int i = threadIdx.x; i < rows * groups * 8; i += THREADS) {
        const int group = i / 8, row = group / groups, at = begin + (group - row * groups) * GROUP + i % 8 * 8;
        Quad q = no_quad();
        if (at < k) q = *(const Quad *)(x + (size_t)row * x_stride + at);
        u32 p[4];
        F::arrange(p, q);
        const Quad arranged = {p[0], p[1], p[2], p[3]};
        *(Quad *)(to + group_at<F>(group) + (i % 8 * 16 ^ row % 2 * 64)) = arranged;
    }
}

template <int NT> DEVICE void keep_sums(float *to, const float (&total)[2][NT][4], int rows) {
#pragma unroll
    for (int set = 0; set < 2; set++) {
#pragma unroll
        for (int i = 0; i < NT; i++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int row = 8 * i + threadIdx.x % 4 * 2 + c % 2, column = lane_column() + 2 * set + c / 2;
                if (row < rows) to[row * PANEL + column] = total[set][i][c];
            }
        }
    }
}

// The grid: thread blocks of a line, slices, rows / (8 NT).
template <class F, class T, int NT, int WARPS>
DEVICE void few(const T *x, int x_stride, int all_rows, const void *w, int n, int k, int slice, int whole, int slots,
                const float *values, float back, const float *bias, int act, int then, void *out, float *sums,
                u32 *counters) {
    SHARED_BYTES(shared);
    const int TEAM = WARPS % F::TEAM == 0 ? F::TEAM : 2, DEPTH = NT == 4 ? F::DEEPER : F::DEPTH;
    // The shuffle tells the compiler that a warp's threads agree: addresses of the table stay two instructions.
    const int warp = __shfl_sync(FULL, threadIdx.x / WARP, 0);
    const int begin = blockIdx.y * slice, groups = ceil_div(min(slice, k - begin), GROUP);
    const int rows = min(all_rows - (int)blockIdx.z * (8 * NT), 8 * NT);
    const Line line(n, k, F::STEP, slice, blockIdx.y, whole, then);
    const Run run(line, blockIdx.x, WARPS / TEAM);
    Way<TEAM> way(line, run, warp);
    Requests<F, TEAM> requests(line, way, w, n, k, begin);

    let_next_begin();
    // What is beyond k stays as it was: zeros or finite weights, and x is zero there.
    typename F::Piece ring[DEPTH] = {};
#pragma unroll
    for (int d = 0; d < DEPTH; d++) requests.next(ring[d], line, w, n, k, begin);
    F::fill_table(shared, values);
    wait_for_previous(); // so far nothing was read but the weight
    stage_rows<F, T, WARPS * WARP>(shared, x + (size_t)(blockIdx.z * (8 * NT)) * x_stride, x_stride, rows, begin, groups, k);
    const int kept_from = max(staged_bytes<F>(rows * groups), WARPS * rows * PANEL * 4);
    const Kept kept = {(float *)(shared + kept_from), (float *)shared, run.first / line.steps, rows};
    kept.clear<TEAM>(slots);
    __syncthreads();

    int mine[NT], chunk[NT]; // of this lane's rows of x: the first group, and where in a group its 16 bytes are
#pragma unroll
    for (int i = 0; i < NT; i++) {
        int row = min(8 * i + (int)threadIdx.x % WARP / 4, rows - 1);
        mine[i] = row * groups, chunk[i] = row % 2 * 64 + threadIdx.x % 4 * 16;
    }
    float total[2][NT][4] = {};
    const bool any = way.left > 0;
#pragma unroll 1
    while (way.left > 0) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            if (way.left <= 0) break;
            float part[2][NT][4] = {};
            float(&sum)[2][NT][4] = F::GROUPS ? part : total;
#pragma unroll
            for (int b = 0; b < F::STEP / BLOCK_K; b++) {
                const int group = F::STEP == GROUP ? way.step : way.step >> 1;
                const int half_group = F::STEP == GROUP ? b : way.step & 1;
                u32 px[NT][4];
#pragma unroll
                for (int i = 0; i < NT; i++) {
                    const int at = group_at<F>(mine[i] + group) + (half_group * 64 ^ chunk[i]);
                    const Quad q = *(const Quad *)(shared + at);
                    px[i][0] = q.x, px[i][1] = q.y, px[i][2] = q.z, px[i][3] = q.w;
                }
#pragma unroll
                for (int set = 0; set < 2; set++) {
                    u32 first[4], second[4];
                    requests.weight.pairs(first, ring[d], b, 2 * set, shared);
                    requests.weight.pairs(second, ring[d], b, 2 * set + 1, shared);
#pragma unroll
                    for (int half = 0; half < 4; half += 2) {
                        const u32 a[4] = {first[half], second[half], first[half + 1], second[half + 1]};
#pragma unroll
                        for (int i = 0; i < NT; i++) {
                            const u32 columns[2] = {px[i][half], px[i][half + 1]};
                            Half<T>::mma(sum[set][i], a, columns);
                        }
                    }
                }
            }
#pragma unroll
            for (int set = 0; set < 2 && F::GROUPS; set++) {
                const float scale[2] = {requests.weight.scale(ring[d], 2 * set),
                                        requests.weight.scale(ring[d], 2 * set + 1)};
#pragma unroll
                for (int i = 0; i < NT; i++) {
#pragma unroll
                    for (int c = 0; c < 4; c++) total[set][i][c] += part[set][i][c] * scale[c / 2];
                }
            }
            requests.next(ring[d], line, w, n, k, begin);
            const int panel = way.panel;
            if (way.go_on(line)) {
                keep_sums<NT>(kept.ended_at<TEAM>(panel, warp), total, rows);
#pragma unroll
                for (int i = 0; i < 8 * NT; i++) total[i / (4 * NT)][i / 4 % NT][i % 4] = 0.0f;
            }
        }
    }

    __syncthreads(); // from here on there is no table, and no x
    if (run.begin(warp / TEAM + 1) >= (way.panel + 1) * line.steps) {
        if (any) keep_sums<NT>(kept.ended_at<TEAM>(way.panel, warp), total, rows);
#pragma unroll
        for (int i = 0; i < 8 * NT; i++) total[i / (4 * NT)][i / 4 % NT][i % 4] = 0.0f;
    }
    keep_sums<NT>(kept.open_at(warp), total, rows);
    __syncthreads();
    const Result to = {w, n, k, back, bias, act, then, out};
    gather_sums<F, T, 8 * NT, TEAM, WARPS>(kept, line, run, all_rows, to, slice, whole, slots, sums, counters,
                                           (int *)shared);
}

// ---- the product in f32 ----

struct FloatRows {
    static const int STEP = 32, TABLE = 0, TEAM = 8;
    static const bool GROUPS = false, COLUMNS = false;
    struct Piece {
        Quad q[4][2];
    };
    const float *from;
    int last;

    DEVICE void seek(const void *w, int n, int k, int panel, int at) {
        const int first = min(panel * PANEL + lane_column(), n - 1);
        last = n - 1 - first;
        from = (const float *)w + (size_t)first * k + lane_k() + at;
    }
    static DEVICE void fill_table(unsigned char *, const float *) {}
    DEVICE void load(Piece &piece, int at, int k) const {
        if (at + lane_k() >= k) return;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            piece.q[i / 2][i % 2] = load_stream(from + (size_t)min(i / 2, last) * k + i % 2 * 4);
        }
    }
    DEVICE void advance(int by) { from += by; }
    DEVICE void floats(float (&v)[8], const Piece &piece, int, int i, const unsigned char *) const {
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = bits_to_float(word(piece.q[i][j / 4], j % 4));
    }
    static DEVICE float column_scale(const void *, int, int, float) { return 1.0f; }
};
struct FloatBytes : Bytes {};
// Here the table is of single values, once for each lane.
template <class F> struct FloatCodes : F {
    static const int TABLE = 16 * WARP * 4;
    static DEVICE void fill_table(unsigned char *table, const float *values) {
        ((float *)table)[threadIdx.x] = values[threadIdx.x / WARP];
    }
    DEVICE void floats(float (&v)[8], const typename F::Piece &piece, int b, int i, const unsigned char *table) const {
        const float *mine = (const float *)table + threadIdx.x % WARP;
        u32 codes = word(piece.q[b], i);
        float scale = F::scale(piece, i);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = mine[F::code(codes, j) * WARP] * scale;
    }
};

DEVICE void stage_floats(unsigned char *to, const float *x, int x_stride, int rows, int begin, int groups, int k) {
    const int chunks = groups * (GROUP / 4);
    for (int i = threadIdx.x; i < rows * chunks; i += blockDim.x) {
        int row = i / chunks, at = begin + i % chunks * 4;
        bool there = at < k;
        copy_async(to + i * 16, x + (size_t)row * x_stride + (there ? at : 0), there);
    }
    copy_commit();
    copy_wait<0>();
}

// The grid: thread blocks of a line, slices, rows / ROWS. 16 warps.
template <class F, int ROWS>
DEVICE void few_floats(const float *x, int x_stride, int all_rows, const void *w, int n, int k, int slice, int whole,
                       int slots, const float *values, float back, const float *bias, int act, int then, void *out,
                       float *sums, u32 *counters) {
    SHARED_BYTES(shared);
    const int TEAM = F::TEAM, WARPS = 16, warp = threadIdx.x / WARP;
    const int begin = blockIdx.y * slice, groups = ceil_div(min(slice, k - begin), GROUP);
    const int rows = min(all_rows - (int)blockIdx.z * ROWS, ROWS);
    const Line line(n, k, F::STEP, slice, blockIdx.y, whole, then);
    const Run run(line, blockIdx.x, WARPS / TEAM);
    Way<TEAM> way(line, run, warp);
    Requests<F, TEAM> requests(line, way, w, n, k, begin);
    let_next_begin();
    F::fill_table(shared, values);
    wait_for_previous(); // so far nothing was read but the weight
    unsigned char *const staged = shared + F::TABLE;
    const int row_bytes = groups * (GROUP * 4);
    stage_floats(staged, x + (size_t)(blockIdx.z * ROWS) * x_stride, x_stride, rows, begin, groups, k);
    const int kept_from = max(F::TABLE + rows * row_bytes, WARPS * rows * PANEL * 4);
    const Kept kept = {(float *)(shared + kept_from), (float *)shared, run.first / line.steps, rows};
    kept.clear<TEAM>(slots);
    __syncthreads();

    float total[4][ROWS] = {};
    // Sums of four lanes, to where they are kept; begins anew.
    auto keep = [&](float *to) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                float sum = total[i][row];
                sum += __shfl_xor_sync(FULL, sum, 1);
                sum += __shfl_xor_sync(FULL, sum, 2);
                if (threadIdx.x % 4 == 0 && row < rows) to[row * PANEL + lane_column() + i] = sum;
                total[i][row] = 0.0f;
            }
        }
    };
    const bool any = way.left > 0;
    while (way.left > 0) {
        typename F::Piece piece = {};
        requests.next(piece, line, w, n, k, begin);
#pragma unroll
        for (int b = 0; b < F::STEP / BLOCK_K; b++) {
            const unsigned char *here = staged + (way.step * F::STEP + b * BLOCK_K + lane_k()) * 4;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float v[8];
                requests.weight.floats(v, piece, b, i, shared);
#pragma unroll
                for (int row = 0; row < ROWS; row++) {
                    const float *xs = (const float *)(here + min(row, rows - 1) * row_bytes);
#pragma unroll
                    for (int j = 0; j < 8; j++) total[i][row] += xs[j] * v[j];
                }
            }
        }
        const int panel = way.panel;
        if (way.go_on(line)) keep(kept.ended_at<TEAM>(panel, warp));
    }

    __syncthreads();
    if (any && run.begin(warp / TEAM + 1) >= (way.panel + 1) * line.steps) {
        keep(kept.ended_at<TEAM>(way.panel, warp)); // which leaves zeros
    }
    keep(kept.open_at(warp));
    __syncthreads();
    const Result to = {w, n, k, back, bias, act, then, out};
    gather_sums<F, float, ROWS, TEAM, WARPS>(kept, line, run, all_rows, to, slice, whole, slots, sums, counters,
                                             (int *)shared);
}

// ---- names ----

#define FEW(name, warps, T, call)                                                                                     \
    GLOBAL(BOUNDS(warps *WARP, 1) name)(const T *x, int x_stride, int rows, const void *w, int n, int k, int slice,   \
                                        int whole, int slots, const float *values, float back, const float *bias,     \
                                        int act, int then, void *out, float *sums, u32 *counters) {                   \
        call(x, x_stride, rows, w, n, k, slice, whole, slots, values, back, bias, act, then, out, sums, counters);    \
    }
#define COMMA ,
#define FEW_ROWS(format, T, F)                                                                                        \
    FEW(few8_##format##_##T, 32, T, (few<F, T, 1, 32>))                                                               \
    FEW(few16_##format##_##T, 16, T, (few<F, T, 2, 16>))                                                              \
    FEW(few32_##format##_##T, 12, T, (few<F, T, 4, 12>))
#define FEW_HALF(T)                                                                                                   \
    FEW_ROWS(floats, T, Floats<T>)                                                                                    \
    FEW_ROWS(bytes, T, HalfBytes<T>)                                                                                  \
    FEW_ROWS(nibbles, T, HalfCodes<Nibbles COMMA T>)                                                                  \
    FEW_ROWS(levels, T, HalfCodes<Levels COMMA T>)
FEW_HALF(bf16)
FEW_HALF(f16)
#define FEW_FLOAT(format, F)                                                                                          \
    FEW(few1_##format##_f32, 16, float, (few_floats<F, 1>))                                                           \
    FEW(few8_##format##_f32, 16, float, (few_floats<F, 8>))
FEW_FLOAT(floats, FloatRows)
FEW_FLOAT(bytes, FloatBytes)
FEW_FLOAT(nibbles, FloatCodes<Nibbles>)
FEW_FLOAT(levels, FloatCodes<Levels>)
