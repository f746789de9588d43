"""Pictures in image folders, WebDataset tars and parquet files as img2dataset writes them, as a stream."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from attribution.files import content_key, sha256_bytes
from attribution.intake import MAX_BYTES, Picture, Skipped

# Fields of a tar's sample that are pictures. In folders every file counts that is no sidecar.
PICTURE_FIELDS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff", "avif"),
    *("ppm", "pgm", "pnm", "jp2", "tga", "ico", "mpo"),
)
TAR_SUFFIXES = (".tar", ".tgz", ".tar.gz")
# What lies beside pictures and is none: captions, records, features.
SIDECAR_SUFFIXES = (
    *(".txt", ".json", ".jsonl", ".csv", ".tsv", ".npy", ".npz"),
    *(".md", ".html", ".yaml", ".yml"),
)
IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "image_bytes", "bytes")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "alt")
NAME_COLUMNS = ("key", "image_id", "url", "path", "__key__")
ROWS_PER_BATCH = 64


@dataclass(frozen=True)
class Unit:
    """What is read, and finished, as one: a tar, a parquet file, or some image files of a folder."""

    root: Path
    kind: Literal["files", "tar", "parquet"]
    names: tuple[str, ...]

    def key(self) -> str:
        """Equal while the files, and captions beside them, have the same names, sizes and times of change."""
        files = [self.root / name for name in self.names]
        captions = [file.with_suffix(".txt") for file in files if self.kind == "files"]
        return content_key(self.kind, self.names, [_status(file) for file in [*files, *captions]])

    def size(self) -> int:
        """Bytes of its files: no less than its pictures take."""
        return sum(size for name in self.names for size in _status(self.root / name)[:1])

    def read(self) -> Iterator[Picture | Skipped]:
        """Each picture in turn, or why there is none."""
        if self.kind == "tar":
            return read_tar(self.root, self.names[0])
        if self.kind == "parquet":
            return read_parquet(self.root, self.names[0])
        return read_files(self.root, self.names)


def list_units(root: Path, *, files_per_unit: int) -> tuple[list[Unit], list[Skipped]]:
    """All there is to read under a folder (or the one file), in the order of the paths, and what cannot be.

    About `files_per_unit` image files make a unit, divided by the names alone: one more file changes one
    unit. Hidden files, sidecars and parquet files without pictures (img2dataset's records) are passed over.
    Raises FileNotFoundError for the root, ValueError where there is nothing to read.
    """
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such file or folder; put your pictures there, or name another")
    base = root if root.is_dir() else root.parent
    names, skipped = _walk(root) if root.is_dir() else ([root.name], [])
    units: list[Unit] = []
    files: list[str] = []
    for name in names:
        # What is no regular file (a pipe would be waited for) is told with the image files.
        lower = name.lower() if (base / name).is_file() else ""
        if lower.endswith(TAR_SUFFIXES):
            units.append(Unit(base, "tar", (name,)))
        elif lower.endswith(".parquet"):
            if _may_hold_pictures(base / name):
                units.append(Unit(base, "parquet", (name,)))
        elif not lower.endswith(SIDECAR_SUFFIXES):
            files.append(name)
            ends = int(sha256_bytes(name.encode(errors="surrogateescape"))[:8], 16) % files_per_unit == 0
            if ends or len(files) == 4 * files_per_unit:
                units.append(Unit(base, "files", tuple(files)))
                files = []
    if files:
        units.append(Unit(base, "files", tuple(files)))
    if not units:
        wanted = "image files, .tar, or .parquet with a column " + " or ".join(IMAGE_COLUMNS)
        raise ValueError(f"{root}: no pictures; wanted {wanted}, got {len(names)} other files")
    return units, skipped


def read_files(root: Path, names: tuple[str, ...]) -> Iterator[Picture | Skipped]:
    """Image files, each with the text beside it (x.txt for x.jpg) as its caption."""
    for name in names:
        yield read_file(root / name, label(name))


def read_file(path: Path, source: str, caption: str | None = None) -> Picture | Skipped:
    """The file's bytes; without a `caption`, that of the .txt beside it."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES or not path.is_file():
            return Skipped(source, "unreadable", _too_long(size) if path.is_file() else "not a regular file")
        data = path.read_bytes()
        if caption is None:
            beside = path.with_suffix(".txt")
            caption = _text(beside.read_bytes()) if beside.is_file() else ""
    except FileNotFoundError:
        return Skipped(source, "unreadable", f"no such file: {path}")
    except (OSError, ValueError) as error:
        return Skipped(source, "unreadable", f"cannot be read: {getattr(error, 'strerror', None) or error}")
    return Picture(source, data, caption)


def label(name: str) -> str:
    """The name as text: file names may hold bytes that are no UTF-8, which parquet refuses."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def read_tar(root: Path, name: str) -> Iterator[Picture | Skipped]:
    """The samples of a WebDataset tar: neighbours with the same name up to the first dot of the file name."""
    sample: dict[str, bytes | Skipped] = {}
    current, samples = "", 0
    try:
        with tarfile.open(root / name, "r|*") as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                key, _, field = file.partition(".")
                if not member.isfile() or not key:  # folders, links, hidden files
                    continue
                where = f"{folder}/{key}" if folder else key
                if sample and where != current:
                    yield from _sample(label(f"{name}#{current}"), sample)
                    sample, samples = {}, samples + 1
                current = where
                sample[field.lower()] = _member(tar, member, label(f"{name}#{member.name}"))
    except (tarfile.TarError, OSError, EOFError, TypeError) as error:  # TypeError: no whole gzip header
        # The sample at the break may lack its picture or its caption.
        yield Skipped(label(name), "unreadable", f"the tar breaks off after {samples} samples: {error}")
        return
    if sample:
        yield from _sample(label(f"{name}#{current}"), sample)


def read_parquet(root: Path, name: str) -> Iterator[Picture | Skipped]:
    """The pictures of a parquet file's image column; a row without one is told with its status."""
    done = 0
    try:
        with pq.ParquetFile(root / name) as file:
            schema = file.schema_arrow
            image_column = image_column_of(schema)
            assert image_column is not None, "list_units lists no other"
            present = [
                column
                for column in (*CAPTION_COLUMNS, *NAME_COLUMNS, "status", "error_message")
                if column in schema.names and column != image_column
            ]
            for batch in file.iter_batches(ROWS_PER_BATCH, columns=[image_column, *present]):
                for row in batch.to_pylist():
                    done += 1
                    yield _row(name, done, row, image_column)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        yield Skipped(label(name), "unreadable", f"the parquet file breaks off after {done} rows: {text}")


def image_column_of(schema: pa.Schema) -> str | None:
    """The column that holds encoded pictures: binary, or a struct with binary `bytes`, as datasets writes."""
    for name in IMAGE_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                kind = kind.field("bytes").type
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                return name
    return None


def _status(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError:  # a link to nothing
        return []
    # Not the time of modification: it stays when a file becomes readable.
    return [status.st_size, status.st_ctime_ns]


def _walk(root: Path) -> tuple[list[str], list[Skipped]]:
    names: list[str] = []
    skipped: list[Skipped] = []

    def refuse(error: OSError) -> None:
        source = label(os.path.relpath(error.filename, root))
        skipped.append(Skipped(source, "unreadable", f"cannot be listed: {error.strerror}"))

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if Path(folder, name).is_symlink():
                source = Path(folder, name).relative_to(root).as_posix()
                skipped.append(
                    Skipped(label(source), "unreadable", "a link to a folder, which is not followed")
                )
        names += [
            Path(folder, name).relative_to(root).as_posix() for name in files if not name.startswith(".")
        ]
    return sorted(names), skipped


def _may_hold_pictures(path: Path) -> bool:
    try:
        return image_column_of(pq.read_schema(path)) is not None
    except (pa.ArrowException, OSError):
        return True  # damaged: reading it says so


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, source: str) -> bytes | Skipped:
    if member.size > MAX_BYTES:
        return Skipped(source, "unreadable", _too_long(member.size))
    file = tar.extractfile(member)
    assert file is not None, "a regular file"
    return file.read()


def _sample(source: str, fields: dict[str, bytes | Skipped]) -> Iterator[Picture | Skipped]:
    pictures = [field for field in fields if field.rpartition(".")[2] in PICTURE_FIELDS]
    if not pictures:
        yield Skipped(source, "no picture", f"only {', '.join(sorted(fields))}")
        return
    # x.jpg beside x.mask.png: the plain name is the picture. 2023.01.05.jpg, 2023.02.07.jpg: each is one.
    least = min(field.count(".") for field in pictures)
    plain: dict[str, str] = {}
    for field in pictures:
        if field.count(".") == least:
            plain.setdefault(field[: field.rfind(".") + 1], field)
    for start, field in plain.items():
        data = fields[field]
        if isinstance(data, Skipped):
            yield data
            continue
        names = (f"{start}txt", f"{start}caption", "txt", "caption")
        caption = next((fields[name] for name in names if name in fields), b"")
        if not caption and isinstance(record := fields.get(f"{start}json", fields.get("json")), bytes):
            caption = _caption_of(record)
        where = source if len(plain) == 1 else f"{source}.{field}"
        yield Picture(where, data, "" if isinstance(caption, Skipped) else _text(caption))


def _row(name: str, number: int, row: dict[str, Any], image_column: str) -> Picture | Skipped:
    found = next((row[column] for column in NAME_COLUMNS if row.get(column) is not None), f"row {number}")
    source = label(f"{name}#{found}")
    data = row[image_column]
    data = data.get("bytes") if isinstance(data, dict) else data
    if data is None:
        said = [str(row[column]) for column in ("status", "error_message") if row.get(column)]
        return Skipped(source, "no picture", ": ".join(said) or f"no value in column {image_column}")
    if len(data) > MAX_BYTES:
        return Skipped(source, "unreadable", _too_long(len(data)))
    caption = next((row[column] for column in CAPTION_COLUMNS if isinstance(row.get(column), str)), "")
    return Picture(source, data, " ".join(caption.split()))


def _caption_of(record: bytes) -> bytes:
    try:
        found = json.loads(record)
    except ValueError:
        return b""
    caption = found.get("caption") if isinstance(found, dict) else None
    return caption.encode(errors="replace") if isinstance(caption, str) else b""


def _text(data: bytes) -> str:
    """On one line; bytes that are no UTF-8 are replaced."""
    return " ".join(data.decode(errors="replace").split())


def _too_long(size: int) -> str:
    return f"{size:,} bytes, more than the limit of {MAX_BYTES:,}"
