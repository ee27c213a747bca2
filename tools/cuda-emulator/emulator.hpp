// What a test of a kernel includes: prelude.cu, with a twin, for the processor, of each function that it has above
// its line. A twin for another function goes here too.
//
// A test includes kernels and launches them on ordinary memory:
//
//     #include "emulator.hpp"
//     #include "norm.cu"
//     int main() {
//         std::vector<float> x(rows * width), y(rows * width);
//         launch(rms_norm_f32, {rows}, {256}, shared_bytes, x.data(), y.data(), width, 1e-5f);
//         return y[0] == expected ? 0 : 1;
//     }
//
// `tools/cuda-emulator/run_test.sh test.cpp` compiles it with the right flags and runs it.
//
// `launch(kernel, grid, block, shared bytes, arguments...)` returns when all blocks have ended. Surround it by
// `lnv_emulator::in_all_orders([&] { ... })` (results cleared before) to have races show. Each file of kernels in a
// namespace of its own: include runtime.hpp and builtins.hpp first, and this one inside of the namespace.
//
// Decision: twins do what the PTX ISA says, lane by lane: https://docs.nvidia.com/cuda/parallel-thread-execution,
// "Matrix Fragments for mma.m16n8k16", "ldmatrix", "cp.async". Products of matrices add in f32, k by k; what order
// a GPU adds in is its secret. What GPUs leave undefined or silently do wrong (an address that is not aligned or
// not shared, a lane that is missing) ends the program.

#include "builtins.hpp"
#include "runtime.hpp"

#define LNV_EMULATED
#ifdef LNV_LISTING // preprocessed only, to find the kernels' names
#define GLOBAL(name) LNV_ENTRY void name
#else
#define GLOBAL(name) void name
#endif
#define BOUNDS(threads, blocks)
#define SHARED_BYTES(name) unsigned char *const name = ::lnv_emulator::self->worker->shared

struct bf16;
struct f16;
struct Quad;
struct Pair;

static inline float bits_to_float(unsigned bits) { return __uint_as_float(bits); }
static inline unsigned float_to_bits(float x) { return __float_as_uint(x); }
static inline float widen(f16 x);
static inline f16 narrow_f16(float x);
static inline unsigned pack_bf16(float low, float high);
static inline unsigned pack_f16(float low, float high);
static inline void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
static inline void mma_f16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
static inline void ldmatrix(unsigned (&r)[4], const void *row);
static inline void ldmatrix_transposed(unsigned (&r)[4], const void *row);
static inline Quad load_stream(const void *from);
static inline Pair load_stream_pair(const void *from);
static inline Quad load_once(const void *from);
static inline unsigned load_once_word(const void *from);
static inline unsigned add_pair_bf16(unsigned a, unsigned b);
static inline unsigned add_pair_f16(unsigned a, unsigned b);
static inline float exp2_fast(float x);

static inline unsigned arrive(unsigned *counter, unsigned last) { return atomicInc(counter, last); }

// Kernels run one after the other here.
static inline void wait_for_previous() {}
static inline void let_next_begin() {}

static inline void copy_async(void *to, const void *from, bool valid) { ::lnv_emulator::begin_copy(to, from, valid); }
static inline void copy_commit() { ::lnv_emulator::end_copy_group(); }
template <int N> static inline void copy_wait() { ::lnv_emulator::wait_for_copies(N); }

#include "prelude.cu"

#include "twins.hpp"

#define launch(kernel, ...) ::lnv_emulator::launch_named(#kernel, kernel, __VA_ARGS__)
