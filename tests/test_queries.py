"""Splits by concept, the prompts of each split, and each query's own exemplars."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from attribution.queries import Queries, open_features, read_exemplars, read_queries
from tests.feature_world import make_world, write_vectors


def rewrite(path: Path, change) -> None:
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        change(row)
    pq.write_table(pa.Table.from_pylist([row for row in rows if row]), path)


def test_every_query_has_the_exemplars_of_its_concept(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    exemplars = read_exemplars(world.inputs["exemplars_path"])
    found = {}
    for split in ("train", "val", "test"):
        queries = read_queries(world.inputs["queries_path"], exemplars, split=split)
        found[split] = set(queries.concept_ids.tolist())
        for concept, own in zip(queries.concept_ids, queries.own, strict=True):
            assert sorted(own[own >= 0]) == np.flatnonzero(exemplars.concept_ids == concept).tolist()
        assert queries.sizes.max() == 4
    assert not found["train"] & found["val"] | found["train"] & found["test"] | found["val"] & found["test"]
    assert sum(map(len, found.values())) == 18


def test_train_prompts_of_test_concepts_are_left_out(tmp_path: Path) -> None:
    world = make_world(tmp_path)

    def swap(row: dict) -> None:
        if row["image_id"].endswith("q0"):
            row["prompt_split"] = {"train": "test", "test": "train"}[row["prompt_split"]]

    rewrite(world.inputs["queries_path"], swap)
    exemplars = read_exemplars(world.inputs["exemplars_path"])
    for split in ("train", "test"):
        queries = read_queries(world.inputs["queries_path"], exemplars, split=split)
        assert len(queries) == 3 * len(np.unique(queries.concept_ids))


def test_kinds_can_be_chosen(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    exemplars = read_exemplars(world.inputs["exemplars_path"])
    queries = read_queries(world.inputs["queries_path"], exemplars, split="test", kinds=("object",))
    assert set(queries.kinds.tolist()) == {"object"}
    assert queries.own.shape[1] == 1


def test_take_takes_all_columns(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    exemplars = read_exemplars(world.inputs["exemplars_path"])
    queries = read_queries(world.inputs["queries_path"], exemplars, split="test")
    some = queries.take(queries.kinds == "style")
    assert len(some) == len(some.own) == len(some.seen) == (queries.kinds == "style").sum()


def test_a_model_without_exemplars_is_an_error(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    table = pq.read_table(world.inputs["exemplars_path"])
    kept = table.filter(pc.not_equal(table["concept_id"], "object-003"))
    pq.write_table(kept, world.inputs["exemplars_path"])
    exemplars = read_exemplars(world.inputs["exemplars_path"])
    with pytest.raises(ValueError, match=r"queries.parquet: customized model object-003 has no exemplars"):
        read_queries(world.inputs["queries_path"], exemplars, split="test")


def test_bad_tables_are_named(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    path = world.inputs["queries_path"]
    exemplars = read_exemplars(world.inputs["exemplars_path"])
    with pytest.raises(ValueError, match="wanted one of train, val, test, got 'dev'"):
        read_queries(path, exemplars, split="dev")
    rewrite(path, lambda row: row.update(split="train", prompt_split="train"))
    with pytest.raises(ValueError, match=r"queries.parquet: no queries of split test with test prompts"):
        read_queries(path, exemplars, split="test")
    rewrite(path, lambda row: row.update(seen=None))
    with pytest.raises(ValueError, match=r"queries.parquet: column seen has 72 empty values"):
        read_queries(path, exemplars, split="train")
    rewrite(path, lambda row: row.pop("seen"))
    with pytest.raises(ValueError, match=r"queries.parquet: no column seen; it has: image_id"):
        read_queries(path, exemplars, split="train")
    with pytest.raises(FileNotFoundError, match=r"gone.parquet: no such table; run: dvc repro$"):
        read_exemplars(tmp_path / "gone.parquet")
    whole = world.inputs["exemplars_path"].read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"no parquet" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"queries.parquet: not a parquet file, or a damaged one \("):
            read_queries(path, exemplars, split="train")


def test_features_of_another_space_are_refused(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    write_vectors(tmp_path / "features" / "queries", ["a"], np.ones((1, 7)))
    with pytest.raises(ValueError, match="queries: another feature space"):
        open_features(world.inputs["features_dir"], "toy")
    with pytest.raises(ValueError, match="wanted features of clip, got those of toy"):
        open_features(world.inputs["features_dir"], "clip")


def test_the_first_exemplar_of_the_table_counts() -> None:
    plain = np.array(["a", "b"])
    queries = Queries(plain, plain, plain, np.ones(2, bool), plain, own=np.array([[0, 1, -1], [2, -1, -1]]))
    assert queries.sizes.tolist() == [2, 1]
