"""attribution.params: what a section may hold, and what is said when it does not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.params import load_params, read_yaml


@dataclass(frozen=True)
class Inner:
    size: int


@dataclass(frozen=True)
class Params:
    rate: float
    steps: int
    kind: Literal["linear", "mlp"]
    name: str | None
    flips: bool
    betas: tuple[float, float]
    layers: tuple[int, ...]
    inner: Inner
    table: dict[str, Inner]


GOOD: dict[str, Any] = {
    "rate": 0.5,
    "steps": 3,
    "kind": "mlp",
    "name": None,
    "flips": True,
    "betas": [0.9, 0.999],
    "layers": [1, 2, 3],
    "inner": {"size": 4},
    "table": {"a": {"size": 1}, "b": {"size": 2}},
}


@pytest.fixture
def params_file(tmp_path: Path) -> Path:
    return tmp_path / "params.yaml"


def load(path: Path, **changes: Any) -> Params:
    values = {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}
    path.write_text(yaml.safe_dump({"train": {"deep": values}}))
    return load_params(Params, "train.deep", path)


def test_every_kind_of_field_arrives_with_its_type(params_file: Path) -> None:
    assert load(params_file) == Params(
        0.5, 3, "mlp", None, True, (0.9, 0.999), (1, 2, 3), Inner(4), {"a": Inner(1), "b": Inner(2)}
    )


def test_an_int_will_do_for_a_float(params_file: Path) -> None:
    loaded = load(params_file, rate=1, betas=[0, 1])
    assert [type(value) for value in (loaded.rate, *loaded.betas)] == [float, float, float]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": "fast"}, r"train\.deep\.rate: wanted float, got 'fast' \(str\)"),
        ({"rate": True}, r"rate: wanted float, got True \(bool\)"),
        ({"rate": float("nan")}, r"rate: wanted a finite number, got nan"),
        ({"betas": [0.9, float("inf")]}, r"betas\[1\]: wanted a finite number, got inf"),
        ({"steps": 3.0}, r"steps: wanted int, got 3\.0 \(float\)"),
        ({"steps": True}, r"steps: wanted int, got True \(bool\)"),
        ({"steps": None}, r"steps: wanted int, got null"),
        ({"flips": 1}, r"flips: wanted bool, got 1 \(int\)"),
        ({"kind": "conv"}, r"kind: wanted one of linear, mlp, got 'conv'"),
        ({"name": 5}, r"name: wanted str or null, got 5 \(int\)"),
        ({"betas": [0.9]}, r"betas: wanted a list of 2, got \[0\.9\]"),
        ({"betas": 0.9}, r"betas: wanted a list, got 0\.9"),
        ({"layers": [1, "2"]}, r"layers\[1\]: wanted int, got '2' \(str\)"),
        ({"inner": 4}, r"inner: wanted a mapping with the keys of Inner, got 4"),
        ({"inner": {"sise": 4}}, r"inner: unknown key sise; missing key size; wanted: size"),
        ({"table": {"a": {"size": "x"}}}, r"table\.a\.size: wanted int, got 'x'"),
        ({"table": {1: {"size": 1}}}, r"table: wanted a mapping with text keys"),
        ({"steps": ...}, r"train\.deep: missing key steps; wanted: rate, steps, kind"),
        ({"step": 3}, r"train\.deep: unknown key step; wanted: rate"),
    ],
)
def test_a_wrong_value_is_refused_by_name(params_file: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(params_file, **changes)


def test_a_default_in_the_class_does_not_make_a_key_optional(params_file: Path) -> None:
    @dataclass(frozen=True)
    class WithDefault:
        size: int = 3

    params_file.write_text("train: {}\n")
    with pytest.raises(ValueError, match="missing key size"):
        load_params(WithDefault, "train", params_file)


def test_what_the_class_itself_refuses_is_said_with_its_place(params_file: Path) -> None:
    @dataclass(frozen=True)
    class Positive:
        size: int

        def __post_init__(self) -> None:
            if self.size < 1:
                raise ValueError(f"size {self.size}: wanted 1 or more")

    params_file.write_text("train:\n  size: 0\n")
    with pytest.raises(ValueError, match=r"params\.yaml: train: size 0: wanted 1 or more"):
        load_params(Positive, "train", params_file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("other: {}\n", r"no section train\.deep; the file has: other"),
        ("train:\n  shallow: 1\n", r"no section train\.deep; train has: shallow"),
        ("train: 5\n", r"no section train\.deep; train has: 5"),
        ("", r"no section train\.deep; the file has: nothing"),
        ("train: [\n", "not YAML"),
        ("train:\n  a: 1\n  a: 2\n", r"not YAML: key a twice"),
        ("train: !!python/object/apply:os.getcwd []\n", "not YAML"),
    ],
)
def test_a_wrong_file_is_refused_by_name(params_file: Path, text: str, message: str) -> None:
    params_file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_params(Params, "train.deep", params_file)
    assert str(params_file) in str(error.value)


def test_a_file_that_is_no_utf_8_is_named(params_file: Path) -> None:
    params_file.write_bytes("# café\ntrain: {}\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"\.yaml: not UTF-8 \(a byte 0xe9 out of place\); save it as UTF-8"):
        load_params(Params, "train", params_file)


def test_a_missing_file_says_where_to_stand(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml: no such file; run from the repository's root"):
        load_params(Params, "train", tmp_path / "gone.yaml")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "1.0e-4", "+1e-4", "0.0001"])
def test_floats_are_read_as_dvc_reads_them(params_file: Path, text: str) -> None:
    params_file.write_text(f"x: {text}\n")
    assert read_yaml(params_file) == {"x": 1e-4}


@pytest.mark.parametrize("text", ["1e", "e4", "abc1e4", "1e-4x"])
def test_what_is_no_float_stays_text(params_file: Path, text: str) -> None:
    params_file.write_text(f"x: {text}\n")
    assert read_yaml(params_file) == {"x": text}


@settings(deadline=None, max_examples=40)
@given(
    rate=st.floats(allow_nan=False, allow_infinity=False),
    steps=st.integers(),
    layers=st.lists(st.integers(), max_size=4),
)
def test_values_survive_the_file(
    tmp_path_factory: pytest.TempPathFactory, rate: float, steps: int, layers: list[int]
) -> None:
    loaded = load(tmp_path_factory.mktemp("params") / "params.yaml", rate=rate, steps=steps, layers=layers)
    assert (loaded.rate, loaded.steps, loaded.layers) == (rate, steps, tuple(layers))


def test_aliases_and_merges_are_plain_yaml(params_file: Path) -> None:
    params_file.write_text("a: &a\n  size: 1\nb:\n  <<: *a\nc: *a\n")
    assert load_params(Inner, "b", params_file) == load_params(Inner, "c", params_file) == Inner(1)


def test_the_repository_own_featurize_section_is_whole() -> None:
    from stages.featurize import Params as FeaturizeParams

    params = load_params(FeaturizeParams, "featurize")
    assert {"pixels", "color_histogram", "untrained"} <= set(params.backbones)


@dataclass(frozen=True)
class Optional:
    size: int
    revision: str | None = None


@pytest.mark.parametrize("said", [{}, {"revision": None}, {"revision": "abc"}])
def test_null_may_go_unsaid_where_the_record_says_so(params_file: Path, said: dict[str, Any]) -> None:
    params_file.write_text(yaml.safe_dump({"train": {"size": 1, **said}}))
    assert load_params(Optional, "train", params_file) == Optional(1, said.get("revision"))
    params_file.write_text(yaml.safe_dump({"train": said}))
    with pytest.raises(ValueError, match="missing key size; wanted: size, revision"):
        load_params(Optional, "train", params_file)
    params_file.write_text(yaml.safe_dump({"train": {"size": 1, "revision": 3}}))
    with pytest.raises(ValueError, match=r"revision: wanted str or null, got 3"):
        load_params(Optional, "train", params_file)


def test_a_mapping_that_may_be_null_says_what_is_wrong_inside(params_file: Path) -> None:
    @dataclass(frozen=True)
    class Outer:
        inner: Inner | None

    params_file.write_text(yaml.safe_dump({"train": {"inner": {"sise": 4}}}))
    with pytest.raises(ValueError, match=r"inner: unknown key sise; missing key size; wanted: size"):
        load_params(Outer, "train", params_file)
    for wrong in (3, "x"):
        params_file.write_text(yaml.safe_dump({"train": {"inner": wrong}}))
        with pytest.raises(ValueError, match=r"inner: wanted Inner or null, got"):
            load_params(Outer, "train", params_file)
