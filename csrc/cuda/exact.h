// Device code for what contract.h defines: canonical scores, error bounds, the order of candidates.
#pragma once
#include "device.h"

#ifdef ATTRIBUTION_EMULATED
#define ATTRIBUTION_INFINITY INFINITY
#else
#define ATTRIBUTION_INFINITY __int_as_float(0x7f800000)
#endif

namespace attribution::cuda {

// Floats in the order of unsigned integers, and back.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float unordered(uint32_t bits) {
  return __uint_as_float(bits ^ (bits >> 31 ? 0x80000000u : 0xffffffffu));
}
__device__ __forceinline__ Key key_of(float score, int64_t row) {
  return (Key(ordered(score)) << 32) | (0xffffffffu - uint32_t(row));
}
__device__ __forceinline__ float score_of(Key key) { return unordered(uint32_t(key >> 32)); }
__device__ __forceinline__ int64_t row_of(Key key) { return int64_t(0xffffffffu - uint32_t(key)); }

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return a > b ? a : b; }
__device__ __forceinline__ int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// Of all lanes, in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int by = 16; by > 0; by /= 2) value += __shfl_xor_sync(0xffffffffu, value, by);
  return value;
}
template <class T>
__device__ __forceinline__ T warp_max(T value) {
  for (int by = 16; by > 0; by /= 2) value = larger(value, __shfl_xor_sync(0xffffffffu, value, by));
  return value;
}

// Would arithmetic in float32 be safe for this query and these rows?
__device__ __forceinline__ bool safe(const Stripe& stripe, const Query& query) {
  const float reach = stripe.norm * stripe.scale;  // NaN compares false
  return reach < 0x1p60f && stripe.norm < 0x1p60f && stripe.scale < 0x1p60f && reach * query.size < 0x1p100f &&
         stripe.norm * query.size < 0x1p100f && stripe.scale * query.shift_of_score < 0x1p100f;
}

// In the units of the packed query.
__device__ __forceinline__ float error_of(const Stripe& stripe, const Query& query) {
  return fmaf(fmaf(query.a, stripe.norm, query.size_packed * stripe.residual), stripe.scale, fmaf(query.b, stripe.scale, query.c));
}

// What a fast score of this stripe must reach. Rounded down: the cut has been lowered by more than these roundings.
__device__ __forceinline__ float threshold_of(const Stripe& stripe, const Query& query) { return query.cut - error_of(stripe, query); }

__device__ __forceinline__ const Slab& slab_of(const Batch& batch, int64_t row) {
  int low = 0;
  for (int high = batch.slab_count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (batch.slabs[middle].first_row <= row ? low : high) = middle;
  }
  return batch.slabs[low];
}

__device__ __forceinline__ double value_at(const unsigned char* row, int storage, int d) {
  if (storage == int(Storage::float32)) return double(reinterpret_cast<const float*>(row)[d]);
  const uint16_t bits = reinterpret_cast<const uint16_t*>(row)[d];
  if (storage == int(Storage::float16)) return double(half_bits_to_float(bits));
  return double(__uint_as_float(uint32_t(bits) << 16));
}

// ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)), by eight neighbouring threads; an addition's operands may swap.
__device__ __forceinline__ double tree(double lane) {
  lane += __shfl_xor_sync(0xffffffffu, lane, 4);
  lane += __shfl_xor_sync(0xffffffffu, lane, 2);
  return lane + __shfl_xor_sync(0xffffffffu, lane, 1);
}

// By eight neighbouring threads, all of which get it; the whole warp must come here. j: threadIdx.x % 8. query: of float, or of
// double, to which it is converted otherwise, and slowly.
template <class Value>
__device__ __forceinline__ double canonical_dot(const unsigned char* row, int storage, const Value* query, int dim, int j) {
  double sum = 0;
#pragma unroll 16  // loads under way: one block scores few rows at a time, and would wait for each in turn
  for (int d = j; d < dim; d += 8) sum = fma(double(query[d]), value_at(row, storage, d), sum);
  return tree(sum);
}

__device__ __forceinline__ float canonical_score(double dot, const float* offset, const float* scale) {
  if (offset != nullptr) dot = dot + double(*offset);
  if (scale != nullptr) dot = dot * double(*scale);
  return float(dot) + 0.0f;
}

__device__ __forceinline__ bool finite(float score) { return fabsf(score) < ATTRIBUTION_INFINITY; }

__device__ __forceinline__ void note_fault(const Batch& batch, int64_t row, int query) {
  atomicMin(batch.fault, (Key(row) << 32) | Key(uint32_t(query)));
}

// A fast or canonical score of the chunk that is being walked.
__device__ __forceinline__ void emit(const Batch& batch, int query, float score, int64_t row) {
  const uint32_t slot = atomicAdd(&batch.selected[query].fill, 1u);
  if (slot < batch.capacity) batch.buffer[query * batch.capacity + slot] = key_of(score, row);
}

}  // namespace attribution::cuda
