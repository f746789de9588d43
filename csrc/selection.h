// The top k of what each query has seen so far, and the window of scores that have weight beside the best one.
#pragma once
#include <vector>

#include "batch.h"
#include "part.h"

namespace attribution {

class Selection {
 public:
  // calibration: null to search only. window: the most items it keeps beside the top k; a query that would need more
  // is wide, keeps its top k alone, and has its weights summed in a second walk.
  // coarse: candidates come with such errors that it pays to score the best of them early.
  Selection(const Batch& batch, int64_t k, const Calibration* calibration, int64_t window, bool coarse);

  // The most that settle() leaves.
  int64_t keep() const { return kept(k_, window_, coarse_); }
  static int64_t kept(int64_t k, int64_t window, bool coarse) { return k + std::max(window, coarse ? 4 * k + 64 : k / 2 + 64); }
  bool wide(int q) const { return wide_[size_t(q)]; }

  // Drops what has k better items or no weight, returns how many are left and raises the cut. A prefix's k-th best
  // never exceeds the final one and its best score neither: what falls below both now is out for good.
  // sampled: what share of the gallery has been seen, if that is a random sample of its blocks: the cut then rises to where
  // the final one most probably will be, or higher. Else 0.
  uint32_t settle(int q, Candidate* items, uint32_t fill, float& cut, double sampled);

  // The same with canonical scores for all that is left: at the end.
  uint32_t finish(int q, Candidate* items, uint32_t fill, float& cut);

  // Whether, of a query that is finished, some of what belongs to it may have been below a cut that was too high.
  bool missed(int q, float cut) const { return guess_[size_t(q)] > cut; }

 private:
  Candidate* drop_hopeless(int q, Candidate* items, Candidate* end, float& cut) const;
  Candidate* guess(int q, Candidate* items, Candidate* end, float& cut, double sampled);
  Candidate* sharpen(int q, Candidate* items, Candidate* end, float& cut) const;
  bool windowed(int q) const { return calibration_ != nullptr && !wide(q); }

  const Batch& batch_;
  const int64_t k_;
  const Calibration* calibration_;
  const int64_t window_;
  const bool coarse_;
  std::vector<char> wide_;
  std::vector<float> guess_;  // the highest cut that was not certain
  bool wrong_guesses_;        // too high, to be found out
};

}  // namespace attribution
