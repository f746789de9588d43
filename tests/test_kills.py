"""SIGKILL at random moments of stages that keep finished work: at most one item is lost, nothing else."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from attribution import intake
from attribution.backbones import Backbone
from attribution.files import read_json
from attribution.sources import list_units
from tests.test_featurize import PARAMS, data, digests, featurize
from tests.test_import_data import bring_in, everything, make_distractors, make_exemplars

__all__ = ["data"]  # a fixture


@dataclass(frozen=True)
class Killable:
    """A stage: how it is run, how many pictures its finished items hold, what it leaves and where."""

    run: Callable[[], object]
    finished: Callable[[], int]
    result: Callable[[], dict[str, Any]]
    folder: Path
    pictures_per_item: int


def killable_featurize(folder: Path, log: Callable[[int], None]) -> Killable:
    """An item is a shard; logged are the pictures that are encoded."""
    encode = Backbone.encode_pixels

    def logged(self: Backbone, pixels: np.ndarray) -> np.ndarray:
        log(len(pixels))
        return encode(self, pixels)

    Backbone.encode_pixels = logged  # type: ignore[method-assign]
    shards = folder / "features" / ".shards" / "pixels"
    return Killable(
        lambda: featurize(folder),
        lambda: sum(len(np.load(file)) for file in shards.glob("[!.]*.npy")),
        lambda: digests(folder),
        folder / "features",
        PARAMS.shard_rows,
    )


def killable_import_data(folder: Path, log: Callable[[int], None]) -> Killable:
    """An item is a unit of files; logged are the distractors that are decoded."""
    make_exemplars(folder)
    make_distractors(folder, 40)
    take = intake.take

    def logged(picture: intake.Picture, rules: intake.Rules) -> intake.Taken | intake.Skipped:
        if "/" not in picture.source:  # exemplars, which are one item, have folders
            log(1)
        return take(picture, rules)

    intake.take = logged
    work = folder / "world" / ".imported"
    units, _ = list_units(folder / "own" / "distractors", files_per_unit=4)
    return Killable(
        lambda: bring_in(folder),
        lambda: sum(read_json(file)["found"] for file in work.glob("[!.]*/unit.json")),
        lambda: everything(folder),
        folder / "world",
        max(len(unit.names) for unit in units),
    )


CASES = {"featurize": killable_featurize, "import_data": killable_import_data}


def killed_runs(case: str, folder: Path, kills: int, seed: int) -> list[int]:
    """Runs the stage in child processes, killed at random, until so many died; pictures each did in vain.

    A run that survives is held to the undisturbed result, and everything is made anew.
    """
    # tqdm's lock is shared with forks: a child that dies with it would stop all others.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    rng = random.Random(seed)
    done = folder / "done"

    def log(pictures: int) -> None:
        with done.open("ab") as stream:
            stream.write(bytes(pictures))
        time.sleep(0.004)

    stage = CASES[case](folder, log)
    stage.run()
    undisturbed = stage.result()
    shutil.rmtree(stage.folder)
    lost: list[int] = []
    while len(lost) < kills:
        before = stage.finished()
        done.write_bytes(b"")
        child = os.fork()
        if child == 0:
            stage.run()
            os._exit(0)
        time.sleep(rng.uniform(0, 0.12))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            lost.append(done.stat().st_size - (stage.finished() - before))
        else:
            assert stage.result() == undisturbed
            shutil.rmtree(stage.folder)
    stage.run()
    assert stage.result() == undisturbed
    assert not list(folder.rglob(".partial-*"))
    assert max(lost) <= stage.pictures_per_item
    return lost


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.nightly)])
def test_a_kill_costs_one_item_at_most(data: Path, case: str, kills: int) -> None:
    # In a process of its own, which has one thread alone and may fork.
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom tests.test_kills import killed_runs\n"
        "print(json.dumps(killed_runs(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), 0)))\n"
    )
    command = [sys.executable, "-c", code, case, str(data), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lost = json.loads(done.stdout)
    assert len(lost) == kills
    assert min(lost) >= 0
    assert max(lost) > 0 or kills < 200  # some died at work
