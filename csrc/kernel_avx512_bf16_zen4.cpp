// As kernel_avx512_bf16.cpp, but memory is read as Zen 4 likes it: see csrc/README.md.
#define ATTRIBUTION_NAME "avx512_bf16_zen4"
#define ATTRIBUTION_ENTRY instruction_set_avx512_bf16_zen4
#define ATTRIBUTION_LANES 16
#define ATTRIBUTION_TILE_ROWS 12
#define ATTRIBUTION_ROWWISE 16
#define ATTRIBUTION_PAIRS
#define ATTRIBUTION_QUADS
#define ATTRIBUTION_QUARTERS
#define ATTRIBUTION_READ into_l2
#include "kernel.inc"
