// One walk of a batch of queries over a gallery: the fast kernel proposes candidates, a settle step disposes of them.
//
// The walk goes in stretches. A stretch ends at a row count that grows geometrically (so that cuts tighten early), or
// as soon as any query's buffer is filled to its high-water mark. Blocks under way are finished: each adds at most
// block_rows candidates per query, and the buffer keeps room for one block per thread. So it never overflows, and no
// input, however ordered, makes the walk repeat a row.
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "contract.h"
#include "gallery.h"
#include "team.h"

namespace attribution {

struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

// What a call carries through all its walks.
struct Run {
  const Kernels* kernels;
  Team* team;
  std::function<bool()> interrupted;  // asked by the calling thread only
};

struct AlignedBytes {
  explicit AlignedBytes(int64_t bytes);
  unsigned char* data() const { return begin; }
  std::unique_ptr<unsigned char[]> owner;
  unsigned char* begin;
};

// Queries as the kernel reads them, and what their error bounds need.
class Batch {
 public:
  // queries: [all, dim]; rows: which of them; offset: [all] or null
  Batch(const Kernels& kernels, const float* queries, int dim, const std::vector<int64_t>& rows, const float* offset);

  const float* query(int q) const { return queries_.data() + int64_t(q) * dim; }

  // |fast score - canonical score| <= error, for every row of the block. errors: [padded]
  void bound(const Prepared& prepared, float* errors) const;
  // Can scores of this block leave the range of float, on the way or at the end?
  bool overflows(const Prepared& prepared) const;

  // The score of contract.h. Throws std::invalid_argument if it is not a finite float.
  float canonical(const Gallery& gallery, const Block& row, int q) const;

  const Kernels& kernels;
  const int dim, count, padded;
  const std::vector<int64_t> rows;
  AlignedBytes panels;
  std::vector<float> offset;  // [padded] or empty

 private:
  std::vector<float> queries_;
  std::vector<double> norm_;
  double largest_norm_ = 0, largest_offset_ = 0;
};

class Scan {
 public:
  // keep: how many candidates a settle step may leave behind per query; fresh: how many may gather before the next
  Scan(const Run& run, const Gallery& gallery, const Batch& batch, int64_t keep, int64_t fresh);

  // candidates[0, fill) of one query; returns how many are left, in place. Called for several queries at once.
  using Settle = std::function<uint32_t(int query, Candidate* candidates, uint32_t fill)>;

  // Only scores >= cut[query] matter; a settle step may raise it. first_rows: length of the first stretch.
  void walk(std::vector<float>& cut, int64_t first_rows, const Settle& settle);

  // thresholds: [queries][T] -> larger: [queries][T], the certain ones; the others reach the settle step.
  void walk_counting(const double* thresholds, int count, std::vector<int64_t>& larger, const Settle& settle);

  const Candidate* candidates(int query) const { return buffer_.get() + query * capacity_; }
  uint32_t fill(int query) const { return fill_[query]; }

  // The interval in which a fast score does not tell whether it exceeds the threshold.
  static float low(double threshold, float error);
  static float high(double threshold, float error);

  static int64_t capacity(int64_t keep, int64_t fresh, int threads) { return keep + fresh + int64_t(threads) * block_rows; }

 private:
  struct Member;
  void stretches(int64_t first_rows, const std::vector<float>& cut, std::vector<Member>& members, const Settle& settle,
                 const std::function<void()>& after);
  void take(const Block& block, const std::vector<float>& cut, Member& member);
  void carefully(const Block& block, const std::vector<float>& cut, Member& member);
  void refuse(int64_t row, const std::string& why);

  const Run& run_;
  const Gallery& gallery_;
  const Batch& batch_;
  const int64_t capacity_;
  const uint32_t high_water_;
  std::unique_ptr<Candidate[]> buffer_;
  std::vector<uint32_t> fill_;
  int full_ = 0;
  std::atomic<bool> stop_{false};
  std::mutex refusal_mutex_;
  int64_t refused_row_ = -1;
  std::string refusal_;
};

}  // namespace attribution
