"""SIGKILL at random moments of featurize: at most the shard in work is lost, the end is the same."""

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
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from attribution.backbones import Backbone
from tests.test_featurize import PARAMS, data, digests, featurize

__all__ = ["data"]  # a fixture


def rows_of_shards(folder: Path) -> int:
    """Of those that are whole by their names; the last run has not tidied up yet."""
    return sum(len(np.load(file)) for file in (folder / "features" / ".shards" / "pixels").glob("[!.]*.npy"))


def killed_runs(folder: Path, kills: int, seed: int) -> list[int]:
    """Runs featurize in child processes, killed at random, until so many died; images each encoded in vain.

    A run that survives is held to the undisturbed bytes, and everything is made anew.
    """
    # tqdm's lock is shared with forks: a child that dies with it would stop all others.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    rng = random.Random(seed)
    log = folder / "encoded"
    encode = Backbone.encode_pixels

    def logged(self: Backbone, pixels: np.ndarray) -> np.ndarray:
        with log.open("ab") as stream:
            stream.write(bytes(len(pixels)))
        time.sleep(0.004)
        return encode(self, pixels)

    featurize(folder)
    undisturbed = digests(folder)
    Backbone.encode_pixels = logged  # type: ignore[method-assign]
    lost: list[int] = []
    shutil.rmtree(folder / "features")
    while len(lost) < kills:
        before = rows_of_shards(folder)
        log.write_bytes(b"")
        child = os.fork()
        if child == 0:
            featurize(folder)
            os._exit(0)
        time.sleep(rng.uniform(0, 0.12))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            lost.append(log.stat().st_size - (rows_of_shards(folder) - before))
        else:
            assert digests(folder) == undisturbed
            shutil.rmtree(folder / "features")
    featurize(folder)
    assert digests(folder) == undisturbed
    assert not list(folder.rglob(".partial-*"))
    return lost


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.nightly)])
def test_a_kill_costs_one_shard_at_most(data: Path, kills: int) -> None:
    # In a process of its own, which has one thread alone and may fork.
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom tests.test_featurize_kills import killed_runs\n"
        "print(json.dumps(killed_runs(Path(sys.argv[1]), int(sys.argv[2]), 0)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(data), str(kills)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lost = json.loads(done.stdout)
    assert len(lost) == kills
    assert min(lost) >= 0
    assert max(lost) <= PARAMS.shard_rows
