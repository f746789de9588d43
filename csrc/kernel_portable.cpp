// Any machine: 4 lanes, which are SSE2 on x86-64 and NEON on AArch64 without a flag.
#define ATTRIBUTION_NAME "portable"
#define ATTRIBUTION_ENTRY instruction_set_portable
#define ATTRIBUTION_LANES 4
#define ATTRIBUTION_TILE_ROWS 6
#define ATTRIBUTION_ROWWISE 2
#include "kernel.inc"
