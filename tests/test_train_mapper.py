"""Training the mapper: the loss, the controls, early stopping, determinism."""

from __future__ import annotations

import csv
import dataclasses
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from attribution.evaluation import Vectors, rank
from attribution.features import FeatureSet
from attribution.mapper import Mapper, whitening
from attribution.params import load_params
from attribution.queries import open_features, read_exemplars, read_queries
from attribution.ranking import average_precision, recall_at
from stages import train_mapper
from stages.train_mapper import HISTORY_COLUMNS, Pairs, Params, nt_xent, permute_concepts, run
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
        ({"validation_distractors": -1}, "validation_distractors: wanted > 0, got -1"),
        ({"orthogonality": -1.0}, "orthogonality: wanted 0 or more, got -1"),
        ({"seed": -1}, "seed: wanted 0 or more, got -1"),
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


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_history_is_what_the_mappers_reach_on_val(kind: str, world: FeatureWorld, tmp_path: Path) -> None:
    """By the ranks of evaluate, of the identity and of the mapper that is kept, which is not the last."""
    options = {"kind": kind, "learning_rate": 0.3, "validation_distractors": 1000, "patience": 8}
    mapper, history = train(world, tmp_path, **options)
    best = mapper.config["epoch"]
    assert 0 < best < len(history) - 1
    exemplars = read_exemplars(world.inputs["exemplars_path"])
    queries = read_queries(world.inputs["queries_path"], exemplars, split="val")
    real, asked, others = open_features(world.inputs["features_dir"], "toy")
    raw = Vectors(asked.select(queries.image_ids), real.select(exemplars.image_ids), others.vectors())
    for one, epoch in ((Mapper.identity(16), 0), (mapper, best)):
        ranks = rank(raw.map(one), queries, []).own
        precision = average_precision(ranks)
        of_kinds = [precision[queries.kinds == name].mean() for name in ("object", "style")]
        assert history[epoch]["validation_map"] == pytest.approx(np.sqrt(np.prod(of_kinds)), rel=1e-3)
        assert history[epoch]["validation_recall_at_10"] == pytest.approx(
            recall_at(ranks, 10).mean(), abs=1e-3
        )


def test_the_control_is_learned_from_permuted_pairs_and_stopped_by_true_ones(
    world: FeatureWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[str, bool], tuple[Any, Any]] = {}
    fit = train_mapper.fit

    def watched(params: Any, pairs: Any, validation: Any, *args: Any, **options: Any) -> Any:
        about = args[2]
        seen[about["pairs"], about["control"] == "permuted"] = pairs, validation
        return fit(params, pairs, validation, *args, **options)

    monkeypatch.setattr(train_mapper, "fit", watched)
    train(world, tmp_path, epochs=1)
    for name in ("joint", "object", "style"):
        (pairs, validation), (control, control_validation) = seen[name, False], seen[name, True]
        assert torch.equal(pairs.synth, control.synth)
        first, other = (one.real[one.own[:, 0]] for one in (pairs, control))
        assert ((first - other).abs().max(dim=1).values > 0.01).all()
        for one in (validation, control_validation):  # val queries and their own exemplars, true for both
            assert len(np.unique(one.concepts)) == {"joint": 8, "object": 6, "style": 2}[name]
            assert torch.equal(one.real[one.own[:, 0]], validation.real[validation.own[:, 0]])
        assert not torch.equal(validation.synth[:4], pairs.synth[:4])
    for kind in ("object", "style"):
        found = {
            file: Mapper.load(tmp_path / f"{file}.safetensors", own_kind=kind)
            for file in ("mapper", "permuted")
        }
        assert found["mapper"].config["control"] is None
        assert found["permuted"].config["control"] == "permuted"
        assert found["permuted"].config["pairs"] == kind


def test_no_concept_keeps_its_own_exemplars_whatever_the_seed(tmp_path: Path) -> None:
    small = make_world(tmp_path, objects=5, styles=5, distractors=5)
    exemplars = read_exemplars(small.inputs["exemplars_path"])
    queries = read_queries(small.inputs["queries_path"], exemplars, split="train")
    assert len(np.unique(queries.concept_ids)) == 4
    for seed in range(20):
        own = permute_concepts(queries, exemplars, seed)[:, 0]
        assert (exemplars.concept_ids[own] != queries.concept_ids).all()
        assert (exemplars.kinds[own] == queries.kinds).all()


def test_patience_counts_from_the_best_epoch(
    world: FeatureWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = [0.1, 0.2, 0.3, 0.3, 0.2, 0.4, 0.4, 0.3, 0.4, 0.5, 0.6]

    def fit(*args: Any, **options: Any) -> Any:
        left = iter(scripted)
        monkeypatch.setattr(train_mapper, "_validate", lambda *_: (0.0, next(left), 0.0))
        return real(*args, **options)

    real = train_mapper.fit
    monkeypatch.setattr(train_mapper, "fit", fit)
    monkeypatch.setattr(train_mapper, "one_core_each", lambda _: nullcontext(SimpleNamespace(map=map)))
    mapper, history = train(world, tmp_path, epochs=10)
    assert mapper.config["epoch"] == 5
    assert [row["validation_map"] for row in history] == scripted[: 5 + 3 + 1]


def some_pairs(rows: int) -> Pairs:
    """Concepts with 1, 2 and 3 exemplars in turn."""
    own = np.array([[0, -1, -1], [1, 2, -1], [3, 4, 5]])
    rng = np.random.default_rng(0)
    synth, real = (torch.from_numpy(rng.standard_normal((n, 4)).astype(np.float32)) for n in (3 * rows, 6))
    concepts = np.tile(np.arange(3), rows)
    return Pairs(synth, real, np.tile(own, (rows, 1)), concepts, np.zeros(3 * rows, dtype=int))


def test_each_own_exemplar_is_drawn_as_often() -> None:
    drawn = some_pairs(4000).draw(np.random.default_rng(1))
    shares = np.bincount(drawn, minlength=6) / 4000
    assert shares == pytest.approx([1, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3], abs=0.03)


def test_every_epoch_has_its_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[int]] = []
    real = train_mapper.nt_xent

    def watched(synth: torch.Tensor, *args: object) -> torch.Tensor:
        batches.append(synth[:, 0].tolist())
        return real(synth, *args)

    monkeypatch.setattr(train_mapper, "nt_xent", watched)
    pairs, rng = some_pairs(20), np.random.default_rng(0)
    start = Mapper.identity(4, "linear")
    heads = [{n: torch.tensor(t) for n, t in head.items()} for head in (start.real, start.synth)]
    for _ in range(2):
        train_mapper._epoch(PARAMS, heads, pairs, rng, None)
    first, second = batches[0] + batches[1], batches[2] + batches[3]
    assert len(batches) == 4
    assert sorted(first) == sorted(second)
    plain = torch.nn.functional.normalize(pairs.synth, dim=1)[:, 0].tolist()
    assert first != second
    assert plain not in (first, second)


def test_a_step_is_the_learning_rate_over_the_root_of_the_dim(world: FeatureWorld, tmp_path: Path) -> None:
    """One batch, one epoch: Adam's first step moves every entry by its rate."""
    train(world, tmp_path, epochs=1, batch_size=10_000)
    moved = Mapper.load(tmp_path / "permuted.safetensors").synth["weight"] - np.eye(16)
    assert np.abs(moved).max() == pytest.approx(0.02 / 4, rel=0.01)


def test_the_whitening_is_that_of_distractors_and_of_train_queries(
    world: FeatureWorld, tmp_path: Path
) -> None:
    train(world, tmp_path, epochs=1)
    exemplars = read_exemplars(world.inputs["exemplars_path"])
    ids = read_queries(world.inputs["queries_path"], exemplars, split="train").image_ids
    real, synth = (
        FeatureSet.open(world.inputs["features_dir"] / name) for name in ("distractors", "queries")
    )
    wanted = whitening(real.vectors(), synth.select(ids), shrinkage=PARAMS.whitening_shrinkage)
    found = Mapper.load(tmp_path / "whitening.safetensors")
    for side in ("real", "synth"):
        for name in ("weight", "bias"):
            np.testing.assert_allclose(getattr(found, side)[name], getattr(wanted, side)[name], atol=1e-5)


def test_sampled_distractors_are_drawn_from_all(world: FeatureWorld) -> None:
    features = FeatureSet.open(world.inputs["features_dir"] / "distractors")
    samples = [train_mapper._sample_rows(features, 20, seed) for seed in (0, 0, 1)]
    assert np.array_equal(samples[0], samples[1])
    assert not np.array_equal(samples[0], samples[2])
    places = [int(np.flatnonzero((features.vectors() == row).all(axis=1))[0]) for row in samples[0]]
    assert places == sorted(set(places))
    assert max(places) > 100


def test_a_distractor_as_near_as_the_exemplar_comes_before_it() -> None:
    real = torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    others = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    ranks = train_mapper._ranks(torch.tensor([[1.0, 0.0]]), real, others, torch.tensor([[0, 1]]))
    assert ranks.tolist() == [[1, 3]]


def test_an_mlp_of_features_in_another_unit_gives_the_same_map(world: FeatureWorld, tmp_path: Path) -> None:
    """The control is compared, which is trained in any case."""
    inputs = {**world.inputs, "features_dir": tmp_path / "features"}
    for name in ("exemplars", "queries", "distractors"):
        one = FeatureSet.open(world.inputs["features_dir"] / name)
        write_vectors(tmp_path / "features" / name, one.image_ids.tolist(), 64.0 * one.vectors())
    params = dataclasses.replace(PARAMS, kind="mlp", epochs=3)
    run(params, backbone="toy", **world.inputs, output_dir=tmp_path / "a")
    run(params, backbone="toy", **inputs, output_dir=tmp_path / "b")
    here, there = (Mapper.load(tmp_path / name / "permuted.safetensors") for name in "ab")
    for name, factor in {"weight_in": 1, "bias_in": 64, "weight_out": 1, "bias_out": 64}.items():
        assert np.abs(here.synth[name]).max() > 1e-3
        np.testing.assert_allclose(there.synth[name], factor * here.synth[name], rtol=1e-3, atol=1e-4)
