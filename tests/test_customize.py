"""The customize stage: incremental per concept, resumable, and honest about what failed."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from attribution.augmentation import AugmentationSettings
from attribution.base_model import BaseSettings
from attribution.custom_diffusion import WEIGHTS as WEIGHTS_FILE
from attribution.customization import METHODS, RECORD, read_model
from attribution.customized_model import TOKEN_FILE
from attribution.files import read_json
from attribution.images import write_image_table
from attribution.sampling import Drawing, Sampler
from stages import customizer, lesson_plan
from stages.customize import run
from stages.incremental import FAILED, StageError, Summary
from stages.lesson_plan import Params, Words
from tests.tiny import save_tiny_pipeline
from tests.tiny_models import method_settings, training_settings

TRAINING = method_settings(steps=2, views_per_step=1, priors_per_step=1)
PARAMS = Params(
    method="custom_diffusion",
    seed=0,
    workers=1,
    concepts_per_batch=2,
    max_failed_share=0.0,
    views=4,
    prior_images=2,
    saved_dtype="float32",
    object=Words("{token} {noun}", "a {noun}", "red"),
    style=Words("a picture in the style of {token} art", "a picture", "art"),
    training=TRAINING,
    augmentation=AugmentationSettings(0.5, 0.4, 0.3, 1.2, 1.4, 0.5, 0.6, ("far away",), ("close up",)),
    prior_sampler=Sampler("ddim", 2, 2.0, 0.0),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseSettings:
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("base"))
    return BaseSettings(str(folder), None, "cpu", "float32")


def picture(seed: int) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
        encoded, "PNG"
    )
    return encoded.getvalue()


def write_exemplars(path: Path, concepts: dict[str, list[bytes]], *, stale: tuple[str, ...] = ()) -> Path:
    """A style for each id that begins with s, else an object; those in `stale` are not fresh."""
    rows = [
        {
            "image_id": f"{concept_id}-{i}",
            "concept_id": concept_id,
            "kind": "style" if concept_id[0] == "s" else "object",
            "noun": "picture" if concept_id[0] == "s" else "car",
            "split": "test" if concept_id[-1] == "t" else "train",
            "seen": True,
            "fresh": concept_id not in stale,
            "image": image,
        }
        for concept_id, images in concepts.items()
        for i, image in enumerate(images)
    ]
    write_image_table(path, pa.Table.from_pylist(rows))
    return path


CONCEPTS = {"o1": [picture(1)], "o2": [picture(2)], "s1": [picture(3), picture(4)]}


@pytest.fixture
def stage(tmp_path: Path, base: BaseSettings) -> Callable:
    """Runs the stage over these concepts, always in the same folder."""

    def run_over(concepts: dict[str, list[bytes]], **changes: object) -> Summary:
        exemplars = write_exemplars(tmp_path / "exemplars.parquet", concepts)
        return run(replace(PARAMS, **changes), base, exemplars=exemplars, customized=tmp_path / "customized")  # type: ignore[arg-type]

    return run_over


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_concept_becomes_a_delta_and_a_second_run_does_nothing(stage: Callable, tmp_path: Path) -> None:
    assert str(stage(CONCEPTS)) == "customize: 3 done, 0 reused, 0 pruned, 0 failed"
    made = contents(tmp_path / "customized")
    for concept_id in CONCEPTS:
        folder = tmp_path / "customized" / concept_id
        assert {path.name for path in folder.iterdir()} == {WEIGHTS_FILE, TOKEN_FILE, RECORD}
        record = read_json(folder / RECORD)
        assert record["concept_id"] == concept_id
        assert len(record["loss"]) == PARAMS.settings.steps
        assert all("<new1>" in prompt for prompt in record["prompts"])
    assert read_json(tmp_path / "customized" / "s1" / RECORD)["prior_prompt"] == "a picture"
    priors = [name for name in made if name.startswith("_prior")]
    assert len(priors) == 2  # one for the noun, one for styles
    assert str(stage(CONCEPTS)) == "customize: 0 done, 3 reused, 0 pruned, 0 failed"
    assert contents(tmp_path / "customized") == made


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_its_files_and_nothing_of_another(
    stage: Callable, tmp_path: Path, method: str
) -> None:
    stage({"o1": CONCEPTS["o1"]}, method="dreambooth" if method != "dreambooth" else "lora")
    stage({"o1": CONCEPTS["o1"]}, method=method)
    folder = tmp_path / "customized" / "o1"
    weights = METHODS[method].WEIGHTS
    wanted = {TOKEN_FILE, RECORD} | ({weights} if weights else set())
    assert {path.name for path in folder.iterdir()} == wanted
    record = read_json(folder / RECORD)
    assert (record["method"], read_model(folder).method) == (method, method)
    assert record["params"]["training"] == asdict(TRAINING.of(method))


def test_one_more_costs_one_and_one_less_is_pruned(stage: Callable, tmp_path: Path) -> None:
    stage(CONCEPTS)
    before = contents(tmp_path / "customized" / "o2")
    summary = stage({"o2": CONCEPTS["o2"], "o3": [picture(5)], "s1": CONCEPTS["s1"]})
    assert (summary.done, summary.reused, summary.pruned) == (["o3"], ["o2", "s1"], ["o1"])
    assert contents(tmp_path / "customized" / "o2") == before
    assert not (tmp_path / "customized" / "o1").exists()


@pytest.mark.parametrize(
    ("changes", "done"),
    [
        ({"concepts_per_batch": 3}, 0),
        ({"seed": 1}, 3),
        ({"training": replace(TRAINING, custom_diffusion=training_settings("custom_diffusion"))}, 3),
        ({"training": replace(TRAINING, lora=training_settings("lora"))}, 0),
        ({"method": "textual_inversion"}, 3),
        ({"augmentation": replace(PARAMS.augmentation, flip_share=0.0)}, 3),
    ],
    ids=["batch", "seed", "steps", "steps of another method", "method", "augmentation"],
)
def test_what_changes_the_result_is_done_again(
    stage: Callable, changes: dict[str, object], done: int
) -> None:
    stage(CONCEPTS)
    assert len(stage(CONCEPTS, **changes).done) == done


def test_another_exemplar_image_or_base_or_code_is_done_again(
    stage: Callable, tmp_path: Path, base: BaseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(CONCEPTS)
    assert stage({**CONCEPTS, "o2": [picture(6)]}).done == ["o2"]
    stage(CONCEPTS)
    other = replace(base, model=str(save_tiny_pipeline(tmp_path / "other", seed=1)))
    options: dict[str, Any] = {
        "exemplars": tmp_path / "exemplars.parquet",
        "customized": tmp_path / "customized",
    }
    assert len(run(PARAMS, other, **options).done) == 3
    code = tmp_path / "code.py"
    code.write_text("x = 1\n")
    monkeypatch.setattr(customizer, "CODE", (str(code),))
    assert len(run(PARAMS, base, **options).done) == 3
    code.write_text('"""About x."""\nx = 1  # one\n')
    assert run(PARAMS, base, **options).done == []
    code.write_text("x = 2\n")
    assert len(run(PARAMS, base, **options).done) == 3


@pytest.mark.parametrize("stopped_at", ["train", "write"])
def test_a_run_that_was_stopped_goes_on_and_ends_the_same(
    tmp_path: Path, base: BaseSettings, monkeypatch: pytest.MonkeyPatch, stopped_at: str
) -> None:
    exemplars = write_exemplars(tmp_path / "exemplars.parquet", {**CONCEPTS, "o3": [picture(7)]})
    run(PARAMS, base, exemplars=exemplars, customized=tmp_path / "undisturbed")
    name = "train" if stopped_at == "train" else "write_json"
    real, calls = getattr(customizer, name), []

    def stops(*arguments: object, **options: object) -> object:
        calls.append(name)
        # The second batch, or the second concept of it.
        if len(calls) == (2 if name == "train" else 4):
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(customizer, name, stops)
    with pytest.raises(KeyboardInterrupt):
        run(PARAMS, base, exemplars=exemplars, customized=tmp_path / "stopped")
    monkeypatch.setattr(customizer, name, real)
    summary = run(PARAMS, base, exemplars=exemplars, customized=tmp_path / "stopped")
    assert (summary.done, summary.reused) == (["o3", "s1"], ["o1", "o2"])
    assert contents(tmp_path / "stopped") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("file", [RECORD, WEIGHTS_FILE, TOKEN_FILE])
def test_what_is_damaged_is_made_again(stage: Callable, tmp_path: Path, file: str) -> None:
    stage(CONCEPTS)
    before, path = contents(tmp_path / "customized"), tmp_path / "customized" / "o2" / file
    flipped = bytearray(path.read_bytes())
    flipped[-3] ^= 255
    for damage in (b"", path.read_bytes()[:100], bytes(flipped)):
        path.write_bytes(damage)
        assert stage(CONCEPTS).done == ["o2"]
    path.unlink()
    assert stage(CONCEPTS).done == ["o2"]
    assert stage(CONCEPTS).reused == list(CONCEPTS)
    # In another batch than before: equal but for rounding.
    assert before.keys() == contents(tmp_path / "customized").keys()


@pytest.mark.parametrize("name", ["workers", "concepts_per_batch", "views", "prior_images"])
@pytest.mark.parametrize("value", [0, -1])
def test_params_that_would_leave_all_undone_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: wanted 1 or more, got {value}"):
        replace(PARAMS, **{name: value})


@pytest.mark.parametrize("name", ["learning_rate", "token_learning_rate", "weight_decay", "prior_weight"])
def test_rates_below_zero_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: wanted 0 or more, got -1\.0"):
        replace(TRAINING.custom_diffusion, **{name: -1.0})
    with pytest.raises(ValueError, match=f"{name}: wanted 0 or more, got nan"):
        replace(TRAINING.custom_diffusion, **{name: float("nan")})


def test_workers_change_rounding_only(stage: Callable, tmp_path: Path) -> None:
    stage(CONCEPTS)
    alone = {name: load_file(tmp_path / "customized" / name / WEIGHTS_FILE) for name in CONCEPTS}
    for name in CONCEPTS:
        shutil.rmtree(tmp_path / "customized" / name)
    assert stage(CONCEPTS, workers=2).done == list(CONCEPTS)
    for name, weights in alone.items():
        shared = load_file(tmp_path / "customized" / name / WEIGHTS_FILE)
        for key in weights:
            np.testing.assert_allclose(shared[key], weights[key], rtol=0, atol=1e-5)


def test_a_bad_exemplar_fails_alone_and_is_named(stage: Callable, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"2 done, 0 reused, 0 pruned, 1 failed\n  o2: o2-0: not an image"):
        stage({**CONCEPTS, "o2": [b"no picture"]})
    assert (tmp_path / "customized" / "s1").is_dir()
    assert not (tmp_path / "customized" / "o2").exists()


def test_what_failed_is_left_out_where_the_stage_may_pass_without_it(stage: Callable, tmp_path: Path) -> None:
    stage(CONCEPTS)
    spoilt = {**CONCEPTS, "o2": [b"no picture"]}
    wanted = r"wanted at most 0 to fail \(customize\.max_failed_share 0\.3\)"
    with pytest.raises(StageError, match=rf"2 reused, .*1 failed\n  o2: o2-0: not an image.*\n  {wanted}$"):
        stage(spoilt, max_failed_share=0.3)
    summary = stage(spoilt, max_failed_share=0.4)
    assert (
        summary.report() == f"customize: 0 done, 2 reused, 0 pruned, 1 failed\n  o2: {summary.failed['o2']}"
    )
    assert not (tmp_path / "customized" / "o2").exists()  # which was made of another exemplar
    assert read_json(tmp_path / "customized" / FAILED) == summary.failed
    assert stage(CONCEPTS).done == ["o2"]
    assert not (tmp_path / "customized" / FAILED).exists()


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"max_failed_share: wanted a share of 1, got {share}"):
        replace(PARAMS, max_failed_share=share)


DIVERGES = training_settings("custom_diffusion", learning_rate=1e38)


def test_a_loss_that_is_not_finite_is_named(stage: Callable) -> None:
    with pytest.raises(RuntimeError, match="o1: the loss is not finite; lower the learning rates"):
        stage({"o1": CONCEPTS["o1"]}, training=replace(TRAINING, custom_diffusion=DIVERGES))


def test_more_exemplars_than_views_are_refused(stage: Callable, tmp_path: Path) -> None:
    """What no view shows would never be learned, and yet be judged as a source."""
    concepts = {**CONCEPTS, "s2": [picture(seed) for seed in range(PARAMS.views + 1)]}
    with pytest.raises(StageError, match=r"s2: 5 exemplars, but customize\.views is 4: .*; do: raise views"):
        stage(concepts)
    assert not (tmp_path / "customized").exists()
    assert stage({"s2": concepts["s2"][1:]}).done == ["s2"]


def test_exemplars_that_are_not_fresh_are_left_to_the_shipped_data(
    tmp_path: Path, base: BaseSettings
) -> None:
    exemplars = write_exemplars(tmp_path / "exemplars.parquet", CONCEPTS, stale=("o2", "s1"))
    options: dict[str, Any] = {"exemplars": exemplars, "customized": tmp_path / "customized"}
    assert run(PARAMS, base, **options).done == ["o1"]
    assert run(PARAMS, base, **options, fresh=False).done == ["o2", "s1"]


def test_deltas_can_be_kept_in_half_precision(stage: Callable, tmp_path: Path) -> None:
    stage({"o1": CONCEPTS["o1"]}, saved_dtype="float16")
    stored = load_file(tmp_path / "customized" / "o1" / WEIGHTS_FILE)
    assert {str(tensor.dtype) for tensor in stored.values()} == {"torch.float16"}


@pytest.mark.parametrize("words", [("{noun}", "a {noun}"), ("{token} {noun}", "a {token}")])
def test_the_token_belongs_in_the_prompt_and_not_in_the_prior(words: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"wanted \{token\} in prompt and not in prior_prompt"):
        Words(*words, "red")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of so many kB, which can grow."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def make(size_kb: int) -> Path:
        nonlocal mounted
        options = f"size={size_kb}k" + ",remount" * mounted
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True)
        if done.returncode and not mounted:
            pytest.skip(f"no disk can be mounted: {done.stderr.decode().strip()}")
        mounted = True
        return place

    yield make
    if mounted:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize(
    ("concepts_per_batch", "message"),
    [
        (
            1,
            r"^customize: 1 done, .*0 failed, 5 skipped\n  stopped: .* wanted for 5 more customized models, ",
        ),
        (6, r"^customize: 0 done, .*0 failed, 6 skipped\n  stopped: .*the disk is full after .* of it, "),
    ],
    ids=["asked for", "full"],
)
def test_a_disk_too_small_is_told_and_nothing_is_left_half_written(
    tmp_path: Path,
    base: BaseSettings,
    small_disk: Callable[[int], Path],
    concepts_per_batch: int,
    message: str,
) -> None:
    concepts = {f"o{i}": [picture(i)] for i in range(6)}
    exemplars = write_exemplars(tmp_path / "exemplars.parquet", concepts)
    params = replace(PARAMS, concepts_per_batch=concepts_per_batch)
    run(params, base, exemplars=exemplars, customized=tmp_path / "ample")
    one_kb = sum(map(len, contents(tmp_path / "ample" / "o1").values())) // 1000
    customized = small_disk(4 * one_kb) / "customized"
    with pytest.raises(StageError, match=message):
        run(params, base, exemplars=exemplars, customized=customized)
    ample = contents(tmp_path / "ample")
    found = contents(customized)
    assert found.items() < ample.items()
    assert not [path for path in customized.rglob("*") if path.name.startswith(".")]
    small_disk(40 * one_kb)
    run(params, base, exemplars=exemplars, customized=customized)
    assert contents(customized) == ample


def test_a_bad_prior_fails_its_concepts_only(
    stage: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = lesson_plan.draw_fitting

    def draw(
        pipe: object, stack: object, drawings: list[Drawing], *rest: object, **options: object
    ) -> Tensor:
        latents = real(pipe, stack, drawings, *rest, **options)
        return latents / 0 if "car" in drawings[0].prompt else latents

    monkeypatch.setattr(lesson_plan, "draw_fitting", draw)
    with pytest.raises(StageError, match=r"1 done, .*2 failed\n  o1: 'a car': not finite numbers come of it"):
        stage(CONCEPTS)
    assert (tmp_path / "customized" / "s1").is_dir()
