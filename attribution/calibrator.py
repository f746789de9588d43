"""Scores into influence: a thresholded softmax with two numbers, and how those two are fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from attribution.files import read_json, write_json

SHARPNESS = 100.0  # beta of the softplus that stands for relu while fitting
BLOCK = 1 << 22  # scores per block: what `fit` holds beside the scores themselves stays near 100 MB


@dataclasses.dataclass(frozen=True)
class Calibrator:
    """How scores become influence.

        e_i = exp(inv_tau * (s_i - max_j s_j)),  t_i = relu(e_i + b),  influence_i = t_i / sum_j t_j

    Only items with s_i > max + ln(-b) / inv_tau get any (arXiv:2306.09345). Raises ValueError unless
    inv_tau > 0 (per unit of cosine) and -1 < b <= 0: at b = -1 the best match itself would get 0 / 0.
    """

    inv_tau: float
    b: float

    def __post_init__(self) -> None:
        if not (0 < self.inv_tau < np.inf and -1 < self.b <= 0):
            raise ValueError(
                f"calibrator: wanted inv_tau > 0 and -1 < b <= 0, got inv_tau {self.inv_tau} and b {self.b}"
            )

    def influence(self, scores: Float[np.ndarray, "queries gallery"]) -> Float[np.ndarray, "queries gallery"]:
        """Influence of each gallery item on each query: >= 0, every row sums to 1.

        -inf scores get nothing. Raises ValueError naming a row that holds NaN or +inf, or no finite score.
        """
        top = _checked_max(scores)
        kept = np.maximum(np.exp(self.inv_tau * (scores - top)) + self.b, 0.0)
        return kept / kept.sum(axis=1, keepdims=True)

    def reach(self) -> float:
        """Scores further than this below the best match have no influence (cosine; inf when b = 0)."""
        return -float(np.log(-self.b)) / self.inv_tau if self.b < 0 else np.inf

    def save(self, path: Path | str, **about: Any) -> None:
        """The file holds inv_tau, b and what is said `about` them, as JSON."""
        write_json(path, {**about, "inv_tau": self.inv_tau, "b": self.b})

    @classmethod
    def load(cls, path: Path | str) -> Calibrator:
        """The calibrator in the file. Raises FileNotFoundError or ValueError, both naming the file."""
        try:
            found = read_json(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file; run: dvc repro calibrate") from None
        found = found if isinstance(found, dict) else {}
        missing = [name for name in ("inv_tau", "b") if not isinstance(found.get(name), int | float)]
        if missing:
            raise ValueError(f"{path}: wanted numbers inv_tau and b, got no {' and no '.join(missing)}")
        try:
            return cls(float(found["inv_tau"]), float(found["b"]))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def relaxed_loss(
    scores: Float[np.ndarray, "queries gallery"],
    own: Bool[np.ndarray, "queries exemplars"],
    inv_tau: float,
    b: float,
    counts: Float[np.ndarray, "queries gallery"] | None = None,
) -> tuple[Float[np.ndarray, " queries"], Float[np.ndarray, "queries 2"]]:
    """Per query, the fitting loss and its derivatives by (inv_tau, b).

        t_j = softplus(e_j + b, beta=100),  loss = log sum_j t_j - mean_{j own} log t_j

    which is KL(uniform over the query's own exemplars || influence) up to a constant (arXiv:2306.09345).
    `own` covers the first columns of the gallery, or all. A score stands for so many items as `counts` says,
    for one without. Raises ValueError for a query without own exemplars in the gallery.
    """
    sizes = own.sum(axis=1)
    if (sizes == 0).any():
        raise ValueError(f"own: query {int((sizes == 0).argmax())} has no exemplar in the gallery")
    gaps = scores - _checked_max(scores)
    loss, slope = _log_sum(gaps, inv_tau, b, counts)
    row, column = np.nonzero(own)
    own_gaps = gaps[row, column].astype(np.float64)  # t may be 1e-46, which float32 does not hold
    e, grade, t = _relaxed(own_gaps, inv_tau, b)
    share = 1.0 / sizes[row]
    for target, addend in (
        (loss, share * np.log(t)),
        (slope[:, 0], share * grade / t * _times_gap(e, own_gaps)),
        (slope[:, 1], share * grade / t),
    ):
        np.subtract.at(target, row, addend)
    return loss, slope


def losses(
    scores: Float[np.ndarray, "queries gallery"],
    own: Bool[np.ndarray, "queries exemplars"],
    calibrator: Calibrator,
    counts: Float[np.ndarray, "queries gallery"] | None = None,
) -> Float[np.ndarray, " queries"]:
    """The `relaxed_loss` of each query alone, a block of queries at a time."""
    found = [loss for loss, _ in _in_blocks(scores, own, calibrator.inv_tau, calibrator.b, counts)]
    return np.concatenate([np.empty(0), *found])


def fit(
    scores: Float[np.ndarray, "queries gallery"],
    own: Bool[np.ndarray, "queries exemplars"],
    *,
    start: Calibrator,
    counts: Float[np.ndarray, "queries gallery"] | None = None,
) -> Calibrator:
    """The calibrator with the least mean `relaxed_loss`, found by BFGS from the best of a coarse grid.

    The search runs over log(inv_tau) and the logit of -b, so that it cannot leave the allowed range.
    """

    def objective(point: np.ndarray, step: int = 1) -> tuple[float, np.ndarray]:
        inv_tau, b = _from_free(point)
        total, slope, queries = 0.0, np.zeros(2), 0
        for loss, slopes in _in_blocks(scores, own, inv_tau, b, counts, step):
            total, slope, queries = total + loss.sum(), slope + slopes.sum(axis=0), queries + len(loss)
        return total / queries, slope / queries * np.array([inv_tau, b * (1 + b)])

    thin = max(1, len(scores) // 64)

    def of_some(point: np.ndarray) -> tuple[float, np.ndarray]:
        return objective(point, thin)

    grid = [_to_free(inv_tau, b) for inv_tau in (4.0, 12.0, 36.0, 108.0) for b in (-0.03, -0.1, -0.4)]
    best = min([_to_free(start.inv_tau, min(start.b, -1e-3)), *grid], key=lambda point: of_some(point)[0])
    # A few queries show the way, all of them the goal.
    near, curvature = _bfgs(of_some, best, np.eye(2))
    return Calibrator(*_from_free(_bfgs(objective, near, curvature)[0]))


def _in_blocks(
    scores: np.ndarray,
    own: np.ndarray,
    inv_tau: float,
    b: float,
    counts: np.ndarray | None,
    step: int = 1,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`relaxed_loss` of every `step`-th query, so many at a time as BLOCK allows."""
    rows = max(1, BLOCK // scores.shape[1]) * step
    for first in range(0, len(scores), rows):
        block = slice(first, first + rows, step)
        some = None if counts is None else counts[block]
        yield relaxed_loss(scores[block], own[block], inv_tau, b, some)


def _log_sum(
    gaps: np.ndarray, inv_tau: float, b: float, counts: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """log sum_j t_j and its derivatives; [queries], [queries, 2]. In the precision of `gaps`, summed wide."""
    e, grade, t = _relaxed(gaps, inv_tau, b)
    if counts is not None:
        grade, t = grade * counts, t * counts
    total = t.sum(axis=1, dtype=np.float64)
    by_b = grade.sum(axis=1, dtype=np.float64)
    by_inv_tau = (grade * _times_gap(e, gaps)).sum(axis=1, dtype=np.float64)
    return np.log(total), np.stack([by_inv_tau / total, by_b / total], axis=1)


def _relaxed(gaps: np.ndarray, inv_tau: float, b: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """e, the derivative of softplus at e + b, and softplus there; in the precision of `gaps`."""
    as_gaps = gaps.dtype.type
    e = np.exp(gaps * as_gaps(inv_tau))
    x = (e + as_gaps(b)) * as_gaps(SHARPNESS)
    small = np.exp(-np.abs(x))
    grade = np.where(x > 0, as_gaps(1), small) / (1 + small)
    return e, grade, (np.maximum(x, 0) + np.log1p(small)) / as_gaps(SHARPNESS)


def _times_gap(e: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """d e / d inv_tau; 0, not 0 x inf, where the score is -inf."""
    return np.multiply(e, gaps, where=e > 0, out=np.zeros_like(e))


def _bfgs(
    objective: Callable[[np.ndarray], tuple[float, np.ndarray]], point: np.ndarray, inverse: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A local minimum, and the inverse of the curvature there, from first guesses of both."""
    value, slope = objective(point)
    one = np.eye(len(point))
    for _ in range(60):
        step = -inverse @ slope
        if step @ slope > -1e-9:
            break
        length = min(1.0, 2.0 / float(np.linalg.norm(step)))
        while length > 1e-4:
            new_value, new_slope = objective(point + length * step)
            if new_value <= value + 1e-4 * length * float(step @ slope):
                break
            length /= 2
        else:
            break  # rounding is all that is left
        moved, turned = length * step, new_slope - slope
        if moved @ turned > 1e-14:
            left = one - np.outer(moved, turned) / (moved @ turned)
            inverse = left @ inverse @ left.T + np.outer(moved, moved) / (moved @ turned)
        point, value, slope = point + moved, new_value, new_slope
    return point, inverse


def _to_free(inv_tau: float, b: float) -> np.ndarray:
    return np.array([np.log(inv_tau), np.log(-b / (1 + b))])


def _from_free(point: np.ndarray) -> tuple[float, float]:
    # Beyond +-30 the logistic function reaches -1 or 0 in float64.
    return float(np.exp(point[0])), float(-1 / (1 + np.exp(-np.clip(point[1], -30, 30))))


def _checked_max(scores: np.ndarray) -> np.ndarray:
    top = scores.max(axis=1, keepdims=True, initial=-np.inf)
    bad = ~np.isfinite(top[:, 0])
    if bad.any():
        raise ValueError(f"scores: row {int(bad.argmax())} holds NaN or +inf, or no finite score at all")
    return top
