"""The files that the reference released: test lists, features, mappers and calibrators, read without pickle.

Their formats are known from descriptions, not from the files themselves. Not known, and so checked or asked
for: where a test list lies under ROOT; whether paths in features equal those in lists to the letter (file
names are compared); whether tensors are stacked or listed by model (both are taken); which lists hold unseen
concepts; the tensors of mappers that are not linear (refused); which weights and preprocessing made the
features (they are a space of their own, which no features made here will be mixed with).
"""

from __future__ import annotations

import dataclasses
import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from attribution.calibrator import Calibrator
from attribution.files import read_json
from attribution.mapper import Mapper

# The reference stores b / 0.001.
BIAS_GAIN = 0.001
BLOCK = 8192  # rows checked at a time


@dataclasses.dataclass(frozen=True)
class ReleasedModel:
    """One customized model of a test list: paths of its exemplars, and of its images by prompt kind."""

    exemplars: tuple[str, ...]
    synth: Mapping[str, tuple[str, ...]]
    class_id: str
    category: str | None


@dataclasses.dataclass(frozen=True)
class ReleasedFeatures:
    """Features of a test list; `synth_models` are, per prompt kind, rows of `chunks` and of the test list."""

    exemplar_paths: Sequence[str]
    exemplars: Float[np.ndarray, "exemplars dim"]
    chunks: Int[np.ndarray, "models 2"]
    synth_paths: Mapping[str, Sequence[str]]
    synth_models: Mapping[str, np.ndarray]
    synth: Mapping[str, np.ndarray]


def read_test_list(path: Path) -> list[ReleasedModel]:
    """The customized models of the list. Raises ValueError naming file and entry, also without exemplars."""
    found = read_json(path)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path}: wanted a list of customized models, got {type(found).__name__}")
    models = []
    for number, entry in enumerate(found):
        try:
            synth = {kind: _paths(paths) for kind, paths in entry["synth"].items()}
            category = None if entry["category"] is None else str(entry["category"])
            model = ReleasedModel(_paths(entry["exemplar"]), synth, str(entry["class_id"]), category)
        except (KeyError, TypeError, AttributeError) as error:
            wanted = "exemplar, synth, class_id, category"
            raise ValueError(f"{path}: entry {number}: wanted {wanted}, got {error!r}") from error
        if not model.exemplars:
            raise ValueError(f"{path}: entry {number}: a customized model without exemplars")
        models.append(model)
    return models


def read_list_features(path: Path, models: Sequence[ReleasedModel]) -> ReleasedFeatures:
    """The features of the test list's `models`, held to it by counts and file names.

    Raises ValueError naming the file: another test list, counts that differ, values that are not finite.
    """
    found = load_checkpoint(path)
    names = (
        "exemplar_paths",
        "exemplar_chunks",
        "exemplar_tensors",
        "synth_paths",
        "synth_ids",
        "synth_tensors",
    )
    _check_keys(path, found, names)
    of_kinds = [found[name] for name in names if name.startswith("synth")]
    if not all(isinstance(one, Mapping) and {*one} == {*of_kinds[0]} for one in of_kinds):
        raise ValueError(
            f"{path}: synth_paths, synth_ids, synth_tensors: wanted the same prompt kinds in each"
        )
    kinds = sorted(found["synth_paths"])
    features = ReleasedFeatures(
        exemplar_paths=list(map(str, found["exemplar_paths"])),
        exemplars=_stacked(path, "exemplar_tensors", found["exemplar_tensors"]),
        chunks=_integers(path, "exemplar_chunks", found["exemplar_chunks"]).reshape(-1, 2),
        synth_paths={kind: list(map(str, found["synth_paths"][kind])) for kind in kinds},
        synth_models={kind: _integers(path, "synth_ids", found["synth_ids"][kind]) for kind in kinds},
        synth={kind: _stacked(path, "synth_tensors", found["synth_tensors"][kind]) for kind in kinds},
    )
    _check_counts(path, features)
    _check_models(path, features, models)
    return features


def read_distractor_features(path: Path) -> tuple[list[str], Float[np.ndarray, "distractors dim"]]:
    """Paths and features, mapped from the file where torch can."""
    found = load_checkpoint(path)
    _check_keys(path, found, ("feats", "paths"))
    feats = _stacked(path, "feats", found["feats"])
    if len(feats) != len(found["paths"]):
        raise ValueError(f"{path}: {len(found['paths'])} paths but {len(feats)} vectors")
    return list(map(str, found["paths"])), feats


def read_mapper(path: Path, backbone: str) -> Mapper:
    """The linear mapper in the file: real_mapper and synth_mapper, each weight [D, D] and bias [D]."""
    found = load_checkpoint(path)
    _check_keys(path, found, ("real_mapper", "synth_mapper"))
    heads = []
    for side in ("real_mapper", "synth_mapper"):
        if not isinstance(found[side], Mapping) or {*found[side]} != {"weight", "bias"}:
            got = ", ".join(map(str, found[side]))
            raise ValueError(f"{path}: {side}: wanted weight and bias (a linear head), got {got}")
        heads.append({name: _array(path, name, tensor) for name, tensor in found[side].items()})
    try:
        return Mapper("linear", heads[0], heads[1], {"backbone": backbone, "source": "the reference"})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_calibrator(path: Path) -> Calibrator:
    """The calibrator in the file, b = bias * 0.001. Raises ValueError for values that make no influence."""
    found = load_checkpoint(path)
    _check_keys(path, found, ("inv_tau", "bias"))
    values = [_array(path, name, found[name]) for name in ("inv_tau", "bias")]
    if any(value.size != 1 for value in values):
        shapes = " and ".join(str(list(value.shape)) for value in values)
        raise ValueError(f"{path}: inv_tau, bias: wanted a number each, got {shapes}")
    inv_tau, bias = (value.item() for value in values)
    try:
        return Calibrator(inv_tau, bias * BIAS_GAIN)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_checkpoint(path: Path) -> Any:
    """What torch.save wrote, tensors and plain containers alone (weights_only): nothing in it is run.

    Raises FileNotFoundError, or ValueError naming the file for anything else.
    """
    import torch

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; wanted the reference's layout")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickle protocols, which are no files of torch.save
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: holds more than tensors and plain containers, and is not loaded: {said}"
        ) from error
    except Exception as error:  # on bytes that are no pickle the unpickler raises nearly anything
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path}: not a file of torch.save: {said}") from error


def _check_keys(path: Path, found: Any, names: Sequence[str]) -> None:
    missing = [name for name in names if not isinstance(found, Mapping) or name not in found]
    if missing:
        got = ", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"{path}: no {', '.join(missing)}; got: {got}")


def _check_counts(path: Path, features: ReleasedFeatures) -> None:
    pairs = [("exemplar", features.exemplar_paths, features.exemplars)]
    pairs += [(kind, features.synth_paths[kind], features.synth[kind]) for kind in features.synth]
    for name, paths, vectors in pairs:
        if len(paths) != len(vectors):
            raise ValueError(f"{path}: {name}: {len(paths)} paths but {len(vectors)} vectors")
        if vectors.shape[1] != features.exemplars.shape[1]:
            raise ValueError(
                f"{path}: {name}: dim {vectors.shape[1]}, exemplars {features.exemplars.shape[1]}"
            )
    starts, ends = features.chunks.T
    if (starts >= ends).any() or (starts < 0).any() or (ends > len(features.exemplars)).any():
        raise ValueError(f"{path}: exemplar_chunks: wanted 0 <= start < end <= {len(features.exemplars)}")
    for kind, models in features.synth_models.items():
        if len(models) != len(features.synth[kind]):
            raise ValueError(
                f"{path}: {kind}: {len(models)} synth_ids but {len(features.synth[kind])} vectors"
            )
        if (models < 0).any() or (models >= len(features.chunks)).any():
            raise ValueError(f"{path}: {kind}: synth_ids: wanted 0 to {len(features.chunks) - 1}")


def _check_models(path: Path, features: ReleasedFeatures, models: Sequence[ReleasedModel]) -> None:
    if len(models) != len(features.chunks):
        raise ValueError(
            f"{path}: features of {len(features.chunks)} models, but the test list has {len(models)}"
        )
    for number, (model, (start, end)) in enumerate(zip(models, features.chunks.tolist(), strict=True)):
        if _names(model.exemplars) != _names(features.exemplar_paths[start:end]):
            raise ValueError(
                f"{path}: model {number}: other exemplars than in the test list, or another order"
            )
    for kind, numbers in features.synth_models.items():
        listed = [sorted(_names(model.synth.get(kind, ()))) for model in models]
        found: list[list[str]] = [[] for _ in models]
        for number, name in zip(numbers.tolist(), _names(features.synth_paths[kind]), strict=True):
            found[number].append(name)
        for number, (wanted, got) in enumerate(zip(listed, found, strict=True)):
            if wanted != sorted(got):
                raise ValueError(f"{path}: model {number}: other {kind} images than in the test list")


def _paths(found: Any) -> tuple[str, ...]:
    if not isinstance(found, list):  # a string would be taken for its letters
        raise TypeError(f"no list of paths: {found!r}"[:80])
    return tuple(map(str, found))


def _names(paths: Sequence[str]) -> list[str]:
    return [PurePosixPath(path).name for path in paths]


def _array(path: Path, name: str, tensor: Any) -> np.ndarray:
    import torch

    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        got = getattr(tensor, "dtype", type(tensor).__name__)
        raise ValueError(f"{path}: {name}: wanted a tensor of floating point numbers, got {got}")
    return tensor.detach().float().numpy()


def _stacked(path: Path, name: str, found: Any) -> np.ndarray:
    """[rows, dim] of a tensor, or of a list of tensors [dim] or [rows, dim]."""
    parts = found if isinstance(found, list | tuple) else [found]
    arrays = [_array(path, name, part) for part in parts]
    rows = [array[None] if array.ndim == 1 else array for array in arrays]
    if not rows or any(one.ndim != 2 or one.shape[1] != rows[0].shape[1] for one in rows):
        shapes = sorted({array.shape for array in arrays})[:3]
        raise ValueError(f"{path}: {name}: wanted [rows, dim], got {shapes}")
    stacked = rows[0] if len(rows) == 1 else np.concatenate(rows)
    for first in range(0, len(stacked), BLOCK):
        finite = np.isfinite(stacked[first : first + BLOCK]).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{path}: {name}: row {first + int(finite.argmin())} has a value that is not finite"
            )
    return stacked


def _integers(path: Path, name: str, found: Any) -> np.ndarray:
    values = np.array(found.tolist() if hasattr(found, "tolist") else list(found))
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{path}: {name}: wanted whole numbers, got {values.dtype}")
    return values.astype(np.int64)
