// Operations on whole rows: norms, activations, copies, and the two ends of the vision tower.
//
// Decision: a matrix is f32 or T, which a flag says when the kernel runs: these kernels wait for memory,
// and a uniform branch costs nothing beside it, where a kernel for each pair of types would multiply
// them by four. Four values go at once where the columns allow it. Sums are in f32.

// Value i of a matrix that is T if `half`, else f32.
template <class T> DEVICE float at(const void *x, size_t i, int half) {
    return half ? widen(((const T *)x)[i]) : ((const float *)x)[i];
}
template <class T> DEVICE void put(void *x, size_t i, int half, float value) {
    if (half)
        ((T *)x)[i] = narrow<T>(value);
    else
        ((float *)x)[i] = value;
}

// Four neighbouring values; i is a multiple of 4.
template <class T> struct Four {
    static DEVICE void load(const void *x, size_t i, int half, float (&v)[4]) {
        if (half) {
            Pair p = *(const Pair *)((const T *)x + i);
            v[0] = Half<T>::low(p.x);
            v[1] = Half<T>::high(p.x);
            v[2] = Half<T>::low(p.y);
            v[3] = Half<T>::high(p.y);
        } else {
            Quad q = *(const Quad *)((const float *)x + i);
            v[0] = bits_to_float(q.x);
            v[1] = bits_to_float(q.y);
            v[2] = bits_to_float(q.z);
            v[3] = bits_to_float(q.w);
        }
    }
    static DEVICE void store(void *x, size_t i, int half, const float (&v)[4]) {
        if (half) {
            Pair p;
            p.x = Half<T>::pack(v[0], v[1]);
            p.y = Half<T>::pack(v[2], v[3]);
            *(Pair *)((T *)x + i) = p;
        } else {
            Quad q;
            q.x = float_to_bits(v[0]);
            q.y = float_to_bits(v[1]);
            q.z = float_to_bits(v[2]);
            q.w = float_to_bits(v[3]);
            *(Quad *)((float *)x + i) = q;
        }
    }
};
// Nothing but f32.
template <> struct Four<float> {
    static DEVICE void load(const void *x, size_t i, int, float (&v)[4]) {
        Quad q = *(const Quad *)((const float *)x + i);
        v[0] = bits_to_float(q.x);
        v[1] = bits_to_float(q.y);
        v[2] = bits_to_float(q.z);
        v[3] = bits_to_float(q.w);
    }
    static DEVICE void store(void *x, size_t i, int, const float (&v)[4]) {
        Quad q;
        q.x = float_to_bits(v[0]);
        q.y = float_to_bits(v[1]);
        q.z = float_to_bits(v[2]);
        q.w = float_to_bits(v[3]);
        *(Quad *)((float *)x + i) = q;
    }
};

// The sum of all threads' values, in all threads. `parts` holds a value a warp.
DEVICE float block_sum(float x, float *parts) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < (int)blockDim.x / WARP; i++) sum += parts[i];
    return sum;
}

// A block a row: out = x / sqrt(mean(x^2) + eps) * weight.
template <class T>
DEVICE void rms_norm(const void *x, int x_half, const float *weight, float eps, void *out, int out_half,
                     int cols) {
    __shared__ float parts[WARP];
    size_t row = (size_t)blockIdx.x * cols;
    float sum = 0.0f;
    if (cols % 4 == 0) {
        float v[4], w[4];
        for (int i = threadIdx.x * 4; i < cols; i += blockDim.x * 4) {
            Four<T>::load(x, row + i, x_half, v);
            sum += v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
        }
        float scale = 1.0f / sqrtf(block_sum(sum, parts) / cols + eps);
        for (int i = threadIdx.x * 4; i < cols; i += blockDim.x * 4) {
            Four<T>::load(x, row + i, x_half, v);
            Four<float>::load(weight, i, 0, w);
            for (int j = 0; j < 4; j++) v[j] = v[j] * scale * w[j];
            Four<T>::store(out, row + i, out_half, v);
        }
        return;
    }
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
        float v = at<T>(x, row + i, x_half);
        sum += v * v;
    }
    float scale = 1.0f / sqrtf(block_sum(sum, parts) / cols + eps);
    for (int i = threadIdx.x; i < cols; i += blockDim.x)
        put<T>(out, row + i, out_half, at<T>(x, row + i, x_half) * scale * weight[i]);
}

// A block a row: out = (x - mean) / sqrt(variance + eps) * weight + bias.
template <class T>
DEVICE void layer_norm(const void *x, int x_half, const float *weight, const float *bias, float eps,
                       void *out, int out_half, int cols) {
    __shared__ float parts[WARP];
    size_t row = (size_t)blockIdx.x * cols;
    float sum = 0.0f;
    if (cols % 4 == 0) {
        float v[4], w[4], b[4];
        for (int i = threadIdx.x * 4; i < cols; i += blockDim.x * 4) {
            Four<T>::load(x, row + i, x_half, v);
            sum += v[0] + v[1] + v[2] + v[3];
        }
        float mean = block_sum(sum, parts) / cols;
        sum = 0.0f;
        for (int i = threadIdx.x * 4; i < cols; i += blockDim.x * 4) {
            Four<T>::load(x, row + i, x_half, v);
            for (int j = 0; j < 4; j++) sum += (v[j] - mean) * (v[j] - mean);
        }
        float scale = 1.0f / sqrtf(block_sum(sum, parts) / cols + eps);
        for (int i = threadIdx.x * 4; i < cols; i += blockDim.x * 4) {
            Four<T>::load(x, row + i, x_half, v);
            Four<float>::load(weight, i, 0, w);
            Four<float>::load(bias, i, 0, b);
            for (int j = 0; j < 4; j++) v[j] = (v[j] - mean) * scale * w[j] + b[j];
            Four<T>::store(out, row + i, out_half, v);
        }
        return;
    }
    for (int i = threadIdx.x; i < cols; i += blockDim.x) sum += at<T>(x, row + i, x_half);
    float mean = block_sum(sum, parts) / cols;
    sum = 0.0f;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
        float v = at<T>(x, row + i, x_half) - mean;
        sum += v * v;
    }
    float scale = 1.0f / sqrtf(block_sum(sum, parts) / cols + eps);
    for (int i = threadIdx.x; i < cols; i += blockDim.x)
        put<T>(out, row + i, out_half, (at<T>(x, row + i, x_half) - mean) * scale * weight[i] + bias[i]);
}

// out[r][i] = act(gate_up[r][i]) * gate_up[r][cols + i], for `count` values of out in all.
template <class T>
DEVICE void gated(const void *gate_up, int in_half, int act, void *out, int out_half, int cols, size_t count) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * (cols % 4 == 0 ? 4 : 1);
    if (i >= count) return;
    size_t row = i / cols, gate = row * cols * 2 + i % cols;
    if (cols % 4 == 0) {
        float g[4], u[4];
        Four<T>::load(gate_up, gate, in_half, g);
        Four<T>::load(gate_up, gate + cols, in_half, u);
        for (int j = 0; j < 4; j++) g[j] = activate_as<T>(g[j], act) * u[j];
        Four<T>::store(out, i, out_half, g);
        return;
    }
    put<T>(out, i, out_half, activate(at<T>(gate_up, gate, in_half), act) * at<T>(gate_up, gate + cols, in_half));
}

// x = act(x).
template <class T> DEVICE void activate_all(void *x, int half, int act, size_t count) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) put<T>(x, i, half, activate(at<T>(x, i, half), act));
}

// A block a row: to[to_rows[b]] = from[from_rows[b]], from column `to_col` on; without tables row b.
template <class T>
DEVICE void copy_rows(const void *from, int from_half, const u32 *from_rows, int from_cols, void *to,
                      int to_half, const u32 *to_rows, int to_cols, int to_col) {
    int b = blockIdx.x;
    size_t source = (size_t)(from_rows ? from_rows[b] : b) * from_cols;
    size_t target = (size_t)(to_rows ? to_rows[b] : b) * to_cols + to_col;
    if (from_cols % 4 == 0 && target % 4 == 0) {
        float v[4];
        for (int i = threadIdx.x * 4; i < from_cols; i += blockDim.x * 4) {
            Four<T>::load(from, source + i, from_half, v);
            Four<T>::store(to, target + i, to_half, v);
        }
        return;
    }
    for (int i = threadIdx.x; i < from_cols; i += blockDim.x)
        put<T>(to, target + i, to_half, at<T>(from, source + i, from_half));
}

// A block a row: x[b] += table[b % table_rows].
template <class T>
DEVICE void add_rows(void *x, int x_half, const void *table, int table_half, int table_rows, int cols) {
    size_t row = (size_t)blockIdx.x * cols, add = (size_t)(blockIdx.x % table_rows) * cols;
    for (int i = threadIdx.x; i < cols; i += blockDim.x)
        put<T>(x, row + i, x_half, at<T>(x, row + i, x_half) + at<T>(table, add + i, table_half));
}

// A block a row: x[b][j] *= scales[j].
template <class T> DEVICE void scale_columns(void *x, int x_half, const float *scales, int cols) {
    size_t row = (size_t)blockIdx.x * cols;
    for (int i = threadIdx.x; i < cols; i += blockDim.x)
        put<T>(x, row + i, x_half, at<T>(x, row + i, x_half) * scales[i]);
}

// A block a row: to[to_rows[b]] = row.
template <class T>
DEVICE void broadcast_row(const float *row, void *to, int to_half, const u32 *to_rows, int cols) {
    size_t target = (size_t)to_rows[blockIdx.x] * cols;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) put<T>(to, target + i, to_half, row[i]);
}

// A block a patch: the pixels [n][channels][height][width] of patch b, in the order (channel, y, x).
template <class T>
DEVICE void patchify(const float *pixels, int channels, int height, int width, int patch, void *out,
                     int out_half) {
    int grid_h = height / patch, grid_w = width / patch, cols = channels * patch * patch;
    int image = blockIdx.x / (grid_h * grid_w), place = blockIdx.x % (grid_h * grid_w);
    int top = place / grid_w * patch, left = place % grid_w * patch;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
        int channel = i / (patch * patch), y = i / patch % patch, x = i % patch;
        size_t from = (((size_t)image * channels + channel) * height + top + y) * width + left + x;
        put<T>(out, (size_t)blockIdx.x * cols + i, out_half, pixels[from]);
    }
}

// The row of x at place `i` of the window of row b of pooled grids.
DEVICE size_t window_row(int b, int side, int stride, int i) {
    int pooled = side / stride, image = b / (pooled * pooled), place = b % (pooled * pooled);
    int y = place / pooled * stride + i / stride, x = place % pooled * stride + i % stride;
    return ((size_t)image * side + y) * side + x;
}

// A block a window: its mean, or its maximum, where NaN stays.
template <class T>
DEVICE void pool(const void *x, int x_half, int cols, int side, int stride, int max, void *out, int out_half) {
    for (int c = threadIdx.x; c < cols; c += blockDim.x) {
        float all = max ? bits_to_float(0xff800000u) : 0.0f;
        for (int i = 0; i < stride * stride; i++) {
            float v = at<T>(x, window_row(blockIdx.x, side, stride, i) * cols + c, x_half);
            if (!max)
                all += v;
            else if (v > all || v != v)
                all = v;
        }
        put<T>(out, (size_t)blockIdx.x * cols + c, out_half, max ? all : all / (stride * stride));
    }
}

// A block a window: its rows side by side.
template <class T>
DEVICE void pool_windows(const void *x, int x_half, int cols, int side, int stride, void *out, int out_half) {
    for (int i = 0; i < stride * stride; i++) {
        size_t from = window_row(blockIdx.x, side, stride, i) * cols;
        size_t to = ((size_t)blockIdx.x * stride * stride + i) * cols;
        for (int c = threadIdx.x; c < cols; c += blockDim.x)
            put<T>(out, to + c, out_half, at<T>(x, from + c, x_half));
    }
}

// Reads `quads` times 16 bytes, each once, and writes what nobody can foresee: for measuring how fast that is.
GLOBAL(probe_read)(const Quad *from, size_t quads, u32 *sink) { let_next_begin(); wait_for_previous();
    size_t step = (size_t)gridDim.x * blockDim.x;
    u32 all = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < quads; i += 4 * step) {
        for (int j = 0; j < 4; j++) {
            if (i + j * step >= quads) break;
            Quad q = load_stream(from + i + j * step);
            all ^= q.x ^ q.y ^ q.z ^ q.w;
        }
    }
    if (all == 0x9e3779b9u) *sink = all;
}

#define KERNELS_OF(name, T)                                                                              \
    GLOBAL(rms_norm_##name)(const void *x, int x_half, const float *weight, float eps, void *out,        \
                            int out_half, int cols) { let_next_begin(); wait_for_previous();                                                    \
        rms_norm<T>(x, x_half, weight, eps, out, out_half, cols);                                        \
    }                                                                                                    \
    GLOBAL(layer_norm_##name)(const void *x, int x_half, const float *weight, const float *bias,         \
                              float eps, void *out, int out_half, int cols) { let_next_begin(); wait_for_previous();                            \
        layer_norm<T>(x, x_half, weight, bias, eps, out, out_half, cols);                                \
    }                                                                                                    \
    GLOBAL(gated_##name)(const void *gate_up, int in_half, int act, void *out, int out_half, int cols,   \
                         size_t count) { let_next_begin(); wait_for_previous();                                                                 \
        gated<T>(gate_up, in_half, act, out, out_half, cols, count);                                     \
    }                                                                                                    \
    GLOBAL(activate_##name)(void *x, int half, int act, size_t count) { let_next_begin(); wait_for_previous();                                  \
        activate_all<T>(x, half, act, count);                                                            \
    }                                                                                                    \
    GLOBAL(copy_rows_##name)(const void *from, int from_half, const u32 *from_rows, int from_cols,       \
                             void *to, int to_half, const u32 *to_rows, int to_cols, int to_col) { let_next_begin(); wait_for_previous();       \
        copy_rows<T>(from, from_half, from_rows, from_cols, to, to_half, to_rows, to_cols, to_col);      \
    }                                                                                                    \
    GLOBAL(add_rows_##name)(void *x, int x_half, const void *table, int table_half, int table_rows,      \
                            int cols) { let_next_begin(); wait_for_previous();                                                                  \
        add_rows<T>(x, x_half, table, table_half, table_rows, cols);                                     \
    }                                                                                                    \
    GLOBAL(scale_columns_##name)(void *x, int x_half, const float *scales,                               \
                                 int cols) { let_next_begin(); wait_for_previous();                                                             \
        scale_columns<T>(x, x_half, scales, cols);                                                       \
    }                                                                                                    \
    GLOBAL(broadcast_row_##name)(const float *row, void *to, int to_half, const u32 *to_rows,            \
                                 int cols) { let_next_begin(); wait_for_previous();                                                             \
        broadcast_row<T>(row, to, to_half, to_rows, cols);                                               \
    }                                                                                                    \
    GLOBAL(patchify_##name)(const float *pixels, int channels, int height, int width, int patch,         \
                            void *out, int out_half) { let_next_begin(); wait_for_previous();                                                   \
        patchify<T>(pixels, channels, height, width, patch, out, out_half);                              \
    }                                                                                                    \
    GLOBAL(pool_##name)(const void *x, int x_half, int cols, int side, int stride, int max, void *out,   \
                        int out_half) { let_next_begin(); wait_for_previous();                                                                  \
        pool<T>(x, x_half, cols, side, stride, max, out, out_half);                                      \
    }                                                                                                    \
    GLOBAL(pool_windows_##name)(const void *x, int x_half, int cols, int side, int stride, void *out,    \
                                int out_half) { let_next_begin(); wait_for_previous();                                                          \
        pool_windows<T>(x, x_half, cols, side, stride, out, out_half);                                   \
    }

KERNELS_OF(f32, float)
KERNELS_OF(bf16, bf16)
KERNELS_OF(f16, f16)
