// What a score weighs in the thresholded softmax, and an exact sum of weights.
//
//     weight(score) = max(exp(inv_tau * (score - best)) + b, 0)        arXiv:2306.09345
//
// libm's exp differs in the last bit from machine to machine, and a sum of doubles from order to order. This exp is a
// fixed sequence of roundings, and sums are of 64-bit integers (weight * 2^62) in 128 bits: any order, any
// partition, any number of threads gives the same bits.
#pragma once
#include <cmath>
#include <cstdint>

namespace attribution {

__extension__ typedef unsigned __int128 WeightSum;

// exp(x) for x <= 0, within one unit in the last place.
inline double exp_of_nonpositive(double x) {
  if (!(x >= -746.0)) return 0.0;
  const double n = std::floor(x * 0x1.71547652b82fep+0 + 0.5);
  const double r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return std::ldexp(p, int(n));
}

struct Calibration {
  double inv_tau;
  double b;

  double weight(float score, float best) const {
    const double value = exp_of_nonpositive(inv_tau * (double(score) - double(best))) + b;
    return value > 0 ? value : 0;
  }

  // No score below this has any weight. Rounded down, with room for the roundings of weight().
  float lowest(float best) const {
    const double depth = std::fmax(b < 0 ? std::log(-b) : -746.0, -746.0) * (1 + 1e-12) - 1e-12;
    const double score = double(best) + depth / inv_tau;
    return float(score - (std::fabs(score) + std::fabs(double(best))) * 0x1p-22 - 0x1p-149);
  }
};

inline uint64_t quantized(double weight) { return uint64_t(weight * 0x1p62 + 0.5); }
inline double as_double(WeightSum sum) {
  return (double(uint64_t(sum >> 64)) * 0x1p64 + double(uint64_t(sum))) * 0x1p-62;
}

}  // namespace attribution
