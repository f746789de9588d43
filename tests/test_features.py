"""attribution.features: what is read is what was written, or it is refused by name."""

from __future__ import annotations

import dataclasses
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution import features
from attribution.features import (
    FeatureSet,
    Space,
    assemble_feature_set,
    check_same_space,
    write_feature_set,
    write_shard,
)
from attribution.files import read_json, sha256_file, write_json

RNG = np.random.default_rng(3)
SPACE = Space("clip", "abc123", "squash 4", 5, "float32")
VECTORS = RNG.normal(size=(7, 5)).astype(np.float32)
IDS = [f"image-{row}" for row in range(7)]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "clip" / "queries"
    write_feature_set(
        path, SPACE, IDS, [VECTORS], image_sha256=[f"{row:064}" for row in range(7)], shard_rows=3
    )
    return path


def test_a_set_is_shards_rows_and_space(written: Path) -> None:
    names = sorted(path.name for path in written.iterdir())
    assert names == ["img_emb_0.npy", "img_emb_1.npy", "img_emb_2.npy", "rows.parquet", "space.json"]
    assert [len(np.load(written / f"img_emb_{number}.npy")) for number in range(3)] == [3, 3, 1]
    opened = FeatureSet.open(written, backbone="clip", verify=True)
    assert (opened.path, opened.space, len(opened)) == (written, SPACE, 7)
    assert all(isinstance(shard, np.memmap) for shard in opened.shards)
    assert opened.image_ids.tolist() == IDS == opened.rows["image_id"].to_pylist()
    assert opened.rows["sha256"].to_pylist()[6] == f"{6:064}"
    np.testing.assert_array_equal(opened.vectors(), VECTORS)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(0, 20),
    cuts=st.lists(st.integers(0, 20), max_size=5),
    shard_rows=st.integers(1, 25),
    dtype=st.sampled_from(["float32", "float16"]),
)
def test_any_batching_and_sharding_is_the_same_set(
    tmp_path_factory: pytest.TempPathFactory, rows: int, cuts: list[int], shard_rows: int, dtype: str
) -> None:
    vectors = np.random.default_rng(rows).normal(size=(rows, 5)).astype(np.float32)
    batches = np.split(vectors, sorted(cut for cut in cuts if cut < rows))
    space = dataclasses.replace(SPACE, dtype=dtype)
    path = tmp_path_factory.mktemp("features") / "set"
    ids = [str(row) for row in range(rows)]
    opened = write_feature_set(path, space, ids, batches, shard_rows=shard_rows)
    assert len(opened.shards) == -(-rows // shard_rows)
    assert {shard.dtype for shard in opened.shards} <= {np.dtype(dtype)}
    stored = vectors.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(opened.vectors(), stored)
    order = np.random.default_rng(1).permutation(rows)
    np.testing.assert_array_equal(opened.select([ids[row] for row in order]), stored[order])


def test_equal_sets_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_feature_set(tmp_path / name, SPACE, IDS, [VECTORS])
    for file in (tmp_path / "one").iterdir():
        assert sha256_file(file) == sha256_file(tmp_path / "two" / file.name)


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_rows_taken_in_blocks_are_those_in_memory(
    written: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(features, "BLOCK", block)
    opened = FeatureSet.open(written)
    rows = np.array([6, 0, 2, 2, 5, 1, 6])
    np.testing.assert_array_equal(opened.take(rows), VECTORS[rows])
    assert opened.take(rows[:0]).shape == (0, 5)
    assert not opened.is_ready_made


@pytest.mark.parametrize("block", [1, 3, 100])
def test_ids_are_found_in_blocks_of_the_table(
    written: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(features, "ID_BLOCK", block)
    opened = FeatureSet.open(written)
    rows = np.array([6, 0, 2, 2, 5, 1, 6])
    assert opened.ids_of(rows).tolist() == [IDS[row] for row in rows]
    assert opened.ids_of(rows[:0]).tolist() == []
    asked = ["image-5", "gone", "image-0", "image-5", "image-6"]
    assert opened.rows_of(asked).tolist() == [5, -1, 0, 5, 6]
    assert opened.rows_of([]).tolist() == []


def test_ids_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "ID_BLOCK", 512)
    ids = [f"{row:040}" for row in range(20_000)]
    path = tmp_path / "x"
    write_feature_set(path, Space("x", "1", "", 1, "float16"), ids, [np.zeros((len(ids), 1))])
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    opened = FeatureSet.open(path)
    assert opened.ids_of(np.arange(0, len(ids), 4000)).tolist() == ids[::4000]
    assert opened.rows_of(ids[::-4000]).tolist() == list(range(len(ids) - 1, -1, -4000))
    peak, kept = tracemalloc.get_traced_memory()[1], pa.total_allocated_bytes() - before
    tracemalloc.stop()
    assert peak + kept < 40 * len(ids)


def test_select_takes_repeats_and_numpy_ids_and_names_what_is_missing(written: Path) -> None:
    opened = FeatureSet.open(written)
    np.testing.assert_array_equal(
        opened.select(np.array(["image-6", "image-0", "image-6"])), VECTORS[[6, 0, 6]]
    )
    assert opened.select([]).shape == (0, 5)
    with pytest.raises(ValueError, match=r"queries: no image gone \(1 of 2 missing\)"):
        opened.select(["image-1", "gone"])


def change_record(path: Path, **changes: object) -> None:
    write_json(path / "space.json", {**read_json(path / "space.json"), **changes})


def drop_row(path: Path) -> None:
    pq.write_table(pq.read_table(path / "rows.parquet").slice(1), path / "rows.parquet")


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(path / "img_emb_1.npy", change(np.load(path / "img_emb_1.npy")))


def damage_header(path: Path, old: bytes = b"\x93NUM", new: bytes = b"junk") -> None:
    data = (path / "img_emb_1.npy").read_bytes()
    assert old in data
    (path / "img_emb_1.npy").write_bytes(data.replace(old, new, 1))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing folder": (shutil.rmtree, "clip/queries: no space.json"),
    "missing record": (lambda path: (path / "space.json").unlink(), "clip/queries: no space.json"),
    "missing rows": (lambda path: (path / "rows.parquet").unlink(), "clip/queries: no rows.parquet"),
    "rows that are none": (
        lambda path: (path / "rows.parquet").write_bytes(b"x"),
        "clip/queries/rows.parquet: not a parquet file",
    ),
    "shards by name alone": (
        lambda path: change_record(path, shards=["img_emb_0.npy"]),
        "not the record of a feature set",
    ),
    "missing shard": (lambda path: (path / "img_emb_1.npy").unlink(), "shard img_emb_1.npy is missing"),
    "ids of another name": (
        lambda path: pq.write_table(
            pq.read_table(path / "rows.parquet").rename_columns(["id", "sha256"]), path / "rows.parquet"
        ),
        r"rows.parquet: no column image_id among \['id', 'sha256'\]; run: dvc repro featurize@clip",
    ),
    "fewer ids": (drop_row, r"clip/queries: 6 ids but 7 vectors \(7 written\)"),
    "wrong count": (lambda path: change_record(path, rows=8), r"7 ids but 7 vectors \(8 written\)"),
    "shard of fewer rows": (
        lambda path: rewrite(path, lambda x: x[1:]),
        r"img_emb_1.npy: 168 bytes, wanted 188",
    ),
    "shard of another dim": (
        lambda path: rewrite(path, lambda x: x.reshape(5, 3)),
        r"wanted float32 \[3, 5\], got",
    ),
    "shard of another dtype": (lambda path: rewrite(path, lambda x: x.view(np.int32)), r"got int32 \[3, 5\]"),
    "truncated shard": (lambda path: (path / "img_emb_1.npy").write_bytes(b""), "0 bytes, wanted 188"),
    "not a shard": (damage_header, "img_emb_1.npy: not a .npy file"),
    "a shape that does not close": (
        lambda path: damage_header(path, b")", b" "),
        "img_emb_1.npy: not a .npy file",
    ),
    "not finite by its record": (
        lambda path: change_record(path, finite=False),
        "values that are not finite",
    ),
    "another dtype by its record": (
        lambda path: change_record(path, dtype="float16"),
        r"wanted float16 \[3, 5\]",
    ),
    "no dtype at all": (
        lambda path: change_record(path, dtype="int8"),
        "dtype int8, wanted float32 or float16",
    ),
    "a record of something else": (
        lambda path: write_json(path / "space.json", {}),
        "not the record of a feature set",
    ),
    "a record that is a list": (
        lambda path: write_json(path / "space.json", []),
        "not the record of a feature set",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_set_is_refused_by_name(written: Path, name: str) -> None:
    break_it, message = BROKEN[name]
    break_it(written)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        FeatureSet.open(written)
    assert str(written) in str(error.value)
    assert "run: dvc repro featurize@clip" in str(error.value)


def test_rows_with_a_damaged_body_are_refused_by_name(written: Path) -> None:
    """Their record is whole, so that the set opens."""
    data = (written / "rows.parquet").read_bytes()
    (written / "rows.parquet").write_bytes(data[:4] + b"\xff" * 60 + data[64:])
    opened = FeatureSet.open(written)
    for read in (
        lambda: opened.image_ids,
        lambda: opened.rows,
        lambda: opened.rows_of(IDS),
        lambda: opened.ids_of(np.array([0])),
    ):
        with pytest.raises(ValueError, match=r"rows\.parquet: .*damaged.*; run: dvc repro featurize@clip"):
            read()


def test_another_backbone_is_refused_by_name(written: Path) -> None:
    with pytest.raises(
        ValueError, match=r"wanted features of dino, got those of clip; run: dvc repro featurize@dino"
    ):
        FeatureSet.open(written, backbone="dino")


def test_verify_reads_the_values(written: Path) -> None:
    rewrite(written, lambda x: np.where(x == x[0, 0], np.float32("nan"), x))
    FeatureSet.open(written)  # sizes are right
    with pytest.raises(ValueError, match=r"img_emb_1\.npy: other values than were written"):
        FeatureSet.open(written, verify=True)


def test_verify_does_not_take_the_record_s_word_for_finite(written: Path) -> None:
    rewrite(written, lambda x: np.where(x == x[0, 0], np.float32("inf"), x))
    shards = read_json(written / "space.json")["shards"]
    shards[1]["sha256"] = sha256_file(written / "img_emb_1.npy")
    change_record(written, shards=shards)
    with pytest.raises(ValueError, match=r"img_emb_1\.npy: values that are not finite numbers"):
        FeatureSet.open(written, verify=True)


def bad_value(value: float) -> np.ndarray:
    vectors = VECTORS.copy()
    vectors[4, 2] = value
    return vectors


WRONG: dict[str, tuple[Space, list[str], list[np.ndarray], str]] = {
    "too few": (SPACE, IDS, [VECTORS[:4], VECTORS[:1]], "7 ids but 5 vectors"),
    "too many": (SPACE, IDS, [VECTORS, VECTORS], "7 ids but 14 vectors"),
    "none": (SPACE, IDS, [], "7 ids but 0 vectors"),
    "another dim": (SPACE, IDS, [VECTORS[:, :4]], r"wanted vectors \[3, 5\] for clip, got \[3, 4\]"),
    "an id twice": (SPACE, [*IDS[:6], "image-0"], [VECTORS], "image_id image-0 more than once"),
    "nan": (
        SPACE,
        IDS,
        [bad_value(np.nan)],
        r"image image-4 has a value that is not a finite number \(1 such",
    ),
    "inf": (SPACE, IDS, [bad_value(-np.inf)], "image image-4 has a value that is not a finite number"),
    "overflow": (
        dataclasses.replace(SPACE, dtype="float16"),
        IDS,
        [bad_value(1e6)],
        "image image-4 has a value too large for float16",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_refused_by_name_and_changes_nothing(written: Path, name: str) -> None:
    space, ids, batches, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as error:
        write_feature_set(written, space, ids, batches, shard_rows=3)
    assert str(error.value).startswith(str(written))
    np.testing.assert_array_equal(FeatureSet.open(written, verify=True).vectors(), VECTORS)
    assert [path.name for path in written.parent.iterdir()] == ["queries"]


def test_a_set_of_no_images_is_a_set(tmp_path: Path) -> None:
    opened = write_feature_set(tmp_path / "none", SPACE, [], [])
    assert opened.vectors().shape == (0, 5)
    assert opened.shards == ()


def test_a_set_is_assembled_from_shards_without_touching_them(tmp_path: Path) -> None:
    files = [tmp_path / "store" / f"{name}.npy" for name in ("x", "y")]
    write_shard(files[0], SPACE, IDS[:4], VECTORS[:4])
    write_shard(files[1], SPACE, IDS[4:], VECTORS[4:])
    opened = assemble_feature_set(tmp_path / "set", SPACE, IDS, files)
    np.testing.assert_array_equal(opened.vectors(), VECTORS)
    # Linked: a million vectors are not on the disk twice.
    assert (tmp_path / "set" / "img_emb_0.npy").samefile(files[0])
    shutil.rmtree(tmp_path / "set")
    np.testing.assert_array_equal(np.load(files[0]), VECTORS[:4])
    with pytest.raises(ValueError, match="6 ids but 7 vectors"):
        assemble_feature_set(tmp_path / "set", SPACE, IDS[:6], files)
    with pytest.raises(ValueError, match="7 ids but 1 digests"):
        assemble_feature_set(tmp_path / "set", SPACE, IDS, files, image_sha256=["0"])


def test_without_links_shards_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    write_shard(tmp_path / "x.npy", SPACE, IDS, VECTORS)
    opened = assemble_feature_set(tmp_path / "set", SPACE, IDS, [tmp_path / "x.npy"])
    np.testing.assert_array_equal(opened.vectors(), VECTORS)
    assert not (tmp_path / "set" / "img_emb_0.npy").samefile(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("backbone", "dino"),
        ("revision", "def"),
        ("preprocessing", "crop 4"),
        ("dim", 6),
        ("dtype", "float16"),
    ],
)
def test_spaces_that_differ_are_named_by_what_differs(field: str, value: object) -> None:
    other = dataclasses.replace(SPACE, **{field: value})  # type: ignore[arg-type]
    check_same_space("here", SPACE, dataclasses.replace(SPACE))
    with pytest.raises(
        ValueError, match=f"here: another feature space .{field}: wanted .*, got '?{value}'?"
    ) as error:
        check_same_space("here", SPACE, other)
    assert str(error.value).count("wanted") == 1
    assert str(error.value).endswith("; run: dvc repro featurize@clip")


@pytest.mark.parametrize(
    ("changes", "message"), [({"dtype": "float64"}, "dtype float64"), ({"dim": 0}, "dim 0")]
)
def test_impossible_spaces_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"space of clip: {message}, wanted"):
        dataclasses.replace(SPACE, **changes)  # type: ignore[arg-type]
