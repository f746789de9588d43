"""The synthesize stage: seeds and prompts by concept, the queries table, and what is shipped."""

from __future__ import annotations

import io
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from attribution.base_model import BaseSettings, load_base
from attribution.concepts import Concept, read_concepts
from attribution.custom_diffusion import WEIGHTS as WEIGHTS_FILE
from attribution.customization import METHODS, read_model
from attribution.customized_model import TOKEN_FILE
from attribution.files import read_json
from attribution.images import decode_image, read_image_table
from attribution.sampling import Sampler
from stages import customize, ship_synthesized, workers
from stages.image_requests import Params, Request, choose, read_prompts
from stages.incremental import FAILED, StageError
from stages.query_table import write_queries
from stages.synthesize import draw_all, run
from stages.synthesizer import KEY, Synthesizer, draw
from tests import test_customize
from tests.test_customize import CONCEPTS, picture, write_exemplars
from tests.test_images import damaged_footer
from tests.tiny import save_tiny_pipeline

PARAMS = Params(
    seed=0,
    workers=1,
    prompts_per_kind=2,
    samples_per_prompt=2,
    images_per_batch=16,
    max_failed_share=0.0,
    webp_quality=95,
    use_shipped=True,
    sampler=Sampler("ddim", 2, 3.0, 1.0),
)
TEMPLATES = {
    "object": {
        "media": {
            "train": [f"a {medium} of {{token}} {{noun}}" for medium in ("painting", "drawing", "sketch")],
            "test": [f"a {medium} of the {{token}} {{noun}}" for medium in ("photo", "picture")],
        },
        "gpt": {
            "train": [f"{{token}} {{noun}} in the {place}" for place in ("beach", "forest", "house")],
            "test": [f"a {color} {{token}} {{noun}}" for color in ("red", "blue")],
        },
    },
    "style": {
        "object": {
            "train": [f"a painting of {what} in the style of {{token}} art" for what in ("tree", "cat")],
            "test": [f"a picture of {what} in the style of {{token}} art" for what in ("sun", "bird")],
        },
        "gpt": {
            "train": [f"{what} in {{token}} style" for what in ("house", "forest")],
            "test": [f"{what} with {{token}} art" for what in ("sun", "bird")],
        },
    },
}
ALL = {**CONCEPTS, "o3t": [picture(8)]}


def write_templates(folder: Path, templates: dict) -> Path:
    folder.mkdir(exist_ok=True)
    for kind, content in templates.items():
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Customized models of four concepts, made once."""
    root = tmp_path_factory.mktemp("world")
    base = BaseSettings(str(save_tiny_pipeline(root / "base")), None, "cpu", "float32")
    exemplars = write_exemplars(root / "exemplars.parquet", ALL)
    customize.run(test_customize.PARAMS, base, exemplars=exemplars, customized=root / "customized")
    prompts = write_templates(root / "prompts", TEMPLATES)
    return SimpleNamespace(base=base, exemplars=exemplars, customized=root / "customized", prompts=prompts)


def synthesize_in(folder: Path, world: SimpleNamespace, params: Params = PARAMS, **changes: Path) -> object:
    paths = {
        "exemplars": world.exemplars,
        "customized": world.customized,
        "prompts": world.prompts,
        **changes,
    }
    return run(params, world.base, synthesized=folder, **paths)


def test_every_concept_gets_its_images_and_a_second_run_draws_none(
    tmp_path: Path, world: SimpleNamespace
) -> None:
    assert str(synthesize_in(tmp_path, world)) == "synthesize: 4 done, 0 reused, 0 pruned, 0 failed"
    made = test_customize.contents(tmp_path)
    assert sorted(made) == ["o1.parquet", "o2.parquet", "o3t.parquet", "s1.parquet"]
    for concept_id in ALL:
        rows = read_image_table(tmp_path / f"{concept_id}.parquet").to_pylist()
        kinds = ("object", "gpt") if concept_id == "s1" else ("media", "gpt")
        assert Counter(row["prompt_kind"] for row in rows) == dict.fromkeys(kinds, 4)
        assert {row["prompt_split"] for row in rows} == {"test" if concept_id == "o3t" else "train"}
        assert len({row["image_id"] for row in rows}) == len({row["seed"] for row in rows}) == 8
        assert len({row["image"] for row in rows}) == 8
        assert {decode_image(row["image"]).size for row in rows} == {(16, 16)}
    assert str(synthesize_in(tmp_path, world)) == "synthesize: 0 done, 4 reused, 0 pruned, 0 failed"
    assert test_customize.contents(tmp_path) == made


def test_a_row_can_be_drawn_again_with_diffusers_alone(tmp_path: Path, world: SimpleNamespace) -> None:
    synthesize_in(tmp_path, world)
    row = read_image_table(tmp_path / "s1.parquet").to_pylist()[5]
    pipe = StableDiffusionPipeline.from_pretrained(
        world.base.model,
        dtype=torch.float32,
        safety_checker=None,
        low_cpu_mem_usage=False,
        local_files_only=True,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.load_attn_procs(world.customized / "s1", weight_name=WEIGHTS_FILE, _pipeline=pipe)
    pipe.load_textual_inversion(world.customized / "s1", weight_name=TOKEN_FILE)
    drawn = pipe(
        row["prompt"],
        num_inference_steps=PARAMS.sampler.steps,
        guidance_scale=PARAMS.sampler.guidance,
        eta=PARAMS.sampler.eta,
        generator=torch.Generator().manual_seed(row["seed"]),
    ).images[0]
    encoded = io.BytesIO()
    drawn.save(encoded, "WEBP", quality=PARAMS.webp_quality)
    theirs, ours = (
        np.asarray(decode_image(data), dtype=float) for data in (encoded.getvalue(), row["image"])
    )
    assert np.abs(theirs - ours).mean() < 1
    assert ours.std() > 5


@pytest.mark.parametrize("method", METHODS)
def test_images_are_drawn_by_whatever_method_customized(
    tmp_path: Path, world: SimpleNamespace, method: str
) -> None:
    params = replace(test_customize.PARAMS, method=method)
    exemplars = write_exemplars(tmp_path / "exemplars.parquet", {"o1": ALL["o1"]})
    customized, images = tmp_path / "customized", tmp_path / "images"
    for _ in range(2):
        customize.run(params, world.base, exemplars=exemplars, customized=customized)
        summary: Any = synthesize_in(images, world, exemplars=exemplars, customized=customized)
        params = replace(params, method="lora" if method != "lora" else "dreambooth")
        assert summary.done == ["o1"]


def test_adding_a_concept_changes_no_other_image(tmp_path: Path, world: SimpleNamespace) -> None:
    few = write_exemplars(tmp_path / "few.parquet", {name: ALL[name] for name in ("o1", "s1")})
    synthesize_in(tmp_path / "images", world, exemplars=few)
    before = test_customize.contents(tmp_path / "images")
    summary = synthesize_in(tmp_path / "images", world)
    assert (summary.done, summary.reused) == (["o2", "o3t"], ["o1", "s1"])  # type: ignore[attr-defined]
    after = test_customize.contents(tmp_path / "images")
    assert {name: after[name] for name in before} == before
    assert synthesize_in(tmp_path / "images", world, exemplars=few).pruned == ["o2.parquet", "o3t.parquet"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "done"),
    [({"images_per_batch": 3}, 0), ({"seed": 1}, 4), ({"sampler": replace(PARAMS.sampler, guidance=1.0)}, 4)],
    ids=["batch", "seed", "guidance"],
)
def test_what_changes_an_image_draws_it_again(
    tmp_path: Path, world: SimpleNamespace, changes: dict[str, object], done: int
) -> None:
    synthesize_in(tmp_path, world)
    assert len(synthesize_in(tmp_path, world, replace(PARAMS, **changes)).done) == done  # type: ignore[arg-type, attr-defined]


def test_a_damaged_table_is_made_again(tmp_path: Path, world: SimpleNamespace) -> None:
    synthesize_in(tmp_path, world)
    (tmp_path / "o2.parquet").write_bytes(b"")
    assert synthesize_in(tmp_path, world).done == ["o2"]  # type: ignore[attr-defined]
    # pyarrow has another error for a footer that is there, but wrong.
    whole = (tmp_path / "o1.parquet").read_bytes()
    (tmp_path / "o1.parquet").write_bytes(damaged_footer(whole))
    with pytest.raises(OSError, match="deserialize"):
        pq.read_schema(tmp_path / "o1.parquet")
    assert synthesize_in(tmp_path, world).done == ["o1"]  # type: ignore[attr-defined]
    assert (tmp_path / "o1.parquet").read_bytes() == whole


def test_a_table_that_may_not_be_read_is_not_made_again(
    tmp_path: Path, world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    synthesize_in(tmp_path, world)
    monkeypatch.setattr(pq, "read_schema", refuse)
    with pytest.raises(PermissionError):
        synthesize_in(tmp_path, world)


def test_a_model_that_is_missing_is_named(tmp_path: Path, world: SimpleNamespace) -> None:
    with pytest.raises(
        StageError,
        match=r"4 failed\n  o1: .*o1/.*: no such file; run: dvc repro --force --single-item customize\n",
    ):
        synthesize_in(tmp_path / "images", world, customized=tmp_path)


def test_seeds_and_prompts_belong_to_the_concept(world: SimpleNamespace) -> None:
    concepts = {concept.concept_id: concept for concept in read_concepts(world.exemplars)}
    prompts = read_prompts(world.prompts)
    more = replace(PARAMS, samples_per_prompt=3)
    few, many = choose(PARAMS, concepts["o1"], prompts), choose(more, concepts["o1"], prompts)
    assert set(few) < set(many)
    assert not {one.seed for one in few} & {one.seed for one in choose(PARAMS, concepts["o2"], prompts)}
    assert "car" in few[0].prompt


def test_too_few_prompts_are_named(world: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompts for object, media, test: 2, wanted 3; write more or lower"):
        synthesize_in(tmp_path, world, replace(PARAMS, prompts_per_kind=3))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("media", None, r"object.yaml: wanted the prompt kinds media, gpt, got"),
        ("media", {"train": []}, r"object.yaml: media: wanted the lists train and test"),
        ("gpt", {"train": ["a {noun}"], "test": []}, r"gpt: 'a \{noun\}': wanted \{token\} in it"),
        (
            "gpt",
            {"train": ["{token}"], "test": ["{token}"]},
            r"gpt: '\{token\}' is both a train and a test prompt",
        ),
        ("gpt", {"train": ["{token}", "{token}"], "test": []}, r"gpt: '\{token\}' is listed twice"),
        (
            "gpt",
            {"train": [], "test": TEMPLATES["object"]["media"]["train"]},
            r"'a painting of \{token\} \{noun\}' is both a train and a test prompt",
        ),
        (
            "gpt",
            {"train": TEMPLATES["object"]["media"]["train"], "test": []},
            r"object.yaml: .*'a painting of \{token\} \{noun\}' is listed twice",
        ),
        ("gpt", {"train": None, "test": []}, r"gpt: train: wanted a list of prompts, got None"),
        ("gpt", {"train": ["{token}", None], "test": []}, r"gpt: wanted a prompt, got None"),
        ("gpt", {"train": [7], "test": []}, r"gpt: wanted a prompt, got 7"),
        ("gpt", {"train": "{token}", "test": []}, r"gpt: train: wanted a list of prompts, got '\{token\}'"),
        ("gpt", {"train": ["{token} {"], "test": []}, r"object.yaml: gpt: prompt '\{token\} \{': "),
        (
            "gpt",
            {"train": ["{token} {place}"], "test": []},
            r"gpt: prompt .*: nothing to put for \{place\}; known: noun, token",
        ),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, kind: str, change: dict | None, message: str) -> None:
    content = {**TEMPLATES["object"], kind: change}
    if change is None:
        del content[kind]
    with pytest.raises(ValueError, match=message):
        read_prompts(write_templates(tmp_path, {**TEMPLATES, "object": content}))


@pytest.fixture(scope="module")
def shipped(world: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The same concepts, two of which are shipped."""
    root = tmp_path_factory.mktemp("shipped")
    exemplars = write_exemplars(root / "exemplars.parquet", ALL, stale=("o2", "s1"))
    options = {"prompts": world.prompts, "exemplars": exemplars, "work": root / "work"}
    summaries = ship_synthesized.run(
        test_customize.PARAMS, PARAMS, world.base, shipped=root / "synthesized.parquet", **options
    )
    assert [summary.done for summary in summaries] == [["o2", "s1"], ["o2", "s1"]]
    again = ship_synthesized.run(
        test_customize.PARAMS, PARAMS, world.base, shipped=root / "again.parquet", **options
    )
    assert [summary.done for summary in again] == [[], []]
    assert (root / "again.parquet").read_bytes() == (root / "synthesized.parquet").read_bytes()
    return SimpleNamespace(exemplars=exemplars, path=root / "synthesized.parquet")


def test_what_cannot_be_shipped_is_named_when_the_rest_is_drawn(
    tmp_path: Path, world: SimpleNamespace
) -> None:
    concepts = {"o1": [picture(1)], "o2": [b"no picture"]}
    exemplars = write_exemplars(tmp_path / "exemplars.parquet", concepts, stale=("o1", "o2"))
    options = {"prompts": world.prompts, "exemplars": exemplars, "work": tmp_path / "work"}
    shipped = tmp_path / "synthesized.parquet"
    with pytest.raises(
        StageError, match=r"(?s)o2: o2-0: not an image.*synthesize: 1 done, .*o2: .*no such file"
    ):
        ship_synthesized.run(test_customize.PARAMS, PARAMS, world.base, shipped=shipped, **options)
    assert (tmp_path / "work" / "synthesized" / "o1.parquet").is_file()
    assert not shipped.exists()


def test_queries_join_fresh_and_shipped(
    tmp_path: Path, world: SimpleNamespace, shipped: SimpleNamespace
) -> None:
    synthesize_in(tmp_path / "images", world, exemplars=shipped.exemplars)
    line = write_queries(
        tmp_path / "queries.parquet",
        world.base,
        exemplars=shipped.exemplars,
        synthesized=tmp_path / "images",
        shipped=shipped.path,
    )
    assert line == "queries: 16 fresh, 16 shipped, 0 shipped left out"
    table = pq.read_table(tmp_path / "queries.parquet")
    assert table.column_names == [
        *("image_id", "concept_id", "prompt_kind", "prompt", "prompt_split", "seed"),
        *("kind", "noun", "split", "seen", "source"),
    ]
    rows = table.to_pylist()
    # By concept, not by who drew the images.
    assert list(dict.fromkeys((row["concept_id"], row["source"]) for row in rows)) == [
        *(("o1", "fresh"), ("o2", "shipped"), ("o3t", "fresh"), ("s1", "shipped"))
    ]
    assert {row["kind"] for row in rows if row["concept_id"] == "s1"} == {"style"}
    assert {row["split"] for row in rows if row["concept_id"] == "o3t"} == {"test"}
    assert len({row["image_id"] for row in rows}) == 32


def test_shipped_rows_of_fresh_concepts_are_left_out(
    tmp_path: Path, world: SimpleNamespace, shipped: SimpleNamespace
) -> None:
    fresh = write_exemplars(tmp_path / "exemplars.parquet", {name: ALL[name] for name in ("o1", "o2")})
    synthesize_in(tmp_path / "images", world, exemplars=fresh)
    options = {"exemplars": fresh, "synthesized": tmp_path / "images"}
    path = tmp_path / "queries.parquet"
    line = write_queries(path, world.base, shipped=shipped.path, **options)
    assert line == "queries: 16 fresh, 0 shipped, 16 shipped left out"
    assert write_queries(path, world.base, shipped=None, **options).endswith("0 shipped, 0 shipped left out")


def test_shipped_images_of_another_base_or_other_exemplars_are_refused(
    tmp_path: Path, world: SimpleNamespace, shipped: SimpleNamespace
) -> None:
    other = replace(world.base, model=str(save_tiny_pipeline(tmp_path / "other", seed=1)))
    options = {"synthesized": tmp_path / "images", "shipped": shipped.path}
    again = r"run: python -m stages.ship_synthesized"
    with pytest.raises(ValueError, match=rf"drawn by another base model than .*; {again}"):
        write_queries(tmp_path / "queries.parquet", other, exemplars=shipped.exemplars, **options)
    for pictures in ([picture(3)], [picture(3), picture(9)]):
        changed = write_exemplars(tmp_path / "exemplars.parquet", {"s1": pictures}, stale=("s1",))
        with pytest.raises(ValueError, match=f"s1 is another concept, or looks different, now; {again}"):
            write_queries(tmp_path / "queries.parquet", world.base, exemplars=changed, **options)


def test_shipped_images_outlive_another_encoder_of_the_exemplars(
    tmp_path: Path, world: SimpleNamespace, shipped: SimpleNamespace
) -> None:
    def encoded_anew(data: bytes) -> bytes:
        encoded = io.BytesIO()
        decode_image(data).save(encoded, "PNG", compress_level=0)
        return encoded.getvalue()

    concepts = {name: [encoded_anew(data) for data in images] for name, images in ALL.items()}
    assert concepts["s1"] != ALL["s1"]
    exemplars = write_exemplars(tmp_path / "exemplars.parquet", concepts, stale=("o2", "s1"))
    line = write_queries(
        tmp_path / "queries.parquet",
        world.base,
        exemplars=exemplars,
        synthesized=tmp_path / "images",
        shipped=shipped.path,
    )
    assert line == "queries: 0 fresh, 16 shipped, 0 shipped left out"


def test_prompts_must_hold_the_token_that_the_model_knows(world: SimpleNamespace) -> None:
    model = replace(read_model(world.customized / "o1"), token="<sks>")
    with pytest.raises(ValueError, match=r"prompt 'a <new1> car': wanted <sks> in it"):
        draw(load_base(world.base), PARAMS, [model], [[Request("i", "media", "a <new1> car", "train", 1)]])


def test_a_part_is_as_large_as_its_group(world: SimpleNamespace, tmp_path: Path) -> None:
    """For it travels to another process with each group."""
    words = read_prompts(world.prompts)
    requests = {one.concept_id: choose(PARAMS, one, words) for one in read_concepts(world.exemplars)}
    whole = Synthesizer.of(PARAMS, world.base, requests, world.customized, tmp_path)
    part = whole.part(["o2"])
    assert (part.requests, part.keys) == ({"o2": requests["o2"]}, {"o2": whole.keys["o2"]})
    assert draw_all(part).done == ["o2"]
    assert whole.is_done("o2")


def test_pictures_are_webp(tmp_path: Path, world: SimpleNamespace) -> None:
    synthesize_in(tmp_path, world)
    data = read_image_table(tmp_path / "o1.parquet")["image"][0].as_py()
    assert Image.open(io.BytesIO(data)).format == "WEBP"
    assert pq.read_schema(tmp_path / "o1.parquet").metadata.keys() == {KEY}


def spoil(weights: Path, how: str) -> None:
    tensors = load_file(weights)
    name = next(name for name, tensor in tensors.items() if tensor.numel())
    if how == "nan":
        tensors[name] = torch.full_like(tensors[name], float("nan"))
    elif how == "layer":
        del tensors[name]
    save_file(tensors, weights)
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("nan", r"o2-[0-9a-f]{16}: not finite numbers \(8 of 8 images\); customize it anew"),
        ("layer", r"no model of this base: .+"),
        ("truncated", r".*o2/\S*: not a safetensors file: .+"),
    ],
)
@pytest.mark.parametrize("images_per_batch", [8, 32])
def test_a_bad_model_fails_alone_and_is_named(
    tmp_path: Path, world: SimpleNamespace, how: str, reason: str, images_per_batch: int
) -> None:
    customized = tmp_path / "customized"
    shutil.copytree(world.customized, customized)
    spoil(customized / "o2" / WEIGHTS_FILE, how)
    params = replace(PARAMS, images_per_batch=images_per_batch)
    with pytest.raises(
        StageError, match=rf"^synthesize: 3 done, .*1 failed\n  o2: {reason}\n  wanted at most 0 to fail"
    ):
        synthesize_in(tmp_path / "images", world, params, customized=customized)
    assert sorted(path.stem for path in (tmp_path / "images").iterdir()) == ["o1", "o3t", "s1"]


def test_what_failed_is_left_out_where_the_stage_may_pass_without_it(
    tmp_path: Path, world: SimpleNamespace, shipped: SimpleNamespace
) -> None:
    images, customized = tmp_path / "images", tmp_path / "customized"
    synthesize_in(images, world)
    shutil.copytree(world.customized, customized)
    shutil.rmtree(customized / "o2")  # as customize leaves what it passed without
    spoil(customized / "s1" / WEIGHTS_FILE, "nan")
    paths = {"customized": customized}
    failed = r"(?s)2 failed\n  o2: .*no such file.*\n  s1: .*not finite.*\n"
    with pytest.raises(
        StageError, match=rf"{failed}  wanted at most 1 to fail \(synthesize\.max_failed_share 0\.4\)"
    ):
        synthesize_in(images, world, replace(PARAMS, max_failed_share=0.4), **paths)
    summary: Any = synthesize_in(images, world, replace(PARAMS, max_failed_share=0.5), **paths)
    assert (summary.reused, sorted(summary.failed)) == (["o1", "o3t"], ["o2", "s1"])
    # Nothing is left of what was drawn with their former models, and what is shipped is no stand-in.
    assert sorted(path.name for path in images.iterdir()) == [FAILED, "o1.parquet", "o3t.parquet"]
    assert read_json(images / FAILED) == summary.failed
    options = {"exemplars": world.exemplars, "synthesized": images, "shipped": shipped.path}
    line = write_queries(tmp_path / "queries.parquet", world.base, **options)
    assert line == "queries: 16 fresh, 0 shipped, 16 shipped left out"
    assert synthesize_in(images, world).done == ["o2", "s1"]  # type: ignore[attr-defined]
    assert not (images / FAILED).exists()


def test_pixels_that_are_no_numbers_are_no_black_pictures(tmp_path: Path, world: SimpleNamespace) -> None:
    base = tmp_path / "base"
    shutil.copytree(world.base.model, base)
    (weights,) = (base / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["decoder.conv_out.bias"] *= float("nan")
    save_file(tensors, weights)
    broken = SimpleNamespace(**{**vars(world), "base": replace(world.base, model=str(base))})
    with pytest.raises(StageError, match=r"4 failed\n  o1: the decoder makes pixels that are no numbers"):
        synthesize_in(tmp_path / "images", broken)
    assert list((tmp_path / "images").iterdir()) == []


def test_images_that_memory_does_not_hold_are_drawn_in_smaller_batches(
    tmp_path: Path, world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real, drawn = workers.draw_latents, []

    def draw(pipe: object, stack: object, drawings: list, *rest: object, **options: object) -> torch.Tensor:
        if len(drawings) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        drawn.append(len(drawings))
        return real(pipe, stack, drawings, *rest, **options)

    monkeypatch.setattr(workers, "_held", {})
    synthesize_in(tmp_path / "ample", world)
    monkeypatch.setattr(workers, "draw_latents", draw)
    synthesize_in(tmp_path / "short", world)
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert said == [
        "synthesize: out of memory on 16 images; going on with 8 at a time",
        "synthesize: out of memory on 8 images; going on with 4 at a time",
    ]
    assert drawn == [4] * 8
    for concept_id in ALL:
        few, many = (
            [np.asarray(decode_image(data.as_py()), float) for data in read_image_table(path)["image"]]
            for path in (
                tmp_path / "short" / f"{concept_id}.parquet",
                tmp_path / "ample" / f"{concept_id}.parquet",
            )
        )
        assert np.abs(np.subtract(few, many)).mean() < 0.5


@pytest.mark.parametrize(
    "name", ["workers", "prompts_per_kind", "samples_per_prompt", "images_per_batch", "webp_quality"]
)
def test_params_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: wanted .*, got -1"):
        replace(PARAMS, **{name: -1})


def test_prompts_are_drawn_for_each_concept_alone() -> None:
    """Where there are more prompts than are asked, concepts get others, and in the end all are used."""
    told = {
        "train": [f"{place} {{token}} {{noun}}" for place in "abcdefgh"],
        "test": ["x {token}", "y {token}"],
    }
    prompts = {"object": {"media": told, "gpt": told}}
    params = replace(PARAMS, prompts_per_kind=2, samples_per_prompt=1)
    found = []
    for number in range(40):
        one = Concept(f"o{number}", "object", "car", "train", True, ())
        found.append(frozenset(request.prompt for request in choose(params, one, prompts)[:2]))
    assert len(set(found)) > 10
    assert len(set.union(*map(set, found))) == 8


def test_another_prompt_is_drawn_from_other_noise() -> None:
    told = {"train": ["a {token}", "b {token}"], "test": []}
    one = Concept("o", "object", "car", "train", True, ())
    params = replace(PARAMS, prompts_per_kind=2, samples_per_prompt=2)
    requests = choose(
        params, one, {"object": {"media": told, "gpt": {"train": ["c {token}", "d {token}"], "test": []}}}
    )
    assert len({request.seed for request in requests}) == len(requests) == 8
