#include "sieve.h"

#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

namespace attribution {

Sieve::Sieve(const InstructionSet& set, const Gallery& gallery, const float* queries, const std::vector<int64_t>& rows,
             const float* offset)
    : count(int(rows.size())), set_(set), gallery_(gallery), panels_(count * set.sketched_bytes(count, gallery.dim)) {
  const int dim = gallery.dim;
  const auto dot = [dim](const float* a, const float* b) {
    return std::inner_product(a, a + dim, b, 0.0, std::plus<double>(), [](float x, float y) { return double(x) * double(y); });
  };
  const double center = std::sqrt(dot(gallery.center, gallery.center)) * (1 + 1e-6);
  for (int q = 0; q < count; ++q) {
    const float* query = queries + rows[size_t(q)] * dim;
    const double norm = std::sqrt(dot(query, query)) * (1 + 1e-6);
    const double own = offset ? double(offset[rows[size_t(q)]]) : 0.0, at_center = own + dot(query, gallery.center);
    SketchedQuery sketched{0, 0, 0, std::numeric_limits<float>::infinity(), 0, 0};
    // No number of a plain query leads out of the range of float, or is too small for a normal one.
    if (norm < double(plain_limit) && std::fabs(own) + norm * center < double(plain_limit)) {
      float missing;
      set.sketch_query(query, count, dim, panels_.data() + q * set.sketched_bytes(count, dim), &sketched, &missing);
      // What is rounded here, refining, and in a canonical score is rounded 32 times at most, and at most 40 times |q| norm: a
      // query's codes may be twice the query, in two parts that add up to three times them, and levels four times the norm.
      constexpr double rounding = 32 * 40 * 0x1p-24;
      if (sketched.step == 0 || sketched.step >= 0x1p-60f) {
        sketched.per_residual = float(norm * (1 + 1e-6));
        sketched.per_norm = float((double(missing) + norm * rounding) * (1 + 1e-6));
        sketched.offset = float(at_center + std::fabs(at_center) * rounding + norm * center * (dim + 16) * 0x1p-50 + 0x1p-100);
      }
    }
    queries_.push_back(sketched);
  }
}

void Sieve::bound(const Block& sketches, float* bounds, int64_t stride) const {
  set_.sketched_bounds(sketches, panels_.data(), queries_.data(), count, gallery_.dim, bounds, stride);
}

void Sieve::refine(const unsigned char* const* refinements, const uint16_t* facts, const float* scales, int some, float* bounds,
                   int64_t stride) const {
  set_.refined_bounds(refinements, facts, scales, some, panels_.data(), queries_.data(), count, gallery_.dim, bounds, stride);
}

}  // namespace attribution
