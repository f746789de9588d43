#!/usr/bin/env bash
# Builds, tries, measures, tests and sanitizes on a machine with a GPU, in one call of less than ten minutes:
#
#     benchmarks/cuda.sh [short] [benchmark] [tests] [sanitizers]
#
# All four where none is named; the build comes first in any case, and what a former call built is not built again.
# Wants python3 with torch, numpy, pybind11 and jaxtyping; cmake, ninja, nvcc. pytest (and xdist), hypothesis,
# beartype, Triton and compute-sanitizer are used where they are. Nothing is installed, and nothing outside build/ and
# the folder of results is written: $OUT, or benchmarks/results. A step that fails, hangs or lacks a tool does not
# keep the others from running: summary.json has each one's exit status (124: it ran out of time) and seconds, beside
# cuda_build.log, cuda_short.log, cuda_benchmark.log, cuda_tests.log, cuda_sanitizers.log and similarity_cuda.json.
# Where the Hopper kernel fails cuda_short, benchmark and tests run without it. SECONDS_IN_ALL (570) bounds the whole.
set -uo pipefail
cd "$(dirname "$0")/.."
results=$(realpath -m "${OUT:-benchmarks/results}")
logs=$PWD/build/cuda_logs
rm -rf "$logs"
mkdir -p "$results" "$logs"
python=$(command -v python3) || python=python
for folder in /usr/local/cuda/bin /usr/local/cuda/compute-sanitizer /opt/cuda/bin; do
  if [ -d "$folder" ]; then PATH=$PATH:$folder; fi  # after whatever is there already
done
begin=$SECONDS
left() { echo $((${SECONDS_IN_ALL:-570} - (SECONDS - begin))); }
wanted=${*:-short benchmark tests sanitizers}
wants() { [[ " $wanted " == *" $1 "* ]]; }
for name in $wanted; do
  if [[ " short benchmark tests sanitizers " != *" $name "* ]]; then
    echo "cuda.sh: wanted short, benchmark, tests or sanitizers, got $name" >&2
    exit 2
  fi
done

summarize() {
  "$python" - "$logs" "$results/summary.json" "$((SECONDS - begin))" <<'END'
import json, os, pathlib, sys
logs, target, seconds = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
steps = [json.loads(path.read_text()) for path in sorted(logs.glob("*.json"), key=lambda path: path.stat().st_mtime)]
whole = target.with_name(f"summary.{os.getpid()}")  # several steps may end at once
whole.write_text(json.dumps({"seconds": seconds, "steps": steps}, indent=1) + "\n")
whole.replace(target)
END
}

# name, seconds at most, command... The log is $logs/name.log.
step() {
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  if [ "$limit" -gt "$(left)" ]; then limit=$(left); fi
  if [ "$limit" -le 0 ]; then
    status=124
    echo "no time was left" >"$logs/$name.log"
  else
    timeout -k 5 "$limit" "$@" >"$logs/$name.log" 2>&1 || status=$?
  fi
  printf '{"step": "%s", "status": %d, "seconds": %d}\n' "$name" "$status" $((SECONDS - start)) >"$logs/part.$name"
  mv "$logs/part.$name" "$logs/$name.json"  # another step may be summarizing
  echo "==> $name: status $status, $((SECONDS - start)) s (at $((SECONDS - begin)) s): $*"
  tail -n "${TAIL:-12}" "$logs/$name.log"
  summarize
  return "$status"
}
gather() {  # log of the results, steps...
  local log=$results/$1 name
  shift
  for name in "$@"; do
    if [ -f "$logs/$name.log" ]; then
      echo "===== $name"
      tail -c 3000000 "$logs/$name.log"
    fi
  done >"$log"
}

machine() {
  nvidia-smi || true
  nvcc --version
  cmake --version
  "$1" - <<'END'
import importlib.metadata as metadata, sys, torch
print(sys.version, torch.__version__, torch.version.cuda)
for name in ("numpy", "pybind11", "jaxtyping", "pytest", "hypothesis", "beartype", "triton"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not here")
print(torch.cuda.get_device_properties(0))
END
}
build() {
  set -e
  cmake -G Ninja -S . -B build/cuda -DATTRIBUTION_CUDA=ON \
    -Dpybind11_DIR="$("$1" -c 'import pybind11; print(pybind11.get_cmake_dir())')" \
    -DPYTHON_EXECUTABLE="$1" -DPython_EXECUTABLE="$1"
  cmake --build build/cuda
  PYTHONPATH=build/cuda:.${PYTHONPATH:+:$PYTHONPATH} "$1" -c 'from attribution import cuda_library
library = cuda_library.load_library()
print(library.path, "Hopper:", library.has_hopper, "devices:", library.devices(), library.failure())'
}
export -f machine build
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HYPOTHESIS_STORAGE_DIRECTORY=$PWD/build/hypothesis

step machine 60 bash -c 'machine "$1"' - "$python" || true
step build 180 bash -c 'build "$1"' - "$python" || true
gather cuda_build.log machine build
export PYTHONPATH=$PWD/build/cuda:$PWD${PYTHONPATH:+:$PYTHONPATH}

kernel=hopper
if wants short; then
  # A kernel that waits for ever is found here, and only here.
  step short_generic 60 env ATTRIBUTION_CUDA_KERNEL=generic "$python" -m benchmarks.cuda_short || true
  step short_hopper 60 env ATTRIBUTION_CUDA_KERNEL=hopper "$python" -m benchmarks.cuda_short || kernel=generic
  gather cuda_short.log short_generic short_hopper
fi

# What comes after the benchmark keeps some time for itself.
after=0
if wants tests || wants sanitizers; then after=70; fi
if wants benchmark; then
  TAIL=45 step benchmark $(($(left) - after)) env ATTRIBUTION_CUDA_KERNEL=$kernel OUT="$results" \
    "$python" -m benchmarks.similarity_cuda --seconds $(($(left) - after - 10)) || true
  gather cuda_benchmark.log benchmark
fi

# Nothing is timed any more: none of what follows minds the others' company.
if wants sanitizers; then
  only_ours=--kernel-name
  compute-sanitizer --help 2>/dev/null | grep -q -e --kernel-name || only_ours=--kernel-regex  # before CUDA 12
  until_end=$(($(left) - 5))
  for tool in memcheck racecheck initcheck synccheck; do
    options=(--tool "$tool" --error-exitcode 1 --print-limit 20 --launch-timeout 120)
    # initcheck must see PyTorch's kernels write what ours read.
    if [ "$tool" != initcheck ]; then options+=("$only_ours" kns=attribution); fi
    # Our calls are checked where they are made; what PyTorch tries in vain is its own affair.
    if [ "$tool" = memcheck ]; then options+=(--report-api-errors no); fi
    # PyTorch's caching allocator would hide what lies between tensors.
    TAIL=4 step "$tool" "$until_end" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer "${options[@]}" \
      "$python" -m benchmarks.cuda_short &
  done
fi
if wants tests; then
  # Out of time, pytest is interrupted, and still says what has failed; a test that hangs shows where.
  pytest=("$python" -c 'import signal, sys, pytest
signal.signal(signal.SIGTERM, signal.default_int_handler)
sys.exit(pytest.main())' -q -p no:cacheprovider --tb=short --maxfail=20 -o faulthandler_timeout=60 -o minversion=7)
  pytest+=(-W default)  # packages of other versions than the project's may warn
  # conftest.py checks shapes with beartype, and skips what is marked gpu where there is none.
  "$python" -c 'import beartype' 2>/dev/null || pytest+=(--noconftest)
  if "$python" -c 'import xdist' 2>/dev/null; then pytest+=(-n 5); fi
  TAIL=30 step tests $(($(left) - 5)) env ATTRIBUTION_CUDA_KERNEL=$kernel "${pytest[@]}" \
    tests/test_similarity_cuda.py tests/test_similarity_cuda_codes.py tests/test_similarity_cuda_device.py \
    -k "gpu or device" --durations=8 || true
  gather cuda_tests.log tests
fi
wait
if wants sanitizers; then gather cuda_sanitizers.log memcheck racecheck initcheck synccheck; fi
summarize
echo "all in $((SECONDS - begin)) s; results in $results"
cat "$results/summary.json"
! grep -qE '"status": [1-9]' "$results/summary.json"
