"""Measured rates, one file of them: what benchmarks at full size write and the cost sheet reads."""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from attribution.files import read_json, write_json

RATES = Path(__file__).parent / "results" / "rates.json"


@dataclass(frozen=True)
class Rate:
    """What one item of a stage costs on a device, as measured by the command in `measured_by`.

    An item is what benchmarks.costs counts of that stage: a model, an image, a score. What was not measured
    is None: `disk_bytes` an item leaves behind, `peak_bytes` of the device's memory at the batch size used,
    `dim` of the vectors.
    """

    seconds: float
    device: str
    measured_by: str
    disk_bytes: float | None = None
    peak_bytes: int | None = None
    dim: int | None = None

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"seconds: wanted > 0, got {self.seconds}")


def machine() -> str:
    """The GPU's name, or the processor's and how many cores of it there are."""
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def record(name: str, rate: Rate, path: Path = RATES) -> None:
    """The file holds this rate of `name`, a stage or stage@backbone, beside those of others."""
    rates = {**read(path), name: rate}
    write_json(path, {key: dataclasses.asdict(value) for key, value in rates.items()})


def read(path: Path = RATES) -> dict[str, Rate]:
    """All rates; none if nothing was measured yet. Raises ValueError naming the file and the rate."""
    if not path.is_file():
        return {}
    found = {}
    for name, values in read_json(path).items():
        try:
            found[name] = Rate(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {name}: not a rate: {error}") from error
    return found
