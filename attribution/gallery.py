"""A gallery whose distractors stay on disk: they are read, mapped and asked about a block at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float, Int, Shaped

from attribution import parts
from attribution.calibrator import Calibrator
from attribution.features import FeatureSet
from attribution.mapper import BLOCK, Mapper
from attribution.similarity import Attribution

READ_BYTES = 1 << 29  # float32 rows in memory at a time
BLOCK_BYTES = 1 << 27  # those of them that are mapped at a time


@dataclasses.dataclass(frozen=True)
class Gallery:
    """All exemplars, in memory, then the distractors of these rows in this order, on disk; un-normalized.

    Whatever the order, rows are read from front to back: a set of N bytes in a scattered order is walked over
    N / READ_BYTES times (float16: twice as often), out of the system's page cache where that holds it.
    """

    exemplar_ids: Shaped[np.ndarray, " exemplars"]
    exemplars: Float[np.ndarray, "exemplars dim"]
    distractors: FeatureSet
    order: Int[np.ndarray, " distractors"]

    def __len__(self) -> int:
        return len(self.exemplars) + len(self.order)

    def image_ids(self, rows: Int[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
        """The ids of these rows of the gallery."""
        known, ids = len(self.exemplars), self.distractors.image_ids
        found = np.empty(rows.shape, np.promote_types(self.exemplar_ids.dtype, ids.dtype))
        own = rows < known
        found[own] = self.exemplar_ids[rows[own]]
        found[~own] = ids[self.order[rows[~own] - known]]
        return found

    def distractor_blocks(self) -> Iterator[Float[np.ndarray, "rows dim"]]:
        """The distractors in order, float32. A block is overwritten when the next ones are asked for."""
        dim = self.distractors.space.dim
        # A mapper's last bit of a row varies with the rows beside it: whole blocks of its own.
        block = BLOCK * max(1, BLOCK_BYTES // (4 * dim * BLOCK))
        held = block * max(1, READ_BYTES // (4 * dim * block))
        room = np.empty((min(held, len(self.order)), dim), np.float32)
        for first in range(0, len(self.order), held):
            rows = self.order[first : first + held]
            by_place = np.argsort(rows, kind="stable")
            for some in np.split(by_place, range(BLOCK, len(rows), BLOCK)):
                room[some] = self.distractors.take(rows[some])
            for begin in range(0, len(rows), block):
                yield room[begin : min(begin + block, len(rows))]

    def mapped_blocks(self, mapper: Mapper) -> Iterator[Float[np.ndarray, "rows dim"]]:
        """All rows in order, as the mapper's head for training images maps them; first the exemplars."""
        yield mapper.map_real(self.exemplars)
        for block in self.distractor_blocks():
            yield mapper.map_real(block)


def attribute_all(
    gallery: Gallery,
    mapper: Mapper,
    queries: Float[np.ndarray, "queries dim"],
    calibrators: Mapping[str, Calibrator],
    *,
    k: int,
) -> dict[str, Attribution]:
    """What `similarity.attribute` says of the mapped gallery, to the bit, by each calibrator.

    `queries` are mapped. The gallery is walked over once, and again where many rows share the influence on a
    query. Beside a block, k + 2048 scores and ids of each query at most are in memory.
    """
    wholes: dict[str, parts.Part] = {}
    first_row = 0
    for block in gallery.mapped_blocks(mapper):
        for name, one in calibrators.items():
            part = parts.retrieve_part(queries, block, first_row=first_row, k=k, inv_tau=one.inv_tau, b=one.b)
            wholes[name] = parts.merge(wholes[name], part) if name in wholes else part
        first_row += len(block)
    masses: dict[str, parts.Mass] = {}
    wide = {name: whole for name, whole in wholes.items() if whole.needs_mass.any()}
    for block in gallery.mapped_blocks(mapper) if wide else ():
        for name, whole in wide.items():
            mass = parts.weigh(queries, block, whole)
            masses[name] = masses[name] + mass if name in masses else mass
    return {name: parts.conclude(whole, masses.get(name)) for name, whole in wholes.items()}
