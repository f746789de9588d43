// The filter for sm_80 and newer: cp.async, ldmatrix, mma.sync. Proposes candidates; canonical scores decide.
#include "epilogue.h"
#include "ptx.h"

namespace attribution::cuda {
namespace {

constexpr int threads = 256;
constexpr int tile_rows = 128;  // of the gallery
constexpr int stages = 3;
constexpr int stage_lines = query_tile + tile_rows;
constexpr size_t stage_bytes = size_t(stage_lines) * line_bytes;
using WarpHits = Hits<32>;  // sm_86 has no room for more
constexpr size_t shared_bytes = stages * stage_bytes + threads / 32 * WarpHits::bytes;
static_assert(tile_rows == stripe_rows, "a tile has one error bound");

// Lines of 128 bytes; the 16-byte piece p of line l lies at place p ^ (l % 8), so that neither writing a line nor
// reading a column of pieces meets a bank twice.
__device__ __forceinline__ uint32_t place(int line, int piece) { return uint32_t(line * line_bytes + ((piece ^ (line & 7)) << 4)); }

// Where pieces of 16 bytes do not lie at multiples of 16.
__device__ __forceinline__ void copy_slowly(unsigned char* to, const unsigned char* from, int bytes) {
  for (int i = 0; i < 16; i += 2) *reinterpret_cast<uint16_t*>(to + i) = i < bytes ? *reinterpret_cast<const uint16_t*>(from + i) : uint16_t(0);
}

// [line_bytes] of query_tile packed queries and of tile_rows rows, from byte `at` of each.
__device__ __forceinline__ void load_stage(const Batch& batch, const Slab& slab, const Chunk& chunk, unsigned char* stage, int first_query,
                                           int64_t first_row, int64_t at, bool aligned) {
  const Lines rows = lines_of(batch, slab);
  const uint32_t base = shared_address(stage);
#pragma unroll
  for (int i = 0; i < query_tile * 8 / threads; ++i) {
    const int line = i * (threads / 8) + int(threadIdx.x) / 8, piece = int(threadIdx.x) % 8;
    copy_16(base + place(line, piece), batch.packed + (first_query + line) * batch.line + at + piece * 16, 16);
  }
#pragma unroll
  for (int i = 0; i < tile_rows * 8 / threads; ++i) {
    const int line = i * (threads / 8) + int(threadIdx.x) / 8, piece = int(threadIdx.x) % 8;
    const int64_t row = first_row + line, left = rows.bytes - at - piece * 16;
    const int bytes = row >= chunk.end || left <= 0 ? 0 : left < 16 ? int(left) : 16;
    const unsigned char* from = rows.from + (bytes > 0 ? row * rows.stride + at + piece * 16 : 0);
    if (aligned) copy_16(base + query_tile * line_bytes + place(line, piece), from, bytes);
    else copy_slowly(stage + query_tile * line_bytes + place(line, piece), from, bytes);
  }
}

// 8 warps: 4 of 32 lines of queries each, 2 of 64 rows each.
template <Operand operand>
__global__ void __launch_bounds__(threads, 1) filter_kernel(Batch batch, Slab slab, Chunk chunk) {
  unsigned char* memory = shared_memory();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  typedef typename SumOf<operand>::type Sum;
  constexpr int planes = planes_of(operand);
  const int warp_query = warp % 4 * 32, warp_row = warp / 4 * 64;
  const int steps = int(batch.line / line_bytes), query_tiles = batch.padded / query_tile;
  const int64_t first_tile = chunk.begin / tile_rows, row_tiles = (chunk.end + tile_rows - 1) / tile_rows - first_tile;
  const int64_t tiles = row_tiles * query_tiles;
  const Lines lines = lines_of(batch, slab);
  const bool aligned = reinterpret_cast<uintptr_t>(lines.from) % 16 == 0 && lines.stride % 16 == 0;
  const int64_t own = blockIdx.x < tiles ? (tiles - 1 - blockIdx.x) / gridDim.x + 1 : 0;

  // One pipeline through all tiles of this block: the loads do not stop where a tile ends.
  int64_t load_tile = blockIdx.x;
  int load_step = 0;
  const auto load_next = [&](int stage) {
    if (load_tile < tiles) {
      load_stage(batch, slab, chunk, memory + stage * stage_bytes, int(load_tile % query_tiles) * query_tile,
                 (first_tile + load_tile / query_tiles) * tile_rows, int64_t(load_step) * line_bytes, aligned);
      if (++load_step == steps) {
        load_step = 0;
        load_tile += gridDim.x;
      }
    }
    commit_copies();
  };
  for (int stage = 0; stage < stages - 1; ++stage) load_next(stage);

  WarpHits hits(memory + stages * stage_bytes + warp * WarpHits::bytes);
  int stage = 0;
  for (int64_t i = 0; i < own; ++i) {
    const int64_t tile = blockIdx.x + i * gridDim.x;
    Sum sums[2][8][4] = {};
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<stages - 2>();
      __syncthreads();
      load_next((stage + stages - 1) % stages);
      const uint32_t queries = shared_address(memory + stage * stage_bytes), rows = queries + query_tile * line_bytes;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t a[2][4], b[8][2];
#pragma unroll
        for (int m = 0; m < 2; ++m) load_matrices(a[m], queries + place(warp_query + m * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          uint32_t both[4];
          load_matrices(both, rows + place(warp_row + n * 16 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
          b[2 * n][0] = both[0];
          b[2 * n][1] = both[1];
          b[2 * n + 1][0] = both[2];
          b[2 * n + 1][1] = both[3];
        }
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int n = 0; n < 8; ++n) multiply<operand>(sums[m][n], a[m], b[n]);
      }
      stage = (stage + 1) % stages;
    }
    const int64_t first_row = (first_tile + tile / query_tiles) * tile_rows;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2 / planes; ++half) {
        const int q = (int(tile % query_tiles) * query_tile + warp_query + m * 16) / planes + half * 8 + lane / 4;
        sift<16>(
            hits, batch, slab, chunk, sought_of(slab, batch.query[q], first_row), q, first_row + warp_row + lane % 4 * 2,
            [&](int v) {
              const Sum* both = sums[m][v / 2];
              if constexpr (planes == 2) return both_planes(both[v % 2], both[2 + v % 2]);
              else return both[half * 2 + v % 2];
            },
            [](int v) { return v / 2 * 8 + v % 2; });
      }
  }
  hits.flush(batch, slab, chunk);
  wait_for_copies<0>();
}

}  // namespace

void filter_generic(const Batch& batch, const Slab& slab, const Chunk& chunk, int processors, cudaStream_t stream) {
  if (batch.queries == 0 || chunk.begin >= chunk.end) return;
  const int64_t tiles = ((chunk.end + tile_rows - 1) / tile_rows - chunk.begin / tile_rows) * (batch.padded / query_tile);
  const auto kernel = [&] {
    switch (batch.operand) {
      case Operand::float32: return filter_kernel<Operand::float32>;
      case Operand::float16: return filter_kernel<Operand::float16>;
      case Operand::bfloat16: return filter_kernel<Operand::bfloat16>;
      case Operand::codes: return filter_kernel<Operand::codes>;
      default: return filter_kernel<Operand::wide_codes>;
    }
  }();
  launch("filter", kernel, tiles < processors ? tiles : processors, threads, shared_bytes, stream, 1, batch, slab, chunk);
}

}  // namespace attribution::cuda
