"""Exact retrieval against what others offer, interleaved: a table, a JSON file and a roofline plot.

    uv run --group benchmarks python -m benchmarks.similarity [--rows 500000] [--dims 512] [--queries 1 32]

Each figure is the least of several attempts: wall time, and processor time of all threads, which other
processes disturb less. Beside it stands the fraction of this machine's own limit: the time to read the
gallery once, or to do its multiply-adds at peak, whichever is longer. preparation_seconds is what a method
did to the float32 gallery before the first query.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from attribution import similarity
from benchmarks import ceilings
from benchmarks.similarity_methods import Method, Search, methods

RESULTS = Path(__file__).parent / "results"


def unit_rows(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Random unit vectors, float32, made piecewise so that they fit where float64 copies would not."""
    made = np.empty((rows, dim), np.float32)
    for first in range(0, rows, 100_000):
        some = rng.standard_normal((min(100_000, rows - first), dim), np.float32)
        made[first : first + 100_000] = some / np.linalg.norm(some, axis=1, keepdims=True)
    return made


def fraction_of_limit(
    method: Method, limits: ceilings.Ceilings, shape: tuple[int, int, int], row: dict
) -> dict:
    """The limit divided by the time taken, by the clock on the wall and by that of the processors."""
    rows, dim, queries = shape
    gigabytes = rows * dim * method.bytes_per_value / 1e9
    peaks = {"float32": limits.float32_gmacs, "bfloat16": limits.bfloat16_gmacs, "int8": limits.int8_gmacs}
    peak = peaks[method.arithmetic] or limits.float32_gmacs
    arithmetic = rows * dim * queries / 1e9 / peak if peak else 0.0
    memory, memory_all = gigabytes / limits.read_gb, gigabytes / limits.read_gb_all_threads
    return {
        "bound": "memory" if memory_all > arithmetic / limits.threads else "arithmetic",
        "fraction_wall": max(memory_all, arithmetic / limits.threads) / row["wall_seconds"],
        "fraction_processor": max(memory, arithmetic) / row["processor_seconds"],
    }


def timed(search: Search, queries: np.ndarray, k: int) -> tuple[float, float, np.ndarray]:
    wall, processor = time.perf_counter(), time.process_time()
    ids = search(queries, k)
    return time.perf_counter() - wall, time.process_time() - processor, ids


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One row per method, dim, number of queries and k."""
    rng = np.random.default_rng(0)
    limits = ceilings.measure(options.threads)
    rows: list[dict[str, Any]] = []
    for dim in options.dims:
        gallery, all_queries = unit_rows(rng, options.rows, dim), unit_rows(rng, max(options.queries), dim)
        chosen = [method for method in methods() if not options.only or options.only in method.name]
        searches, preparation = {}, {}
        for method in chosen:
            begin = time.perf_counter()
            searches[method.name] = method.build(gallery, options.threads)
            preparation[method.name] = time.perf_counter() - begin
        for count in options.queries:
            for k in options.k:
                shape = (options.rows, dim, count)
                found = measure_case(options, limits, chosen, searches, shape, all_queries, k)
                rows += [row | {"preparation_seconds": preparation[row["method"]]} for row in found]
    return {
        "machine": machine(),
        "ceilings": vars(limits),
        "instruction_set": similarity.load_extension().instruction_set(),
        "rows": rows,
    }


def measure_case(
    options: argparse.Namespace,
    limits: ceilings.Ceilings,
    chosen: list[Method],
    searches: dict[str, Search],
    shape: tuple[int, int, int],
    all_queries: np.ndarray,
    k: int,
) -> list[dict[str, Any]]:
    queries = all_queries[: shape[2]]
    best: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for method in chosen:
            wall, processor, ids = timed(searches[method.name], queries, k)
            row = best.setdefault(
                method.name, {"wall_seconds": wall, "processor_seconds": processor, "ids": ids}
            )
            row["wall_seconds"] = min(wall, row["wall_seconds"])
            row["processor_seconds"] = min(processor, row["processor_seconds"])
    reference = best[chosen[0].name]["ids"]
    found = []
    for method in chosen:
        row = best[method.name]
        # Rounded storage moves a few neighbours; who answers another question does not agree at all.
        agreement = np.mean(
            [len(np.intersect1d(a, b)) / k for a, b in zip(row["ids"], reference, strict=True)]
        )
        if agreement < 0.8:
            raise RuntimeError(
                f"{method.name}: agrees with {chosen[0].name} on {agreement:.2f} of the top {k} only"
            )
        case = {"method": method.name, "rows": shape[0], "dim": shape[1], "queries": shape[2], "k": k}
        times = {name: row[name] for name in ("wall_seconds", "processor_seconds")}
        extra = {"influence": method.influence, "bytes_per_value": method.bytes_per_value}
        found.append(case | times | fraction_of_limit(method, limits, shape, row) | extra)
    print_case(found)
    return found


def print_case(rows: list[dict[str, Any]]) -> None:
    stock = next((row for row in rows if row["method"] == "faiss IndexFlatIP"), None)
    print(f"\n{rows[0]['rows']} x {rows[0]['dim']}, {rows[0]['queries']} queries, k = {rows[0]['k']}")
    for row in rows:
        ratios = ""
        if stock:
            wall = stock["wall_seconds"] / row["wall_seconds"]
            processor = stock["processor_seconds"] / row["processor_seconds"]
            ratios = f"  x{wall:5.1f} x{processor:5.1f} of faiss"
        print(
            f"  {row['method']:32s} wall {row['wall_seconds'] * 1e3:9.2f} ms ({row['fraction_wall']:.2f})"
            f"  processor {row['processor_seconds'] * 1e3:9.2f} ms ({row['fraction_processor']:.2f}){ratios}",
            flush=True,
        )


def machine() -> dict[str, str]:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return {"processor": names[0] if names else platform.processor(), "system": platform.system()}


def plot(result: dict[str, Any], path: Path) -> None:
    """The roofline: multiply-adds per processor second against those per byte of the gallery."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    limits = result["ceilings"]
    figure, axes = pyplot.subplots(figsize=(9, 6))
    axes.set_prop_cycle(color=[pyplot.get_cmap("tab20")(i) for i in range(20)])
    intensity = np.geomspace(0.2, 1024, 200)
    for name in ("float32", "bfloat16", "int8"):
        if peak := limits[f"{name}_gmacs"]:
            axes.plot(
                intensity, np.minimum(intensity * limits["read_gb"], peak), label=f"limit, {name}", lw=1
            )
    names = sorted({row["method"] for row in result["rows"]})
    for name in names:
        rows = [row for row in result["rows"] if row["method"] == name]
        x = [row["queries"] / row["bytes_per_value"] for row in rows]
        y = [row["rows"] * row["dim"] * row["queries"] / row["processor_seconds"] / 1e9 for row in rows]
        axes.plot(x, y, "o" if name.startswith("ours") else "x", label=name)
    axes.set(xscale="log", yscale="log", xlabel="multiply-adds per byte of the gallery")
    axes.set_ylabel("1e9 multiply-adds per processor second, one thread's limits")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 768])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 4, 16, 32, 256, 1024])
    parser.add_argument("--k", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--threads", type=int, default=similarity.threads_allowed())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="methods whose name contains this")
    parser.add_argument("--output", type=Path, default=RESULTS / "similarity.json")
    options = parser.parse_args()
    result = run(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    plot(result, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
