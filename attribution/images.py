"""Any picture file as one RGB image, and tables of encoded images that are read as a stream."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from attribution.files import atomic_path, is_of_the_system

MAX_PIXELS = 50_000_000
ROWS_PER_GROUP = 1024
# Only formats that Pillow decodes itself: EPS, for one, would start Ghostscript on a stranger's program.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow warns of large images, for which the limit here is lower and an error, and of damaged EXIF.
for _category in (Image.DecompressionBombWarning, UserWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"PIL\.")


class ImageError(ValueError):
    """Says in one line which image cannot be used, and why."""


def decode_image(source: Path | bytes, *, name: str | None = None) -> Image.Image:
    """An upright 8-bit RGB image: the first frame, turned by its EXIF orientation, transparency over white.

    16-bit grey keeps its upper 8 bits. `name` stands for the image in errors (default: the path). Raises
    ImageError for what is missing, empty, no image, truncated, corrupt, or larger than 50 megapixels by its
    header (nothing is decoded then).
    """
    where = name or (str(source) if isinstance(source, Path) else "image")
    try:
        if isinstance(source, Path):
            _check_file(source, where)
        elif not source:
            raise ImageError(f"{where}: empty (0 bytes)")
        file = source if isinstance(source, Path) else io.BytesIO(source)
        with Image.open(file, formats=_formats()) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(_too_large(where, f"{width} x {height}"))
            image.load()
            return _upright(_to_rgb(image, where), _orientation(image))
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(_too_large(where, "too many")) from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"{where}: not an image that can be read ({', '.join(FORMATS)})") from None
    except OSError as error:  # decoders raise it without a number
        if error.errno:
            raise ImageError(f"{where}: cannot be read: {error.strerror}") from error
        raise ImageError(_corrupt(where, error)) from error
    except Exception as error:  # on corrupt bytes Pillow's decoders raise nearly anything
        raise ImageError(_corrupt(where, error)) from error


def write_image_table(path: Path | str, rows: pa.Table) -> None:
    """The parquet file holds `rows`; equal rows give equal bytes.

    `rows` has at least image_id (string, unique) and image (binary: an encoded picture). Raises ValueError
    otherwise.
    """
    for column, kind in (("image_id", pa.string()), ("image", pa.binary())):
        if column not in rows.column_names:
            raise ValueError(f"{path}: no column {column}; got: {', '.join(rows.column_names)}")
        if rows.schema.field(column).type != kind:
            raise ValueError(f"{path}: column {column} is {rows.schema.field(column).type}, wanted {kind}")
        if rows[column].null_count:
            raise ValueError(f"{path}: column {column} has {rows[column].null_count} empty cells")
    repeated = _repeated(rows)
    if repeated:
        raise ValueError(f"{path}: image_id {repeated[0]} more than once ({len(repeated)} such)")
    with atomic_path(path) as partial:
        texts = [field.name for field in rows.schema if field.type == pa.string()]
        pq.write_table(
            rows,
            partial,
            row_group_size=ROWS_PER_GROUP,
            compression="zstd",
            use_dictionary=texts,
            write_statistics=False,
        )


def read_image_table(path: Path | str, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of a parquet file, or of the part-*.parquet files of a folder in the order of their names.

    Raises FileNotFoundError for a path to nothing, ValueError for a missing column or a file that is not
    parquet, or damaged.
    """
    tables = []
    for part in table_parts(path):
        with _open_part(part, columns or ()) as file:
            tables.append(file.read(columns=None if columns is None else list(columns)))
    return pa.concat_tables(tables)


def iterate_encoded(
    path: Path | str, columns: Sequence[str] = ("image_id", "image"), batch_size: int = 256
) -> Iterator[list[tuple[str, bytes]]]:
    """The (id, encoded picture) pairs of a table in its order; one row group at most is in memory."""
    id_column, image_column = columns
    for part in table_parts(path):
        with _open_part(part, columns) as file:
            for batch in file.iter_batches(batch_size, columns=[id_column, image_column]):
                ids = batch.column(id_column).to_pylist()
                yield list(zip(ids, batch.column(image_column).to_pylist(), strict=True))


def iterate_images(
    path: Path | str, columns: Sequence[str] = ("image_id", "image"), batch_size: int = 256
) -> Iterator[list[tuple[str, Image.Image]]]:
    """The (id, RGB image) pairs of a table in its order. Raises ImageError naming the table and the id."""
    for batch in iterate_encoded(path, columns, batch_size):
        yield [(image_id, decode_image(data, name=f"{path}: {image_id}")) for image_id, data in batch]


def find_rows(
    path: Path | str, image_ids: Sequence[str], columns: Sequence[str] = ("image",)
) -> dict[str, dict[str, Any]]:
    """Id to row for those of the ids that the table holds; reads only the row groups that hold them."""
    found: dict[str, dict[str, Any]] = {}
    wanted = pa.array(image_ids, pa.string())
    for part in table_parts(path):
        with _open_part(part, ["image_id", *columns]) as file:
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["image_id"])["image_id"]
                mask = pc.is_in(ids, value_set=wanted)
                if pc.any(mask).as_py():
                    rows = file.read_row_group(group, columns=["image_id", *columns]).filter(mask)
                    found |= {row["image_id"]: row for row in rows.to_pylist()}
    return found


def table_parts(path: Path | str) -> list[Path]:
    """The parquet files that make up a table, in order. Raises FileNotFoundError if there is none."""
    path = Path(path)
    if path.is_dir():
        parts = sorted(path.glob("part-*.parquet"))
        if not parts:
            raise FileNotFoundError(f"{path}: no part-*.parquet files in this folder")
        return parts
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such image table")
    return [path]


@contextlib.contextmanager
def _open_part(part: Path, columns: Sequence[str]) -> Iterator[pq.ParquetFile]:
    """The part with these columns; inside, what pyarrow says of damage becomes a line that names the part."""
    try:
        with pq.ParquetFile(part) as file:
            names = file.schema_arrow.names
            if missing := [column for column in columns if column not in names]:
                raise ValueError(f"{part}: no column {', '.join(missing)}; got: {', '.join(names)}")
            yield file
    except (pa.ArrowException, OSError) as error:
        if is_of_the_system(error):
            raise
        said = " ".join(str(error).split())
        raise ValueError(f"{part}: not a parquet file, or a damaged one: {said}") from error


def _repeated(rows: pa.Table) -> list[str]:
    counts = rows.group_by("image_id").aggregate([("image_id", "count")])
    return sorted(counts.filter(pc.greater(counts["image_id_count"], 1))["image_id"].to_pylist())


def _check_file(path: Path, where: str) -> None:
    if path.is_dir():
        raise ImageError(f"{where}: a folder, not an image")
    if not path.exists():
        raise ImageError(f"{where}: no such file")
    if not path.is_file():
        raise ImageError(f"{where}: not a regular file")
    if path.stat().st_size == 0:
        raise ImageError(f"{where}: empty (0 bytes)")


def _formats() -> tuple[str, ...]:
    # A name that this build of Pillow lacks (AVIF in some) is a KeyError inside Image.open.
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _too_large(where: str, size: str) -> str:
    return f"{where}: {size} pixels, more than the limit of {MAX_PIXELS // 1_000_000} million"


def _corrupt(where: str, error: Exception) -> str:
    return f"{where}: truncated or corrupt image: {' '.join(str(error).split()) or type(error).__name__}"


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits at 255 and so turns most of the picture white.
        wide = np.asarray(image).astype(np.int64)
        return Image.fromarray((wide.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{where}: floating point pixels have no fixed range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image
