"""The gates' arithmetic by hand, and the shipped base model held to its own report."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attribution.backbones import BackboneSettings
from attribution.base_model import BaseSettings
from attribution.params import load_params
from miniworld.draw import render
from miniworld.readings import true_readings
from stages.gate import (
    Params,
    draw_scenes,
    prompt,
    read_pictures,
    reading_report,
    sample_base,
    sample_grid,
    wilson,
)
from stages.gate_customized import own_nearer

ROOT = Path(__file__).resolve().parents[1]
HEADS = ROOT / "data/backbones/supervised/heads.safetensors"


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
