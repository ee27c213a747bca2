// The second half of emulator.hpp: twins that need the types of prelude.cu.

static inline float exp2_fast(float x) {
    float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y; // NaN stays; what is denormal becomes 0
}

static inline Quad load_stream(const void *from) {
    if ((uintptr_t)from % 16 != 0) ::lnv_emulator::fail("load_stream from an address that is no multiple of 16");
    Quad q;
    memcpy(&q, from, sizeof q);
    return q;
}

static inline Pair load_stream_pair(const void *from) {
    if ((uintptr_t)from % 8 != 0) ::lnv_emulator::fail("load_stream_pair from an address that is no multiple of 8");
    Pair p;
    memcpy(&p, from, sizeof p);
    return p;
}

static inline Quad load_once(const void *from) {
    if ((uintptr_t)from % 16 != 0) ::lnv_emulator::fail("load_once from an address that is no multiple of 16");
    Quad q;
    memcpy(&q, from, sizeof q);
    return q;
}

static inline unsigned load_once_word(const void *from) {
    if ((uintptr_t)from % 4 != 0) ::lnv_emulator::fail("load_once_word from an address that is no multiple of 4");
    unsigned x;
    memcpy(&x, from, sizeof x);
    return x;
}

// ---- 16-bit floats ----

static inline float lnv_f16_to_float(unsigned bits) {
    float magnitude = __uint_as_float((bits & 0x7fffu) << 13) * 5.192296858534828e+33f; // 2^112, exact
    if ((bits & 0x7c00u) == 0x7c00u) magnitude = __uint_as_float(0x7f800000u | (bits & 0x3ffu) << 13);
    return __uint_as_float(__float_as_uint(magnitude) | (bits & 0x8000u) << 16);
}
static inline unsigned lnv_float_to_f16(float x) {
    unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u;
    float magnitude = fabsf(x);
    if (magnitude != magnitude) return 0x7fffu;
    if (magnitude >= 65520.0f) return sign | 0x7c00u;
    // Below 2^-14, steps are of 2^-24: adding 0.5 leaves just those in the lower bits, rounded to even.
    if (magnitude < 6.103515625e-05f) return sign | (__float_as_uint(magnitude + 0.5f) - 0x3f000000u);
    unsigned m = bits & 0x7fffffffu;
    m += 0xfffu + (m >> 13 & 1); // to nearest even
    return sign | ((m >> 13) - (112u << 10));
}
static inline unsigned lnv_float_to_bf16(float x) {
    unsigned bits = __float_as_uint(x);
    if (x != x) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
static inline float widen(f16 x) { return lnv_f16_to_float(x.bits); }
static inline f16 narrow_f16(float x) {
    f16 y;
    y.bits = (u16)lnv_float_to_f16(x);
    return y;
}
static inline unsigned pack_bf16(float low, float high) { return lnv_float_to_bf16(low) | lnv_float_to_bf16(high) << 16; }
static inline unsigned pack_f16(float low, float high) { return lnv_float_to_f16(low) | lnv_float_to_f16(high) << 16; }

static inline unsigned add_pair_bf16(unsigned a, unsigned b) {
    return pack_bf16(__uint_as_float(a << 16) + __uint_as_float(b << 16),
                     __uint_as_float(a & 0xffff0000u) + __uint_as_float(b & 0xffff0000u));
}
static inline unsigned add_pair_f16(unsigned a, unsigned b) {
    return pack_f16(lnv_f16_to_float(a & 0xffffu) + lnv_f16_to_float(b & 0xffffu),
                    lnv_f16_to_float(a >> 16) + lnv_f16_to_float(b >> 16));
}

// ---- mma.m16n8k16 ----

struct LnvMma {
    float *c;
    const unsigned *a, *b;
};
template <bool BF16> static void lnv_mma_all(uint32_t, void *const *operands) {
    float a[16][16], b[16][8];
    auto value = [](unsigned bits) { return BF16 ? __uint_as_float(bits << 16) : lnv_f16_to_float(bits); };
    // Lane l holds, in register i of a, columns 2 (l % 4) and the next of row l / 4: 8 rows further down for odd i,
    // 8 columns further right from the third on; of b, rows 2 (l % 4) and the next of column l / 4, 8 rows further
    // down in the second.
    for (unsigned lane = 0; lane < 32; lane++) {
        const LnvMma &mine = *(const LnvMma *)operands[lane];
        unsigned g = lane / 4, t = lane % 4;
        for (unsigned i = 0; i < 4; i++) {
            float *at = &a[g + i % 2 * 8][2 * t + i / 2 * 8];
            at[0] = value(mine.a[i] & 0xffffu);
            at[1] = value(mine.a[i] >> 16);
        }
        for (unsigned i = 0; i < 2; i++) {
            b[2 * t + i * 8][g] = value(mine.b[i] & 0xffffu);
            b[2 * t + i * 8 + 1][g] = value(mine.b[i] >> 16);
        }
    }
    // Of c: columns 2 (l % 4) and the next of row l / 4, and of the row 8 further down.
    float c[16][8];
    for (unsigned lane = 0; lane < 32; lane++) {
        const float *mine = ((const LnvMma *)operands[lane])->c;
        for (unsigned i = 0; i < 4; i++) c[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2] = mine[i];
    }
    for (unsigned row = 0; row < 16; row++) {
        for (unsigned k = 0; k < 16; k++) {
            for (unsigned column = 0; column < 8; column++) c[row][column] += a[row][k] * b[k][column];
        }
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        float *mine = ((const LnvMma *)operands[lane])->c;
        for (unsigned i = 0; i < 4; i++) mine[i] = c[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
    }
}
static inline void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    LnvMma mine = {c, a, b};
    ::lnv_emulator::collective("mma_bf16", FULL, &mine, lnv_mma_all<true>, true);
}
static inline void mma_f16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    LnvMma mine = {c, a, b};
    ::lnv_emulator::collective("mma_f16", FULL, &mine, lnv_mma_all<false>, true);
}

// ---- ldmatrix.x4 ----

struct LnvMatrix {
    unsigned *r;
    const u16 *row;
};
template <bool TRANSPOSED> static void lnv_ldmatrix_all(uint32_t, void *const *operands) {
    for (unsigned lane = 0; lane < 32; lane++) {
        unsigned *r = ((const LnvMatrix *)operands[lane])->r;
        for (unsigned i = 0; i < 4; i++) {
            auto element = [&](unsigned row, unsigned column) {
                return (unsigned)((const LnvMatrix *)operands[i * 8 + row])->row[column];
            };
            unsigned g = lane / 4, t = lane % 4;
            r[i] = TRANSPOSED ? element(2 * t, g) | element(2 * t + 1, g) << 16
                              : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
        }
    }
}
template <bool TRANSPOSED> static inline void lnv_ldmatrix(unsigned (&r)[4], const void *row) {
    if ((uintptr_t)row % 16 != 0) ::lnv_emulator::fail("ldmatrix from an address that is no multiple of 16");
    if (!::lnv_emulator::is_shared(row, 16)) ::lnv_emulator::fail("ldmatrix from what is not shared memory");
    LnvMatrix mine = {r, (const u16 *)row};
    ::lnv_emulator::collective(TRANSPOSED ? "ldmatrix_transposed" : "ldmatrix", FULL, &mine,
                               lnv_ldmatrix_all<TRANSPOSED>, true);
}
static inline void ldmatrix(unsigned (&r)[4], const void *row) { lnv_ldmatrix<false>(r, row); }
static inline void ldmatrix_transposed(unsigned (&r)[4], const void *row) { lnv_ldmatrix<true>(r, row); }
