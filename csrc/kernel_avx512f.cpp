// AVX-512 F, BW, DQ, VL: 16 lanes, 32 registers.
#define ATTRIBUTION_NAME "avx512f"
#define ATTRIBUTION_ENTRY instruction_set_avx512f
#define ATTRIBUTION_LANES 16
#define ATTRIBUTION_TILE_ROWS 12
#define ATTRIBUTION_ROWWISE 8
#include "kernel.inc"
