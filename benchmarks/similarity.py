"""Exact retrieval against what others offer, interleaved: a table, a JSON file and a roofline plot.

    uv run --group benchmarks python -m benchmarks.similarity [--rows 500000] [--dims 512] [--queries 1 32]

Each time is the least of several attempts: on the wall, and of the processors for all threads, which other
processes disturb less. (`nice -n -20` before the command keeps them away from all methods alike; `chrt` does
not, because Linux takes 50 ms of every second from whoever has a real-time priority.) Beside it stands the
fraction of this machine's own limit: the time to read the gallery once, or to do its multiply-adds at peak,
whichever is longer; more than 1 where codes of a gallery are multiplied in place of its values. Where others
share the machine, its pace changes from moment to moment: it is measured right before and after every
attempt; the fraction is the median of what all attempts reached of it, but for those during which the pace
changed or the machine's host gave its processors to others.
Peers that are no rivals of the fastest peer are tried once, so that the others are tried more often.
preparation_seconds is what a method did to the float32 gallery before the first query.
"""

import argparse
import contextlib
import itertools
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attribution import similarity
from attribution.files import write_json
from benchmarks.ceilings import Machine, Pace
from benchmarks.processors import keep_to_quietest
from benchmarks.similarity_methods import Method, Search, methods, room

RESULTS = Path(__file__).parent / "results"


def unit_rows(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Random unit vectors, float32, made piecewise so that they fit where float64 copies would not."""
    made = room((rows, dim), np.float32)
    for first in range(0, rows, 100_000):
        some = rng.standard_normal((min(100_000, rows - first), dim), np.float32)
        made[first : first + 100_000] = some / np.linalg.norm(some, axis=1, keepdims=True)
    return made


STOCK = "faiss IndexFlatIP"  # ratios are over it
# Another peer that takes so many times as long as the fastest is tried once: no more make a rival of it.
OUTCLASSED = 3
STEADY = 0.1  # paces before and after an attempt that differ by less than this part of them
STOLEN = 0.02  # the part of its processor time that an attempt may lose to other guests of the machine


@dataclass(frozen=True)
class Attempt:
    """Seconds on the wall, of the processors, and stolen from them; the machine's pace before and after."""

    wall: float
    processor: float
    stolen: float
    before: Pace
    after: Pace

    def steady(self) -> bool:
        return self.stolen <= STOLEN * self.processor and self.before.near(self.after, STEADY)

    def limits(self, threads: int, multiply_adds: float, bytes_read: float) -> tuple[float, float, float]:
        """Seconds of the wall to multiply and to read at the faster of both paces, and of the processors."""
        pace = self.before.faster(self.after)
        multiply, read = multiply_adds / 1e9 / pace.gmacs, bytes_read / 1e9
        processor = max(multiply, read / pace.read_gb)
        return multiply / threads, read / pace.read_gb_all_threads, processor


def summary(attempts: list[Attempt], threads: int, multiply_adds: float, bytes_read: float) -> dict[str, Any]:
    """Of one method: the least times, what bounds it, and the median of limit / time taken, by either clock.

    Attempts that others disturbed count for the fractions only where there are hardly any others.
    """
    steady = [attempt for attempt in attempts if attempt.steady()]
    counted = steady if len(steady) >= 3 else attempts
    multiply, read, processor = np.array(
        [attempt.limits(threads, multiply_adds, bytes_read) for attempt in counted]
    ).T
    wall_taken = np.array([attempt.wall for attempt in counted])
    processor_taken = np.array([attempt.processor for attempt in counted])
    return {
        "wall_seconds": min(attempt.wall for attempt in attempts),
        "processor_seconds": min(attempt.processor for attempt in attempts),
        "bound": "memory" if np.median(read - multiply) > 0 else "arithmetic",
        "fraction_wall": float(np.median(np.maximum(multiply, read) / wall_taken)),
        "fraction_processor": float(np.median(processor / processor_taken)),
        "attempts": len(attempts),
        "steady_attempts": len(steady),
    }


def processor_seconds() -> float:
    """Of all threads of this process, those included that have ended.

    Of threads that run, the process's clock knows only the last tick; asking for a thread's own brings it up
    to date.
    """
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended
            time.clock_gettime(~int(task) << 3 | 6)  # as pthread_getcpuclockid names it
    return time.process_time()


def stolen_seconds() -> float:
    """Of all processors, since the machine began: what its host gave to others. 0 where nobody says."""
    try:
        fields = Path("/proc/stat").read_text().split(maxsplit=9)
    except OSError:
        return 0.0
    return int(fields[8]) / os.sysconf("SC_CLK_TCK")


def timed(search: Search, queries: np.ndarray, k: int) -> tuple[float, float, np.ndarray]:
    processor, wall = processor_seconds(), time.perf_counter()
    ids = search(queries, k)
    return time.perf_counter() - wall, processor_seconds() - processor, ids


class Case:
    """Some queries and k: the attempts of every method, in rounds."""

    def __init__(self, queries: np.ndarray, k: int, chosen: list[Method]) -> None:
        self.queries, self.k, self.chosen = queries, k, chosen
        self.attempts: dict[str, list[Attempt]] = {method.name: [] for method in chosen}
        self.rounds, self.seconds = 0, 0.0

    def progress(self, options: argparse.Namespace) -> float:
        return max(self.rounds / options.rounds, self.seconds / options.seconds)

    def round(self, limits: Machine, searches: dict[str, Search]) -> None:
        begin = time.perf_counter()
        found: dict[str, np.ndarray] = {}
        for method in self.chosen:
            if self.rounds and outclassed(method.name, self.attempts):
                continue
            keep_to_quietest(limits.threads)
            before, stolen = limits.pace(method.arithmetic), stolen_seconds()
            wall, processor, found[method.name] = timed(searches[method.name], self.queries, self.k)
            stolen, after = stolen_seconds() - stolen, limits.pace(method.arithmetic)
            self.attempts[method.name].append(Attempt(wall, processor, stolen, before, after))
        if not self.rounds:
            self.require_agreement(found)
        self.rounds += 1
        self.seconds += time.perf_counter() - begin

    def require_agreement(self, found: dict[str, np.ndarray]) -> None:
        first = self.chosen[0].name
        for name, ids in found.items():
            # Rounded storage moves a few neighbours; who answers another question does not agree at all.
            common = [len(np.intersect1d(a, b)) for a, b in zip(ids, found[first], strict=True)]
            if (agreement := np.mean(common) / self.k) < 0.8:
                raise RuntimeError(f"{name}: agrees with {first} on {agreement:.2f} of the top {self.k} only")

    def rows(self, threads: int, gallery_rows: int) -> list[dict[str, Any]]:
        """One for each method."""
        count, dim = self.queries.shape
        paces = [attempt.before for of_method in self.attempts.values() for attempt in of_method]
        case = {"rows": gallery_rows, "dim": dim, "queries": count, "k": self.k}
        for name in ("read_gb", "read_gb_all_threads"):
            case[name] = max(getattr(pace, name) for pace in paces)
        values = gallery_rows * dim
        return [
            {"method": method.name, "influence": method.influence, "bytes_per_value": per_value}
            | case
            | summary(self.attempts[method.name], threads, values * count, values * per_value)
            for method in self.chosen
            for per_value in [method.bytes_read(count)]
        ]


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per method, dim, number of queries and k: of the first dim, of the first two, and so on.

    Rounds of all cases take turns, so that no case has all of its attempts in a bad minute.
    """
    rng = np.random.default_rng(0)
    limits = Machine(options.threads)
    rows: list[dict[str, Any]] = []
    result = {
        "machine": machine(),
        "ceilings": {**limits.peaks, "threads": limits.threads},
        "instruction_set": similarity.load_extension().instruction_set(),
        "rows": rows,
    }
    for dim in options.dims:
        gallery, all_queries = unit_rows(rng, options.rows, dim), unit_rows(rng, max(options.queries), dim)
        chosen = [method for method in methods() if not options.only or options.only in method.name]
        searches, preparation = {}, {}
        for method in chosen:
            begin = time.perf_counter()
            searches[method.name] = method.build(gallery, options.threads)
            preparation[method.name] = time.perf_counter() - begin
            # Who compiles or begins threads in a first call (torch: 0.14 s) shall not seem outclassed for it.
            searches[method.name](all_queries[:1], options.k[0])
        cases = [
            Case(all_queries[:count], k, chosen) for count, k in itertools.product(options.queries, options.k)
        ]
        while (case := min(cases, key=lambda case: case.progress(options))).progress(options) < 1:
            case.round(limits, searches)
        for case in cases:
            of_case = case.rows(limits.threads, options.rows)
            rows += [row | {"preparation_seconds": preparation[row["method"]]} for row in of_case]
            print_case(of_case)
        yield result


def outclassed(name: str, attempts: dict[str, list[Attempt]]) -> bool:
    """Whether another method of others than us is so much faster that this one need not be tried again."""
    least = {other: min(attempt.wall for attempt in some) for other, some in attempts.items()}
    fastest = min((time for other, time in least.items() if not other.startswith("ours")), default=0.0)
    return name != STOCK and not name.startswith("ours") and least[name] > OUTCLASSED * fastest


def print_case(rows: list[dict[str, Any]]) -> None:
    stock = next((row for row in rows if row["method"] == STOCK), None)
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
    from matplotlib import pyplot

    limits = result["ceilings"]
    read_gb = max(row["read_gb"] for row in result["rows"])
    figure, axes = pyplot.subplots(figsize=(11, 6))
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
    sizes = " and ".join(str(dim) for dim in sorted({row["dim"] for row in result["rows"]}))
    axes.set_title(f"{result['rows'][0]['rows']:,} rows of {sizes}, every k", fontsize=10)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 768])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 4, 16, 32, 256, 1024])
    parser.add_argument("--k", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--threads", type=int, default=similarity.threads_allowed())
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--seconds", type=float, default=20, help="after so many of its own a case begins no round"
    )
    parser.add_argument("--only", help="methods whose name contains this")
    parser.add_argument("--output", type=Path, default=RESULTS / "similarity.json")
    options = parser.parse_args()
    for result in run(options):
        write_json(options.output, result)
        plot(result, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
