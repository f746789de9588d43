"""Whether influence says what it claims: influence given against influence due, pooled in bins."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

# Upper ends of the bins. Influence spreads over orders of magnitude: equal widths would hold it all in one.
BIN_ENDS = (1e-5, 3e-5, 1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Per bin of influence and per query: influence claimed, influence due, items. The last bin is the rest.

    Due to an item is 1 / P if it is one of the query's P own exemplars, else 0: the chance that it is drawn
    when one of them is drawn evenly. The rest is all that was not shown or has no influence.
    """

    claimed: Float[np.ndarray, " bins"]
    due: Float[np.ndarray, " bins"]
    items: Float[np.ndarray, " bins"]

    @property
    def error(self) -> float:
        """Expected calibration error, from 0 (each bin gets what it claims) to 1.

        1/2 sum_bins |claimed - due|
        """
        return float(np.abs(self.claimed - self.due).sum() / 2)


def reliability(
    influence: Float[np.ndarray, "queries k"], due: Float[np.ndarray, "queries k"]
) -> Reliability:
    """Bins over the shown items of each query; what is missing to 1 on either side goes to the rest.

    Items are a query's top k in any order; those with no influence count as not shown.
    """
    shown = influence > 0
    queries = max(len(influence), 1)
    bins = np.searchsorted(BIN_ENDS, np.minimum(influence[shown], 1.0))
    claimed, given, items = (
        np.bincount(bins, weights=weights, minlength=len(BIN_ENDS)) / queries
        for weights in (influence[shown].astype(np.float64), due[shown], np.ones(len(bins)))
    )
    rest = (1.0 - claimed.sum(), 1.0 - given.sum(), 0.0)
    return Reliability(*(np.append(*pair) for pair in zip((claimed, given, items), rest, strict=True)))


def influence_due(
    ids: Int[np.ndarray, "queries k"], own: Int[np.ndarray, "queries slots"]
) -> Float[np.ndarray, "queries k"]:
    """1 / P where an id is one of the query's own exemplars (`own`: gallery ids, then -1), else 0."""
    hit = np.zeros(ids.shape, dtype=bool)
    for slot in own.T[:, :, None]:  # all at once would take queries x k x slots
        hit |= (ids == slot) & (slot >= 0)
    return hit / (own >= 0).sum(axis=1, keepdims=True)
