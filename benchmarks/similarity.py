"""Exact retrieval against what others offer, interleaved: a table, a JSON file and a roofline plot.

    uv run --group benchmarks python -m benchmarks.similarity [--rows 500000] [--dims 512] [--queries 1 32]

Each figure is the least of several attempts: wall time, and processor time of all threads, which other
processes disturb less (`chrt -f 10` before the command keeps them away from all methods alike). Beside it
stands the fraction of this machine's own limit: the time to read the gallery once, or to do its multiply-adds
at peak, whichever is longer. Where others share the memory, its pace changes by the minute: it is measured in
every round, between the methods. preparation_seconds is what a method did to the float32 gallery before the
first query.
"""

import argparse
import itertools
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from attribution import similarity
from benchmarks.ceilings import Machine
from benchmarks.similarity_methods import Method, Search, methods, room

RESULTS = Path(__file__).parent / "results"


def unit_rows(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Random unit vectors, float32, made piecewise so that they fit where float64 copies would not."""
    made = room((rows, dim), np.float32)
    for first in range(0, rows, 100_000):
        some = rng.standard_normal((min(100_000, rows - first), dim), np.float32)
        made[first : first + 100_000] = some / np.linalg.norm(some, axis=1, keepdims=True)
    return made


def fraction_of_limit(method: Method, limits: dict[str, float], threads: int, row: dict) -> dict:
    """The limit divided by the time taken, by the clock on the wall and by that of the processors."""
    gigabytes = row["rows"] * row["dim"] * row["bytes_per_value"] / 1e9
    peak = limits[f"{method.arithmetic}_gmacs"] or limits["float32_gmacs"]
    arithmetic = row["rows"] * row["dim"] * row["queries"] / 1e9 / peak if peak else 0.0
    memory, memory_all = gigabytes / row["read_gb"], gigabytes / row["read_gb_all_threads"]
    return {
        "bound": "memory" if memory_all > arithmetic / threads else "arithmetic",
        "fraction_wall": max(memory_all, arithmetic / threads) / row["wall_seconds"],
        "fraction_processor": max(memory, arithmetic) / row["processor_seconds"],
    }


def timed(search: Search, queries: np.ndarray, k: int) -> tuple[float, float, np.ndarray]:
    wall, processor = time.perf_counter(), time.process_time()
    ids = search(queries, k)
    return time.perf_counter() - wall, time.process_time() - processor, ids


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One row per method, dim, number of queries and k."""
    rng = np.random.default_rng(0)
    limits = Machine(options.threads)
    peaks = limits.arithmetic()
    rows: list[dict[str, Any]] = []
    for dim in options.dims:
        gallery, all_queries = unit_rows(rng, options.rows, dim), unit_rows(rng, max(options.queries), dim)
        chosen = [method for method in methods() if not options.only or options.only in method.name]
        searches, preparation = {}, {}
        for method in chosen:
            begin = time.perf_counter()
            searches[method.name] = method.build(gallery, options.threads)
            preparation[method.name] = time.perf_counter() - begin
        for count, k in itertools.product(options.queries, options.k):
            case = {"rows": options.rows, "dim": dim, "queries": count, "k": k}
            found, reading = measure_case(options, limits, chosen, searches, all_queries[:count], k)
            for method in chosen:
                row = found[method.name] | case | reading
                row |= {"influence": method.influence, "bytes_per_value": method.bytes_read(count)}
                row |= {"method": method.name, "preparation_seconds": preparation[method.name]}
                rows.append(row | fraction_of_limit(method, peaks, limits.threads, row))
            print_case(rows[-len(chosen) :])
    return {
        "machine": machine(),
        "ceilings": {**peaks, "threads": limits.threads},
        "instruction_set": similarity.load_extension().instruction_set(),
        "rows": rows,
    }


def measure_case(
    options: argparse.Namespace,
    limits: Machine,
    chosen: list[Method],
    searches: dict[str, Search],
    queries: np.ndarray,
    k: int,
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """The least times of each method, and the best that reading memory came to meanwhile."""
    best: dict[str, dict[str, float]] = {}
    found: dict[str, np.ndarray] = {}
    readings = []
    end = time.perf_counter() + options.seconds
    for done in range(options.rounds):
        if done and time.perf_counter() > end:
            break
        for method in chosen:
            readings.append(limits.reading())
            wall, processor, found[method.name] = timed(searches[method.name], queries, k)
            row = best.setdefault(method.name, {"wall_seconds": wall, "processor_seconds": processor})
            row["wall_seconds"] = min(wall, row["wall_seconds"])
            row["processor_seconds"] = min(processor, row["processor_seconds"])
    reference = found[chosen[0].name]
    for name, ids in found.items():
        # Rounded storage moves a few neighbours; who answers another question does not agree at all.
        agreement = np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(ids, reference, strict=True)])
        if agreement < 0.8:
            raise RuntimeError(f"{name}: agrees with {chosen[0].name} on {agreement:.2f} of the top {k} only")
    one, several = np.max(readings, axis=0)
    return best, {"read_gb": float(one), "read_gb_all_threads": float(several)}


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
    read_gb = max(row["read_gb"] for row in result["rows"])
    figure, axes = pyplot.subplots(figsize=(9, 6))
    axes.set_prop_cycle(color=[pyplot.get_cmap("tab20")(i) for i in range(20)])
    intensity = np.geomspace(0.2, 1024, 200)
    for name in ("float32", "bfloat16", "int8"):
        if peak := limits[f"{name}_gmacs"]:
            axes.plot(intensity, np.minimum(intensity * read_gb, peak), label=f"limit, {name}", lw=1)
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
    parser.add_argument("--seconds", type=float, default=20, help="after so many a case begins no round")
    parser.add_argument("--only", help="methods whose name contains this")
    parser.add_argument("--output", type=Path, default=RESULTS / "similarity.json")
    options = parser.parse_args()
    result = run(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    plot(result, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
