"""Cuts guessed from a sample of the blocks change no bit, however rows lie and guesses turn out."""

import itertools

import numpy as np
import pytest
import torch

from attribution import similarity
from tests.test_similarity import SHARP, assert_same

ROWS, DIM = 17 * 8 * 96 + 50, 24  # a sample is of one block in eight, of sixteen and more
ARRANGEMENTS = ("shuffled", "by class", "ascending", "descending", "copies", "equal")


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def world(arrangement: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries near classes of 250 rows each, and these rows."""
    rng = np.random.default_rng(len(arrangement) * 100 + count)
    classes = rng.standard_normal((ROWS // 250 + 1, DIM), np.float32)
    which = np.arange(ROWS) // 250
    gallery = unit(classes[which] + 0.5 * rng.standard_normal((ROWS, DIM), np.float32))
    queries = unit(classes[rng.integers(0, len(classes), count)] + 0.3)
    if arrangement == "shuffled":
        gallery = rng.permutation(gallery)
    elif arrangement in ("ascending", "descending"):
        order = np.argsort(gallery @ queries[0])
        gallery = gallery[order if arrangement == "ascending" else order[::-1]]
    elif arrangement == "copies":
        gallery = gallery[which * 250]
    elif arrangement == "equal":
        gallery = np.repeat(gallery[:1], ROWS, axis=0)
    return queries, gallery


@pytest.fixture(params=["likely", "wrong"])
def guesses(request, monkeypatch) -> str:
    monkeypatch.setenv("ATTRIBUTION_GUESSES", "wrong" if request.param == "wrong" else "")
    return request.param


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize(("count", "k"), [(16, 32), (16, 400), (40, 100), (40, ROWS)])
def test_guesses_agree_with_the_reference(arrangement: str, count: int, k: int, guesses: str) -> None:
    queries, gallery = world(arrangement, count)
    want = similarity.attribute(queries, gallery, k=k, impl="reference", **SHARP)
    assert_same(want, similarity.attribute(queries, gallery, k=k, **SHARP), exact=False)
    ids, scores = similarity.search(queries, gallery, k=k)
    np.testing.assert_array_equal(ids, want.ids)
    np.testing.assert_array_equal(scores, want.scores)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [(400.0, -0.5), (16.0, -1e-6)])  # a narrow one, and a wide one
def test_guesses_from_codes_and_from_halves(
    arrangement: str, dtype: torch.dtype, window: tuple[float, float], guesses: str
) -> None:
    inv_tau, b = window
    queries, values = world(arrangement, 20)
    gallery = torch.from_numpy(values.copy()).to(dtype)
    want = similarity.attribute(queries, gallery, k=64, inv_tau=inv_tau, b=b, impl="reference")
    for held in (gallery, similarity.compress(gallery)):
        for threads in (1, 3):
            got = similarity.attribute(queries, held, k=64, inv_tau=inv_tau, b=b, threads=threads)
            assert_same(want, got, exact=False)


def test_guesses_over_shards(guesses: str) -> None:
    queries, gallery = world("by class", 33)
    whole = similarity.attribute(queries, gallery, k=100, **SHARP)
    cuts = [0, 7, 7, 1000, 5000, 5001, ROWS]
    shards = [gallery[a:b] for a, b in itertools.pairwise(cuts)]
    assert_same(whole, similarity.attribute(queries, shards, k=100, **SHARP))


@pytest.mark.parametrize("first", [0, 96 * 5 + 1, 96 * 100, ROWS - 1])
def test_the_first_bad_row_is_named_though_a_sample_is_read_before(first: int, guesses: str) -> None:
    queries, gallery = world("shuffled", 20)
    gallery[first::97] = np.nan
    with pytest.raises(ValueError, match=f"gallery row {first}: wanted finite values"):
        similarity.attribute(queries, gallery, k=100, **SHARP)
