"""The tables and the picture of the benchmark of methods; its choice of concepts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from benchmarks import transfer
from benchmarks.transfer import choose
from benchmarks.transfer_plot import plot, tables

METHODS = ("textual_inversion", "lora")


def report() -> dict[str, Any]:
    cell = {"recall_at_10": 0.25, "interval": [0.125, 0.5]}
    near = {"share": 0.75, "interval_low": 0.5, "interval_high": 1.0}
    cost = {"cpu_seconds_per_model": 3.5, "bytes_per_model": 113_000}
    recall = {tested: {row: cell for row in ("raw", *METHODS, "permuted")} for tested in METHODS}
    recall["lora"]["textual_inversion"] = {"recall_at_10": 0.5, "interval": [0.25, 0.75]}
    return {
        "methods": dict.fromkeys(METHODS, cost),
        "own_exemplar_nearer": {"clip": dict.fromkeys(("base", *METHODS), near)},
        "recall": {"clip": recall},
        "distractors": 20000,
        "concepts": {"test": 32},
    }


def test_tables_have_a_row_for_each_mapper_and_a_column_for_each_method() -> None:
    lines = tables(report()).splitlines()
    assert "| base | 0.750 (0.500 to 1.000) |  |  |" in lines
    assert "| lora | 0.750 (0.500 to 1.000) | 3.5 | 113.0 |" in lines
    assert "| clip: mapper from | textual_inversion | lora |" in lines
    assert "| textual_inversion | 0.250 (0.125 to 0.500) | 0.500 (0.250 to 0.750) |" in lines


def test_the_picture_is_a_picture(tmp_path: Path) -> None:
    plot(report(), tmp_path / "transfer.png")
    with Image.open(tmp_path / "transfer.png") as picture:
        assert min(picture.size) > 300


def test_a_larger_choice_holds_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    world = [
        SimpleNamespace(concept_id=f"{split}{i}", kind="object" if i else "style", split=split)
        for split in transfer.SPLITS
        for i in range(9)
    ]
    monkeypatch.setattr(transfer, "read_concepts", lambda path: world)
    small, large = ({one.concept_id for one in choose((n, n, n), seed=7)} for n in (3, 6))
    assert small < large
    assert len(large) == 18
    assert not large & {"train0", "val0", "test0"}
    with pytest.raises(ValueError, match="--train 9: the world has 8 object concepts of it"):
        choose((9, 0, 0), seed=7)
