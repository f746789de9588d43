// What a part of a gallery says about some queries. Parts merge in any order and grouping into the same whole.
#pragma once
#include <vector>

#include "contract.h"
#include "weight.h"

namespace attribution {

struct Request {
  int64_t k;
  const Calibration* calibration;  // null: search only
  int64_t window;                  // a query with more scores of weight outside its top k is wide
};

struct Part {
  // Of query q: items[begin[q], begin[q + 1]), the best k first, in order, then the others that have weight beside the
  // best. A wide query has its top k alone.
  std::vector<int64_t> begin{0};
  std::vector<Candidate> items;
  std::vector<char> wide;
  std::vector<SoftmaxSum> sums;  // where b = 0; else empty

  int64_t queries() const { return int64_t(begin.size()) - 1; }
  const Candidate* of(int64_t q) const { return items.data() + begin[size_t(q)]; }
  int64_t count(int64_t q) const { return begin[size_t(q) + 1] - begin[size_t(q)]; }
  // Takes the query's candidates, canonical and put in order, as the next query's.
  void append(const Request& request, Candidate* first, Candidate* last, bool is_wide);
};

inline bool better(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.row < b.row);
}

// The best k first, in order; the others behind them in any.
void put_in_order(int64_t k, Candidate* first, Candidate* last);

Part merge(const Request& request, const std::vector<const Part*>& parts);

// Must the weights of this query be summed in a second walk?
bool needs_mass(const Request& request, const Part& part, int64_t q);

struct Found {
  int64_t* ids;      // [queries, k], -1 beyond the gallery
  float* scores;     // [queries, k], -inf beyond the gallery
  float* influence;  // [queries, k]; this and the rest may be null together: search only
  int64_t* support;  // [queries]
  float* shown;      // [queries] the influence of the k together
  float* remainder;  // [queries] all other influence
};

// Writes the answer for query q of the part as query `to` of `found`. mass: all weight, if needs_mass; all_rows: of the
// gallery.
void conclude(const InstructionSet& set, const Request& request, const Part& part, int64_t q, const Mass* mass, int64_t all_rows, const Found& found,
              int64_t to);

}  // namespace attribution
