// Some queries as the fast kernel reads them, what their error bounds need, and their canonical scores.
#pragma once
#include <memory>
#include <vector>

#include "contract.h"
#include "gallery.h"

namespace attribution {

// Zeros, aligned to a cache line.
struct AlignedBytes {
  explicit AlignedBytes(int64_t bytes);
  unsigned char* data() const { return begin; }
  std::unique_ptr<unsigned char[]> owner;
  unsigned char* begin;
};

enum class Filter {
  values,
  codes  // of a compressed gallery, or made of values
};

class Batch {
 public:
  // queries: [all, dim]; rows: which of them; offset: [all] or null
  Batch(const InstructionSet& set, const Gallery& gallery, const float* queries, const std::vector<int64_t>& rows,
        const float* offset, Filter filter = Filter::values);

  // |fast score - canonical score| <= error for every row of the block, with room for one rounding of score +- error.
  // errors: [padded]. What a row's own shift adds is in it only if Prepared::largest_shift says so.
  void bound(const Prepared& prepared, float* errors) const;
  // The same of the scores that close_scores() gives.
  void bound_closely(const Prepared& prepared, float* errors) const;
  // Can scores of this block leave the range of float, on the way or at the end?
  bool overflows(const Prepared& prepared) const;

  // Replaces the candidates' scores by the canonical ones, and their errors by 0. Throws std::invalid_argument if one
  // is not a finite float.
  void rescore(Candidate* items, int64_t count, int q) const;

  // Scores of a query and some rows of one block, up to block_rows, by float32 arithmetic.
  void close_scores(const Block& block, const Candidate* items, int some, int q, float* scores) const;

  // The canonical scores of a whole block for queries [first, first + some), some <= dense_group. scratch: as the
  // instruction set wants it; scores: [some][block_rows]. False if one is not finite.
  static constexpr int dense_group = 32;
  bool dense(const Block& block, int first, int some, double* scratch, double* dots, float* scores) const;

  const InstructionSet& set;
  const Gallery& gallery;
  const std::vector<int64_t> rows;
  const int count;
  const Kernels& kernels;
  const int padded;
  AlignedBytes panels;
  std::vector<float> offset;  // [padded] or empty: what the filter adds; with codes, the center's part as well
  std::vector<float> weight;  // [padded] |q|, upwards
  std::vector<float> per_norm;  // [padded] how fast bound() grows with Prepared::largest_norm, or slower

 private:
  const float* query(int q) const { return queries_.data() + int64_t(q) * padded_dim(gallery.dim); }

  // Of a product and its addition, relative to |q| |x|, times how many there are.
  double rounding() const;

  const Filter filter_;
  std::vector<float> queries_;  // [count][padded_dim]
  std::vector<double> own_offset_;  // [count] the callers'
  std::vector<float> shift_;
  std::vector<double> norm_;
  double largest_norm_ = 0, largest_offset_ = 0, center_norm_ = 0;
};

}  // namespace attribution
