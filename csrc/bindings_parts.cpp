// Retrieval in parts: attribution/parts.py.
#include <algorithm>

#include "bindings.h"

namespace attribution {
namespace {

// Parts cross the border as arrays: begin, ids, scores, wide, tops, bins, beyond. The last three are empty unless b = 0.
py::tuple arrays_of(const Part& part) {
  const auto length = [](size_t size) { return std::vector<py::ssize_t>{py::ssize_t(size)}; };
  IntArray begin(length(part.begin.size())), ids(length(part.items.size())), tops(length(part.sums.size()));
  FloatArray scores(length(part.items.size()));
  BoolArray wide(length(part.wide.size())), beyond(length(part.sums.size()));
  WordArray bins(std::vector<py::ssize_t>{py::ssize_t(part.sums.size()), 2 * SoftmaxSum::bins_kept});
  std::copy(part.begin.begin(), part.begin.end(), begin.mutable_data());
  for (size_t i = 0; i < part.items.size(); ++i) {
    ids.mutable_data()[i] = part.items[i].row;
    scores.mutable_data()[i] = part.items[i].score;
  }
  for (size_t q = 0; q < part.wide.size(); ++q) wide.mutable_data()[q] = part.wide[q] != 0;
  for (size_t q = 0; q < part.sums.size(); ++q) {
    tops.mutable_data()[q] = part.sums[q].top;
    beyond.mutable_data()[q] = part.sums[q].beyond;
    for (size_t i = 0; i < size_t(SoftmaxSum::bins_kept); ++i) {
      uint64_t* pair = bins.mutable_data() + (q * SoftmaxSum::bins_kept + i) * 2;
      pair[0] = uint64_t(part.sums[q].bins[i] >> 64);
      pair[1] = uint64_t(part.sums[q].bins[i]);
    }
  }
  return py::make_tuple(begin, ids, scores, wide, tops, bins, beyond);
}

Part part_of(const py::tuple& arrays) {
  require(arrays.size() == 7, "part: wanted 7 arrays");
  const auto begin = arrays[0].cast<IntArray>(), ids = arrays[1].cast<IntArray>(), tops = arrays[4].cast<IntArray>();
  const auto scores = arrays[2].cast<FloatArray>();
  const auto wide = arrays[3].cast<BoolArray>(), beyond = arrays[6].cast<BoolArray>();
  const auto bins = arrays[5].cast<WordArray>();
  const py::ssize_t queries = begin.size() - 1, sums = tops.size();
  require(queries >= 0 && begin.data()[0] == 0 && wide.size() == queries && (sums == 0 || sums == queries) &&
              beyond.size() == sums && bins.size() == sums * 2 * SoftmaxSum::bins_kept && ids.size() == scores.size() &&
              begin.data()[queries] == ids.size(),
          "part: its arrays do not fit together");
  for (py::ssize_t q = 0; q < queries; ++q) require(begin.data()[q] <= begin.data()[q + 1], "part: begin descends");
  Part part;
  part.begin.assign(begin.data(), begin.data() + begin.size());
  part.wide.assign(wide.data(), wide.data() + queries);
  for (py::ssize_t i = 0; i < ids.size(); ++i) part.items.push_back({ids.data()[i], scores.data()[i], 0});
  for (py::ssize_t q = 0; q < sums; ++q) {
    SoftmaxSum sum;
    sum.top = tops.data()[q];
    sum.beyond = beyond.data()[q];
    for (int64_t i = 0; i < SoftmaxSum::bins_kept; ++i) {
      const uint64_t* pair = bins.data() + (q * SoftmaxSum::bins_kept + i) * 2;
      sum.bins[i] = (WeightSum(pair[0]) << 64) + pair[1];
    }
    part.sums.push_back(sum);
  }
  return part;
}

py::tuple retrieve_part_arrays(const Shards& shards, const std::string& storage, const FloatArray& queries,
                               const std::optional<FloatArray>& offset, const std::optional<FloatArray>& scale,
                               const CompressedArrays& codes, int64_t k, double inv_tau, double b, int threads, int64_t window, int64_t query_batch, int64_t first_row) {
  const Gallery gallery = gallery_of(shards, storage, queries.shape(1), scale, codes);
  const Queries view = queries_of(queries, offset);
  require(k >= 1 && threads >= 1 && window >= 0 && query_batch >= 1, "k, threads, window, query_batch: out of range");
  const Calibration calibration{inv_tau, b};
  Part part;
  without_gil([&](const Interrupt& interrupted) {
    part = retrieve_part(gallery, view, {k, &calibration, b < 0 ? window : 0}, {threads, query_batch}, interrupted, first_row);
  });
  return arrays_of(part);
}

py::tuple merge_arrays(const std::vector<py::tuple>& parts, int64_t k, double inv_tau, double b, int64_t window) {
  std::vector<Part> opened;
  for (const py::tuple& arrays : parts) opened.push_back(part_of(arrays));
  require(!opened.empty() && k >= 1, "merge: wanted at least one part, and k >= 1");
  std::vector<const Part*> pointers;
  for (const Part& part : opened) {
    require(part.queries() == opened[0].queries() && part.sums.size() == opened[0].sums.size(), "merge: parts of other queries");
    pointers.push_back(&part);
  }
  const Calibration calibration{inv_tau, b};
  const DefaultArithmetic arithmetic;
  return arrays_of(merge({k, &calibration, b < 0 ? window : 0}, pointers));
}

// For the queries that need it: count, and the sum as high * 2^64 + low.
py::tuple weigh_arrays(const Shards& shards, const std::string& storage, const FloatArray& queries,
                       const std::optional<FloatArray>& offset, const std::optional<FloatArray>& scale,
                       const CompressedArrays& codes, double inv_tau, double b, const FloatArray& best, const BoolArray& which, int threads, int64_t query_batch) {
  const Gallery gallery = gallery_of(shards, storage, queries.shape(1), scale, codes);
  const Queries view = queries_of(queries, offset);
  require(best.size() == view.count && which.size() == view.count, "best, which: wanted one value per query");
  require(threads >= 1 && query_batch >= 1, "threads, query_batch: out of range");
  const std::vector<char> wanted(which.data(), which.data() + which.size());
  std::vector<Mass> masses;
  without_gil([&](const Interrupt& interrupted) {
    masses = weigh(gallery, view, {inv_tau, b}, best.data(), wanted, {threads, query_batch}, interrupted);
  });
  const std::vector<py::ssize_t> line{view.count};
  IntArray count(line);
  WordArray high(line), low(line);
  for (size_t q = 0; q < masses.size(); ++q) {
    count.mutable_data()[q] = masses[q].count;
    high.mutable_data()[q] = uint64_t(masses[q].sum >> 64);
    low.mutable_data()[q] = uint64_t(masses[q].sum);
  }
  return py::make_tuple(count, high, low);
}

py::tuple conclude_arrays(const py::tuple& arrays, int64_t k, double inv_tau, double b, int64_t all_rows, const IntArray& count,
                          const WordArray& high, const WordArray& low) {
  const Part part = part_of(arrays);
  require(k >= 1 && count.size() == part.queries() && high.size() == part.queries() && low.size() == part.queries(),
          "conclude: k, or the masses, do not fit the part");
  const Calibration calibration{inv_tau, b};
  const Request request{k, &calibration, 0};
  const std::vector<py::ssize_t> table{part.queries(), k}, line{part.queries()};
  IntArray ids(table), support(line);
  FloatArray scores(table), influence(table), shown(line), remainder(line);
  const Found found{ids.mutable_data(),     scores.mutable_data(), influence.mutable_data(),
                    support.mutable_data(), shown.mutable_data(),  remainder.mutable_data()};
  const DefaultArithmetic arithmetic;
  for (int64_t q = 0; q < part.queries(); ++q) {
    const Mass mass{(WeightSum(high.data()[q]) << 64) + low.data()[q], count.data()[q]};
    conclude(*choose_instruction_set(), request, part, q, needs_mass(request, part, q) ? &mass : nullptr, all_rows, found, q);
  }
  return py::make_tuple(ids, scores, influence, support, shown, remainder);
}

}  // namespace

void bind_parts(py::module_& module) {
  module.def("retrieve_part", retrieve_part_arrays);
  module.def("merge", merge_arrays);
  module.def("weigh", weigh_arrays);
  module.def("conclude", conclude_arrays);
}

}  // namespace attribution
