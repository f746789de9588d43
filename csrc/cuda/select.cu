// The candidates of one query, by one block: dropping the hopeless, canonical scores, order, influence.
#include "exact.h"
#include "exponential.h"

namespace attribution::cuda {
namespace {

constexpr int threads = 512;
constexpr int warps = threads / 32;
constexpr int sorted_in_shared = 4096;

struct Shared {
  Key largest[warps], smallest[warps];
  uint32_t counts[warps];
  uint32_t histogram[256];
  uint32_t digit, above;
  unsigned long long low, high;
  uint32_t positive, shown_positive;
  unsigned long long shown_low, shown_high;
};

__device__ Shared& shared() { return *reinterpret_cast<Shared*>(shared_memory()); }

// How many threads before this one hold, and how many of all.
__device__ uint32_t rank_among(bool holds, uint32_t* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t bits = __ballot_sync(0xffffffffu, holds);
  if (lane == 0) shared().counts[warp] = uint32_t(__popc(bits));
  __syncthreads();
  uint32_t before = 0, all = 0;
  for (int w = 0; w < warps; ++w) {
    before += w < warp ? shared().counts[w] : 0;
    all += shared().counts[w];
  }
  __syncthreads();
  *total = all;
  return before + uint32_t(__popc(bits & ((1u << lane) - 1)));
}

template <class Of>
__device__ void extremes(uint32_t count, const Of& of, Key* largest, Key* smallest) {
  Key most = 0, least = ~Key(0);
  for (uint32_t i = threadIdx.x; i < count; i += threads) {
    const Key key = of(i);
    most = key > most ? key : most;
    least = key < least ? key : least;
  }
  for (int by = 16; by > 0; by /= 2) {
    const Key other = __shfl_xor_sync(0xffffffffu, most, by), lower = __shfl_xor_sync(0xffffffffu, least, by);
    most = other > most ? other : most;
    least = lower < least ? lower : least;
  }
  if (threadIdx.x % 32 == 0) {
    shared().largest[threadIdx.x / 32] = most;
    shared().smallest[threadIdx.x / 32] = least;
  }
  __syncthreads();
  for (int w = 0; w < warps; ++w) {
    most = shared().largest[w] > most ? shared().largest[w] : most;
    least = shared().smallest[w] < least ? shared().smallest[w] : least;
  }
  __syncthreads();
  *largest = most;
  *smallest = least;
}

// The k-th largest of count >= k >= 1 values, which lie within [smallest, largest]: eight bits at a time from the
// highest that differs.
template <class Of>
__device__ Key kth_largest(uint32_t count, int64_t k, const Of& of, Key largest, Key smallest) {
  if (largest == smallest) return largest;
  int high = 64 - __clzll((long long)(largest ^ smallest));
  Key prefix = high < 64 ? largest >> high : 0;
  uint32_t wanted = uint32_t(k);
  while (high > 0) {
    const int low = high > 8 ? high - 8 : 0;
    for (int bin = threadIdx.x; bin < 256; bin += threads) shared().histogram[bin] = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < count; i += threads) {
      const Key key = of(i);
      if ((high < 64 ? key >> high : 0) == prefix) atomicAdd(&shared().histogram[(key >> low) & ((1u << (high - low)) - 1)], 1u);
    }
    __syncthreads();
    // Thread t: how many lie in bins 255 - t and above.
    const int t = threadIdx.x;
    const uint32_t own = t < 256 ? shared().histogram[255 - t] : 0;
    uint32_t sum = own;
    for (int by = 1; by < 32; by *= 2) {
      const uint32_t other = __shfl_up_sync(0xffffffffu, sum, by);
      if (t % 32 >= by) sum += other;
    }
    if (t % 32 == 31) shared().counts[t / 32] = sum;
    __syncthreads();
    for (int w = 0; w < t / 32; ++w) sum += shared().counts[w];
    if (t < 256 && sum >= wanted && sum - own < wanted) {
      shared().digit = uint32_t(255 - t);
      shared().above = sum - own;
    }
    __syncthreads();
    prefix = (prefix << (high - low)) | shared().digit;
    wanted -= shared().above;
    high = low;
    __syncthreads();
  }
  return prefix;
}

// Keeps the items that `wanted` says, in their order. exact: how many of the first ones are exact.
template <class Wanted>
__device__ void compact(Key* items, uint32_t& count, uint32_t& exact, const Wanted& wanted) {
  uint32_t kept = 0, kept_exact = 0, total;
  for (uint32_t first = 0; first < count; first += threads) {
    const uint32_t i = first + threadIdx.x;
    const Key key = i < count ? items[i] : 0;
    const bool keep = i < count && wanted(i, key);
    if (first < exact) {
      rank_among(keep && i < exact, &total);
      kept_exact += total;
    }
    const uint32_t before = rank_among(keep, &total);  // everybody has read before anybody writes
    if (keep) items[kept + before] = key;
    kept += total;
  }
  __syncthreads();
  count = kept;
  exact = kept_exact;
}

__device__ const Stripe& stripe_of(const Slab& slab, int64_t row) { return slab.stripes[(row - slab.first_row) / stripe_rows]; }

// In units of a score.
__device__ float error_of_item(const Batch& batch, const Query& query, int64_t row) {
  const Stripe stripe = stripe_of(slab_of(batch, row), row);
  return safe(stripe, query) ? error_of(stripe, query) * query.unit : 0.0f;  // the unsafe come with canonical scores
}

__device__ float lowest(const Weighing& weighing, float best) {
  const double score = double(best) + weighing.depth;
  return float(score - (fabs(score) + fabs(double(best))) * 0x1p-22 - 0x1p-149);
}

__device__ double weight(const Weighing& weighing, float score, float best) {
  return thresholded<double, uint64_t>(weighing.inv_tau * (double(score) - double(best)), weighing.b);
}

// Of items [exact, count) those that are `wanted` come first; how many they are. swaps: room for as many words.
template <class Wanted>
__device__ uint32_t bring_forward(Key* items, uint32_t exact, uint32_t count, uint32_t* swaps, const Wanted& wanted) {
  uint32_t chosen = 0, total;
  for (uint32_t first = exact; first < count; first += threads) {
    const uint32_t i = first + threadIdx.x;
    rank_among(i < count && wanted(items[i]), &total);
    chosen += total;
  }
  // The n-th that is behind its place, for the n-th that holds a place and is not wanted.
  uint32_t behind = 0, holding = 0;
  uint32_t *from = swaps, *to = swaps + (count - exact) / 2;  // no more are behind than hold a place
  for (uint32_t first = exact; first < count; first += threads) {
    const uint32_t i = first + threadIdx.x;
    const bool is = i < count && wanted(items[i]), front = i < exact + chosen;
    const uint32_t at = rank_among(is && !front, &total);
    if (is && !front) from[behind + at] = i;
    behind += total;
    const uint32_t place = rank_among(i < count && !is && front, &total);
    if (i < count && !is && front) to[holding + place] = i;
    holding += total;
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < behind; i += threads) {
    const Key key = items[from[i]];
    items[from[i]] = items[to[i]];
    items[to[i]] = key;
  }
  __syncthreads();
  return chosen;
}

// Eight threads an item. Scores that are not finite are noted and stay as they are.
__device__ void rescore(const Batch& batch, int q, Key* items, uint32_t begin, uint32_t end) {
  const int j = threadIdx.x % 8;
  for (uint32_t first = begin; first < end; first += threads / 8) {
    const uint32_t i = first + threadIdx.x / 8, at = i < end ? i : end - 1;
    const int64_t row = row_of(items[at]);
    const Slab& slab = slab_of(batch, row);
    const int64_t local = row - slab.first_row;
    const double dot = canonical_dot(slab.rows + local * slab.stride, batch.storage, batch.values + int64_t(q) * batch.dim, batch.dim, j);
    const float score = canonical_score(dot, batch.offset != nullptr ? batch.offset + q : nullptr,
                                        slab.scale != nullptr ? slab.scale + local : nullptr);
    __syncwarp();  // all eight have read the item
    if (j != 0 || i >= end) continue;
    if (finite(score)) items[i] = key_of(score, row);
    else note_fault(batch, row, q);
  }
  __syncthreads();
}

constexpr int scored_together = 32;       // candidates, eight threads each
constexpr int64_t most_staged = 99 << 10;  // bytes of shared memory, as sm_86 has them

// Canonical scores of the candidates that are pending, by `blocks` blocks for each query. Rows come to shared memory
// whole, in pieces of 16 bytes and all at once: read where they lie, in the order of a canonical score, each would be
// waited for many times. The query is there before them, in double. pitch: bytes from row to row there, or 0: nothing is.
__global__ void __launch_bounds__(scored_together * 8) score_pending_kernel(Batch batch, int blocks, int pitch) {
  const int q = int(blockIdx.x) / blocks, j = threadIdx.x % 8;
  const Selected& mine = batch.selected[q];
  if (mine.status != fine) return;
  Key* items = batch.buffer + int64_t(q) * batch.capacity;
  const uint32_t end = mine.exact + mine.pending;
  const float* query = batch.values + int64_t(q) * batch.dim;
  double* wide_query = reinterpret_cast<double*>(shared_memory());
  unsigned char* staged = shared_memory() + (batch.dim + 1) / 2 * 2 * sizeof(double) + int(threadIdx.x) / 8 * pitch;
  if (pitch > 0) {
    for (int d = threadIdx.x; d < batch.dim; d += scored_together * 8) wide_query[d] = double(query[d]);
    __syncthreads();
  }
  for (uint32_t first = mine.exact + uint32_t(int(blockIdx.x) % blocks * scored_together); first < end; first += uint32_t(blocks * scored_together)) {
    const uint32_t i = first + threadIdx.x / 8, at = i < end ? i : end - 1;
    const int64_t row = row_of(items[at]);
    const Slab& slab = slab_of(batch, row);
    const int64_t local = row - slab.first_row;
    const unsigned char* values = slab.rows + local * slab.stride;
    const bool whole = pitch > 0 && slab.stride % 16 == 0 && reinterpret_cast<uintptr_t>(slab.rows) % 16 == 0;
    if (whole) {
      const int row_bytes = batch.dim * (batch.storage == int(Storage::float32) ? 4 : 2), pieces = (row_bytes + 15) / 16;
      const int last = row_bytes - (pieces - 1) * 16;
#pragma unroll 12
      for (int piece = j; piece < pieces; piece += 8) {
        if (piece == pieces - 1 && last < 16) {  // what is behind a row is not ours to read
          for (int byte = 0; byte < last; byte += 2)
            *reinterpret_cast<uint16_t*>(staged + piece * 16 + byte) = *reinterpret_cast<const uint16_t*>(values + piece * 16 + byte);
        } else {
          *reinterpret_cast<uint4*>(staged + piece * 16) = *reinterpret_cast<const uint4*>(values + piece * 16);
        }
      }
    }
    __syncwarp();
    const double dot = pitch > 0 ? canonical_dot(whole ? staged : values, batch.storage, wide_query, batch.dim, j)
                                 : canonical_dot(values, batch.storage, query, batch.dim, j);
    const float score = canonical_score(dot, batch.offset != nullptr ? batch.offset + q : nullptr,
                                        slab.scale != nullptr ? slab.scale + local : nullptr);
    __syncwarp();  // all eight have read the item, and the row
    if (j != 0 || i >= end) continue;
    if (finite(score)) items[i] = key_of(score, row);
    else note_fault(batch, row, q);
  }
}

// The cut in units of the packed query, lowered so that threshold_of may round as it likes.
__device__ float scaled_cut(float cut, const Query& query) {
  const double scaled = double(cut) / double(query.unit);
  return fabsf(cut) < ATTRIBUTION_INFINITY ? float(scaled - fabs(scaled) * 0x1p-21) : cut;
}

// Settling in one launch; or in three, between which score_pending_kernel has many blocks score candidates of one query.
enum class Settling : int {
  whole,
  choose,   // codes miss much of a score: the k that seem best are scored first, so that what they reach has no error
  drop,     // what is hopeless, and ask for the scores of the others where they are needed
  conclude  // the best k and the window
};

__global__ void __launch_bounds__(threads) settle_kernel(Batch batch, int64_t k, Weighing weighing, bool exactly, int64_t direct, Settling step) {
  const int q = blockIdx.x;
  Selected mine = batch.selected[q];
  if (direct > 0) mine.fill = uint32_t(direct);
  const Query query = batch.query[q];
  __syncthreads();
  if (mine.status != fine) return;
  if (mine.fill > batch.capacity) {  // the chunk has to be walked again
    if (threadIdx.x == 0) {
      batch.selected[q].status = overflowed;
      batch.selected[q].fill = mine.before;
      batch.query[q].cut = ATTRIBUTION_INFINITY;
    }
    return;
  }
  Key* items = batch.buffer + int64_t(q) * batch.capacity;
  uint32_t* certain = batch.scratch + int64_t(q) * batch.capacity;
  uint32_t count = mine.fill, exact = mine.exact + mine.pending;
  mine.pending = 0;
  const bool thresholds = weighing.b < 0;
  Key largest, smallest;

  if (step == Settling::choose) {
    if (int64_t(count) > k) {
      const auto of = [&](uint32_t i) { return items[i]; };
      extremes(count, of, &largest, &smallest);
      const Key kth = kth_largest(count, k, of, largest, smallest);
      mine.pending = bring_forward(items, exact, count, certain, [&](Key key) { return key >= kth; });
    }
    mine.exact = exact;
    if (threadIdx.x == 0) batch.selected[q] = mine;
    return;
  }

  // What k items certainly reach. An item that certainly is below goes, without its canonical score.
  if (step != Settling::conclude && int64_t(count) > k) {
#pragma unroll 4  // each waits for three loads in turn
    for (uint32_t i = threadIdx.x; i < count; i += threads) {
      const float error = i < exact ? 0.0f : error_of_item(batch, query, row_of(items[i]));
      certain[i] = ordered(score_of(items[i]) - error);
    }
    __syncthreads();
    const auto of = [&](uint32_t i) { return Key(certain[i]); };
    extremes(count, of, &largest, &smallest);
    float floor = unordered(uint32_t(kth_largest(count, k, of, largest, smallest)));
    if (thresholds && !mine.wide) floor = fminf(floor, lowest(weighing, unordered(uint32_t(largest))));
    mine.cut = floor;
    compact(items, count, exact, [&](uint32_t i, Key key) {
      // As far above the score as `certain` is below it, and what the two roundings may have taken from that.
      const float score = score_of(key), error = score - unordered(certain[i]);
      return score + (error + (fabsf(score) + error) * 0x1p-22f) >= floor;
    });
  }

  // Usually the doubtful ones are few, and most of what is here now will have gone by the end: re-score later.
  int64_t most = k + k / 2 + 64;
  if (thresholds && !mine.wide && k + weighing.window > most) most = k + weighing.window;
  if (batch.operand >= Operand::codes && batch.capacity / 2 > most) most = batch.capacity / 2;
  if (step != Settling::conclude) mine.all = exactly || int64_t(count) > most;
  if (step == Settling::drop) {
    mine.pending = mine.all ? count - exact : 0;
  } else if (mine.all) {
    if (step == Settling::whole) rescore(batch, q, items, exact, count);
    exact = count;
    if (count > 0) {
      const auto of = [&](uint32_t i) { return items[i]; };
      extremes(count, of, &largest, &smallest);
      Key kth = 0;
      if (int64_t(count) >= k) {
        kth = kth_largest(count, k, of, largest, smallest);
        mine.cut = score_of(kth);
      }
      if (thresholds && !mine.wide) {
        const float best = score_of(largest);
        uint32_t window = 0, total;
        for (uint32_t first = 0; first < count; first += threads) {
          const uint32_t i = first + threadIdx.x;
          rank_among(i < count && items[i] < kth && weight(weighing, score_of(items[i]), best) > 0, &total);
          window += total;
        }
        mine.wide = int64_t(window) > weighing.window;
        if (!mine.wide) mine.cut = fminf(mine.cut, lowest(weighing, best));
      }
      const float best = score_of(largest);
      const bool windowed = thresholds && !mine.wide;
      compact(items, count, exact, [&](uint32_t, Key key) {
        return key >= kth || (windowed && weight(weighing, score_of(key), best) > 0);
      });
    }
  }
  if (threadIdx.x != 0) return;
  mine.fill = mine.before = count;
  mine.exact = exact;
  batch.selected[q] = mine;
  batch.query[q].cut = scaled_cut(mine.cut, query);
}

// Descending, by comparators that all point the same way: no padding to a power of two is needed.
__device__ void sort(Key* items, uint32_t count) {
  uint32_t size = 1;
  while (size < count) size *= 2;
  for (uint32_t width = 2; width <= size; width *= 2)
    for (uint32_t step = width / 2; step > 0; step /= 2) {
      for (uint32_t t = threadIdx.x; t < size / 2; t += threads) {
        const uint32_t block = t / step * step * 2, within = t % step;
        const uint32_t a = block + within;
        const uint32_t b = step == width / 2 ? block + 2 * step - 1 - within : a + step;  // the first step mirrors
        if (b >= count) continue;
        const Key left = items[a], right = items[b];
        if (left < right) {
          items[a] = right;
          items[b] = left;
        }
      }
      __syncthreads();
    }
}

__global__ void __launch_bounds__(threads) sort_kernel(Batch batch) {
  const int q = blockIdx.x;
  const Selected mine = batch.selected[q];
  Key* items = batch.buffer + int64_t(q) * batch.capacity;
  if (mine.status != fine) return;
  if (mine.fill > sorted_in_shared) return sort(items, mine.fill);
  Key* near = reinterpret_cast<Key*>(shared_memory());
  for (uint32_t i = threadIdx.x; i < mine.fill; i += threads) near[i] = items[i];
  __syncthreads();
  sort(near, mine.fill);
  for (uint32_t i = threadIdx.x; i < mine.fill; i += threads) items[i] = near[i];
}

__device__ double as_double(unsigned long long low, unsigned long long high) {  // low + high * 2^32
  const unsigned long long carried = high + (low >> 32);
  const unsigned long long upper = carried >> 32, lower = (carried << 32) | (low & 0xffffffffu);
  return double(upper) * 0x1p64 + double(lower);
}

// part.cpp's conclude, of a query whose weight lies all among its candidates.
__global__ void __launch_bounds__(threads) conclude_kernel(Batch batch, int64_t k, Weighing weighing, Answers to) {
  const int q = blockIdx.x;
  const Selected mine = batch.selected[q];
  const Key* items = batch.buffer + int64_t(q) * batch.capacity;
  const uint32_t count = mine.status == fine ? mine.fill : 0;
  const int64_t shown = int64_t(count) < k ? int64_t(count) : k;
  for (int64_t i = threadIdx.x; i < k; i += threads) {
    to.ids[q * k + i] = i < shown ? row_of(items[i]) : -1;
    to.scores[q * k + i] = i < shown ? score_of(items[i]) : -ATTRIBUTION_INFINITY;
  }
  if (to.influence == nullptr) return;
  Shared& sums = shared();
  if (threadIdx.x == 0) {
    sums.low = sums.high = sums.shown_low = sums.shown_high = 0;
    sums.positive = 0;
  }
  __syncthreads();
  const float best = count > 0 ? score_of(items[0]) : 0.0f;
  for (uint32_t i = threadIdx.x; i < count; i += threads) {
    const double own = weight(weighing, score_of(items[i]), best);
    const unsigned long long quantized = (unsigned long long)(long long)(own * 0x1p62 + 0.5);
    atomicAdd(&sums.low, quantized & 0xffffffffu);
    atomicAdd(&sums.high, quantized >> 32);
    if (i < shown) {
      atomicAdd(&sums.shown_low, quantized & 0xffffffffu);
      atomicAdd(&sums.shown_high, quantized >> 32);
    }
    if (own > 0) atomicAdd(&sums.positive, 1u);
  }
  __syncthreads();
  const double total = as_double(sums.low, sums.high) * 0x1p-62;
  for (int64_t i = threadIdx.x; i < k; i += threads)
    to.influence[q * k + i] = i < shown ? float(weight(weighing, score_of(items[i]), best) / total) : 0.0f;
  if (threadIdx.x != 0) return;
  to.support[q] = sums.positive;
  // Limbs are sums of as many terms or more: neither difference is negative.
  to.shown[q] = count > 0 ? float(as_double(sums.shown_low, sums.shown_high) * 0x1p-62 / total) : 0.0f;
  to.remainder[q] =
      count > 0 ? float(as_double(sums.low - sums.shown_low, sums.high - sums.shown_high) * 0x1p-62 / total) : 0.0f;
}

__global__ void __launch_bounds__(threads) count_kernel(Batch batch, Tallied tallied) {
  const int q = blockIdx.x;
  const Selected mine = batch.selected[q];
  if (mine.status != fine) return;
  if (mine.fill > batch.capacity) {
    __syncthreads();
    if (threadIdx.x == 0) batch.selected[q].status = overflowed;
    return;
  }
  Key* items = batch.buffer + int64_t(q) * batch.capacity;
  rescore(batch, q, items, 0, mine.fill);
  for (int t = 0; t < tallied.threshold_count; ++t) {
    const int64_t at = int64_t(q) * tallied.threshold_count + t;
    const double threshold = tallied.thresholds[at];
    uint32_t larger = 0, total;
    for (uint32_t first = 0; first < mine.fill; first += threads) {
      const uint32_t i = first + threadIdx.x;
      const double score = i < mine.fill ? double(score_of(items[i])) : 0;
      rank_among(i < mine.fill && (tallied.or_equal ? score >= threshold : score > threshold), &total);
      larger += total;
    }
    if (threadIdx.x == 0) tallied.sums[at] += larger;
  }
  if (threadIdx.x == 0) batch.selected[q].fill = 0;
}

// Eight threads an id.
__global__ void __launch_bounds__(256) score_kernel(Batch batch, const int64_t* ids, int64_t count, float* scores) {
  const int64_t all = batch.queries * count, i = int64_t(blockIdx.x) * 32 + threadIdx.x / 8, at = i < all ? i : all - 1;
  const int q = int(at / count);
  const int64_t row = ids[at];
  const Slab& slab = slab_of(batch, row < 0 ? 0 : row);
  const int64_t local = row < 0 ? 0 : row - slab.first_row;
  const double dot =
      canonical_dot(slab.rows + local * slab.stride, batch.storage, batch.values + int64_t(q) * batch.dim, batch.dim, threadIdx.x % 8);
  const float score = canonical_score(dot, batch.offset != nullptr ? batch.offset + q : nullptr,
                                      slab.scale != nullptr ? slab.scale + local : nullptr);
  if (threadIdx.x % 8 != 0 || i >= all) return;
  if (row >= 0 && !finite(score)) note_fault(batch, row, q);
  scores[i] = row < 0 ? -ATTRIBUTION_INFINITY : score;
}

__global__ void cut_kernel(Batch batch, const float* cuts, const uint32_t* still) {
  const int q = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (q >= batch.queries) return;
  Selected mine = batch.selected[q];
  if (cuts != nullptr) mine.cut = cuts[q];
  mine.status = still != nullptr && still[q] != 0 ? frozen : fine;
  batch.selected[q] = mine;
  batch.query[q].cut = mine.status == fine ? scaled_cut(mine.cut, batch.query[q]) : ATTRIBUTION_INFINITY;
}

}  // namespace

void settle(const Batch& batch, int64_t k, const Weighing& weighing, bool exactly, int64_t direct, int processors, cudaStream_t stream) {
  if (batch.queries == 0) return;
  const auto take = [&](Settling step) {
    launch("settle", settle_kernel, batch.queries, threads, sizeof(Shared), stream, 1, batch, k, weighing, exactly, direct, step);
    direct = 0;
  };
  // At least one block for each query, and enough for all processors, if so many rows are wanted.
  const auto score = [&](int64_t rows) {
    const int64_t enough = (int64_t(processors) * 4 + batch.queries - 1) / batch.queries, pieces = (rows + scored_together - 1) / scored_together;
    const int64_t blocks = pieces < enough ? pieces : enough;
    const int64_t row_bytes = batch.dim * bytes_of(Storage(batch.storage)), pitch = (row_bytes + 15) / 16 * 16 + 16;
    const int64_t bytes = pitch * scored_together + (batch.dim + 1) / 2 * 2 * int64_t(sizeof(double));
    const bool staged = bytes <= most_staged;
    launch("score pending", score_pending_kernel, batch.queries * blocks, scored_together * 8, staged ? size_t(bytes) : 0, stream, 1, batch,
           int(blocks), staged ? int(pitch) : 0);
  };
  const bool coded = batch.operand >= Operand::codes;
  if (!coded && !exactly) return take(Settling::whole);
  if (coded) {
    take(Settling::choose);
    score(k);
  }
  take(Settling::drop);
  score(exactly ? k + (weighing.b < 0 ? weighing.window : k) : batch.capacity / 2);
  take(Settling::conclude);
}

void sort_candidates(const Batch& batch, cudaStream_t stream) {
  if (batch.queries > 0) launch("sort", sort_kernel, batch.queries, threads, sorted_in_shared * sizeof(Key), stream, 1, batch);
}

void conclude(const Batch& batch, int64_t k, const Weighing& weighing, const Answers& answers, cudaStream_t stream) {
  if (batch.queries > 0) launch("conclude", conclude_kernel, batch.queries, threads, sizeof(Shared), stream, 1, batch, k, weighing, answers);
}

void count_candidates(const Batch& batch, const Tallied& tallied, cudaStream_t stream) {
  if (batch.queries > 0) launch("count", count_kernel, batch.queries, threads, sizeof(Shared), stream, 1, batch, tallied);
}

void score_rows(const Batch& batch, const int64_t* ids, int64_t count, float* scores, cudaStream_t stream) {
  if (batch.queries * count > 0)
    launch("score rows", score_kernel, (batch.queries * count + 31) / 32, 256, 0, stream, 1, batch, ids, count, scores);
}

void set_cuts(const Batch& batch, const float* cuts, const uint32_t* still, cudaStream_t stream) {
  if (batch.queries > 0) launch("set cuts", cut_kernel, (batch.queries + 255) / 256, 256, 0, stream, 1, batch, cuts, still);
}

}  // namespace attribution::cuda
