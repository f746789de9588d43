"""What the emulation of the GPU would show: a kernel with one line wrong does not pass for the right one."""

import faulthandler
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from attribution import cuda_library, cuda_walk, similarity, similarity_cuda
from tests import oracle
from tests.cuda_emulation import CSRC, compile_emulated, emulate
from tests.test_similarity import assert_same

pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")]

# Queries, rows and depth at which every ring of stages comes round: resident, alone, in clusters of two.
FEW, MANY, PAIRS = (3, 259, 840), (66, 140, 600), (129, 140, 328)
SHALLOW = (3, 259, 64)
# Rows beyond the first chunk, whose scores reach their buffers by way of a warp's hits.
CHUNKS = (66, 1300, 64)
# The same by codes, of queries in two lines and in one.
WIDE_CODES, CODES = (9, 1300, 72), (40, 1300, 72)
HOPPER, GENERIC = "filter_hopper.cu", "filter_generic.cu"


@pytest.mark.parametrize(
    ("world", "unit", "right", "wrong"),
    [
        pytest.param(FEW, HOPPER, "wait(full(stage), parity);", "", id="reads a stage before it is there"),
        pytest.param(PAIRS, HOPPER, "wait(full(stage), parity);", "", id="reads what the other block brings"),
        pytest.param(FEW, HOPPER, "wait(ready, 0);", "(void)ready;", id="reads queries too early"),
        pytest.param(MANY, HOPPER, "wait(empty(stage), parity ^ 1);", "", id="fills a stage that is in use"),
        pytest.param(MANY, HOPPER, "wait_for_products<1>();", "", id="frees a stage that products read"),
        pytest.param(
            SHALLOW, HOPPER, "wait_for_products<0>();", "", id="reads sums that are not there"
        ),
        pytest.param(
            MANY, HOPPER, "uint32_t(stage_bytes<Shape>));", "uint32_t(stage_bytes<Shape>) / 2);",
            id="expects too few bytes",
        ),
        pytest.param(
            PAIRS, HOPPER, "consumers * 4 * cluster", "consumers * 4", id="counts its own consumers only"
        ),
        pytest.param(
            PAIRS, HOPPER, "uint16_t((1u << cluster) - 1)", "uint16_t(1u << rank)", id="shares nothing"
        ),
        pytest.param(
            PAIRS, HOPPER, "rank * uint32_t(box_rows * line_bytes)", "0", id="two boxes in one place"
        ),
        pytest.param(
            PAIRS, HOPPER, "  __syncwarp();\n  if constexpr (cluster > 1) cluster_barrier();\n}", "}",
            id="leaves while the other block may arrive",
        ),
        pytest.param(
            PAIRS, HOPPER, "if constexpr (cluster > 1) cluster_barrier();\n  else __syncthreads();",
            "__syncthreads();", id="begins before the other block's barriers are there",
        ),
        pytest.param(
            PAIRS, HOPPER, "  __syncwarp();  // the cluster's barrier wants whole warps\n", "",
            id="begins in parts of warps",
        ),
        pytest.param(
            PAIRS, HOPPER, "  __syncwarp();\n  if constexpr (cluster > 1) cluster_barrier();\n}",
            "  if constexpr (cluster > 1) cluster_barrier();\n}", id="ends in parts of warps",
        ),
        pytest.param(
            MANY, HOPPER, "wait(empty(stage), parity ^ 1);", "wait(empty(stage), parity);",
            id="waits for the phase that is to come",
        ),
        pytest.param(
            MANY, "epilogue.h", "left &= left - 1", "left = 0", id="one hit of sixteen values"
        ),
        pytest.param(CHUNKS, HOPPER, "hits.flush(batch, slab, chunk);", "", id="keeps a warp's last hits"),
        pytest.param(CHUNKS, GENERIC, "hits.flush(batch, slab, chunk);", "", id="the same, generic"),
        pytest.param(
            CHUNKS, "epilogue.h", "if (count + more > held) flush(", "if (count > held) flush(",
            id="one hit more than there is room for",
        ),
        pytest.param(
            CHUNKS, "epilogue.h", "__popc(all & ((1u << threadIdx.x % 32) - 1))", "__popc(0u)",
            id="hits of a warp in one place",
        ),
        pytest.param(
            MANY, HOPPER, "line_bytes / bytes_of(operand)", "256 / bytes_of(operand)", id="box too wide"
        ),
        pytest.param(MANY, "hopper.h", "group_bytes = 8 *", "group_bytes = 16 *", id="groups of lines apart"),
        pytest.param(MANY, "hopper.h", "uint64_t(1) << 62", "uint64_t(2) << 62", id="another swizzle"),
        pytest.param(MANY, HOPPER, "advanced(b, k * 32)", "advanced(b, k * 16)", id="steps too short"),
        pytest.param(
            MANY, GENERIC, "wait_for_copies<stages - 2>", "wait_for_copies<stages - 1>",
            id="reads what cp.async has not brought",
        ),
        pytest.param(
            MANY, GENERIC, "      __syncthreads();\n      load_next(", "      load_next(",
            id="overwrites what another warp reads",
        ),
        pytest.param(MANY, GENERIC, "stages = 3", "stages = 4", id="more shared memory than sm_86 has"),
        pytest.param(WIDE_CODES, "epilogue.h", "(upper), 256.0f", "(upper), 128.0f", id="planes too near"),
        pytest.param(
            WIDE_CODES, "prepare.cu", "q / 8 * 16 + q % 8", "q / 8 * 16 + 7 - q % 8", id="other lines"
        ),
        pytest.param(CODES, "epilogue.h", " || batch.center != nullptr", "", id="forgets the center"),
        pytest.param(
            CODES, "select.cu", "items[from[i]] = items[to[i]];", "", id="a candidate twice, another gone"
        ),
        pytest.param(
            CODES, "select.cu", "first += uint32_t(blocks * scored_together)", "first += 1u << 20",
            id="scores the first candidates only",
        ),
        pytest.param(
            CODES, "select.cu", "    __syncwarp();\n    const double dot = pitch",
            "    const double dot = pitch", id="scores a row before it is there",
        ),
    ],
)  # fmt: skip
def test_a_wrong_kernel_shows(
    world: tuple[int, int, int], unit: str, right: str, wrong: str, tmp_path: Path, monkeypatch
) -> None:
    source = (CSRC / "cuda" / unit).read_text()
    assert right in source
    library = mutated(tmp_path, unit, source.replace(right, wrong))
    emulate(monkeypatch, "generic" if unit == GENERIC else "hopper", library)
    assert outcome(world) != 0


@pytest.mark.parametrize("world", [FEW, MANY, PAIRS, CHUNKS, WIDE_CODES, CODES])
@pytest.mark.parametrize("unit", [GENERIC, HOPPER])
def test_the_right_kernel_passes(world: tuple[int, int, int], unit: str, tmp_path: Path, monkeypatch) -> None:
    """Also from a copy, so that what fails above fails for its one line."""
    library = mutated(tmp_path, unit, (CSRC / "cuda" / unit).read_text())
    emulate(monkeypatch, "generic" if unit == GENERIC else "hopper", library)
    assert outcome(world) == 0


def outcome(world: tuple[int, int, int]) -> int:
    """0 if it returns the bits of the CPU; in a process of its own, because it may crash."""
    child = multiprocessing.get_context("fork").Process(target=compare, args=world)
    child.start()
    child.join()
    return child.exitcode or 0


def compare(count: int, rows: int, dim: int) -> None:
    faulthandler.disable()
    coded = (count, rows, dim) in (WIDE_CODES, CODES)
    queries, gallery = oracle.planted(np.random.default_rng(0), count, rows, dim)
    stored = torch.from_numpy(gallery + np.float32(0.3 * coded)).bfloat16()  # codes leave out a center
    settings = {"k": 40 if coded else 5, "inv_tau": 16.0, "b": -0.04}
    if (count, rows, dim) in (CHUNKS, WIDE_CODES, CODES):
        cuda_walk.plan_chunks = lambda *_: (700, 256, 3)  # room, first chunk, growth; this process ends here
    want = similarity.attribute(queries, stored, impl="cpu", threads=1, **settings)
    for _ in range(3):  # the dice fall otherwise each time
        place = similarity.compress(similarity_cuda.Gallery(stored)) if coded else stored
        assert_same(want, similarity.attribute(queries, place, impl="cuda", **settings))


def mutated(folder: Path, name: str, source: str) -> cuda_library.Library:
    """A library with other text in one of the files."""
    (folder / "cuda").mkdir()
    for path in [*CSRC.glob("*.h"), *CSRC.glob("team.cpp"), *CSRC.glob("cuda/*")]:
        (folder / path.relative_to(CSRC)).symlink_to(path)
    (folder / "cuda" / name).unlink()
    (folder / "cuda" / name).write_text(source)
    return compile_emulated(folder)
