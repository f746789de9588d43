// The module `attribution_extension`. attribution/similarity.py is its only caller and has checked shapes and types;
// what is checked again here is what would otherwise read outside an array. Only here it is seen whether queries are finite.
#include "bindings.h"

#include <cmath>
#include <limits>
#include <string>

#include "compression.h"
#include "dispatch.h"

namespace attribution {

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

namespace {

Storage storage_of(const std::string& name) {
  if (name == "float32") return Storage::float32;
  if (name == "float16") return Storage::float16;
  require(name == "bfloat16", "storage: wanted float32, float16 or bfloat16");
  return Storage::bfloat16;
}

}  // namespace

Gallery gallery_of(const Shards& shards, const std::string& storage_name, int64_t dim, const std::optional<FloatArray>& scale,
                   const CompressedArrays& compressed) {
  const Storage storage = storage_of(storage_name);
  std::vector<Shard> views;
  int64_t rows = 0;
  for (const py::array& shard : shards) {
    require(shard.ndim() == 2 && shard.shape(1) == dim, "gallery: wanted shards of [rows, dim]");
    require(shard.itemsize() == bytes_of(storage), "gallery: item size differs from the storage type's");
    require(dim <= 1 || shard.shape(0) == 0 || shard.strides(1) == shard.itemsize(), "gallery: wanted unit stride along dim");
    views.push_back({static_cast<const unsigned char*>(shard.data()), shard.shape(0), shard.strides(0),
                     scale ? scale->data() + rows : nullptr, {}, {}});
    rows += shard.shape(0);
  }
  require(!scale || (scale->ndim() == 1 && scale->shape(0) == rows), "scale: wanted one value per gallery row");
  if (!compressed) return Gallery(storage, int(dim), std::move(views));
  const auto& [center, coded, sketched] = *compressed;
  const auto& [codes, step, residual, norm] = coded;
  const auto& [sketches, refinements, facts] = sketched;
  const auto holds = [rows](const auto& array, int64_t each) {
    return array.ndim() == 2 && array.shape(0) == rows && array.shape(1) == each;
  };
  require(center.size() == dim && dim <= most_coded_dim && holds(codes, code_bytes(int(dim))) && step.size() == rows &&
              residual.size() == rows && norm.size() == rows && holds(sketches, sketch_bytes(int(dim))) &&
              holds(refinements, refinement_bytes(int(dim))) && holds(facts, facts_of_sketch),
          "codes: they are of another gallery");
  int64_t row = 0;
  for (Shard& view : views) {
    view.coded = {codes.data() + row * codes.shape(1), step.data() + row, residual.data() + row, norm.data() + row};
    view.sketched = {sketches.data() + row * sketches.shape(1), refinements.data() + row * refinements.shape(1),
                     facts.data() + row * facts_of_sketch};
    row += view.rows;
  }
  return Gallery(storage, int(dim), std::move(views), center.data());
}

Queries queries_of(const FloatArray& queries, const std::optional<FloatArray>& offset) {
  require(queries.ndim() == 2, "queries: wanted [queries, dim]");
  require(!offset || (offset->ndim() == 1 && offset->shape(0) == queries.shape(0)), "offset: wanted one value per query");
  for (py::ssize_t i = 0; i < queries.size(); ++i)
    if (!std::isfinite(queries.data()[i]))
      throw std::invalid_argument("queries: row " + std::to_string(i / queries.shape(1)) + ": wanted finite values, got NaN or infinity");
  return {queries.data(), offset ? offset->data() : nullptr, queries.shape(0)};
}

namespace {

py::tuple retrieve_arrays(const Shards& shards, const std::string& storage, const FloatArray& queries,
                          const std::optional<FloatArray>& offset, const std::optional<FloatArray>& scale,
                          const CompressedArrays& codes, int64_t k, std::optional<double> inv_tau, double b, int threads,
                          int64_t window, int64_t query_batch) {
  const Gallery gallery = gallery_of(shards, storage, queries.shape(1), scale, codes);
  const Queries view = queries_of(queries, offset);
  require(k >= 1 && threads >= 1 && window >= 0 && query_batch >= 1, "k, threads, window, query_batch: out of range");
  const Calibration calibration{inv_tau.value_or(1), b};
  const Request request{k, inv_tau ? &calibration : nullptr, inv_tau && b < 0 ? window : 0};
  const std::vector<py::ssize_t> table{view.count, k}, line{view.count};
  IntArray ids(table), support(line);
  FloatArray scores(table), influence(table), shown(line), remainder(line);
  const Found found{ids.mutable_data(),     scores.mutable_data(), influence.mutable_data(),
                    support.mutable_data(), shown.mutable_data(),  remainder.mutable_data()};
  without_gil([&](const Interrupt& interrupted) {
    retrieve(gallery, view, request, {threads, query_batch}, interrupted, found);
  });
  if (!inv_tau) return py::make_tuple(ids, scores);
  return py::make_tuple(ids, scores, influence, support, shown, remainder);
}

IntArray count_arrays(const Shards& shards, const std::string& storage, const FloatArray& queries,
                      const std::optional<FloatArray>& offset, const std::optional<FloatArray>& scale,
                      const CompressedArrays& codes, const DoubleArray& thresholds, bool or_equal, int threads, int64_t query_batch) {
  const Gallery gallery = gallery_of(shards, storage, queries.shape(1), scale, codes);
  const Queries view = queries_of(queries, offset);
  require(thresholds.ndim() == 2 && thresholds.shape(0) == view.count, "thresholds: wanted [queries, thresholds]");
  require(thresholds.shape(1) <= std::numeric_limits<int>::max(), "thresholds: too many");
  require(threads >= 1 && query_batch >= 1, "threads, query_batch: out of range");
  IntArray larger(std::vector<py::ssize_t>{thresholds.shape(0), thresholds.shape(1)});
  int64_t* to = larger.mutable_data();
  without_gil([&](const Interrupt& interrupted) {
    count_larger(gallery, view, thresholds.data(), int(thresholds.shape(1)), or_equal, {threads, query_batch}, interrupted, to);
  });
  return larger;
}

FloatArray score_arrays(const Shards& shards, const std::string& storage, const FloatArray& queries,
                        const std::optional<FloatArray>& offset, const std::optional<FloatArray>& scale,
                        const CompressedArrays& codes, const IntArray& ids) {
  const Gallery gallery = gallery_of(shards, storage, queries.shape(1), scale, codes);
  const Queries view = queries_of(queries, offset);
  require(ids.ndim() == 2 && ids.shape(0) == view.count, "ids: wanted [queries, ids]");
  for (py::ssize_t i = 0; i < ids.size(); ++i)
    require(ids.data()[i] >= -1 && ids.data()[i] < gallery.rows(), "ids: wanted gallery rows, or -1");
  FloatArray scores(std::vector<py::ssize_t>{ids.shape(0), ids.shape(1)});
  float* to = scores.mutable_data();
  without_gil([&](const Interrupt&) { canonical_scores(gallery, view, ids.data(), ids.shape(1), to); });
  return scores;
}

py::tuple compress_arrays(const Shards& shards, const std::string& storage, const FloatArray& center, ByteArray codes,
                          ByteArray sketches, ByteArray refinements, int threads) {
  const Gallery gallery = gallery_of(shards, storage, center.size(), std::nullopt, std::nullopt);
  require(center.size() >= 1 && center.size() <= most_coded_dim && threads >= 1, "codes: dim or threads out of range");
  const py::ssize_t rows = py::ssize_t(gallery.rows());
  const auto room = [rows](ByteArray& bytes, int64_t each) {
    require(bytes.ndim() == 2 && bytes.shape(0) == rows && bytes.shape(1) == each, "codes: wanted [rows, dim in whole cache lines]");
    return bytes.mutable_data();
  };
  FloatArray step(rows), residual(rows), norm(rows);
  HalfArray facts(std::vector<py::ssize_t>{rows, facts_of_sketch});
  const CodesOut to_codes{room(codes, code_bytes(gallery.dim)), step.mutable_data(), residual.mutable_data(), norm.mutable_data()};
  const SketchesOut to_sketches{room(sketches, sketch_bytes(gallery.dim)), room(refinements, refinement_bytes(gallery.dim)),
                                facts.mutable_data()};
  without_gil([&](const Interrupt& interrupted) {
    compress(gallery, center.data(), threads, interrupted, to_codes, to_sketches);
  });
  return py::make_tuple(CodeArrays(codes, step, residual, norm), SketchArrays(sketches, refinements, facts));
}

py::tuple coded_score_arrays(const Shards& shards, const std::string& storage, const FloatArray& queries,
                             const std::optional<FloatArray>& offset, const std::optional<FloatArray>& scale,
                             const CompressedArrays& codes) {
  const Gallery gallery = gallery_of(shards, storage, queries.shape(1), scale, codes);
  const Queries view = queries_of(queries, offset);
  const std::vector<py::ssize_t> table{view.count, py::ssize_t(gallery.rows())};
  FloatArray scores(table), errors(table);
  coded_scores(gallery, view, scores.mutable_data(), errors.mutable_data());
  return py::make_tuple(scores, errors);
}

py::tuple sketched_bound_arrays(const Shards& shards, const std::string& storage, const FloatArray& queries,
                                const std::optional<FloatArray>& offset, const std::optional<FloatArray>& scale,
                                const CompressedArrays& codes) {
  const Gallery gallery = gallery_of(shards, storage, queries.shape(1), scale, codes);
  const Queries view = queries_of(queries, offset);
  const std::vector<py::ssize_t> table{view.count, py::ssize_t(gallery.rows())};
  FloatArray bounds(table), refined(table);
  sketched_bounds(gallery, view, bounds.mutable_data(), refined.mutable_data());
  return py::make_tuple(bounds, refined);
}

}  // namespace
}  // namespace attribution

PYBIND11_MODULE(attribution_extension, module) {
  using namespace attribution;
  module.doc() = "Exact fused retrieval; call it through attribution.similarity.";
  module.attr("sources_sha256") = ATTRIBUTION_SOURCES_SHA256;
  module.def("instruction_set", [] { return std::string(choose_instruction_set()->name); });
  module.def("instruction_sets", runnable_instruction_sets);
  module.def("compress", compress_arrays);
  module.def("coded_scores", coded_score_arrays);
  module.def("sketched_bounds", sketched_bound_arrays);
  module.def("retrieve", retrieve_arrays);
  module.def("count_larger", count_arrays);
  module.def("canonical_scores", score_arrays);
  bind_parts(module);
}
