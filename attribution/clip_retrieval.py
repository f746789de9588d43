"""Features that clip-retrieval wrote, opened where they lie: img_emb_*.npy with metadata_*.parquet."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float

from attribution.features import BAD_HEADER, DTYPES, LENGTH_ONE, FeatureSet, Space, length_one
from attribution.files import atomic_path, require_space, sha256_bytes, write_json

# Columns of the metadata that name a picture, the first that is there.
NAME_COLUMNS = ("image_path", "key", "url")
BLOCK = 8192  # rows checked at a time
# The same picture, whoever decoded it and in whichever precision it was encoded.
SAME_COSINE = 0.999
# float16 keeps three digits.
LENGTH_TOLERANCE = 5e-3
ROW_BYTES = 200  # about what a row's id and name take on disk


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
    apart_from: Float[np.ndarray, "images dim"] | None = None,
) -> FeatureSet:
    """A feature set at `path`, in `space`, whose shards stay in `source`: ids and digests alone are written.

    Vectors are never copied, and read once, to be checked. An id is derived from the picture's name in
    `name_column` of the metadata (default: the first of image_path, key, url): the digest of the name, or its
    stem (x of a/b/x.jpg). Rows of the pictures that `apart_from` holds vectors of are no rows of the set:
    exemplars, say, which would compete with themselves.

    Raises FileNotFoundError or ValueError naming the file: no shard, a count, dim or dtype that differs,
    lengths of 1 where the space has others or the reverse, a value not finite, a name twice. Nothing in the
    files says which model made them: attribution.same_model.
    """
    shards = find_shards(source)
    arrays = [_open(shard.vectors, space) for shard in shards]
    require_space(path, ROW_BYTES * sum(map(len, arrays)), "the ids")
    names = [
        _names(shard.metadata, len(array), name_column) for shard, array in zip(shards, arrays, strict=True)
    ]
    sources = [name for some in names for name in some]
    image_ids = [
        PurePosixPath(name).stem if ids == "stem" else sha256_bytes(name.encode())[:16] for name in sources
    ]
    _check_unique(source, image_ids, sources)
    others = np.empty((0, space.dim), np.float32) if apart_from is None else length_one(apart_from)
    checked = [
        _check_values(shard.vectors, array, space, others)
        for shard, array in zip(shards, arrays, strict=True)
    ]
    kept = np.concatenate([~same for _, same in checked])
    rows = pa.table(
        {"image_id": image_ids, "sha256": pa.nulls(len(image_ids), pa.string()), "source": sources}
    ).filter(pa.array(kept))
    written = [
        {
            "file": _reference(shard.vectors, path),
            "metadata": _reference(shard.metadata, path),
            "rows": len(array),
            "bytes": shard.vectors.stat().st_size,
            "sha256": digest,
            "without": np.flatnonzero(same).tolist(),
        }
        for shard, array, (digest, same) in zip(shards, arrays, checked, strict=True)
    ]
    with atomic_path(path) as partial:
        partial.mkdir()
        pq.write_table(rows, partial / "rows.parquet", compression="zstd")
        record = {**dataclasses.asdict(space), "rows": len(rows), "finite": True, "shards": written}
        write_json(partial / "space.json", record)
    return FeatureSet.open(path)


def find_shards(source: Path) -> list[Shard]:
    """The shards in the order of their numbers, from `source` or its img_emb/ and metadata/."""
    vectors = _numbered(source, "img_emb", ".npy")
    metadata = _numbered(source, "metadata", ".parquet")
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


def _numbered(source: Path, kind: str, suffix: str) -> dict[int, Path]:
    """The files of one kind by their numbers. Raises ValueError for two of the same number."""
    found: dict[int, Path] = {}
    for folder in (source, source / kind):
        for file in sorted(folder.glob(f"{kind}_*{suffix}")):
            if match := re.fullmatch(rf"{kind}_(\d+)\{suffix}", file.name):
                other = found.setdefault(int(match[1]), file)
                if other != file:
                    raise ValueError(f"{file}: {other} has the same number; do: take one of them away")
    return found


def said_missing(source: Path) -> str:
    """What a report adds where numbers are left out between the shards: clip-retrieval leaves out none."""
    numbers = {int(shard.vectors.stem.rpartition("_")[2]) for shard in find_shards(source)}
    missing = sorted(set(range(max(numbers))) - numbers)
    if not missing:
        return ""
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    return (
        f"; no shard {', '.join(map(str, missing[:5]))}{more}, though there is {max(numbers)}: is it whole?"
    )


def _open(file: Path, space: Space) -> np.memmap:
    try:
        array = np.lib.format.open_memmap(file, mode="r")
    except BAD_HEADER as error:
        raise ValueError(f"{file}: not a .npy file that can be mapped: {error}") from error
    if array.ndim != 2 or array.shape[1] != space.dim or str(array.dtype) not in DTYPES:
        wanted = f"[rows, {space.dim}] of {' or '.join(DTYPES)} for {space.backbone}"
        raise ValueError(f"{file}: wanted {wanted}, got {list(array.shape)} of {array.dtype}")
    if str(array.dtype) != space.dtype:
        do = f"say dtype: {array.dtype} in featurize.settings.{space.backbone}"
        raise ValueError(f"{file}: {array.dtype}, but {space.backbone} is stored in {space.dtype}; {do}")
    if not array.flags.c_contiguous or file.stat().st_size != array.offset + array.nbytes:
        raise ValueError(f"{file}: wanted rows one after another, and nothing else, behind the .npy header")
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
    try:
        values = pq.read_table(file, columns=[chosen])[chosen]
        names = values.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: column {chosen} is damaged: {' '.join(str(error).split())}") from error
    if len(values) != rows or values.null_count:
        raise ValueError(f"{file}: {len(values) - values.null_count} names in {chosen} for {rows} vectors")
    return [str(name) for name in names]


def _check_unique(source: Path, image_ids: Sequence[str], names: Sequence[str]) -> None:
    _, counts = np.unique(np.array(image_ids, dtype=np.str_), return_counts=True)
    if (counts > 1).any():
        seen: dict[str, str] = {}
        for image_id, name in zip(image_ids, names, strict=True):
            if image_id in seen:
                do = "name pictures by another column"
                raise ValueError(f"{source}: {name} and {seen[image_id]} get the same id; {do}")
            seen[image_id] = name


def _check_values(
    file: Path, array: np.memmap, space: Space, others: np.ndarray
) -> tuple[str, Bool[np.ndarray, " rows"]]:
    """The file's sha256, and which rows are of the same pictures as `others`, vectors of length 1.

    Raises ValueError for a value not finite, and for a length that the space does not have.
    """
    same = np.zeros(len(array), dtype=bool)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(array.offset))
    wants_one, all_one = space.preprocessing.endswith(LENGTH_ONE), True
    do = f"in featurize.settings.{space.backbone}"
    for first in range(0, len(array), BLOCK):
        block = np.asarray(array[first : first + BLOCK])
        digest.update(block.data)
        values = block.astype(np.float32, copy=False)
        lengths = np.linalg.norm(values, axis=1)
        if not np.isfinite(lengths).all():
            row = first + int(np.flatnonzero(~np.isfinite(lengths))[0])
            raise ValueError(f"{file}: row {row} has a value that is not a finite number")
        if len(others):
            same[first : first + BLOCK] = (values @ others.T).max(axis=1) > SAME_COSINE * lengths
        is_one = np.abs(lengths - 1) < LENGTH_TOLERANCE
        all_one = all_one and bool(is_one.all())
        if wants_one and not all_one:
            row = int(is_one.argmin())
            said = f"row {first + row} has length {lengths[row]:.4g}, but {space.backbone}'s are brought to 1"
            raise ValueError(f"{file}: {said}; do: normalized: null {do}")
    if len(array) and all_one and not wants_one:
        said = f"all lengths are 1, as clip-retrieval makes them, but {space.backbone}'s are as they come"
        raise ValueError(f"{file}: {said}; do: normalized: true {do}")
    return digest.hexdigest(), same


def _reference(file: Path, path: Path) -> str:
    """Relative where both lie under the working folder, so that a copy of the repository finds its own."""
    here = Path.cwd().resolve()
    both = [one.resolve() for one in (file, path)]
    inside = all(one.is_relative_to(here) for one in both)
    return os.path.relpath(both[0], both[1]) if inside else str(both[0])
