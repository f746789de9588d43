// What the bindings share.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cxxabi.h>
#include <unistd.h>

#include <cfenv>
#include <exception>
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
// codes: of a compressed gallery: center [dim]; of codes [rows, bytes], and step, residual, norm [rows]; of sketches
// [rows, bytes], their refinements [rows, bytes] and facts [rows, 4].
using ByteArray = py::array_t<uint8_t, py::array::c_style>;
using CodeArrays = std::tuple<ByteArray, FloatArray, FloatArray, FloatArray>;
using HalfArray = py::array_t<uint16_t, py::array::c_style>;
using SketchArrays = std::tuple<ByteArray, ByteArray, HalfArray>;
using CompressedArrays = std::optional<std::tuple<FloatArray, CodeArrays, SketchArrays>>;
Gallery gallery_of(const Shards& shards, const std::string& storage, int64_t dim, const std::optional<FloatArray>& scale,
                   const CompressedArrays& codes);
Queries queries_of(const FloatArray& queries, const std::optional<FloatArray>& offset);

// A daemon thread that asks for the GIL once the interpreter has ended is told to exit (before Python 3.14), which neither
// workers nor destructors survive: it waits for the process to end instead.
template <class Ask>
auto or_wait_for_the_end(const Ask& ask) {
#ifdef __GLIBCXX__
  try {
    return ask();
  } catch (const abi::__forced_unwind&) {
    while (true) pause();
  }
#else
  return ask();
#endif
}

// The caller may flush subnormal numbers or round otherwise (torch.set_flush_denormal); new threads would do as it does.
class DefaultArithmetic {
 public:
  DefaultArithmetic() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultArithmetic() { std::fesetenv(&before_); }

 private:
  std::fenv_t before_;
};

// Runs without the GIL. Ctrl-C is noticed between blocks, by the calling thread.
template <class Work>
void without_gil(const Work& work) {
  std::exception_ptr failure;
  PyThreadState* state = PyEval_SaveThread();
  {
    const DefaultArithmetic arithmetic;
    try {
      work([] {
        return or_wait_for_the_end([] {
          py::gil_scoped_acquire acquire;
          return PyErr_CheckSignals() != 0;
        });
      });
    } catch (...) {
      failure = std::current_exception();
    }
  }
  or_wait_for_the_end([state] { PyEval_RestoreThread(state); });
  try {
    if (failure) std::rethrow_exception(failure);
  } catch (const Interrupted&) {
    throw py::error_already_set();
  }
}

void bind_parts(py::module_& module);

}  // namespace attribution
