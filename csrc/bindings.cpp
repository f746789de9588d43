// The module `attribution_extension`. attribution/similarity.py is its only caller and has checked shapes and types;
// what is checked again here is what would otherwise read outside an array.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "retrieval.h"

namespace py = pybind11;

namespace attribution {
namespace {

using FloatArray = py::array_t<float, py::array::c_style>;
using IntArray = py::array_t<int64_t, py::array::c_style>;
using DoubleArray = py::array_t<double, py::array::c_style>;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

Storage storage_of(const std::string& name) {
  if (name == "float32") return Storage::float32;
  if (name == "float16") return Storage::float16;
  require(name == "bfloat16", "storage: wanted float32, float16 or bfloat16");
  return Storage::bfloat16;
}

Gallery gallery_of(const std::vector<py::array>& shards, const std::string& storage_name, int64_t dim,
                   const std::optional<FloatArray>& scale) {
  const Storage storage = storage_of(storage_name);
  std::vector<Shard> views;
  int64_t rows = 0;
  for (const py::array& shard : shards) {
    require(shard.ndim() == 2 && shard.shape(1) == dim, "gallery: wanted shards of [rows, dim]");
    require(shard.itemsize() == bytes_of(storage), "gallery: item size differs from the storage type's");
    require(dim <= 1 || shard.shape(0) == 0 || shard.strides(1) == shard.itemsize(), "gallery: wanted unit stride along dim");
    views.push_back({static_cast<const unsigned char*>(shard.data()), shard.shape(0), shard.strides(0),
                     scale ? scale->data() + rows : nullptr});
    rows += shard.shape(0);
  }
  require(!scale || (scale->ndim() == 1 && scale->shape(0) == rows), "scale: wanted one value per gallery row");
  return Gallery(storage, int(dim), std::move(views));
}

Queries queries_of(const FloatArray& queries, const std::optional<FloatArray>& offset) {
  require(queries.ndim() == 2, "queries: wanted [queries, dim]");
  require(!offset || (offset->ndim() == 1 && offset->shape(0) == queries.shape(0)), "offset: wanted one value per query");
  return {queries.data(), offset ? offset->data() : nullptr, queries.shape(0)};
}

// Runs without the GIL. Ctrl-C is noticed between blocks, by the calling thread.
template <class Work>
void without_gil(const Work& work) {
  try {
    py::gil_scoped_release release;
    work([] {
      py::gil_scoped_acquire acquire;
      return PyErr_CheckSignals() != 0;
    });
  } catch (const Interrupted&) {
    throw py::error_already_set();
  }
}

py::tuple retrieve_arrays(const std::vector<py::array>& shards, const std::string& storage, const FloatArray& queries,
                          const std::optional<FloatArray>& offset, const std::optional<FloatArray>& scale, int64_t k,
                          std::optional<double> inv_tau, double b, int threads, int64_t window, int64_t query_batch) {
  const Gallery gallery = gallery_of(shards, storage, queries.shape(1), scale);
  const Queries view = queries_of(queries, offset);
  require(k >= 1 && threads >= 1 && window >= 0 && query_batch >= 1, "k, threads, window, query_batch: out of range");
  const std::vector<py::ssize_t> table{view.count, k}, line{view.count};
  IntArray ids(table), support(line);
  FloatArray scores(table), influence(table), shown(line), remainder(line);
  const Found found{ids.mutable_data(),     scores.mutable_data(), influence.mutable_data(),
                    support.mutable_data(), shown.mutable_data(),  remainder.mutable_data()};
  const Calibration calibration{inv_tau.value_or(1), b};
  without_gil([&](const std::function<bool()>& interrupted) {
    retrieve(gallery, view, k, inv_tau ? &calibration : nullptr, {threads, window, query_batch}, interrupted, found);
  });
  if (!inv_tau) return py::make_tuple(ids, scores);
  return py::make_tuple(ids, scores, influence, support, shown, remainder);
}

IntArray count_arrays(const std::vector<py::array>& shards, const std::string& storage, const FloatArray& queries,
                      const std::optional<FloatArray>& offset, const std::optional<FloatArray>& scale,
                      const DoubleArray& thresholds, bool or_equal, int threads, int64_t query_batch) {
  const Gallery gallery = gallery_of(shards, storage, queries.shape(1), scale);
  const Queries view = queries_of(queries, offset);
  require(thresholds.ndim() == 2 && thresholds.shape(0) == view.count, "thresholds: wanted [queries, thresholds]");
  require(threads >= 1 && query_batch >= 1, "threads, query_batch: out of range");
  IntArray larger(std::vector<py::ssize_t>{thresholds.shape(0), thresholds.shape(1)});
  int64_t* to = larger.mutable_data();
  without_gil([&](const std::function<bool()>& interrupted) {
    count_larger(gallery, view, thresholds.data(), int(thresholds.shape(1)), or_equal, {threads, 0, query_batch}, interrupted, to);
  });
  return larger;
}

FloatArray score_arrays(const std::vector<py::array>& shards, const std::string& storage, const FloatArray& queries,
                        const std::optional<FloatArray>& offset, const std::optional<FloatArray>& scale, const IntArray& ids) {
  const Gallery gallery = gallery_of(shards, storage, queries.shape(1), scale);
  const Queries view = queries_of(queries, offset);
  require(ids.ndim() == 2 && ids.shape(0) == view.count, "ids: wanted [queries, ids]");
  for (py::ssize_t i = 0; i < ids.size(); ++i)
    require(ids.data()[i] >= -1 && ids.data()[i] < gallery.rows(), "ids: wanted gallery rows, or -1");
  FloatArray scores(std::vector<py::ssize_t>{ids.shape(0), ids.shape(1)});
  float* to = scores.mutable_data();
  without_gil([&](const std::function<bool()>&) { canonical_scores(gallery, view, ids.data(), ids.shape(1), to); });
  return scores;
}

}  // namespace
}  // namespace attribution

PYBIND11_MODULE(attribution_extension, module) {
  using namespace attribution;
  module.doc() = "Exact fused retrieval; call it through attribution.similarity.";
  module.attr("sources_sha256") = ATTRIBUTION_SOURCES_SHA256;
  module.def("instruction_set", [] { return std::string(choose_kernels()->name); });
  module.def("retrieve", retrieve_arrays);
  module.def("count_larger", count_arrays);
  module.def("canonical_scores", score_arrays);
}
