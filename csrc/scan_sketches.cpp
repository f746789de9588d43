// Very few queries and a gallery's sketches. First a bound for every row, from four bits for each value; then exact
// scores of the most promising rows, which put the cut near its end at once; then, of the rows that may reach it, two bits more
// for each value; and then the codes of those that still may.
#include <algorithm>
#include <cstring>

#include "scan_member.h"

namespace attribution {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr int64_t most_asked = 4096;  // bytes of a row
constexpr int64_t most_sifted = (int64_t(4) << 20) / (block_rows * int64_t(sizeof(float)));  // blocks, of 4 MB of bounds

constexpr size_t refined_at_a_time = 32;  // and as many asked for

// Rows of a block, as bits.
struct Rows {
  uint32_t bits[block_rows / 32] = {};

  template <class Work>
  void for_each(int count, const Work& work) const {
    for (int word = 0; word < block_rows / 32; ++word)
      for (uint32_t left = bits[word]; left != 0; left &= left - 1)
        if (const int r = word * 32 + __builtin_ctz(left); r < count) work(r);
  }
};

constexpr auto greater = [](const auto& a, const auto& b) { return a.bound > b.bound; };

}  // namespace

// Calls work(sketches, r) for the rows of a block that may reach the cut of any query.
template <class Work>
void Scan::for_reaching(int64_t begin, int64_t index, const Work& work) const {
  Rows rows;
  for (int q = 0; q < batch_.count; ++q)
    run_.set->add_reaching(bounds_.get() + (q * sifted_ + index - begin) * block_rows, (*cut_)[size_t(q)], rows.bits);
  const Block block = gallery_.sketched_block(index);
  rows.for_each(block.count, [&](int r) { work(block, r); });
}

// Each query lets some rows pass for every one that it wants. Where they add up, codes alone are faster: as fast for 2
// queries and 1,000 rows each of 500,000. And what sketches miss is more of the scores' deviation the longer the rows are: of
// random ones of 768 an eighth may reach the cut of a query, of 1,024 a fifth.
bool Scan::worth_sifting(int64_t most_promising) const {
  constexpr int64_t most_squared = 5 << 18;  // 4 queries of 512 values, 2 of 768, 1 of 1,024
  return always_codes_ || (125 * batch_.count * most_promising <= gallery_.rows() &&
                           int64_t(batch_.count) * gallery_.dim * gallery_.dim <= most_squared);
}

// The gallery, until sketches say too little: `next` is left where others must go on.
void Scan::sift(std::vector<Member>& members, int64_t most_promising, std::atomic<int64_t>& next, const SettleQuery& settle) {
  sifted_ = std::min(gallery_.blocks(), most_sifted);
  bounds_.reset(new float[size_t(batch_.count * sifted_ * block_rows)]);
  while (next < gallery_.blocks()) {
    const int64_t begin = next, end = std::min(gallery_.blocks(), begin + sifted_);
    sketch(begin, end, most_promising, members);
    if (begin == 0) run_.team->share(batch_.count, [&](int q) { fulfil(q, most_promising, members, settle); });
    if (!always_codes_ && !tells_enough(begin, end)) break;
    const Take take = [&](int id, int64_t index, int64_t) { ask_for_refinements(begin, index, members[size_t(id)]); };
    const Done done = [&](int id) {
      refine(begin, members[size_t(id)], 0);
      look_closer(members[size_t(id)], 0);
    };
    while (next < end) {
      for (Member& member : members) member.codes->stale = true;
      take_turns(next, end, next, take, done);
      run_.team->share(batch_.count, settle);
    }
  }
}

// The bounds of all rows in blocks [begin, end). Those of the first chunk are looked at for promising ones.
void Scan::sketch(int64_t begin, int64_t end, int64_t most_promising, std::vector<Member>& members) {
  std::atomic<int64_t> next{begin};
  const Take take = [&](int id, int64_t index, int64_t) {
    const Block block = gallery_.sketched_block(index);
    float* all = bounds_.get() + (index - begin) * block_rows;
    sieve_->bound(block, all, sifted_ * block_rows);
    for (int q = 0; q < batch_.count && begin == 0; ++q) {
      const float* bounds = all + q * sifted_ * block_rows;
      std::vector<Promising>& best = members[size_t(id)].promising[size_t(q)];
      float& least = members[size_t(id)].promise[size_t(q)];
      Rows welcome;
      run_.set->add_reaching(bounds, least, welcome.bits);
      welcome.for_each(block.count, [&](int r) {
        if (bounds[r] < infinity) best.push_back({bounds[r], block.first_row + r});
      });
      if (int64_t(best.size()) < 4 * most_promising) continue;
      std::nth_element(best.begin(), best.begin() + (most_promising - 1), best.end(), greater);
      best.resize(size_t(most_promising));
      least = best.back().bound;
    }
  };
  take_turns(begin, end, next, take, nullptr);
}

// Raises a query's cut to what its most promising rows reach, and forgets them: they will pass.
void Scan::fulfil(int q, int64_t most_promising, std::vector<Member>& members, const SettleQuery& settle) {
  std::vector<Promising> best;
  for (const Member& member : members) {
    const std::vector<Promising>& some = member.promising[size_t(q)];
    best.insert(best.end(), some.begin(), some.end());
  }
  const int64_t count = std::min<int64_t>(most_promising, int64_t(best.size()));
  if (count > 0) std::nth_element(best.begin(), best.begin() + (count - 1), best.end(), greater);
  Candidate* items = candidates(q);
  for (int64_t i = 0; i < count; ++i) items[i] = Candidate{best[size_t(i)].row, 0, 0};
  batch_.rescore(items, count, q);
  fill_[size_t(q)] = uint32_t(count);
  settle(q);
  fill_[size_t(q)] = 0;
}

// A row whose codes are read as well costs more than it saves if two others are not.
bool Scan::tells_enough(int64_t begin, int64_t end) const {
  int64_t passed = 0, rows = 0;
  for (int64_t index = begin; index < end; index += std::max<int64_t>(16, (end - begin) / 64)) {
    for_reaching(begin, index, [&](const Block&, int) { ++passed; });
    rows += gallery_.block(index).count;
  }
  return 5 * passed < 2 * rows;
}

// Asks for the refinements of a block's rows that reach a cut, and looks at those that were asked for some time ago.
void Scan::ask_for_refinements(int64_t begin, int64_t index, Member& member) {
  const int64_t bytes = refinement_bytes(gallery_.dim), asked = std::min(bytes, most_asked);
  for_reaching(begin, index, [&](const Block& block, int r) {
    const unsigned char* refinement = block.sketched.refinements + r * bytes;
    const uint16_t* facts = block.sketched.facts + r * facts_of_sketch;
    for (int64_t byte = 0; byte < asked; byte += 64) __builtin_prefetch(refinement + byte, 0, 3);
    __builtin_prefetch(facts, 0, 3);
    member.reached.push_back({index, r, refinement, facts, block.row_scale(r)});
  });
  if (member.reached.size() >= 2 * refined_at_a_time) refine(begin, member, refined_at_a_time);
}

// Bounds by refinements, until so many rows are left; what reaches a cut still, passes.
void Scan::refine(int64_t begin, Member& member, size_t left) {
  Gathered& all = member.gathered;
  size_t first = 0;
  for (; first + left < member.reached.size(); first += refined_at_a_time) {
    const Reached* rows = member.reached.data() + first;
    const int count = int(std::min(refined_at_a_time, member.reached.size() - first));
    for (int i = 0; i < count; ++i) {
      all.refinements[i] = rows[i].refinement;
      std::memcpy(all.facts + i * facts_of_sketch, rows[i].facts, facts_of_sketch * sizeof *all.facts);
      all.scales[i] = rows[i].scale ? *rows[i].scale : 1.0f;
      const float* bounds = bounds_.get() + (rows[i].block - begin) * block_rows + rows[i].row;
      for (int q = 0; q < batch_.count; ++q) all.bounds[q * block_rows + i] = bounds[q * sifted_ * block_rows];
    }
    sieve_->refine(all.refinements, all.facts, all.scales, count, all.bounds, block_rows);
    for (int i = 0; i < count; ++i)
      for (int q = 0; q < batch_.count; ++q)
        if (!(all.bounds[q * block_rows + i] < (*cut_)[size_t(q)])) {
          pass(gallery_.coded_block(rows[i].block), rows[i].row, member);
          break;
        }
  }
  first = std::min(first, member.reached.size());
  member.reached.erase(member.reached.begin(), member.reached.begin() + int64_t(first));
}

// Asks for the codes of a row, which lie anywhere in memory, and looks at those that were asked for some time ago.
void Scan::pass(const Block& block, int r, Member& member) {
  const Codes& all = block.coded;
  const Codes coded{all.codes + r * block.stride, all.step + r, all.residual + r, all.norm + r};
  for (int64_t byte = 0; byte < std::min(block.stride, most_asked); byte += 64) __builtin_prefetch(coded.codes + byte, 0, 2);
  for (const float* each : {coded.step, coded.residual, coded.norm}) __builtin_prefetch(each, 0, 2);
  member.passed.push_back({block.first_row + r, coded, block.row_scale(r)});
  if (member.passed.size() >= 2 * block_rows) look_closer(member, block_rows);
}

// Looks at the codes of rows that passed, as if they were neighbours, until so many are left.
void Scan::look_closer(Member& member, size_t left) {
  const int64_t bytes = code_bytes(gallery_.dim);
  Side& side = *member.codes;
  size_t begin = 0;
  for (; begin + left < member.passed.size(); begin += block_rows) {
    const int count = int(std::min<size_t>(block_rows, member.passed.size() - begin));
    const Passed* rows = member.passed.data() + begin;
    float step[block_rows], residual[block_rows], norm[block_rows], scale[block_rows];
    for (int i = 0; i < count; ++i) {
      std::memcpy(member.codes_of_passed.data() + i * bytes, rows[i].coded.codes, size_t(bytes));
      step[i] = *rows[i].coded.step;
      residual[i] = *rows[i].coded.residual;
      norm[i] = *rows[i].coded.norm;
      scale[i] = rows[i].scale ? *rows[i].scale : 1.0f;
    }
    const unsigned char* codes = member.codes_of_passed.data();
    const Block block{codes, bytes, count, 0, rows->scale ? scale : nullptr, nullptr, {codes, step, residual, norm}, {}};
    Prepared prepared;
    codes_->kernels.prepare(block, gallery_.storage, codes_->panels.data(), batch_.count, gallery_.dim, side.scratch.data(),
                            &prepared);
    if (codes_->overflows(prepared)) {
      for (int i = 0; i < count; ++i) carefully(gallery_.single_row(rows[i].row), 0, member);
      continue;
    }
    prepared.largest_shift = 0;  // candidates bring their own
    set_thresholds(prepared, side);
    uint32_t before[most_sketched];
    std::copy_n(member.fill.begin(), batch_.count, before);
    propose(prepared, 0, side, member);
    for (int q = 0; q < batch_.count; ++q)
      for (uint32_t i = before[q]; i < member.fill[size_t(q)]; ++i) {
        int64_t& row = member.buffer[size_t(q * own_capacity) + i].row;
        row = rows[row].row;
      }
    for (int q = 0; q < batch_.count; ++q) pour_many(member, q);
  }
  member.passed.erase(member.passed.begin(), member.passed.begin() + int64_t(std::min(begin, member.passed.size())));
}

}  // namespace attribution
