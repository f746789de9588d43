#include "link.h"

#include <algorithm>
#include <cstring>

namespace attribution::cuda {
namespace {

#ifdef ATTRIBUTION_EMULATED
void take(unsigned char* to, int64_t pitch, const unsigned char* from, int64_t stride, int64_t row_bytes, int64_t rows, cudaStream_t) {
  for (int64_t row = 0; row < rows; ++row) std::memcpy(to + row * pitch, from + row * stride, size_t(row_bytes));
}
#else
void take(unsigned char* to, int64_t pitch, const unsigned char* from, int64_t stride, int64_t row_bytes, int64_t rows, cudaStream_t stream) {
  if (pitch == row_bytes && stride == row_bytes)
    check(cudaMemcpyAsync(to, from, size_t(rows * row_bytes), cudaMemcpyHostToDevice, stream), "send");
  else
    check(cudaMemcpy2DAsync(to, size_t(pitch), from, size_t(stride), size_t(row_bytes), size_t(rows), cudaMemcpyHostToDevice, stream), "send");
}
#endif

}  // namespace

Link::Link(int device, int threads, unsigned char* pinned, int64_t piece_bytes)
    : device_(device), piece_bytes_(piece_bytes), team_(threads), places_(size_t(threads) * 2) {
  for (size_t i = 0; i < places_.size(); ++i) {
    places_[i].memory = pinned + int64_t(i) * piece_bytes;
#ifndef ATTRIBUTION_EMULATED
    check(cudaEventCreateWithFlags(&places_[i].taken, cudaEventDisableTiming), "send");
#endif
  }
}

Link::~Link() {
#ifndef ATTRIBUTION_EMULATED
  for (const Place& place : places_) {
    cudaEventSynchronize(place.taken);
    cudaEventDestroy(place.taken);
  }
#endif
}

void Link::send(const unsigned char* from, int64_t stride, int64_t row_bytes, int64_t rows, unsigned char* to, int64_t pitch, bool staged,
                cudaStream_t stream) {
  if (row_bytes == 0 || rows == 0) return;
  if (!staged) return take(to, pitch, from, stride, row_bytes, rows, stream);
  const int64_t piece_rows = piece_bytes_ / row_bytes;
  if (piece_rows == 0) throw std::invalid_argument("send: a row is longer than a piece");
  std::atomic<int64_t> next{0};
  team_.run([&](int member) {
#ifndef ATTRIBUTION_EMULATED
    check(cudaSetDevice(device_), "send");
#endif
    for (int turn = 0;; turn ^= 1) {
      const int64_t first = next.fetch_add(piece_rows);
      if (first >= rows) return;
      const int64_t count = std::min(piece_rows, rows - first);
      const Place& place = places_[size_t(member) * 2 + size_t(turn)];
#ifndef ATTRIBUTION_EMULATED
      check(cudaEventSynchronize(place.taken), "send");  // what lay there before is on the device
#endif
      const unsigned char* begin = from + first * stride;
      if (stride == row_bytes) std::memcpy(place.memory, begin, size_t(count * row_bytes));
      else
        for (int64_t row = 0; row < count; ++row) std::memcpy(place.memory + row * row_bytes, begin + row * stride, size_t(row_bytes));
      take(to + first * pitch, pitch, place.memory, row_bytes, row_bytes, count, stream);
#ifndef ATTRIBUTION_EMULATED
      check(cudaEventRecord(place.taken, stream), "send");
#endif
    }
  });
}

}  // namespace attribution::cuda
