// A block's codes: those of a compressed gallery, or, where queries are many, made of its values when it is read.
#pragma once
#include "batch.h"

namespace attribution {

// ATTRIBUTION_CODES: "always", even where they cost more than they save, or "never".
bool told_of_codes(const char* word);

class CodedBlocks {
 public:
  // Are codes a faster filter than values for so many queries?
  static bool has(const InstructionSet& set, const Gallery& gallery, int64_t queries);

  CodedBlocks(const InstructionSet& set, const Gallery& gallery);

  // following: the index of what will probably be wanted next. What is made now is good until the next call.
  Block block(int64_t index, int64_t following) const;

 private:
  const InstructionSet& set_;
  const Gallery& gallery_;
  AlignedBytes made_;  // of one block: codes; steps, residuals and norms
};

}  // namespace attribution
