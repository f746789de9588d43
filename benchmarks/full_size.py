"""Customization at full size: concepts in one batch, against one at a time as diffusers' example script does.

`python -m benchmarks.full_size [--family sd15] [--dtype float16] [--concepts 1 2 4 8 16]`, from the root, on
whatever device there is. The pipeline has the true shapes and random weights (benchmarks.full_shapes): time
and memory do not depend on their values. Steps are timed one by one; concepts an hour are computed from the
median step, the steps and views of worlds/full/params.yaml, and the time to encode a view. What both sides
need alike is left out: the base's own images, loading pictures, writing the result. The peak of memory stands
beside what benchmarks.full_memory computes. Prints a table and writes
benchmarks/results/full_size_<family>.json; on CUDA the rate also goes to the cost sheet (benchmarks.rates).
`--small` shrinks all widths to try the code; `--pixels 256` asks less of a small machine.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attribution.base_model import Pipeline, decode_latents, encode_images, find_device
from attribution.conditioning import token_ids
from attribution.files import write_json
from attribution.lessons import Lesson, train
from attribution.memory import is_out_of_memory
from attribution.params import load_params
from attribution.sampling import Drawing, base_stack, draw_latents
from attribution.training_settings import TrainingSettings
from benchmarks.example_loop import Example, train_example
from benchmarks.full_memory import step_memory
from benchmarks.full_shapes import build
from benchmarks.rates import Rate, machine, record
from stages import customize, synthesize

WORLD = Path("worlds/full/params.yaml")
WARM_UP = 2
OURS = "one batch"


@dataclass(frozen=True)
class Work:
    """What a concept takes, as the full world sets it."""

    training: TrainingSettings
    views: int
    pixels: int


def clock(device: torch.device) -> float:
    """Seconds, after all that the device was asked to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak_bytes(device: torch.device) -> int:
    """The most memory used: of the device since it was asked to forget, or of this process ever."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_seconds(
    device: torch.device, run: Callable[[int, Callable[[], object]], object], steps: int
) -> list:
    """The time of each of `steps` steps of `run(steps, on_step)`, after those that warm up."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    run(steps + WARM_UP + 1, lambda: times.append(clock(device)))
    return np.diff(times)[WARM_UP:].tolist()


def lessons(pipe: Pipeline, work: Work, count: int) -> list[Lesson]:
    """Concepts of random latents; how many views there are to choose from does not change a step."""
    side = work.pixels // pipe.vae_scale_factor
    shape = (4, pipe.unet.config.in_channels, side, side)
    return [
        Lesson(
            concept_id=str(number),
            initializer="a",
            latents=torch.randn(shape),
            valid=torch.ones(4, side, side, dtype=torch.bool),
            prompts=("<new1> b",) * 4,
            prior_latents=torch.randn(shape),
            prior_prompt="b",
        )
        for number in range(count)
    ]


def example_of(pipe: Pipeline, work: Work) -> Example:
    """A batch as the script collates it: instances, then as many of the class."""
    many = work.training.views_per_step
    prompts = ["<new1> b"] * many + ["b"] * many
    ids = token_ids(pipe, prompts, [0] * len(prompts))
    # The script gives the new token a row at the end of the table; its last row stands in for that one.
    ids = ids.clamp(max=len(pipe.text_encoder.get_input_embeddings().weight) - 1)
    pixels = torch.rand(len(prompts), 3, work.pixels, work.pixels, device=pipe.device) * 2 - 1
    return Example(pixels, ids, int(ids.max()))


def measure(
    pipe: Pipeline, work: Work, counts: list[int], steps: int, *, checkpoint: list[bool]
) -> Iterator[dict[str, Any]]:
    """Rows of the table: the example's loop where there is one, then batches until one does not fit."""
    device = pipe.device
    encoding = encode_seconds(pipe, work)
    wanted = work.training.steps

    def row(way: str, count: int, again: bool, times: list[float], per_concept: float) -> dict[str, Any]:
        return {
            "way": way,
            "concepts": count,
            "gradients_made_again": again,
            "step_seconds": statistics.median(times),
            "all_step_seconds": times,
            "concept_seconds": per_concept,
            "concepts_per_hour": 3600 / per_concept,
            "peak_bytes": peak_bytes(device),
        }

    if not hasattr(pipe, "text_encoder_2"):
        precision = pipe.text_encoder.dtype
        example = example_of(pipe, work)
        times = step_seconds(
            device, lambda many, tell: train_example(pipe, example, steps=many, on_step=tell), steps
        )
        pipe.text_encoder.to(precision)
        yield row("example script's loop", 1, False, times, wanted * statistics.median(times))
    for again in checkpoint:
        pipe.unet.enable_gradient_checkpointing() if again else pipe.unet.disable_gradient_checkpointing()
        for count in counts:
            taught = lessons(pipe, work, count)

            def run(many: int, tell: Callable[[], object], taught: list[Lesson] = taught) -> None:
                settings = replace(work.training, steps=many)
                train(pipe, taught, settings, method="custom_diffusion", seed=0, on_step=tell)

            try:
                times = step_seconds(device, run, steps)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                yield {"way": OURS, "concepts": count, "gradients_made_again": again, "fits": False}
                break
            per_concept = wanted * statistics.median(times) / count + work.views * encoding
            yield row(OURS, count, again, times, per_concept)


def encode_seconds(pipe: Pipeline, work: Work) -> float:
    """To encode one view, in batches as the pipeline's settings allow."""
    pictures = np.zeros((4, work.pixels, work.pixels, 3), dtype=np.uint8)
    times = []
    for _ in range(3):
        start = clock(pipe.device)
        encode_images(pipe, pictures)
        times.append(clock(pipe.device) - start)
    return min(times) / len(pictures)


def draw_seconds(pipe: Pipeline, drawing: synthesize.Params) -> float:
    """To draw one image and decode it, in the full world's batches; computed from two short runs."""
    drawings = [Drawing(0, f"a <new1> {i % 5}", i) for i in range(drawing.images_per_batch)]
    times = []
    for steps in (1, 1, 4):
        sampler = replace(drawing.sampler, steps=steps)
        start = clock(pipe.device)
        stack = base_stack(pipe, ["a"])
        latents = draw_latents(pipe, stack, drawings, sampler, batch_size=len(drawings))
        times.append(clock(pipe.device) - start)
    start = clock(pipe.device)
    decode_latents(pipe, latents, batch_size=len(drawings))
    whole = times[1] + (times[2] - times[1]) / 3 * (drawing.sampler.steps - 1) + clock(pipe.device) - start
    return whole / len(drawings)


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown; the ratio is to the first row."""
    lines = ["| | concepts | gradients made again | s a step | concepts an hour | ratio | peak, GB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        again = "yes" if row["gradients_made_again"] else "no"
        start = f"| {row['way']} | {row['concepts']} | {again} | "
        if not row.get("fits", True):
            lines.append(start + "does not fit | | | |")
            continue
        ratio = row["concepts_per_hour"] / rows[0]["concepts_per_hour"]
        lines.append(
            start + f"{row['step_seconds']:.4g} | {row['concepts_per_hour']:.4g} | {ratio:.2f}"
            f" | {row['peak_bytes'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--concepts", type=int, nargs="+")
    parser.add_argument("--steps", type=int, help="timed, of each row")
    parser.add_argument("--only", choices=("plain", "again"), help="gradients kept, or made again")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--no-drawing", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = find_device(options.device)
    precision = options.dtype or ("float32" if device.type == "cpu" else "float16")
    dtype = getattr(torch, precision)
    counts = options.concepts or ([1, 2] if options.small else [1, 2, 4, 8, 16])
    steps = options.steps or (2 if options.small else 10)
    pixels = 64 if options.small else options.pixels
    made = load_params(customize.Params, "customize", WORLD)
    work = Work(made.training.of("custom_diffusion"), made.views, pixels)
    pipe = build(options.family, str(device), dtype, small=options.small)
    checkpoint = {"plain": [False], "again": [True], None: [False, True]}[options.only]
    rows = []
    for row in measure(pipe, work, counts, steps, checkpoint=checkpoint):
        rows.append(row)
        print(table(rows).splitlines()[-1], flush=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()
    shapes = build(options.family, "meta", dtype, small=options.small)
    for row in rows:
        if row["way"] == OURS:
            again = row["gradients_made_again"]
            row["computed_bytes"] = step_memory(shapes, row["concepts"], pixels, again=again).total
    report = {
        "machine": name,
        "torch": torch.__version__,
        "family": options.family,
        "small": options.small,
        "dtype": precision,
        "pixels": pixels,
        "views": work.views,
        "training": vars(work.training),
        "rows": rows,
    }
    drawing = None
    if not options.no_drawing:
        drawing = report["draw_seconds"] = draw_seconds(
            pipe, load_params(synthesize.Params, "synthesize", WORLD)
        )
    print(f"{name}, {options.family}, {precision}, {pixels} pixels\n{table(rows)}")
    out = options.out or (
        None if options.small else Path(f"benchmarks/results/full_size_{options.family}.json")
    )
    if out is not None:
        write_json(out, report)
    if device.type == "cuda" and not options.small and options.family == "sd15":
        best = max(
            (row for row in rows[1:] if row.get("fits", True)), key=lambda row: row["concepts_per_hour"]
        )
        by = "python -m benchmarks.full_size"
        record("customize", Rate(best["concept_seconds"], name, by, peak_bytes=best["peak_bytes"]))
        if drawing is not None:
            record("synthesize", Rate(drawing, name, by))


if __name__ == "__main__":
    main()
