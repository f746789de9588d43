// As kernel_avx512_bf16.cpp, but more than a few queries are multiplied in matrix registers.
#define ATTRIBUTION_NAME "avx512_amx"
#define ATTRIBUTION_ENTRY instruction_set_avx512_amx
#define ATTRIBUTION_LANES 16
#define ATTRIBUTION_TILE_ROWS 12
#define ATTRIBUTION_ROWWISE 4
#define ATTRIBUTION_PAIRS
#define ATTRIBUTION_QUADS
#define ATTRIBUTION_MATRICES
#include "kernel.inc"
