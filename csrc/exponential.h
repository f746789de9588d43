// exp as a fixed sequence of roundings, for one double or a vector of them: the same bits on every machine. libm's
// differ in the last one.
#pragma once
#include <cstdint>
#include <cstring>

namespace attribution {
namespace {  // see contract.h: nothing shared may come out of this header

// exp(x) = fraction * 2^exponent, fraction within [0.70, 1.42] and one unit in its last place. |x| < 2^30.
template <class Real>
inline Real exponential(Real x, Real* shifted) {
  // Adding 1.5 * 2^52 rounds to an integer, and leaves it in the low bits.
  *shifted = x * 0x1.71547652b82fep+0 + 0x1.8p52;
  const Real n = *shifted - 0x1.8p52;
  const Real r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  Real p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
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
  return p * r + 1.0;
}

// max(exp(depth) + b, 0) for depth <= 0. Below -800 there is no double left for exp(depth).
template <class Real, class Unsigned>
inline Real thresholded(Real depth, double b) {
  const Real zero{}, lowest = zero - 800.0;
  const Real x = depth > lowest ? depth : lowest;
  Real shifted;
  const Real fraction = exponential(x, &shifted);
  Unsigned bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + (1023 + 200)) << 52;
  Real power;  // 2^(exponent + 200), a normal number even where the result is none
  std::memcpy(&power, &bits, sizeof power);
  const Real value = fraction * power * 0x1p-200 + b;
  return value > zero ? value : zero;
}

}  // namespace
}  // namespace attribution
