#include "compression.h"

#include <limits>
#include <numeric>

#include "coded_blocks.h"

namespace attribution {

void compress(const Gallery& gallery, const float* center, int threads, const Interrupt& interrupted, const CodesOut& codes,
              const SketchesOut& sketches) {
  const BorrowedTeam team = borrow_team(int(std::max<int64_t>(1, std::min<int64_t>(threads, gallery.blocks()))));
  const InstructionSet& set = *choose_instruction_set();
  std::vector<double> middle(size_t(padded_dim(gallery.dim)), 0.0);
  std::copy(center, center + gallery.dim, middle.begin());
  std::atomic<int64_t> next{0}, refused{gallery.rows()};
  std::atomic<bool> stop{false};
  bool stopped = false;
  team->run([&](int member) {
    std::vector<double> scratch(size_t(256 * sketch_groups(gallery.dim)));
    for (int64_t index, taken = 0; !stop && (index = next.fetch_add(1)) < gallery.blocks(); ++taken) {
      const Block block = gallery.block(index);
      const int64_t at = block.first_row;
      const int done = set.encode(block, gallery.storage, middle.data(), gallery.dim, scratch.data(),
                                  {codes.codes + at * code_bytes(gallery.dim), codes.step + at, codes.residual + at, codes.norm + at},
                                  {sketches.codes + at * sketch_bytes(gallery.dim),
                                   sketches.refinements + at * refinement_bytes(gallery.dim), sketches.facts + at * facts_of_sketch});
      if (done < block.count) {
        // Blocks are begun in order and finished once begun: the lowest row found is the first there is.
        int64_t lowest = refused;
        while (at + done < lowest && !refused.compare_exchange_weak(lowest, at + done)) {
        }
        stop = true;
      }
      if (member == 0 && taken % 64 == 63 && interrupted && interrupted()) stopped = stop = true;
    }
  });
  if (stopped) throw Interrupted();
  if (refused < gallery.rows())
    throw std::invalid_argument("gallery row " + std::to_string(refused) + ": wanted finite values, got NaN or infinity");
}

void coded_scores(const Gallery& gallery, const Queries& queries, float* scores, float* errors) {
  const InstructionSet& set = *choose_instruction_set();
  std::fill(scores, scores + queries.count * gallery.rows(), std::numeric_limits<float>::quiet_NaN());
  std::fill(errors, errors + queries.count * gallery.rows(), std::numeric_limits<float>::quiet_NaN());
  if (queries.count == 0 || !CodedBlocks::has(set, gallery, queries.count)) return;
  std::vector<int64_t> rows(size_t(queries.count));
  std::iota(rows.begin(), rows.end(), 0);
  const Batch batch(set, gallery, queries.values, rows, queries.offset, Filter::codes);
  const CodedBlocks coded_blocks(set, gallery);
  AlignedBytes scratch(batch.kernels.scratch_bytes(gallery.storage, gallery.dim));
  const std::vector<float> threshold(size_t(batch.padded), -std::numeric_limits<float>::infinity());
  std::vector<float> error(size_t(batch.padded));
  std::vector<Candidate> items(size_t(batch.padded) * block_rows);
  for (int64_t index = 0; index < gallery.blocks(); ++index) {
    std::vector<uint32_t> fill(size_t(batch.padded), 0);
    Prepared prepared;
    batch.kernels.prepare(coded_blocks.block(index, gallery.blocks()), gallery.storage, batch.panels.data(), batch.count, gallery.dim,
                          scratch.data(), &prepared);
    if (batch.overflows(prepared)) continue;
    prepared.largest_shift = 0;  // candidates bring their own
    batch.bound(prepared, error.data());
    const Emission to{threshold.data(), error.data(), batch.offset.data(), items.data(),
                      block_rows,       fill.data(),  batch.weight.data(), batch.per_norm.data()};
    for (int first = 0; first < batch.count; first += batch.kernels.group(batch.count - first))
      batch.kernels.emit(prepared, batch.panels.data(), batch.count, gallery.dim, first, to);
    for (int q = 0; q < batch.count; ++q)
      for (uint32_t i = 0; i < fill[size_t(q)]; ++i) {
        const Candidate& item = items[size_t(q) * block_rows + i];
        scores[q * gallery.rows() + item.row] = item.score;
        errors[q * gallery.rows() + item.row] = item.error;
      }
  }
}

void sketched_bounds(const Gallery& gallery, const Queries& queries, float* bounds, float* refined) {
  const InstructionSet& set = *choose_instruction_set();
  for (float* all : {bounds, refined}) std::fill(all, all + queries.count * gallery.rows(), std::numeric_limits<float>::quiet_NaN());
  if (queries.count == 0 || !Sieve::has(set, gallery, queries.count)) return;
  std::vector<int64_t> rows(size_t(queries.count));
  std::iota(rows.begin(), rows.end(), 0);
  const Sieve sieve(set, gallery, queries.values, rows, queries.offset);
  std::vector<float> block_bounds(size_t(queries.count) * block_rows);
  const unsigned char* refinements[block_rows];
  uint16_t facts[block_rows * facts_of_sketch] = {};
  float scales[block_rows] = {};
  for (int64_t index = 0; index < gallery.blocks(); ++index) {
    const Block block = gallery.sketched_block(index);
    const auto keep = [&](float* all) {
      for (int64_t q = 0; q < queries.count; ++q)
        std::copy_n(block_bounds.data() + q * block_rows, block.count, all + q * gallery.rows() + block.first_row);
    };
    sieve.bound(block, block_bounds.data(), block_rows);
    keep(bounds);
    for (int r = 0; r < block.count; ++r) {
      refinements[r] = block.sketched.refinements + r * refinement_bytes(gallery.dim);
      scales[r] = block.scale ? block.scale[r] : 1.0f;
    }
    std::copy_n(block.sketched.facts, block.count * facts_of_sketch, facts);
    sieve.refine(refinements, facts, scales, block.count, block_bounds.data(), block_rows);
    keep(refined);
  }
}

}  // namespace attribution
