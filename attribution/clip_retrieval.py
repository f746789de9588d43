"""Features that clip-retrieval wrote, opened where they lie: img_emb_*.npy with metadata_*.parquet."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from attribution.features import DTYPES, FeatureSet, Space
from attribution.files import atomic_path, sha256_bytes, sha256_file, write_json

# Columns of the metadata that name a picture, the first that is there.
NAME_COLUMNS = ("image_path", "key", "url")
BLOCK = 65536  # rows checked at a time
# float16 keeps three digits.
LENGTH_TOLERANCE = 5e-3
LENGTH_ONE = "; then length 1"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of vectors and the file that says what they are of."""

    vectors: Path
    metadata: Path


def link_features(
    source: Path,
    path: Path,
    space: Space,
    *,
    name_column: str | None = None,
    ids: Literal["digest", "stem"] = "digest",
) -> FeatureSet:
    """A feature set at `path` whose shards stay in `source`: only ids and digests are written.

    `space` is what the vectors are claimed to be in; its dtype becomes theirs. clip-retrieval brings vectors
    to length 1: where all have it, the space says so, and no features of any other length are mixed with
    them. An id is derived from the picture's name in `name_column` of the metadata (default: the first of
    image_path, key, url): the digest of the name, or its stem (x of a/b/x.jpg). Raises FileNotFoundError or
    ValueError naming the file: no shard, counts or dims that differ, a value not finite, a name twice.
    """
    shards = find_shards(source)
    arrays = [_open(shard.vectors, space, shards[0].vectors) for shard in shards]
    names = [
        _names(shard.metadata, len(array), name_column) for shard, array in zip(shards, arrays, strict=True)
    ]
    sources = [name for some in names for name in some]
    image_ids = [
        PurePosixPath(name).stem if ids == "stem" else sha256_bytes(name.encode())[:16] for name in sources
    ]
    _check_unique(source, image_ids, sources)
    is_length_one = all(
        [_check_values(shard.vectors, array) for shard, array in zip(shards, arrays, strict=True)]
    )
    preprocessing = space.preprocessing + LENGTH_ONE * is_length_one
    space = dataclasses.replace(space, dtype=str(arrays[0].dtype), preprocessing=preprocessing)
    digests = pa.nulls(len(image_ids), pa.string())
    rows = pa.table({"image_id": pa.array(image_ids, pa.string()), "sha256": digests, "source": sources})
    written = [
        {
            "file": _reference(shard.vectors, path),
            "rows": len(array),
            "bytes": shard.vectors.stat().st_size,
            "sha256": sha256_file(shard.vectors),
        }
        for shard, array in zip(shards, arrays, strict=True)
    ]
    with atomic_path(path) as partial:
        partial.mkdir()
        pq.write_table(rows, partial / "rows.parquet", compression="zstd")
        record = {**dataclasses.asdict(space), "rows": len(image_ids), "finite": True, "shards": written}
        write_json(partial / "space.json", record)
    return FeatureSet.open(path)


def find_shards(source: Path) -> list[Shard]:
    """The shards in the order of their numbers, from `source` or its img_emb/ and metadata/."""
    found = {
        kind: {
            int(match[1]): file
            for folder in (source, source / subfolder)
            for file in sorted(folder.glob(f"{kind}_*{suffix}"))
            if (match := re.fullmatch(rf"{kind}_(\d+)\{suffix}", file.name))
        }
        for kind, subfolder, suffix in (("img_emb", "img_emb", ".npy"), ("metadata", "metadata", ".parquet"))
    }
    vectors, metadata = found["img_emb"], found["metadata"]
    if not vectors:
        raise FileNotFoundError(
            f"{source}: no img_emb_*.npy here or in img_emb/; wanted clip-retrieval's layout"
        )
    if alone := sorted(vectors.keys() ^ metadata.keys()):
        lone = vectors.get(alone[0]) or metadata[alone[0]]
        raise FileNotFoundError(
            f"{lone}: no {'metadata' if alone[0] in vectors else 'img_emb'} of that number"
        )
    return [Shard(vectors[number], metadata[number]) for number in sorted(vectors)]


def _open(file: Path, space: Space, first: Path) -> np.memmap:
    try:
        array = np.lib.format.open_memmap(file, mode="r")
    except ValueError as error:
        raise ValueError(f"{file}: not a .npy file that can be mapped: {error}") from error
    if array.ndim != 2 or array.shape[1] != space.dim or str(array.dtype) not in DTYPES:
        wanted = f"[rows, {space.dim}] of {' or '.join(DTYPES)} for {space.backbone}"
        raise ValueError(f"{file}: wanted {wanted}, got {list(array.shape)} of {array.dtype}")
    other = np.lib.format.open_memmap(first, mode="r").dtype
    if array.dtype != other:
        raise ValueError(f"{file}: {array.dtype}, but {first.name} is {other}")
    return array


def _names(file: Path, rows: int, column: str | None) -> list[str]:
    try:
        present = pq.read_schema(file).names
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a parquet file: {' '.join(str(error).split())}") from error
    wanted: Sequence[str] = NAME_COLUMNS if column is None else (column,)
    chosen = next((name for name in wanted if name in present), None)
    if chosen is None:
        raise ValueError(f"{file}: no column {' or '.join(wanted)}; it has: {', '.join(present)}")
    values = pq.read_table(file, columns=[chosen])[chosen]
    if len(values) != rows or values.null_count:
        raise ValueError(f"{file}: {len(values) - values.null_count} names in {chosen} for {rows} vectors")
    return [str(value) for value in values.to_pylist()]


def _check_unique(source: Path, image_ids: Sequence[str], names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for image_id, name in zip(image_ids, names, strict=True):
        if image_id in seen:
            raise ValueError(
                f"{source}: {name} and {seen[image_id]} get the same id; name pictures by another column"
            )
        seen[image_id] = name


def _check_values(file: Path, array: np.memmap) -> bool:
    """Whether all rows have length 1. Raises ValueError for a row that is not finite."""
    is_length_one = True
    for first in range(0, len(array), BLOCK):
        block = np.asarray(array[first : first + BLOCK], dtype=np.float32)
        bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if len(bad):
            raise ValueError(f"{file}: row {first + int(bad[0])} has a value that is not a finite number")
        lengths = np.linalg.norm(block, axis=1)
        is_length_one = is_length_one and bool(np.abs(lengths - 1).max(initial=0) < LENGTH_TOLERANCE)
    return is_length_one


def _reference(file: Path, path: Path) -> str:
    """Relative where both lie under the working folder, so that a copy of the repository finds its own."""
    here = Path.cwd().resolve()
    both = [one.resolve() for one in (file, path)]
    inside = all(one.is_relative_to(here) for one in both)
    return os.path.relpath(both[0], both[1]) if inside else str(both[0])
