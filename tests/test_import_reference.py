"""The reference's released files, fabricated in their formats, and its protocol by plain numpy."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from attribution.calibrator import Calibrator
from attribution.features import FeatureSet
from attribution.mapper import Mapper
from attribution.params import load_params
from attribution.queries import Queries
from attribution.ranking import bootstrap_interval, chance_average_precision, recall_at
from attribution.released import (
    ReleasedFeatures,
    ReleasedModel,
    _check_models,
    load_checkpoint,
    read_calibrator,
)
from attribution.similarity import attribute
from stages import evaluate_reference
from stages.evaluate_reference import Params, tabulate
from stages.import_reference import run

DIM = 12
PARAMS = Params(recall_at=(5, 10, 100), block_rows=37, resamples=50, seed=0)
VECTORS = json.loads((Path(__file__).parent / "reference" / "calibrator_and_ap.json").read_text())
# Exemplars of each model, and images per model by prompt kind.
LISTS: dict[str, tuple[list[int], dict[str, int]]] = {
    "objects_seen": ([1] * 6, {"media": 4, "gpt": 3}),
    "styles": ([4, 1, 7, 12], {"object": 3, "gpt": 2}),
}


@dataclasses.dataclass
class Released:
    """A ROOT as the reference lays it out, and what is in its files as plain arrays."""

    root: Path
    distractors: np.ndarray
    files: dict[str, dict[str, Any]]
    mapper: dict[str, dict[str, np.ndarray]]


def fabricate(root: Path, *, backbones: tuple[str, ...] = ("clip", "dino"), seed: int = 0) -> Released:
    """Two test lists of noisy images near their exemplars; only clip has a mapper and a calibrator."""
    rng = np.random.default_rng(seed)
    distractors = rng.standard_normal((150, DIM)).astype(np.float32) * 3
    files: dict[str, dict[str, Any]] = {}
    for name, (sizes, kinds) in LISTS.items():
        centers = rng.standard_normal((len(sizes), DIM))
        ends = np.cumsum(sizes).tolist()
        spread = rng.standard_normal((ends[-1], DIM)) * (0.2 if max(sizes) == 1 else 0.8)
        owner = np.repeat(np.arange(len(sizes)), sizes)
        found: dict[str, Any] = {
            "exemplar_paths": [f"dataset/{name}/exemplar/{i:04d}.jpg" for i in range(ends[-1])],
            "exemplar_chunks": list(zip([0, *ends[:-1]], ends, strict=True)),
            "exemplar_tensors": torch.from_numpy((centers[owner] + spread).astype(np.float32) * 2),
            "synth_paths": {},
            "synth_ids": {},
            "synth_tensors": {},
        }
        for kind, count in kinds.items():
            # Not sorted by model: nothing promises that.
            models = rng.permutation(np.repeat(np.arange(len(sizes)), count))
            vectors = centers[models] + rng.standard_normal((len(models), DIM))
            found["synth_paths"][kind] = [f"{name}/{kind}/{model}_{i}.png" for i, model in enumerate(models)]
            found["synth_ids"][kind] = models.tolist()
            found["synth_tensors"][kind] = torch.from_numpy(vectors.astype(np.float32) * 5)
        files[name] = found
    mapper = {
        side: {
            "weight": (np.eye(DIM) + 0.3 * rng.standard_normal((DIM, DIM))).astype(np.float32),
            "bias": rng.standard_normal(DIM).astype(np.float32),
        }
        for side in ("real_mapper", "synth_mapper")
    }
    released = Released(root, distractors, files, mapper)
    for backbone in backbones:
        write(released, backbone)
    save(
        root / "weights" / "mapper" / "clip_tuned.pth",
        {
            side: OrderedDict((name, torch.from_numpy(value)) for name, value in head.items())
            for side, head in mapper.items()
        },
    )
    save(root / "weights" / "calibrator" / "clip_tuned.pth", calibrator_state(16.1587, -38.5))
    return released


def calibrator_state(inv_tau: float, bias: float) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict(inv_tau=torch.tensor(inv_tau), bias=torch.tensor([bias]))


def save(path: Path, obj: Any, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(obj, path, **options)


def write(released: Released, backbone: str) -> None:
    """Features of one backbone and, once more, the test lists."""
    folder = released.root / "feats" / backbone
    paths = [f"laion/{i:08d}.jpg" for i in range(len(released.distractors))]
    save(folder / "laion_subset.pth", {"feats": torch.from_numpy(released.distractors), "paths": paths})
    for name, found in released.files.items():
        save(folder / f"{name}.pth", found)
        entries = []
        for number, (start, end) in enumerate(found["exemplar_chunks"]):
            synth = {
                kind: [f"elsewhere/{path}" for path, model in pairs(found, kind) if model == number]
                for kind in found["synth_paths"]
            }
            entries.append(
                {
                    "exemplar": found["exemplar_paths"][start:end],
                    "synth": synth,
                    "class_id": f"n{number % 3:08d}",
                    "category": "bird" if "media" in synth else None,
                }
            )
        path = released.root / "json" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(entries))


def pairs(found: dict[str, Any], kind: str) -> list[tuple[str, int]]:
    return list(zip(found["synth_paths"][kind], found["synth_ids"][kind], strict=True))


def mapped(released: Released, rows: np.ndarray, side: str, *, plain: bool = False) -> np.ndarray:
    """Rows of length 1, through a head of the released mapper unless `plain`."""
    rows = rows.astype(np.float64)
    if not plain:
        head = released.mapper[side]
        rows = rows @ head["weight"].astype(np.float64).T + head["bias"]
    return rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))


def protocol(released: Released, name: str, kind: str, plain: bool, ks: tuple[int, ...]) -> dict[str, float]:
    """AP and Recall@K as the paper's formulas say, by sorting each query's whole gallery."""
    found = released.files[name]
    distractors = mapped(released, released.distractors, "real_mapper", plain=plain)
    exemplars = mapped(released, found["exemplar_tensors"].numpy(), "real_mapper", plain=plain)
    queries = mapped(released, found["synth_tensors"][kind].numpy(), "synth_mapper", plain=plain)
    recalls: dict[int, list[float]] = {k: [] for k in ks}
    precisions = []
    for query, model in zip(queries, found["synth_ids"][kind], strict=True):
        start, end = found["exemplar_chunks"][model]
        gallery = np.concatenate([distractors, exemplars[start:end]])
        is_own = np.arange(len(gallery)) >= len(distractors)
        hits = is_own[np.argsort(-(gallery @ query), kind="stable")]
        total = hits.sum()
        at = np.flatnonzero(hits) + 1
        precisions.append(sum((j + 1) / at[j] for j in range(total)) / total)
        for k in ks:
            recalls[k].append(hits[:k].sum() / total)
    means = {f"recall_at_{k}": float(np.mean(values)) for k, values in recalls.items()}
    return {**means, "mean_average_precision": float(np.mean(precisions))}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    return fabricate(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def imported(released: Released, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported")
    assert run(released.root, out=out, unseen=["styles"]) == ["clip", "dino"]
    for backbone in ("clip", "dino"):
        evaluate_reference.run(PARAMS, backbone, folder=out)
    return out


def metrics(folder: Path, backbone: str) -> dict[str, Any]:
    return json.loads((folder / "metrics" / f"{backbone}.json").read_text())


@pytest.mark.parametrize("variant", ["raw", "mapped"])
@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, (_, kinds) in LISTS.items() for kind in kinds]
)
def test_protocol_is_that_of_the_paper(
    released: Released, imported: Path, name: str, kind: str, variant: str
) -> None:
    cell = metrics(imported, "clip")["test_lists"][name][kind]
    wanted = protocol(released, name, kind, variant == "raw", PARAMS.recall_at)
    assert 0 < wanted["mean_average_precision"] < 1
    for metric, value in wanted.items():
        assert cell[variant][metric] == pytest.approx(value, abs=1e-6), metric
        assert cell[variant][metric] <= cell["ceiling"][metric] + 1e-12
    assert cell["queries"] == len(released.files[name]["synth_ids"][kind])
    assert cell["customized_models"] == len(LISTS[name][0])


def test_of_more_exemplars_than_k_recall_has_a_ceiling(imported: Path) -> None:
    """Hits over P, not over min(k, P): 4, 1, 7 and 12 exemplars."""
    cell = metrics(imported, "clip")["test_lists"]["styles"]["gpt"]
    assert cell["ceiling"]["recall_at_5"] == pytest.approx((1 + 1 + 5 / 7 + 5 / 12) / 4)
    assert cell["ceiling"]["recall_at_100"] == 1
    assert cell["chance"]["recall_at_10"] == pytest.approx(
        np.mean([10 / (150 + size) for size in (4, 1, 7, 12)])
    )


def test_all_is_the_mean_over_all_queries(imported: Path) -> None:
    cells = metrics(imported, "clip")["test_lists"]["objects_seen"]
    weights = [cells[kind]["queries"] for kind in ("media", "gpt")]
    values = [cells[kind]["mapped"]["mean_average_precision"] for kind in ("media", "gpt")]
    assert cells["all"]["mapped"]["mean_average_precision"] == pytest.approx(
        np.average(values, weights=weights)
    )
    low, high = cells["all"]["mapped"]["recall_at_10_interval"]
    assert low <= cells["all"]["mapped"]["recall_at_10"] <= high


def test_a_backbone_without_mapper_has_raw_metrics_alone(imported: Path) -> None:
    found = metrics(imported, "dino")
    assert "calibrator" not in found
    assert {*found["test_lists"]["styles"]["all"]} == {
        "queries",
        "customized_models",
        "ceiling",
        "chance",
        "raw",
    }


def test_records_hold_what_was_released(released: Released, imported: Path) -> None:
    sets = {
        name: FeatureSet.open(imported / "features" / "clip" / name, backbone="clip", verify=True)
        for name in ("exemplars", "queries", "distractors")
    }
    np.testing.assert_array_equal(sets["distractors"].vectors(), released.distractors)
    rows = pq.read_table(imported / "exemplars.parquet").to_pylist()
    assert [row["image_id"] for row in rows] == sets["exemplars"].image_ids.tolist()
    row = rows[6 + 4]  # the only exemplar of the second style
    assert row["path"] == "dataset/styles/exemplar/0004.jpg"
    assert (row["kind"], row["noun"], row["split"], row["seen"], row["group"]) == (
        *("style", "art", "test", False),
        "n00000001",
    )
    np.testing.assert_array_equal(
        sets["exemplars"].select([row["image_id"]])[0], released.files["styles"]["exemplar_tensors"][4]
    )
    asked = pq.read_table(imported / "queries.parquet").to_pylist()
    assert len(asked) == 6 * 7 + 4 * 5 == len({row["image_id"] for row in asked})
    assert {(row["kind"], row["prompt_kind"], row["seen"]) for row in asked} == {
        *(("object", "media", True), ("object", "gpt", True)),
        *(("style", "object", False), ("style", "gpt", False)),
    }
    mapper = Mapper.load(imported / "mappers" / "clip" / "mapper.safetensors", backbone="clip", dim=DIM)
    np.testing.assert_array_equal(mapper.synth["weight"], released.mapper["synth_mapper"]["weight"])


def test_the_same_bytes_again(released: Released, imported: Path, tmp_path: Path) -> None:
    run(released.root, out=tmp_path, unseen=["styles"])
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert path.read_bytes() == (imported / path.relative_to(tmp_path)).read_bytes(), path.name


@pytest.mark.parametrize(
    "name", ["clip_demo_params", "clip_demo_params_unsorted", "shift_invariance", "batch"]
)
def test_released_calibrators_give_the_references_influence(tmp_path: Path, name: str) -> None:
    case = VECTORS["influence"][name]
    save(tmp_path / "c.pth", calibrator_state(case["inv_tau"], case["effective_bias"] / 0.001))
    calibrator = read_calibrator(tmp_path / "c.pth")
    assert calibrator.b == pytest.approx(case["effective_bias"], abs=1e-7)
    scores = np.atleast_2d(np.array(case["scores"], dtype=np.float32))
    np.testing.assert_allclose(calibrator.influence(scores), np.atleast_2d(case["out"]), atol=1e-6)


def test_of_the_tuned_clip_a_fifth_of_a_cosine_is_out_of_reach(imported: Path) -> None:
    calibrator = Calibrator.load(imported / "calibrators" / "clip.json")
    assert (calibrator.inv_tau, calibrator.b) == (pytest.approx(16.1587), pytest.approx(-0.0385))
    assert metrics(imported, "clip")["calibrator"]["reach"] == pytest.approx(0.2016, abs=5e-5)


def test_influence_of_imported_features_is_that_of_the_formula(released: Released, imported: Path) -> None:
    """The whole way: released files, records, the exact retrieval; against the formula on the arrays."""
    sets = {
        name: FeatureSet.open(imported / "features" / "clip" / name)
        for name in ("exemplars", "queries", "distractors")
    }
    mapper = Mapper.load(imported / "mappers" / "clip" / "mapper.safetensors")
    calibrator = Calibrator.load(imported / "calibrators" / "clip.json")
    gallery = [mapper.map_real(sets[name].vectors()) for name in ("exemplars", "distractors")]
    asked = mapper.map_synth(sets["queries"].vectors())
    found = attribute(asked, gallery, k=7, inv_tau=calibrator.inv_tau, b=calibrator.b)

    vectors = [
        one["synth_tensors"][kind] for one in released.files.values() for kind in sorted(one["synth_paths"])
    ]
    real = [one["exemplar_tensors"].numpy() for one in released.files.values()] + [released.distractors]
    scores = (
        mapped(released, np.concatenate(vectors), "synth_mapper")
        @ mapped(released, np.concatenate(real), "real_mapper").T
    )
    weights = np.maximum(np.exp(16.1587 * (scores - scores.max(axis=1, keepdims=True))) - 38.5 * 0.001, 0)
    influence = weights / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.influence, np.take_along_axis(influence, found.ids, axis=1), atol=1e-5)
    np.testing.assert_array_equal(found.support, (influence > 0).sum(axis=1))
    np.testing.assert_allclose(found.influence.sum(axis=1) + found.remainder, 1, atol=1e-5)


@pytest.mark.parametrize(("inv_tau", "bias"), [(10.0, -1000.0), (0.0, -38.5), (10.0, 100.0)])
def test_calibrators_that_make_no_influence_are_refused(tmp_path: Path, inv_tau: float, bias: float) -> None:
    save(tmp_path / "c.pth", calibrator_state(inv_tau, bias))
    with pytest.raises(ValueError, match=r"c\.pth: calibrator: wanted inv_tau > 0 and -1 < b <= 0"):
        read_calibrator(tmp_path / "c.pth")


class Payload:
    """What a pickle may do to whoever loads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("loaded"),))


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_ever_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "bad.pth", {"feats": Payload()}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"bad\.pth: holds more than tensors and plain containers"):
        load_checkpoint(tmp_path / "bad.pth")
    assert not (tmp_path / "loaded").exists()


def test_old_files_and_listed_tensors_are_read_too(
    released: Released, imported: Path, tmp_path: Path
) -> None:
    """Before 1.6 torch wrote no zip; and tensors may come as one per model, ids as a tensor."""
    other = fabricate(tmp_path / "root", backbones=("clip",))
    for name, found in other.files.items():
        listed = [found["exemplar_tensors"][start:end] for start, end in found["exemplar_chunks"]]
        changed = {
            **found,
            "exemplar_tensors": listed,
            "exemplar_chunks": torch.tensor(found["exemplar_chunks"]),
            "synth_ids": {kind: torch.tensor(ids) for kind, ids in found["synth_ids"].items()},
            "synth_tensors": {kind: list(rows) for kind, rows in found["synth_tensors"].items()},
        }
        save(other.root / "feats/clip" / f"{name}.pth", changed, _use_new_zipfile_serialization=False)
    run(other.root, out=tmp_path / "out")
    evaluate_reference.run(PARAMS, "clip", folder=tmp_path / "out")
    assert metrics(tmp_path / "out", "clip") == metrics(imported, "clip")


def edit(root: Path, name: str, **changes: Any) -> None:
    path = root / "feats" / "clip" / f"{name}.pth"
    save(path, {**torch.load(path, weights_only=True), **changes})


def without(root: Path, name: str, key: str) -> None:
    path = root / "feats" / "clip" / f"{name}.pth"
    save(path, {one: value for one, value in torch.load(path, weights_only=True).items() if one != key})


def edit_list(root: Path, number: int, **changes: Any) -> None:
    path = root / "json" / "styles.json"
    entries = json.loads(path.read_text())
    entries[number] |= changes
    path.write_text(json.dumps(entries))


WRONG: dict[str, tuple[Any, str]] = {
    "no key": (
        lambda root: without(root, "styles", "synth_ids"),
        r"styles\.pth: no synth_ids; got: exemplar_paths",
    ),
    "no model": (
        lambda root: edit(root, "styles", exemplar_chunks=[(0, 4), (4, 5), (5, 12)]),
        r"features of 3 models|synth_ids: wanted 0 to 2",
    ),
    "empty model": (
        lambda root: edit(root, "styles", exemplar_chunks=[(0, 4), (4, 4), (5, 12), (12, 24)]),
        r"exemplar_chunks: wanted 0 <= start < end <= 24",
    ),
    "other exemplars": (
        lambda root: edit(root, "styles", exemplar_paths=[f"x/{i}.jpg" for i in range(24)]),
        r"model 0: other exemplars than in the test list",
    ),
    "other images": (
        lambda root: edit_list(root, 1, synth={"object": ["a.png"], "gpt": []}),
        r"model 1: other gpt images than in the test list",
    ),
    "no exemplars": (
        lambda root: edit_list(root, 2, exemplar=[]),
        r"entry 2: a customized model without exemplars",
    ),
    "no class": (
        lambda root: edit_list(root, 2, synth=None),
        r"entry 2: wanted exemplar, synth, class_id, category",
    ),
    "a path, no list": (
        lambda root: edit_list(root, 0, exemplar="a.jpg"),
        r"entry 0: wanted exemplar, .*no list of paths: 'a\.jpg'",
    ),
    "kinds apart": (
        lambda root: edit(root, "styles", synth_ids={"gpt": []}),
        r"styles\.pth: synth_paths, synth_ids, synth_tensors: wanted the same prompt kinds",
    ),
    "two temperatures": (
        lambda root: save(
            root / "weights/calibrator/clip_tuned.pth", {"inv_tau": torch.ones(2), "bias": torch.ones(1)}
        ),
        r"clip_tuned\.pth: inv_tau, bias: wanted a number each, got \[2\] and \[1\]",
    ),
    "no vectors": (
        lambda root: edit(root, "laion_subset", paths=["x"]),
        r"laion_subset\.pth: 1 paths but 150 vectors",
    ),
    "not finite": (
        lambda root: edit(root, "laion_subset", feats=torch.full((150, DIM), torch.nan)),
        r"laion_subset\.pth: feats: row 0 has a value that is not finite",
    ),
    "other dim": (
        lambda root: edit(root, "laion_subset", feats=torch.ones((150, DIM + 1))),
        r"objects_seen\.pth: dim 12, but the distractors have 13",
    ),
    "no list": (
        lambda root: (root / "json" / "styles.json").unlink(),
        r"no styles\.json here or up to two folders down; copy the test list there",
    ),
    "two lists": (
        lambda root: (root / "styles.json").write_text("[]"),
        r"styles\.json more than once: .*; leave one",
    ),
    "mlp": (
        lambda root: save(
            root / "weights/mapper/clip_tuned.pth", {"real_mapper": {"0.weight": 1}, "synth_mapper": {}}
        ),
        r"clip_tuned\.pth: real_mapper: wanted weight and bias \(a linear head\), got 0\.weight",
    ),
    "not torch": (
        lambda root: (root / "feats/clip/styles.pth").write_bytes(b"\x80nonsense"),
        r"styles\.pth: (not a file of torch\.save|holds more than tensors)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_as_described_is_named(tmp_path: Path, name: str) -> None:
    damage, message = WRONG[name]
    root = fabricate(tmp_path / "root", backbones=("clip",)).root
    damage(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(root, out=tmp_path / "out")


def test_wrong_folders_and_lists_say_what_to_do(released: Released, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no feats/<backbone>/laion_subset\.pth; give the folder that holds"
    ):
        run(tmp_path, out=tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"--unseen archive: no such test list; there are: objects_seen, styles"
    ):
        run(released.root, out=tmp_path / "out", unseen=["archive"])


def test_a_mapper_of_another_dim_is_refused(tmp_path: Path) -> None:
    released = fabricate(tmp_path / "root", backbones=("clip",))
    head = {"weight": torch.eye(3), "bias": torch.zeros(3)}
    save(released.root / "weights/mapper/clip_tuned.pth", {"real_mapper": head, "synth_mapper": head})
    run(released.root, out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"clip: a mapper of dim 3 for features of dim 12"):
        evaluate_reference.run(PARAMS, "clip", folder=tmp_path / "out")


def test_numbers_are_categories_too(tmp_path: Path) -> None:
    root = fabricate(tmp_path / "root", backbones=("clip",)).root
    edit_list(root, 0, category=7)
    run(root, out=tmp_path / "out")
    assert "7" in pq.read_table(tmp_path / "out" / "exemplars.parquet")["noun"].to_pylist()


def test_what_was_not_imported_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"clip: no such features; run: python -m stages\.import_ref"):
        evaluate_reference.run(PARAMS, "clip", folder=tmp_path)


def test_params_yaml_is_complete() -> None:
    assert load_params(Params, "evaluate_reference").recall_at == (5, 10, 100)
    for name, value in {"block_rows": 0, "recall_at": (), "resamples": 0, "seed": -1}.items():
        with pytest.raises(ValueError, match=rf"{name}.*: wanted \d or more"):
            dataclasses.replace(PARAMS, **{name: value})


def test_chance_and_intervals_are_those_of_sizes_and_models() -> None:
    rng = np.random.default_rng(0)
    models, plain = np.repeat(["a", "b", "c", "d", "e"], 20), np.array(["x"] * 100)
    own = np.where(np.arange(3) < np.repeat([1, 2, 3, 3, 1], 20)[:, None], np.arange(3), -1)
    queries = Queries(np.arange(100).astype(str), models, plain, np.ones(100, bool), plain, own)
    level = np.repeat([3, 40, 9, 12, 80], 20)[:, None]
    ranks = np.sort(
        np.where(own < 0, np.iinfo(np.int64).max, rng.integers(1, level, (100, 3)) + np.arange(3))
    )
    params = Params(recall_at=(10,), block_rows=8, resamples=300, seed=5)
    found = tabulate(params, {"raw": ranks}, queries, 200)
    chance = chance_average_precision(queries.sizes, queries.sizes + 200).mean()
    assert found["chance"]["mean_average_precision"] == pytest.approx(chance)
    low, high = bootstrap_interval(recall_at(ranks, 10)[:, None], models, resamples=300, seed=5)
    assert found["raw"]["recall_at_10_interval"] == pytest.approx([low[0], high[0]])


def test_images_of_another_model_are_refused_though_there_are_as_many() -> None:
    models = [
        ReleasedModel((f"{i}.png",), {"media": (f"{i}a.png", f"{i}b.png")}, str(i), None) for i in range(2)
    ]
    some = np.zeros((2, 3), np.float32)

    def features(paths: list[str]) -> ReleasedFeatures:
        return ReleasedFeatures(
            ["0.png", "1.png"], some, np.array([[0, 1], [1, 2]]), {"media": paths},
            {"media": np.array([0, 0, 1, 1])}, {"media": np.zeros((4, 3), np.float32)},
        )  # fmt: skip

    _check_models(Path("list"), features(["0b.png", "0a.png", "1a.png", "1b.png"]), models)
    with pytest.raises(ValueError, match="model 0: other media images than in the test list"):
        _check_models(Path("list"), features(["0a.png", "1a.png", "0b.png", "1b.png"]), models)
