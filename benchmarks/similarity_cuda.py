"""Exact attribution on a GPU against what others offer and the device's own limits: a table and a JSON file.

    python -m benchmarks.similarity_cuda [--rows 10000000] [--queries 1 64 1024] [--k 100]
                                         [--only values codes peers] [--seconds 240]

Times are medians of CUDA events around warm calls on random unit vectors that exceed the L2 cache many times
over. The floor of a case is the time to read the gallery once at the bandwidth that a copy reaches in this
run, or to multiply at the rate that cuBLAS reaches in this run, whichever is longer; with codes, less is read
and multiplied than that. The rate is of twenty products. A device that multiplies for longer than a moment
draws all the power it may and slows down: hence a second floor, at the rate that cuBLAS sustains. Where a
call's time goes, kernel by kernel, is told by PyTorch's profiler. Streamed galleries lie in host memory;
their limit is a copy from pinned memory. Nothing is written for cases that the time did not suffice for.
"""

import argparse
import functools
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attribution import cuda_call, cuda_library, cuda_walk, similarity, similarity_cuda
from benchmarks.similarity_cuda_peers import peers

INV_TAU, B = 100.0, -0.04  # some tens to hundreds of rows of 10 million random ones have weight


def unit_rows(rows: int, dim: int, seed: int) -> torch.Tensor:
    """Random unit vectors in bfloat16, made piecewise on the device."""
    generator = torch.Generator("cuda").manual_seed(seed)
    made = torch.empty((rows, dim), dtype=torch.bfloat16, device="cuda")
    for first in range(0, rows, 500_000):
        some = torch.randn((min(500_000, rows - first), dim), generator=generator, device="cuda")
        made[first : first + len(some)] = torch.nn.functional.normalize(some, dim=1)
    return made


def median_ms(run: Callable[[], Any], most_seconds: float = float("inf")) -> dict[str, Any]:
    """The median time of a warm call, by CUDA events; of 20, or of 5 and more where they take too long."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    times: list[float] = []
    start = time.monotonic()
    while len(times) < 20 and (len(times) < 5 or time.monotonic() - start < most_seconds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return {"ms": statistics.median(times), "least_ms": min(times), "calls": len(times)}


def kernel_ms(run: Callable[[], Any]) -> dict[str, list[float]]:
    """Of one warm call: the launches of each kernel, and their milliseconds together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    spent: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = re.sub(r"^void |\(anonymous namespace\)::|attribution::cuda::|\(.*", "", event.name)
            launches, ms = spent.get(name, (0, 0.0))
            spent[name] = [launches + 1, ms + event.device_time / 1e3]
    return dict(sorted(spent.items(), key=lambda item: -item[1][1])[:8])


def ceilings() -> dict[str, float]:
    """What this device does at best.

    Bytes per second of a copy, read and written; FLOP/s of cuBLAS for a moment, and for seconds.
    """
    here = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    there = torch.empty_like(here)
    copy_ms = median_ms(functools.partial(there.copy_, here))["ms"]
    square = torch.randn((8192, 8192), device="cuda").bfloat16()
    matmul_ms = median_ms(lambda: square @ square)["ms"]
    product = torch.empty_like(square)

    def many() -> None:
        for _ in range(100):
            torch.mm(square, square, out=product)

    many_ms = median_ms(many, 1)["ms"] / 100
    return {
        "copy_bytes_per_s": 2 * (4 << 30) / copy_ms * 1e3,
        "bf16_flop_per_s": 2 * 8192**3 / matmul_ms * 1e3,
        "bf16_flop_per_s_sustained": 2 * 8192**3 / many_ms * 1e3,
    }


def streamed(gallery: torch.Tensor, queries: torch.Tensor, counts: list[int], k: int) -> dict[str, Any]:
    """A gallery in host memory, in wall time, beside the pace of a copy from pinned memory to the device."""
    host = torch.empty(gallery.shape, dtype=gallery.dtype)
    for to, some in zip(host.split(500_000), gallery.split(500_000), strict=True):
        to.copy_(some)
    size = host.numel() * host.element_size()
    pinned = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    link = (1 << 30) / median_ms(lambda: there.copy_(pinned, non_blocking=True))["ms"] * 1e3
    found: dict[str, Any] = {"rows": len(host), "bytes": size, "link_bytes_per_s": link, "cases": []}
    for count in counts:
        some = queries[:count].cpu().numpy()
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            similarity.attribute(some, host, impl="cuda", k=k, inv_tau=INV_TAU, b=B)
            seconds.append(time.perf_counter() - start)
        pace = size / statistics.median(seconds[1:])
        row = {"queries": count, "k": k, "all_seconds": seconds, "fraction_of_link": pace / link}
        found["cases"].append(row)
        print(f"streamed, {count} queries: {pace / 1e9:.1f} of {link / 1e9:.1f} GB/s", flush=True)
    return found


def in_batches(queries: torch.Tensor, run: Callable[[torch.Tensor], Any]) -> Callable[[], Any]:
    size = cuda_call.QUERY_BATCH
    return lambda: [run(queries[first : first + size]) for first in range(0, len(queries), size)]


@dataclass
class Case:
    """So many queries and neighbours, what a device could do at best, and what was measured."""

    gallery: torch.Tensor
    places: dict[str, similarity_cuda.Gallery]  # with values alone, and with codes
    queries: torch.Tensor
    k: int
    limits: dict[str, float]
    ids: torch.Tensor | None = None  # as we find them
    rows: list[dict[str, Any]] = field(default_factory=list)

    def measure(
        self, methods: dict[str, Callable[[], Any]], deadline: float, most_seconds: float, **more: Any
    ) -> None:
        rows, dim = self.gallery.shape
        shape = {"rows": rows, "dim": dim, "queries": len(self.queries), "k": self.k}
        print(f"{rows} x {dim}, {len(self.queries)} queries, k = {self.k}", flush=True)
        memory_ms = self.gallery.numel() * 2 / self.limits["copy_bytes_per_s"] * 1e3
        arithmetic_ms = 2 * rows * dim * len(self.queries) / self.limits["bf16_flop_per_s"] * 1e3
        floor_ms = max(memory_ms, arithmetic_ms)
        slower = self.limits["bf16_flop_per_s"] / self.limits["bf16_flop_per_s_sustained"]
        sustained_ms = max(memory_ms, arithmetic_ms * slower)
        for name, run in methods.items():
            if time.monotonic() > deadline:
                print(f"  {name:28s} left out: the time is up", flush=True)
                continue
            row: dict[str, Any] = {"method": name, **shape, **more, "floor_ms": floor_ms}
            try:
                row["agreement"] = agreement(self.ids, run(), name)
                row |= median_ms(run, most_seconds)
                row["fraction_of_floor"] = floor_ms / row["ms"]
                row["fraction_of_sustained"] = sustained_ms / row["ms"]
                outcome = (
                    f"{row['ms']:9.3f} ms ({row['fraction_of_floor']:.2f} of the floor, "
                    f"{row['fraction_of_sustained']:.2f} of the sustained)"
                )
            except Exception as error:  # a peer that cannot run here is a result too
                row["failure"] = outcome = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            self.rows.append(row)
            print(f"  {name:28s} {outcome}", flush=True)

    def measure_ours(self, kind: str, deadline: float) -> None:
        place, name = self.places[kind], "ours" if kind == "values" else "ours, with codes"
        settings: dict[str, Any] = {"k": self.k, "inv_tau": INV_TAU, "b": B}
        found = in_batches(self.queries, lambda some: similarity_cuda.enqueue(some, place, **settings))
        found()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        answers = found()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        outputs = sum(
            tensor.numel() * tensor.element_size()
            for answer in answers
            for tensor in vars(answer).values()
            if isinstance(tensor, torch.Tensor)
        )
        unsettled = int(sum((~answer.settled()).sum() for answer in answers))
        self.ids = torch.cat([answer.ids for answer in answers])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = found()
        try:
            spent = kernel_ms(found)
        except Exception as error:  # no right to ask, perhaps
            spent = {f"{type(error).__name__}: {error}": [0, 0.0]}
        print(json.dumps({"queries": len(self.queries), "kernels": spent}), flush=True)
        methods: dict[str, Callable[[], Any]] = {
            name: found,
            f"{name}, as a graph": graph.replay,
            f"{name}, from and to numpy": lambda: similarity_cuda.attribute(self.queries, place, **settings),
        }
        self.measure(
            methods, deadline, float("inf"),
            kernel=cuda_library.kernel_allowed(), unsettled_queries=unsettled, peak_bytes=peak - outputs,
            kernels=spent, operand=cuda_walk.coded_operand(place, len(self.queries), self.k) or place.storage,
        )  # fmt: skip
        del held

    def measure_peers(self, deadline: float) -> None:
        self.measure(peers(self.gallery, self.queries, self.k, INV_TAU, B), deadline, 6)


def agreement(ids: torch.Tensor | None, found: Any, name: str) -> float | None:
    """The share of our neighbours that a method finds as well; None for those that return no ids as such."""
    if ids is None or not isinstance(found, tuple) or not isinstance(found[0], torch.Tensor):
        return None
    theirs = found[0]
    some = range(0, len(ids), max(1, len(ids) // 16))
    shares = [torch.isin(ids[q], theirs[q]).float().mean().item() for q in some]
    share = statistics.mean(shares)
    if share < 0.9:
        raise RuntimeError(f"{name}: finds {share:.2f} of our neighbours only")
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 64, 1024, 4096, 16, 256])
    parser.add_argument("--k", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--seconds", type=float, default=240, help="start nothing new after this long")
    parser.add_argument("--streamed-rows", type=int, default=4_000_000)
    parts = ("streamed", "values", "codes", "peers")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="leave the others out")
    results = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    parser.add_argument("--output", type=Path, default=results / "similarity_cuda.json")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    properties = torch.cuda.get_device_properties(0)
    result: dict[str, Any] = {
        "machine": {
            "device": properties.name, "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory, "l2_bytes": properties.L2_cache_size,
            "torch": torch.__version__, "cuda": torch.version.cuda, "system": platform.system(),
        },
        "inv_tau": INV_TAU, "b": B, "ceilings": ceilings(), "cases": [], "failures": [],
    }  # fmt: skip
    print(json.dumps(result["machine"] | result["ceilings"], indent=1), flush=True)
    torch.cuda.empty_cache()
    gallery = unit_rows(options.rows, options.dim, 0)
    queries = unit_rows(max(options.queries), options.dim, 1).float()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if "streamed" in options.only:
        try:
            rows = gallery[: options.streamed_rows]
            result["streamed"] = streamed(rows, queries, [1, 64, 1024], options.k[0])
        except Exception as error:
            print(f"  streamed: {type(error).__name__}: {error}", flush=True)
            result["failures"].append(f"streamed: {error}")
    places = {"values": similarity_cuda.Gallery(gallery)}
    if "codes" in options.only:
        began = time.perf_counter()
        places["codes"] = places["values"].compressed()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        held = places["codes"].coded
        result["codes"] = {"seconds_to_make": seconds, "bytes": held.nbytes if held else 0}
        print(json.dumps(result["codes"]), flush=True)
    cases = [
        Case(gallery, places, queries[:count], k, result["ceilings"])
        for k in options.k
        for count in options.queries
    ]
    # Ours first: the time may not suffice for all of the others.
    for part in [one for one in parts[1:] if one in options.only]:
        for case in cases:
            try:
                if part == "peers":
                    case.measure_peers(deadline)
                else:
                    case.measure_ours(part, deadline)
            except Exception as error:
                print(f"  {type(error).__name__}: {error}", flush=True)
                result["failures"].append(f"{len(case.queries)} queries, k = {case.k}: {error}")
            result["cases"] = [row for some in cases for row in some.rows]
            options.output.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    if result["failures"] or any("failure" in row for row in result["cases"] if "kernel" in row):
        sys.exit(1)


if __name__ == "__main__":
    main()
