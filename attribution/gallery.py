"""A gallery whose distractors stay on disk: they are read, mapped and asked about a block at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int, Shaped

from attribution import parts
from attribution.calibrator import Calibrator
from attribution.features import FeatureSet
from attribution.mapper import BLOCK, Mapper
from attribution.similarity import Attribution

# Float32 rows that are read and mapped at a time. The best k of each block are sorted: few blocks are faster.
BLOCK_BYTES = 1 << 28
# Scores and ids (12 bytes) that Attributions hold at most, of the rows so far, of a block, and of both.
HELD_BYTES, ITEM_BYTES = 1 << 30, 3 * 12


# Is told the next mapped distractors, and the place of each: ascending in a block.
Reader = Callable[[np.ndarray, np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class Gallery:
    """All exemplars, in memory, then all distractors, on disk; un-normalized.

    `places` are those of the distractors, as they lie on disk, in an order drawn at random: the first n are a
    smaller gallery like the whole. The disk is read from front to back, a block at a time, and the rows of a
    block pass by in the order of their places. Rows of the gallery are numbered as they pass by.
    """

    exemplar_ids: Shaped[np.ndarray, " exemplars"]
    exemplars: Float[np.ndarray, "exemplars dim"]
    distractors: FeatureSet
    places: Int[np.ndarray, " distractors"]

    def __len__(self) -> int:
        return len(self.exemplars) + len(self.places)

    @property
    def block_rows(self) -> int:
        """How many distractors are read and mapped at a time."""
        # A mapper's last bit of a row varies with the rows beside it: whole blocks of its own.
        return BLOCK * max(1, BLOCK_BYTES // (4 * self.distractors.space.dim * BLOCK))

    @cached_property
    def order(self) -> Int[np.ndarray, " distractors"]:
        """The rows of `distractors` in the order in which they pass by."""
        return np.lexsort((self.places, np.arange(len(self.places)) // self.block_rows))

    def image_ids(self, rows: Int[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
        """The ids of these rows of the gallery, as objects. Ask for many at a time."""
        found = np.empty(rows.shape, object)
        own = rows < len(self.exemplars)
        found[own] = self.exemplar_ids[rows[own]]
        found[~own] = self.distractors.ids_of(self.order[rows[~own] - len(self.exemplars)])
        return found

    def distractor_blocks(self) -> Iterator[tuple[Float[np.ndarray, "rows dim"], Int[np.ndarray, " rows"]]]:
        """The distractors, float32, and their places."""
        for first in range(0, len(self.order), self.block_rows):
            rows = self.order[first : first + self.block_rows]
            yield self.distractors.take(rows), self.places[rows]

    def mapped_blocks(self, mapper: Mapper) -> Iterator[Float[np.ndarray, "rows dim"]]:
        """All rows in order, as the mapper's head for training images maps them; first the exemplars."""
        yield mapper.map_real(self.exemplars)
        for block, _ in self.distractor_blocks():
            yield mapper.map_real(block)
            del block  # or the next one is read beside it

    def show(self, readers: Iterable[tuple[Mapper, Reader]]) -> None:
        """Each reader gets all distractors, mapped by its mapper, in one walk; each block is mapped once."""
        by_mapper: dict[int, tuple[Mapper, list[Reader]]] = {}
        for mapper, reader in readers:
            by_mapper.setdefault(id(mapper), (mapper, []))[1].append(reader)
        for block, places in self.distractor_blocks():
            for mapper, some in by_mapper.values():
                mapped = mapper.map_real(block)
                for reader in some:
                    reader(mapped, places)
                del mapped  # or the next one is made beside it
            del block


class Attributions:
    """What `similarity.attribute` says of the mapped gallery, to the bit, by each calibrator.

    `queries` are mapped. Beside a block, up to HELD_BYTES are in memory, or more if k of each query are: the
    more queries there are, the sooner one needs a second walk.
    """

    def __init__(
        self,
        gallery: Gallery,
        mapper: Mapper,
        queries: Float[np.ndarray, "queries dim"],
        calibrators: Mapping[str, Calibrator],
        *,
        k: int,
    ) -> None:
        self.gallery, self.mapper, self.queries = gallery, mapper, queries
        self.calibrators, self.k = calibrators, k
        self.rows = 0
        items = HELD_BYTES // (ITEM_BYTES * max(1, len(queries) * len(calibrators)))
        self.window = max(0, items - k)
        self.wholes: dict[str, parts.Part] = {}
        self.add(mapper.map_real(gallery.exemplars), np.arange(len(gallery.exemplars)))

    def add(self, distractors: Float[np.ndarray, "rows dim"], places: Int[np.ndarray, " rows"]) -> None:
        """Retrieves from the next rows, whatever their places."""
        for name, one in self.calibrators.items():
            part = parts.retrieve_part(
                self.queries,
                distractors,
                first_row=self.rows,
                k=self.k,
                inv_tau=one.inv_tau,
                b=one.b,
                window=self.window,
            )
            self.wholes[name] = parts.merge(self.wholes[name], part) if name in self.wholes else part
        self.rows += len(distractors)

    def conclude(self) -> dict[str, Attribution]:
        """The attributions. Walks over the gallery again where many rows share the influence on a query."""
        masses: dict[str, parts.Mass] = {}
        wide = {name: whole for name, whole in self.wholes.items() if whole.needs_mass.any()}
        for block in self.gallery.mapped_blocks(self.mapper) if wide else ():
            for name, whole in wide.items():
                mass = parts.weigh(self.queries, block, whole)
                masses[name] = masses[name] + mass if name in masses else mass
        return {name: parts.conclude(whole, masses.get(name)) for name, whole in self.wholes.items()}


def attribute_all(
    gallery: Gallery,
    mapper: Mapper,
    queries: Float[np.ndarray, "queries dim"],
    calibrators: Mapping[str, Calibrator],
    *,
    k: int,
) -> dict[str, Attribution]:
    """The `Attributions` of a walk of their own."""
    found = Attributions(gallery, mapper, queries, calibrators, k=k)
    gallery.show([(mapper, found.add)])
    return found.conclude()
