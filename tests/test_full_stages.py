"""The benchmark of training and judging among many distractors, on a small world."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import full_stages


def test_a_small_run_tells_time_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"distractors": 300, "dim": 80, "train-models": 8, "val-models": 4, "test-models": 6}
    sizes |= {"queries-per-model": 4}
    output = tmp_path / "result.json"
    output.write_text('{"earlier": 1}')
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    arguments += [f"--output={output}", f"--folder={tmp_path / 'world'}", "--mapper=mlp"]
    monkeypatch.setattr(sys, "argv", ["full_stages", *arguments])
    full_stages.main()
    report = json.loads(output.read_text())
    assert report["earlier"] == 1
    assert report["now"]["mapper"] == "mlp"
    rows = report["now"]["rows"]
    assert [row["stage"] for row in rows] == ["train_mapper", "calibrate", "evaluate"]
    assert set(rows[0]) - set(rows[1]) == {"seconds_an_epoch"}
    for row in rows:
        assert row["seconds"] > 0
        assert 1e7 < row["peak_anonymous_bytes"] < row["peak_resident_bytes"]
    metrics = json.loads((tmp_path / "world" / "metrics.json").read_text())
    assert metrics["gallery"]["distractors"] == 300
    assert metrics["object"]["all"]["raw"]["recall_at_10"] < 1

    # Asked for another world than the folder has, it tells what the folder has.
    monkeypatch.setattr(
        sys, "argv", ["full_stages", *arguments, "--distractors=9", "--label=again", "--stages=calibrate"]
    )
    full_stages.main()
    report = json.loads(output.read_text())
    assert [row["stage"] for row in report["again"]["rows"]] == ["calibrate"]
    assert report["again"]["distractors"] == report["now"]["distractors"] == 300
