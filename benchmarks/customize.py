"""Customized concepts per minute, several in one batch against one at a time.

`python -m benchmarks.customize [--concepts 8] [--repeats 3] [--method lora]`, from the repository's root:
trains the first concepts of data/world/exemplars.parquet with the parameters of params.yaml, in batches of 1,
2, 4 and so on. The views and prior images are made beforehand: they cost the same either way. Prints a table
and writes benchmarks/results/customize.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from attribution.base_model import BaseSettings, Pipeline, load_base
from attribution.concepts import read_concepts
from attribution.customization import METHODS
from attribution.files import write_json
from attribution.lessons import Lesson, train
from attribution.params import load_params
from attribution.training_settings import TrainingSettings
from benchmarks.rates import machine
from stages.incremental import chunks
from stages.lesson_plan import Params, prepare


def seconds_per_concept(
    pipe: Pipeline,
    params: Params,
    settings: TrainingSettings,
    lessons: Sequence[Lesson],
    concepts_per_batch: int,
) -> tuple[float, float]:
    """Wall time and processor time of training all lessons in batches of this size, over their number."""
    start, cpu_start = time.perf_counter(), time.process_time()
    for group in chunks(lessons, concepts_per_batch):
        train(pipe, group, settings, method=params.method, seed=params.seed)
    return (time.perf_counter() - start) / len(lessons), (time.process_time() - cpu_start) / len(lessons)


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--concepts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--method", choices=METHODS, help="other than params.yaml's")
    parser.add_argument("--steps", type=int, help="other than params.yaml's")
    parser.add_argument("--base", help="another folder or hub id than params.yaml's")
    parser.add_argument("--exemplars", type=Path, default=Path("data/world/exemplars.parquet"))
    options = parser.parse_args()
    params, base = load_params(Params, "customize"), load_params(BaseSettings, "base")
    if options.method:
        params = replace(params, method=options.method)
    settings = params.settings
    if options.steps:
        settings = replace(settings, steps=options.steps)
    if options.base:
        base = replace(base, model=options.base)
    pipe = load_base(base)
    concepts = read_concepts(options.exemplars)[: options.concepts]
    with tempfile.TemporaryDirectory() as priors:
        lessons = [prepare(pipe, params, concept, Path(priors)) for concept in concepts]
    sizes = [2**power for power in range(len(lessons).bit_length()) if 2**power <= len(lessons)]
    train(pipe, lessons[:1], replace(settings, steps=2), method=params.method, seed=params.seed)
    found: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    # Sizes take turns, so that whatever else the machine does falls on all of them.
    for _ in range(options.repeats):
        for size in sizes:
            found[size].append(seconds_per_concept(pipe, params, settings, lessons, size))
    rows = []
    for size in sizes:
        seconds = statistics.median(wall for wall, _ in found[size])
        rows.append(
            {
                "concepts_per_batch": size,
                "seconds_per_concept": round(seconds, 3),
                "concepts_per_minute": round(60 / seconds, 1),
                "speedup": round(statistics.median(wall for wall, _ in found[1]) / seconds, 2),
                "all_seconds_per_concept": [round(wall, 3) for wall, _ in found[size]],
                # On a machine that is shared, this is what can be compared.
                "all_cpu_seconds_per_concept": [round(cpu, 3) for _, cpu in found[size]],
            }
        )
    report = {
        "machine": machine(),
        "torch": torch.__version__,
        "base": base.model,
        "concepts": len(lessons),
        "method": params.method,
        "training": vars(settings),
        "rows": rows,
    }
    print(f"{report['machine']}: {params.method}, {settings.steps} steps, {len(lessons)} concepts")
    print("concepts in a batch   s per concept   concepts per minute   speed-up")
    for row in rows:
        print(
            "{concepts_per_batch:19}{seconds_per_concept:16}{concepts_per_minute:22}{speedup:11}".format(
                **row
            )
        )
    write_json(Path("benchmarks/results/customize.json"), report)


if __name__ == "__main__":
    main()
