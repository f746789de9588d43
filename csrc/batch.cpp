#include "batch.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace attribution {

AlignedBytes::AlignedBytes(int64_t bytes) : owner(new unsigned char[size_t(bytes) + 64]()) {
  begin = owner.get() + (64 - reinterpret_cast<uintptr_t>(owner.get()) % 64) % 64;
}

Batch::Batch(const InstructionSet& set, const Gallery& gallery, const float* queries, const std::vector<int64_t>& rows,
             const float* offset, Filter filter)
    : set(set),
      gallery(gallery),
      rows(rows),
      count(int(rows.size())),
      kernels(filter == Filter::codes ? *set.coded_kernels(count)
                                      : *set.kernels(gallery.storage, count)),
      padded((count + kernels.pad - 1) / kernels.pad * kernels.pad),
      panels(kernels.panel_bytes(padded, gallery.dim)),
      offset(offset || filter == Filter::codes ? size_t(padded) : 0, 0.0f),
      weight(size_t(padded), 0.0f),
      per_norm(size_t(padded), 0.0f),
      filter_(filter),
      queries_(rows.size() * size_t(padded_dim(gallery.dim))),
      own_offset_(rows.size(), 0.0),
      shift_(rows.size()),
      norm_(rows.size()) {
  const int dim = gallery.dim;
  const auto product = [](float a, float b) { return double(a) * double(b); };
  const auto norm_of = [&](const float* values) {
    return std::sqrt(std::inner_product(values, values + dim, values, 0.0, std::plus<double>(), product)) * (1 + 1e-6);
  };
  const float* center = filter == Filter::codes ? gallery.center : nullptr;
  if (center) center_norm_ = norm_of(center);
  for (int q = 0; q < count; ++q) {
    const float* from = queries + rows[size_t(q)] * dim;
    std::copy(from, from + dim, queries_.begin() + q * padded_dim(dim));
    norm_[size_t(q)] = norm_of(from);
    weight[size_t(q)] = float(norm_[size_t(q)] * (1 + 1e-6));
    largest_norm_ = std::max(largest_norm_, norm_[size_t(q)]);
    if (offset) own_offset_[size_t(q)] = double(offset[rows[size_t(q)]]);
    double at_center = own_offset_[size_t(q)];
    if (center)
      at_center += std::inner_product(from, from + dim, center, 0.0, std::plus<double>(), product);
    if (!this->offset.empty()) this->offset[size_t(q)] = float(at_center);
    largest_offset_ = std::max(largest_offset_, std::fabs(own_offset_[size_t(q)]) + norm_[size_t(q)] * center_norm_);
  }
  // A query too large for the fast kernel is only ever scored canonically.
  if (largest_norm_ >= 0x1p100) return;
  kernels.pack(queries_.data(), padded_dim(dim), count, dim, panels.data(), shift_.data());
  for (size_t q = 0; q < rows.size(); ++q) per_norm[q] = float((rounding() * norm_[q] + double(shift_[q])) * (1 - 1e-6));
}

// Sums of products of codes are exact however long; what else is rounded there is rounded fewer than 32 times.
double Batch::rounding() const { return filter_ == Filter::codes ? 0x1p-19 : (gallery.dim + 16) * kernels.rounding; }

void Batch::bound(const Prepared& prepared, float* errors) const {
  // A sum of dim rounded products in any order, then the offset, the scale, the rounding of the canonical score, and
  // that of whoever adds or subtracts the error. Cauchy and Schwarz bound the sum of the products' magnitudes.
  const int dim = gallery.dim;
  const double rounding = this->rounding();
  const double norm = prepared.largest_norm, scale = prepared.largest_scale, shift = prepared.largest_shift;
  // Instruction sets differ in what they do to subnormal numbers; at worst each operand and each sum is flushed. Of
  // codes, which multiply what was flushed, the products count up to 2^22 * dim.
  const double flushed = filter_ == Filter::codes ? 0x1p-100 * dim : 0x1p-120, depth = std::sqrt(double(dim));
  for (int q = 0; q < count; ++q) {
    const double size = norm_[size_t(q)], offset_size = offset.empty() ? 0.0 : std::fabs(double(offset[size_t(q)]));
    const double error = rounding * (size * norm + offset_size * scale) + size * shift + double(shift_[size_t(q)]) * norm +
                         size * center_norm_ * scale * (dim + 16) * 0x1p-50 +
                         flushed * (depth * (size * scale + norm) + 2.0 * dim * scale + 1.0);
    errors[q] = float(error * 1.01);
  }
}

void Batch::bound_closely(const Prepared& prepared, float* errors) const {
  const int dim = gallery.dim;
  // Codes tell how far a row is from the center.
  const double scale = prepared.largest_scale, norm = prepared.largest_norm + center_norm_ * scale;
  for (int q = 0; q < count; ++q) {
    const double size = norm_[size_t(q)];
    const double error = (dim + 16) * close_rounding * (size * norm + std::fabs(own_offset_[size_t(q)]) * scale) +
                         0x1p-120 * (std::sqrt(double(dim)) * (size * scale + norm) + 2.0 * dim * scale + 1.0);
    errors[q] = float(error * 1.01);
  }
}

void Batch::close_scores(const Block& block, const Candidate* items, int some, int q, float* scores) const {
  const unsigned char* places[block_rows];
  for (int i = 0; i < some; ++i) places[i] = block.rows + (items[i].row - block.first_row) * block.stride;
  set.close_dots(places, some, gallery.storage, query(q), gallery.dim, scores);
  for (int i = 0; i < some; ++i) {
    const float* scale = block.row_scale(int(items[i].row - block.first_row));
    scores[i] = float((double(scores[i]) + own_offset_[size_t(q)]) * (scale ? double(*scale) : 1.0));
  }
}

bool Batch::overflows(const Prepared& prepared) const {
  // A row's own length is below 2^64, or its square were no float: before it is scaled, no score is beyond 2^124, even
  // where other rows have larger scales.
  const double most = largest_norm_ * prepared.largest_norm + largest_offset_ * prepared.largest_scale;
  const double unscaled = prepared.largest_scale > 0 ? most / prepared.largest_scale : most;
  return !(most < 0x1p100 && unscaled < 0x1p100 && largest_norm_ < 0x1p60 && prepared.largest_norm < 0x1p60);
}

void Batch::rescore(Candidate* items, int64_t count, int q) const {
  constexpr int most = 64, together = 8;
  const auto ask_for = [this](const unsigned char* const* some_rows, int some) {
    for (int i = 0; i < some; ++i)
      for (int64_t byte = 0; byte < gallery.dim * bytes_of(gallery.storage); byte += 64) __builtin_prefetch(some_rows[i] + byte, 0, 2);
  };
  const unsigned char* places[most];
  double dots[most];
  for (int64_t first = 0; first < count; first += most) {
    const int some = int(std::min<int64_t>(most, count - first));
    for (int i = 0; i < some; ++i) places[i] = gallery.row(items[first + i].row);
    // The rows lie anywhere in memory: ask for the next ones while these are multiplied.
    for (int i = 0; i < some; i += together) {
      if (i == 0) ask_for(places, std::min(together, some));
      const int next = std::min(i + together, some);
      ask_for(places + next, std::min(together, some - next));
      set.canonical_dots(places + i, next - i, gallery.storage, query(q), gallery.dim, dots + i);
    }
    for (int i = 0; i < some; ++i) {
      Candidate& item = items[first + i];
      const double shifted = dots[i] + own_offset_[size_t(q)];
      item.score = float(shifted * gallery.scale(item.row)) + 0.0f;
      item.error = 0;
      if (!std::isfinite(item.score))
        throw std::invalid_argument("query row " + std::to_string(rows[size_t(q)]) + " and gallery row " +
                                    std::to_string(item.row) + ": their score is beyond the range of float32");
    }
  }
}

bool Batch::dense(const Block& block, int first, int some, double* scratch, double* dots, float* scores) const {
  set.canonical_block(block, gallery.storage, query(first), some, gallery.dim, scratch, dots);
  bool finite = true;
  for (int q = 0; q < some; ++q)
    for (int r = 0; r < block.count; ++r) {
      const double dot = dots[q * block_rows + r];
      const double shifted = dot + own_offset_[size_t(first + q)];
      const float score = float(block.scale ? shifted * double(block.scale[r]) : shifted) + 0.0f;
      scores[q * block_rows + r] = score;
      finite &= std::isfinite(score);
    }
  return finite;
}

}  // namespace attribution
