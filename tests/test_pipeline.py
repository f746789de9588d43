"""The graph, run by the real DVC in a copy of the repository with a world and a base model of few kilobytes.

The tests share one copy. Each finds it up to date, changes something, and leaves it up to date again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from attribution.backbones import write_backbone
from attribution.base_model import BaseSettings
from attribution.params import load_params
from miniworld.readings import READINGS
from stages import customize, render, ship_synthesized, synthesize
from tests.tiny import save_tiny_pipeline

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
BACKBONES = ("pixels", "color_histogram")
FEW = {"train": 4, "val": 2, "test_seen": 2, "test_unseen": 2}
TINY: dict[str, Any] = {
    "base": {"model": "data/base/mini", "revision": None, "device": "cpu", "dtype": "float32"},
    "render": {
        "objects": FEW,
        "styles": FEW,
        "fresh_every": 2,
        "distractors": 60,
        "distractors_per_part": 40,
    },
    # tests/test_workers.py is about several: here each would take longer to start than to work.
    "customize": {
        "workers": 1,
        "object": {"initializer": "tree"},
        "style": {"initializer": "picture"},
        "concepts_per_batch": 1,
        "views": 16,
        "prior_images": 2,
        "training": {"custom_diffusion": {"steps": 2}, "lora": {"steps": 2}},
        "prior_sampler": {"steps": 2},
    },
    "gate": {"prompts": 32, "sampler": {"steps": 2}},
    "gate_customized": {
        "backbones": ["supervised"],
        "control_prompts": 8,
        "resamples": 20,
        "sampler": {"steps": 2},
    },
    "synthesize": {"workers": 1, "prompts_per_kind": 1, "samples_per_prompt": 2, "sampler": {"steps": 2}},
    "featurize": {"backbones": list(BACKBONES), "shard_rows": 64},
    "train_mapper": {"epochs": 2, "patience": 2, "batch_size": 16, "validation_distractors": 50},
    "evaluate": {"resamples": 20, "gallery_sizes": [30], "top_k": 10, "page_queries": 2},
}
# Of the shipped world, not of the tiny one.
MADE_ELSEWHERE = ("data/base/", "data/backbones/", "data/shipped/", "docs/", "metrics/", "dvc.lock")
PER_BACKBONE = ("featurize", "train_mapper", "calibrate", "evaluate")
# Says whose code a stage runs.
PROBE = """
import json
from pathlib import Path

from attribution import files

EDITION = 1

if __name__ == "__main__":
    Path("probe.json").write_text(json.dumps({"edition": EDITION, "library": files.__file__}))
"""
PROBE_STAGE = {
    "cmd": "python -m stages.probe",
    "deps": ["stages/probe.py", "attribution/files.py"],
    "params": ["evaluate.resamples"],
    "metrics": [{"probe.json": {"cache": False}}],
}


@dataclass(frozen=True)
class Repository:
    """A copy of this repository under git and DVC."""

    path: Path

    def environment(self) -> dict[str, str]:
        dropped = ("DVC_", "GIT_", "MLFLOW_", "PYTHON")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        of_git = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        return inherited | of_git | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.path, env=self.environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def repro(self, *targets: str) -> list[str]:
        """The names of the stages that ran."""
        return re.findall(r"Running stage '(.*?)'", self.run("dvc", "repro", *targets))

    def edit_params(self, changes: dict[str, Any]) -> None:
        path = self.path / "params.yaml"
        params = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(merge(params, changes), sort_keys=False))


@dataclass(frozen=True)
class FirstRun:
    """A repro that was killed in customize and started again."""

    at_kill: dict[str, int]
    at_end: dict[str, int]
    ran_after: list[str]


def merge(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: merge(old.get(key), value) for key, value in new.items()}
    return new


def copy_repository(target: Path) -> Repository:
    """What git would clone of the working tree, with the tiny world in place of the shipped one."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (
            name.startswith(("data/base/", "data/backbones/", "data/shipped/", "docs/", "metrics/"))
            or name == "dvc.lock"
        ):
            continue
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    repository = Repository(target)
    repository.edit_params(TINY)
    save_tiny_pipeline(target / "data" / "base" / "mini", latents=(4, 8), factor=8, positions=77)
    save_classifier(target / "data" / "backbones" / "supervised")
    (target / "stages" / "probe.py").write_text(PROBE)
    graph = yaml.safe_load((target / "dvc.yaml").read_text())
    graph["stages"]["probe"] = PROBE_STAGE
    (target / "dvc.yaml").write_text(yaml.safe_dump(graph, sort_keys=False))
    ship_images(target)
    repository.run("git", "init", "--quiet", "--initial-branch", "main")
    repository.run("git", "config", "user.name", "test")
    repository.run("git", "config", "user.email", "test@example.invalid")
    repository.run("git", "add", "--all")
    repository.run("git", "commit", "--quiet", "--message", "copy")
    return repository


def save_classifier(folder: Path) -> None:
    """A supervised backbone and its reading heads, untrained: the gates run, whatever they then say."""
    kwargs = {"channels": [8, 8, 8, 16]}
    looks = {"size": 64, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"}
    torch.manual_seed(0)  # the same in every copy
    net = timm.create_model("resnet10t", num_classes=0, **kwargs)
    config = {"library": "timm", "architecture": "resnet10t", "kwargs": kwargs}
    write_backbone(folder, {**config, "preprocess": looks, "revision": "untrained"}, net)
    heads = {}
    for name, values in READINGS.items():
        heads[f"{name}.weight"] = torch.randn(len(values), net.num_features)
        heads[f"{name}.bias"] = torch.zeros(len(values))
    save_file(heads, folder / "heads.safetensors")


def ship_images(root: Path) -> None:
    """Makes data/shipped in the copy as its maintainers make it, without starting a process for it."""
    params = root / "params.yaml"
    world = {"exemplars": root / "data/world/exemplars.parquet"}
    render.run(
        load_params(render.Params, "render", params), distractors=root / "data/world/distractors", **world
    )
    base = load_params(BaseSettings, "base", params)
    ship_synthesized.run(
        load_params(customize.Params, "customize", params),
        load_params(synthesize.Params, "synthesize", params),
        replace(base, model=str(root / base.model)),
        prompts=root / "data/prompts",
        work=root / "data/shipping",
        shipped=root / "data/shipped/synthesized.parquet",
        **world,
    )
    shutil.rmtree(root / "data/world")


def finished_models(repository: Repository) -> dict[str, int]:
    """Customized models that are whole, with the time their record was written."""
    records = (repository.path / "data" / "customized").glob("*/customized.json")
    return {record.parent.name: record.stat().st_mtime_ns for record in records}


@contextlib.contextmanager
def killed_repro(repository: Repository) -> Iterator[Callable[[], None]]:
    """A repro that runs meanwhile and is killed with its stage; the call asserts that it still runs."""
    log = repository.path.with_name("killed.log")
    with log.open("w") as output:
        process = subprocess.Popen(
            ["dvc", "repro"],
            cwd=repository.path,
            env=repository.environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def check() -> None:
        assert process.poll() is None, f"dvc repro ended before it could be killed:\n{log.read_text()}"

    try:
        yield check
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Repository, FirstRun]:
    repository = copy_repository(tmp_path_factory.mktemp("pipeline") / "copy")
    with killed_repro(repository) as still_runs:
        while not finished_models(repository):
            still_runs()
            time.sleep(0.002)
    at_kill = finished_models(repository)
    ran_after = repository.repro()
    # Experiments run in a copy made from git: what is new must be in it, or it is made again.
    repository.run("git", "add", "--all")
    repository.run("git", "commit", "--quiet", "--message", "results")
    return repository, FirstRun(at_kill, finished_models(repository), ran_after)


@pytest.fixture
def repository(first_run: tuple[Repository, FirstRun]) -> Repository:
    return first_run[0]


def columns(stages: tuple[str, ...], backbones: tuple[str, ...]) -> set[str]:
    return {f"{stage}@{backbone}" for stage in stages for backbone in backbones}


def test_every_stage_runs_and_writes_its_metrics(first_run: tuple[Repository, FirstRun]) -> None:
    repository, run = first_run
    light = {"customize", "synthesize", "gate_customized", "probe"}
    # What stands before customize ran before the kill, or stands beside it and ran after.
    assert {*run.ran_after} - {"render", "gate"} == light | columns(PER_BACKBONE, BACKBONES)
    for gate in ("gate", "gate_customized"):
        assert "passed" in json.loads((repository.path / "metrics" / f"{gate}.json").read_text())
    for backbone in BACKBONES:
        metrics = json.loads((repository.path / "metrics" / f"{backbone}.json").read_text())
        assert 0 <= metrics["object"]["all"]["mapped"]["recall_at_10"] <= 1
        for picture in ("recall_at_k", "gallery_size", "reliability", "page"):
            assert (repository.path / "data" / "evaluation" / backbone / f"{picture}.png").stat().st_size > 0


def test_a_killed_run_resumes_where_it_was(first_run: tuple[Repository, FirstRun]) -> None:
    _, run = first_run
    assert 0 < len(run.at_kill) < len(run.at_end)
    assert run.at_kill.items() <= run.at_end.items()


def test_a_second_repro_runs_nothing(repository: Repository) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert repository.repro() == []
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, for the machine may be busy with something else.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert repository.run("git", "ls-files", "*.gitignore").split() == [".dvc/.gitignore", ".gitignore"]


def test_a_new_temperature_reruns_the_mapper_and_what_follows(repository: Repository) -> None:
    repository.edit_params({"train_mapper": {"temperature": 0.5}})
    assert {*repository.repro()} == columns(("train_mapper", "calibrate", "evaluate"), BACKBONES)


def test_one_more_backbone_runs_its_column_only(repository: Repository) -> None:
    params = yaml.safe_load((repository.path / "params.yaml").read_text())["featurize"]
    small = params["settings"]["pixels"] | {"image_size": 4}
    repository.edit_params(
        {"featurize": {"backbones": [*params["backbones"], "few_pixels"], "settings": {"few_pixels": small}}}
    )
    assert {*repository.repro()} == columns(PER_BACKBONE, ("few_pixels",))
    # Taken away again: nothing is left to do.
    repository.edit_params({"featurize": {"backbones": params["backbones"]}})
    assert repository.repro() == []


def test_a_temporary_experiment_runs_the_code_of_its_copy(repository: Repository) -> None:
    probe = repository.path / "stages" / "probe.py"
    probe.write_text(PROBE.replace("EDITION = 1", "EDITION = 2"))
    repository.run("dvc", "exp", "run", "--temp", "--name", "elsewhere", "probe")
    probe.write_text(PROBE)
    found = json.loads(repository.run("git", "show", f"{experiment(repository, 'elsewhere')}:probe.json"))
    assert found["edition"] == 2
    assert Path(found["library"]).is_relative_to(repository.path / ".dvc" / "tmp" / "exps")


def test_queued_experiments_run_their_own_code_and_mlflow_loses_none(repository: Repository) -> None:
    probe = repository.path / "stages" / "probe.py"
    for edition, resamples in ((3, 21), (4, 22)):
        probe.write_text(PROBE.replace("EDITION = 1", f"EDITION = {edition}"))
        changes = ("--set-param", f"evaluate.resamples={resamples}")
        repository.run("dvc", "exp", "run", "--queue", "--name", f"edition-{edition}", *changes)
    probe.write_text(PROBE)
    before = mlflow_runs(repository)
    # Not `run`: workers inherit its pipe, and one that idles on would hold the test up though all is done.
    with repository.path.with_name("queue.log").open("w") as log:
        subprocess.run(
            ["dvc", "queue", "start", "--jobs", "2"],
            cwd=repository.path, env=repository.environment(), stdout=log, stderr=log, check=True,
        )  # fmt: skip
    for edition in (3, 4):
        revision = wait_for_experiment(repository, f"edition-{edition}")
        assert json.loads(repository.run("git", "show", f"{revision}:probe.json"))["edition"] == edition
        ran = re.findall(
            r"Running stage '(.*?)'", repository.run("dvc", "queue", "logs", f"edition-{edition}")
        )
        assert {*ran} == {"probe"} | columns(("evaluate",), BACKBONES)
    logged = [run for run in mlflow_runs(repository) if run not in before]
    wanted = [(f"edition-{edition}", backbone, "FINISHED") for edition in (3, 4) for backbone in BACKBONES]
    assert sorted(run[1:] for run in logged) == sorted(wanted)


@pytest.mark.nightly
def test_ten_kills_change_no_metric(tmp_path: Path) -> None:
    disturbed, undisturbed = (copy_repository(tmp_path / name) for name in ("disturbed", "undisturbed"))
    start = time.monotonic()
    undisturbed.repro()
    whole_s = time.monotonic() - start
    # A tenth of the work each on average, so that even the last kill finds something to do.
    for moment in np.random.default_rng(0).uniform(0, whole_s / 5, size=10):
        with killed_repro(disturbed):
            time.sleep(moment)
    disturbed.repro()
    wanted = metrics(undisturbed)
    assert wanted
    assert metrics(disturbed) == wanted


def metrics(repository: Repository) -> dict[str, str]:
    return {path.name: path.read_text() for path in (repository.path / "metrics").glob("*.json")}


def experiment(repository: Repository, name: str) -> str | None:
    references = repository.run("git", "for-each-ref", "--format", "%(refname)", "refs/exps").split()
    return next((reference for reference in references if reference.endswith(f"/{name}")), None)


def wait_for_experiment(repository: Repository, name: str, timeout_s: float = 600) -> str:
    start = time.monotonic()
    while (found := experiment(repository, name)) is None:
        elapsed_s = time.monotonic() - start
        if elapsed_s > 20:  # asking DVC costs a second of CPU that the experiment could use
            status = repository.run("dvc", "queue", "status")
            assert "Failed" not in status, repository.run("dvc", "queue", "logs", name)
            assert elapsed_s < timeout_s, status
        time.sleep(0.5 if elapsed_s < 20 else 10)
    return found


def mlflow_runs(repository: Repository) -> list[tuple[str, str, str, str]]:
    """Id, experiment, backbone and status of every run that has the headline metric."""
    query = """
        select runs.run_uuid, experiment.value, backbone.value, runs.status from runs
        join tags as backbone on backbone.run_uuid = runs.run_uuid and backbone.key = 'backbone'
        join latest_metrics as headline on headline.run_uuid = runs.run_uuid and headline.key = 'recall_at_10'
        left join tags as experiment
          on experiment.run_uuid = runs.run_uuid and experiment.key = 'DVC_EXP_NAME'
    """
    with sqlite3.connect(f"file:{repository.path / 'mlflow.db'}?mode=ro", uri=True) as connection:
        return list(connection.execute(query))
