#include <algorithm>
#include <cmath>
#include <limits>

#include "scan.h"

namespace attribution {

AlignedBytes::AlignedBytes(int64_t bytes) : owner(new unsigned char[size_t(bytes) + 64]) {
  begin = owner.get() + (64 - reinterpret_cast<uintptr_t>(owner.get()) % 64) % 64;
}

Batch::Batch(const Kernels& kernels, const float* queries, int dim, const std::vector<int64_t>& rows, const float* offset)
    : kernels(kernels),
      dim(dim),
      count(int(rows.size())),
      padded((int(rows.size()) + kernels.group - 1) / kernels.group * kernels.group),
      rows(rows),
      panels(padded / kernels.group * kernels.panel_bytes(dim)),
      offset(offset ? padded : 0, 0.0f),
      queries_(rows.size() * size_t(dim)),
      norm_(rows.size()) {
  for (int q = 0; q < count; ++q) {
    const float* from = queries + rows[q] * dim;
    std::copy(from, from + dim, queries_.begin() + int64_t(q) * dim);
    double squared = 0;
    for (int d = 0; d < dim; ++d) squared += double(from[d]) * double(from[d]);
    norm_[q] = std::sqrt(squared) * (1 + 1e-6);
    largest_norm_ = std::max(largest_norm_, norm_[q]);
    if (offset) {
      this->offset[q] = offset[rows[q]];
      largest_offset_ = std::max(largest_offset_, std::fabs(double(offset[rows[q]])));
    }
  }
  kernels.pack(queries_.data(), count, dim, panels.data());
}

void Batch::bound(const Prepared& prepared, float* errors) const {
  // A sum of dim products, each rounded at most twice, in any order; then the offset, the scale, and the rounding of
  // the canonical score itself. Cauchy and Schwarz bound the sum of the products' magnitudes by |q| |x|.
  const double rounding = (dim + 16) * 0x1p-23;
  const double norm = prepared.largest_norm, scale = prepared.largest_scale, shift = prepared.largest_shift;
  // Instruction sets differ in what they do to subnormal numbers; at worst each operand and each sum is flushed.
  const double flushed = 0x1p-120, depth = std::sqrt(double(dim));
  for (int q = 0; q < count; ++q) {
    const double offset_size = offset.empty() ? 0.0 : std::fabs(double(offset[q]));
    const double error = rounding * (norm_[q] * norm + offset_size * scale) + norm_[q] * shift +
                         flushed * (depth * (norm_[q] * scale + norm) + 2.0 * dim * scale + 1.0);
    errors[q] = float(error * 1.01);
  }
}

bool Batch::overflows(const Prepared& prepared) const {
  const double most = largest_norm_ * prepared.largest_norm + largest_offset_ * prepared.largest_scale;
  const double unscaled = prepared.largest_scale > 0 ? most / prepared.largest_scale : most;
  return !(most < 0x1p100 && unscaled < 0x1p100 && largest_norm_ < 0x1p100 && prepared.largest_norm < 0x1p100);
}

float Batch::canonical(const Gallery& gallery, const Block& row, int q) const {
  const double dot = kernels.canonical_dot(row.rows, gallery.storage, query(q), dim);
  const double shifted = offset.empty() ? dot : dot + double(offset[q]);
  const float score = float(row.scale ? shifted * double(*row.scale) : shifted) + 0.0f;
  if (!std::isfinite(score))
    throw std::invalid_argument("query row " + std::to_string(rows[q]) + " and gallery row " + std::to_string(row.first_row) +
                                ": their score is beyond the range of float32");
  return score;
}

}  // namespace attribution
