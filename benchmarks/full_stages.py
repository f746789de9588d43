"""train_mapper, calibrate and evaluate among millions of distractors: seconds, and the memory of their own.

`python -m benchmarks.full_stages [--distractors 1000000] [--dtype float16] [--mapper linear]`, from the root.
Feature sets are drawn, not made from pictures: points of a low dimension and noise, an exemplar for each
customized model, its queries turned by one rotation and noise, so that ranks run from the first to the last.
The mappers are that rotation undone, and rotations at random as controls; their numbers mean nothing. Each
stage runs in a process of its own with the settings of worlds/full/params.yaml, while its anonymous memory is
read every 20 ms: pages of mapped files, which the system takes back when it likes, do not count. Prints a
line for each stage and adds it to benchmarks/results/full_stages.json under `--label`; with --record, what a
score took also goes to the cost sheet (benchmarks.rates), and what a training pair took in an epoch. An epoch
is what twelve take longer than two: reading and whitening come once.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from attribution.features import Space, write_feature_set
from attribution.files import read_json, write_json
from attribution.images import write_image_table
from attribution.mapper import Kind, Mapper
from attribution.params import load_params
from benchmarks.rates import Rate, machine, record
from stages import calibrate, evaluate, train_mapper

WORLD = Path("worlds/full/params.yaml")
RESULTS = Path(__file__).parent / "results" / "full_stages.json"
STAGES = ("train_mapper", "calibrate", "evaluate")
# What a row of figures is told with, out of the options.
SETTINGS = (
    "distractors",
    "dim",
    "dtype",
    "id_characters",
    "mapper",
    "train_models",
    "val_models",
    "test_models",
    "queries_per_model",
)
LATENT = 64  # dimensions that the features fill, but for noise
NOISE = 0.3
ROWS = 65536  # drawn at a time, and in a shard
VAL_QUERIES = 4  # of each val model
EPOCHS = (2, 12)


class World:
    """Draws features of one space; `twist` is what synthesis does to them."""

    def __init__(self, dim: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.basis = self.rng.standard_normal((LATENT, dim), np.float32)
        self.twist = self.rotation(dim)

    def rotation(self, dim: int) -> np.ndarray:
        return np.linalg.qr(self.rng.standard_normal((dim, dim)))[0].astype(np.float32)

    def latent(self, rows: int) -> np.ndarray:
        return self.rng.standard_normal((rows, LATENT), np.float32)

    def features(self, latent: np.ndarray) -> np.ndarray:
        noise = self.rng.standard_normal((len(latent), self.basis.shape[1]), np.float32)
        return latent @ self.basis / np.float32(np.sqrt(LATENT)) + NOISE * noise

    def mapper(self, kind: Kind, turn: np.ndarray) -> Mapper:
        """The identity, and `turn` in the form of the kind; a scale cannot turn."""
        whole = Mapper.identity(len(turn), kind, hidden=len(turn))
        if kind == "linear":
            synth = {**whole.synth, "weight": turn}
        elif kind == "mlp":
            synth = {**whole.synth, "weight_out": 0.1 * turn}
        else:
            synth = dict(whole.synth)
        return Mapper(kind, whole.real, synth, {"backbone": "drawn"})


def make_world(folder: Path, options: argparse.Namespace) -> None:
    """Everything that the stages read."""
    world = World(options.dim, options.seed)
    rng = world.rng
    exemplars: list[dict[str, Any]] = []
    queries: list[dict[str, Any]] = []
    real, synth = [], []
    models = {"train": options.train_models, "val": options.val_models, "test": options.test_models}
    for number, split in enumerate(split for split, count in models.items() for _ in range(count)):
        kind = ("object", "style")[number % 2]
        concept = {"concept_id": f"c{number:05}", "kind": kind, "noun": "thing", "split": split, "seen": True}
        centers = world.latent(1) + 0.3 * world.latent(1 if kind == "object" else 5)
        for place in range(len(centers)):
            exemplars.append({"image_id": f"c{number:05}-e{place}", **concept, "image": picture(rng)})
        real.append(world.features(centers))
        count = VAL_QUERIES if split == "val" else options.queries_per_model
        for place in range(count):
            prompts = {"prompt_kind": ("media", "gpt")[place % 2], "prompt": "a <new1>"}
            prompts["prompt_split"] = "test" if split == "test" else "train"
            image = {"image": picture(rng), "seed": place, "source": "shipped"}
            queries.append({"image_id": f"c{number:05}-q{place}", **concept, **prompts, **image})
        own = centers[rng.integers(len(centers), size=count)]
        synth.append(world.features(own + rng.uniform(0.8, 4.0, (count, 1)) * world.latent(count)))
    write_image_table(folder / "exemplars.parquet", pa.Table.from_pylist(exemplars))
    write_image_table(folder / "synthesized.parquet", pa.Table.from_pylist(queries))
    pq.write_table(pa.Table.from_pylist(queries).drop_columns(["image"]), folder / "queries.parquet")

    def distractors() -> Iterator[np.ndarray]:
        for first in range(0, options.distractors, ROWS):
            yield world.features(world.latent(min(ROWS, options.distractors - first)))

    width = options.id_characters
    space = Space("drawn", "r1", "none", options.dim, options.dtype)
    for name, ids, batches in (
        ("exemplars", [row["image_id"] for row in exemplars], real),
        ("queries", [row["image_id"] for row in queries], (one @ world.twist.T for one in synth)),
        ("distractors", [f"{row:0{width}}" for row in range(options.distractors)], distractors()),
    ):
        write_feature_set(folder / "features" / name, space, ids, batches, shard_rows=ROWS)
    # As if they had come ready made, for they have no pictures.
    rows_path = folder / "features" / "distractors" / "rows.parquet"
    rows = pq.read_table(rows_path)
    pq.write_table(rows.append_column("source", rows["image_id"]), rows_path, compression="zstd")
    own_kind = {kind: world.mapper(options.mapper, world.twist.T) for kind in ("object", "style")}
    world.mapper(options.mapper, world.twist.T).save(folder / "mapper.safetensors", own_kind=own_kind)
    for name in ("permuted", "whitening"):
        world.mapper(options.mapper, world.rotation(options.dim)).save(folder / f"{name}.safetensors")
    # Last: a folder that has it is whole.
    write_json(folder / "settings.json", {key: getattr(options, key) for key in SETTINGS})


def picture(rng: np.random.Generator) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


def run_stage(name: str, folder: Path, epochs: int) -> None:
    """One stage in this process, as its main() would run it; of train_mapper, so many epochs."""
    inputs: dict[str, Any] = {
        "backbone": "drawn",
        "features_dir": folder / "features",
        "queries_path": folder / "queries.parquet",
        "exemplars_path": folder / "exemplars.parquet",
    }
    if name == "train_mapper":
        training = load_params(train_mapper.Params, name, WORLD)
        training = dataclasses.replace(training, epochs=epochs, patience=epochs)
        train_mapper.run(training, **inputs, output_dir=folder / "learned")
        return
    if name == "calibrate":
        calibrating = load_params(calibrate.Params, name, WORLD)
        mapper_path = folder / "mapper.safetensors"
        calibrate.run(calibrating, **inputs, mapper_path=mapper_path, output_path=folder / "calibrator.json")
        return
    evaluate.run(
        load_params(evaluate.Params, name, WORLD),
        **inputs,
        mapper_dir=folder,
        calibrator_path=folder / "calibrator.json",
        picture_paths=[folder / "exemplars.parquet", folder / "synthesized.parquet"],
        output_dir=folder / "evaluation",
        metrics_path=folder / "metrics.json",
    )


def measure(name: str, folder: Path, epochs: int = EPOCHS[1]) -> dict[str, Any]:
    """The stage in a process of its own: wall and processor seconds, and the most anonymous memory."""
    command = [sys.executable, "-m", "benchmarks.full_stages", "--stage", name, "--folder", str(folder)]
    command += ["--epochs", str(epochs)]
    begin = time.perf_counter()
    process = subprocess.Popen(command)
    peak = 0
    while True:
        # Waited for by hand: what wait4 says of its processor time is of this process alone.
        found, status, usage = os.wait4(process.pid, os.WNOHANG)
        if found:
            break
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(
            f"{name}: ended with {process.returncode} after {time.perf_counter() - begin:.0f} s"
        )
    return {
        "stage": name,
        "seconds": round(time.perf_counter() - begin, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_anonymous_bytes": peak,
        "peak_resident_bytes": usage.ru_maxrss * 1024,
    }


def measure_epochs(folder: Path) -> dict[str, Any]:
    """train_mapper of many epochs, and what one of them took."""
    few, many = (measure("train_mapper", folder, epochs) for epochs in EPOCHS)
    return {**many, "seconds_an_epoch": (many["seconds"] - few["seconds"]) / (EPOCHS[1] - EPOCHS[0])}


def rate_of(row: dict[str, Any], settings: dict[str, Any]) -> Rate:
    """Of a pair in an epoch, or of a query's score against a distractor: this machine's whole time."""
    each = settings["queries_per_model"]
    seconds, items = row["seconds"], settings["distractors"]
    if row["stage"] == "train_mapper":
        seconds, items = row["seconds_an_epoch"], settings["train_models"] * each
    elif row["stage"] == "calibrate":
        items *= settings["val_models"] * VAL_QUERIES
    else:
        items *= settings["test_models"] * each
    by = "python -m benchmarks.full_stages --record"
    # A world with more pairs takes more memory to learn them; the others' does not grow.
    peak = None if row["stage"] == "train_mapper" else row["peak_anonymous_bytes"]
    return Rate(seconds / items, machine(), by, peak_bytes=peak)


def anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0  # it has ended, and nobody has asked how yet


def main() -> None:
    """Prints the lines and writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--distractors", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float16")
    parser.add_argument("--mapper", choices=("linear", "scale", "mlp"), default="linear")
    # As many pairs to train on for each validation query as the full world has.
    parser.add_argument("--train-models", type=int, default=160)
    parser.add_argument("--val-models", type=int, default=100, help=f"of {VAL_QUERIES} queries each")
    parser.add_argument("--test-models", type=int, default=100)
    parser.add_argument("--queries-per-model", type=int, default=20)
    parser.add_argument("--id-characters", type=int, default=40, help="of the id of a distractor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="now", help="the name that the figures are kept under")
    parser.add_argument("--record", action="store_true", help="keep the rates for the cost sheet")
    parser.add_argument("--folder", type=Path, help="where the world is kept, or already is")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, default=EPOCHS[1], help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.stage:
        run_stage(options.stage, options.folder, options.epochs)
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="full_stages-"))
    try:
        if not (folder / "settings.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            make_world(folder, options)
        report = read_json(options.output) if options.output.is_file() else {}
        rows = []
        for name in options.stages:
            rows.append(measure_epochs(folder) if name == "train_mapper" else measure(name, folder))
            anonymous = rows[-1]["peak_anonymous_bytes"] / 1e9
            print(f"{options.label}: {name}: {rows[-1]['seconds']:,.1f} s, {anonymous:.2f} GB of its own")
            if options.record:
                record(name, rate_of(rows[-1], read_json(folder / "settings.json")))
        said = {**read_json(folder / "settings.json"), "machine": machine(), "rows": rows}
        write_json(options.output, {**report, options.label: said})
    finally:
        if options.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
