"""Training the mapper: the loss, the controls, early stopping, determinism."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from attribution.features import FeatureSet
from attribution.mapper import Mapper
from attribution.params import load_params
from attribution.queries import read_exemplars, read_queries
from stages import train_mapper
from stages.train_mapper import HISTORY_COLUMNS, Params, nt_xent, permute_concepts, run
from tests.feature_world import FeatureWorld, make_world, write_vectors

PARAMS = Params(
    kind="linear",
    pairs="joint",
    hidden=8,
    temperature=0.1,
    learning_rate=0.02,
    orthogonality=0.0,
    batch_size=32,
    epochs=8,
    patience=3,
    validation_distractors=100,
    whitening_shrinkage=0.01,
    seed=0,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FeatureWorld:
    return make_world(tmp_path_factory.mktemp("world"), objects=30, styles=10)


def train(world: FeatureWorld, out: Path, **changes) -> tuple[Mapper, list[dict[str, float]]]:
    run(dataclasses.replace(PARAMS, **changes), backbone="toy", **world.inputs, output_dir=out)
    with (out / "history.csv").open() as file:
        history = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return Mapper.load(out / "mapper.safetensors", backbone="toy"), history


def test_nt_xent_is_the_sum_written_out() -> None:
    rng = np.random.default_rng(0)
    synth, real = (rng.standard_normal((5, 3)) for _ in range(2))
    concepts = [0, 1, 0, 2, 1]
    total = 0.0
    for a, b in ((synth, real), (real, synth)):
        for i in range(5):
            others = [j for j in range(5) if j == i or concepts[j] != concepts[i]]
            total += np.log(sum(np.exp(a[i] @ b[j] / 0.5) for j in others)) - a[i] @ b[i] / 0.5
    found = nt_xent(torch.tensor(synth), torch.tensor(real), torch.tensor(concepts), 0.5)
    assert float(found) == pytest.approx(total / 10)


@pytest.mark.parametrize("kind", ["linear", "scale", "mlp"])
def test_history_starts_at_the_identity_and_the_best_epoch_is_kept(
    kind: str, world: FeatureWorld, tmp_path: Path
) -> None:
    mapper, history = train(world, tmp_path, kind=kind)
    assert list(history[0]) == list(HISTORY_COLUMNS)
    best = max(history, key=lambda row: row["validation_map"])
    assert mapper.config["epoch"] == best["epoch"]
    assert mapper.config["temperature"] == 0.1
    assert len(history) <= best["epoch"] + 1 + PARAMS.patience
    if kind == "linear":  # the world is twisted by a rotation, which the other heads cannot undo alone
        assert best["validation_map"] > history[0]["validation_map"] + 0.05
        assert history[int(best["epoch"])]["train_loss"] < history[0]["train_loss"]


def test_training_twice_gives_equal_bytes_and_another_seed_does_not(
    world: FeatureWorld, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(world, tmp_path / name, seed=seed, epochs=2)
    for file in ("mapper.safetensors", "permuted.safetensors", "whitening.safetensors", "history.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert (tmp_path / "a/mapper.safetensors").read_bytes() != (
        tmp_path / "c/mapper.safetensors"
    ).read_bytes()


def test_features_in_another_unit_give_the_same_map(world: FeatureWorld, tmp_path: Path) -> None:
    inputs = {**world.inputs, "features_dir": tmp_path / "features"}
    for name in ("exemplars", "queries", "distractors"):
        one = FeatureSet.open(world.inputs["features_dir"] / name)
        write_vectors(tmp_path / "features" / name, one.image_ids.tolist(), 64.0 * one.vectors())
    here, _ = train(world, tmp_path / "a", epochs=3)
    run(dataclasses.replace(PARAMS, epochs=3), backbone="toy", **inputs, output_dir=tmp_path / "b")
    there = Mapper.load(tmp_path / "b" / "mapper.safetensors")
    x = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    np.testing.assert_allclose(there.map_synth(64 * x), here.map_synth(x), atol=1e-4)
    assert np.abs(here.synth["bias"]).max() > 1e-4


def test_validation_does_not_depend_on_how_many_queries_are_in_memory(
    world: FeatureWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, history = train(world, tmp_path / "whole")
    monkeypatch.setattr(train_mapper, "VALIDATED", 7)
    assert train(world, tmp_path / "blocks")[1] == history


def test_orthogonality_keeps_the_weights_nearer_to_a_rotation(world: FeatureWorld, tmp_path: Path) -> None:
    departures = []
    for weight in (0.0, 10.0):
        mapper, _ = train(world, tmp_path / str(weight), orthogonality=weight, patience=8)
        w = mapper.synth["weight"]
        departures.append(np.square(w.T @ w - np.eye(16)).sum())
    assert departures[1] < departures[0] / 2


def test_permuted_pairs_belong_to_another_concept_of_the_kind(world: FeatureWorld) -> None:
    exemplars = read_exemplars(world.inputs["exemplars_path"])
    queries = read_queries(world.inputs["queries_path"], exemplars, split="train")
    permuted = permute_concepts(queries, exemplars, seed=0)
    partner: dict[str, set[str]] = {}
    for concept, kind, own in zip(queries.concept_ids, queries.kinds, permuted, strict=True):
        owners = set(exemplars.concept_ids[own[own >= 0]].tolist())
        assert concept not in owners
        assert set(exemplars.kinds[own[own >= 0]].tolist()) == {kind}
        partner.setdefault(concept, set()).update(owners)
    assert all(len(owners) == 1 for owners in partner.values())
    assert len(set.union(*partner.values())) == len(partner)  # one to one


@pytest.mark.parametrize(("pairs", "concepts"), [("object", 12), ("style", 4), ("joint", 16)])
def test_pairs_choose_the_kinds(
    pairs: str, concepts: int, world: FeatureWorld, tmp_path: Path, monkeypatch
) -> None:
    seen = []
    fit = train_mapper.fit

    def watched(*args, **options):
        seen.append(args[1])
        return fit(*args, **options)

    monkeypatch.setattr(train_mapper, "fit", watched)
    main, _ = train(world, tmp_path, pairs=pairs, epochs=1)
    assert concepts in [len(np.unique(one.concepts)) for one in seen]
    assert main.config["pairs"] == pairs
    # Beside it stand mappers of each kind, unless the main one is that already.
    for kind in ("object", "style"):
        own = Mapper.load(tmp_path / "mapper.safetensors", own_kind=kind)
        assert own.config["pairs"] == kind
        assert np.array_equal(own.real["weight"], main.real["weight"]) == (pairs == kind)


def test_pairs_of_a_kind_that_is_not_there(tmp_path: Path) -> None:
    world = make_world(tmp_path, objects=10, styles=0)
    with pytest.raises(ValueError, match=r"queries.parquet: wanted train and val queries of kind style"):
        train(world, tmp_path / "out", pairs="style")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature: wanted > 0, got 0.0"),
        ({"batch_size": 1}, "batch_size: wanted 2 or more"),
        ({"epochs": 0}, "epochs: wanted > 0, got 0"),
        ({"kind": "mlp", "orthogonality": 1.0}, "orthogonality: wanted 0 with kind mlp"),
    ],
)
def test_params_out_of_range_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PARAMS, **changes)


def test_one_concept_has_no_negatives(tmp_path: Path) -> None:
    world = make_world(tmp_path, objects=3, styles=0)
    table = pq.read_table(world.inputs["queries_path"])
    pq.write_table(
        table.filter(pc.not_equal(table["concept_id"], "object-001")), world.inputs["queries_path"]
    )
    with pytest.raises(ValueError, match="wanted at least 2 concepts to train on, got 1"):
        train(world, tmp_path / "out")


def test_params_yaml_is_complete() -> None:
    assert load_params(Params, "train_mapper").kind == "linear"


def test_the_permuted_control_is_trained_in_any_case(world: FeatureWorld, tmp_path: Path) -> None:
    train(world, tmp_path)
    permuted = Mapper.load(tmp_path / "permuted.safetensors", backbone="toy")
    assert permuted.config["control"] == "permuted"
    assert permuted.config["epoch"] >= 1
    assert not np.array_equal(permuted.real["weight"], np.eye(16))
