"""Ready features as a backbone's distractors, from the folder to attributed pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from attribution.__main__ import main as attribute
from attribution.backbones import BackboneSettings, load_backbone
from attribution.captions import describe
from attribution.features import FeatureSet
from attribution.files import read_json
from attribution.images import decode_image, write_image_table
from attribution.params import load_params
from stages import calibrate, evaluate, featurize, tracking, train_mapper
from tests.feature_world import make_world, picture

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "data/own/laion"
STAGES = (featurize, train_mapper, calibrate, evaluate)
ROW = {"library": "pixels", "model": None, "weights": None, "image_size": 4, "batch_size": 64}
CAPTIONS = 150


def settings(**changes: Any) -> dict[str, Any]:
    ready = {"folder": FOLDER, "model": "pixels"}
    return {**ROW, "dtype": "float16", "normalized": True, "ready_distractors": ready, **changes}


def write_params(row: dict[str, Any]) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["featurize"] = {"backbones": ["pixels"], "shard_rows": 64, "settings": {"pixels": row}}
    params["train_mapper"] |= {"epochs": 2, "batch_size": 16}
    params["evaluate"] |= {"resamples": 20, "top_k": 20, "gallery_sizes": [50], "page_queries": 2}
    Path("params.yaml").write_text(yaml.safe_dump(params))


def run_stages(*stages: Any) -> None:
    for stage in stages or STAGES:
        stage.main("pixels")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Exemplars and queries with pictures; 150 distractors without, as three shards of ready features."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking, "log_result", lambda *arguments, **more: None)
    made = make_world(tmp_path / "made", objects=20, styles=10, per_model=2)
    (tmp_path / "data" / "world" / "distractors").mkdir(parents=True)
    exemplars = pq.read_table(made.root / "exemplars.parquet")
    exemplars = exemplars.append_column("caption", exemplars["concept_id"])
    write_image_table("data/world/exemplars.parquet", exemplars)
    queries = pq.read_table(made.root / "queries.parquet").to_pylist()
    pq.write_table(
        pa.Table.from_pylist([{**row, "source": "shipped"} for row in queries]), "data/queries.parquet"
    )
    Path("data/shipped").mkdir()
    Path("data/synthesized").mkdir()
    shutil.move(made.root / "synthesized" / "all.parquet", "data/shipped/synthesized.parquet")
    write_pictures([], [])
    write_params(settings())
    write_ready()
    return tmp_path


def write_pictures(ids: list[str], encoded: list[bytes]) -> None:
    rows = {"image_id": pa.array(ids, pa.string()), "image": pa.array(encoded, pa.binary())}
    write_image_table(
        "data/world/distractors/part-00000.parquet", pa.table({**rows, "caption": rows["image_id"]})
    )


def distractors() -> list[bytes]:
    rng = np.random.default_rng(9)
    return [picture(rng) for _ in range(CAPTIONS)]


def write_ready() -> None:
    """As clip-retrieval does: of length 1, in float16, numbered with leading zeros. Exemplars among them."""
    backbone = load_backbone(
        "pixels", load_params(BackboneSettings, "featurize.settings.pixels"), root=Path()
    )
    names = [f"{row:09}" for row in range(CAPTIONS)]
    own = pq.read_table("data/world/exemplars.parquet")["image"].to_pylist()
    names = ["own0", *names[:60], "own1", "own2", *names[60:], "own3"]
    encoded = [own[0], *distractors()[:60], own[1], own[2], *distractors()[60:], own[3]]
    vectors = backbone.encode([decode_image(one) for one in encoded]).astype(np.float16)
    for name in ("img_emb", "metadata"):
        (Path(FOLDER) / name).mkdir(parents=True)
    for number, rows in enumerate(np.array_split(np.arange(len(vectors)), 3)):
        np.save(f"{FOLDER}/img_emb/img_emb_{number:02}.npy", vectors[rows])
        columns = {
            "image_path": [names[row] for row in rows],
            "caption": [f"caption of {names[row]}" for row in rows],
            "url": [f"https://example.org/{names[row]}.jpg" for row in rows],
        }
        pq.write_table(pa.table(columns), f"{FOLDER}/metadata/metadata_{number:02}.parquet")


def test_a_name_that_no_file_can_have_is_no_picture(world: Path) -> None:
    for file in sorted(Path(FOLDER).glob("metadata/*.parquet")):
        urls = [
            f"https://example.org/{file.name}/{row}/" + "x" * 300 for row in range(len(pq.read_table(file)))
        ]
        pq.write_table(pa.table({"image_path": [*urls[:-1], file.name + "\0"]}), file)
    run_stages(featurize)


def test_features_of_exemplars_alone_are_refused(world: Path) -> None:
    backbone = load_backbone(
        "pixels", load_params(BackboneSettings, "featurize.settings.pixels"), root=Path()
    )
    own = pq.read_table("data/world/exemplars.parquet")["image"].to_pylist()
    shutil.rmtree(FOLDER)
    Path(FOLDER).mkdir()
    vectors = backbone.encode([decode_image(one) for one in own[:3]]).astype(np.float16)
    np.save(f"{FOLDER}/img_emb_0.npy", vectors)
    pq.write_table(pa.table({"image_path": ["a", "b", "c"]}), f"{FOLDER}/metadata_0.parquet")
    with pytest.raises(ValueError, match=rf"{FOLDER}: all 3 rows are of exemplars, and left out; wanted"):
        run_stages(featurize)


def metrics() -> dict[str, Any]:
    return json.loads(Path("metrics/pixels.json").read_text())


def test_the_whole_road_gives_what_pictures_would_have_given(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in Path(FOLDER).rglob("*.*")}
    run_stages()
    said = capsys.readouterr().out
    counts = f"150 distractors ready made in {FOLDER}, 4 left out as exemplars"
    assert f"{counts}, by pixels as params.yaml says: none of their pictures is here" in said
    found = FeatureSet.open("data/features/pixels/distractors", backbone="pixels", verify=True)
    assert all(isinstance(shard, np.memmap) for shard in found.shards)
    files = [Path(str(shard.filename)).resolve() for shard in found.shards]
    assert files == [world / FOLDER / "img_emb" / f"img_emb_{number:02}.npy" for number in (0, 1, 1, 2)]
    assert not list(Path("data/features/pixels/distractors").glob("*.npy"))
    assert {file: file.stat().st_mtime_ns for file in Path(FOLDER).rglob("*.*")} == before
    with_ready = metrics()

    Path("sample.png").write_bytes(distractors()[77])
    assert attribute(["sample.png", "--backbone", "pixels"]) == 0
    assert "caption of 000000077 https://example.org/000000077.jpg" in capsys.readouterr().out
    assert "caption of 000000077 https" in Path("attribution.html").read_text()

    write_pictures([f"d{row}" for row in range(CAPTIONS)], distractors())
    write_params(settings(ready_distractors=None))
    run_stages()
    assert metrics() == with_ready


def test_pictures_that_are_here_prove_the_model_or_refuse_it(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(f"{FOLDER}/000000000").write_bytes(distractors()[0])
    Path("data/own/000000149").write_bytes(distractors()[149])
    run_stages(featurize)
    assert "2 of them encoded again: cosines of 1.0000 and more" in capsys.readouterr().out
    shutil.rmtree("data/features/pixels")
    Path(f"{FOLDER}/000000000").write_bytes(distractors()[1])
    with pytest.raises(
        ValueError, match=r"data/own/laion: caption of 000000000 .*: cosine \S+ with what pixels makes"
    ):
        run_stages(featurize)
    assert not Path("data/features/pixels/distractors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalized": None}, "lengths are 1, .* but pixels's are as they come; do: normalized: true"),
        ({"dtype": "float32"}, "img_emb_00.npy: float16, but pixels is stored in float32"),
        ({"image_size": 8}, r"wanted \[rows, 192\] of float32 or float16 for pixels, got \[52, 48\]"),
        ({"ready_distractors": {"folder": FOLDER, "model": "ViT-B/32"}}, "made by pixels, got ViT-B/32"),
        ({"ready_distractors": {"folder": "no", "model": "pixels"}}, "no: no img_emb_"),
        ({"ready_distractors": None}, r"data/world/distractors: no distractors; name ready_distractors in"),
    ],
)
def test_another_space_is_refused_by_name(world: Path, changes: dict[str, Any], message: str) -> None:
    write_params(settings(**changes))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_stages(featurize)
    assert not Path("data/features/pixels/distractors").exists()
    assert not list(Path("data").rglob(".partial-*"))


def test_metadata_that_went_are_told(world: Path) -> None:
    run_stages(featurize)
    features = FeatureSet.open("data/features/pixels/distractors")
    for file in Path(FOLDER).glob("metadata/*.parquet"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata_00\.parquet: no such file, which ready"):
        describe(features, [str(features.image_ids[0])])


def test_a_folder_that_changed_or_went_is_told(world: Path) -> None:
    run_stages(featurize)
    before = read_json("data/features/pixels/distractors/space.json")
    file = Path(FOLDER) / "img_emb" / "img_emb_01.npy"
    np.save(file, np.load(file)[::-1].copy())
    run_stages(featurize)
    after = read_json("data/features/pixels/distractors/space.json")
    assert [a == b for a, b in zip(before["shards"], after["shards"], strict=True)] == [True, False, True]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard img_emb_01\.npy is missing"):
        run_stages(evaluate)
