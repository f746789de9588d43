// What the bindings share.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "retrieval.h"

namespace attribution {

namespace py = pybind11;

using FloatArray = py::array_t<float, py::array::c_style>;
using IntArray = py::array_t<int64_t, py::array::c_style>;
using DoubleArray = py::array_t<double, py::array::c_style>;
using BoolArray = py::array_t<bool, py::array::c_style>;
using WordArray = py::array_t<uint64_t, py::array::c_style>;

using Shards = std::vector<py::array>;

void require(bool condition, const char* message);
// Views; the arrays must outlive them.
// codes: of a compressed gallery: center [dim], then twice, for codes and for sketches: [rows, bytes], and step, residual, norm
// [rows].
using ByteArray = py::array_t<uint8_t, py::array::c_style>;
using CodeArrays = std::tuple<ByteArray, FloatArray, FloatArray, FloatArray>;
using CompressedArrays = std::optional<std::tuple<FloatArray, CodeArrays, CodeArrays>>;
Gallery gallery_of(const Shards& shards, const std::string& storage, int64_t dim, const std::optional<FloatArray>& scale,
                   const CompressedArrays& codes);
Queries queries_of(const FloatArray& queries, const std::optional<FloatArray>& offset);

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

void bind_parts(py::module_& module);

}  // namespace attribution
