"""The evaluate stage on a world of features: metrics against a plain recomputation, files, controls."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from attribution import gallery
from attribution.calibrator import Calibrator
from attribution.evaluation import GAINS, Vectors, rank
from attribution.features import FeatureSet
from attribution.mapper import Mapper, whitening
from attribution.params import load_params
from attribution.plots import PageRow
from attribution.queries import read_exemplars, read_queries
from attribution.ranking import chance_average_precision
from attribution.reliability import influence_due, reliability
from stages import evaluate as stage
from stages import page
from stages.evaluate import Params, draw_places, run
from stages.page import choose_queries, read_pictures
from tests.feature_world import FeatureWorld, make_world
from tests.test_known_answer import single_exemplars

PARAMS = Params(
    recall_at=(1, 5, 10, 100),
    curve_at=(1, 10, 100),
    gallery_sizes=(50, 100, 100000),
    top_k=12,
    resamples=100,
    page_queries=4,
    seed=0,
)


@dataclasses.dataclass(frozen=True)
class Evaluated:
    world: FeatureWorld
    metrics: dict
    folder: Path


def evaluate(world: FeatureWorld, out: Path, params: Params = PARAMS) -> Evaluated:
    run(
        params,
        backbone="toy",
        **world.inputs,
        mapper_dir=world.root / "mapper",
        calibrator_path=world.root / "calibrator.json",
        picture_paths=world.pictures,
        output_dir=out / "evaluation",
        metrics_path=out / "metrics.json",
    )
    return Evaluated(world, json.loads((out / "metrics.json").read_text()), out / "evaluation")


def write_learned(world: FeatureWorld) -> None:
    """What the earlier stages leave behind; the mapper is a whitening, the controls are identities."""
    sets = {name: FeatureSet.open(world.inputs["features_dir"] / name) for name in ("queries", "distractors")}
    white = whitening(sets["distractors"].vectors(), sets["queries"].vectors(), shrinkage=0.01)
    for name, mapper in (
        ("mapper", white),
        ("whitening", Mapper.identity(16)),
        ("permuted", Mapper.identity(16)),
    ):
        mapper = dataclasses.replace(mapper, config={"backbone": "toy", "temperature": 0.1})
        mapper.save(world.root / "mapper" / f"{name}.safetensors")
    mapper = Mapper.load(world.root / "mapper" / "mapper.safetensors")
    mapper.save(
        world.root / "mapper" / "mapper.safetensors",
        own_kind={"style": Mapper.load(world.root / "mapper" / "permuted.safetensors")},
    )
    before = {"inv_tau": 1.0, "b": 0.0}
    Calibrator(20.0, -0.05).save(world.root / "calibrator.json", before=before, backbone="toy")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    root = tmp_path_factory.mktemp("evaluate")
    world = make_world(root, objects=20, styles=12)
    write_learned(world)
    return evaluate(world, root / "out")


def plain_ranks(done: Evaluated, mapper: Mapper, hard: bool) -> list[np.ndarray]:
    """Sorted ranks per query by a full sort of its gallery, distractors before exemplars where they tie."""
    exemplars = read_exemplars(done.world.inputs["exemplars_path"])
    queries = read_queries(done.world.inputs["queries_path"], exemplars, split="test")
    sets = {
        name: FeatureSet.open(done.world.inputs["features_dir"] / name)
        for name in ("exemplars", "queries", "distractors")
    }
    real = mapper.map_real(np.concatenate([sets["distractors"].vectors(), sets["exemplars"].vectors()]))
    asked = mapper.map_synth(sets["queries"].select(queries.image_ids))
    found = []
    for query in range(len(queries)):
        scores = real.astype(np.float64) @ asked[query]
        concept = np.array([""] * len(sets["distractors"]) + exemplars.concept_ids.tolist())
        own = concept == queries.concept_ids[query]
        kept = own | (concept == "") | hard
        order = np.argsort(-scores[kept], kind="stable")
        found.append(np.flatnonzero(own[kept][order]) + 1)
    return found


@pytest.mark.parametrize(("variant", "file"), [("raw", None), ("mapped", "mapper"), ("permuted", "permuted")])
@pytest.mark.parametrize("hard", [False, True])
def test_metrics_are_those_of_a_full_sort(
    done: Evaluated, variant: str, file: str | None, hard: bool
) -> None:
    mapper = (
        Mapper.identity(16) if file is None else Mapper.load(done.world.root / f"mapper/{file}.safetensors")
    )
    ranks = plain_ranks(done, mapper, hard)
    exemplars = read_exemplars(done.world.inputs["exemplars_path"])
    queries = read_queries(done.world.inputs["queries_path"], exemplars, split="test")
    tables = done.metrics["hard_gallery"] if hard else done.metrics
    for kind, familiarity, prompt_kind in [
        ("object", True, "media"),
        ("object", False, "gpt"),
        ("style", True, "gpt"),
    ]:
        of_kind = (queries.kinds == kind) & (queries.prompt_kinds == prompt_kind)
        rows = np.flatnonzero(of_kind & (queries.seen == familiarity))
        cell = tables[kind]["seen" if familiarity else "unseen"][prompt_kind]
        assert cell["queries"] == len(rows) > 0
        for k in (1, 5, 10, 100):
            recall = np.mean([(ranks[row] <= k).mean() for row in rows])
            assert cell[variant][f"recall_at_{k}"] == pytest.approx(recall, abs=1e-6)
        precision = [np.mean(np.arange(1, len(ranks[row]) + 1) / ranks[row]) for row in rows]
        assert cell[variant]["mean_average_precision"] == pytest.approx(np.mean(precision), abs=1e-6)


def test_every_number_stands_with_its_interval_ceiling_and_controls(done: Evaluated) -> None:
    cell = done.metrics["object"]["seen"]["media"]
    assert set(cell) == {
        *("queries", "customized_models", "raw", "mapped", "whitening", "permuted", "chance", "ceiling"),
        *("mapped_minus_raw", "mapped_minus_whitening", "mapped_minus_permuted"),
        *("own_kind", "own_kind_permuted", "own_kind_minus_raw", "own_kind_minus_mapped"),
        *("own_kind_minus_whitening", "own_kind_minus_own_kind_permuted"),
    }
    for variant in ("raw", "mapped", "whitening", "permuted"):
        for name in ("recall_at_1", "recall_at_5", "recall_at_10", "recall_at_100", "mean_average_precision"):
            low, high = cell[variant][f"{name}_interval"]
            assert low <= cell[variant][name] <= high
            assert cell[variant][name] <= cell["ceiling"][name]
    gain = cell["mapped"]["recall_at_10"] - cell["raw"]["recall_at_10"]
    assert cell["mapped_minus_raw"]["recall_at_10"] == pytest.approx(gain, abs=2e-6)
    style = done.metrics["style"]["all"]
    assert style["ceiling"]["recall_at_1"] < 0.5
    assert done.metrics["object"]["all"]["chance"]["recall_at_10"] == pytest.approx(10 / 201, abs=1e-6)
    hard_size = 200 + done.metrics["gallery"]["exemplars"]
    hard = done.metrics["hard_gallery"]["object"]["all"]
    assert hard["chance"]["recall_at_10"] == pytest.approx(10 / hard_size, abs=1e-6)
    assert (
        hard["mapped"]["mean_average_precision"]
        < done.metrics["object"]["all"]["mapped"]["mean_average_precision"]
    )


def test_own_kind_is_each_kind_by_its_own_mapper(done: Evaluated) -> None:
    """Styles have a mapper of their own here, the identity; objects have none and take the main one."""
    for tables in (done.metrics, done.metrics["hard_gallery"]):
        assert tables["style"]["all"]["own_kind"] == tables["style"]["all"]["raw"]
        assert tables["object"]["all"]["own_kind"] == tables["object"]["all"]["mapped"]
        assert tables["object"]["all"]["mapped"] != tables["object"]["all"]["raw"]
        assert tables["style"]["all"]["own_kind_minus_raw"]["recall_at_10"] == 0


def test_attributions_hold_what_similarity_says_of_the_full_gallery(done: Evaluated) -> None:
    rows = pq.read_table(done.folder / "attributions.parquet").to_pylist()
    exemplars = read_exemplars(done.world.inputs["exemplars_path"])
    queries = read_queries(done.world.inputs["queries_path"], exemplars, split="test")
    assert [row["image_id"] for row in rows] == queries.image_ids.tolist()
    mapper = Mapper.load(done.world.root / "mapper" / "mapper.safetensors")
    hard = plain_ranks(done, mapper, hard=True)
    sets = {
        name: FeatureSet.open(done.world.inputs["features_dir"] / name)
        for name in ("exemplars", "queries", "distractors")
    }
    ids = np.concatenate([sets["exemplars"].image_ids, sets["distractors"].image_ids])
    real = mapper.map_real(np.concatenate([sets["exemplars"].vectors(), sets["distractors"].vectors()]))
    scores = mapper.map_synth(sets["queries"].select(queries.image_ids)) @ real.T
    influence = Calibrator(20.0, -0.05).influence(scores)
    for number, row in enumerate(rows):
        best = np.argsort(-scores[number])[:12]
        assert row["gallery_ids"] == ids[best].tolist()
        np.testing.assert_allclose(row["scores"], scores[number, best], atol=1e-5)
        np.testing.assert_allclose(row["influence"], influence[number, best], atol=1e-4)
        assert row["support"] == (influence[number] > 0).sum()
        assert row["remainder"] + sum(row["influence"]) == pytest.approx(1.0, abs=1e-5)
        assert row["exemplar_ranks"] == hard[number].tolist()


def test_plots_and_tables_are_there_and_are_pictures(done: Evaluated) -> None:
    for name in ("recall_at_k", "gallery_size", "reliability", "page"):
        with Image.open(done.folder / f"{name}.png") as image:
            assert image.format == "PNG"
            assert np.asarray(image.convert("RGB")).std() > 5
    lines = (done.folder / "recall_at_k.csv").read_text().splitlines()
    assert lines[0].split(",")[:3] == ["k", "object_raw", "object_mapped"]
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "10", "100"]
    column = lines[0].split(",").index("object_mapped")
    assert float(lines[2].split(",")[column]) == pytest.approx(
        done.metrics["object"]["all"]["mapped"]["recall_at_10"], abs=1e-5
    )
    params = json.loads((done.folder / "params.json").read_text())
    assert params["train_mapper"]["temperature"] == 0.1
    assert params["evaluate"]["top_k"] == 12


def test_twice_gives_equal_bytes(done: Evaluated, tmp_path: Path) -> None:
    again = evaluate(done.world, tmp_path)
    for path in [*done.folder.iterdir(), done.folder.parent / "metrics.json"]:
        other = (
            tmp_path / path.name
            if path.suffix == ".json" and path.name == "metrics.json"
            else again.folder / path.name
        )
        assert path.read_bytes() == other.read_bytes(), path.name


def test_ragged_blocks_give_the_same(
    done: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"BLOCK": 7, "BLOCK_BYTES": 1}.items():
        monkeypatch.setattr(gallery, name, value)
    found = evaluate(done.world, tmp_path)
    assert found.metrics == done.metrics
    name = "attributions.parquet"
    ids = [pq.read_table(one.folder / name)["gallery_ids"].to_pylist() for one in (found, done)]
    assert ids[0] == ids[1]


def test_attributions_are_written_a_few_queries_at_a_time(
    done: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "WRITTEN", 3)
    path = evaluate(done.world, tmp_path).folder / "attributions.parquet"
    assert pq.read_metadata(path).num_row_groups > 2
    assert pq.read_table(path).equals(pq.read_table(done.folder / path.name))


def test_k_larger_than_the_gallery(done: Evaluated, tmp_path: Path) -> None:
    found = evaluate(done.world, tmp_path, dataclasses.replace(PARAMS, top_k=10**12))
    row = pq.read_table(found.folder / "attributions.parquet").to_pylist()[0]
    assert (
        len(set(row["gallery_ids"])) == 200 + done.metrics["gallery"]["exemplars"] == len(row["gallery_ids"])
    )


def test_a_single_model_has_no_interval(tmp_path: Path) -> None:
    world = make_world(tmp_path, objects=4, styles=0)
    write_learned(world)
    cell = evaluate(world, tmp_path / "out").metrics["object"]["all"]
    assert cell["customized_models"] == 1
    assert cell["raw"]["recall_at_10_interval"] is None


def test_controls_of_another_backbone_are_refused(done: Evaluated, tmp_path: Path) -> None:
    world = make_world(tmp_path, objects=4, styles=0)
    write_learned(world)
    other = dataclasses.replace(Mapper.identity(16), config={"backbone": "clip"})
    other.save(tmp_path / "mapper" / "permuted.safetensors")
    with pytest.raises(
        ValueError, match=r"permuted.safetensors: wanted a mapper for backbone toy, got one for clip"
    ):
        evaluate(world, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_page_spreads_over_kinds_and_models(done: Evaluated) -> None:
    exemplars = read_exemplars(done.world.inputs["exemplars_path"])
    queries = read_queries(done.world.inputs["queries_path"], exemplars, split="test")
    rows = choose_queries(queries, 6)
    assert queries.kinds[rows].tolist() == ["object"] * 3 + ["style"] * 3
    assert len(set(queries.concept_ids[rows].tolist())) == 6
    assert len(choose_queries(queries, 1000)) == len(np.unique(queries.concept_ids))


def test_the_page_s_remainder_is_beyond_the_matches_that_it_shows(
    done: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[PageRow] = []

    def draw(path: Path, rows: list[PageRow], *, title: str) -> None:
        drawn.extend(rows)

    monkeypatch.setattr(page, "draw_page", draw)
    evaluate(done.world, tmp_path / "out")
    assert len(drawn) > 1
    for row in drawn:
        beyond = 1 - sum(match.influence for match in row.matches)
        assert row.caption.split()[-1] in (f"{max(beyond + off, 0):.0%}" for off in (-1e-6, 0, 1e-6))


def test_a_picture_that_is_nowhere_is_named(done: Evaluated) -> None:
    assert set(read_pictures(done.world.pictures, {"d00003"})) == {"d00003"}
    with pytest.raises(ValueError, match="no picture d99999"):
        read_pictures(done.world.pictures, {"d00003", "d99999"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recall_at": (1, 5)}, "recall_at: wanted 10 among them"),
        ({"top_k": 0}, "top_k: wanted 1 or more"),
        ({"seed": -1}, "seed: wanted 0 or more, got -1"),
        ({"gallery_sizes": ()}, "gallery_sizes: wanted 1 or more"),
    ],
)
def test_params_out_of_range_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PARAMS, **changes)


def test_params_yaml_is_complete() -> None:
    assert load_params(Params, "evaluate").recall_at == (1, 5, 10, 100)


def test_gains_are_the_first_less_the_second_in_every_cell(done: Evaluated) -> None:
    gains = []
    for tables in (done.metrics, done.metrics["hard_gallery"]):
        for kind in ("object", "style"):
            cell = tables[kind]["all"]
            for variant, others in GAINS.items():
                for other in others:
                    for name in ("recall_at_10", "mean_average_precision"):
                        gain = cell[f"{variant}_minus_{other}"][name]
                        assert gain == pytest.approx(cell[variant][name] - cell[other][name], abs=2e-6)
                        gains.append(gain)
    assert np.abs(gains).max() > 0.01


def test_the_control_of_own_kind_is_read_from_the_permuted_file(done: Evaluated) -> None:
    """Neither kind has a permuted mapper of its own here: both take the main one, the identity."""
    for tables in (done.metrics, done.metrics["hard_gallery"]):
        for kind in ("object", "style"):
            cell = tables[kind]["all"]
            assert cell["own_kind_permuted"] == cell["permuted"] == cell["raw"]
        assert tables["object"]["all"]["own_kind"] != tables["object"]["all"]["own_kind_permuted"]


def test_chance_knows_how_many_exemplars_a_query_has(done: Evaluated) -> None:
    exemplars = read_exemplars(done.world.inputs["exemplars_path"])
    queries = read_queries(done.world.inputs["queries_path"], exemplars, split="test", kinds=("style",))
    for tables, size in (
        (done.metrics, queries.sizes + 200),
        (done.metrics["hard_gallery"], np.full(len(queries), 200 + len(exemplars.image_ids))),
    ):
        chance = chance_average_precision(queries.sizes, size).mean()
        found = tables["style"]["all"]["chance"]["mean_average_precision"]
        assert found == pytest.approx(chance, abs=2e-6)


def test_calibration_is_told_of_either_calibrator(done: Evaluated) -> None:
    exemplars = read_exemplars(done.world.inputs["exemplars_path"])
    queries = read_queries(done.world.inputs["queries_path"], exemplars, split="test")
    real, asked, others = (
        FeatureSet.open(done.world.inputs["features_dir"] / name)
        for name in ("exemplars", "queries", "distractors")
    )
    mapper = Mapper.load(done.world.root / "mapper" / "mapper.safetensors")
    gallery = mapper.map_real(np.concatenate([real.select(exemplars.image_ids), others.vectors()]))
    scores = mapper.map_synth(asked.select(queries.image_ids)) @ gallery.T
    best = np.argsort(-scores, axis=1)[:, :12]
    for name, calibrator in (("before", Calibrator(1.0, 0.0)), ("after", Calibrator(20.0, -0.05))):
        influence = calibrator.influence(scores.astype(np.float64))
        shown = np.take_along_axis(influence, best, axis=1)
        found = done.metrics["calibration"][name]
        error = reliability(shown, influence_due(best, queries.own)).error
        assert found["expected_calibration_error"] == pytest.approx(error, abs=1e-4)
        assert found["support"] == pytest.approx((influence > 0).sum(axis=1).mean(), abs=0.1)
        assert found["remainder"] == pytest.approx(1 - shown.sum(axis=1).mean(), abs=1e-4)


def test_the_table_of_recall_is_that_of_the_metrics(done: Evaluated) -> None:
    with (done.folder / "recall_at_k.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for kind in ("object", "style"):
            cell = done.metrics[kind]["all"]
            for variant in ("raw", "mapped", "whitening", "permuted", "own_kind", "chance", "ceiling"):
                wanted = cell[variant][f"recall_at_{row['k']}"]
                assert float(row[f"{kind}_{variant}"]) == pytest.approx(wanted, abs=2e-6), (kind, variant)


def test_the_chart_of_gallery_sizes_ends_at_the_recall_of_the_whole(
    done: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}
    real = stage.plot_curves

    def watched(path: Path, panels: dict, **options: str) -> None:
        drawn[options["x_label"]] = panels
        real(path, panels, **options)

    monkeypatch.setattr(stage, "plot_curves", watched)
    metrics = evaluate(done.world, tmp_path).metrics
    for kind, curves in drawn["distractors"].items():
        for variant, one in curves.items():
            assert list(one.x) == [50, 100, 200]
            assert list(one.y) == sorted(one.y, reverse=True)  # more rivals find no more
            assert one.y[-1] == pytest.approx(metrics[kind]["all"][variant]["recall_at_10"], abs=1e-6)


def test_a_smaller_gallery_is_the_distractors_in_the_first_places() -> None:
    rng = np.random.default_rng(0)
    queries, own, distractors = (rng.standard_normal((rows, 3)).astype(np.float32) for rows in (40, 40, 30))
    for size in (1, 10, 29):
        asked = single_exemplars(len(queries))
        found = rank(Vectors(queries, own, distractors), asked, [size, 30]).by_size[size]
        alone = rank(Vectors(queries, own, distractors[:size]), asked, []).own
        assert found.tolist() == alone.tolist()


def test_places_are_drawn_at_random() -> None:
    """Distractors often lie sorted, by folder or by tar: the first of them are not like the whole."""
    places = draw_places(10_000, seed=0)
    assert sorted(places.tolist()) == list(range(10_000))
    assert not np.array_equal(places, draw_places(10_000, seed=1))
    assert 0.08 < (places[:1000] < 1000).mean() < 0.12


def test_a_notebooks_plot_backend_does_not_matter() -> None:
    command = [sys.executable, "-c", "import attribution.plots"]
    inherited = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run(command, cwd=Path(__file__).parents[1], env=inherited, check=True)
