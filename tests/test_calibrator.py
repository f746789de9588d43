"""The calibrator against the reference's recorded outputs, its limits, and its fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from attribution.calibrator import Calibrator, fit, relaxed_loss

VECTORS = json.loads((Path(__file__).parent / "reference" / "calibrator_and_ap.json").read_text())
REFUSED = {
    "bias_exactly_minus_one",
    "bias_below_minus_one",
    "positive_bias",
    "zero_inv_tau",
    "negative_inv_tau",
}
ACCEPTED = sorted(set(VECTORS["influence"]) - REFUSED)


def numbers(rows: list) -> np.ndarray:
    return np.array([[float(value) for value in row] for row in rows])


@pytest.mark.parametrize("name", ACCEPTED)
def test_influence_agrees_with_the_reference(name: str) -> None:
    case = VECTORS["influence"][name]
    influence = Calibrator(case["inv_tau"], case["effective_bias"]).influence(numbers(case["scores"]))
    # The reference computed in float32.
    np.testing.assert_allclose(influence, numbers(case["out"]), atol=1e-6)
    np.testing.assert_allclose(influence.sum(axis=1), 1.0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_values_out_of_range_are_refused(name: str) -> None:
    case = VECTORS["influence"][name]
    with pytest.raises(ValueError, match="wanted inv_tau > 0 and -1 < b <= 0, got inv_tau"):
        Calibrator(case["inv_tau"], case["effective_bias"])


@pytest.mark.parametrize("name", sorted(VECTORS["loss"]))
def test_loss_agrees_with_the_reference(name: str) -> None:
    case = VECTORS["loss"][name]
    scores = numbers(case["selected_score"])
    own = np.arange(scores.shape[1])[None] < np.array(case["count_gt"])[:, None]
    loss, slope = relaxed_loss(scores, own, case["inv_tau"], case["bias_param"] * 0.001)
    # The reference rounds to float32: 1e-6 relative on a loss of 8.6.
    np.testing.assert_allclose(loss, case["per_row"], rtol=1e-6, atol=1e-6)
    assert loss.mean() == pytest.approx(case["mean"], rel=1e-6, abs=1e-6)
    if "grad_inv_tau" in case:
        assert slope[:, 0].mean() == pytest.approx(case["grad_inv_tau"], abs=1e-6)
        assert slope[:, 1].mean() * 0.001 == pytest.approx(case["grad_bias_param"], abs=1e-6)


@pytest.mark.parametrize(
    ("x", "softplus"), [(float(x), y) for x, y in VECTORS["softplus"].items() if -1 < float(x) <= 0]
)
def test_softplus_agrees_with_the_reference(x: float, softplus: float) -> None:
    # One own item at the top (e = 1) and one so far below that t is softplus(b) alone.
    far = np.array([[0.0, -1e6]])
    loss, _ = relaxed_loss(far, np.array([[False, True]]), 1.0, x)
    top, _ = relaxed_loss(far, np.array([[True, False]]), 1.0, x)
    assert np.exp(top - loss)[0] * (1 + x) == pytest.approx(softplus, rel=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    scores=arrays(np.float64, (3, 7), elements=st.floats(-1, 1)),
    inv_tau=st.floats(0.1, 200),
    b=st.floats(-0.9, 0),
    shift=st.floats(-5, 5),
)
def test_influence_properties(scores: np.ndarray, inv_tau: float, b: float, shift: float) -> None:
    calibrator = Calibrator(inv_tau, b)
    influence = calibrator.influence(scores)
    assert (influence >= 0).all()
    np.testing.assert_allclose(influence.sum(axis=1), 1.0)
    np.testing.assert_allclose(calibrator.influence(scores + shift), influence, atol=1e-9)
    order = np.random.default_rng(0).permutation(7)
    np.testing.assert_allclose(calibrator.influence(scores[:, order]), influence[:, order], atol=1e-12)
    lower = Calibrator(inv_tau, (b - 0.95) / 2)
    assert ((lower.influence(scores) > 0).sum(axis=1) <= (influence > 0).sum(axis=1)).all()
    # Nothing below the reach gets anything, and adding such items changes nothing.
    below = scores.max(axis=1, keepdims=True) - min(calibrator.reach() + 0.01, 1e6)
    if b < 0:
        more = calibrator.influence(np.concatenate([scores, below], axis=1))
        np.testing.assert_allclose(more[:, :-1], influence, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    scores=arrays(np.float64, (2, 6), elements=st.floats(-1, 1)),
    inv_tau=st.floats(0.5, 60),
    b=st.floats(-0.8, -0.001),
)
def test_slopes_are_those_of_the_loss(scores: np.ndarray, inv_tau: float, b: float) -> None:
    own = np.array([[True, False, True, False, False, False], [False, True, False, False, False, False]])
    _, slope = relaxed_loss(scores, own, inv_tau, b)
    step = 1e-6
    for column, (by_inv_tau, by_b) in enumerate([(step, 0.0), (0.0, step)]):
        upper, _ = relaxed_loss(scores, own, inv_tau + by_inv_tau, b + by_b)
        lower, _ = relaxed_loss(scores, own, inv_tau - by_inv_tau, b - by_b)
        np.testing.assert_allclose(slope[:, column], (upper - lower) / (2 * step), rtol=1e-3, atol=1e-5)


def test_single_precision_scores_give_the_same_loss() -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(-0.2, 0.6, (8, 2000))
    own = np.zeros(scores.shape, dtype=bool)
    own[np.arange(8), np.arange(8)] = True
    wide, wide_slope = relaxed_loss(scores, own, 18.0, -0.05)
    narrow, narrow_slope = relaxed_loss(scores.astype(np.float32), own, 18.0, -0.05)
    np.testing.assert_allclose(narrow, wide, rtol=1e-5)
    np.testing.assert_allclose(narrow_slope, wide_slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_named(bad: float) -> None:
    with pytest.raises(ValueError, match="row 1 holds NaN or"):
        Calibrator(1.0, 0.0).influence(np.array([[0.1, 0.2], [bad, 0.2]]))
    with pytest.raises(ValueError, match="row 0 holds NaN or"):
        Calibrator(1.0, 0.0).influence(np.empty((1, 0)))


def test_a_query_without_own_exemplars_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="query 1 has no exemplar in the gallery"):
        relaxed_loss(np.zeros((2, 2)), np.array([[True, False], [False, False]]), 1.0, 0.0)


def planted(inv_tau: float, queries: int, gallery: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores whose own item is drawn from the softmax itself: its true inv_tau is known."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 0.5, (queries, gallery))
    weights = np.exp(inv_tau * scores)
    own = np.zeros(scores.shape, dtype=bool)
    for row, chances in enumerate(weights / weights.sum(axis=1, keepdims=True)):
        own[row, rng.choice(gallery, p=chances)] = True
    return scores, own


def test_fit_finds_the_planted_temperature_and_a_minimum() -> None:
    scores, own = planted(20.0, 1500, 30)
    found = fit(scores, own, start=Calibrator(1.0, 0.0))
    assert found.inv_tau == pytest.approx(20.0, rel=0.15)
    assert -0.05 < found.b <= 0
    least = relaxed_loss(scores, own, found.inv_tau, found.b)[0].mean()
    assert least < relaxed_loss(scores, own, 1.0, 0.0)[0].mean() - 0.2
    for inv_tau, b in ((1.02, 1.0), (0.98, 1.0), (1.0, 1.1), (1.0, 0.9)):
        assert least <= relaxed_loss(scores, own, found.inv_tau * inv_tau, found.b * b)[0].mean() + 1e-9
    assert fit(scores, own, start=Calibrator(1.0, 0.0)) == found


def test_fit_learns_a_threshold_where_most_of_the_gallery_is_noise() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(0, 0.05, (40, 3000)).astype(np.float32)
    own = np.zeros(scores.shape, dtype=bool)
    own[:, 0] = True
    scores[:, 0] = 0.5 + rng.normal(0, 0.03, 40)
    found = fit(scores, own, start=Calibrator(1.0, 0.0))
    influence = found.influence(scores)
    assert influence[:, 0].mean() > 0.95
    assert (influence > 0).sum(axis=1).mean() < 3


def test_survives_a_round_trip(tmp_path: Path) -> None:
    Calibrator(16.1587, -0.0385).save(tmp_path / "c.json", backbone="clip")
    assert Calibrator.load(tmp_path / "c.json") == Calibrator(16.1587, -0.0385)
    assert json.loads((tmp_path / "c.json").read_text())["backbone"] == "clip"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1.0, 0.0]", "c.json: wanted numbers inv_tau and b, got no inv_tau and no b"),
        ('{"inv_tau": 1.0}', "c.json: wanted numbers inv_tau and b, got no b"),
        ('{"inv_tau": 1.0, "b": -1.0}', "c.json: calibrator: wanted inv_tau > 0 and -1 < b <= 0"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Calibrator.load(tmp_path / "c.json")


def test_reach_of_the_released_calibrator() -> None:
    assert Calibrator(16.1587, -0.0385).reach() == pytest.approx(0.2016, abs=1e-4)
    assert Calibrator(16.1587, 0.0).reach() == np.inf


def test_a_missing_calibrator_is_named_with_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"clip\.json: no such file; run: dvc repro calibrate$"):
        Calibrator.load(tmp_path / "clip.json")


@pytest.mark.parametrize("b", [-0.85, -0.99])
def test_own_exemplars_far_below_the_best_have_a_finite_loss(b: float) -> None:
    """Their t is 1e-39 and less, which float32 holds badly or not at all."""
    scores = np.array([[-0.5, 0.9, 0.2], [-0.4, 0.8, 0.1]])
    own = np.array([[True, False, False]] * 2)
    wide, wide_slope = relaxed_loss(scores, own, 60.0, b)
    narrow, narrow_slope = relaxed_loss(scores.astype(np.float32), own, 60.0, b)
    np.testing.assert_allclose(narrow, wide, rtol=1e-5)
    np.testing.assert_allclose(narrow_slope, wide_slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("start", [Calibrator(1.0, 0.0), Calibrator(0.01, -0.9), Calibrator(1e5, -0.999)])
def test_fit_does_not_depend_on_where_it_starts(start: Calibrator) -> None:
    scores, own = planted(20.0, 300, 30)
    found, wanted = fit(scores, own, start=start), fit(scores, own, start=Calibrator(20.0, -0.001))
    losses = [relaxed_loss(scores, own, one.inv_tau, one.b)[0].mean() for one in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
