#!/usr/bin/env bash
# Builds, tests, sanitizes and measures on a machine with a GPU, in one call of less than ten minutes:
#
#     benchmarks/cuda.sh
#
# Wants python3 with torch, numpy, pybind11, scikit-build-core (not used, but what an install wants), jaxtyping and
# pytest; cmake, ninja, nvcc. Hypothesis, beartype and Triton are used where they are. Nothing is installed and nothing
# outside build/ and the folder of results is written. Results go to $OUT, or benchmarks/results: cuda_build.log,
# cuda_tests.log, cuda_sanitizers.log, similarity_cuda.json, cuda_benchmark.log. Every step runs even if one before it
# failed; the exit status is that of the worst.
set -uo pipefail
cd "$(dirname "$0")/.."
results=$(realpath -m "${OUT:-benchmarks/results}")
mkdir -p "$results"
begin=$SECONDS
failed=0

step() {  # seconds, log, command...
  local limit=$1 log=$results/$2 status=0
  shift 2
  echo "==> $* (at $((SECONDS - begin)) s)"
  timeout "$limit" "$@" >"$log" 2>&1 || status=$?
  tail -n "${TAIL:-15}" "$log"
  if [ $status -ne 0 ]; then
    echo "<== failed with $status: $log"
    failed=1
  fi
  return $status
}

build() {
  set -e
  cmake -G Ninja -S . -B build/cuda -DATTRIBUTION_CUDA=ON \
    -Dpybind11_DIR="$(python3 -c 'import pybind11; print(pybind11.get_cmake_dir())')" \
    -DPYTHON_EXECUTABLE="$(command -v python3)" -DPython_EXECUTABLE="$(command -v python3)"
  cmake --build build/cuda
}
export -f build
python3 -c 'import torch; print(torch.__version__, torch.cuda.get_device_name(0))' || exit 1
step 170 cuda_build.log bash -c build || exit 1
export PYTHONPATH=$PWD/build/cuda:$PWD PYTHONDONTWRITEBYTECODE=1

pytest=(python3 -m pytest -q -p no:cacheprovider)
# conftest.py checks shapes with beartype, and skips what is marked gpu where there is none.
python3 -c 'import beartype' 2>/dev/null || pytest+=(--noconftest)
tests=(tests/test_similarity_cuda.py tests/test_similarity_cuda_device.py)
TAIL=30 step 150 cuda_tests.log "${pytest[@]}" "${tests[@]}" -k "gpu or device" --durations=8

if command -v compute-sanitizer >/dev/null; then
  : >"$results/cuda_sanitizers.log"
  for tool in memcheck racecheck initcheck synccheck; do
    # PyTorch's caching allocator would hide what lies between tensors.
    TAIL=4 PYTORCH_NO_CUDA_MEMORY_CACHING=1 step 40 "cuda_$tool.log" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --kernel-regex kns=attribution python3 -m benchmarks.cuda_short
  done
  cat "$results"/cuda_{memcheck,racecheck,initcheck,synccheck}.log >"$results/cuda_sanitizers.log"
  rm -f "$results"/cuda_{memcheck,racecheck,initcheck,synccheck}.log
else
  echo "no compute-sanitizer here"
fi

left=$((570 - (SECONDS - begin)))
OUT=$results TAIL=60 step "$left" cuda_benchmark.log python3 -u -m benchmarks.similarity_cuda --seconds $((left - 40))
echo "all in $((SECONDS - begin)) s; results in $results"
exit $failed
