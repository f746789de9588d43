"""Two heads that bring frozen features of real and of synthesized images together; applied in numpy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from attribution.files import atomic_path

Kind = Literal["linear", "scale", "mlp"]
# Per kind, the tensors of one head.
TENSORS: dict[str, tuple[str, ...]] = {
    "linear": ("weight", "bias"),
    "scale": ("scale",),
    "mlp": ("weight_in", "bias_in", "weight_out", "bias_out"),
}
BLOCK = 8192  # rows mapped at a time
CACHED = 256  # of which so many are divided by their lengths while they are in the processor's cache
CENTRED = 32768  # rows whose products are summed in float32, before float64 sums those of all


def apply_head(kind: str, head: Mapping[str, Any], features: Any) -> Any:
    """The head's output before normalization, for numpy arrays and torch tensors alike.

    linear: W x + c. scale: s * x (elementwise). mlp: x + W2 relu(W1 x + c1) + c2, so that W2 = c2 = 0 is the
    identity, as W = 1, c = 0 and s = 1 are.
    """
    if kind == "linear":
        mapped = features @ head["weight"].T
        mapped += head["bias"]  # in place: the arrays are large
        return mapped
    if kind == "scale":
        return features * head["scale"]
    hidden = features @ head["weight_in"].T + head["bias_in"]
    return features + (hidden * (hidden > 0)) @ head["weight_out"].T + head["bias_out"]


@dataclasses.dataclass(frozen=True)
class Mapper:
    """Heads `real` (training images) and `synth` (synthesized images) over raw features of one space.

    Both give L2-normalized float32 rows whose inner products are the scores (arXiv:2306.09345). `config`
    says where the heads come from and is stored with them. Raises ValueError for tensors that are missing,
    not finite or of shapes that do not fit together.
    """

    kind: Kind
    real: Mapping[str, np.ndarray]
    synth: Mapping[str, np.ndarray]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for side, head in (("real", self.real), ("synth", self.synth)):
            _check_head(side, self.kind, head)
        if _dim(self.real, self.kind) != _dim(self.synth, self.kind):
            raise ValueError(
                f"mapper: heads of one dim wanted, got real {_dim(self.real, self.kind)} and synth "
                f"{_dim(self.synth, self.kind)}"
            )

    @classmethod
    def identity(cls, dim: int, kind: Kind = "scale", *, hidden: int = 512, seed: int = 0) -> Mapper:
        """A mapper that changes nothing but the length. `seed` draws the mlp's idle first layer."""
        heads = [_identity_head(dim, kind, hidden, np.random.default_rng([seed, side])) for side in (0, 1)]
        return cls(kind, heads[0], heads[1])

    @property
    def dim(self) -> int:
        """Dimension of the features that go in and come out."""
        return _dim(self.real, self.kind)

    def map_real(self, features: Float[np.ndarray, "rows dim"]) -> Float[np.ndarray, "rows dim"]:
        """Features of training images (exemplars, distractors) in the space of scores; rows of length 1."""
        return self._map(self.real, features)

    def map_synth(self, features: Float[np.ndarray, "rows dim"]) -> Float[np.ndarray, "rows dim"]:
        """Features of synthesized images (queries) in the space of scores; rows of length 1."""
        return self._map(self.synth, features)

    def save(self, path: Path | str, *, own_kind: Mapping[str, Mapper] | None = None) -> None:
        """The safetensors file holds both heads, with kind and config in its metadata: equal if they are.

        `own_kind` are mappers that were trained on pairs of one kind of concept alone, stored beside it.
        """
        others = own_kind or {}
        tensors = _tensors("", self)
        for name, mapper in others.items():
            tensors |= _tensors(f"{name}.", mapper)
        config = {
            **_described(self),
            "own_kind": {name: _described(mapper) for name, mapper in others.items()},
        }
        # One metadata key: safetensors writes several in an order that changes from run to run.
        with atomic_path(path) as partial:
            save_file(tensors, partial, metadata={"config": json.dumps(config, sort_keys=True)})

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        backbone: str | None = None,
        dim: int | None = None,
        own_kind: str | None = None,
    ) -> Mapper:
        """The mapper in the file; with `own_kind`, the one trained on that kind alone, where there is one.

        Raises FileNotFoundError, or ValueError naming the file: not a mapper, or one for another backbone or
        dim than is asked for.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                config = json.loads((file.metadata() or {}).get("config", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file; run: dvc repro train_mapper") from None
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: not a mapper: {error}") from error
        others = config.pop("own_kind", {})
        prefix = ""
        if own_kind in others:
            prefix, config = f"{own_kind}.", others[own_kind]
        kind = config.pop("kind", None)
        if kind not in get_args(Kind):
            raise ValueError(f"{path}: wanted a mapper of kind {' | '.join(get_args(Kind))}, got {kind!r}")
        heads = {side: _strip(tensors, f"{prefix}{side}.") for side in ("real", "synth")}
        try:
            mapper = cls(kind, heads["real"], heads["synth"], config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        for name, wanted, got in (
            ("backbone", backbone, config.get("backbone")),
            ("dim", dim, mapper.dim),
        ):
            if wanted not in (None, got):
                raise ValueError(f"{path}: wanted a mapper for {name} {wanted}, got one for {got}")
        return mapper

    def _map(self, head: Mapping[str, np.ndarray], features: np.ndarray) -> np.ndarray:
        if features.shape[1] != self.dim:
            raise ValueError(f"mapper: wanted features of dim {self.dim}, got {features.shape[1]}")
        mapped = np.empty(features.shape, np.float32)
        for first in range(0, len(features), BLOCK):
            rows = np.asarray(features[first : first + BLOCK], dtype=np.float32)
            normalize(apply_head(self.kind, head, rows), out=mapped[first : first + BLOCK])
        return mapped


def normalize(
    features: Float[np.ndarray, "rows dim"], *, out: Float[np.ndarray, "rows dim"] | None = None
) -> Float[np.ndarray, "rows dim"]:
    """Rows of length 1, so that inner products are cosines; a row of zeros stays zero and scores 0."""
    if out is None:
        out = np.empty_like(features)
    for first in range(0, len(features), CACHED):
        some = slice(first, first + CACHED)
        norms = np.linalg.norm(features[some], axis=1, keepdims=True)
        np.divide(features[some], np.where(norms > 0, norms, 1), out=out[some])
    return out


def whitening(
    real: Float[np.ndarray, "reals dim"], synth: Float[np.ndarray, "synths dim"], *, shrinkage: float
) -> Mapper:
    """A control that knows no pairs: each head makes its own images' features centred and uncorrelated.

        W = (C + shrinkage * mean(diag C) * 1)^(-1/2),  c = -W mean

    with C the covariance of the side's features. What it gains over raw features is not learned association.
    """
    return Mapper("linear", _whitening_head(real, shrinkage), _whitening_head(synth, shrinkage))


def _whitening_head(features: np.ndarray, shrinkage: float) -> dict[str, np.ndarray]:
    mean = features.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((len(mean), len(mean)))
    for first in range(0, len(features), CENTRED):
        centred = (features[first : first + CENTRED] - mean).astype(np.float32)
        covariance += centred.T @ centred
    covariance /= max(len(features), 1)
    level = np.trace(covariance) / len(covariance)
    values, vectors = np.linalg.eigh(covariance / (level or 1.0))
    weight = (vectors / np.sqrt(np.maximum(values, 0) + shrinkage)) @ vectors.T
    return {"weight": weight.astype(np.float32), "bias": (-weight @ mean).astype(np.float32)}


def _identity_head(dim: int, kind: str, hidden: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    if kind == "linear":
        return {"weight": np.eye(dim, dtype=np.float32), "bias": np.zeros(dim, np.float32)}
    if kind == "scale":
        return {"scale": np.ones(dim, np.float32)}
    return {
        "weight_in": (rng.standard_normal((hidden, dim)) / np.sqrt(dim)).astype(np.float32),
        "bias_in": np.zeros(hidden, np.float32),
        "weight_out": np.zeros((dim, hidden), np.float32),
        "bias_out": np.zeros(dim, np.float32),
    }


def _dim(head: Mapping[str, np.ndarray], kind: str) -> int:
    return len(head[{"linear": "bias", "scale": "scale", "mlp": "bias_out"}[kind]])


def _check_head(side: str, kind: str, head: Mapping[str, np.ndarray]) -> None:
    if sorted(head) != sorted(TENSORS[kind]):
        raise ValueError(
            f"mapper: {kind} head {side}: wanted tensors {', '.join(TENSORS[kind])}, "
            f"got {', '.join(head) or 'none'}"
        )
    dim = _dim(head, kind)
    hidden = len(head["bias_in"]) if kind == "mlp" else 0
    shapes = {
        "weight": (dim, dim),
        "bias": (dim,),
        "scale": (dim,),
        "weight_in": (hidden, dim),
        "bias_in": (hidden,),
        "weight_out": (dim, hidden),
        "bias_out": (dim,),
    }
    for name, tensor in head.items():
        if tensor.shape != shapes[name]:
            raise ValueError(f"mapper: {side}.{name}: wanted shape {shapes[name]}, got {tensor.shape}")
        if not np.isfinite(tensor).all():
            raise ValueError(f"mapper: {side}.{name}: holds NaN or infinity")


def _tensors(prefix: str, mapper: Mapper) -> dict[str, np.ndarray]:
    return {
        f"{prefix}{side}.{name}": np.ascontiguousarray(tensor, dtype=np.float32)
        for side, head in (("real", mapper.real), ("synth", mapper.synth))
        for name, tensor in head.items()
    }


def _described(mapper: Mapper) -> dict[str, Any]:
    return {**mapper.config, "kind": mapper.kind}


def _strip(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
