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

// A fast score that reached the threshold. column: row - first row of the tile
__device__ __forceinline__ void hit(const Batch& batch, const Slab& slab, const Chunk& chunk, const Query* own, int q, int64_t row,
                                    float value) {
  if (row < chunk.begin || row >= chunk.end) return;
  if (chunk.unsafe && !safe(slab.stripes[row / stripe_rows], *own)) return;
  const float score = value * own->unit;
  if (chunk.direct) batch.buffer[q * batch.capacity + (row - chunk.begin)] = key_of(score, slab.first_row + row);
  else emit(batch, q, score, slab.first_row + row);
}

// values: [count] of one query, at rows first + column(i).
template <int count, class Value, class Column>
__device__ __forceinline__ void sift(const Batch& batch, const Slab& slab, const Chunk& chunk, const Query* own, float threshold, int q,
                                     int64_t first, const Value& value, const Column& column) {
  const float offset = batch.offset != nullptr ? own->offset : 0.0f;
  if (slab.scale == nullptr) {
    float best = value(0);
#pragma unroll
    for (int i = 1; i < count; ++i) best = fmaxf(best, value(i));
    if (!(best + offset >= threshold)) return;
  }
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const int64_t row = first + column(i);
    float score = value(i) + offset;
    if (slab.scale != nullptr) score *= row < slab.count ? slab.scale[row] : 0.0f;
    if (score >= threshold) hit(batch, slab, chunk, own, q, row, score);
  }
}

}  // namespace attribution::cuda
