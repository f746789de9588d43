// Very few queries and the sketches of a compressed gallery: which rows deserve a look at their codes.
#pragma once
#include <vector>

#include "batch.h"

namespace attribution {

class Sieve {
 public:
  static bool has(const InstructionSet& set, const Gallery& gallery, int64_t queries) {
    return gallery.center != nullptr && set.sketched_bounds != nullptr && queries <= most_sketched;
  }

  // queries: [all, dim]; rows: which of them; offset: [all] or null
  Sieve(const InstructionSet& set, const Gallery& gallery, const float* queries, const std::vector<int64_t>& rows,
        const float* offset);

  // bounds: [count], `stride` apart, of [block_rows], which no canonical score of that query exceeds
  void bound(const Block& sketches, float* bounds, int64_t stride) const;
  // refinements, facts, scales: of some rows; bounds: [count], `stride` apart, theirs, in place
  void refine(const unsigned char* const* refinements, const uint16_t* facts, const float* scales, int some, float* bounds,
              int64_t stride) const;

  const int count;

 private:
  const InstructionSet& set_;
  const Gallery& gallery_;
  AlignedBytes panels_;
  std::vector<SketchedQuery> queries_;
};

}  // namespace attribution
