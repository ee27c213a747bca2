// GCC 12 takes ldtilecfg to read 8 bytes and tileloadd none, so that stores before them are removed as dead (llama.cpp then dies
// of a fault at ldtilecfg). To be included first in ggml-cpu/amx/mmq.cpp: the same instructions, with memory clobbered.
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__) && defined(__AMX_TILE__)
#define _tile_loadconfig(p) __asm__ volatile("ldtilecfg (%0)" ::"r"(p) : "memory")
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#define AMXFIX_LOADD(dst, base, stride) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #dst ::"r"((const void *)(base)), "r"((long)(stride)) : "memory")
#define AMXFIX_STORED(src, base, stride) __asm__ volatile("tilestored %%tmm" #src ", (%0,%1,1)" ::"r"((void *)(base)), "r"((long)(stride)) : "memory")
#define _tile_loadd(dst, base, stride) AMXFIX_LOADD(dst, base, stride)
#define _tile_stream_loadd(dst, base, stride) AMXFIX_LOADD(dst, base, stride)
#define _tile_stored(src, base, stride) AMXFIX_STORED(src, base, stride)
#endif
