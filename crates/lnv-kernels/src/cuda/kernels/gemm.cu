// Products of many rows with a row-major weight: out = x W^T.
//
// Decision: cuBLASLt does this where it is installed (blaslt.rs); this is what there is without it, and it is
// built for simplicity first: a thread block makes 128 rows by 128 outputs, 32 k at a time, which
// come through four buffers in shared memory, so that three are on their way while one is multiplied. Each of 8 warps
// makes 64 by 32 by the tensor cores' mma.m16n8k16, the widest that all GPUs from 8.0 on have. Within a row of 64
// bytes of a buffer, pieces of 16 are exchanged so that eight rows' pieces lie in different banks. Neighbouring
// thread blocks share rows of x or of W in the second-level cache: 8 tiles of rows go together.
//
// Results go through shared memory as well: so the functions of one value are in the program once, and not 64
// times, and what is written is contiguous.
//
// `gemm_plain` does without tensor cores and without alignment: for f32, and for any k.

#define TILE 128
#define GEMM_THREADS 256
// Of the results in shared memory, in floats: 8 rows of two neighbours each lie in different banks.
#define STAGED_STRIDE (TILE + 8)

// What becomes of sums: `then`, as in linear.cu.
#define STORE_HALF 0
#define STORE_FLOAT 1
#define ADD_FLOAT 2

// ---- results ----

DEVICE void store4(float *to, const float (&v)[4]) {
    Quad q = {float_to_bits(v[0]), float_to_bits(v[1]), float_to_bits(v[2]), float_to_bits(v[3])};
    *(Quad *)to = q;
}
template <class T> DEVICE void store4(T *to, const float (&v)[4]) {
    Pair p = {Half<T>::pack(v[0], v[1]), Half<T>::pack(v[2], v[3])};
    *(Pair *)to = p;
}
DEVICE void load4(float (&v)[4], const float *from) {
    Quad q = *(const Quad *)from;
    v[0] = bits_to_float(q.x), v[1] = bits_to_float(q.y), v[2] = bits_to_float(q.z), v[3] = bits_to_float(q.w);
}

// The sums of a tile, [TILE][STAGED_STRIDE], to results; each thread takes four neighbours.
template <class T>
DEVICE void put_tile(const float *staged, int row0, int column0, int rows, int n, const float *bias, int act, int then,
                     void *out) {
    const int fours = TILE / 4;
#pragma unroll 1
    for (int i = threadIdx.x; i < TILE * fours; i += GEMM_THREADS) {
        const int row = row0 + i / fours, column = column0 + i % fours * 4;
        if (row >= rows || column >= n) continue;
        const int count = min(n - column, 4);
        const bool whole = n % 4 == 0;
        const size_t at = (size_t)row * n + column;
        float v[4], there[4] = {};
        load4(v, staged + i / fours * STAGED_STRIDE + i % fours * 4);
        if (then == ADD_FLOAT && whole) {
            load4(there, (const float *)out + at);
        } else if (then == ADD_FLOAT) {
#pragma unroll
            for (int c = 0; c < 4; c++) there[c] = c < count ? ((const float *)out)[at + c] : 0.0f;
        }
#pragma unroll
        for (int c = 0; c < 4; c++) {
            if (bias && c < count) v[c] += bias[column + c];
            if (act < 5) v[c] = activate(v[c], act);
            v[c] += there[c];
        }
        if (then == STORE_HALF && whole) {
            store4((T *)out + at, v);
        } else if (whole) {
            store4((float *)out + at, v);
        } else {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                if (c >= count) break;
                if (then == STORE_HALF) {
                    ((T *)out)[at + c] = narrow<T>(v[c]);
                } else {
                    ((float *)out)[at + c] = v[c];
                }
            }
        }
    }
}

// Which tile this thread block makes: groups of 8 tiles of rows, and within a group column by column.
struct Place {
    int row0, column0;
    DEVICE Place(int rows, int n) {
        const int together = 8;
        const int down = ceil_div(rows, TILE), group = together * ceil_div(n, TILE);
        const int first = (int)blockIdx.x / group * together, within = (int)blockIdx.x % group;
        const int high = min(down - first, together);
        row0 = (first + within % high) * TILE;
        column0 = within / high * TILE;
    }
};

// ---- by tensor cores ----

#define BUFFERS 4
#define TILE_K 32
#define SIDE_BYTES (TILE * TILE_K * 2)
#define BUFFER_BYTES (2 * SIDE_BYTES)

// Where the 16 bytes of k 8 chunk to + 7 of a row lie in a buffer's side.
DEVICE int place_of(int row, int chunk) { return row * (TILE_K * 2) + (chunk ^ row >> 1 & 3) * 16; }

// A side of a tile on its way: 128 rows, each by 4 threads; a thread has a row and the one 64 below it.
template <class T> struct Side {
    const T *from[2];
    int valid[2], chunk, to[2];
    DEVICE Side(const T *base, int row0, int rows, int k) {
        chunk = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int row = threadIdx.x / 4 + 64 * i;
            valid[i] = row0 + row < rows;
            from[i] = base + (size_t)(valid[i] ? row0 + row : 0) * k + chunk * 8;
            to[i] = place_of(row, chunk);
        }
    }
    DEVICE void copy(unsigned char *side, int at, int k) const {
        const bool there = at + chunk * 8 < k;
#pragma unroll
        for (int i = 0; i < 2; i++) copy_async(side + to[i], from[i] + (there ? at : 0), there && valid[i]);
    }
};

// x [rows][k], W [n][k], both from a multiple of 16 bytes on; k a multiple of 8. The grid: tiles.
template <class T>
DEVICE void gemm(const T *x, const T *w, int rows, int n, int k, const float *bias, int act, int then, void *out) {
    SHARED_BYTES(shared);
    const Place place(rows, n);
    const Side<T> left(x, place.row0, rows, k), right(w, place.column0, n, k);
    const int steps = ceil_div(k, TILE_K);
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < BUFFERS - 1; i++) {
        if (i < steps) {
            left.copy(shared + i * BUFFER_BYTES, i * TILE_K, k);
            right.copy(shared + i * BUFFER_BYTES + SIDE_BYTES, i * TILE_K, k);
        }
        copy_commit();
    }
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int down = warp % 2 * 64, right_of = warp / 2 * 32;
    float sum[4][4][4] = {};
    for (int step = 0; step < steps; step++) {
        copy_wait<BUFFERS - 2>();
        __syncthreads(); // this step's buffer has come, and the last step's is free
        const int ahead = step + BUFFERS - 1;
        if (ahead < steps) {
            unsigned char *to = shared + ahead % BUFFERS * BUFFER_BYTES;
            left.copy(to, ahead * TILE_K, k);
            right.copy(to + SIDE_BYTES, ahead * TILE_K, k);
        }
        copy_commit();
        const unsigned char *xs = shared + step % BUFFERS * BUFFER_BYTES, *ws = xs + SIDE_BYTES;
#pragma unroll
        for (int half = 0; half < TILE_K / 16; half++) {
            u32 a[4][4], b[2][4];
#pragma unroll
            for (int i = 0; i < 4; i++) ldmatrix(a[i], xs + place_of(down + i * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int row = right_of + j * 16 + lane / 16 * 8 + lane % 8;
                ldmatrix(b[j], ws + place_of(row, half * 2 + lane / 8 % 2));
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const u32 columns[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                    Half<T>::mma(sum[i][j], a[i], columns);
                }
            }
        }
    }
    copy_wait<0>();
    __syncthreads();
    float *const staged = (float *)shared;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int c = 0; c < 4; c += 2) {
                int row = down + i * 16 + lane / 4 + c / 2 * 8, column = right_of + j * 8 + lane % 4 * 2;
                Pair p = {float_to_bits(sum[i][j][c]), float_to_bits(sum[i][j][c + 1])};
                *(Pair *)(staged + row * STAGED_STRIDE + column) = p;
            }
        }
    }
    __syncthreads();
    put_tile<T>(staged, place.row0, place.column0, rows, n, bias, act, then, out);
}

// ---- by multiplications ----

#define PLAIN_K 16
#define PLAIN_STRIDE (TILE + 4)

// 8 values of a row from `at` on, zeros beyond k.
template <class T> DEVICE void fetch8(float (&v)[8], const T *row, int at, int k, bool valid) {
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = valid && at + j < k ? widen(row[at + j]) : 0.0f;
}

// The grid: tiles. A thread has a row's 8 values of k on their way, and 8 rows by 8 outputs of sums.
template <class T>
DEVICE void gemm_plain(const T *x, const T *w, int rows, int n, int k, const float *bias, int act, int then,
                       void *out) {
    SHARED_BYTES(shared);
    float *const xs = (float *)shared, *const ws = xs + PLAIN_K * PLAIN_STRIDE; // [k][row]
    const Place place(rows, n);
    const int own = threadIdx.x / 2, part = threadIdx.x % 2 * 8;
    const bool x_valid = place.row0 + own < rows, w_valid = place.column0 + own < n;
    const T *const x_row = x + (size_t)(x_valid ? place.row0 + own : 0) * k;
    const T *const w_row = w + (size_t)(w_valid ? place.column0 + own : 0) * k;
    const int down = threadIdx.x / 16 * 4, right_of = threadIdx.x % 16 * 4;
    float sum[8][8] = {}, xv[8], wv[8];
    wait_for_previous();
    fetch8(xv, x_row, part, k, x_valid);
    fetch8(wv, w_row, part, k, w_valid);
    for (int at = 0; at < k; at += PLAIN_K) {
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 8; j++) {
            xs[(part + j) * PLAIN_STRIDE + own] = xv[j];
            ws[(part + j) * PLAIN_STRIDE + own] = wv[j];
        }
        __syncthreads();
        fetch8(xv, x_row, at + PLAIN_K + part, k, x_valid);
        fetch8(wv, w_row, at + PLAIN_K + part, k, w_valid);
#pragma unroll 4
        for (int i = 0; i < PLAIN_K; i++) {
            float a[2][4], b[2][4];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                load4(a[h], xs + i * PLAIN_STRIDE + down + h * 64);
                load4(b[h], ws + i * PLAIN_STRIDE + right_of + h * 64);
            }
#pragma unroll
            for (int r = 0; r < 8; r++) {
#pragma unroll
                for (int c = 0; c < 8; c++) sum[r][c] += a[r / 4][r % 4] * b[c / 4][c % 4];
            }
        }
    }
    __syncthreads();
    float *const staged = (float *)shared;
#pragma unroll
    for (int r = 0; r < 8; r++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float four[4] = {sum[r][h * 4], sum[r][h * 4 + 1], sum[r][h * 4 + 2], sum[r][h * 4 + 3]};
            store4(staged + (down + r / 4 * 64 + r % 4) * STAGED_STRIDE + right_of + h * 64, four);
        }
    }
    __syncthreads();
    put_tile<T>(staged, place.row0, place.column0, rows, n, bias, act, then, out);
}

// ---- after cuBLASLt ----

// act(x + bias) of eight neighbours.
template <class T> DEVICE void epilogue8(T *x, const float *bias, int act) {
    Quad q = *(const Quad *)x;
    u32 pairs[4] = {q.x, q.y, q.z, q.w};
    float b[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    if (bias) {
#pragma unroll
        for (int j = 0; j < 8; j++) b[j] = bias[j];
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float low = activate_as<T>(Half<T>::low(pairs[j]) + b[2 * j], act);
        float high = activate_as<T>(Half<T>::high(pairs[j]) + b[2 * j + 1], act);
        pairs[j] = Half<T>::pack(low, high);
    }
    q.x = pairs[0];
    q.y = pairs[1];
    q.z = pairs[2];
    q.w = pairs[3];
    *(Quad *)x = q;
}
// f32 goes value by value.
DEVICE void epilogue8(float *, const float *, int) {}

// act(x + bias) in place: x [rows][n] of T or f32, a block a row.
template <class T> DEVICE void epilogue(void *x, int half, int n, const float *bias, int act) {
    const size_t row = (size_t)blockIdx.x * n;
    let_next_begin();
    wait_for_previous();
    if (sizeof(T) == 2 && half && n % 8 == 0) {
        for (int i = threadIdx.x * 8; i < n; i += blockDim.x * 8) epilogue8((T *)x + row + i, bias ? bias + i : 0, act);
        return;
    }
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float value = half ? widen(((const T *)x)[row + i]) : ((const float *)x)[row + i];
        if (bias) value += bias[i];
        value = activate_as<T>(value, act);
        if (half) {
            ((T *)x)[row + i] = narrow<T>(value);
        } else {
            ((float *)x)[row + i] = value;
        }
    }
}

// ---- names ----

typedef float f32;
#define GEMM(name, blocks, T, call)                                                                                        \
    GLOBAL(BOUNDS(GEMM_THREADS, blocks) name)(const T *x, const T *w, int rows, int n, int k, const float *bias, int act,  \
                                         int then, void *out) {                                                       \
        call<T>(x, w, rows, n, k, bias, act, then, out);                                                              \
    }
GEMM(gemm_bf16, 2, bf16, gemm)
GEMM(gemm_f16, 2, f16, gemm)
GEMM(gemm_plain_f32, 1, f32, gemm_plain)
GEMM(gemm_plain_bf16, 1, bf16, gemm_plain)
GEMM(gemm_plain_f16, 1, f16, gemm_plain)
#define EPILOGUE(T)                                                                                                   \
    GLOBAL(epilogue_##T)(void *x, int half, int n, const float *bias, int act) {                                      \
        epilogue<T>(x, half, n, bias, act);                                                                           \
    }
EPILOGUE(f32)
EPILOGUE(bf16)
EPILOGUE(f16)
