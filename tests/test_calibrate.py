"""The calibrate stage: fitted on validation concepts only, against the full gallery."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from attribution.calibrator import Calibrator, relaxed_loss
from attribution.features import FeatureSet
from attribution.mapper import Mapper
from attribution.params import load_params
from attribution.queries import read_exemplars, read_queries
from stages import calibrate as stage
from stages.calibrate import Params, run, sample_queries
from tests.feature_world import FeatureWorld, make_world

PARAMS = Params(inv_tau_start=1.0, b_start=0.0, queries_per_model=3, seed=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FeatureWorld:
    world = make_world(tmp_path_factory.mktemp("world"), objects=30, styles=10, noise=0.3)
    mapper = dataclasses.replace(Mapper.identity(16), config={"backbone": "toy"})
    mapper.save(world.root / "mapper.safetensors")
    return world


def calibrate(world: FeatureWorld, out: Path, **changes) -> dict:
    run(
        dataclasses.replace(PARAMS, **changes),
        backbone="toy",
        **world.inputs,
        mapper_path=world.root / "mapper.safetensors",
        output_path=out,
    )
    return json.loads(out.read_text())


def test_fit_raises_the_likelihood_and_lowers_the_error(world: FeatureWorld, tmp_path: Path) -> None:
    found = calibrate(world, tmp_path / "c.json")
    before, after = found["before"], found["after"]
    assert (before["inv_tau"], before["b"]) == (1.0, 0.0)
    assert after["log_likelihood"] > before["log_likelihood"] + 1
    assert after["expected_calibration_error"] < before["expected_calibration_error"] - 0.2
    assert Calibrator.load(tmp_path / "c.json") == Calibrator(after["inv_tau"], after["b"])


def test_the_gallery_is_everything_and_the_queries_are_those_of_val(
    world: FeatureWorld, tmp_path: Path
) -> None:
    found = calibrate(world, tmp_path / "c.json")
    exemplars = read_exemplars(world.inputs["exemplars_path"])
    assert found["gallery"] == 200 + len(exemplars.image_ids)
    assert (found["customized_models"], found["queries"]) == (8, 24)
    assert found["backbone"] == "toy"


def test_twice_gives_equal_bytes(world: FeatureWorld, tmp_path: Path) -> None:
    calibrate(world, tmp_path / "a.json")
    calibrate(world, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_gallery_too_large_for_all_scores_gives_the_same(
    world: FeatureWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = calibrate(world, tmp_path / "all.json")
    monkeypatch.setattr(stage, "EXACT_ROWS", 100)
    found = calibrate(world, tmp_path / "bins.json")
    assert found["gallery"] == wanted["gallery"]
    for when in ("before", "after"):
        for name, value in found[when].items():
            assert value == pytest.approx(wanted[when][name], rel=1e-3, abs=1e-5), name


def test_queries_are_sampled_evenly_by_model(world: FeatureWorld) -> None:
    exemplars = read_exemplars(world.inputs["exemplars_path"])
    queries = read_queries(world.inputs["queries_path"], exemplars, split="val")
    some = sample_queries(queries, dataclasses.replace(PARAMS, queries_per_model=2))
    _, counts = np.unique(some.concept_ids, return_counts=True)
    assert counts.tolist() == [2] * 8
    assert len(sample_queries(queries, dataclasses.replace(PARAMS, queries_per_model=99))) == len(queries)


def test_another_backbones_mapper_is_refused(world: FeatureWorld, tmp_path: Path) -> None:
    other = dataclasses.replace(Mapper.identity(16), config={"backbone": "clip"})
    other.save(tmp_path / "mapper.safetensors")
    with pytest.raises(ValueError, match="wanted a mapper for backbone toy, got one for clip"):
        run(
            PARAMS,
            backbone="toy",
            **world.inputs,
            mapper_path=tmp_path / "mapper.safetensors",
            output_path=tmp_path,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b_start": -1.0}, "wanted inv_tau > 0 and -1 < b"),
        ({"queries_per_model": 0}, "queries_per_model: wanted 1"),
        ({"seed": -1}, "seed: wanted 0 or more, got -1"),
    ],
)
def test_params_out_of_range_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PARAMS, **changes)


def test_params_yaml_is_complete() -> None:
    assert load_params(Params, "calibrate").queries_per_model >= 1


def test_the_likelihood_is_that_of_all_own_exemplars_by_both_heads(
    world: FeatureWorld, tmp_path: Path
) -> None:
    """Written out from features and concept ids, with heads that differ."""
    rng = np.random.default_rng(0)
    plain = Mapper.identity(16, "linear")
    synth = {**plain.synth, "weight": rng.standard_normal((16, 16)).astype(np.float32)}
    mapper = dataclasses.replace(plain, synth=synth, config={"backbone": "toy"})
    mapper.save(tmp_path / "mapper.safetensors")
    (tmp_path / "features").symlink_to(world.inputs["features_dir"])
    for name in ("queries", "exemplars"):
        (tmp_path / f"{name}.parquet").symlink_to(world.inputs[f"{name}_path"])
    found = calibrate(FeatureWorld(tmp_path), tmp_path / "c.json")
    exemplars = read_exemplars(world.inputs["exemplars_path"])
    queries = sample_queries(read_queries(world.inputs["queries_path"], exemplars, split="val"), PARAMS)
    real, asked, others = (
        FeatureSet.open(world.inputs["features_dir"] / name)
        for name in ("exemplars", "queries", "distractors")
    )
    gallery = np.concatenate([real.select(exemplars.image_ids), others.vectors()])
    scores = mapper.map_synth(asked.select(queries.image_ids)) @ mapper.map_real(gallery).T
    own = queries.concept_ids[:, None] == exemplars.concept_ids[None]
    assert own.sum(axis=1).max() > 1
    for when in ("before", "after"):
        loss, _ = relaxed_loss(scores, own, found[when]["inv_tau"], found[when]["b"])
        assert found[when]["log_likelihood"] == pytest.approx(-loss.mean(), rel=1e-4)


def test_sampled_queries_are_not_the_first_of_their_model(world: FeatureWorld) -> None:
    """Those come by prompt kind: the first ones would be of one kind alone."""
    exemplars = read_exemplars(world.inputs["exemplars_path"])
    queries = read_queries(world.inputs["queries_path"], exemplars, split="val")
    some = sample_queries(queries, dataclasses.replace(PARAMS, queries_per_model=2))
    assert {image_id.rpartition("q")[2] for image_id in some.image_ids.tolist()} == {"0", "1", "2", "3"}
