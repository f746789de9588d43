"""stages.featurize: three sets of one space, whatever interrupts the run."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import multiprocessing
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from attribution import backbones
from attribution.backbones import Backbone, BackboneSettings, load_backbone
from attribution.features import FeatureSet
from attribution.files import DiskFullError, sha256_bytes, sha256_file
from attribution.images import ImageError, decode_image, write_image_table
from stages import decoding
from stages.decoding import BATCHES_AHEAD, EncodedImage, PixelLoader, pixel_loader
from stages.featurize import (
    Params,
    encode_loaded,
    encode_side_by_side,
    grouped,
    main,
    read_ahead,
    read_encoded,
    run,
)
from stages.incremental import StageError, alone_in

SETTINGS = BackboneSettings("pixels", None, None, 4, "float32", 3)
PARAMS = Params(("pixels",), 4, {"pixels": SETTINGS})
EXEMPLARS = [f"e{row}" for row in range(9)]
DISTRACTORS = [f"d{row}" for row in range(11)]
SETS = ("exemplars", "queries", "distractors")


def encoded(image_id: str, kind: str = "PNG") -> bytes:
    seed = list(image_id.encode())
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_table(path: Path, image_ids: list[str], kind: str = "PNG") -> None:
    images = pa.array([encoded(image_id, kind) for image_id in image_ids], pa.binary())
    write_image_table(path, pa.table({"image_id": image_ids, "image": images}))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """9 exemplars, 7 queries (3 shipped, 4 fresh), 11 distractors; and images that nobody asks for."""
    data = tmp_path / "data"
    write_table(data / "world" / "exemplars.parquet", EXEMPLARS)
    write_table(data / "world" / "distractors" / "part-00000.parquet", DISTRACTORS[:6])
    write_table(data / "world" / "distractors" / "part-00001.parquet", DISTRACTORS[6:])
    write_table(data / "shipped" / "synthesized.parquet", ["s0", "s1", "unasked", "s2"], "WEBP")
    write_table(data / "synthesized" / "cat.parquet", ["cat-0", "cat-1"], "WEBP")
    write_table(data / "synthesized" / "ant.parquet", ["ant-0", "unasked", "ant-1"], "WEBP")
    write_table(data / "synthesized" / "stale.parquet", ["stale-0"], "WEBP")
    write_queries(data, ["cat-1", "ant-0", "ant-1", "cat-0"])
    return data


def write_queries(data: Path, fresh: list[str]) -> None:
    rows = [("s1", "owl", "shipped"), *((name, name[:3], "fresh") for name in fresh)]
    rows += [("s0", "elk", "shipped"), ("s2", "owl", "shipped")]
    columns = dict(zip(("image_id", "concept_id", "source"), map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), data / "queries.parquet")


def featurize(data: Path, params: Params = PARAMS, backbone: str = "pixels", **changes: Any) -> str:
    paths = {
        "exemplars": data / "world" / "exemplars.parquet",
        "distractors": data / "world" / "distractors",
        "queries": data / "queries.parquet",
        "synthesized": data / "synthesized",
        "shipped": data / "shipped" / "synthesized.parquet",
        "features": data / "features",
        "shards": data / "features" / ".shards",
        "root": data.parent,
    }
    return run(params, backbone, **{**paths, **changes})


def digests(data: Path) -> dict[str, str]:
    folder = data / "features" / "pixels"
    return {str(file.relative_to(folder)): sha256_file(file) for file in folder.rglob("*") if file.is_file()}


def reused(line: str) -> int:
    match = re.search(r"\((\d+) from finished shards\)", line)
    assert match, line
    return int(match[1])


def test_three_sets_hold_every_image_once(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = featurize(data)
    assert re.fullmatch(
        r"featurize pixels: 27 images \(0 from finished shards\) in \d+\.\d s, \d+ images/s", line
    )
    sets = {
        name: FeatureSet.open(data / "features" / "pixels" / name, backbone="pixels", verify=True)
        for name in SETS
    }
    assert sets["exemplars"].image_ids.tolist() == EXEMPLARS
    assert sets["distractors"].image_ids.tolist() == DISTRACTORS
    assert sets["queries"].image_ids.tolist() == ["s0", "s1", "s2", "ant-0", "ant-1", "cat-0", "cat-1"]
    assert len({one.space for one in sets.values()}) == 1
    backbone = load_backbone("pixels", SETTINGS, root=data)
    for name, one in sets.items():
        kind = "WEBP" if name == "queries" else "PNG"
        files = [encoded(image_id, kind) for image_id in one.image_ids]
        np.testing.assert_array_equal(one.vectors(), backbone.encode([decode_image(file) for file in files]))
        assert one.rows["sha256"].to_pylist() == [sha256_bytes(file) for file in files]
    assert capsys.readouterr().err == ""  # no progress bar where there is no terminal


def test_shards_do_not_mix_tables_or_exceed_their_rows(data: Path) -> None:
    featurize(data)
    lengths = {
        name: [len(shard) for shard in FeatureSet.open(data / "features" / "pixels" / name).shards]
        for name in SETS
    }
    assert lengths == {"exemplars": [4, 4, 1], "queries": [4, 3], "distractors": [4, 4, 3]}


# Shards of 4 take two batches, of 3 and 1 images; the last ones of exemplars and queries take one.
@pytest.mark.parametrize(("fail_at", "finished"), [(1, 0), (2, 0), (3, 4), (8, 13)])
def test_a_run_that_broke_off_goes_on_and_ends_the_same(
    data: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int, finished: int
) -> None:
    featurize(data)
    undisturbed = digests(data)
    for folder in ("pixels", ".shards"):
        (data / "features" / folder).rename(data / f"first {folder}")
    encode, calls = Backbone.encode_pixels, iter(range(1, 100))

    def encode_until(self: Backbone, pixels: np.ndarray) -> np.ndarray:
        if next(calls) == fail_at:
            raise KeyboardInterrupt
        return encode(self, pixels)

    monkeypatch.setattr(Backbone, "encode_pixels", encode_until)
    with pytest.raises(KeyboardInterrupt):
        featurize(data)
    monkeypatch.undo()
    assert reused(featurize(data)) == finished
    assert digests(data) == undisturbed


def test_one_more_exemplar_costs_one_shard_and_old_shards_go(data: Path) -> None:
    featurize(data)
    write_table(data / "world" / "exemplars.parquet", [*EXEMPLARS, "e-new"])
    line = featurize(data)
    assert reused(line) == 28 - 2  # the last shard held one exemplar and now holds two
    assert len(list((data / "features" / ".shards" / "pixels").iterdir())) == 8
    assert FeatureSet.open(data / "features" / "pixels" / "exemplars").image_ids.tolist()[-1] == "e-new"


def test_another_space_shares_nothing(data: Path) -> None:
    featurize(data)
    other = Params(("pixels",), 4, {"pixels": BackboneSettings("pixels", None, None, 4, "float16", 3)})
    assert reused(featurize(data, other)) == 0
    assert {shard.dtype for shard in FeatureSet.open(data / "features" / "pixels" / "queries").shards} == {
        np.dtype("float16")
    }


def test_the_store_may_be_deleted(data: Path) -> None:
    featurize(data)
    for file in (data / "features" / ".shards" / "pixels").iterdir():
        file.unlink()
    FeatureSet.open(data / "features" / "pixels" / "queries", verify=True)


def test_a_net_is_featurized_as_pixels_are(data: Path) -> None:
    settings = BackboneSettings("timm", "test_vit", None, 160, "float16", 8)
    params = Params(("untrained",), 100, {"untrained": settings})
    featurize(data, params, "untrained")
    opened = FeatureSet.open(data / "features" / "untrained" / "exemplars", backbone="untrained", verify=True)
    backbone = load_backbone("untrained", settings, root=data)
    wanted = backbone.encode([decode_image(encoded(name)) for name in EXEMPLARS])
    np.testing.assert_allclose(opened.vectors(), wanted, atol=2e-2)
    assert opened.space == backbone.space


def test_an_image_that_cannot_be_read_is_named_and_no_set_is_left_half(data: Path) -> None:
    rows = pa.table({"image_id": ["e0", "bad"], "image": [encoded("e0"), encoded("bad")[:90]]})
    write_image_table(data / "world" / "exemplars.parquet", rows)
    with pytest.raises(ImageError, match="image bad: truncated or corrupt"):
        featurize(data)
    assert not (data / "features" / "pixels").exists()


def test_a_query_without_its_image_is_named(data: Path) -> None:
    write_queries(data, ["cat-0", "cat-7", "ant-0"])
    with pytest.raises(
        ValueError, match=r"query cat-7 is not in .*cat\.parquet \(1 such\); run: dvc repro synth"
    ):
        featurize(data)
    write_queries(data, ["elk-0"])
    with pytest.raises(FileNotFoundError, match=r"elk\.parquet: no such image table"):
        featurize(data)


def test_an_id_twice_is_refused(data: Path) -> None:
    write_table(data / "world" / "distractors" / "part-00001.parquet", ["d0"])
    with pytest.raises(ValueError, match="distractors: image_id d0 more than once"):
        featurize(data)


def test_parameters_are_checked() -> None:
    with pytest.raises(ValueError, match="no settings for backbone clip; there are: pixels"):
        Params(("pixels", "clip"), 4, {"pixels": SETTINGS})
    with pytest.raises(ValueError, match="shard_rows 0: wanted 1 or more"):
        Params(("pixels",), 0, {"pixels": SETTINGS})
    with pytest.raises(ValueError, match="workers 0: wanted 1 or more, or null"):
        Params(("pixels",), 4, {"pixels": SETTINGS}, 0)
    with pytest.raises(ValueError, match="no settings for backbone gone"):
        PARAMS.settings_of("gone")


def test_the_command_takes_its_backbone_and_says_its_rate(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params = {"backbones": ["pixels"], "shard_rows": 5, "settings": {"pixels": dataclasses.asdict(SETTINGS)}}
    (data.parent / "params.yaml").write_text(yaml.safe_dump({"featurize": params}))
    monkeypatch.chdir(data.parent)
    main("pixels")
    assert capsys.readouterr().out.startswith("featurize pixels: 27 images")
    assert FeatureSet.open(Path("data/features/pixels/queries")).select(["s2"]).shape == (1, 48)


def test_a_second_run_of_a_backbone_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"backbones": ["pixels"], "shard_rows": 5, "settings": {"pixels": dataclasses.asdict(SETTINGS)}}
    (data.parent / "params.yaml").write_text(yaml.safe_dump({"featurize": params}))
    monkeypatch.chdir(data.parent)
    with alone_in(Path("data/features/.shards/pixels")), pytest.raises(StageError, match="another run is at"):
        main("pixels")
    assert not Path("data/features/pixels").exists()


@pytest.mark.parametrize("size", [1, 4, 9, 20])
def test_groups_keep_every_image_in_order(size: int) -> None:
    groups = list(grouped(EXEMPLARS, size))
    assert [image for group in groups for image in group] == EXEMPLARS
    assert all(len(group) == size for group in groups[:-1])


def test_the_next_group_is_read_while_one_is_in_use() -> None:
    before, asked = threading.active_count(), [threading.Event() for _ in range(3)]

    def read() -> Iterator[list[int]]:
        for number, event in enumerate(asked):
            event.set()
            yield [number]
        raise ValueError("three cannot be read")

    with contextlib.closing(read_ahead(read())) as groups:
        for number in range(3):
            assert next(groups) == [number]
            assert asked[min(number + 1, 2)].wait(10)
            assert not any(event.is_set() for event in asked[number + 2 :])
        with pytest.raises(ValueError, match="three cannot be read"):
            next(groups)
    assert threading.active_count() == before


def test_workers_change_nothing(data: Path) -> None:
    featurize(data)
    wanted = digests(data)
    for workers in (1, 3):
        params = dataclasses.replace(PARAMS, workers=workers)
        featurize(data, params, shards=data / f"shards of {workers}")
        assert digests(data) == wanted


def test_processes_change_nothing_and_load_what_is_not_finished(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    featurize(data)
    wanted = digests(data)
    store = data / "features" / ".shards" / "pixels"
    # Of 8 shards of 4 at most, in the order of their files' making.
    files = sorted(store.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    for row in (1, 2, 5):
        files[row].unlink()
    pools, owners, loaded, load = set(), [], [], PixelLoader.pixels_ahead

    def pixels_ahead(self: PixelLoader, batches: Iterable) -> Iterator:
        for owner, pixels in load(self, batches):
            pools.add(self.pool)
            owners.append(owner)
            loaded.append((len(pixels), owner.image_ids))
            yield owner, pixels

    monkeypatch.setattr(decoding, "FEWEST_FOR_PROCESSES", 27)
    monkeypatch.setattr(PixelLoader, "pixels_ahead", pixels_ahead)
    line = featurize(data, dataclasses.replace(PARAMS, workers=2))
    assert reused(line) == 27 - 4 - 1 - 4
    assert digests(data) == wanted
    assert [type(pool) for pool in pools] == [ProcessPoolExecutor]
    assert not any(owner.rows for owner in owners)  # what is written is no longer in memory
    begun = [(3, EXEMPLARS[4:8]), (1, EXEMPLARS[4:8]), (1, EXEMPLARS[8:])]
    assert loaded == [*begun, (3, DISTRACTORS[:4]), (1, DISTRACTORS[:4])]
    assert not multiprocessing.active_children()


def test_the_next_shard_is_loaded_while_this_one_is_encoded(data: Path) -> None:
    backbone = load_backbone("pixels", SETTINGS, root=data)
    asked = list(read_encoded(data / "world" / "exemplars.parquet"))
    begun = []

    def jobs() -> Iterator[tuple[int, list[EncodedImage]]]:
        for number, group in enumerate(grouped(asked, 2)):
            begun.append(number)
            yield number, group

    with pixel_loader(backbone.preprocessing, backbone.batch_size, 2, len(asked)) as loader:
        for owner, vectors in encode_loaded(backbone, loader, jobs()):
            assert begun == list(range(min(owner + BATCHES_AHEAD + 1, 5)))
            group = asked[2 * owner : 2 * owner + 2]
            np.testing.assert_array_equal(vectors, backbone.encode([decode_image(one.data) for one in group]))
    assert len(begun) == 5


def test_threads_of_one_core_each_encode_in_order_and_leave_torch_as_it_was(data: Path) -> None:
    asked, threads = list(read_encoded(data / "world" / "exemplars.parquet")), torch.get_num_threads()
    before = threading.active_count()
    alone = load_backbone("pixels", SETTINGS, root=data)
    seen = set()

    def forward(pixels: np.ndarray) -> np.ndarray:
        seen.add((threading.current_thread().name, torch.get_num_threads()))
        return alone.forward(pixels)

    several = dataclasses.replace(alone, forward=forward, one_core_each=True)
    wanted = alone.encode([decode_image(one.data) for one in asked])
    for workers, times, batch in ((1, 1, 1), (4, 1, 1), (4, 6, 3)):
        batches = [vectors for _, vectors in encode_side_by_side(several, workers, [(None, asked * times)])]
        assert {len(one) for one in batches} == {batch}
        np.testing.assert_array_equal(np.concatenate(batches), np.tile(wanted, (times, 1)))
    assert {of_torch for _, of_torch in seen} == {1}
    assert threading.main_thread().name not in {name for name, _ in seen}
    bad = EncodedImage("bad", b"no image", "")
    with pytest.raises(ImageError, match="image bad: not an image"):
        list(encode_side_by_side(several, 2, [(None, [*asked, bad])]))
    assert torch.get_num_threads() == threads
    assert threading.active_count() == before


def test_out_of_memory_halves_the_batch_and_changes_nothing(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    featurize(data)
    wanted, forward, sizes = digests(data), backbones._pixels, []

    def small(pixels: np.ndarray) -> np.ndarray:
        sizes.append(len(pixels))
        if len(pixels) > 1:
            raise MemoryError
        return forward(pixels)

    monkeypatch.setattr(backbones, "_pixels", small)
    with pytest.warns(UserWarning, match="out of memory") as said:
        featurize(data, shards=data / "other")
    assert [str(warning.message) for warning in said] == [
        "pixels: out of memory on 3 images; going on with 2 at a time",
        "pixels: out of memory on 2 images; going on with 1 at a time",
    ]
    # One image to learn the dim; then 3 do not fit, nor 2; from there on one at a time.
    assert sizes == [1, 3, 2, *[1] * 27]
    assert digests(data) == wanted


def test_a_disk_without_room_is_told_before_anything_is_computed(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 27 * 48 * 4
    usage = type(shutil.disk_usage(data))(10**12, 10**12 - size + 1, size - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr(Backbone, "encode_pixels", None)
    with pytest.raises(
        DiskFullError, match=r"shards/pixels: 5\.18 kB wanted for what is left of 27 vectors, 5\.18 kB free"
    ):
        featurize(data)
    monkeypatch.undo()
    featurize(data)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert reused(featurize(data)) == 27  # what is finished needs no more room
