// What attribution/similarity_cuda.py calls, by ctypes: plain functions over memory that the caller has allocated, on
// the caller's stream. They launch and return; who reads a result waits for the stream.
#include <cstdlib>
#include <vector>

#include "device.h"
#include "link.h"

namespace attribution::cuda {

#ifndef ATTRIBUTION_EMULATED
bool wait_for_each_launch = false;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would be blamed for it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error) +
                           (wait_for_each_launch ? "" : "; ATTRIBUTION_CUDA_DEBUG=1 tells which launch it was"));
}
#endif

// Not in the unnamed namespace: nvcc leaves out a function whose parameters are of it, extern "C" or not.

// Everything about some queries; the same for all calls about them.
struct Plan {
  int64_t queries, dim, storage, capacity;
  int64_t operand;            // what the filter multiplies
  const float* center;        // [dim] of codes, or null
  const float* values;        // [queries][dim]
  const float* offset;        // [queries] or null
  unsigned char* workspace;   // [attribution_cuda_layout's last]
  const Slab* slabs;          // [slab_count], in host memory
  int64_t slab_count;
  int64_t processors;
  int64_t hopper;   // use the sm_90a kernel where it can
  int64_t unsafe;   // some stripes may need canonical scores for all their rows
  void* stream;
};

struct Search {
  int64_t k;
  Weighing weighing;
};

namespace {

thread_local std::string failure;

enum Place { packed, query, selected, buffer, scratch, fault, slabs, all, places };

// Of packed queries: how many, and how long.
int64_t padded_lines(int64_t queries, Operand operand) {
  const int64_t lines = (queries + 7) / 8 * 8 * planes_of(operand);
  return (lines + query_tile - 1) / query_tile * query_tile;
}
int64_t bytes_of_line(int64_t dim, Operand operand) { return (dim * bytes_of(operand) + line_bytes - 1) / line_bytes * line_bytes; }

void lay_out(int64_t queries, int64_t dim, int64_t operand, int64_t capacity, int64_t slab_count, int64_t* at) {
  const int64_t padded = padded_lines(queries, Operand(operand)), line = bytes_of_line(dim, Operand(operand));
  const int64_t bytes[] = {padded * line,          padded * int64_t(sizeof(Query)), padded * int64_t(sizeof(Selected)), queries * capacity * 8,
                           queries * capacity * 4, 8,                               slab_count * int64_t(sizeof(Slab))};
  int64_t next = 0;
  for (int i = 0; i < all; ++i) {
    at[i] = next;
    next = (next + bytes[i] + 1023) / 1024 * 1024;
  }
  at[all] = next;
}

Batch batch_of(const Plan& plan) {
  int64_t at[places];
  lay_out(plan.queries, plan.dim, plan.operand, plan.capacity, plan.slab_count, at);
  Batch batch = {};
  batch.queries = int(plan.queries);
  batch.operand = Operand(int(plan.operand));
  batch.padded = int(padded_lines(plan.queries, batch.operand));
  batch.dim = int(plan.dim);
  batch.storage = int(plan.storage);
  batch.line = bytes_of_line(plan.dim, batch.operand);
  batch.center = plan.center;
  batch.values = plan.values;
  batch.offset = plan.offset;
  batch.packed = plan.workspace + at[packed];
  batch.query = reinterpret_cast<Query*>(plan.workspace + at[query]);
  batch.selected = reinterpret_cast<Selected*>(plan.workspace + at[selected]);
  batch.buffer = reinterpret_cast<Key*>(plan.workspace + at[buffer]);
  batch.scratch = reinterpret_cast<uint32_t*>(plan.workspace + at[scratch]);
  batch.capacity = plan.capacity;
  batch.fault = reinterpret_cast<Key*>(plan.workspace + at[fault]);
  batch.slabs = reinterpret_cast<Slab*>(plan.workspace + at[slabs]);
  batch.slab_count = int(plan.slab_count);
  return batch;
}

cudaStream_t stream_of(const Plan& plan) { return static_cast<cudaStream_t>(plan.stream); }

void filter(const Plan& plan, const Batch& batch, const Slab& slab, int64_t begin, int64_t end, bool direct) {
  const int processors = int(plan.processors);
  const Chunk chunk{begin, end, direct, plan.unsafe != 0};
#ifndef ATTRIBUTION_NO_HOPPER
  if (plan.hopper && hopper_can(batch, slab)) filter_hopper(batch, slab, chunk, processors, stream_of(plan));
  else
#endif
    filter_generic(batch, slab, chunk, processors, stream_of(plan));
  if (plan.unsafe) tally_rows(batch, slab, begin, end, Tally::emit_unsafe, Tallied{}, direct, processors, stream_of(plan));
}

void walk_chunk(const Plan& plan, const Batch& batch, const Slab& slab, int64_t begin, int64_t end, bool direct, const Search& search, bool exactly) {
  filter(plan, batch, slab, begin, end, direct);
  settle(batch, search.k, search.weighing, exactly, direct ? end - begin : 0, int(plan.processors), stream_of(plan));
}

template <class Work>
int attempt(const Work& work) {
  try {
#ifndef ATTRIBUTION_EMULATED
    const char* debug = std::getenv("ATTRIBUTION_CUDA_DEBUG");
    wait_for_each_launch = debug != nullptr && *debug != '\0' && *debug != '0';
#endif
    work();
    return 0;
  } catch (const std::exception& error) {
    failure = error.what();
    return 1;
  }
}

}  // namespace
}  // namespace attribution::cuda

using namespace attribution::cuda;

extern "C" {

const char* attribution_cuda_sources() { return ATTRIBUTION_CUDA_SOURCES_SHA256; }
const char* attribution_cuda_failure() { return failure.c_str(); }

// Is the sm_90a kernel in this build?
int attribution_cuda_has_hopper() {
#ifdef ATTRIBUTION_NO_HOPPER
  return 0;
#else
  return 1;
#endif
}

// Devices that the driver has; 0 where there is no driver.
int attribution_cuda_devices() {
#ifdef ATTRIBUTION_EMULATED
  return 1;
#else
  int count = 0;  // an error leaves it untouched
  const cudaError_t error = cudaGetDeviceCount(&count);
  failure = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  if (error != cudaSuccess) cudaGetLastError();
  return count;
#endif
}

// The calling thread's launches go there. This library's runtime is its own: a thread in which PyTorch has already made
// a device current is new to it, and would get device 0.
int attribution_cuda_use_device(int64_t device) {
  return attempt([&] {
#ifdef ATTRIBUTION_EMULATED
    if (device != 0) throw std::runtime_error("use device: there is but one");
#else
    check(cudaSetDevice(int(device)), "use device");
#endif
  });
}

// Link.h's, by its address.
int attribution_cuda_open_link(int64_t device, int64_t threads, void* pinned, int64_t piece_bytes, void** link) {
  return attempt([&] { *link = new Link(int(device), int(threads), static_cast<unsigned char*>(pinned), piece_bytes); });
}
int attribution_cuda_send(void* link, const void* from, int64_t stride, int64_t row_bytes, int64_t rows, void* to, int64_t pitch, int64_t staged,
                          void* stream) {
  return attempt([&] {
    static_cast<Link*>(link)->send(static_cast<const unsigned char*>(from), stride, row_bytes, rows, static_cast<unsigned char*>(to), pitch,
                                   staged != 0, static_cast<cudaStream_t>(stream));
  });
}
int attribution_cuda_close_link(void* link) {
  return attempt([&] { delete static_cast<Link*>(link); });
}

// Offsets into the workspace: packed queries, query records, selected, candidates, scratch, fault, slabs; then its size.
void attribution_cuda_layout(int64_t queries, int64_t dim, int64_t operand, int64_t capacity, int64_t slab_count, int64_t* at) {
  lay_out(queries, dim, operand, capacity, slab_count, at);
}

int attribution_cuda_measure(const Slab* slab, int64_t storage, int64_t dim, const Stripe* norms, Stripe* stripes, Key* refused, void* stream) {
  return attempt([&] { measure_rows(*slab, int(storage), int(dim), norms, stripes, refused, static_cast<cudaStream_t>(stream)); });
}

// The codes of rows that have been measured, and their stripes. slab->codes: where they go
int attribution_cuda_encode(const Slab* slab, int64_t storage, int64_t dim, const float* center, Stripe* stripes, void* stream) {
  return attempt([&] {
    encode_rows(*slab, int(storage), int(dim), center, const_cast<signed char*>(slab->codes), stripes, static_cast<cudaStream_t>(stream));
  });
}

// Packs the queries, forgets all candidates and faults.
int attribution_cuda_begin(const Plan* plan) {
  return attempt([&] {
    const Batch batch = batch_of(*plan);
    note_slabs(batch, plan->slabs, stream_of(*plan));
    pack_queries(batch, stream_of(*plan));
  });
}

// Puts other rows in the place of the slabs.
int attribution_cuda_replace_slabs(const Plan* plan) {
  return attempt([&] { note_slabs(batch_of(*plan), plan->slabs, stream_of(*plan)); });
}

// Rows [begin, end) of one slab, in one chunk.
int attribution_cuda_chunk(const Plan* plan, int64_t slab, int64_t begin, int64_t end, int64_t direct, const Search* search, int64_t exactly) {
  return attempt([&] { walk_chunk(*plan, batch_of(*plan), plan->slabs[slab], begin, end, direct != 0, *search, exactly != 0); });
}

// All rows of one slab, in chunks that grow, hoping that no query overflows. seen: rows of slabs before it. exactly: it is the
// last one.
int attribution_cuda_walk(const Plan* plan, int64_t slab_index, int64_t seen, int64_t first, int64_t growth, const Search* search, int64_t exactly) {
  return attempt([&] {
    const Batch batch = batch_of(*plan);
    const Slab& slab = plan->slabs[slab_index];
    for (int64_t begin = 0; begin < slab.count;) {
      const int64_t length = seen < first ? first - seen : seen * (growth - 1);
      int64_t end = begin + length < slab.count ? (begin + length + 255) / 256 * 256 : slab.count;
      if (end > slab.count) end = slab.count;
      const bool direct = seen == 0 && end - begin <= plan->capacity;
      walk_chunk(*plan, batch, slab, begin, end, direct, *search, exactly != 0 && end == slab.count);
      seen += end - begin;
      begin = end;
    }
  });
}

// Queries may go on, with these cuts or their own, but for those that stay still.
int attribution_cuda_set_cuts(const Plan* plan, const float* cuts, const uint32_t* still) {
  return attempt([&] { set_cuts(batch_of(*plan), cuts, still, stream_of(*plan)); });
}

// Canonical scores for all candidates, while their rows are there.
int attribution_cuda_settle(const Plan* plan, const Search* search) {
  return attempt([&] { settle(batch_of(*plan), search->k, search->weighing, true, 0, int(plan->processors), stream_of(*plan)); });
}

// Sorted candidates with canonical scores; and, where `answers` is given, all there is to say of narrow queries. settled:
// the last walk was exact.
int attribution_cuda_finish(const Plan* plan, const Search* search, const Answers* answers, int64_t settled) {
  return attempt([&] {
    const Batch batch = batch_of(*plan);
    if (!settled) settle(batch, search->k, search->weighing, true, 0, int(plan->processors), stream_of(*plan));
    sort_candidates(batch, stream_of(*plan));
    if (answers != nullptr) conclude(batch, search->k, search->weighing, *answers, stream_of(*plan));
  });
}

// Canonical scores of all rows of a slab, tallied.
int attribution_cuda_tally(const Plan* plan, int64_t slab, int64_t tally, const Tallied* tallied) {
  return attempt([&] {
    tally_rows(batch_of(*plan), plan->slabs[slab], 0, plan->slabs[slab].count, Tally(int(tally)), *tallied, false, int(plan->processors),
               stream_of(*plan));
  });
}

// Rows [begin, end) of a slab whose scores may exceed the queries' cuts are scored and counted.
int attribution_cuda_count(const Plan* plan, int64_t slab, int64_t begin, int64_t end, const Tallied* tallied) {
  return attempt([&] {
    const Batch batch = batch_of(*plan);
    filter(*plan, batch, plan->slabs[slab], begin, end, false);
    count_candidates(batch, *tallied, stream_of(*plan));
  });
}

int attribution_cuda_score(const Plan* plan, const int64_t* ids, int64_t count, float* scores) {
  return attempt([&] { score_rows(batch_of(*plan), ids, count, scores, stream_of(*plan)); });
}
}
