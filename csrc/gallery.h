// A gallery as shards that lie where they are, cut into blocks that never cross a shard.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "contract.h"

namespace attribution {

struct Shard {
  const unsigned char* data;
  int64_t rows;
  int64_t stride;      // bytes from row to row
  const float* scale;  // [rows] or null
  // Of a compressed gallery; or nulls.
  Codes coded;
  Sketches sketched;
};

class Gallery {
 public:
  // center: [dim], of a compressed gallery; or null
  Gallery(Storage storage, int dim, std::vector<Shard> shards, const float* center = nullptr)
      : storage(storage), dim(dim), center(center), shards_(std::move(shards)), first_row_{0}, first_block_{0} {
    for (const Shard& shard : shards_) {
      first_row_.push_back(first_row_.back() + shard.rows);
      first_block_.push_back(first_block_.back() + (shard.rows + block_rows - 1) / block_rows);
    }
  }

  int64_t rows() const { return first_row_.back(); }
  int64_t blocks() const { return first_block_.back(); }

  Block block(int64_t index) const {
    const size_t s = holder(first_block_, index);
    return slice(s, (index - first_block_[s]) * block_rows, block_rows);
  }

  // The codes of the same rows; and their sketches.
  Block coded_block(int64_t index) const {
    return block_of(index, [this](const Shard& shard, int64_t begin, Block* block) {
      const int64_t bytes = code_bytes(dim);
      const Codes& all = shard.coded;
      block->coded = Codes{all.codes + begin * bytes, all.step + begin, all.residual + begin, all.norm + begin};
      block->rows = block->coded.codes;
      block->stride = bytes;
    });
  }
  Block sketched_block(int64_t index) const {
    return block_of(index, [this](const Shard& shard, int64_t begin, Block* block) {
      const int64_t bytes = sketch_bytes(dim);
      const Sketches& all = shard.sketched;
      block->sketched = Sketches{all.codes + begin * bytes, all.refinements + begin * refinement_bytes(dim),
                                 all.facts + begin * facts_of_sketch};
      block->rows = block->sketched.codes;
      block->stride = bytes;
    });
  }

  // The block that row `index` is in.
  int64_t block_of_row(int64_t index) const {
    const size_t s = holder(first_row_, index);
    return first_block_[s] + (index - first_row_[s]) / block_rows;
  }

  // The block of row `index` alone.
  Block single_row(int64_t index) const {
    const size_t s = holder(first_row_, index);
    return slice(s, index - first_row_[s], 1);
  }

  // Row `index` of the whole gallery.
  const unsigned char* row(int64_t index) const {
    const size_t s = holder(first_row_, index);
    return shards_[s].data + (index - first_row_[s]) * shards_[s].stride;
  }

  double scale(int64_t index) const {
    const size_t s = holder(first_row_, index);
    return shards_[s].scale ? double(shards_[s].scale[index - first_row_[s]]) : 1.0;
  }

  const Storage storage;
  const int dim;
  const float* const center;

 private:
  // Empty shards begin where the next one does: the last that begins at or before `index` is the one that holds it.
  static size_t holder(const std::vector<int64_t>& first, int64_t index) {
    return size_t(std::upper_bound(first.begin(), first.end(), index) - first.begin()) - 1;
  }

  // compress(shard, first row in it, block) says where something else of these rows lies.
  template <class Compress>
  Block block_of(int64_t index, const Compress& compress) const {
    const size_t s = holder(first_block_, index);
    const int64_t begin = (index - first_block_[s]) * block_rows;
    Block block = slice(s, begin, block_rows);
    compress(shards_[s], begin, &block);
    return block;
  }

  Block slice(size_t s, int64_t begin, int64_t most) const {
    const Shard& shard = shards_[s];
    return Block{shard.data + begin * shard.stride, shard.stride, int(std::min(most, shard.rows - begin)),
                 first_row_[s] + begin, shard.scale ? shard.scale + begin : nullptr, nullptr, {}, {}};
  }

  std::vector<Shard> shards_;
  std::vector<int64_t> first_row_, first_block_;
};

}  // namespace attribution
