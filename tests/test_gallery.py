"""Walks over a gallery on disk, in any blocks: what it would give in memory, in memory that is bounded."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from attribution import gallery as gallery_module
from attribution import score_bins, similarity
from attribution.calibrator import Calibrator
from attribution.evaluation import Ranks, rank_in_spaces
from attribution.features import FeatureSet, Space, write_feature_set
from attribution.gallery import Attributions, Gallery, attribute_all
from attribution.mapper import Kind, Mapper
from attribution.queries import Queries
from attribution.ranking import NO_RANK
from stages import calibrate

DIM, DISTRACTORS, EXEMPLARS, QUERIES = 24, 301, 30, 12
KINDS: tuple[Kind, ...] = ("linear", "scale", "mlp")
CALIBRATORS = {
    "before": Calibrator(1.0, 0.0),
    "after": Calibrator(9.0, -0.3),
    "narrow": Calibrator(80.0, -0.9),
}


def draw_mapper(kind: Kind, seed: int) -> Mapper:
    rng = np.random.default_rng(seed)
    start = Mapper.identity(DIM, kind, hidden=10)
    heads = [
        {
            name: (value + 0.2 * rng.standard_normal(value.shape)).astype(np.float32)
            for name, value in head.items()
        }
        for head in (start.real, start.synth)
    ]
    return Mapper(kind, *heads)


def draw_gallery(folder: Path, *, dtype: str = "float32", distractors: int = DISTRACTORS) -> Gallery:
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((distractors, DIM), np.float32)
    if distractors == DISTRACTORS:
        vectors[200:220] = vectors[100:120]  # ties
    space = Space("toy", "r1", "none", DIM, dtype)
    ids = [f"d{row:05}" for row in range(distractors)]
    features = write_feature_set(folder, space, ids, [vectors], shard_rows=max(110, distractors // 8))
    exemplars = rng.standard_normal((EXEMPLARS, DIM), np.float32)
    exemplar_ids = np.array([f"e{row}" for row in range(EXEMPLARS)])
    return Gallery(exemplar_ids, exemplars, features, rng.permutation(distractors))


def draw_queries(gallery: Gallery) -> tuple[np.ndarray, Queries]:
    """Features near the first exemplars; query q owns exemplars q and, if q is odd, q + 12 too."""
    rng = np.random.default_rng(4)
    asked = gallery.exemplars[:QUERIES] + rng.standard_normal((QUERIES, DIM), np.float32)
    rows = np.arange(QUERIES)
    own = np.stack([rows, np.where(rows % 2, rows + QUERIES, -1)], axis=1)
    ids = np.array([f"q{row}" for row in rows])
    kinds = np.array(["object", "style"])[rows % 2]
    return asked, Queries(ids, ids, kinds, np.ones(QUERIES, bool), np.full(QUERIES, "gpt"), own)


@pytest.fixture(params=[(7, 3 * 7 * DIM * 4), (64, 1), (100, 10**6)])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are mapped together, bytes of a block."""
    for name, value in zip(("BLOCK", "BLOCK_BYTES"), request.param, strict=True):
        monkeypatch.setattr(gallery_module, name, value)


def whole(gallery: Gallery, mapper: Mapper) -> np.ndarray:
    """The mapped gallery, in memory."""
    distractors = gallery.distractors.vectors()[gallery.order]
    return np.concatenate([mapper.map_real(gallery.exemplars), mapper.map_real(distractors)])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_gallery_in_its_order(tmp_path: Path, blocks: None, kind: Kind, dtype: str) -> None:
    gallery, mapper = draw_gallery(tmp_path / "features", dtype=dtype), draw_mapper(kind, 0)
    found = np.concatenate(list(gallery.mapped_blocks(mapper)))
    np.testing.assert_allclose(found, whole(gallery, mapper), atol=1e-6)
    rows = np.array([[0, len(gallery) - 1], [EXEMPLARS - 1, EXEMPLARS]])
    first, last = (gallery.distractors.image_ids[gallery.order[place]] for place in (0, -1))
    assert gallery.image_ids(rows).tolist() == [["e0", last], [f"e{EXEMPLARS - 1}", first]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "held"), [(10, 1 << 30), (3, 8 * QUERIES * 2 * 36), (1000, 0)])
def test_attribution_is_that_of_the_whole(
    tmp_path: Path, blocks: None, kind: Kind, k: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery, mapper = draw_gallery(tmp_path / "features"), draw_mapper(kind, 1)
    queries = mapper.map_synth(draw_queries(gallery)[0])
    mapped = np.concatenate(list(gallery.mapped_blocks(mapper)))
    monkeypatch.setattr(gallery_module, "HELD_BYTES", held)  # few ask for a second walk
    found = attribute_all(gallery, mapper, queries, CALIBRATORS, k=k)
    for name, one in CALIBRATORS.items():
        wanted = similarity.attribute(queries, mapped, k=k, inv_tau=one.inv_tau, b=one.b)
        for field in ("ids", "scores", "influence", "support", "support_mass", "remainder"):
            np.testing.assert_array_equal(getattr(found[name], field), getattr(wanted, field))


def sorted_ranks(
    mapper: Mapper, gallery: Gallery, asked: np.ndarray, queries: Queries, size: int, hard: bool
) -> np.ndarray:
    """By a full sort in float64 of exemplars and `size` distractors; own ones come last where they tie."""
    shuffled = gallery.distractors.vectors()[np.argsort(gallery.places)]
    vectors = mapper.map_real(np.concatenate([gallery.exemplars, shuffled])).astype(np.float64)
    scores = mapper.map_synth(asked).astype(np.float64) @ vectors[: EXEMPLARS + size].T
    ranks = np.full(queries.own.shape, NO_RANK)
    for query, own in enumerate(queries.own):
        own = own[own >= 0]
        others = np.setdiff1d(np.arange(0 if hard else EXEMPLARS, scores.shape[1]), own)
        order = np.argsort(-np.concatenate([scores[query, others], scores[query, own]]), kind="stable")
        ranks[query, : len(own)] = np.sort(np.flatnonzero(order >= len(others)) + 1)
    return ranks


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_are_those_of_a_full_sort(tmp_path: Path, blocks: None, kind: Kind) -> None:
    gallery = draw_gallery(tmp_path / "features")
    asked, queries = draw_queries(gallery)
    one, other = draw_mapper(kind, 2), draw_mapper(kind, 3)
    spaces = {"both": {"object": one, "style": one}, "each": {"object": one, "style": other}}
    found = rank_in_spaces(spaces, asked, queries, gallery, (1, 20, 64, 70, 9999))
    assert list(found["each"].by_size) == [1, 20, 64, 70, DISTRACTORS]

    def check(ranks: Ranks, mapper: Mapper, rows: slice) -> None:
        assert ranks.hard[rows].tolist() == of(mapper, DISTRACTORS, hard=True)[rows].tolist()
        for size, at in ranks.by_size.items():
            assert at[rows].tolist() == of(mapper, size, hard=False)[rows].tolist()

    def of(mapper: Mapper, size: int, *, hard: bool) -> np.ndarray:
        return sorted_ranks(mapper, gallery, asked, queries, size, hard)

    check(found["both"], one, slice(None))
    check(found["each"], one, slice(0, None, 2))
    check(found["each"], other, slice(1, None, 2))


def test_one_walk_from_front_to_back_maps_a_block_once_for_all_who_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery_module, "BLOCK", 64)
    monkeypatch.setattr(gallery_module, "BLOCK_BYTES", 1)
    gallery = draw_gallery(tmp_path / "features")
    asked, queries = draw_queries(gallery)
    one, other = draw_mapper("mlp", 2), draw_mapper("mlp", 3)
    spaces = {"both": {"object": one, "style": one}, "each": {"object": one, "style": other}}
    beside = Attributions(gallery, one, one.map_synth(asked), CALIBRATORS, k=10)
    wanted = attribute_all(gallery, one, one.map_synth(asked), CALIBRATORS, k=10)
    taken: list[np.ndarray] = []
    mapped: list[Mapper] = []
    take, map_real = FeatureSet.take, Mapper.map_real

    def taking(features: FeatureSet, rows: np.ndarray) -> np.ndarray:
        taken.append(rows)
        return take(features, rows)

    def mapping(mapper: Mapper, rows: np.ndarray) -> np.ndarray:
        mapped.append(mapper)
        return map_real(mapper, rows)

    monkeypatch.setattr(FeatureSet, "take", taking)
    monkeypatch.setattr(Mapper, "map_real", mapping)
    rank_in_spaces(spaces, asked, queries, gallery, (20,), beside=[(one, beside.add)])
    walked = [np.arange(DISTRACTORS)[first : first + 64].tolist() for first in range(0, DISTRACTORS, 64)]
    assert [np.sort(rows).tolist() for rows in taken] == walked
    exemplars = 3  # one for each space's mapper
    assert len(mapped) == exemplars + 2 * len(walked)
    for name, found in beside.conclude().items():
        np.testing.assert_array_equal(found.ids, wanted[name].ids)
        np.testing.assert_array_equal(found.influence, wanted[name].influence)


def test_a_gallery_of_exemplars_alone(tmp_path: Path) -> None:
    gallery = draw_gallery(tmp_path / "features", distractors=0)
    asked, queries = draw_queries(gallery)
    mapper = Mapper.identity(DIM)
    found = rank_in_spaces({"raw": dict.fromkeys(("object", "style"), mapper)}, asked, queries, gallery, (5,))
    assert list(found["raw"].by_size) == [0]
    assert found["raw"].own[:, 0].tolist() == [1] * QUERIES
    shown = attribute_all(gallery, mapper, mapper.map_synth(asked), CALIBRATORS, k=40)["after"]
    assert (np.sort(shown.ids, axis=1)[:, 10:] == np.arange(EXEMPLARS)).all()


def test_memory_does_not_grow_with_the_gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither raw nor mapped distractors, nor the scores of all of them, are ever in memory together."""
    monkeypatch.setattr(gallery_module, "BLOCK", 64)
    monkeypatch.setattr(gallery_module, "BLOCK_BYTES", 256 * DIM * 4)
    monkeypatch.setattr(calibrate, "EXACT_ROWS", 100)
    monkeypatch.setattr(score_bins, "PER_UNIT", 64)
    taken: list[int] = []
    take = FeatureSet.take

    def counting(features: FeatureSet, rows: np.ndarray) -> np.ndarray:
        taken.append(len(rows))
        return take(features, rows)

    monkeypatch.setattr(FeatureSet, "take", counting)
    peaks = []
    mapper = draw_mapper("mlp", 0)
    spaces = {name: dict.fromkeys(("object", "style"), mapper) for name in ("one", "two")}
    for distractors in (2_000, 8_000):
        gallery = draw_gallery(tmp_path / str(distractors), distractors=distractors)
        asked, queries = draw_queries(gallery)
        tracemalloc.start()
        calibrate.score_all(gallery, mapper, asked)
        attribute_all(gallery, mapper, mapper.map_synth(asked), CALIBRATORS, k=10)
        rank_in_spaces(spaces, asked, queries, gallery, (1000,))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(taken) == 256
    assert peaks[1] < peaks[0] + 0.1 * 4 * DIM * 6_000
