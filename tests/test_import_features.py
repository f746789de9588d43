"""Ready features in clip-retrieval's layout: opened in place, refused when not whole."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attribution.backbones import BackboneSettings
from attribution.captions import describe
from attribution.clip_retrieval import _check_values, link_features, said_missing
from attribution.features import LENGTH_ONE, FeatureSet, Space, check_same_space, length_one
from attribution.files import sha256_bytes
from attribution.same_model import check_model
from stages import import_features

PLAIN = Space(backbone="clip", revision="r1", preprocessing="resize 224", dim=8, dtype="float16")
SPACE = dataclasses.replace(PLAIN, preprocessing="resize 224" + LENGTH_ONE)


def write_shards(
    folder: Path, *, below: bool = False, dtype: str = "float16", length: float | None = 1
) -> np.ndarray:
    """Eleven shards, more than nine so that order by name is not order by number."""
    rng = np.random.default_rng(0)
    vectors_of, metadata_of = ((folder / name if below else folder) for name in ("img_emb", "metadata"))
    for one in {vectors_of, metadata_of}:
        one.mkdir(parents=True)
    parts = []
    for number in range(11):
        vectors = rng.standard_normal((3 + number % 2, 8))
        if length is not None:
            vectors *= length / np.linalg.norm(vectors, axis=1, keepdims=True)
        np.save(vectors_of / f"img_emb_{number}.npy", vectors.astype(dtype))
        names = [f"/images/{number}/{row:05d}_{number}.jpg" for row in range(len(vectors))]
        rows = {"image_path": names, "caption": ["a caption"] * len(names), "url": names}
        pq.write_table(pa.table(rows), metadata_of / f"metadata_{number}.parquet")
        parts.append(vectors.astype(dtype))
    return np.concatenate(parts)


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_features_are_opened_where_they_lie(tmp_path: Path, below: bool, dtype: str) -> None:
    wanted = write_shards(tmp_path / "ready", below=below, dtype=dtype)
    before = sum(file.stat().st_size for file in tmp_path.rglob("*.npy"))
    space = dataclasses.replace(SPACE, dtype=dtype)
    found = link_features(tmp_path / "ready", tmp_path / "features" / "distractors", space)
    np.testing.assert_array_equal(found.vectors(), wanted.astype(np.float32))
    assert found.space == space
    assert found.is_ready_made
    for shard in found.shards:
        assert isinstance(shard, np.memmap)
        assert Path(str(shard.filename)).resolve().is_relative_to(tmp_path / "ready")
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.npy")) == before
    first = "/images/0/00000_0.jpg"
    assert found.image_ids[0] == sha256_bytes(first.encode())[:16]
    assert found.rows["source"][0].as_py() == first
    np.testing.assert_array_equal(found.select(found.image_ids[[20, 5]]), wanted[[20, 5]].astype(np.float32))
    says = describe(found, [str(found.image_ids[30]), "another"])
    third = "/images/8/00002_8.jpg"
    assert says == {sha256_bytes(third.encode())[:16]: {"caption": f"a caption {third}"}}
    # As any other feature set, with all its guards.
    again = FeatureSet.open(tmp_path / "features" / "distractors", backbone="clip", verify=True)
    assert len(again) == len(wanted)
    (tmp_path / "ready" / ("img_emb" if below else ".") / "img_emb_3.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard img_emb_3\.npy is missing"):
        FeatureSet.open(tmp_path / "features" / "distractors")


def test_vectors_of_length_one_are_another_space(tmp_path: Path) -> None:
    """A mapper has a bias: it must never see some features at length 1 and others as they came."""
    write_shards(tmp_path / "one")
    write_shards(tmp_path / "any", length=None)
    one, plain = (
        link_features(tmp_path / name, tmp_path / "out" / name, space)
        for name, space in (("one", SPACE), ("any", PLAIN))
    )
    with pytest.raises(ValueError, match=r"another feature space \(preprocessing: wanted 'resize 224', got"):
        check_same_space(one.path, plain.space, one.space)
    do = r"in featurize\.settings\.clip"
    with pytest.raises(
        ValueError,
        match=rf"img_emb_0\.npy: all lengths are 1, .* clip's are as they .* normalized: true {do}",
    ):
        link_features(tmp_path / "one", tmp_path / "out" / "wrong", PLAIN)
    with pytest.raises(
        ValueError, match=rf"img_emb_0\.npy: row \d has length .*, but clip's are brought to 1; .*: null {do}"
    ):
        link_features(tmp_path / "any", tmp_path / "out" / "wrong", SPACE)
    assert not (tmp_path / "out" / "wrong").exists()


def test_ids_may_be_the_stems_of_the_names(tmp_path: Path) -> None:
    write_shards(tmp_path / "ready")
    found = link_features(tmp_path / "ready", tmp_path / "out", SPACE, ids="stem")
    assert found.image_ids[:4].tolist() == ["00000_0", "00001_0", "00002_0", "00000_1"]


def test_references_inside_the_repository_are_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shards(Path("own/ready"))
    link_features(Path("own/ready"), Path("features/distractors"), SPACE)
    (tmp_path / "copy").mkdir()
    for name in ("own", "features"):
        os.rename(tmp_path / name, tmp_path / "copy" / name)
    assert len(FeatureSet.open(tmp_path / "copy" / "features" / "distractors")) == 38


def change(folder: Path, number: int, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    file = folder / f"img_emb_{number}.npy"
    np.save(file, edit(np.load(file)))


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


def write_over(file: Path, old: bytes, new: bytes) -> None:
    file.write_bytes(file.read_bytes().replace(old, new, 1))


def rename_all(folder: Path) -> None:
    for file in folder.glob("metadata_*.parquet"):
        pq.write_table(pq.read_table(file).rename_columns(["a", "b", "c"]), file)


def no_text(folder: Path) -> None:
    names = pa.array([b"caf\xe9", b"b", b"c"]).view(pa.string())
    pq.write_table(pa.table({"image_path": names}), folder / "metadata_4.parquet")


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no metadata": (
        lambda one: (one / "metadata_4.parquet").unlink(),
        r"img_emb_4\.npy: no metadata of that number",
    ),
    "no vectors": (
        lambda one: (one / "img_emb_4.npy").unlink(),
        r"metadata_4\.parquet: no img_emb of that number",
    ),
    "fewer": (
        lambda one: change(one, 4, lambda rows: rows[1:]),
        r"metadata_4\.parquet: 3 names in image_path for 2 vectors",
    ),
    "other dim": (
        lambda one: change(one, 4, lambda rows: rows[:, 1:]),
        r"img_emb_4\.npy: wanted \[rows, 8\] of float32 or float16 for clip, got \[3, 7\]",
    ),
    "other dtype": (
        lambda one: change(one, 4, lambda rows: rows.astype(np.float32)),
        r"img_emb_4\.npy: float32, but clip is stored in float16; say dtype: float32 in featurize",
    ),
    "not finite": (
        lambda one: change(one, 4, lambda rows: rows * np.nan),
        r"img_emb_4\.npy: row 0 has a value",
    ),
    "no npy": (
        lambda one: (one / "img_emb_4.npy").write_bytes(b"x" * 200),
        r"img_emb_4\.npy: not a \.npy file",
    ),
    "no shape": (
        lambda one: write_over(one / "img_emb_4.npy", b")", b" "),
        r"img_emb_4\.npy: not a \.npy file",
    ),
    "by columns": (
        lambda one: change(one, 4, np.asfortranarray),
        r"img_emb_4\.npy: wanted rows one after another",
    ),
    "cut": (
        lambda one: append(one / "img_emb_4.npy"),
        r"img_emb_4\.npy: wanted rows one after another, and nothing else",
    ),
    "no parquet": (
        lambda one: (one / "metadata_4.parquet").write_bytes(b"x"),
        r"metadata_4\.parquet: not a parquet",
    ),
    "a number twice": (
        lambda one: np.save(one / "img_emb_04.npy", np.load(one / "img_emb_4.npy")),
        r"img_emb_4\.npy: .*img_emb_04\.npy has the same number",
    ),
    "a number twice, below": (
        lambda one: write_shards(one, below=True),
        r"img_emb/img_emb_0\.npy: .*img_emb_0\.npy has the same number",
    ),
    "no text": (no_text, r"metadata_4\.parquet: column image_path is damaged: .*utf-8"),
    "no names": (rename_all, r"metadata_0\.parquet: no column image_path or key or url; it has: a, b, c"),
}


def test_numbers_left_out_are_told(tmp_path: Path) -> None:
    write_shards(tmp_path / "ready")
    assert said_missing(tmp_path / "ready") == ""
    for number in (0, 4):
        (tmp_path / "ready" / f"img_emb_{number}.npy").unlink()
        (tmp_path / "ready" / f"metadata_{number}.parquet").unlink()
    assert said_missing(tmp_path / "ready") == "; no shard 0, 4, though there is 10: is it whole?"
    for number in range(1, 8):
        (tmp_path / "ready" / f"img_emb_{number}.npy").unlink(missing_ok=True)
        (tmp_path / "ready" / f"metadata_{number}.parquet").unlink(missing_ok=True)
    assert said_missing(tmp_path / "ready").startswith("; no shard 0, 1, 2, 3, 4 and 3 more, though")


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_whole_is_named(tmp_path: Path, name: str) -> None:
    damage, message = WRONG[name]
    write_shards(tmp_path / "ready")
    damage(tmp_path / "ready")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        link_features(tmp_path / "ready", tmp_path / "out", SPACE)
    assert not (tmp_path / "out").exists()


def test_a_shard_without_rows_says_nothing_of_lengths(tmp_path: Path) -> None:
    vectors = write_shards(tmp_path / "ready", length=None)
    change(tmp_path / "ready", 10, lambda rows: rows[:0])
    file = tmp_path / "ready" / "metadata_10.parquet"
    pq.write_table(pq.read_table(file)[:0], file)
    linked = link_features(tmp_path / "ready", tmp_path / "out", PLAIN)
    assert np.array_equal(linked.vectors(), vectors[:-3].astype(np.float32))


def test_a_name_twice_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "ready")
    with pytest.raises(
        ValueError, match=r"a caption and a caption get the same id; name pictures by another column"
    ):
        link_features(tmp_path / "ready", tmp_path / "out", SPACE, name_column="caption")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: no img_emb_\*\.npy here or in img_emb/"):
        link_features(tmp_path / "empty", tmp_path / "out", SPACE)


def test_the_command_takes_the_space_of_the_backbones_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    row = "library: pixels, model: null, weights: null, image_size: 2, dtype: float16, batch_size: 4"
    Path("params.yaml").write_text(f"featurize: {{settings: {{tiny: {{{row}}}}}}}\n")
    Path("ready").mkdir()
    np.save("ready/img_emb_0.npy", np.ones((2, 12), np.float16))
    pq.write_table(pa.table({"key": ["a", "b"]}), "ready/metadata_0.parquet")
    command = ["import_features", "tiny", "distractors", "ready", "--model"]
    monkeypatch.setattr(sys, "argv", [*command, "ViT-B/32"])
    with pytest.raises(SystemExit, match=r"tiny: wanted features made by pixels, got ViT-B/32"):
        import_features.main()
    monkeypatch.setattr(sys, "argv", [*command, "pixels"])
    import_features.main()
    assert "2 vectors of dim 12 in 1 shards: data/features/tiny/distractors" in capsys.readouterr().out
    found = FeatureSet.open("data/features/tiny/distractors", backbone="tiny")
    assert found.space.revision == "1"


NAMED = BackboneSettings("open_clip", "ViT-B-32-quickgelu", "openai", 224, "float16", 8)


@pytest.mark.parametrize(
    ("changes", "made_by", "wanted"),
    [
        ({}, "ViT-B/32", None),
        ({}, "open_clip:ViT-B-32/openai", None),
        ({}, "open_clip:ViT-B-32-quickgelu/openai", None),
        ({}, "ViT-L/14", r"made by ViT-B/32 or open_clip:ViT-B-32-.*/openai or open_clip:.*, got ViT-L/14"),
        ({}, "open_clip:ViT-B-32/laion2b_s34b_b79k", "wanted features made by ViT-B/32 or"),
        ({"model": "ViT-L-14-336-quickgelu"}, "ViT-L/14@336px", None),
        ({"model": "RN50-quickgelu"}, "RN50", None),
        ({"model": "ViT-B-32", "weights": "laion2b_s34b_b79k"}, "open_clip:ViT-B-32/laion2b_s34b_b79k", None),
        (
            {"model": "ViT-B-32", "weights": "laion2b_s34b_b79k"},
            "ViT-B/32",
            "made by open_clip:ViT-B-32/laion",
        ),
        ({"model": "ViT-B-32", "weights": "files/b32.safetensors"}, "open_clip:ViT-B-32/my_own", None),
        (
            {"model": "ViT-B-32", "weights": "files/b32.safetensors"},
            "open_clip:ViT-B-16/my_own",
            "made by open",
        ),
        ({"model": "data/backbones/clip", "weights": "data/w.safetensors"}, "data/backbones/clip", None),
        (
            {"library": "timm", "model": "vit_small", "weights": "pretrained"},
            "ViT-B/32",
            "made by vit_small, got",
        ),
    ],
)
def test_the_model_said_to_have_made_them_is_the_backbones(
    changes: dict[str, str], made_by: str, wanted: str | None
) -> None:
    settings = dataclasses.replace(NAMED, **changes)
    if wanted is None:
        check_model("clip", settings, made_by)
    else:
        with pytest.raises(ValueError, match=f"clip: .*{wanted}"):
            check_model("clip", settings, made_by)


def test_pictures_are_the_same_by_their_cosine_whatever_the_lengths(tmp_path: Path) -> None:
    """Dot products of vectors that are not of length 1 would leave out nearly all of them, or none."""
    rng = np.random.default_rng(0)
    for unit in (0.01, 10.0):
        vectors = (unit * rng.standard_normal((50, 16))).astype(np.float32)
        np.save(tmp_path / "v.npy", vectors)
        array = np.load(tmp_path / "v.npy", mmap_mode="r")
        space = Space("toy", "1", "none", 16, "float32")
        _, same = _check_values(tmp_path / "v.npy", array, space, length_one(7 * vectors[[3, 20]]))
        assert np.flatnonzero(same).tolist() == [3, 20]
