"""attribution.images: any picture becomes one RGB image or one line that says why not."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from attribution import images
from attribution.images import (
    ImageError,
    decode_image,
    find_rows,
    iterate_encoded,
    iterate_images,
    read_image_table,
    table_parts,
    write_image_table,
)

RNG = np.random.default_rng(5)
# Upright, no symmetry, every corner another colour.
PICTURE = np.repeat(np.repeat(RNG.integers(0, 256, (3, 5, 3), dtype=np.uint8), 8, 0), 8, 1)


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def png_of_size(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG by its header alone: Pillow cannot be asked to draw one of 60,000 x 60,000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def pixels(data: bytes | Path) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    "kind", ["PNG", "BMP", "TIFF", "PPM", "TGA", "GIF", "WEBP", "JPEG", "AVIF", "JPEG2000"]
)
def test_formats_in_use_are_read(kind: str) -> None:
    data = encode(PICTURE, kind, **({"lossless": True} if kind == "WEBP" else {}))
    error = np.abs(pixels(data).astype(int) - PICTURE).mean()
    assert error <= {"JPEG": 15, "AVIF": 15}.get(kind, 0)


def test_a_path_and_its_bytes_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "no_suffix").write_bytes(encode(PICTURE))
    np.testing.assert_array_equal(pixels(tmp_path / "no_suffix"), pixels(encode(PICTURE)))


def test_16_bit_grey_keeps_its_upper_bits() -> None:
    grey = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(pixels(encode(grey, kind))[0, :, 0], [0, 0, 1, 128, 255])


def test_16_bit_grey_pgm_keeps_its_upper_bits() -> None:
    data = b"P5 2 1 65535\n" + struct.pack(">HH", 0x8001, 0x00FF)
    np.testing.assert_array_equal(pixels(data)[0, :, 1], [0x80, 0])


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_read_in_its_colours(kind: str) -> None:
    solid = Image.new("RGB", (8, 8), (200, 30, 60)).convert("CMYK")
    assert solid.mode == "CMYK"
    np.testing.assert_allclose(pixels(encode(solid, kind)), np.full((8, 8, 3), (200, 30, 60)), atol=3)


@pytest.mark.parametrize(("mode", "value", "wanted"), [("L", 77, 77), ("1", 1, 255), ("1", 0, 0)])
def test_grey_and_black_and_white_become_rgb(mode: str, value: int, wanted: int) -> None:
    np.testing.assert_array_equal(pixels(encode(Image.new(mode, (4, 4), value)))[0, 0], [wanted] * 3)


def test_a_palette_is_looked_up() -> None:
    image = Image.fromarray(PICTURE).quantize(15)
    assert image.mode == "P"
    np.testing.assert_allclose(pixels(encode(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P with alpha", "RGB with a key colour"])
def test_what_is_transparent_is_white(mode: str) -> None:
    """Under transparent pixels files hold anything, often black or an erased part of the picture."""
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (2, 1), (9, 9, 9, 0) if mode == "RGBA" else (9, 0))
        image.putpixel((1, 0), (9, 9, 9, 255) if mode == "RGBA" else (9, 255))
        data = encode(image)
    elif mode == "RGB with a key colour":
        image = Image.new("RGB", (2, 1), (1, 2, 3))
        image.putpixel((1, 0), (9, 9, 9))
        data = encode(image, transparency=(1, 2, 3))
    else:
        image = Image.new("P", (2, 1), 0)
        image.putpalette([200, 0, 0, 9, 9, 9])
        image.putpixel((1, 0), 1)
        data = encode(image, transparency=0 if mode == "P" else bytes([0, 255]))
    np.testing.assert_array_equal(pixels(data), [[[255] * 3, [9] * 3]])


def test_half_transparent_is_mixed_with_white() -> None:
    np.testing.assert_allclose(
        pixels(encode(Image.new("RGBA", (1, 1), (0, 100, 200, 128))))[0, 0], [127, 177, 227], atol=1
    )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    np.testing.assert_array_equal(pixels(data), np.full((4, 6, 3), (255, 0, 0)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(kind: str, orientation: int) -> None:
    # What a camera stores so that turning it as the tag says gives PICTURE.
    stored = {
        1: PICTURE,
        2: PICTURE[:, ::-1],
        3: PICTURE[::-1, ::-1],
        4: PICTURE[::-1],
        5: PICTURE.transpose(1, 0, 2),
        6: np.rot90(PICTURE, 1),
        7: PICTURE[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PICTURE, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    all_options: dict[str, dict[str, object]] = {
        "JPEG": {"quality": 100, "subsampling": 0},
        "WEBP": {"lossless": True},
    }
    options = all_options.get(kind, {})
    data = encode(np.ascontiguousarray(stored), kind, exif=exif, **options)
    np.testing.assert_allclose(pixels(data), PICTURE, atol=40 if kind == "JPEG" else 0)


DAMAGED_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\xff"


@pytest.mark.filterwarnings(
    "ignore:.*EXIF:UserWarning"
)  # attribution.images does so itself, outside of pytest
@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", DAMAGED_EXIF, b"Exif\0\0"])
def test_damaged_exif_does_not_matter(exif: bytes) -> None:
    assert pixels(encode(PICTURE, "JPEG", exif=exif)).shape == PICTURE.shape


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientations_that_do_not_exist_do_not_matter(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    np.testing.assert_array_equal(pixels(encode(PICTURE, exif=exif)), PICTURE)


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(64) + data[middle + 64 :]


NOISE = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero-byte": (lambda: b"", r"empty \(0 bytes\)"),
    "text": (lambda: b"not a picture\n" * 50, "not an image that can be read"),
    "html named png": (lambda: b"<!DOCTYPE html><title>404</title>", "not an image that can be read"),
    "truncated png": (lambda: encode(NOISE)[:5000], "truncated or corrupt image: .*truncated"),
    "truncated jpeg": (lambda: encode(NOISE, "JPEG")[:2000], "truncated or corrupt image: .*truncated"),
    "truncated webp": (lambda: encode(NOISE, "WEBP")[:1000], "truncated or corrupt image|not an image"),
    "truncated gif": (lambda: encode(NOISE, "GIF")[:2000], "truncated or corrupt image"),
    "truncated tiff": (lambda: encode(NOISE, "TIFF")[:2000], "truncated or corrupt image|not an image"),
    "truncated in its header": (lambda: encode(NOISE)[:20], "truncated or corrupt image|not an image"),
    "corrupt png": (lambda: damaged(encode(NOISE)), "truncated or corrupt image: "),
    "png without its pixels": (lambda: png_of_size(8, 8), "truncated or corrupt image: "),
    "60,000 x 60,000": (
        lambda: png_of_size(60_000, 60_000),
        "too many pixels, more than the limit of 50 million",
    ),
    "10,000 x 10,000": (lambda: png_of_size(10_000, 10_000), "pixels, more than the limit of 50 million"),
    "8,000 x 8,000": (
        lambda: png_of_size(8_000, 8_000),
        "8000 x 8000 pixels, more than the limit of 50 million",
    ),
    "floating point": (lambda: encode(np.ones((4, 4), np.float32), "TIFF"), "floating point pixels"),
    "eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image that can be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_one_line_and_names_itself(tmp_path: Path, name: str) -> None:
    make, message = BAD[name]
    path = tmp_path / "bad.png"
    path.write_bytes(make())
    with pytest.raises(ImageError, match=message) as from_file:
        decode_image(path)
    with pytest.raises(ImageError, match=message) as from_bytes:
        decode_image(path.read_bytes(), name="table: row 7")
    assert str(from_file.value).startswith(f"{path}: ")
    assert str(from_bytes.value).startswith("table: row 7: ")
    assert "\n" not in str(from_file.value) + str(from_bytes.value)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", PICTURE.shape[0] * PICTURE.shape[1] - 1)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="more than the limit"):
        decode_image(encode(PICTURE))


def test_the_limit_itself_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", PICTURE.shape[0] * PICTURE.shape[1])
    assert pixels(encode(PICTURE)).shape == PICTURE.shape


def test_nothing_but_the_error_is_said(tmp_path: Path) -> None:
    """Pillow's warnings of large images and damaged EXIF would be further lines on stderr."""
    (tmp_path / "large.png").write_bytes(png_of_size(10_000, 10_000))
    (tmp_path / "exif.jpg").write_bytes(encode(PICTURE, "JPEG", exif=DAMAGED_EXIF))
    code = (
        "from pathlib import Path\n"
        "from attribution.images import ImageError, decode_image\n"
        f"decode_image(Path({str(tmp_path / 'exif.jpg')!r}))\n"
        "try:\n"
        f"    decode_image(Path({str(tmp_path / 'large.png')!r}))\n"
        "except ImageError:\n"
        "    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("refused\n", "")


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png: no such file"):
        decode_image(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="a folder, not an image"):
        decode_image(tmp_path)
    with pytest.raises(ImageError, match="not a regular file"):
        decode_image(Path("/dev/zero"))
    with pytest.raises(ImageError, match="cannot be read: File name too long"):
        decode_image(tmp_path / ("x" * 300))


def table(*image_ids: str, **columns: list[str]) -> pa.Table:
    pictures = [encode(np.full((2, 2, 3), row, np.uint8)) for row in range(len(image_ids))]
    return pa.table({"image_id": list(image_ids), "image": pa.array(pictures, pa.binary()), **columns})


def test_a_table_is_read_back_and_its_bytes_do_not_wander(tmp_path: Path) -> None:
    rows = table("a", "b", caption=["x", "y"])
    for name in ("one", "two"):
        write_image_table(tmp_path / name / "t.parquet", rows)
    assert (tmp_path / "one" / "t.parquet").read_bytes() == (tmp_path / "two" / "t.parquet").read_bytes()
    assert read_image_table(tmp_path / "one" / "t.parquet") == rows
    assert read_image_table(tmp_path / "one" / "t.parquet", ["caption"]).column_names == ["caption"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (table("a", "b", "a"), "image_id a more than once"),
        (table("a").drop_columns("image"), "no column image; got: image_id"),
        (table("a").rename_columns(["id", "image"]), "no column image_id; got: id, image"),
        (pa.table({"image_id": [1], "image": [b"x"]}), "column image_id is int64, wanted string"),
        (pa.table({"image_id": ["a"], "image": ["x"]}), "column image is string, wanted binary"),
        (
            pa.table({"image_id": ["a"], "image": pa.array([None], pa.binary())}),
            "column image has 1 empty cells",
        ),
    ],
)
def test_a_table_that_is_none_is_not_written(tmp_path: Path, rows: pa.Table, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_image_table(tmp_path / "t.parquet", rows)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder of two parts of 3 and 2 images, and what else may lie beside them."""
    folder = tmp_path / "parts"
    write_image_table(folder / "part-00001.parquet", table("d", "e", caption=["4", "5"]))
    write_image_table(folder / "part-00000.parquet", table("a", "b", "c", caption=["1", "2", "3"]))
    (folder / ".partial-host-1-0-part-00002.parquet").write_text("half")
    return folder


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_images_come_in_order_whatever_the_batch(parts: Path, batch_size: int) -> None:
    batches = list(iterate_images(parts, batch_size=batch_size))
    assert max(map(len, batches)) <= batch_size
    seen = [(image_id, image.getpixel((0, 0))) for batch in batches for image_id, image in batch]
    assert seen == [(name, (row,) * 3) for name, row in zip("abcde", [0, 1, 2, 0, 1], strict=True)]
    assert read_image_table(parts, ["image_id"])["image_id"].to_pylist() == list("abcde")


def test_other_column_names_are_taken(tmp_path: Path) -> None:
    write_image_table(tmp_path / "t.parquet", table("a", key=["k"]))
    (batch,) = iterate_images(tmp_path / "t.parquet", columns=("key", "image"))
    assert batch[0][0] == "k"


def test_rows_are_found_by_id_in_the_groups_that_hold_them(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_rows(parts, ["e", "a", "nowhere"], ["caption"])
    assert found == {"a": {"image_id": "a", "caption": "1"}, "e": {"image_id": "e", "caption": "5"}}
    monkeypatch.setattr(images, "ROWS_PER_GROUP", 2)
    write_image_table(parts / "part-00000.parquet", table(*"abc", caption=["1", "2", "3"]))
    assert find_rows(parts, ["c", "b"], ["caption"]).keys() == {"b", "c"}
    assert find_rows(parts, [], ["caption"]) == {}


def test_a_bad_image_in_a_table_is_named(tmp_path: Path) -> None:
    rows = pa.table({"image_id": ["a", "b"], "image": [encode(PICTURE), b"junk"]})
    write_image_table(tmp_path / "t.parquet", rows)
    with pytest.raises(ImageError, match=r"t\.parquet: b: not an image"):
        list(iterate_images(tmp_path / "t.parquet"))


def damaged_footer(data: bytes) -> bytes:
    """A parquet file that ends as one does."""
    length = int.from_bytes(data[-8:-4], "little")
    return data[: -8 - length] + b"\xff" * length + data[-8:]


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_image_table(path, table(*"abc"))
    whole = path.read_bytes()
    readers = (
        read_image_table,
        lambda path: list(iterate_encoded(path)),
        lambda path: find_rows(path, ["a"]),
    )
    for damaged in (damaged_footer(whole), whole[:4] + b"\xff" * 60 + whole[64:]):
        path.write_bytes(damaged)
        for read in readers:
            with pytest.raises(ValueError, match=r"t\.parquet: not a parquet file, or a damaged one: "):
                read(path)


def test_a_table_that_may_not_be_read_keeps_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    write_image_table(tmp_path / "t.parquet", table("a"))
    monkeypatch.setattr(pq, "ParquetFile", refuse)
    with pytest.raises(PermissionError):
        read_image_table(tmp_path / "t.parquet")


def test_wrong_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone: no such image table"):
        read_image_table(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"no part-\*\.parquet files"):
        table_parts(tmp_path)
    (tmp_path / "text.parquet").write_text("not parquet at all")
    with pytest.raises(ValueError, match=r"text\.parquet: not a parquet file"):
        read_image_table(tmp_path / "text.parquet")
    write_image_table(tmp_path / "t.parquet", table("a"))
    with pytest.raises(ValueError, match=r"t\.parquet: no column caption; got: image_id, image"):
        read_image_table(tmp_path / "t.parquet", ["caption"])
