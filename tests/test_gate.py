"""The gates: arithmetic by hand, what is compared with what; the shipped base model held to its report."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from attribution.backbones import Backbone, BackboneSettings
from attribution.base_model import BaseSettings
from attribution.concepts import Concept, Exemplar
from attribution.features import Space
from attribution.params import load_params
from attribution.preprocessing import Preprocessing
from miniworld.draw import render
from miniworld.readings import READINGS, true_readings
from stages import gate, gate_customized
from stages.gate import (
    Params,
    draw_scenes,
    prompt,
    read_pictures,
    reading_report,
    run,
    sample_base,
    sample_grid,
    wilson,
)
from stages.gate_customized import Drawn, compare, control_samples, own_nearer, read_synthesized

ROOT = Path(__file__).resolve().parents[1]
HEADS = ROOT / "data/backbones/supervised/heads.safetensors"
BASE = BaseSettings("none", None, "cpu", "float32")
CLASSIFIER = load_params(BackboneSettings, "featurize.settings.supervised")
SMALL = replace(load_params(Params, "gate"), prompts=96, wanted={"noun": 0.8, "color": 0.7})


def test_wilson_interval_of_half() -> None:
    low, high = wilson(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_reading_report_has_its_controls() -> None:
    truth = np.array([0, 1, 2, 3])
    report = reading_report("noun", drawn=np.array([0, 3, 2, 3]), rendered=truth, truth=truth)
    assert report["share"] == 0.75
    assert report["rendered"] == 1.0
    assert report["permuted"] == 0.25  # against 2, 3, 0, 1
    assert report["chance"] == 1 / 24


def test_own_nearer_counts_rivals_of_the_same_noun() -> None:
    exemplars = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.0, 5.0]])
    nouns = np.array(["apple", "apple", "apple", "car"])
    images = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    share, margin = own_nearer(images, np.array([0, 0, 3]), exemplars, nouns)
    assert share[0] == 1.0
    assert share[1] == 0.0
    assert np.isnan(share[2])  # the only car
    assert margin[0] == pytest.approx(1 - (0.8 + 0.0) / 2)


def test_grid_is_twice_the_size() -> None:
    pictures = np.stack([np.full((4, 4, 3), value, dtype=np.uint8) for value in range(6)])
    grid = sample_grid(pictures, columns=3)
    assert grid.size == (24, 16)
    assert grid.getpixel((23, 15)) == (5, 5, 5)


def test_prompts_differ_and_name_what_the_scene_shows() -> None:
    params = replace(load_params(Params, "gate"), prompts=40)
    scenes = draw_scenes(params)
    prompts = [prompt(scene) for scene in scenes]
    assert len(set(prompts)) == 40
    assert all(scene.instance.noun in text and scene.instance.color in text
               for scene, text in zip(scenes, prompts, strict=True))  # fmt: skip


@pytest.fixture(scope="module")
def report() -> dict:
    return json.loads((ROOT / "metrics/gate.json").read_text())


def test_classifier_reads_renderings(report: dict) -> None:
    """The judge must be good before what it says of samples means anything."""
    scenes = draw_scenes(replace(load_params(Params, "gate"), prompts=200))
    pictures = np.stack([np.asarray(render(scene)) for scene in scenes])
    read = read_pictures(
        pictures, load_params(BackboneSettings, "featurize.settings.supervised"), HEADS, root=ROOT
    )
    for name, least in (("noun", 0.9), ("color", 0.75)):
        truth = np.array([true_readings(scene)[name] for scene in scenes])
        assert np.mean(read[name] == truth) >= least
        assert report["readings"][name]["rendered"] >= least


def test_shipped_base_model_is_the_one_reported(report: dict) -> None:
    """Samples of the first prompts, drawn now, are read right as often as the report says."""
    params = load_params(Params, "gate")
    few = replace(params, prompts=100)
    scenes = draw_scenes(few)
    pictures = sample_base(
        load_params(BaseSettings, "base"), [prompt(scene) for scene in scenes], few.sampler,
        seed=few.seed, images_per_batch=few.images_per_batch,
    )  # fmt: skip
    Image.fromarray(pictures[0])
    read = read_pictures(
        pictures, load_params(BackboneSettings, "featurize.settings.supervised"), HEADS, root=ROOT
    )
    for name in params.wanted:
        truth = np.array([true_readings(scene)[name] for scene in scenes])
        assert np.mean(read[name] == truth) == pytest.approx(report["readings"][name]["share"], abs=0.13)


def test_gate_of_the_base_model_is_passed(report: dict) -> None:
    for name, least in report["wanted"].items():
        assert report["readings"][name]["share"] >= least


def test_customization_transfers_identity() -> None:
    """In every space the own exemplar is the nearer more often than not, and for the base model it is not."""
    for space in json.loads((ROOT / "metrics/gate_customized.json").read_text())["spaces"].values():
        assert space["customized"]["interval_low"] > 0.5
        assert space["customized"]["interval_low"] > space["base"]["interval_high"]
        assert space["base"]["interval_low"] < 0.5 < space["base"]["interval_high"]


def test_gate_of_customization_is_passed() -> None:
    found = json.loads((ROOT / "metrics/gate_customized.json").read_text())
    space = found["spaces"][found["judge"]]
    assert space["customized"]["share"] >= found["wanted"]
    assert space["base"]["share"] < found["wanted"]


@pytest.mark.parametrize(("share", "count"), [(0.9, 20), (0.05, 100)])
def test_wilson_interval_is_where_the_score_test_rejects(share: float, count: int) -> None:
    for end in wilson(share, count):
        assert abs(share - end) / np.sqrt(end * (1 - end) / count) == pytest.approx(1.959964)


@pytest.mark.parametrize(("wrong", "passed"), [((), True), (("color",), False), (("noun",), False)])
def test_the_gate_reads_samples_and_passes_where_all_are_as_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: tuple[str, ...], passed: bool
) -> None:
    """Pictures of the base are black here, renderings are not: the classifier is told which is which."""
    truth = [true_readings(scene) for scene in draw_scenes(SMALL)]

    def read(pictures: np.ndarray, *_: Any, **__: Any) -> dict[str, np.ndarray]:
        right = {name: np.array([one[name] for one in truth]) for name in READINGS}
        sampled = not pictures.any()
        return {
            name: (found + 1) % len(READINGS[name]) if sampled and name in wrong else found
            for name, found in right.items()
        }

    monkeypatch.setattr(gate, "read_pictures", read)
    monkeypatch.setattr(gate, "sample_base", lambda *_, **__: np.zeros((96, 64, 64, 3), np.uint8))
    run(
        SMALL, BASE, CLASSIFIER,
        heads=tmp_path, metrics=tmp_path / "gate.json", grid=tmp_path / "grid.png", root=tmp_path,
    )  # fmt: skip
    found = json.loads((tmp_path / "gate.json").read_text())
    assert found["passed"] == passed
    for name in gate.READ:
        assert found["readings"][name]["share"] == (0 if name in wrong else 1)
        assert found["readings"][name]["rendered"] == 1


def test_each_prompt_is_sampled_from_its_own_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(gate, "load_base", lambda base: None)
    monkeypatch.setattr(gate, "base_stack", lambda *_: None)
    monkeypatch.setattr(gate, "draw_latents", lambda pipe, stack, drawings, *_, **__: told.extend(drawings))
    monkeypatch.setattr(gate, "decode_latents", lambda *_: np.zeros(0))
    sample_base(BASE, ["a", "b", "b"], SMALL.sampler, seed=0, images_per_batch=2)
    assert [one.prompt for one in told] == ["a", "b", "b"]
    assert len({one.seed for one in told}) == 3


def test_equally_near_is_not_nearer() -> None:
    exemplars = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    share, _ = own_nearer(np.array([[1.0, 0.0]]), np.array([0]), exemplars, np.array(["a", "a", "a"]))
    assert share[0] == 0.5


def pictured(value: int) -> Image.Image:
    return Image.fromarray(np.full((4, 4, 3), value, np.uint8))


def test_the_control_is_of_the_same_concepts_without_the_word(monkeypatch: pytest.MonkeyPatch) -> None:
    params = replace(load_params(gate_customized.Params, "gate_customized"), control_prompts=5)
    told: list[str] = []

    def sample(base: Any, prompts: list[str], *_: Any, **__: Any) -> np.ndarray:
        told.extend(prompts)
        return np.zeros((len(prompts), 4, 4, 3), np.uint8)

    monkeypatch.setattr(gate_customized, "sample_base", sample)
    prompts = [f"a photo of <new1> thing{i}" for i in range(40)]
    found = control_samples(params, BASE, Drawn(np.arange(40) + 100, prompts, [pictured(0)] * 40))
    assert found.prompts == told
    assert told == [f"a photo of thing{one - 100}" for one in found.concepts.tolist()]
    assert len(set(told)) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbones": ()}, r"backbones: wanted 1 or more, got none"),
        ({"resamples": 0}, "resamples: wanted 1 or more, got 0"),
        ({"control_prompts": 0}, "control_prompts: wanted 1 or more, got 0"),
        ({"images_per_batch": 0}, "images_per_batch: wanted 1 or more, got 0"),
        ({"seed": -1}, "seed: wanted 0 or more, got -1"),
    ],
)
def test_params_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(load_params(gate_customized.Params, "gate_customized"), **changes)


def concept(name: str) -> Concept:
    return Concept(name, "object", "car", "test", True, (Exemplar(name, b"", {}),))


def test_intervals_of_the_gate_are_by_concept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images of each concept that agree say no more than one."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((12, 3)).astype(np.float32)
    plain = Preprocessing("squash", 4, 4, "box", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    space = Space("toy", "1", "none", 3, "float32")
    backbone = Backbone(space, plain, 8, lambda pixels: vectors[pixels[:, 0, 0, 0]])
    monkeypatch.setattr(gate_customized, "decode_image", lambda data, name: pictured(int(name)))
    params = load_params(gate_customized.Params, "gate_customized")
    concepts = [concept(str(i)) for i in range(12)]
    asked, own = [pictured(i) for i in rng.integers(0, 12, 12).tolist()], np.arange(12)
    once = compare(params, backbone, Drawn(own, [""] * 12, asked), concepts)
    often = compare(params, backbone, Drawn(np.tile(own, 10), [""] * 120, asked * 10), concepts)
    assert often["images"] == 120
    for name in ("share", "interval_low", "interval_high", "margin"):
        assert often[name] == pytest.approx(once[name], abs=1e-6)


def test_synthesized_images_are_known_by_their_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"image_id": f"{name}{i}", "concept_id": name, "prompt": f"{name} {i}"}
        for name in "abc"
        for i in range(2)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "queries.parquet")
    tables = {Path("one"): ["c1", "a0", "x0"], Path("two"): ["b0", "b1", "c0", "a1"]}
    monkeypatch.setattr(
        gate_customized, "iterate_images", lambda table: [[(one, pictured(0)) for one in tables[table]]]
    )
    concepts = [concept("b"), concept("a")]
    found = read_synthesized(tmp_path / "queries.parquet", list(tables), concepts)
    assert found.prompts == ["a 0", "b 0", "b 1", "a 1"]
    assert found.concepts.tolist() == [1, 0, 0, 1]


def test_images_drawn_again_take_the_place_of_shipped_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another method of customization gives its images the ids of the shipped ones."""
    rows = [{"image_id": f"a{i}", "concept_id": "a", "prompt": f"a {i}"} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "queries.parquet")
    tables = {Path("shipped"): [("a0", pictured(1)), ("a1", pictured(2))], Path("a"): [("a0", pictured(3))]}
    monkeypatch.setattr(gate_customized, "iterate_images", lambda table: [tables[table]])
    found = read_synthesized(tmp_path / "queries.parquet", list(tables), [concept("a")])
    assert found.prompts == ["a 0", "a 1"]
    assert [picture.getpixel((0, 0)) for picture in found.pictures] == [
        pictured(value).getpixel((0, 0)) for value in (3, 2)
    ]


@pytest.mark.parametrize(
    ("customized", "base", "passed"),
    [(0.8, 0.5, True), (0.6, 0.5, False), (0.9, 0.85, False), (0.7, 0.7, False)],
)
def test_customization_passes_where_the_base_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, customized: float, base: float, passed: bool
) -> None:
    params = replace(load_params(gate_customized.Params, "gate_customized"), wanted=0.7)
    drawn, control = (Drawn(np.arange(1), [""], [pictured(0)]) for _ in range(2))
    for name, value in {
        "read_concepts": lambda path: [],
        "read_synthesized": lambda *_: drawn,
        "control_samples": lambda *_: control,
        "load_backbone": lambda *_, **__: None,
        "compare": lambda params, backbone, one, concepts: {"share": customized if one is drawn else base},
        "sample_page": lambda *_, **__: pictured(0),
    }.items():
        monkeypatch.setattr(gate_customized, name, value)
    gate_customized.run(
        params, BASE, dict.fromkeys(params.backbones, CLASSIFIER),
        exemplars=tmp_path, queries=tmp_path, tables=[], metrics=tmp_path / "m.json", page=tmp_path / "p.png",
        root=tmp_path,
    )  # fmt: skip
    assert json.loads((tmp_path / "m.json").read_text())["passed"] == passed
