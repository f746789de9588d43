// What happens to the scores of a tile while they are in registers: nearly always nothing.
#pragma once
#include "exact.h"

namespace attribution::cuda {

// The rows of a slab as the filter reads them.
struct Lines {
  const unsigned char* from;
  int64_t stride, bytes;
};
__host__ __device__ inline Lines lines_of(const Batch& batch, const Slab& slab) {
  const int64_t bytes = batch.dim * bytes_of(batch.operand);
  if (batch.operand < Operand::codes) return {slab.rows, slab.stride, bytes};
  return {reinterpret_cast<const unsigned char*>(slab.codes), slab.code_stride, bytes};
}

// What a query's sums of products with the rows of a stripe are held against.
struct Sought {
  float threshold;  // of a fast score
  float step;       // what one unit of a sum counts in it
};
__device__ __forceinline__ Sought sought_of(const Slab& slab, const Query& query, int64_t first_row) {
  Stripe stripe{0, 0, 0, 0};
  if (first_row < slab.count) stripe = slab.stripes[first_row / stripe_rows];
  const float step = stripe.step * query.step;
  if (!safe(stripe, query)) stripe = Stripe{0, 0, 0, 0};  // Hits::add leaves them out
  return {threshold_of(stripe, query), step};
}

// Scores that reached their threshold, of one warp: kept in shared memory until there are many. What says where in its
// query's buffer a score belongs is a counter in device memory, whose answer a warp would await for each of them.
template <int held>
struct Hits {
  static constexpr size_t bytes = size_t(held) * 12;  // of shared memory
  float* score;                                       // in units of the packed query
  uint32_t *row, *query;                              // counted from the chunk's first row
  uint32_t count = 0;                                 // the same in all lanes

  __device__ explicit Hits(unsigned char* memory)
      : score(reinterpret_cast<float*>(memory)), row(reinterpret_cast<uint32_t*>(score + held)), query(row + held) {}

  // By the whole warp, as all that follows.
  __device__ void flush(const Batch& batch, const Slab& slab, const Chunk& chunk) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t slot[held / 32];
    __syncwarp();
#pragma unroll
    for (uint32_t i = 0; i < held / 32; ++i)
      if (i * 32 + lane < count) slot[i] = atomicAdd(&batch.selected[query[i * 32 + lane]].fill, 1u);
#pragma unroll
    for (uint32_t i = 0; i < held / 32; ++i) {
      const uint32_t at = i * 32 + lane;
      if (at >= count || slot[i] >= batch.capacity) continue;
      const int64_t q = query[at];
      batch.buffer[q * batch.capacity + slot[i]] = key_of(score[at] * batch.query[q].unit, slab.first_row + chunk.begin + row[at]);
    }
    __syncwarp();
    count = 0;
  }

  // reached: this lane has a score, of query q and a row of the slab.
  __device__ __forceinline__ void add(const Batch& batch, const Slab& slab, const Chunk& chunk, bool reached, float value, int q, int64_t at) {
    reached = reached && at >= chunk.begin && at < chunk.end;
    if (chunk.unsafe && reached) reached = safe(slab.stripes[at / stripe_rows], batch.query[q]);
    if (chunk.direct) {
      if (reached) batch.buffer[q * batch.capacity + (at - chunk.begin)] = key_of(value * batch.query[q].unit, slab.first_row + at);
      return;
    }
    const uint32_t all = __ballot_sync(0xffffffffu, reached), more = uint32_t(__popc(all));
    if (count + more > held) flush(batch, slab, chunk);
    if (reached) {
      const uint32_t to = count + uint32_t(__popc(all & ((1u << threadIdx.x % 32) - 1)));
      score[to] = value;
      row[to] = uint32_t(at - chunk.begin);
      query[to] = uint32_t(q);
    }
    count += more;
  }
};

// Of a query's upper and lower eight bits.
__device__ __forceinline__ float both_planes(int32_t upper, int32_t lower) { return fmaf(float(upper), 256.0f, float(lower)); }

// sums: [count] of one query and rows first + column(i), of one stripe.
//
// Nearly all tiles end at the first test. What comes after it is kept short, once for sixteen values: written out for
// each of them it was 170 KB of instructions, which a tile with a single hit had to fetch.
template <int count, int held, class Sums, class Column>
__device__ __forceinline__ void sift(Hits<held>& hits, const Batch& batch, const Slab& slab, const Chunk& chunk, const Sought& sought, int q,
                                     int64_t first, const Sums& sums, const Column& column) {
  constexpr int together = 16;
  typedef decltype(sums(0)) Sum;
  const float threshold = sought.threshold;
  static_assert(count % together == 0, "");
  const bool shifted = batch.offset != nullptr || batch.center != nullptr;
  const float offset = shifted ? batch.query[q].offset : 0.0f;
  const bool scaled = slab.scale != nullptr;
  const auto scale_of = [&](int64_t row) { return row < slab.count ? slab.scale[row] : 0.0f; };
  const auto score_of_sum = [&](Sum sum) { return fmaf(float(sum), sought.step, offset); };  // a larger sum has no smaller one
  Sum best[count / together];
  if (!scaled) {
    Sum most = 0;
#pragma unroll
    for (int from = 0; from < count; from += together) {  // in turns, or each maximum would wait for the one before
#pragma unroll
      for (int i = 0; i < together; ++i) best[from / together] = i == 0 ? sums(from) : larger(best[from / together], sums(from + i));
      most = from == 0 ? best[0] : larger(most, best[from / together]);
    }
    if (!__any_sync(0xffffffffu, score_of_sum(most) >= threshold)) return;
  }
#pragma unroll
  for (int from = 0; from < count; from += together) {
    if (!scaled && !__any_sync(0xffffffffu, score_of_sum(best[from / together]) >= threshold)) continue;
    uint32_t left = 0;
#pragma unroll
    for (int i = 0; i < together; ++i) {
      float score = score_of_sum(sums(from + i));
      if (scaled) score *= scale_of(first + column(from + i));
      left |= score >= threshold ? 1u << i : 0;
    }
#pragma unroll 1
    while (__any_sync(0xffffffffu, left != 0)) {
      const int at = left != 0 ? __ffs(int(left)) - 1 : 0;
      Sum sum = 0;
#pragma unroll
      for (int i = 0; i < together; ++i) sum = i == at ? sums(from + i) : sum;
      float score = score_of_sum(sum);
      const int64_t row = first + column(from + at);
      if (scaled) score *= scale_of(row);
      hits.add(batch, slab, chunk, left != 0, score, q, row);
      left &= left - 1;
    }
  }
}

}  // namespace attribution::cuda
