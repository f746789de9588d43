// AVX2 with FMA and F16C: 8 lanes, 16 registers.
#define ATTRIBUTION_NAME "avx2"
#define ATTRIBUTION_ENTRY instruction_set_avx2
#define ATTRIBUTION_LANES 8
#define ATTRIBUTION_TILE_ROWS 6
#define ATTRIBUTION_ROWWISE 4
#include "kernel.inc"
