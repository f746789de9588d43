// In which order a walk takes the blocks of a gallery: as they lie, or a random sample of them first.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

namespace attribution {

class BlockOrder {
 public:
  // The sample is one block, any, out of each `apart` neighbours: what it says of the gallery holds however rows are
  // arranged, and nearly all of the gallery is still read in order. Always the same for so many blocks.
  BlockOrder(int64_t blocks, bool sample) : stretches_(sample ? blocks / apart : 0) {
    if (stretches_ < 16) stretches_ = 0;
    uint64_t state = 0;
    const auto random = [&state](uint64_t below) {  // splitmix64
      uint64_t value = state += 0x9e3779b97f4a7c15u;
      value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
      value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
      return (value ^ (value >> 31)) % below;
    };
    for (int64_t i = 0; i < stretches_; ++i) sample_.push_back(i * apart + int64_t(random(apart)));
    chosen_ = sample_;
    for (uint64_t left = sample_.size(); left > 1; --left) std::swap(sample_[left - 1], sample_[random(left)]);
  }

  // How many blocks of the sample come first; any so many of them are a sample, too.
  int64_t sampled() const { return stretches_; }

  // Of the whole gallery, with `seen` blocks of the sample. No row's block is more likely to be among them.
  double share(int64_t seen) const { return double(seen) / double(stretches_ * apart); }

  int64_t block(int64_t index) const {
    if (index < stretches_) return sample_[size_t(index)];
    const int64_t rest = index - stretches_, stretch = rest / (apart - 1);
    if (stretch >= stretches_) return index;
    const int64_t block = stretch * apart + rest % (apart - 1);
    return block + (block >= chosen_[size_t(stretch)]);
  }

 private:
  static constexpr int64_t apart = 8;
  int64_t stretches_;
  std::vector<int64_t> chosen_, sample_;  // in order; shuffled
};

}  // namespace attribution
