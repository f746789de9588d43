// What happens to the scores of a tile while they are in registers: nearly always nothing.
#pragma once
#include "exact.h"

namespace attribution::cuda {

// The largest norm and scale among the stripes of rows [first, first + height) that are safe for the query: what its
// threshold must allow for.
template <int height>
__device__ __forceinline__ Stripe bound_of(const Slab& slab, const Query& query, int64_t first) {
  Stripe bound{0, 0};
  const int64_t stripes = (slab.count + stripe_rows - 1) / stripe_rows;
#pragma unroll
  for (int i = 0; i < (height + stripe_rows - 1) / stripe_rows; ++i) {
    const int64_t index = first / stripe_rows + i;
    if (index >= stripes) break;
    const Stripe stripe = slab.stripes[index];
    if (!safe(stripe, query)) continue;
    bound.norm = fmaxf(bound.norm, stripe.norm);
    bound.scale = fmaxf(bound.scale, stripe.scale);
  }
  return bound;
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

// values: [count] of one query, at rows first + column(i).
//
// Nearly all tiles end at the first test. What comes after it is kept short, once for sixteen values: written out for
// each of them it was 170 KB of instructions, which a tile with a single hit had to fetch.
template <int count, int held, class Value, class Column>
__device__ __forceinline__ void sift(Hits<held>& hits, const Batch& batch, const Slab& slab, const Chunk& chunk, float threshold, int q,
                                     int64_t first, const Value& value, const Column& column) {
  constexpr int together = 16;
  static_assert(count % together == 0, "");
  const float offset = batch.offset != nullptr ? batch.query[q].offset : 0.0f;
  const bool scaled = slab.scale != nullptr;
  const auto scale_of = [&](int64_t row) { return row < slab.count ? slab.scale[row] : 0.0f; };
  float best[count / together];
  if (!scaled) {
    float most = 0;
#pragma unroll
    for (int from = 0; from < count; from += together) {  // in turns, or each maximum would wait for the one before
#pragma unroll
      for (int i = 0; i < together; ++i) best[from / together] = i == 0 ? value(from) : fmaxf(best[from / together], value(from + i));
      most = from == 0 ? best[0] : fmaxf(most, best[from / together]);
    }
    if (!__any_sync(0xffffffffu, most + offset >= threshold)) return;
  }
#pragma unroll
  for (int from = 0; from < count; from += together) {
    if (!scaled && !__any_sync(0xffffffffu, best[from / together] + offset >= threshold)) continue;
    uint32_t left = 0;
#pragma unroll
    for (int i = 0; i < together; ++i) {
      float score = value(from + i) + offset;
      if (scaled) score *= scale_of(first + column(from + i));
      left |= score >= threshold ? 1u << i : 0;
    }
#pragma unroll 1
    while (__any_sync(0xffffffffu, left != 0)) {
      const int at = left != 0 ? __ffs(int(left)) - 1 : 0;
      float score = 0;
#pragma unroll
      for (int i = 0; i < together; ++i) score = i == at ? value(from + i) : score;
      score += offset;
      const int64_t row = first + column(from + at);
      if (scaled) score *= scale_of(row);
      hits.add(batch, slab, chunk, left != 0, score, q, row);
      left &= left - 1;
    }
  }
}

}  // namespace attribution::cuda
