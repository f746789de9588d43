#include "coded_blocks.h"

#include <cstdlib>
#include <cstring>

namespace attribution {
namespace {

// With fewer products for each row, or in fewer rows, of which more are candidates, codes save less than it costs to make them.
constexpr int64_t least_queries = 17, least_products = 1 << 14, least_rows = 1 << 15;

int64_t made_bytes(const Gallery& gallery) { return gallery.center ? 0 : block_rows * (code_bytes(gallery.dim) + 3 * int64_t(sizeof(float))); }

}  // namespace

bool told_of_codes(const char* word) {
  const char* variable = std::getenv("ATTRIBUTION_CODES");
  return variable != nullptr && std::strcmp(variable, word) == 0;
}

bool CodedBlocks::has(const InstructionSet& set, const Gallery& gallery, int64_t queries) {
  if (set.coded_kernels(int(queries)) == nullptr || told_of_codes("never")) return false;
  if (gallery.center != nullptr) return true;
  if (set.quantize_rows == nullptr || gallery.dim > most_coded_dim) return false;
  return told_of_codes("always") ||
         (queries >= least_queries && queries * gallery.dim >= least_products && gallery.rows() >= least_rows);
}

CodedBlocks::CodedBlocks(const InstructionSet& set, const Gallery& gallery) : set_(set), gallery_(gallery), made_(made_bytes(gallery)) {}

Block CodedBlocks::block(int64_t index, int64_t following) const {
  const bool more = following < gallery_.blocks();
  if (gallery_.center != nullptr) {
    Block block = gallery_.coded_block(index);
    if (more) block.ahead = gallery_.coded_block(following).rows;
    return block;
  }
  Block block = gallery_.block(index);
  const int64_t bytes = code_bytes(gallery_.dim);
  float* numbers = reinterpret_cast<float*>(made_.data() + block_rows * bytes);
  const CodesOut made{made_.data(), numbers, numbers + block_rows, numbers + 2 * block_rows};
  set_.quantize_rows(block, gallery_.storage, gallery_.dim, made);
  block.coded = Codes{made.codes, made.step, made.residual, made.norm};
  block.rows = made.codes;
  block.stride = bytes;
  if (more) {
    const Block next = gallery_.block(following);
    block.ahead = next.rows;
    block.ahead_bytes = next.count * next.stride;
  }
  return block;
}

}  // namespace attribution
