"""Stages that run for days: killed, short of memory, or two at once, they lose little and say so."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from attribution.base_model import BaseSettings
from attribution.custom_diffusion import WEIGHTS
from attribution.files import sha256_file
from stages import customize, synthesize
from stages.customizer import Customizer
from stages.incremental import READY, StageError, Summary, chunks
from stages.synthesizer import Synthesizer
from tests import test_customize, test_synthesize
from tests.forked import Server, members, serving
from tests.test_customize import contents, picture, write_exemplars
from tests.test_synthesize import TEMPLATES, write_templates
from tests.tiny import save_tiny_pipeline
from tests.tiny_models import method_settings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
CONCEPTS = {f"{kind}{i:02}": [picture(2 * i + (kind == "s"))] for i in range(6) for kind in "os"}


class NotedCustomizer(Customizer):
    """Says in a file what it begins."""

    def learn_at_once(self, group: Sequence) -> Summary:
        note(self.customized, [concept.concept_id for concept in group])
        return super().learn_at_once(group)


class NotedSynthesizer(Synthesizer):
    """Says in a file what it begins."""

    def draw_at_once(self, group: Sequence[str]) -> Summary:
        note(self.synthesized, group)
        return super().draw_at_once(group)


def note(folder: Path, begun: Sequence[str]) -> None:
    with folder.with_suffix(".begun").open("a") as file:
        file.write(f"{time.monotonic()} {' '.join(begun)}\n")


def begun_in(folder: Path) -> list[tuple[float, list[str]]]:
    """When each batch was begun, and its concepts."""
    path = folder.with_suffix(".begun")
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [(float(line[0]), line[1:]) for line in lines]


def die_placing(number: int | None) -> None:
    """This process kills itself before that result, counted from 0, takes its place."""
    replace, placed = Path.replace, itertools.count()

    def counted(self: Path, target: Path) -> Path:
        if next(placed) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = counted  # type: ignore[method-assign, assignment]


def run_customize(
    root: str,
    out: str,
    memory_mb: int = 0,
    views_per_step: int = 1,
    die_at: int | None = None,
    **changes: object,
) -> None:
    """In a process of its own."""
    die_placing(die_at)
    customize.Customizer = NotedCustomizer  # type: ignore[misc]
    training = method_settings(steps=2, views_per_step=views_per_step, priors_per_step=1)
    params = replace(test_customize.PARAMS, training=training, **changes)  # type: ignore[arg-type]
    base = BaseSettings(f"{root}/base", None, "cpu", "float32")
    exemplars = Path(root, "exemplars.parquet")
    if memory_mb:
        # What a first run takes for good, code above all, does not count.
        customize.run(test_customize.PARAMS, base, exemplars=exemplars, customized=Path(f"{out}-before"))
        limit_memory(memory_mb)
    print(customize.run(params, base, exemplars=exemplars, customized=Path(out)))


def run_synthesize(root: str, out: str, die_at: int | None = None, **changes: object) -> None:
    """In a process of its own."""
    die_placing(die_at)
    synthesize.Synthesizer = NotedSynthesizer  # type: ignore[misc]
    summary = synthesize.run(
        replace(test_synthesize.PARAMS, **changes),  # type: ignore[arg-type]
        BaseSettings(f"{root}/base", None, "cpu", "float32"),
        exemplars=Path(root, "exemplars.parquet"),
        customized=Path(root, "customize-1-1"),
        prompts=Path(root, "prompts"),
        synthesized=Path(out),
    )
    print(summary)


def limit_memory(more_mb: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exemplars, prompts and a base model."""
    root = tmp_path_factory.mktemp("world")
    save_tiny_pipeline(root / "base")
    write_exemplars(root / "exemplars.parquet", CONCEPTS)
    write_templates(root / "prompts", TEMPLATES)
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    with serving(str(root / "base")) as server:
        yield server


@dataclass(frozen=True)
class Stage:
    """A stage as these tests run it: what it is called with, where its results are known by."""

    function: str
    items: str
    options: dict[str, object]
    batch: int
    at_once: int  # how many concepts its processes have in hand together

    def undisturbed(self, server: Server, root: Path) -> Path:
        """Where a run that nothing disturbs leaves its results; it runs once for all tests."""
        out = root / "-".join([self.function.rpartition("_")[2], *map(str, self.options.values())])
        if not out.exists():
            options = {"root": str(root), "out": str(out), **self.options}
            assert server.run(self.function, root / "log", **options) == 0
        return out

    def finished(self, out: Path) -> dict[str, tuple[int, int, str]]:
        """Each item that is whole, in its place or ready for it; and what a second writing would change."""
        found = {}
        for folder in (out, *out.glob(f"{READY}*")):
            for path in folder.glob(self.items):
                status = path.stat()
                found[str(path.relative_to(folder))] = (status.st_ino, status.st_mtime_ns, sha256_file(path))
        return found


def stage(name: str, *, workers: int, batch: int) -> Stage:
    """The batch is of concepts, or of the eight images of each."""
    if name == "customize":
        options = {"workers": workers, "concepts_per_batch": batch}
        return Stage(
            "tests.test_unattended:run_customize", "[os]*/customized.json", options, batch, workers * batch
        )
    options = {"workers": workers, "images_per_batch": 8 * batch}
    return Stage("tests.test_unattended:run_synthesize", "*.parquet", options, batch, workers * batch)


ONE_BY_ONE = stage("customize", workers=1, batch=1)


def kill_again_and_again(
    server: Server, root: Path, folder: Path, stage: Stage, *, kills: int, seed: int
) -> list[int]:
    """Kills runs of the stage at random moments and checks each; returns how many concepts each kill lost."""
    rng = random.Random(seed)
    out, calm = folder / "out", stage.undisturbed(server, root)
    options = {"root": str(root), **stage.options}
    moments = [moment for moment, _ in begun_in(calm)]
    batch_s = (moments[-1] - moments[0]) / (len(moments) - 1)
    lost: list[int] = []
    while len(lost) < kills:
        before, begun_before = stage.finished(out), len(begun_in(out))
        log = folder / f"{len(lost)}.log"
        session = server.start(stage.function, log, out=str(out), **options)
        # Now and then before anything is begun; else in the first batches, so that work is left for the rest.
        batches = rng.choice([0, 1, 1, 2])
        while len(begun_in(out)) < begun_before + batches and members(session):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 1.2 * batch_s))
        victim = rng.choice(["run", "all", "worker"]) if stage.options["workers"] != 1 else "run"
        kill(session, victim, rng)
        status, after = server.wait(), stage.finished(out)
        assert before.items() <= after.items()
        begun = [name for _, names in begun_in(out)[begun_before:] for name in names]
        if status != 0:
            lost.append(len(begun) - (len(after) - len(before)))
            assert 0 <= lost[-1] <= stage.at_once
        if victim == "worker" and status == 1:
            assert "a worker process was killed, most likely for want of memory" in log.read_text()
        if len(after) == len(stage.finished(calm)):
            # Nothing is left to do: half of the batches are taken away again, whole, for they round as one.
            made = list(chunks(sorted(after), stage.batch))
            for name in itertools.chain(*rng.sample(made, len(made) // 2)):
                remove(out / name.split("/")[0])
    assert server.run(stage.function, folder / "last.log", out=str(out), **options) == 0
    assert [path for path in folder.rglob("*") if path.name.startswith(".")] == []
    assert contents(out) == contents(calm)
    return lost


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def kill(session: int, victim: str, rng: random.Random) -> None:
    """SIGKILL for the run, for one of its workers, or for all of it at once."""
    with contextlib.suppress(OSError):  # it may have ended by now
        if victim == "all":
            os.killpg(session, signal.SIGKILL)
        elif victim == "run":
            os.kill(session, signal.SIGKILL)
        else:
            os.kill(rng.choice(workers_of(session)), signal.SIGKILL)


def workers_of(session: int) -> list[int]:
    """The spawned workers; beside them there is a process of Python's own that tracks resources."""
    lines = {number: Path(f"/proc/{number}/cmdline").read_text() for number in members(session)}
    return [number for number, line in lines.items() if "spawn_main" in line] or [session]


def test_three_kills_lose_an_item_each_at_most(server: Server, root: Path, tmp_path: Path) -> None:
    assert len(kill_again_and_again(server, root, tmp_path, ONE_BY_ONE, kills=3, seed=0)) == 3


@pytest.mark.parametrize("name", ["customize", "synthesize"])
def test_a_batch_whose_placing_is_killed_is_neither_split_nor_made_again(
    server: Server, root: Path, tmp_path: Path, name: str
) -> None:
    ONE_BY_ONE.undisturbed(server, root)  # whose models synthesize draws with
    batched, out = stage(name, workers=1, batch=3), tmp_path / "out"
    calm = batched.undisturbed(server, root)
    options = {"root": str(root), "out": str(out), **batched.options}
    # One of the first batch is placed; then the other two, and one of the second batch; then none.
    for die_at, placed in ((1, 1), (3, 4), (0, 4)):
        assert server.run(batched.function, tmp_path / "log", die_at=die_at, **options) == -signal.SIGKILL
        assert len(list(out.glob(batched.items))) == placed
        assert len(batched.finished(out)) == -(-placed // 3) * 3
    assert server.run(batched.function, tmp_path / "log", **options) == 0
    assert [names for _, names in begun_in(out)] == [names for _, names in begun_in(calm)]
    assert contents(out) == contents(calm)


@pytest.mark.nightly  # what a limit on addresses leaves to an allocator differs from machine to machine
def test_batches_are_halved_until_memory_holds_them_and_what_is_too_large_alone_fails_by_name(
    server: Server, root: Path, tmp_path: Path
) -> None:
    huge = io.BytesIO()
    Image.new("1", (7000, 7000)).save(huge, "PNG")
    few = {name: CONCEPTS[name] for name in sorted(CONCEPTS)[:4]} | {"o99": [huge.getvalue()]}
    write_exemplars(tmp_path / "exemplars.parquet", few)
    (tmp_path / "base").symlink_to(root / "base")
    options = {"root": str(tmp_path), "concepts_per_batch": 5, "views_per_step": 128}
    function = "tests.test_unattended:run_customize"
    ample = tmp_path / "ample"
    # Too little for the batch and enough for one concept: several limits are tried.
    for memory in range(120, 40, -5):
        short, log = tmp_path / f"short-{memory}", tmp_path / f"log-{memory}"
        assert server.run(function, log, out=str(short), memory_mb=memory, **options) == 1
        said = log.read_text()
        halved = re.search(r"customize: out of memory on \d concepts; going on with \d at a time\n", said)
        if halved and re.search(r"4 done, 0 reused, 0 pruned, 1 failed\n  o99: .+", said):
            break
    else:
        raise AssertionError(said)
    assert server.run(function, tmp_path / "log", out=str(ample), **options) == 0
    for name in list(few)[:4]:
        expected = load_file(ample / name / WEIGHTS)
        found = load_file(short / name / WEIGHTS)
        for key in expected:
            np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=1e-5)


def test_of_two_runs_at_once_the_second_is_refused_and_the_first_undisturbed(
    server: Server, root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = {"root": str(root), "out": str(out), **ONE_BY_ONE.options}
    session = server.start(ONE_BY_ONE.function, tmp_path / "log", **options)
    while not begun_in(out) and members(session):
        time.sleep(0.01)
    os.kill(session, signal.SIGSTOP)  # so that it is at work still
    refused = pytest.raises(
        StageError, match="out: another run is at work there; wait for it to end, or end it"
    )
    try:
        with refused:
            customize.run(
                test_customize.PARAMS,
                BaseSettings(str(root / "base"), None, "cpu", "float32"),
                exemplars=root / "exemplars.parquet",
                customized=out,
            )
    finally:
        os.kill(session, signal.SIGCONT)
    assert server.wait() == 0
    assert contents(out) == contents(ONE_BY_ONE.undisturbed(server, root))


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("stage", "kills"),
    [
        (stage("customize", workers=1, batch=1), 6),
        (stage("customize", workers=1, batch=3), 4),
        (stage("customize", workers=2, batch=1), 4),
        (stage("synthesize", workers=1, batch=1), 6),
        (stage("synthesize", workers=2, batch=1), 4),
    ],
    ids=["customize", "customize-batched", "customize-workers", "synthesize", "synthesize-workers"],
)
def test_twenty_four_kills_lose_what_was_in_hand_at_most(
    server: Server, root: Path, tmp_path: Path, stage: Stage, kills: int
) -> None:
    ONE_BY_ONE.undisturbed(server, root)  # whose models synthesize draws with
    lost = kill_again_and_again(server, root, tmp_path, stage, kills=kills, seed=kills)
    print(f"{stage.options}: lost {lost}")
