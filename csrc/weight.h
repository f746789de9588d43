// What a score weighs in the thresholded softmax, and exact sums of weights.
//
//     weight(score) = max(exp(inv_tau * (score - best)) + b, 0)        arXiv:2306.09345
//
// libm's exp differs in the last bit from machine to machine, and a sum of doubles from order to order. Ours is in
// exponential.h, and sums are sums of integers: any order, any partition, any number of threads gives the same bits.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "contract.h"
#include "exponential.h"

namespace attribution {

__extension__ typedef unsigned __int128 WeightSum;

inline double as_double(WeightSum sum) { return double(uint64_t(sum >> 64)) * 0x1p64 + double(uint64_t(sum)); }

struct Calibration {
  double inv_tau;
  double b;

  double weight(float score, float best) const {
    return thresholded<double, uint64_t>(inv_tau * (double(score) - double(best)), b);
  }

  // No score below this has any weight. Rounded down, with room for the roundings of weight().
  float lowest(float best) const {
    const double depth = std::fmax(b < 0 ? std::log(-b) : -746.0, -746.0) * (1 + 1e-12) - 1e-12;
    const double score = double(best) + depth / inv_tau;
    return float(score - (std::fabs(score) + std::fabs(double(best))) * 0x1p-22 - 0x1p-149);
  }
};

// The weights of scores whose best is known: weight * 2^62, rounded.
struct Mass {
  WeightSum sum = 0;
  int64_t count = 0;

  static uint64_t quantized(double weight) { return uint64_t(int64_t(weight * 0x1p62 + 0.5)); }

  void add(double weight) {
    sum += quantized(weight);
    count += weight > 0;
  }

  // Of up to block_rows scores.
  void add(const InstructionSet& set, const Calibration& calibration, const float* scores, int64_t some, float best) {
    uint64_t low = 0, high = 0;
    count += set.weigh(scores, some, calibration.inv_tau, calibration.b, best, &low, &high);
    sum += (WeightSum(high) << 32) + low;
  }

  void add(const Mass& other) {
    sum += other.sum;
    count += other.count;
  }
};

// exp(inv_tau * score) of scores whose best is not known yet. A bin holds 32 powers of two; four bins, 96 powers below
// the best and more, are all that can matter, whichever order the scores come in.
class SoftmaxSum {
 public:
  // Of up to block_rows scores.
  void add(const InstructionSet& set, const float* scores, int64_t some, double inv_tau) {
    double fractions[block_rows];
    int64_t exponents[block_rows];
    beyond |= !set.exponentials(scores, some, inv_tau, fractions, exponents);
    for (int64_t i = 0; i < some && !beyond; ++i) {
      const int64_t bin = exponents[i] >> 5;
      if (bin > top) raise(bin);
      if (top - bin < bins_kept) bins[top - bin] += WeightSum(uint64_t(fractions[i] * 0x1p52)) << (exponents[i] & 31);
    }
  }

  void add(const SoftmaxSum& other) {
    beyond |= other.beyond;
    if (other.top > top) raise(other.top);
    for (int64_t i = 0; i < bins_kept; ++i)
      if (top - other.top + i < bins_kept) bins[top - other.top + i] += other.bins[i];
  }

  // What is left without the scores of `part`, all of which have been added here.
  SoftmaxSum without(const SoftmaxSum& part) const {
    SoftmaxSum rest = *this;
    for (int64_t i = 0; i < bins_kept; ++i)
      if (top - part.top + i < bins_kept) rest.bins[top - part.top + i] -= part.bins[i];
    return rest;
  }

  // The sum divided by a power of two that depends on `unit` alone.
  double value(int64_t unit) const {
    double value = 0;
    for (int64_t i = bins_kept - 1; i >= 0; --i)
      value += std::ldexp(as_double(bins[i]), -32 * int(std::fmin(double(unit - top + i), 100.0)));
    return value;
  }

  static constexpr int64_t bins_kept = 4;
  int64_t top = std::numeric_limits<int32_t>::min();  // the bin that bins[0] is
  WeightSum bins[bins_kept] = {};
  bool beyond = false;  // a score was too large: the sum is worthless

 private:
  void raise(int64_t bin) {
    const int64_t by = bin - top;
    for (int64_t i = bins_kept - 1; i >= 0; --i) bins[i] = i >= by ? bins[i - by] : 0;
    top = bin;
  }
};

}  // namespace attribution
