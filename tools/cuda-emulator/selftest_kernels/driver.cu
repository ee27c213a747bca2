// Kernels for driver_test.py.

template <class T> DEVICE void scale(T *x, int count, float by) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < count) x[i] = narrow<T>(widen(x[i]) * by);
}
#define KERNELS_OF(name, T)                                                                                           \
    GLOBAL(scale_##name)(T * x, int count, float by) { scale<T>(x, count, by); }
KERNELS_OF(f32, float)
KERNELS_OF(bf16, bf16)
KERNELS_OF(f16, f16)

// Its own block sums to `out`; what the host must give it, of each size.
GLOBAL(BOUNDS(256, 2) mixed)(u64 wide, float *out, int count, float by, const u32 *more, u8 *flags) {
    SHARED_BYTES(memory);
    float *parts = (float *)memory;
    parts[threadIdx.x] = (float)wide + (float)more[threadIdx.x] * by;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 0; i < count; i++) out[blockIdx.x] += parts[i];
        flags[blockIdx.x] = 7;
    }
}

// Reads `x[at]`, wherever that is.
GLOBAL(peek)(const float *x, int at, float *out) { out[0] = x[at]; }
GLOBAL(poke)(u8 *x, int at) { x[at] = 3; }
