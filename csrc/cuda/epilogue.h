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

// A fast score that reached the threshold.
__device__ __forceinline__ void hit(const Batch& batch, const Slab& slab, const Chunk& chunk, const Query* own, int q, int64_t row,
                                    float value) {
  if (row < chunk.begin || row >= chunk.end) return;
  if (chunk.unsafe && !safe(slab.stripes[row / stripe_rows], *own)) return;
  const float score = value * own->unit;
  if (chunk.direct) batch.buffer[q * batch.capacity + (row - chunk.begin)] = key_of(score, slab.first_row + row);
  else emit(batch, q, score, slab.first_row + row);
}

// values: [count] of one query, at rows first + column(i).
//
// Nearly all tiles end at the first test. What comes after it is kept short, with one hit() for sixteen values: written
// out for each of them it was 170 KB of instructions, which a tile with a single hit had to fetch.
template <int count, class Value, class Column>
__device__ __forceinline__ void sift(const Batch& batch, const Slab& slab, const Chunk& chunk, const Query* own, float threshold, int q,
                                     int64_t first, const Value& value, const Column& column) {
  constexpr int strands = 4, together = 16;
  static_assert(count % together == 0, "");
  const float offset = batch.offset != nullptr ? own->offset : 0.0f;
  const auto scale_of = [&](int64_t row) { return row < slab.count ? slab.scale[row] : 0.0f; };
  uint32_t hits[count / together] = {};
  if (slab.scale == nullptr) {
    float best[strands];  // or each maximum would wait for the one before
#pragma unroll
    for (int i = 0; i < count; ++i) best[i % strands] = i < strands ? value(i) : fmaxf(best[i % strands], value(i));
    if (!(fmaxf(fmaxf(best[0], best[1]), fmaxf(best[2], best[3])) + offset >= threshold)) return;
#pragma unroll
    for (int i = 0; i < count; ++i) hits[i / together] |= value(i) + offset >= threshold ? 1u << i % together : 0;
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i)
      hits[i / together] |= (value(i) + offset) * scale_of(first + column(i)) >= threshold ? 1u << i % together : 0;
  }
#pragma unroll
  for (int from = 0; from < count; from += together) {
    uint32_t left = hits[from / together];
#pragma unroll 1
    while (left != 0) {
      const int at = __ffs(int(left)) - 1;
      left &= left - 1;
      float score = 0;
#pragma unroll
      for (int i = 0; i < together; ++i) score = i == at ? value(from + i) : score;
      score += offset;
      const int64_t row = first + column(from + at);
      if (slab.scale != nullptr) score *= scale_of(row);
      hit(batch, slab, chunk, own, q, row, score);
    }
  }
}

}  // namespace attribution::cuda
