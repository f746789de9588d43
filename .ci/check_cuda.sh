#!/usr/bin/env bash
# Compiles every CUDA source for every architecture with warnings as errors, then reads the compiler's report (the
# Hopper kernel spills nothing and starts with the registers it counts on) and the disassembly (each kernel uses the
# instructions it is written for). Wants nvcc, and cuobjdump from the toolkit, the PATH or Triton's wheel.
#
# With --wheels it builds the library with the nvcc of PyPI's compiler wheels instead, in build/wheels.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --wheels ]; then
  python3 -m venv build/wheels
  build/wheels/bin/pip install --quiet nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl pybind11
  CUDACXX=$(echo "$PWD"/build/wheels/lib/python3.*/site-packages/nvidia/cu*/bin/nvcc)
  export CUDACXX
  "$CUDACXX" --version
  cmake -S . -B build/wheels/build -DATTRIBUTION_CUDA=ON -DPYTHON_EXECUTABLE="$PWD/build/wheels/bin/python" \
    -Dpybind11_DIR="$(build/wheels/bin/pybind11-config --cmakedir)"
  cmake --build build/wheels/build --target attribution_cuda
  build/wheels/bin/python -c 'import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
print(sys.argv[1], "Hopper:", library.attribution_cuda_has_hopper(), "devices:", library.attribution_cuda_devices())' \
    "$PWD/build/wheels/build/attribution_cuda.so"
  exit 0
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

strict=(-std=c++17 -O3 -fmad=false -Werror all-warnings -Xcompiler=-Wall,-Werror -Xptxas=-v
  '-DATTRIBUTION_CUDA_SOURCES_SHA256="checked"')
compile() {  # source, architecture
  local name
  name=$(basename "$1" .cu)_$2
  if ! nvcc "${strict[@]}" "-gencode=arch=compute_$2,code=sm_$2" -c "$1" -o "$out/$name.o" >"$out/$name.log" 2>&1; then
    cat "$out/$name.log"
    return 1
  fi
}
jobs=()
for source in csrc/cuda/*.cu; do
  architectures="80 86 89 90"
  if [ "$source" = csrc/cuda/filter_hopper.cu ]; then architectures=90a; fi
  for architecture in $architectures; do jobs+=("$source $architecture"); done
done
running=()
for job in "${jobs[@]}"; do
  # shellcheck disable=SC2086
  compile $job &
  running+=($!)
  if [ ${#running[@]} -ge "$(nproc)" ]; then
    wait "${running[0]}"
    running=("${running[@]:1}")
  fi
done
for process in "${running[@]}"; do wait "$process"; done
echo "compiled ${#jobs[@]} times without a warning"

fail() {
  echo "$1" >&2
  exit 1
}
# nvcc leaves out functions that it takes for the file's own.
declared=$(grep -cE "^[a-z].* \*?attribution_cuda_[a-z_]+\(" csrc/cuda/library.cu)
exported=$(nm "$out/library_90.o" | grep -c " T attribution_cuda_")
[ "$exported" -eq "$declared" ] || fail "library.cu: wanted $declared functions in the object, got $exported"

report=$out/filter_hopper_90a.log
kernels=$(grep -c "Compiling entry function.*hopper_kernel" "$report")
[ "$kernels" -eq 14 ] || fail "filter_hopper.cu: wanted 14 kernels in the report, got $kernels"
if grep -E "[1-9][0-9]* bytes (stack frame|spill)" "$report"; then fail "filter_hopper.cu: the sm_90a kernel spills registers"; fi
# Advice that is no warning: setmaxnreg that is ignored, products that wait for each other.
if grep -E "setmaxnreg|serialized|\(C75[0-9]{2}\)" "$report"; then fail "filter_hopper.cu: the compiler does not do as the kernel says"; fi
# setmaxnreg shares out 168 registers of each of 384 threads; with fewer the kernel would wait for ever.
for shape in Many Pairs; do
  grep -A3 "Compiling entry function.*hopper_kernel.*${shape}E" "$report" | grep "Used" | grep -vq "Used 168 registers" &&
    fail "filter_hopper.cu: $shape: wanted 168 registers a thread, got: $(grep -A3 "hopper_kernel.*${shape}E" "$report" | grep Used)"
done
for architecture in 80 86 89 90; do
  if grep -A1 "Function properties for.*filter_kernel" "$out/filter_generic_$architecture.log" | grep -E "[1-9][0-9]* bytes (stack frame|spill)"; then
    fail "filter_generic.cu: spills registers on sm_$architecture"
  fi
done

disassembler=$(command -v cuobjdump || ls .venv/lib/python3.*/site-packages/triton/backends/nvidia/bin/cuobjdump 2>/dev/null | head -1 || true)
if [ -z "$disassembler" ]; then
  echo "no cuobjdump here: the disassembly is not checked"
  exit 0
fi
disassemble() {
  PATH="$(dirname "$disassembler"):$PATH" "$disassembler" -sass "$out/$1.o" >"$out/$1.sass"
}
disassemble filter_hopper_90a
for instruction in HGMMA.64x256x16.F32.BF16 HGMMA.64x128x16.F32.BF16 IGMMA.64x256x32.S8.S8 IGMMA.64x128x32.S8.S8 UTMALDG.2D.MULTICAST UTMALDG.2D SYNCS USETMAXREG; do
  grep -q "$instruction" "$out/filter_hopper_90a.sass" || fail "filter_hopper.cu: wanted $instruction in the disassembly for sm_90a"
done
# Only where a cluster begins and ends, twice in each of four kernels, may a block wait for all of the device's memory.
for instruction in CCTL.IVALL MEMBAR.ALL.GPU; do
  count=$(grep -c "$instruction" "$out/filter_hopper_90a.sass" || true)
  [ "$count" -le 8 ] || fail "filter_hopper.cu: wanted $instruction 8 times at most, got $count: a barrier in the main loop is too strong"
done
# A tile with one hit must not fetch all that could be done with any of its scores.
while read -r count; do
  [ "$count" -le 8000 ] || fail "filter_hopper.cu: wanted kernels of 8000 instructions at most, got $count: what follows a hit is written out too often"
done < <(awk '/Function :/ {if (count) print count; count = 0} /^ +\/\*[0-9a-f]+\*\/ / {count++} END {print count}' "$out/filter_hopper_90a.sass")
if grep -qE "\b(LDL|STL)\b" "$out/filter_hopper_90a.sass"; then fail "filter_hopper.cu: uses local memory"; fi
disassemble filter_generic_80
for instruction in HMMA IMMA LDGSTS LDSM; do
  grep -q "$instruction" "$out/filter_generic_80.sass" || fail "filter_generic.cu: wanted $instruction in the disassembly for sm_80"
done
echo "disassembly: HGMMA, IGMMA and UTMALDG for sm_90a; HMMA, IMMA, LDGSTS and LDSM for sm_80"
