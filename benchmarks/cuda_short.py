"""Every CUDA kernel once, on little data, against the CPU: what compute-sanitizer watches.

compute-sanitizer --tool racecheck python -m benchmarks.cuda_short
"""

from typing import Any

import numpy as np
import torch

from attribution import similarity

FIELDS = ("ids", "scores", "influence", "support", "support_mass", "remainder")


def main() -> None:
    rng = np.random.default_rng(0)
    for count, rows, dim, dtype in (
        (3, 5003, 72, torch.bfloat16), (70, 1500, 64, torch.float16), (130, 1100, 40, torch.float32),
        (5, 900, 33, torch.float16),
    ):  # fmt: skip
        queries = rng.standard_normal((count, dim), np.float32)
        gallery = torch.from_numpy(rng.standard_normal((rows, dim), np.float32)).to(dtype)
        gallery[::97] = gallery[0]
        on_device = gallery.cuda()  # odd rows lie at no multiple of 16 bytes
        for inv_tau, b in ((3.0, -0.2), (0.01, -0.5), (0.2, 0.0)):
            arguments: dict[str, Any] = {"k": 7, "inv_tau": inv_tau, "b": b}
            want = similarity.attribute(queries, gallery, impl="cpu", **arguments)
            for place in (on_device, gallery):
                got = similarity.attribute(queries, place, impl="cuda", **arguments)
                for field in FIELDS:
                    np.testing.assert_array_equal(getattr(got, field), getattr(want, field), err_msg=field)
        levels = want.scores[:, ::3].astype(np.float64)
        counts = [
            similarity.count_larger(queries, place, levels, impl=impl)
            for place, impl in ((gallery, "cpu"), (on_device, "cuda"))
        ]
        np.testing.assert_array_equal(counts[0], counts[1])
    print("the same bits on both")


if __name__ == "__main__":
    main()
