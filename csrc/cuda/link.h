// Rows in host memory on their way to the device.
#pragma once
#include <vector>

#include "../team.h"
#include "device.h"

namespace attribution::cuda {

// Threads that copy pieces into pinned memory, from where the device takes them while the processor's caches may still
// have them. One alone is slower than the link to the device.
class Link {
 public:
  // pinned: [threads][2][piece_bytes], which must outlive the Link.
  Link(int device, int threads, unsigned char* pinned, int64_t piece_bytes);
  ~Link();
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  // rows of row_bytes <= piece_bytes, `stride` bytes apart, to rows `pitch` bytes apart. Returns when all have been read;
  // when they land the stream knows. staged: they are copied into pinned memory first.
  void send(const unsigned char* from, int64_t stride, int64_t row_bytes, int64_t rows, unsigned char* to, int64_t pitch, bool staged,
            cudaStream_t stream);

 private:
  struct Place {
    unsigned char* memory;
#ifndef ATTRIBUTION_EMULATED
    cudaEvent_t taken;
#endif
  };

  int device_;
  int64_t piece_bytes_;
  Team team_;
  std::vector<Place> places_;
};

}  // namespace attribution::cuda
