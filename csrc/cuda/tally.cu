// Canonical scores of many rows and queries at once, where the filter has nothing to save: sums over everything.
#include "exact.h"
#include "exponential.h"

namespace attribution::cuda {
namespace {

constexpr int threads = 256;
constexpr int rows_each = 4, queries_each = 4;  // dots that a group of eight threads has under way
constexpr int row_groups = 16, query_groups = 2;
constexpr int tile_rows = rows_each * row_groups, tile_queries = queries_each * query_groups;
static_assert(row_groups * query_groups * 8 == threads && stripe_rows % tile_rows == 0, "");
static_assert(rows_each == 4 && queries_each == 4, "two sums for each of eight threads");

constexpr int softmax_bins = 4, limbs = 3, softmax_words = softmax_bins * limbs + 1, mass_words = 3;

__device__ int words_of(Tally tally, const Tallied& to) {
  return tally == Tally::mass ? mass_words : tally == Tally::softmax ? softmax_words : tally == Tally::count ? to.threshold_count : 0;
}

// sums: this query's, in shared memory
__device__ void tally_one(Tally tally, const Tallied& to, int q, float score, unsigned long long* sums) {
  if (tally == Tally::mass) {
    const double weight = thresholded<double, uint64_t>(to.inv_tau * (double(score) - double(to.best[q])), to.b);
    if (!(weight > 0)) return;
    const unsigned long long quantized = (unsigned long long)(long long)(weight * 0x1p62 + 0.5);
    atomicAdd(&sums[0], quantized & 0xffffffffu);
    atomicAdd(&sums[1], quantized >> 32);
    atomicAdd(&sums[2], 1ull);
  } else if (tally == Tally::softmax) {
    const double x = double(score) * to.inv_tau;
    if (x > 0x1p20 || x < -0x1p20) {
      sums[softmax_words - 1] = 1;
      return;
    }
    double shifted;
    const double fraction = exponential<double>(x, &shifted);
    long long exponent;
    memcpy(&exponent, &shifted, sizeof exponent);
    exponent -= 0x4338000000000000ll;
    const long long bin = to.top[q] - (exponent >> 5);
    if (bin >= softmax_bins) return;
    const unsigned long long mantissa = (unsigned long long)(fraction * 0x1p52);
    const int by = int(exponent & 31);
    // mantissa << by, of at most 85 bits, in limbs of 32
    const unsigned long long low = (mantissa & 0xffffffffu) << by, high = (mantissa >> 32) << by;
    atomicAdd(&sums[bin * limbs], low & 0xffffffffu);
    atomicAdd(&sums[bin * limbs + 1], (low >> 32) + (high & 0xffffffffu));
    atomicAdd(&sums[bin * limbs + 2], high >> 32);
  } else {
    for (int t = 0; t < to.threshold_count; ++t) {
      const double threshold = to.thresholds[int64_t(q) * to.threshold_count + t];
      if (to.or_equal ? double(score) >= threshold : double(score) > threshold) atomicAdd(&sums[t], 1ull);
    }
  }
}

template <int storage>
__global__ void __launch_bounds__(threads, 2) tally_kernel(Batch batch, Slab slab, int64_t begin, int64_t end, Tally tally, Tallied to, bool direct) {
  unsigned long long* sums = reinterpret_cast<unsigned long long*>(shared_memory());  // [tile_queries][words]
  const int j = threadIdx.x % 8, group = threadIdx.x / 8;
  const int query_tiles = (batch.queries + tile_queries - 1) / tile_queries, words = words_of(tally, to);
  const int first_query = int(blockIdx.x) % query_tiles * tile_queries;
  const int64_t step = gridDim.x / query_tiles;
  for (int i = threadIdx.x; i < tile_queries * words; i += threads) sums[i] = 0;
  __syncthreads();

  const int own_query = first_query + group / row_groups * queries_each;
  const float* queries[queries_each];
  for (int c = 0; c < queries_each; ++c) {
    const int q = own_query + c < batch.queries ? own_query + c : batch.queries - 1;
    queries[c] = batch.values + int64_t(q) * batch.dim;
  }
  for (int64_t tile = begin / tile_rows + blockIdx.x / query_tiles; tile * tile_rows < end; tile += step) {
    const Stripe stripe = slab.stripes[tile * tile_rows / stripe_rows];
    if (tally == Tally::emit_unsafe) {
      bool any = false;
      for (int q = first_query; q < first_query + tile_queries && q < batch.queries; ++q) any |= !safe(stripe, batch.query[q]);
      if (!any) continue;
    }
    const int64_t first_row = tile * tile_rows + group % row_groups * rows_each;
    const unsigned char* rows[rows_each];
    for (int r = 0; r < rows_each; ++r) {
      const int64_t row = first_row + r < slab.count ? first_row + r : slab.count - 1;
      rows[r] = slab.rows + row * slab.stride;
    }
    double dots[rows_each][queries_each] = {};
#pragma unroll 2
    for (int d = j; d < batch.dim; d += 8) {
      double x[rows_each];
#pragma unroll
      for (int r = 0; r < rows_each; ++r) x[r] = value_at(rows[r], storage, d);
#pragma unroll
      for (int c = 0; c < queries_each; ++c) {
        const double value = double(queries[c][d]);
#pragma unroll
        for (int r = 0; r < rows_each; ++r) dots[r][c] = fma(value, x[r], dots[r][c]);
      }
    }
    // Each thread gets two of the sixteen sums: written out for all of them, what follows takes a minute to compile.
    double own[2] = {};
#pragma unroll
    for (int r = 0; r < rows_each; ++r)
#pragma unroll
      for (int c = 0; c < queries_each; ++c) {
        const double dot = tree(dots[r][c]);
        if (j == r % 2 * queries_each + c) own[r / 2] = dot;
      }
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const int64_t row = first_row + i * 2 + j / queries_each;
      const int q = own_query + j % queries_each;
      if (row < begin || row >= end || q >= batch.queries) continue;
      const float score = canonical_score(i == 0 ? own[0] : own[1], batch.offset != nullptr ? batch.offset + q : nullptr,
                                          slab.scale != nullptr ? slab.scale + row : nullptr);
      if (!finite(score)) {
        note_fault(batch, slab.first_row + row, q);
        if (tally == Tally::emit_unsafe && direct)  // no slot may stay unwritten
          batch.buffer[q * batch.capacity + (row - begin)] = key_of(-ATTRIBUTION_INFINITY, slab.first_row + row);
      } else if (tally != Tally::emit_unsafe) {
        tally_one(tally, to, q, score, sums + (q - first_query) * words);
      } else if (!safe(stripe, batch.query[q]) && batch.selected[q].status == fine) {
        if (direct) batch.buffer[q * batch.capacity + (row - begin)] = key_of(score, slab.first_row + row);
        else if (score >= batch.selected[q].cut) emit(batch, q, score, slab.first_row + row);
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tile_queries * words; i += threads)
    if (first_query + i / words < batch.queries && sums[i] != 0) atomicAdd(&to.sums[int64_t(first_query) * words + i], sums[i]);
}

}  // namespace

void tally_rows(const Batch& batch, const Slab& slab, int64_t begin, int64_t end, Tally tally, const Tallied& tallied, bool direct,
                int processors, cudaStream_t stream) {
  if (batch.queries == 0 || begin >= end) return;
  const int64_t query_tiles = (batch.queries + tile_queries - 1) / tile_queries;
  const int64_t row_tiles = (end + tile_rows - 1) / tile_rows - begin / tile_rows;
  const int64_t wanted = (int64_t(processors) * 8 + query_tiles - 1) / query_tiles;
  const int words = tally == Tally::mass ? mass_words : tally == Tally::softmax ? softmax_words : tallied.threshold_count;
  const auto kernel = batch.storage == int(Storage::float32)   ? tally_kernel<int(Storage::float32)>
                      : batch.storage == int(Storage::float16) ? tally_kernel<int(Storage::float16)>
                                                               : tally_kernel<int(Storage::bfloat16)>;
  launch("tally", kernel, query_tiles * (wanted < row_tiles ? wanted : row_tiles), threads,
         tally == Tally::emit_unsafe ? 0 : size_t(tile_queries) * size_t(words) * 8, stream, 1, batch, slab, begin, end, tally, tallied, direct);
}

}  // namespace attribution::cuda
