"""What a world would cost: hours of one device, disk and memory by stage, from measured rates alone.

`python -m benchmarks.costs [full] [--readme README.md]` multiplies the sizes in worlds/<name>/params.yaml by
the rates in benchmarks/results/rates.json, which benchmarks at full size record (benchmarks.rates). A rate
that nobody measured makes "not measured" and an empty cell, never a guess. With --readme, the table is put
between the file's markers `costs:begin` and `costs:end`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attribution.command import command_line
from attribution.files import atomic_path
from attribution.params import load_params
from benchmarks.rates import RATES, Rate, read
from stages import calibrate, featurize, synthesize, train_mapper
from stages.image_requests import KINDS
from stages.report import rewrite

HEADER = ("stage", "how many", "a second", "hours", "disk, GB", "memory, GB", "measured on")


@dataclass(frozen=True)
class Group:
    """Customized models and their exemplars, in one split."""

    split: Literal["train", "val", "test"]
    models: int
    exemplars: int


@dataclass(frozen=True)
class Scale:
    """How much there is of what the parameters of the stages do not count."""

    distractors: int
    groups: dict[str, Group]

    def models(self, split: str | None = None) -> int:
        """Of one split, or all."""
        return sum(group.models for group in self.groups.values() if split in (None, group.split))


@dataclass(frozen=True)
class Work:
    """`items` of a stage or stage@backbone; `vectors` rows are kept, when it makes any."""

    name: str
    items: int
    unit: str
    vectors: int = 0
    bytes_per_value: int = 0


def work_of(params: Path) -> list[Work]:
    """Every stage's items, counted from the world's parameters."""
    scale = load_params(Scale, "scale", params)
    drawing = load_params(synthesize.Params, "synthesize", params)
    features = load_params(featurize.Params, "featurize", params)
    mapping = load_params(train_mapper.Params, "train_mapper", params)
    calibrating = load_params(calibrate.Params, "calibrate", params)
    per_model = len(KINDS["object"]) * drawing.prompts_per_kind * drawing.samples_per_prompt
    synthesized = scale.models() * per_model
    pictures = synthesized + scale.distractors + sum(group.exemplars for group in scale.groups.values())
    work = [
        Work("customize", scale.models(), "models"),
        Work("synthesize", synthesized, "images"),
    ]
    for name in features.backbones:
        settings = features.settings_of(name)
        encoded = pictures - (scale.distractors if settings.ready_distractors else 0)
        width = 2 if settings.dtype == "float16" else 4
        work.append(Work(f"featurize@{name}", encoded, "images", encoded, width))
    pairs = scale.models("train") * per_model * mapping.epochs
    asked = calibrating.queries_per_model * scale.models("val")
    for stage, items, unit in (
        ("train_mapper", pairs, "pairs"),
        ("calibrate", asked * scale.distractors, "scores"),
        ("evaluate", scale.models("test") * per_model * scale.distractors, "scores"),
    ):
        work.append(Work(stage, items * len(features.backbones), f"{unit} of all backbones"))
    return work


def cells(work: Work, rate: Rate | None) -> list[str]:
    """The row of the table; empty where nothing was measured."""
    count = f"{work.items:,} {work.unit}"
    if rate is None:
        return [work.name, count, "not measured", "", "", "", ""]
    disk = disk_bytes(work, rate)
    return [
        work.name,
        count,
        f"{1 / rate.seconds:,.4g}",
        f"{hours(work, rate):,.1f}",
        "" if disk is None else f"{disk / 1e9:,.1f}",
        "" if rate.peak_bytes is None else f"{rate.peak_bytes / 1e9:,.1f}",
        f"{rate.device} (`{rate.measured_by}`)",
    ]


def hours(work: Work, rate: Rate) -> float:
    """Of the device that it was measured on, alone."""
    return work.items * rate.seconds / 3600


def disk_bytes(work: Work, rate: Rate) -> float | None:
    """What the stage leaves behind: its vectors, or so much an item as measured. None if unknown."""
    if work.vectors:
        return None if rate.dim is None else work.vectors * rate.dim * work.bytes_per_value
    return None if rate.disk_bytes is None else work.items * rate.disk_bytes


def total(work: Iterable[Work], rates: Mapping[str, Rate]) -> list[str]:
    """Sums over what was measured, and how much of the whole that is."""
    listed = list(work)
    measured = [(one, rates[one.name]) for one in listed if one.name in rates]
    if not measured:
        return ["all", f"0 of {len(listed)} rows measured", "", "", "", "", ""]
    disk = [found for one, rate in measured if (found := disk_bytes(one, rate)) is not None]
    spent: dict[str, float] = {}
    for one, rate in measured:
        spent[rate.device] = spent.get(rate.device, 0.0) + hours(one, rate)
    by_device = "; ".join(f"{total:,.1f} of {device}" for device, total in spent.items())
    said = f"{len(measured)} of {len(listed)} rows measured"
    return ["all", said, "", by_device, f"{sum(disk) / 1e9:,.1f}" if disk else "", "", ""]


def table(work: Iterable[Work], rates: Mapping[str, Rate]) -> str:
    """In Markdown. Raises ValueError for a rate of a stage that the world does not have."""
    listed = list(work)
    unknown = sorted(set(rates) - {one.name for one in listed})
    if unknown:
        raise ValueError(f"rates of what this world does not run: {', '.join(unknown)}")
    rows = [cells(one, rates.get(one.name)) for one in listed]
    lines = [HEADER, tuple("---" for _ in HEADER), *rows, total(listed, rates)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("world", nargs="?", default="full", help="a folder in worlds/")
    parser.add_argument("--rates", type=Path, default=RATES)
    parser.add_argument("--readme", type=Path, help="the file whose table is rewritten, not printed")
    options = parser.parse_args()
    made = table(work_of(Path("worlds") / options.world / "params.yaml"), read(options.rates))
    if options.readme is None:
        print(made)
        return
    text = rewrite(options.readme.read_text(encoding="utf-8"), "costs", made)
    with atomic_path(options.readme) as partial:
        partial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with command_line("benchmarks.costs", __doc__):
        main()
