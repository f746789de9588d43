// One walk of a batch of queries over a gallery: the fast kernel proposes candidates, the caller disposes of them.
//
// `select` gathers candidates of all blocks in one buffer per query. It goes in stretches: a stretch ends at a row
// count that grows geometrically (so that cuts tighten early), or as soon as any query's buffer is filled to its
// high-water mark. Threads add to it some candidates at a time. Turns under way are finished: each block of a turn
// adds at most block_rows candidates per query, and the buffer keeps room for one turn per thread, and what it still
// had to itself. So it never overflows, and no input, however ordered, makes the walk repeat a row.
//
// `visit` hands the candidates of each block over at once, while its rows are in cache. Where nearly everything is a
// candidate, blocks are scored canonically as a whole instead.
#pragma once
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "batch.h"
#include "order.h"
#include "sieve.h"
#include "team.h"

namespace attribution {

struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

// What a call carries through all its walks.
struct Run {
  const InstructionSet* set;
  Team* team;
  std::function<bool()> interrupted;  // asked by the calling thread only
};

class Scan {
 public:
  // codes, sieve: the same queries for the filters of a compressed gallery, or null
  Scan(const Run& run, const Batch& batch, const Batch* codes, const Sieve* sieve);

  // Gets the scores of one query and one block. Called by one member of the team at a time with that member's number.
  using Tally = std::function<void(int member, int query, const float* scores, int64_t count)>;

  // Gets candidates[0, fill) of one query and returns how many are left, in place. Called for several queries at once.
  // sampled: the share of the gallery that has been walked, if it was a random sample of the blocks; else 0.
  using Settle = std::function<uint32_t(int query, Candidate* candidates, uint32_t fill, double sampled)>;

  // Candidates have scores >= cut[query]; a settle step may raise it. `settle` leaves at most `keep` of them, and is
  // called again when about `fresh` more have come.
  // With a tally, every block is scored canonically, and the tally gets every score. sample: some blocks, chosen at random,
  // come first; a row that is refused need not be the gallery's first, then.
  void select(std::vector<float>& cut, int64_t keep, int64_t fresh, int64_t first_rows, const Settle& settle,
              const Tally& tally, bool sample);
  Candidate* candidates(int query) const { return buffer_.get() + query * capacity_; }
  uint32_t fill(int query) const { return fill_[size_t(query)]; }
  static int64_t capacity(int64_t keep, int64_t fresh, int64_t blocks) { return keep + fresh + blocks * own_capacity; }

  // Like a tally, of candidates.
  using Visit = std::function<void(int member, int query, Candidate* candidates, int64_t count)>;

  // Each block goes either to `visit` or, as a whole, to `tally`.
  void visit(const std::vector<float>& cut, const Visit& visit, const Tally& tally);

  // thresholds, larger: [queries][count]; how many canonical scores exceed each threshold, or reach it.
  void count(const double* thresholds, int count, bool or_equal, int64_t* larger);

 private:
  // A thread keeps so many candidates of a query to itself before it adds them to those of all: one by one, threads would
  // wait for each other, and each of them for its own writes.
  static constexpr uint32_t own_candidates = 8;
  static constexpr int64_t own_capacity = own_candidates + block_rows;

  struct Side;
  struct Member;
  struct Promising;
  struct Reached;
  struct Gathered;
  struct Passed;
  using Take = std::function<void(int member, int64_t index, int64_t following)>;
  using Done = std::function<void(int member)>;
  void take_turns(int64_t begin, int64_t end, std::atomic<int64_t>& next, const Take& take, const Done& done);
  void stretch(int64_t begin, int64_t end, std::vector<Member>& members, std::atomic<int64_t>& next);
  // following: the block this thread will probably take next
  void take(int64_t index, int64_t following, Member& member);
  bool codes_are_made() const { return codes_ != nullptr && gallery_.center == nullptr; }
  int take_codes(int64_t index, int64_t following, Member& member);
  // The interval in which a score that is not canonical does not tell whether it exceeds the threshold.
  static float low(double threshold, float error);
  static float high(double threshold, float error);
  void set_thresholds(Prepared& prepared, Side& side) const;
  int64_t propose(const Prepared& prepared, int first, const Side& side, Member& member);
  void carefully(const Block& block, int first, Member& member);
  void densely(const Block& block, Member& member);
  void push_exact(Member& member, int query, const Candidate& item);
  void look_closely(const Block& block, const Side& side, Member& member, int query);
  // block: of values, where the candidates are; side: whose errors they have
  void hand_over(const Block& block, const Side& side, Member& member, int first, int queries);
  void pour(Member& member, int query);
  void pour_many(Member& member, int query);
  // scan_count.cpp
  void decide(const Block& block, const Side& side, Member& member, int query) const;
  // scan_sketches.cpp
  using SettleQuery = std::function<void(int query)>;
  void sift(std::vector<Member>& members, int64_t most_promising, std::atomic<int64_t>& next, const SettleQuery& settle);
  void sketch(int64_t begin, int64_t end, int64_t most_promising, std::vector<Member>& members);
  void fulfil(int query, int64_t most_promising, std::vector<Member>& members, const SettleQuery& settle);
  bool worth_sifting(int64_t most_promising) const;
  bool tells_enough(int64_t begin, int64_t end) const;
  template <class Work>
  void for_reaching(int64_t begin, int64_t index, const Work& work) const;
  void ask_for_refinements(int64_t begin, int64_t index, Member& member);
  void refine(int64_t begin, Member& member, size_t left);
  void pass(const Block& block, int row, Member& member);
  void look_closer(Member& member, size_t left);

  bool time_to_ask();
  void refuse(int64_t row, const std::string& why);
  std::vector<Member> members(int thresholds);

  const Run& run_;
  const Gallery& gallery_;
  const Batch& batch_;
  const Batch* codes_;
  const Sieve* sieve_;
  bool always_codes_;  // even where they cost more than they save

  const std::vector<float>* cut_ = nullptr;
  const double* thresholds_ = nullptr;
  int threshold_count_ = 0;
  std::vector<float> exceeded_;  // [queries][thresholds] by the canonical scores that are counted
  const Visit* visit_ = nullptr;
  const Tally* tally_ = nullptr;

  BlockOrder order_;
  int64_t longest_turn_;  // blocks
  int64_t capacity_ = block_rows;
  uint32_t high_water_ = 0;
  std::unique_ptr<Candidate[]> buffer_;
  std::vector<uint32_t> fill_;
  int64_t sifted_ = 0;               // blocks whose bounds are kept at a time
  std::unique_ptr<float[]> bounds_;  // [queries][sifted_ * block_rows]
  int full_ = 0;

  int64_t taken_ = 0;  // blocks, by the calling thread
  std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();
  std::atomic<bool> stop_{false};
  std::mutex refusal_mutex_;
  int64_t refused_row_ = -1;
  std::string refusal_;
};

}  // namespace attribution
