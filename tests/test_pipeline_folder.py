"""Where a base comes from: the right files of a folder, of the hub's cache, of the hub; or one clear line."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi

from attribution.base_model import BaseSettings, load_base
from attribution.pipeline_folder import FAMILIES, find_pipeline, wanted_weights
from tests.hub_cache import COMMIT, MODEL, as_published, fill_cache
from tests.tiny import save_tiny_pipeline

PARTS = FAMILIES["StableDiffusionPipeline"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "base"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def hub(settings: str | None = COMMIT, dtype: Any = "float32") -> BaseSettings:
    return BaseSettings(MODEL, settings, "cpu", dtype)


def test_a_repository_of_halves_alone_is_loaded_from_the_cache(folder: Path, tiny: Path, cache: Path) -> None:
    snapshot = fill_cache(cache, as_published(folder))
    found = find_pipeline(MODEL, COMMIT)
    assert (found.path, found.family, found.variant) == (snapshot, "StableDiffusionPipeline", "fp16")
    pipe, wanted = load_base(hub()), load_base(BaseSettings(str(tiny), None, "cpu", "float32"))
    assert all(map(torch.equal, pipe.unet.parameters(), wanted.unet.parameters()))
    assert all(map(torch.equal, pipe.text_encoder.parameters(), wanted.text_encoder.parameters()))
    text = "a <new1> photo, 2 red cars"
    assert pipe.tokenizer(text).input_ids == wanted.tokenizer(text).input_ids
    assert pipe.safety_checker is None


@pytest.mark.parametrize(("dtype", "variant"), [("float32", None), ("bfloat16", None), ("float16", "fp16")])
def test_halves_are_read_where_halves_are_wanted(folder: Path, dtype: str, variant: str | None) -> None:
    for path in folder.glob("*/*.safetensors"):
        shutil.copyfile(path, path.with_suffix(".fp16.safetensors"))
    assert find_pipeline(str(folder), None, halves=dtype == "float16").variant == variant
    pipe = load_base(BaseSettings(str(folder), None, "cpu", dtype))
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {getattr(torch, dtype)}


def test_only_what_is_needed_is_fetched(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = as_published(folder)
    asked: list[list[str]] = []

    def names(self: HfApi, model: str, *, revision: str) -> list[str]:
        assert (model, revision) == (MODEL, COMMIT)
        return [str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()]

    def snapshot_download(model: str, *, revision: str, allow_patterns: list[str]) -> str:
        chosen = [
            name
            for name in names(HfApi(), model, revision=revision)
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
        ]
        asked.append(chosen)
        return str(fill_cache(cache, remote, chosen))

    monkeypatch.setattr(HfApi, "list_repo_files", names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load_base(hub())
    assert asked[0] == ["model_index.json"]
    fetched = {name for chosen in asked for name in chosen}
    assert {"unet/diffusion_pytorch_model.fp16.safetensors", "tokenizer/merges.txt"} <= fetched
    assert not any(name.endswith((".bin", ".md")) for name in fetched)
    asked.clear()
    load_base(hub())
    assert not asked  # all of it was in the cache

    def breaks_off(model: str, *, revision: str, allow_patterns: list[str]) -> str:
        if allow_patterns != ["model_index.json"]:
            raise ConnectionError("the line\nwent dead.")
        return snapshot_download(model, revision=revision, allow_patterns=allow_patterns)

    shutil.rmtree(cache)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", breaks_off)
    with pytest.raises(FileNotFoundError, match=r"cannot be fetched \(the line went dead\); where the hub"):
        load_base(hub())


def test_what_cannot_be_had_is_one_line(cache: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=rf"base.model: {MODEL} at {COMMIT}: not in {cache}, and cannot be fetched \(.*outgoing traffic"
        rf".*\); where the hub can be reached: hf download {MODEL} --revision {COMMIT} --include",
    ) as raised:
        load_base(hub())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("missing", ["unet/*.safetensors", "unet/config.json", "tokenizer/*", "scheduler/*"])
def test_half_a_snapshot_is_not_taken_for_a_whole_one(folder: Path, cache: Path, missing: str) -> None:
    repository = as_published(folder)
    for path in repository.glob(missing):
        path.unlink()
    fill_cache(cache, repository)
    with pytest.raises(FileNotFoundError, match="cannot be fetched"):
        load_base(hub())


@pytest.mark.parametrize(
    ("revision", "message"),
    [
        (None, "no such folder; a hub id wants base.revision: a commit"),
        ("main", "wanted a commit of 40 hex digits, got main.*git ls-remote https://huggingface.co/" + MODEL),
        (COMMIT[:12], "wanted a commit of 40 hex digits, got 0123456789ab:"),
    ],
)
@pytest.mark.parametrize("use", [load_base, BaseSettings.key], ids=["load", "key"])
def test_a_hub_id_wants_its_commit(use: Callable, revision: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use(hub(revision))


def test_the_key_of_a_hub_id_is_its_commit() -> None:
    assert hub().key() != hub(COMMIT[::-1]).key()


@pytest.mark.parametrize(
    "name",
    ["StableDiffusionInpaintPipeline", "FluxPipeline", "StableDiffusionXLImg2ImgPipeline", None],
)
def test_another_kind_of_pipeline_is_refused(folder: Path, name: str | None) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    with pytest.raises(
        ValueError, match=rf"model_index\.json: a {name}; wanted one of StableDiffusionPipeline, StableDiff"
    ):
        load_base(BaseSettings(str(folder), None, "cpu", "float32"))


@pytest.mark.parametrize("index", [[], {"_class_name": ["pipeline", "MyPipeline"]}])
def test_an_index_that_names_no_class_is_refused(folder: Path, index: Any) -> None:
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model_index\.json: a .*; wanted one of StableDiffusionPipeline"):
        find_pipeline(str(folder), None)


def test_pickled_weights_are_refused(folder: Path) -> None:
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(
        ValueError,
        match=r"base: unet: got only unet/diffusion_pytorch_model\.bin; wanted \.safetensors: nothing is unp",
    ):
        load_base(BaseSettings(str(folder), None, "cpu", "float32"))


def test_a_folder_without_a_pipeline_and_a_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json; wanted a folder written by save_pre"):
        find_pipeline(str(tmp_path), None)
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ValueError, match="a file; wanted a folder in diffusers' layout; make it by"):
        find_pipeline(str(file), None)


UNET = "unet/diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ([f"{UNET}.safetensors", f"{UNET}.fp16.safetensors", f"{UNET}.bin"], [f"{UNET}.safetensors"]),
        ([f"{UNET}.fp16.safetensors", f"{UNET}.non_ema.safetensors"], [f"{UNET}.fp16.safetensors"]),
        (
            [f"{UNET}-0000{i}-of-00002.safetensors" for i in (1, 2)],
            [f"{UNET}-0000{i}-of-00002.safetensors" for i in (1, 2)],
        ),
        ([f"{UNET}-00001-of-00002.safetensors", f"{UNET}.fp16.safetensors"], [f"{UNET}.fp16.safetensors"]),
    ],
    ids=["whole", "halves", "shards", "shard missing"],
)
def test_weights_of_one_precision_are_chosen(names: list[str], wanted: list[str]) -> None:
    assert wanted_weights(names, ["unet"]) == wanted


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([f"{UNET}-00001-of-00002.safetensors"], "unet: wanted all safetensors files of one precision, got"),
        ([f"{UNET}.non_ema.safetensors"], "wanted all safetensors files of one precision, got unet/diff"),
        (["vae/config.json"], r"no weights of unet; wanted unet/\*\.safetensors"),
    ],
)
def test_missing_weights_are_named(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wanted_weights(names, PARTS)
