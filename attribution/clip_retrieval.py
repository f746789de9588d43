"""Features that clip-retrieval wrote, opened where they lie: img_emb_*.npy with metadata_*.parquet."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float

from attribution.backbone_settings import BackboneSettings
from attribution.features import DTYPES, LENGTH_ONE, FeatureSet, Space, length_one
from attribution.files import atomic_path, read_json, require_space, sha256_bytes, write_json

# Columns of the metadata that name a picture, the first that is there.
NAME_COLUMNS = ("image_path", "key", "url")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "alt")
BLOCK = 8192  # rows checked at a time
# The same picture, whoever decoded it and in whichever precision it was encoded.
SAME_COSINE = 0.999
# float16 keeps three digits.
LENGTH_TOLERANCE = 5e-3
# Other decoders, resizing and precisions cost hundredths; another model is nowhere near.
LEAST_COSINE = 0.9
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
    files says which model made them: `check_model`, `least_cosine`.
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


def check_model(name: str, settings: BackboneSettings, made_by: str) -> None:
    """Raises ValueError if `made_by`, as clip-retrieval's --clip_model is told, is not the backbone's model.

    Weights in a file have no name that could differ: of them only the net's is compared.
    """
    names = _names_of_model(settings)
    if not any(re.fullmatch(pattern, made_by) for pattern in names.values()):
        raise ValueError(f"{name}: wanted features made by {' or '.join(names)}, got {made_by}")


def pictures_of(features: FeatureSet, source: Path, count: int) -> dict[str, Path]:
    """Id to file of at most `count` rows whose names are files that are here, evenly over all; often none."""
    names = features.rows["source"]
    found: dict[int, Path] = {}
    for row in dict.fromkeys(np.linspace(0, len(features) - 1, 4 * count).astype(int).tolist()):
        name = names[row].as_py()
        places = [place / name for place in (Path(), source, source.parent)]
        # Not Path.is_file, which raises where a name is too long for a file's.
        file = next(filter(os.path.isfile, places), None)
        if file is not None and len(found) < count:
            found[row] = file
    ids = features.ids_of(np.array(list(found), dtype=np.int64))
    return dict(zip(ids.tolist(), found.values(), strict=True))


def least_cosine(
    source: Path, features: FeatureSet, image_ids: Sequence[str], encoded: Float[np.ndarray, "images dim"]
) -> float:
    """The least cosine between the rows of these images and what the backbone made of their pictures.

    Raises ValueError where it is too small for them to be by the same model.
    """
    cosines = (length_one(features.select(image_ids)) * length_one(encoded)).sum(axis=1)
    worst = int(cosines.argmin())
    if cosines[worst] < LEAST_COSINE:
        picture = describe(features, [image_ids[worst]])[image_ids[worst]]["caption"]
        said = f"cosine {cosines[worst]:.3f} with what {features.space.backbone} makes of its picture"
        raise ValueError(f"{source}: {picture}: {said}; wanted features by the same model")
    return float(cosines[worst])


def describe(features: FeatureSet, image_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Id to what the metadata say of those of the images whose vectors came ready made: {"caption": text}."""
    shards = read_json(features.path / "space.json")["shards"]
    kept = [np.delete(np.arange(shard["rows"]), shard.get("without", [])) for shard in shards]
    starts = np.cumsum([0, *map(len, kept)])
    rows_of = features.rows_of(image_ids)
    asked = np.unique(rows_of[rows_of >= 0])
    asked_ids = features.ids_of(asked)
    found = {}
    for shard, own, start, end in zip(shards, kept, starts, starts[1:], strict=False):
        of_shard = (asked >= start) & (asked < end)
        if of_shard.any() and "metadata" in shard:
            file = features.path / shard["metadata"]
            if not file.is_file():
                do = f"put it back, or run: dvc repro featurize@{features.space.backbone}"
                raise FileNotFoundError(f"{file.resolve()}: no such file, which ready features need; {do}")
            present = pq.read_schema(file).names
            columns = [name for name in (*CAPTION_COLUMNS, *reversed(NAME_COLUMNS)) if name in present]
            rows = pq.read_table(file, columns=columns).take(own[asked[of_shard] - start]).to_pylist()
            for image_id, values in zip(asked_ids[of_shard].tolist(), rows, strict=True):
                said = dict.fromkeys(str(values[name]) for name in columns if values[name])
                found[image_id] = {"caption": " ".join(" ".join(said).split())}
    return found


def _names_of_model(settings: BackboneSettings) -> dict[str, str]:
    """What clip-retrieval can have been told to get this model: for a reader, and as a pattern."""
    model, weights = settings.model or settings.library, settings.weights
    if settings.library != "open_clip" or weights is None or "/" in model:
        return {model: re.escape(model)}
    is_file = "/" in weights or bool(Path(weights).suffix)
    plain = model.removesuffix("-quickgelu")
    names = {f"open_clip:{model}/{'...' if is_file else weights}"}
    if weights == "openai" or (is_file and model != plain):
        # OpenAI's names for its own, which clip-retrieval takes without a library before them.
        short = re.sub(r"^(ViT-\w+)-(\d+)", r"\1/\2", plain).replace("-336", "@336px")
        names |= {short, f"open_clip:{plain}/openai"}
    return {name: re.escape(name).replace(r"\.\.\.", ".+") for name in sorted(names)}


def _open(file: Path, space: Space) -> np.memmap:
    try:
        array = np.lib.format.open_memmap(file, mode="r")
    except ValueError as error:
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
    values = pq.read_table(file, columns=[chosen])[chosen]
    if len(values) != rows or values.null_count:
        raise ValueError(f"{file}: {len(values) - values.null_count} names in {chosen} for {rows} vectors")
    return [str(value) for value in values.to_pylist()]


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
    if all_one and not wants_one:
        said = f"all lengths are 1, as clip-retrieval makes them, but {space.backbone}'s are as they come"
        raise ValueError(f"{file}: {said}; do: normalized: true {do}")
    return digest.hexdigest(), same


def _reference(file: Path, path: Path) -> str:
    """Relative where both lie under the working folder, so that a copy of the repository finds its own."""
    here = Path.cwd().resolve()
    both = [one.resolve() for one in (file, path)]
    inside = all(one.is_relative_to(here) for one in both)
    return os.path.relpath(both[0], both[1]) if inside else str(both[0])
