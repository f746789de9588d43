// The filter for sm_90a: one warp has the copy engine fill a ring of stages, one or two groups of four warps multiply
// what is in them, and blocks stay for as long as there are tiles.
#include "epilogue.h"
#include "hopper.h"

namespace attribution::cuda {
namespace {

// Few queries: they stay in shared memory, and the gallery streams past them, once.
struct Few {
  static constexpr int consumers = 1, tile_rows = 128, cluster = 1;
  static constexpr bool resident = true;
};
// Many: tiles of 128 queries x 256 rows, query tiles innermost, so that rows come from memory once and then from L2.
struct Many {
  static constexpr int consumers = 2, tile_rows = 256, cluster = 1;
  static constexpr bool resident = false;
};
// An even number of query tiles: two blocks share what they read of the gallery.
struct Pairs {
  static constexpr int consumers = 2, tile_rows = 256, cluster = 2;
  static constexpr bool resident = false;
};

constexpr int group_lines = 64;  // of queries, of one consumer
constexpr int box_rows = 128;
constexpr size_t barrier_bytes = 1024;
constexpr size_t most_shared = 227 << 10;
using WarpHits = Hits<128>;
template <class Shape>
constexpr size_t hits_bytes = Shape::consumers * 4 * WarpHits::bytes;  // after the ring

template <class Shape>
constexpr size_t stage_bytes = size_t(Shape::tile_rows + (Shape::resident ? 0 : Shape::consumers * group_lines)) * line_bytes;
// The kernel of three groups starts with 168 registers a thread, 384 times: what one group gives, the others take.
constexpr int registers_given = 40, registers_taken = 232;
static_assert(registers_given + 2 * registers_taken == 3 * 168 && registers_given % 8 == 0 && registers_taken % 8 == 0, "");
template <class Shape>
size_t resident_bytes(int64_t line) {
  return Shape::resident ? size_t(line) * group_lines : 0;
}
template <class Shape>
int stages_of(int64_t line) {
  const size_t used = barrier_bytes + hits_bytes<Shape> + resident_bytes<Shape>(line);
  const size_t stages = used < most_shared ? (most_shared - used) / stage_bytes<Shape> : 0;
  return int(stages < 12 ? stages : 12);
}

template <Operand operand, class Shape>
__global__ void __launch_bounds__(128 * (1 + Shape::consumers), 1)
    hopper_kernel(const __grid_constant__ TensorMap queries_map, const __grid_constant__ TensorMap rows_map, Batch batch, Slab slab,
                  Chunk chunk, int stages) {
  constexpr int consumers = Shape::consumers, tile_rows = Shape::tile_rows, cluster = Shape::cluster;
  constexpr int line_values = line_bytes / int(bytes_of(operand)), planes = planes_of(operand), stripes = tile_rows / stripe_rows;
  typedef typename SumOf<operand>::type Sum;
  constexpr int queries_bytes = Shape::resident ? 0 : consumers * group_lines * line_bytes;
  const int steps = int(batch.line / line_bytes);
  const uint32_t memory = shared_address(shared_memory());
  const uint32_t barriers = memory, resident = memory + uint32_t(barrier_bytes);
  const uint32_t ring = resident + (Shape::resident ? uint32_t(steps * group_lines * line_bytes) : 0);
  const auto full = [&](int stage) { return barriers + uint32_t(stage) * 16; };
  const auto empty = [&](int stage) { return barriers + uint32_t(stage) * 16 + 8; };
  const uint32_t ready = barriers + 16 * 32;  // the resident queries are there
  const auto stage_at = [&](int stage) { return ring + uint32_t(stage) * uint32_t(stage_bytes<Shape>); };

  const uint32_t rank = cluster > 1 ? block_rank() : 0;
  const int group = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      make_barrier(full(stage), 1);
      make_barrier(empty(stage), uint32_t(consumers * 4 * cluster));  // each warp of consumers, of each block
    }
    make_barrier(ready, 1);
    publish_barriers();
  }
  __syncwarp();  // the cluster's barrier wants whole warps
  if constexpr (cluster > 1) cluster_barrier();
  else __syncthreads();

  // Tiles of the cluster: of its blocks each takes another tile of queries and the same rows.
  const int query_groups = Shape::resident ? 1 : batch.padded / query_tile / cluster;
  const int64_t first_tile = chunk.begin / tile_rows;
  const int64_t tiles = ((chunk.end + tile_rows - 1) / tile_rows - first_tile) * query_groups;
  const int64_t own_first = blockIdx.x / cluster, hop = gridDim.x / cluster;

  if (group == 0) {
    if constexpr (consumers == 2) give_registers<registers_given>();
    if (threadIdx.x == 0) {
      if constexpr (Shape::resident) {
        arrive_expecting(ready, uint32_t(steps * group_lines * line_bytes));
        for (int step = 0; step < steps; ++step)
          copy_box(queries_map, resident + uint32_t(step * group_lines * line_bytes), ready, step * line_values, 0);
      }
      int stage = 0;
      uint32_t parity = 0;
      for (int64_t tile = own_first; tile < tiles; tile += hop) {
        const int first_query = (int(tile % query_groups) * cluster + int(rank)) * query_tile;
        const int64_t first_row = (first_tile + tile / query_groups) * tile_rows;
        for (int step = 0; step < steps; ++step) {
          wait(empty(stage), parity ^ 1);
          arrive_expecting(full(stage), uint32_t(stage_bytes<Shape>));
          const uint32_t to = stage_at(stage);
          if constexpr (!Shape::resident)
            for (int c = 0; c < consumers; ++c)
              copy_box(queries_map, to + uint32_t(c * group_lines * line_bytes), full(stage), step * line_values, first_query + c * group_lines);
          if constexpr (cluster > 1) {
            static_assert(cluster == 1 || tile_rows == cluster * box_rows, "each block of the cluster brings one box");
            copy_box(rows_map, to + uint32_t(queries_bytes) + rank * uint32_t(box_rows * line_bytes), full(stage), step * line_values,
                     first_row + int64_t(rank) * box_rows, uint16_t((1u << cluster) - 1));
          } else {
            for (int box = 0; box < tile_rows / box_rows; ++box)
              copy_box(rows_map, to + uint32_t(queries_bytes + box * box_rows * line_bytes), full(stage), step * line_values,
                       first_row + box * box_rows);
          }
          if (++stage == stages) {
            stage = 0;
            parity ^= 1;
          }
        }
      }
    }
  } else {
    if constexpr (consumers == 2) take_registers<registers_taken>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const auto release = [&](int stage) {
      if constexpr (cluster > 1) {
        if (lane < cluster) arrive_in_cluster(map_to_block(empty(stage), uint32_t(lane)));
      } else if (lane == 0) {
        arrive(empty(stage));
      }
    };
    WarpHits hits(shared_memory() + (stage_at(stages) - memory) + size_t((group - 1) * 4 + warp) * WarpHits::bytes);
    if constexpr (Shape::resident) wait(ready, 0);
    int stage = 0, before = 0;
    uint32_t parity = 0;
    for (int64_t tile = own_first; tile < tiles; tile += hop) {
      const int64_t first_row = (first_tile + tile / query_groups) * tile_rows;
      const int first_line = (int(tile % query_groups) * cluster + int(rank)) * query_tile + (group - 1) * group_lines + warp * 16;
      const int first_query = first_line / planes + lane / 4;
      Sum sums[tile_rows / 2];
      Sought sought[2 / planes][stripes];
      for (int step = 0; step < steps; ++step) {
        wait(full(stage), parity);
        const uint32_t at = stage_at(stage);
        const uint64_t a = matrix_at(Shape::resident ? resident + uint32_t(step * group_lines * line_bytes)
                                                     : at + uint32_t((group - 1) * group_lines * line_bytes));
        const uint64_t b = matrix_at(at + uint32_t(queries_bytes));
        hold(sums);
        begin_products();
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply_add<operand>(sums, advanced(a, k * 32), advanced(b, k * 32), step > 0 || k > 0);
        commit_products();
        if (step == 0) {  // while the first products are under way
#pragma unroll
          for (int half = 0; half < 2 / planes; ++half) {
            const Query query = batch.query[first_query + half * 8];
#pragma unroll
            for (int i = 0; i < stripes; ++i) sought[half][i] = sought_of(slab, query, first_row + i * stripe_rows);
          }
        } else {
          wait_for_products<1>();  // those of the step before are done with its stage
          release(before);
        }
        before = stage;
        if (++stage == stages) {
          stage = 0;
          parity ^= 1;
        }
      }
      wait_for_products<0>();
      hold(sums);
      release(before);
#pragma unroll
      for (int half = 0; half < 2 / planes; ++half)
#pragma unroll
        for (int i = 0; i < stripes; ++i)
          sift<stripe_rows / 4>(
              hits, batch, slab, chunk, sought[half][i], first_query + half * 8, first_row + i * stripe_rows + lane % 4 * 2,
              [&](int v) {
                const Sum* both = sums + i * (stripe_rows / 2) + v / 2 * 4;
                if constexpr (planes == 2) return both_planes(both[v % 2], both[2 + v % 2]);
                else return both[half * 2 + v % 2];
              },
              [](int v) { return v / 2 * 8 + v % 2; });
    }
    hits.flush(batch, slab, chunk);
  }
  // Nobody leaves while another block may still arrive at its barriers.
  __syncwarp();
  if constexpr (cluster > 1) cluster_barrier();
}

#ifndef ATTRIBUTION_EMULATED
TensorMap encode(const Boxes& boxes);
#endif

// Boxes of one line's bytes by so many rows.
TensorMap map_of(const unsigned char* base, Operand operand, int64_t columns, int64_t rows, int64_t stride, int lines) {
  return encode({base, operand, {uint64_t(columns), uint64_t(rows)}, uint64_t(stride), {uint32_t(line_bytes / bytes_of(operand)), uint32_t(lines)}});
}

template <class Shape>
void walk(const Batch& batch, const Slab& slab, const Chunk& chunk, int processors, cudaStream_t stream) {
  const Lines rows = lines_of(batch, slab);
  const TensorMap queries_map = map_of(batch.packed, batch.operand, batch.line / bytes_of(batch.operand), batch.padded, batch.line, group_lines);
  const TensorMap rows_map = map_of(rows.from, batch.operand, batch.dim, slab.count, rows.stride, box_rows);
  const int stages = stages_of<Shape>(batch.line);
  const size_t bytes = barrier_bytes + resident_bytes<Shape>(batch.line) + size_t(stages) * stage_bytes<Shape> + hits_bytes<Shape>;
  const int query_groups = Shape::resident ? 1 : batch.padded / query_tile / Shape::cluster;
  const int64_t tiles = ((chunk.end + Shape::tile_rows - 1) / Shape::tile_rows - chunk.begin / Shape::tile_rows) * query_groups;
  const int64_t clusters = processors / Shape::cluster;
  const auto kernel = [&] {
    switch (batch.operand) {
      case Operand::float32: return hopper_kernel<Operand::float32, Shape>;
      case Operand::float16: return hopper_kernel<Operand::float16, Shape>;
      case Operand::bfloat16: return hopper_kernel<Operand::bfloat16, Shape>;
      case Operand::codes: return hopper_kernel<Operand::codes, Shape>;
      default: break;
    }
    if constexpr (Shape::cluster == 1) return hopper_kernel<Operand::wide_codes, Shape>;
    return hopper_kernel<Operand::codes, Shape>;  // not reached: filter_hopper chooses another shape
  }();
  launch("filter (sm_90a)", kernel, (tiles < clusters ? tiles : clusters) * Shape::cluster, 128 * (1 + Shape::consumers), bytes, stream,
         Shape::cluster, queries_map, rows_map, batch, slab, chunk, stages);
}

#ifndef ATTRIBUTION_EMULATED

// By the driver's function, found at run time: the library loads where there is no driver.
TensorMap encode(const Boxes& boxes) {
  static const auto tiled = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result), "cuTensorMapEncodeTiled");
    if (found == nullptr) throw std::runtime_error("cuTensorMapEncodeTiled: wanted a driver of CUDA 12 or newer");
    return reinterpret_cast<CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                         const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                         CUtensorMapL2promotion, CUtensorMapFloatOOBfill)>(found);
  }();
  const cuuint64_t sizes[2] = {boxes.sizes[0], boxes.sizes[1]}, strides[1] = {boxes.stride};
  const cuuint32_t steps[2] = {1, 1};
  const CUtensorMapDataType type = boxes.operand == Operand::float32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : boxes.operand == Operand::float16  ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                   : boxes.operand == Operand::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                        : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  TensorMap map;
  const CUresult result = tiled(&map, type, 2, const_cast<unsigned char*>(boxes.base), sizes, strides, boxes.box, steps,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(int(result)) + " for " + std::to_string(sizes[1]) + " rows of " +
                             std::to_string(sizes[0]) + ", " + std::to_string(strides[0]) + " bytes apart");
  return map;
}

#endif

}  // namespace

bool hopper_can(const Batch& batch, const Slab& slab) {
  // The copy engine wants multiples of 16 bytes and rows that do not overlap, and knows rows by 31 bits.
  const Lines rows = lines_of(batch, slab);
  if (reinterpret_cast<uintptr_t>(rows.from) % 16 != 0 || rows.stride % 16 != 0 || rows.stride < rows.bytes) return false;
  if (rows.stride >= (int64_t(1) << 40) || slab.count >= (int64_t(1) << 31)) return false;
  return stages_of<Many>(batch.line) >= 2;
}

void filter_hopper(const Batch& batch, const Slab& slab, const Chunk& chunk, int processors, cudaStream_t stream) {
  if (batch.queries == 0 || chunk.begin >= chunk.end) return;
  const int lines = (batch.queries + 7) / 8 * 8 * planes_of(batch.operand);
  if (lines <= group_lines && stages_of<Few>(batch.line) >= 4) return walk<Few>(batch, slab, chunk, processors, stream);
  if (batch.padded / query_tile % 2 == 0 && processors >= 2 && batch.operand != Operand::wide_codes) return walk<Pairs>(batch, slab, chunk, processors, stream);
  walk<Many>(batch, slab, chunk, processors, stream);
}

}  // namespace attribution::cuda
