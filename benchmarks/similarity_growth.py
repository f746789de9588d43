"""How retrieval grows: time and memory against the gallery and the queries, and the ranks of an evaluation.

    uv run python -m benchmarks.similarity_growth [--largest 10000000] [--folder build/gallery]

Galleries are float16 memory maps of random unit vectors, dim 768, opened in shards. Time and memory should be
straight lines, memory a flat one. A few queries also ask the compressed gallery, whose codes are in memory.
The largest is also attributed from a cold page cache, beside a plain sequential read of the same files. The
evaluation ranks one exemplar of each query among a million distractors by counting, and as one would without:
join, multiply, sort.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from attribution import similarity
from benchmarks.similarity import RESULTS, machine, processor_seconds, unit_rows

DIM, SHARD_ROWS = 768, 250_000
SETTINGS: dict[str, Any] = {"k": 100, "inv_tau": 50.0, "b": -0.1}


def write_gallery(folder: Path, rows: int) -> None:
    """Shards of float16 unit vectors, as a feature set has them; shards that exist are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(-(-rows // SHARD_ROWS)):
        path = folder / f"{shard:05d}.npy"
        if not path.exists():
            values = unit_rows(np.random.default_rng(shard), SHARD_ROWS, DIM).astype(np.float16)
            np.save(path.with_suffix(".part.npy"), values)
            path.with_suffix(".part.npy").rename(path)


def open_gallery(folder: Path, rows: int) -> list[np.ndarray]:
    shards = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("[0-9]*.npy"))]
    bounds = range(0, rows, SHARD_ROWS)
    return [shard[: rows - begin] for shard, begin in zip(shards, bounds, strict=False)]


def private_megabytes() -> float:
    """Memory of this process that is no file: what the page cache holds for it does not count."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon"))


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Yields a list of one number: the most private megabytes seen inside beyond those at the start."""
    before, peak, ended = private_megabytes(), [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            peak[0] = max(peak[0], private_megabytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def one(folder: Path, rows: int, count: int, compressed: bool) -> dict[str, Any]:
    """Time and memory of one size; run in a process of its own, so that peaks do not add up."""
    queries = unit_rows(np.random.default_rng(99), count, DIM)
    gallery: Any = open_gallery(folder, rows)
    similarity.attribute(queries[:1], gallery[0][:1000], **SETTINGS)
    begin, codes = time.perf_counter(), {}
    if compressed:
        gallery = similarity.compress(gallery)
        codes = {"compress_seconds": time.perf_counter() - begin, "codes_gigabytes": gallery.nbytes / 1e9}
    attempts = []
    with peak_memory() as peak:
        for _ in range(3):
            processor, wall = processor_seconds(), time.perf_counter()
            similarity.attribute(queries, gallery, **SETTINGS)
            attempts.append((time.perf_counter() - wall, processor_seconds() - processor))
    return {
        "rows": rows,
        "queries": count,
        "compressed": compressed,
        **codes,
        "wall_seconds": min(wall for wall, _ in attempts),
        "processor_seconds": min(processor for _, processor in attempts),
        "private_megabytes_more": peak[0],
    }


def forget(folder: Path) -> None:
    """Asks the kernel to drop the gallery from its page cache."""
    os.sync()
    for path in folder.glob("[0-9]*.npy"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold(folder: Path, rows: int) -> dict[str, Any]:
    """Seconds to attribute 32 queries from disk, and to do no more than read the files in order."""
    files = sorted(folder.glob("[0-9]*.npy"))[: -(-rows // SHARD_ROWS)]
    buffer = bytearray(8 << 20)
    forget(folder)
    begin = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    read = time.perf_counter() - begin
    forget(folder)
    queries = unit_rows(np.random.default_rng(99), 32, DIM)
    begin = time.perf_counter()
    with peak_memory() as peak:
        similarity.attribute(queries, open_gallery(folder, rows), **SETTINGS)
    return {
        "rows": rows,
        "queries": len(queries),
        "gigabytes": sum(path.stat().st_size for path in files) / 1e9,
        "read_seconds": read,
        "attribute_seconds": time.perf_counter() - begin,
        "private_megabytes_more": peak[0],
    }


def evaluation(rows: int, count: int) -> dict[str, Any]:
    """Ranks of one exemplar per query among the distractors, both ways; the ranks must agree."""
    rng = np.random.default_rng(7)
    distractors, queries = unit_rows(rng, rows, DIM), unit_rows(rng, count, DIM)
    exemplars = unit_rows(rng, count, DIM)
    exemplars = exemplars + queries * rng.uniform(0.05, 0.3, (count, 1)).astype(np.float32)
    exemplars /= np.linalg.norm(exemplars, axis=1, keepdims=True)
    begin = time.perf_counter()
    levels = similarity.canonical_scores(queries, exemplars, np.arange(count)[:, None])
    ranks = 1 + similarity.count_larger(queries, distractors, levels)[:, 0]
    counted = (time.perf_counter() - begin) / count
    sample = min(8, count)
    begin = time.perf_counter()
    sorted_ranks = []
    for q in range(sample):
        scores = np.concatenate([distractors, exemplars[q : q + 1]]) @ queries[q]
        sorted_ranks.append(1 + int(np.flatnonzero(np.argsort(-scores) == rows)[0]))
    joined = (time.perf_counter() - begin) / sample
    return {
        "rows": rows,
        "queries": count,
        "counted_seconds_per_query": counted,
        "sorted_seconds_per_query": joined,
        "times_faster": joined / counted,
        "largest_rank_difference": int(np.abs(ranks[:sample] - sorted_ranks).max()),
    }


def plot(cases: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for count, compressed in sorted({(case["queries"], case["compressed"]) for case in cases}):
        some = [case for case in cases if (case["queries"], case["compressed"]) == (count, compressed)]
        label = f"{count} queries" + ", compressed" * compressed
        left.plot([c["rows"] for c in some], [c["wall_seconds"] for c in some], "o-", label=label)
        right.plot([c["rows"] for c in some], [c["private_megabytes_more"] for c in some], "o-")
    left.set(xscale="log", yscale="log", xlabel="gallery rows", ylabel="seconds")
    right.set(xscale="log", xlabel="gallery rows", ylabel="MB beyond the page cache", ylim=(0, None))
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--folder", type=Path, default=Path("build/gallery"))
    parser.add_argument("--output", type=Path, default=RESULTS / "similarity_growth.json")
    parser.add_argument("--one", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        rows, count, compressed = options.one
        print(json.dumps(one(options.folder, rows, count, bool(compressed))))
        return
    write_gallery(options.folder, options.largest)
    cases = []
    for rows in (n for n in (10_000, 100_000, 1_000_000, 10_000_000) if n <= options.largest):
        for count, compressed in [*((count, 0) for count in options.queries), (1, 1), (4, 1)]:
            command = [sys.executable, "-m", "benchmarks.similarity_growth", "--folder", options.folder]
            case = [str(number) for number in (rows, count, compressed)]
            done = subprocess.run([*command, "--one", *case], check=True, capture_output=True, text=True)
            cases.append(json.loads(done.stdout))
            print(cases[-1], flush=True)
    from_disk = cold(options.folder, options.largest)
    print(from_disk)
    ranks = evaluation(min(options.largest, 1_000_000), 256)
    print(ranks)
    result = {"machine": machine(), "cases": cases, "cold": from_disk, "evaluation": ranks}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    plot(cases, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
