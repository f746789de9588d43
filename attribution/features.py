"""FeatureSet: what a backbone says of a collection of images, mapped from disk, refused when not whole."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Int, Shaped

from attribution.files import atomic_path, is_of_the_system, read_json, sha256_file, write_json

DTYPES = ("float32", "float16")
# At the end of a space's preprocessing: its vectors were brought to length 1.
LENGTH_ONE = "; then length 1"
BAD_HEADER = (ValueError, SyntaxError, tokenize.TokenError)  # what numpy raises where one is damaged
BLOCK = 8192  # rows in memory at a time, where not all are
ID_BLOCK = 1 << 18  # ids in memory at a time, where not all are


@dataclass(frozen=True)
class Space:
    """Two vectors may be compared when, and only when, their spaces are equal.

    `revision` is derived from the weights, `preprocessing` is all that happens to the pixels before them,
    `dtype` is what the vectors are stored in (float32 or float16).
    """

    backbone: str
    revision: str
    preprocessing: str
    dim: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"space of {self.backbone}: dtype {self.dtype}, wanted {' or '.join(DTYPES)}")
        if self.dim < 1:
            raise ValueError(f"space of {self.backbone}: dim {self.dim}, wanted 1 or more")


def length_one(vectors: Float[np.ndarray, "rows dim"]) -> Float[np.ndarray, "rows dim"]:
    """The rows brought to length 1; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def check_same_space(where: Path | str, wanted: Space, got: Space) -> None:
    """Raises ValueError naming each field in which the two spaces differ."""
    pairs = (
        (field.name, getattr(wanted, field.name), getattr(got, field.name))
        for field in dataclasses.fields(Space)
    )
    differing = [f"{name}: wanted {a!r}, got {b!r}" for name, a, b in pairs if a != b]
    if differing:
        do = f"run: dvc repro featurize@{wanted.backbone}"
        raise ValueError(f"{where}: another feature space ({'; '.join(differing)}); {do}")


@dataclass(frozen=True)
class FeatureSet:
    """One row per image, un-normalized, as the backbone gives them, in shards mapped from disk.

    A folder of img_emb_0.npy, img_emb_1.npy, ... ([rows, dim] each), rows.parquet (image_id, sha256 of the
    encoded picture) and space.json. Neither vectors nor ids are read before they are asked for.
    """

    path: Path
    space: Space
    shards: tuple[np.memmap, ...]

    @staticmethod
    def open(path: Path | str, *, backbone: str | None = None, verify: bool = False) -> FeatureSet:
        """The feature set in the folder, its counts, sizes and shapes held to what was written.

        With `backbone`, refuses any other's. With `verify`, reads every value: digests must be those written
        and all values finite. Raises FileNotFoundError for a missing folder, record or shard, ValueError for
        the rest, each naming the folder.
        """
        path = Path(path)
        do = f"run: dvc repro featurize@{backbone or path.resolve().parent.name}"
        for name in ("space.json", "rows.parquet"):
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path}: no {name}; {do}")
        record = read_json(path / "space.json")
        try:
            space = Space(**{field.name: record[field.name] for field in dataclasses.fields(Space)})
            written, count, finite = record["shards"], record["rows"], record["finite"]
            files = [path / shard["file"] for shard in written]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}/space.json: not the record of a feature set: {error!r}; {do}"
            ) from error
        if backbone is not None and space.backbone != backbone:
            raise ValueError(f"{path}: wanted features of {backbone}, got those of {space.backbone}; {do}")
        if finite is not True:
            raise ValueError(f"{path}: values that are not finite numbers; {do}")
        shards = tuple(
            piece
            for file, shard in zip(files, written, strict=True)
            for piece in _without(_open_shard(file, shard, space, verify, do), shard.get("without", []))
        )
        try:
            rows = pq.read_metadata(path / "rows.parquet")
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}/rows.parquet: not a parquet file; {do}") from error
        if missing := {"image_id", "sha256"}.difference(columns := rows.schema.names):
            raise ValueError(f"{path}/rows.parquet: no column {min(missing)} among {columns}; {do}")
        vectors = sum(len(shard) for shard in shards)
        if not rows.num_rows == vectors == count:
            raise ValueError(f"{path}: {rows.num_rows} ids but {vectors} vectors ({count} written); {do}")
        return FeatureSet(path, space, shards)

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    @cached_property
    def image_ids(self) -> Shaped[np.ndarray, " rows"]:
        """All ids in the order of the vectors, at 4 bytes a character: of millions ask `ids_of`."""
        with self._open_rows() as file:
            ids = file.read(columns=["image_id"])["image_id"]
        return np.array(ids.to_pylist(), dtype=np.str_)

    @property
    def rows(self) -> pa.Table:
        """image_id and sha256, in the order of the vectors."""
        with self._open_rows() as file:
            return file.read()

    def vectors(self) -> Float[np.ndarray, "rows dim"]:
        """All rows in memory, float32, un-normalized."""
        empty = np.empty((0, self.space.dim), np.float32)
        return np.concatenate([empty, *self.shards], dtype=np.float32, casting="same_kind")

    def select(self, image_ids: Sequence[str] | np.ndarray) -> Float[np.ndarray, "rows dim"]:
        """The rows of these images in this order, float32. Raises ValueError naming the first missing id."""
        rows = self.rows_of(image_ids)
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            first = image_ids[missing[0]]
            raise ValueError(f"{self.path}: no image {first} ({len(missing)} of {len(rows)} missing)")
        return self.take(rows)

    def rows_of(self, image_ids: Sequence[str] | np.ndarray) -> Int[np.ndarray, " rows"]:
        """The numbers of these images' rows, -1 where there is none."""
        wanted, places = np.unique(np.asarray(image_ids, dtype=np.str_), return_inverse=True)
        rows = np.full(len(wanted), -1)
        names = pa.array(wanted.tolist(), pa.string())
        for first, ids in self._id_blocks():
            found = pc.index_in(ids, value_set=names)
            here = np.flatnonzero(found.is_valid())
            rows[found.drop_null().to_numpy()] = first + here
        return rows[places]

    def ids_of(self, rows: Int[np.ndarray, " rows"]) -> Shaped[np.ndarray, " rows"]:
        """The ids of the rows of these numbers, as objects."""
        found = np.empty(len(rows), object)
        order = np.argsort(rows, kind="stable")
        for first, ids in self._id_blocks():
            begin, end = np.searchsorted(rows, (first, first + len(ids)), sorter=order)
            places = order[begin:end]
            found[places] = ids.take(pa.array(rows[places] - first)).to_numpy(zero_copy_only=False)
        return found

    def take(self, rows: Int[np.ndarray, " rows"]) -> Float[np.ndarray, "rows dim"]:
        """The rows of these numbers in this order, float32; no other row is read."""
        taken = np.empty((len(rows), self.space.dim), np.float32)
        order = np.argsort(rows, kind="stable")  # shards lie on disk: they are read from front to back
        starts = np.cumsum([0, *(len(shard) for shard in self.shards)])
        bounds = np.searchsorted(rows, starts, sorter=order)
        for shard, start, first, end in zip(self.shards, starts, bounds, bounds[1:], strict=False):
            for block in range(first, end, BLOCK):
                places = order[block : min(block + BLOCK, end)]
                taken[places] = shard[rows[places] - start]
        return taken

    @property
    def is_ready_made(self) -> bool:
        """Whether the vectors lie elsewhere and came without pictures (attribution.clip_retrieval)."""
        return "source" in pq.read_schema(self.path / "rows.parquet").names

    def _id_blocks(self) -> Iterator[tuple[int, pa.StringArray]]:
        """All ids, some at a time, each time with the number of the first."""
        first = 0
        with self._open_rows() as file:
            for batch in file.iter_batches(ID_BLOCK, columns=["image_id"]):
                yield first, batch.column("image_id")
                first += len(batch)

    @contextlib.contextmanager
    def _open_rows(self) -> Iterator[pq.ParquetFile]:
        """rows.parquet; inside, what pyarrow says of damage becomes a line that names it."""
        path = self.path / "rows.parquet"
        try:
            with pq.ParquetFile(path) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            if is_of_the_system(error):
                raise
            do = f"run: dvc repro featurize@{self.space.backbone}"
            raise ValueError(f"{path}: not a parquet file, or a damaged one; {do}") from error


def write_feature_set(
    path: Path | str,
    space: Space,
    image_ids: Sequence[str] | np.ndarray,
    batches: Iterable[np.ndarray],
    *,
    image_sha256: Sequence[str] | None = None,
    shard_rows: int = 65536,
) -> FeatureSet:
    """The folder holds one vector per id, in order, stored in `space.dtype`; or, on any error, is as it was.

    `batches` are [any, dim] arrays whose rows follow `image_ids`. Raises ValueError for too few or too many
    vectors, another dim, an id twice, and for a value that is not finite or does not fit the dtype, naming
    the image.
    """
    path = Path(path)
    ids = _unique_ids(path, image_ids)
    with atomic_path(path) as partial:
        partial.mkdir()
        files: list[Path] = []
        done = 0
        for vectors in _regroup(batches, shard_rows):
            if done + len(vectors) <= len(ids):
                files.append(partial / f"img_emb_{len(files)}.npy")
                write_shard(files[-1], space, ids[done : done + len(vectors)], vectors, where=path)
            done += len(vectors)
        if done != len(ids):
            raise ValueError(f"{path}: {len(ids)} ids but {done} vectors")
        _write_records(path, partial, space, ids, files, image_sha256)
    return FeatureSet.open(path)


def assemble_feature_set(
    path: Path | str,
    space: Space,
    image_ids: Sequence[str] | np.ndarray,
    shard_files: Sequence[Path],
    *,
    image_sha256: Sequence[str] | None = None,
) -> FeatureSet:
    """The folder holds the shards that `write_shard` made, in this order, linked if it can.

    Raises ValueError when they do not hold one vector per id.
    """
    path = Path(path)
    ids = _unique_ids(path, image_ids)
    with atomic_path(path) as partial:
        partial.mkdir()
        files = [partial / f"img_emb_{number}.npy" for number in range(len(shard_files))]
        for source, file in zip(shard_files, files, strict=True):
            try:
                os.link(source, file)
            except OSError:  # another disk, or one without links
                shutil.copyfile(source, file)
        _write_records(path, partial, space, ids, files, image_sha256)
    return FeatureSet.open(path)


def write_shard(
    file: Path,
    space: Space,
    image_ids: Sequence[str],
    vectors: np.ndarray,
    *,
    where: Path | str | None = None,
) -> None:
    """The .npy file holds these vectors in `space.dtype`. Raises ValueError naming the image of a bad row."""
    where = where or file
    if vectors.shape != (len(image_ids), space.dim):
        wanted = f"[{len(image_ids)}, {space.dim}]"
        raise ValueError(f"{where}: wanted vectors {wanted} for {space.backbone}, got {list(vectors.shape)}")
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(vectors, dtype=space.dtype)
    bad = np.flatnonzero(~np.isfinite(stored).all(axis=1))
    if len(bad):
        finite = np.isfinite(vectors[bad[0]]).all()
        reason = f"a value too large for {space.dtype}" if finite else "a value that is not a finite number"
        raise ValueError(f"{where}: image {image_ids[bad[0]]} has {reason} ({len(bad)} such images)")
    with atomic_path(file) as partial, partial.open("wb") as stream:
        np.save(stream, stored)


def _write_records(
    path: Path,
    partial: Path,
    space: Space,
    image_ids: list[str],
    files: list[Path],
    image_sha256: Sequence[str] | None,
) -> None:
    shapes = [np.load(file, mmap_mode="r").shape for file in files]
    vectors = sum(shape[0] for shape in shapes)
    if vectors != len(image_ids):
        raise ValueError(f"{path}: {len(image_ids)} ids but {vectors} vectors")
    if image_sha256 is not None and len(image_sha256) != len(image_ids):
        raise ValueError(f"{path}: {len(image_ids)} ids but {len(image_sha256)} digests")
    digests: list[Any] = [None] * len(image_ids) if image_sha256 is None else list(image_sha256)
    rows = pa.table({"image_id": pa.array(image_ids, pa.string()), "sha256": pa.array(digests, pa.string())})
    pq.write_table(rows, partial / "rows.parquet", compression="zstd")
    shards = [
        {"file": file.name, "rows": shape[0], "bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file, shape in zip(files, shapes, strict=True)
    ]
    record = {**dataclasses.asdict(space), "rows": len(image_ids), "finite": True, "shards": shards}
    write_json(partial / "space.json", record)


def _open_shard(file: Path, written: dict[str, Any], space: Space, verify: bool, do: str) -> np.memmap:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent}: shard {file.name} is missing; {do}")
    if file.stat().st_size != written["bytes"]:
        raise ValueError(f"{file}: {file.stat().st_size} bytes, wanted {written['bytes']}; {do}")
    try:
        # A shard without rows cannot be mapped (numpy refuses to map no bytes), so none is ever written.
        shard = np.lib.format.open_memmap(file, mode="r")
    except BAD_HEADER as error:
        raise ValueError(f"{file}: not a .npy file: {error}; {do}") from error
    if shard.shape != (written["rows"], space.dim) or shard.dtype != np.dtype(space.dtype):
        wanted = f"{space.dtype} [{written['rows']}, {space.dim}]"
        raise ValueError(f"{file}: wanted {wanted}, got {shard.dtype} {list(shard.shape)}; {do}")
    if verify and sha256_file(file) != written["sha256"]:
        raise ValueError(f"{file}: other values than were written (sha256 differs); {do}")
    if verify and not np.isfinite(shard).all():
        raise ValueError(f"{file}: values that are not finite numbers; {do}")
    return shard


def _without(shard: np.memmap, rows: Sequence[int]) -> list[Any]:
    """The shard as it lies on disk, in pieces between the rows that are not of the set."""
    bounds = itertools.pairwise([-1, *rows, len(shard)])
    return [shard[before + 1 : after] for before, after in bounds if after > before + 1]


def _regroup(batches: Iterable[np.ndarray], rows: int) -> Iterable[np.ndarray]:
    """The same rows in groups of `rows`, the last one smaller; no group is empty."""
    held: list[np.ndarray] = []
    count = 0
    for batch in batches:
        while len(batch):
            head, batch = batch[: rows - count], batch[rows - count :]
            held.append(head)
            count += len(head)
            if count == rows:
                yield np.concatenate(held)
                held, count = [], 0
    if held:
        yield np.concatenate(held)


def _unique_ids(path: Path, image_ids: Sequence[str] | np.ndarray) -> list[str]:
    ids = [str(image_id) for image_id in image_ids]
    seen: set[str] = set()
    for image_id in ids:
        if image_id in seen:
            raise ValueError(f"{path}: image_id {image_id} more than once")
        seen.add(image_id)
    return ids
