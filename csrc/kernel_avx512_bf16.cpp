// AVX-512 with the dot products of bfloat16, two products per lane and step, and of int8, four. float32 and float16 rows
// are filtered through bfloat16 copies of a block.
#define ATTRIBUTION_NAME "avx512_bf16"
#define ATTRIBUTION_ENTRY instruction_set_avx512_bf16
#define ATTRIBUTION_LANES 16
#define ATTRIBUTION_TILE_ROWS 12
#define ATTRIBUTION_ROWWISE 16
#define ATTRIBUTION_PAIRS
#define ATTRIBUTION_QUADS
// The fastest on Zen 5. On Intel it takes 2.5 times as long, but its machines that have all this have AMX, nearly all.
#define ATTRIBUTION_READ past_l2
#include "kernel.inc"
