"""Every CUDA kernel once, on little data, against the CPU: what to run first, and under compute-sanitizer.

    [ATTRIBUTION_CUDA_KERNEL=generic] [compute-sanitizer --tool racecheck] python -m benchmarks.cuda_short

Prints each case before it runs, so that a kernel that hangs is known by the last line.
"""

import sys
import traceback
from typing import Any

import numpy as np
import torch

from attribution import cuda_library, similarity

FIELDS = ("ids", "scores", "influence", "support", "support_mass", "remainder")
# Queries, rows, dim, type. The Hopper kernel keeps the 3 resident, walks with the 70 alone and with the 130
# in clusters of two; rows of 33 halves lie at no multiple of 16 bytes: the generic kernel's in any case. More
# rows than a first chunk has, which needs no cut.
CASES = (
    (3, 5003, 1000, torch.bfloat16), (70, 4500, 712, torch.float16), (130, 4300, 520, torch.float32),
    (5, 4200, 33, torch.float16),
)  # fmt: skip
CALIBRATIONS = (("narrow", 3.0, -0.2), ("wide", 0.01, -0.5), ("plain softmax", 0.2, 0.0))


def check_case(count: int, rows: int, dim: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((count, dim), np.float32)
    gallery = torch.from_numpy(rng.standard_normal((rows, dim), np.float32)).to(dtype)
    gallery[::97] = gallery[0]
    on_device = gallery.cuda()
    for name, inv_tau, b in CALIBRATIONS:
        arguments: dict[str, Any] = {"k": 7, "inv_tau": inv_tau, "b": b}
        want = similarity.attribute(queries, gallery, impl="cpu", **arguments)
        coded = similarity.compress(on_device)
        for where, place in (("resident", on_device), ("streamed", gallery), ("with codes", coded)):
            print(f"  {name}, {where}", flush=True)
            got = similarity.attribute(queries, place, impl="cuda", **arguments)
            for field in FIELDS:
                np.testing.assert_array_equal(getattr(got, field), getattr(want, field), err_msg=field)
    print("  canonical scores", flush=True)
    scores = similarity.canonical_scores(queries, on_device, want.ids, impl="cuda")
    np.testing.assert_array_equal(scores, want.scores)
    print("  counts", flush=True)
    levels = want.scores[:, ::3].astype(np.float64)
    counts = [
        similarity.count_larger(queries, place, levels, impl=impl)
        for place, impl in ((gallery, "cpu"), (on_device, "cuda"))
    ]
    np.testing.assert_array_equal(counts[0], counts[1])


def main() -> None:
    failed = 0
    for case in CASES:
        print(*case, f"({cuda_library.kernel_allowed()} allowed)", flush=True)
        try:
            check_case(*case)
        except Exception:
            traceback.print_exc(limit=-3)
            failed += 1
    print(f"the same bits on both in {len(CASES) - failed} of {len(CASES)} cases")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
