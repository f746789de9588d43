"""Mappers: identity, normalization, whitening, files and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from attribution.mapper import Mapper, apply_head, normalize, whitening

KINDS = ("linear", "scale", "mlp")


def features(rows: int = 50, dim: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


def any_mapper(kind: str, dim: int = 6) -> Mapper:
    rng = np.random.default_rng(1)
    start = Mapper.identity(dim, kind, hidden=4)  # type: ignore[arg-type]
    heads = [
        {name: rng.standard_normal(t.shape).astype(np.float32) for name, t in head.items()}
        for head in (start.real, start.synth)
    ]
    return Mapper(start.kind, heads[0], heads[1], {"backbone": "clip"})


@pytest.mark.parametrize("kind", KINDS)
def test_identity_only_normalizes(kind: str) -> None:
    mapper = Mapper.identity(6, kind, hidden=4)  # type: ignore[arg-type]
    x = 7 * features()
    for mapped in (mapper.map_real(x), mapper.map_synth(x)):
        np.testing.assert_allclose(mapped, x / np.linalg.norm(x, axis=1, keepdims=True), rtol=1e-5)
        assert mapped.dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_survives_a_round_trip_in_equal_bytes(kind: str, tmp_path: Path) -> None:
    mapper = any_mapper(kind)
    for name in ("a", "b"):
        mapper.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = Mapper.load(tmp_path / "a", backbone="clip", dim=6)
    assert (again.kind, again.config) == (kind, {"backbone": "clip"})
    x = features()
    assert np.array_equal(again.map_real(x), mapper.map_real(x))
    assert np.array_equal(again.map_synth(x), mapper.map_synth(x))
    assert not np.array_equal(mapper.map_real(x), mapper.map_synth(x))


def test_heads_compute_what_they_say() -> None:
    x = features(3)
    linear, scale, mlp = (any_mapper(kind).real for kind in ("linear", "scale", "mlp"))
    np.testing.assert_allclose(
        apply_head("linear", linear, x),
        np.einsum("oi,ri->ro", linear["weight"], x) + linear["bias"],
        rtol=1e-5,
    )
    np.testing.assert_array_equal(apply_head("scale", scale, x), x * scale["scale"])
    hidden = np.maximum(np.einsum("hi,ri->rh", mlp["weight_in"], x) + mlp["bias_in"], 0)
    wanted = x + np.einsum("oh,rh->ro", mlp["weight_out"], hidden) + mlp["bias_out"]
    np.testing.assert_allclose(apply_head("mlp", mlp, x), wanted, rtol=1e-4)


def test_rows_do_not_depend_on_what_is_mapped_with_them() -> None:
    mapper, x = any_mapper("linear"), features(9000)
    np.testing.assert_allclose(mapper.map_real(x)[8190:8200], mapper.map_real(x[8190:8200]), atol=1e-6)


def test_a_row_of_zeros_stays_zero() -> None:
    assert normalize(np.zeros((1, 3), np.float32)).tolist() == [[0, 0, 0]]


def test_whitening_leaves_no_correlation_on_either_side() -> None:
    mix = np.eye(6, dtype=np.float32) + 0.3 * features(6, 6, seed=3)
    real, synth = 2 + features(40_000, seed=1) @ mix, -1 + features(3000, seed=2) @ mix.T
    real = real[np.argsort(real[:, 0])]  # no part of the rows is like the whole
    mapper = whitening(real, synth, shrinkage=1e-6)
    for head, x in ((mapper.real, real), (mapper.synth, synth)):
        white = apply_head("linear", head, x)
        np.testing.assert_allclose(white.mean(axis=0), 0, atol=0.02)
        covariance = np.cov(white.T)
        np.testing.assert_allclose(covariance / covariance[0, 0], np.eye(6), atol=0.03)


def test_whitening_stands_constant_features() -> None:
    x = features(100)
    x[:, 2] = 5.0
    mapper = whitening(x, np.ones((10, 6), np.float32), shrinkage=0.01)
    assert np.isfinite(mapper.map_real(x)).all()
    assert np.isfinite(mapper.map_synth(x)).all()


def test_wrong_dim_is_refused() -> None:
    with pytest.raises(ValueError, match="wanted features of dim 6, got 5"):
        Mapper.identity(6).map_real(features(2, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.eye(5, dtype=np.float32)}, r"real.weight: wanted shape \(6, 6\), got \(5, 5\)"),
        ({"bias": np.full(6, np.nan, np.float32)}, "real.bias: holds NaN or infinity"),
        (
            {"extra": np.ones(1, np.float32)},
            "linear head real: wanted tensors weight, bias, got weight, bias, extra",
        ),
    ],
)
def test_unsound_tensors_are_refused(change: dict, message: str) -> None:
    good = Mapper.identity(6, "linear")
    with pytest.raises(ValueError, match=message):
        Mapper("linear", {**good.real, **change}, good.synth)


def test_heads_of_different_dims_are_refused() -> None:
    with pytest.raises(ValueError, match="got real 6 and synth 5"):
        Mapper("scale", Mapper.identity(6).real, Mapper.identity(5).synth)


def test_files_that_are_no_mapper_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError, match=r"m.safetensors: no such file; run: dvc repro train_mapper"):
        Mapper.load(path)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match=r"m.safetensors: not a mapper"):
        Mapper.load(path)
    save_file({"x": np.ones(1, np.float32)}, path, metadata={"config": json.dumps({"kind": "cubic"})})
    with pytest.raises(
        ValueError, match=r"m.safetensors: wanted a mapper of kind linear \| scale \| mlp, got 'cubic'"
    ):
        Mapper.load(path)
    any_mapper("linear").save(path)
    with pytest.raises(
        ValueError, match=r"m.safetensors: wanted a mapper for backbone ssl, got one for clip"
    ):
        Mapper.load(path, backbone="ssl")
    with pytest.raises(ValueError, match=r"m.safetensors: wanted a mapper for dim 7, got one for 6"):
        Mapper.load(path, dim=7)


def test_mappers_of_one_kind_are_stored_beside_the_main_one(tmp_path: Path) -> None:
    main, style = any_mapper("linear"), any_mapper("scale")
    main.save(tmp_path / "m", own_kind={"style": style})
    x = features()
    assert np.array_equal(Mapper.load(tmp_path / "m", backbone="clip").map_real(x), main.map_real(x))
    found = Mapper.load(tmp_path / "m", backbone="clip", own_kind="style")
    assert (found.kind, found.config) == ("scale", style.config)
    assert np.array_equal(found.map_synth(x), style.map_synth(x))
    # A kind without its own is served by the main one.
    assert np.array_equal(Mapper.load(tmp_path / "m", own_kind="object").map_real(x), main.map_real(x))


def test_whitening_turns_nothing() -> None:
    """A root that is symmetric and positive: both sides stay in the axes they share."""
    mix = np.eye(6, dtype=np.float32) + 0.3 * features(6, 6, seed=3)
    mapper = whitening(features(3000, seed=1) @ mix, features(3000, seed=2) @ mix.T, shrinkage=0.01)
    for head in (mapper.real, mapper.synth):
        np.testing.assert_allclose(head["weight"], head["weight"].T, atol=1e-5)
        assert np.linalg.eigvalsh(head["weight"].astype(np.float64)).min() > 0


def test_shrinkage_is_relative_to_the_features() -> None:
    real, synth = features(500, seed=1), features(500, seed=2)
    here, there = whitening(real, synth, shrinkage=0.5), whitening(10 * real, 10 * synth, shrinkage=0.5)
    np.testing.assert_allclose(there.map_real(10 * real), here.map_real(real), atol=1e-4)
    np.testing.assert_allclose(there.real["weight"], here.real["weight"], rtol=1e-3, atol=1e-4)
    few = features(500, seed=1) * np.linspace(0.1, 3, 6, dtype=np.float32)
    covariance = np.cov(few.T, bias=True)
    level = np.trace(covariance) / 6
    wanted = np.linalg.inv(covariance / level + 0.5 * np.eye(6))
    weight = whitening(few, few, shrinkage=0.5).real["weight"].astype(np.float64)
    np.testing.assert_allclose(weight @ weight, wanted, rtol=1e-3, atol=1e-4)
