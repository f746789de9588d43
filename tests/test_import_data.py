"""Data of one's own: tables as render writes them, bad pictures skipped with a reason, runs that resume."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from attribution import intake
from attribution.backbone_settings import BackboneSettings
from attribution.concepts import read_concepts
from attribution.files import DiskFullError
from attribution.images import decode_image, read_image_table, table_parts
from attribution.params import load_params
from attribution.same_model import check_model
from attribution.splits import Shares
from stages import import_data
from stages.import_data import Params, run
from stages.incremental import StageError, alone_in
from tests.test_images import BAD, encode

ROOT = Path(__file__).resolve().parents[1]
PARAMS = Params(
    exemplars="own/exemplars",
    distractors="own/distractors",
    seed=1,
    splits=Shares(0.5, 0.25, 0.25),
    longest_side=None,
    animated="first_frame",
    max_skipped_share=0.0,
    rows_per_part=4,
    workers=2,
)


def picture(number: int, size: tuple[int, int] = (12, 8)) -> bytes:
    """A PNG that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encode(pixels)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def make_exemplars(root: Path) -> None:
    """Eight objects of two nouns, and four styles of two pictures."""
    tree = root / "own" / "exemplars"
    for number in range(8):
        write(tree / "object" / ("dog", "teddy_bear")[number % 2] / f"pic {number}.png", picture(number))
    for number in range(8):
        write(tree / "style" / f"Artist {number // 2}" / f"{number}.png", picture(100 + number))


def make_distractors(root: Path, count: int = 10) -> None:
    for number in range(count):
        write(root / "own" / "distractors" / f"{number:03d}.png", picture(1000 + number))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    make_exemplars(tmp_path)
    make_distractors(tmp_path)
    return tmp_path


def bring_in(root: Path, **changes: object) -> str:
    world = root / "world"
    return run(
        dataclasses.replace(PARAMS, **changes),
        root=root,
        exemplars=world / "exemplars.parquet",
        distractors=world / "distractors",
        skipped=world / "skipped.parquet",
        work=world / ".imported",
    )


def distractors(root: Path) -> list[dict]:
    return read_image_table(root / "world" / "distractors").to_pylist()


def exemplars(root: Path) -> list[dict]:
    return read_image_table(root / "world" / "exemplars.parquet").to_pylist()


def skipped(root: Path) -> dict[str, tuple[str, str]]:
    rows = pq.read_table(root / "world" / "skipped.parquet").to_pylist()
    return {row["source"]: (row["reason"], row["detail"]) for row in rows}


def everything(root: Path) -> dict[str, bytes]:
    """The bytes of all that a run leaves, but its working files."""
    files = [path for path in (root / "world").rglob("*") if path.is_file() and ".imported" not in path.parts]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_a_folder_tree_gives_the_tables_of_render(own: Path) -> None:
    line = bring_in(own)
    concepts = read_concepts(own / "world" / "exemplars.parquet", fresh=True)
    assert {concept.concept_id for concept in concepts} == {
        *(f"object-{('dog', 'teddy-bear')[i % 2]}-pic-{i}" for i in range(8)),
        *(f"style-Artist-{i}" for i in range(4)),
    }
    assert {(concept.kind, concept.noun) for concept in concepts} == {
        ("object", "dog"),
        ("object", "teddy bear"),
        ("style", "art"),
    }
    assert {len(concept.exemplars) for concept in concepts if concept.kind == "style"} == {2}
    rows = exemplars(own)
    assert rows[0]["image"] == (own / "own" / "exemplars" / rows[0]["source"]).read_bytes()
    assert len({row["image_id"] for row in rows}) == 16
    assert len(distractors(own)) == 10
    assert {row["source"] for row in distractors(own)} == {f"{i:03d}.png" for i in range(10)}
    assert skipped(own) == {}
    assert "16 exemplars of 12 concepts (6 train, 3 val, 3 test), 10 distractors; skipped 0 (none)" in line


def test_columns_are_those_that_render_writes(own: Path) -> None:
    bring_in(own)
    schema = pq.read_schema(own / "world" / "exemplars.parquet")
    rendered = {
        "image_id",
        "concept_id",
        "kind",
        "noun",
        "group",
        "split",
        "seen",
        "fresh",
        "caption",
        "image",
    }
    assert {*schema.names} == rendered | {"source"}
    assert {"image_id", "caption", "image"} <= {
        *pq.read_schema(table_parts(own / "world/distractors")[0]).names
    }


ROWS = [
    {"concept": f"pet {i}", "kind": "object", "noun": "cat", "path": f"pics/{i}.png", "medium": "photo"}
    for i in range(6)
]


def write_table(root: Path, suffix: str, rows: list[dict]) -> str:
    path = root / "own" / f"list{suffix}"
    path.parent.mkdir(exist_ok=True)
    for row in rows:
        write(path.parent / row["path"], picture(int(Path(row["path"]).stem)))
    if suffix == ".csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines = [",".join(names), *(",".join(row.get(name, "") for name in names) for row in rows)]
        path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n")  # as spreadsheets write it
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return f"own/list{suffix}"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_gives_the_same_whatever_its_format(tmp_path: Path, suffix: str) -> None:
    make_distractors(tmp_path)
    splits = ["train", "train", "val", "test", "test", "test"]
    rows = [{**row, "split": split} for row, split in zip(ROWS, splits, strict=True)]
    bring_in(tmp_path, exemplars=write_table(tmp_path, suffix, rows))
    found = exemplars(tmp_path)
    assert [row["split"] for row in found] == splits
    assert [row["concept_id"] for row in found] == [f"pet-{i}" for i in range(6)]
    assert {row["medium"] for row in found} == {"photo"}
    assert all(row["seen"] for row in found)
    assert [row["caption"] for row in found] == [f"pics/{i}.png" for i in range(6)]
    (concept, *_) = read_concepts(tmp_path / "world" / "exemplars.parquet")
    assert concept.exemplars[0].texts["medium"] == "photo"


def test_a_noun_without_train_concepts_is_unseen(tmp_path: Path) -> None:
    make_distractors(tmp_path)
    rows = [{**row, "split": split} for row, split in zip(ROWS, ["train", "val", "test"] * 2, strict=True)]
    rows[5]["noun"] = "owl"
    bring_in(tmp_path, exemplars=write_table(tmp_path, ".csv", rows))
    assert [row["seen"] for row in exemplars(tmp_path)] == [True] * 5 + [False]


BAD_TABLES: dict[str, tuple[list[dict], str]] = {
    "no column": (
        [{"concept": "a", "kind": "object", "path": "0.png"}],
        r"no column noun; it has: concept, kind",
    ),
    "kind": ([{**ROWS[0], "kind": "thing"}], r"row 1: kind: wanted object or style, got 'thing'"),
    "empty cell": ([ROWS[0], {**ROWS[1], "noun": ""}], r"row 2: no noun; wanted concept, kind, noun, path"),
    "split": (
        [{**ROWS[0], "split": "valid"}],
        r"row 1: split: wanted train, val, test or nothing, got 'valid'",
    ),
    "two nouns": (
        [ROWS[0], {**ROWS[1], "concept": "pet 0", "noun": "dog"}],
        r"concept pet-0: one noun wanted, got 'cat' \(pics/0.png\) and 'dog' \(pics/1.png\)",
    ),
    "taken column": ([{**ROWS[0], "seen": "yes"}], r"column seen is filled here; rename yours"),
    "no name": ([{**ROWS[0], "concept": "///"}], r"'///' gives no usable concept name"),
    "two concepts of one name": (
        [ROWS[0], {**ROWS[1], "concept": "pet_0"}],
        r"row 2: 'pet 0' and 'pet_0' would both be concept pet-0; rename one",
    ),
    "comma in a text": (
        [ROWS[0], {**ROWS[1], "medium": "a photo, in colour"}],
        r"row 2: 1 cells too many; put texts with commas in quotes",
    ),
    "too few": (ROWS[:2], r"no concept of split test among 2; give more concepts, a column split"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_table_that_is_wrong_says_where(tmp_path: Path, name: str) -> None:
    rows, message = BAD_TABLES[name]
    make_distractors(tmp_path)
    with pytest.raises(ValueError, match=message):
        bring_in(tmp_path, exemplars=write_table(tmp_path, ".csv", rows))
    assert not (tmp_path / "world" / "exemplars.parquet").exists()


def test_lines_that_are_no_json_are_named(tmp_path: Path) -> None:
    write(tmp_path / "own" / "list.jsonl", b'{"concept": "a"\n')
    with pytest.raises(ValueError, match=r"list\.jsonl: line 1: not JSON"):
        bring_in(tmp_path, exemplars="own/list.jsonl")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "list.csv",
            "concept,kind\ncafé".encode("latin-1"),
            r"not UTF-8 \(a byte 0xe9 out of place\); save it as",
        ),
        ("list.jsonl", '{"concept": "café"}'.encode("latin-1"), r"not UTF-8 \(a byte 0xe9"),
        ("list.csv", b"concept,kind,noun,path\n" + b"x" * 200_000, "not CSV: field larger than"),
        ("list.parquet", b"PAR1", "no parquet file to read"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    write(tmp_path / "own" / name, data)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        bring_in(tmp_path, exemplars=f"own/{name}")


def test_a_link_to_a_folder_of_exemplars_is_not_passed_over(own: Path) -> None:
    (own / "own" / "exemplars" / "style" / "Artist 4").symlink_to(own / "own" / "distractors")
    with pytest.raises(ValueError, match="Artist 4: a link to a folder, which is not followed"):
        bring_in(own)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("loose.png", "out of place in .*; wanted object/<noun>/<picture>"),
        ("animal/dog/x.png", "out of place"),
        ("object/dog/pic 0.jpg", r"would both be concept object-dog-pic-0; rename one"),
        ("object/dog/pic_0.png", r"would both be concept object-dog-pic-0; rename one"),
    ],
)
def test_a_picture_out_of_place_is_named(own: Path, place: str, message: str) -> None:
    write(own / "own" / "exemplars" / place, picture(77))
    with pytest.raises(ValueError, match=message):
        bring_in(own)


def test_paths_to_nothing_say_what_to_do(own: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder or table; wanted object/"):
        bring_in(own, exemplars="nowhere")
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file or folder; put your pictures there"):
        bring_in(own, distractors="nowhere")
    write(own / "own" / "texts" / "a.txt", b"no picture")
    with pytest.raises(ValueError, match=r"texts: no pictures; wanted image files, .tar, or .parquet"):
        bring_in(own, distractors="own/texts")


# What camera, web and scanner make of a picture, and how it is to look: fine once decoded with care.
ODD: dict[str, tuple[Callable[[], bytes], Callable[[Image.Image], bool]]] = {
    "16-bit.png": (
        lambda: encode(np.full((4, 4), 0x8000, np.uint16)),
        lambda image: image.getpixel((0, 0)) == (128, 128, 128),
    ),
    "cmyk.jpg": (
        lambda: encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"),
        lambda image: np.abs(np.asarray(image)[4, 4].astype(int) - (255, 0, 0)).max() < 60,
    ),
    "palette.gif": (
        lambda: encode(Image.new("RGB", (8, 8), (10, 200, 30)).quantize(4), "GIF"),
        lambda image: image.getpixel((0, 0)) == (10, 200, 30),
    ),
    "rotated.jpg": (
        lambda: encode(Image.new("RGB", (8, 24)), "JPEG", exif=turned()),
        lambda image: image.size == (24, 8),
    ),
    "animated.gif": (
        lambda: animation(),
        lambda image: image.getpixel((0, 0)) == (255, 0, 0),
    ),
}


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def animation() -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_are_taken_and_look_right(own: Path, name: str) -> None:
    make, looks_right = ODD[name]
    write(own / "own" / "distractors" / name, make())
    bring_in(own)
    (row,) = [row for row in distractors(own) if row["source"] == name]
    assert looks_right(decode_image(row["image"]))
    assert skipped(own) == {}


def test_animations_are_skipped_where_that_is_asked_for(own: Path) -> None:
    write(own / "own" / "distractors" / "moves.gif", animation())
    bring_in(own, animated="skip")
    assert skipped(own) == {"moves.gif": ("animated", "2 frames")}
    assert len(distractors(own)) == 10


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_what_breaks_off_behind_the_first_frame_is_one_frame(kind: str) -> None:
    frames = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)) for i in range(3)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    data = file.getvalue()
    rules = intake.Rules(longest_side=None, animated="skip")
    found = [intake.take(intake.Picture("x", data[:size]), rules) for size in range(len(data))]
    assert {type(one) for one in found} == {intake.Taken, intake.Skipped}
    assert intake.take(intake.Picture("x", data), rules) == intake.Skipped("x", "animated", "3 frames")


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("table", ["exemplars", "distractors"])
def test_bad_pictures_are_skipped_with_their_reason(own: Path, table: str, name: str) -> None:
    make, message = BAD[name]
    place = {"exemplars": "style/Artist 0/bad.png", "distractors": "deep/bad.png"}[table]
    write(own / "own" / table / place, make())
    line = bring_in(own, max_skipped_share=0.1)
    assert (len(exemplars(own)), len(distractors(own))) == (16, 10)
    ((source, (reason, detail)),) = skipped(own).items()
    assert (source, reason) == (place, "unreadable")
    assert re.search(message, detail)
    assert "skipped 1 (1 unreadable), listed in" in line


@pytest.mark.parametrize(
    ("make", "detail"),
    [
        (lambda path: path.symlink_to("gone.png"), "no such file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (
            lambda path: path.write_bytes(encode(Image.new("RGB", (500, 2)))),
            "500 x 2 pixels: sides too unequal",
        ),
    ],
)
def test_files_that_are_no_pictures_are_skipped(
    own: Path, make: Callable[[Path], object], detail: str
) -> None:
    make(own / "own" / "distractors" / "odd.png")
    bring_in(own, max_skipped_share=0.1)
    assert skipped(own)["odd.png"][1].startswith(detail)


def test_huge_files_are_skipped_before_they_are_read(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attribution.sources.MAX_BYTES", 2000)
    write(own / "own" / "distractors" / "huge.png", picture(1, (40, 40)))
    bring_in(own, max_skipped_share=0.1)
    assert re.fullmatch(r"[\d,]+ bytes, more than the limit of 2,000", skipped(own)["huge.png"][1])


def test_a_pipe_is_not_waited_for(own: Path) -> None:
    for name in ("a.tar", "a.parquet", "a.png"):
        os.mkfifo(own / "own" / "distractors" / name)
    bring_in(own, max_skipped_share=0.5)
    assert set(skipped(own).values()) == {("unreadable", "not a regular file")}


def test_names_that_are_no_text_are_kept_readable(own: Path) -> None:
    (own / "own" / "distractors" / "\udcff.png").write_bytes(picture(5000))
    write(own / "own" / "exemplars" / "object" / "v\udcf6gel" / "a.png", picture(5001))
    bring_in(own)
    assert "\\xff.png" in {row["source"] for row in distractors(own)}
    assert "v\\xf6gel" in {row["noun"] for row in exemplars(own)}


@pytest.mark.parametrize("table", ["exemplars", "distractors"])
def test_too_many_bad_pictures_stop_the_stage_and_are_listed(own: Path, table: str) -> None:
    place = {"exemplars": "style/Artist 0/bad.png", "distractors": "bad.png"}[table]
    write(own / "own" / table / place, b"")
    with pytest.raises(
        ValueError, match=r"1 of 1\d cannot be used, more than the share 0.05 .*\(.*bad.png: empty"
    ):
        bring_in(own, max_skipped_share=0.05)
    assert {*everything(own)} == {"world/skipped.parquet"}
    assert skipped(own)[place][0] == "unreadable"


def test_a_picture_counts_once_and_an_exemplar_is_no_distractor(own: Path) -> None:
    folder = own / "own" / "distractors"
    write(folder / "z_again.png", picture(1003))
    write(folder / "z_exemplar.png", picture(2))
    write(own / "own" / "exemplars" / "style" / "Artist 3" / "again.png", picture(100))
    bring_in(own)
    found = skipped(own)
    assert found["z_again.png"][0] == "duplicate"
    assert found["z_exemplar.png"][0] == "exemplar"
    assert found["style/Artist 3/again.png"] == (
        "duplicate",
        "the same picture as style/Artist 0/0.png of concept style-Artist-0",
    )
    assert len(distractors(own)) == 10
    assert len(exemplars(own)) == 16


def test_longer_sides_are_shrunk_and_ids_stay(own: Path) -> None:
    bring_in(own)
    before = {row["source"]: row["image_id"] for row in distractors(own)}
    bring_in(own, longest_side=6)
    assert {row["source"]: row["image_id"] for row in distractors(own)} == before
    assert {decode_image(row["image"]).size for row in distractors(own) + exemplars(own)} == {(6, 4)}


def test_captions_come_from_the_text_beside_a_picture(own: Path) -> None:
    (own / "own" / "distractors" / "003.txt").write_text("a  red\ncar\n")
    bring_in(own)
    captions = {row["source"]: row["caption"] for row in distractors(own)}
    assert captions["003.png"] == "a red car"
    assert captions["004.png"] == "004.png"
    # A text that changes, or comes later, counts as the picture does.
    (own / "own" / "distractors" / "003.txt").write_text("a blue car")
    (own / "own" / "distractors" / "004.txt").write_text("a bus")
    bring_in(own)
    captions = {row["source"]: row["caption"] for row in distractors(own)}
    assert (captions["003.png"], captions["004.png"]) == ("a blue car", "a bus")


def test_a_picture_that_may_be_read_again_is_read_again(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read_bytes = own / "own" / "distractors" / "003.png", Path.read_bytes

    def refuse(file: Path) -> bytes:
        if file == path:
            raise PermissionError(13, "Permission denied", str(file))
        return read_bytes(file)

    path.chmod(0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)  # root may read whatever the mode is
        bring_in(own, max_skipped_share=0.1)
    assert skipped(own) == {"003.png": ("unreadable", "cannot be read: Permission denied")}
    path.chmod(0o644)
    bring_in(own)
    assert skipped(own) == {}


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_webdataset_tars(own: Path) -> None:
    """Shards as img2dataset leaves them, with its records beside them."""
    folder = own / "own" / "tars"
    members = {
        "000000000.jpg": encode(np.zeros((4, 4, 3), np.uint8), "JPEG"),
        "000000000.json": b'{"caption": "from the record", "status": "success"}',
        "000000000.txt": b"from the text",
        "000000001.png": picture(2001),
        "000000001.json": b'{"caption": "only a record"}',
        "000000002.png": picture(2002),
        "000000002.mask.png": picture(2003),
        "000000003.txt": b"a caption without its picture",
        "000000004.webp": b"broken",
        "._000000005.jpg": b"a hidden file",
    }
    write_tar(folder / "00000.tar", members)
    write_tar(folder / "00001.tar", {"a/1.png": picture(2004), "b/1.png": picture(2005)})
    pq.write_table(pa.table({"key": ["000000000"], "status": ["success"]}), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")
    bring_in(own, distractors="own/tars", max_skipped_share=0.2)
    captions = {row["source"]: row["caption"] for row in distractors(own)}
    assert captions == {
        "00000.tar#000000000": "from the text",
        "00000.tar#000000001": "only a record",
        "00000.tar#000000002": "00000.tar#000000002",
        "00001.tar#a/1": "00001.tar#a/1",
        "00001.tar#b/1": "00001.tar#b/1",
    }
    (masked,) = [row for row in distractors(own) if row["source"].endswith("2")]
    assert masked["image"] == picture(2002)
    assert skipped(own) == {
        "00000.tar#000000003": ("no picture", "only txt"),
        "00000.tar#000000004": ("unreadable", skipped(own)["00000.tar#000000004"][1]),
    }


def test_dotted_names_in_a_tar_are_pictures_of_their_own(own: Path) -> None:
    """A sample's name ends at the first dot, so that all of a year's dates are one sample."""
    members = {
        "2023.01.05.png": picture(2101),
        "2023.01.05.txt": b"a beach",
        "2023.02.07.png": picture(2102),
        "2023.02.07.depth.map.png": picture(2103),
        "2023.03.09.png": b"",
    }
    write_tar(own / "own" / "tars" / "0.tar", members)
    bring_in(own, distractors="own/tars", max_skipped_share=0.5)
    captions = {row["source"]: row["caption"] for row in distractors(own)}
    assert captions == {
        "0.tar#2023.01.05.png": "a beach",
        "0.tar#2023.02.07.png": "0.tar#2023.02.07.png",
    }
    assert skipped(own)["0.tar#2023.03.09.png"][1] == "empty (0 bytes)"


def test_a_tar_that_ends_in_its_first_bytes_is_named(own: Path) -> None:
    write(own / "own" / "distractors" / "x.tar.gz", b"\x1f\x8b\x08")
    bring_in(own, max_skipped_share=0.1)
    assert skipped(own)["x.tar.gz"][1].startswith("the tar breaks off after 0 samples: ")


def test_a_tar_that_breaks_off_is_named_and_what_came_before_is_taken(own: Path) -> None:
    path = own / "own" / "tars" / "0.tar"
    write_tar(path, {f"{i}.png": picture(3000 + i, (40, 40)) for i in range(5)})
    path.write_bytes(path.read_bytes()[:12_000])
    bring_in(own, distractors="own/tars", max_skipped_share=0.5)
    assert 1 <= len(distractors(own)) < 5
    assert skipped(own)["0.tar"][1].startswith(f"the tar breaks off after {len(distractors(own))} samples: ")


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet_as_img2dataset_writes_it(own: Path, as_struct: bool) -> None:
    pictures: list[bytes | None] = [picture(4000 + i) for i in range(70)]
    pictures[3] = None
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if as_struct else pa.binary()
    cells = [data and {"bytes": data, "path": "x"} for data in pictures] if as_struct else pictures
    rows = {
        "image" if as_struct else "jpg": pa.array(cells, kind),
        "key": [f"{i:09d}" for i in range(70)],
        "caption": pa.array([f"picture {i}" if i else None for i in range(70)]),
        "status": ["failed_to_download" if data is None else "success" for data in pictures],
        "error_message": [None if data else "HTTP Error 404: Not Found" for data in pictures],
    }
    folder = own / "own" / "parquet"
    folder.mkdir()
    pq.write_table(pa.table(rows), folder / "00000.parquet")
    bring_in(own, distractors="own/parquet", rows_per_part=30)
    found = distractors(own)
    assert [row["image"] for row in found] == [data for data in pictures if data]
    assert found[1]["caption"] == "picture 1"
    assert found[0]["caption"] == "00000.parquet#000000000"
    assert skipped(own) == {
        "00000.parquet#000000003": ("no picture", "failed_to_download: HTTP Error 404: Not Found")
    }
    assert [pq.read_metadata(part).num_rows for part in table_parts(own / "world/distractors")] == [30, 30, 9]
    # What this stage writes it also reads.
    before = found
    bring_in(own, distractors="world/distractors")
    assert [row["image_id"] for row in distractors(own)] == [row["image_id"] for row in before]


def test_a_file_that_is_no_parquet_is_named(own: Path) -> None:
    write(own / "own" / "distractors" / "x.parquet", b"nothing of the kind")
    bring_in(own, max_skipped_share=0.2)
    assert skipped(own)["x.parquet"][1].startswith("the parquet file breaks off after 0 rows: ")


def test_captions_that_are_no_text_break_no_run(own: Path) -> None:
    """A parquet file may hold bytes as text that are none, JSON half of a character."""
    captions = pa.array([b"a", b"caf\xe9"], pa.binary()).view(pa.string())
    rows = {"jpg": pa.array([picture(1), picture(2)], pa.binary()), "caption": captions}
    pq.write_table(pa.table(rows), own / "own" / "distractors" / "x.parquet")
    listed = [{**row, "caption": "cut \ud83d", "noun": "dog \ud83d"} for row in ROWS]
    bring_in(own, exemplars=write_table(own, ".jsonl", listed), max_skipped_share=0.1)
    assert skipped(own)["x.parquet"][1].startswith("the parquet file breaks off after 0 rows: 'utf-8' codec")
    assert {(row["caption"], row["noun"]) for row in exemplars(own)} == {("cut ?", "dog ?")}


def test_the_same_bytes_again_whatever_the_workers(
    own: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bring_in(own)
    before = everything(own)
    other = tmp_path_factory.mktemp("other")
    make_exemplars(other)
    make_distractors(other)
    bring_in(other, workers=5)
    assert everything(other) == before


def test_a_killed_run_goes_on_where_it_was(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_tar(
            own / f"own/tars/{number}.tar", {f"{i}.png": picture(6000 + 10 * number + i) for i in range(5)}
        )
    read: list[str] = []

    def count(picture: intake.Picture, rules: intake.Rules) -> intake.Taken | intake.Skipped:
        if picture.source.startswith("2.tar") and not finished:
            raise KeyboardInterrupt
        if "tar" in picture.source:
            read.append(picture.source)
        return take(picture, rules)

    take, finished = intake.take, False
    monkeypatch.setattr(intake, "take", count)
    with pytest.raises(KeyboardInterrupt):
        bring_in(own, distractors="own/tars")
    assert not (own / "world" / "distractors").exists()
    assert len(read) == 10
    finished = True
    bring_in(own, distractors="own/tars")
    assert sorted(read[10:]) == [f"2.tar#{i}" for i in range(5)]
    resumed = everything(own)
    assert len(distractors(own)) == 15
    # One more tar costs one tar; what nothing needs any longer goes.
    write_tar(own / "own/tars/3.tar", {"0.png": picture(6100)})
    bring_in(own, distractors="own/tars")
    assert read[15:] == ["3.tar#0"]
    (own / "own/tars/3.tar").unlink()
    bring_in(own, distractors="own/tars")
    assert len(list((own / "world" / ".imported").iterdir())) == 3
    assert everything(own) == resumed


def test_two_runs_at_once_are_refused(own: Path) -> None:
    with alone_in(own / "world" / ".imported"), pytest.raises(StageError, match="another run is at work"):
        bring_in(own)
    assert not (own / "world" / "exemplars.parquet").exists()


def test_without_distractors_the_table_is_empty(own: Path) -> None:
    """Every backbone then brings its own, ready made."""
    assert ", 0 distractors; skipped 0 (none)" in bring_in(own, distractors=None)
    table = read_image_table(own / "world" / "distractors")
    assert len(table) == 0
    bring_in(own)
    assert table.schema == read_image_table(own / "world" / "distractors").schema


def test_room_is_asked_for_where_it_is_known(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(file.stat().st_size for file in (own / "own" / "distractors").iterdir())
    usage = type(shutil.disk_usage(own))(size, 1, size - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(
        DiskFullError, match=r"\.imported: \S+ kB wanted for the pictures of .*own/distractors"
    ):
        bring_in(own)
    # What shrinks takes nobody knows how much less: each file is asked for in its turn.
    bring_in(own, longest_side=100)
    usage = type(usage)(size, size, 0)
    (own / "own" / "distractors" / "one more.png").write_bytes(picture(7))
    with pytest.raises(DiskFullError, match=r"364 bytes wanted for the pictures of 000\.png, 0 bytes"):
        bring_in(own, longest_side=100, rows_per_part=1)


def test_few_pictures_wait_in_memory() -> None:
    given = 0

    def pictures() -> Iterator[intake.Picture]:
        nonlocal given
        for given in range(1, 101):
            yield intake.Picture(f"{given}.png", picture(given))

    rules = intake.Rules(longest_side=None, animated="first_frame")
    for number, one in enumerate(intake.take_all(pictures(), rules, workers=2), start=1):
        assert one.source == f"{number}.png"
        assert given - number <= 2 * intake.IN_FLIGHT


def test_one_more_file_changes_one_unit(own: Path) -> None:
    """Of 300 files in units of about 16."""
    make_distractors(own, 300)
    bring_in(own, rows_per_part=16)
    work = own / "world" / ".imported"
    before = {path.name for path in work.iterdir()}
    write(own / "own" / "distractors" / "1005.png", picture(9000))
    bring_in(own, rows_per_part=16)
    assert 10 < len(before) < 40
    assert len({path.name for path in work.iterdir()} - before) == 1
    assert len(distractors(own)) == 301


def test_large_pictures_make_small_parts(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_data, "PART_BYTES", 1)
    bring_in(own)
    assert len(table_parts(own / "world" / "distractors")) == 10


def test_one_more_concept_moves_two_others_at_most(own: Path) -> None:
    def splits() -> dict[str, str]:
        return {row["concept_id"]: row["split"] for row in exemplars(own)}

    bring_in(own)
    for number in range(8, 14):
        before = splits()
        write(own / f"own/exemplars/object/dog/more {number}.png", picture(number))
        bring_in(own)
        moved = [concept for concept in before if splits()[concept] != before[concept]]
        assert len(moved) <= 2
    assert {
        split: sum(one == split for name, one in splits().items() if name.startswith("object"))
        for split in ("train", "val", "test")
    } == {"train": 7, "val": 3, "test": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows_per_part": 0}, "rows_per_part 0, workers 2: wanted 1 or more"),
        ({"distractors": ""}, "exemplars, distractors: wanted paths"),
        ({"max_skipped_share": 1.5}, "max_skipped_share: wanted a share of 1"),
        ({"longest_side": 0}, "longest_side: wanted 1 to 16383, or null, got 0"),
        ({"longest_side": 17000}, "longest_side: wanted 1 to 16383, or null, got 17000"),
    ],
)
def test_params_out_of_range_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PARAMS, **changes)
    with pytest.raises(ValueError, match=r"wanted three shares of 0 or more that add up to 1"):
        Shares(0.5, 0.5, 0.5)


def test_params_yaml_is_complete() -> None:
    assert load_params(Params, "import_data", ROOT / "params.yaml").splits.train == 0.5


def test_the_guide_names_what_exists(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "own_data.md").read_text()
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module), module
    block, ready = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    known = yaml.safe_load((ROOT / "params.yaml").read_text())

    def check(said: dict, known: dict, where: str) -> None:
        for name, value in said.items():
            assert name in known, f"params.yaml: no {where}{name}"
            if isinstance(value, dict):
                check(value, known[name], f"{where}{name}.")

    check(yaml.safe_load(block), known, "")
    file = tmp_path / "params.yaml"
    file.write_text(ready)
    row = load_params(BackboneSettings, "featurize.settings.clip", file)
    assert row.ready_distractors is not None
    check_model("clip", row, row.ready_distractors.model)
    assert {*re.findall(r"^\| `([\w ]+)` \|", text, re.MULTILINE)} == {*get_args(intake.Reason)}


def test_an_object_that_is_called_as_styles_are_makes_no_style_seen(tmp_path: Path) -> None:
    """A style's group is art where none is named; an object may be art, too."""
    make_distractors(tmp_path)
    lines = ["concept,kind,noun,path,split"]
    for number, (kind, split) in enumerate(
        [("object", "train"), ("object", "val"), ("object", "test"), ("style", "test")]
    ):
        write(tmp_path / "own" / f"{number}.png", picture(number))
        lines.append(f"c{number},{kind},art,{number}.png,{split}")
    write(tmp_path / "own" / "table.csv", "\n".join(lines).encode())
    bring_in(tmp_path, exemplars="own/table.csv")
    assert [row["seen"] for row in exemplars(tmp_path)] == [True, True, True, False]
