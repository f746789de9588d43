"""The README's result table is that of metrics/."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from attribution.files import read_json
from stages.report import between_markers, read_results, render_gates, render_tables, rewrite

ROOT = Path(__file__).resolve().parents[1]


def numbers(value: float) -> dict:
    names = ("recall_at_10", "mean_average_precision")
    return {name: value for name in names} | {
        f"{name}_interval": [value - 0.05, value + 0.05] for name in names
    }


def result(backbone: str, mapped: float) -> dict:
    variants = {"own_kind": mapped, "own_kind_permuted": 0.1, "own_kind_minus_raw": mapped - 0.2} | {
        "raw": 0.2,
        "mapped": mapped,
        "whitening": 0.25,
        "permuted": 0.21,
        "mapped_minus_raw": mapped - 0.2,
    }
    cell = {
        "queries": 2300,
        "customized_models": 110,
        "chance": {"recall_at_10": 0.0005},
        "ceiling": {"recall_at_10": 1.0},
        **{name: numbers(value) for name, value in variants.items()},
    }
    tables = {"object": {"all": cell}}
    return {"backbone": backbone, "gallery": {"distractors": 20000}, **tables, "hard_gallery": tables}


@pytest.fixture
def committed() -> None:
    """README is of the committed metrics: a run on another machine may have made others since."""
    diff = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "metrics"], cwd=ROOT, check=False)
    if diff.returncode == 1:
        pytest.skip("metrics/ is not as committed; to show these in README: python -m stages.report")


@pytest.mark.usefixtures("committed")
def test_the_readme_holds_the_table_of_the_metrics() -> None:
    results = read_results(ROOT / "metrics")
    shown = between_markers((ROOT / "README.md").read_text(), "results")
    tables, _, note = shown.rpartition("\n\n")
    assert tables == render_tables(results), "README.md: run: python -m stages.report"
    if results:
        assert re.search(r"Made at commit [0-9a-f]{10}", note)


@pytest.mark.usefixtures("committed")
def test_the_readme_holds_the_gates_of_the_metrics() -> None:
    reports = [read_json(ROOT / "metrics" / f"{name}.json") for name in ("gate", "gate_customized")]
    shown = between_markers((ROOT / "README.md").read_text(), "gates")
    assert shown == render_gates(*reports), "README.md: run: python -m stages.report"
    assert f"| noun | {reports[0]['readings']['noun']['share']:.1%} (" in shown


def test_rows_are_ordered_and_controls_come_last(tmp_path: Path) -> None:
    for one in (result("pixels", 0.9), result("clip", 0.5), result("ssl", 0.6)):
        (tmp_path / f"{one['backbone']}.json").write_text(json.dumps(one))
    (tmp_path / "gate.json").write_text('{"class": 0.9}')
    tables = render_tables(read_results(tmp_path))
    rows = [line.split("|")[1].strip() for line in tables.splitlines() if line.startswith("| ")]
    assert rows == ["backbone", "ssl", "clip", "pixels (control)"]
    assert "2,300 queries of 110 customized models, 20,000 distractors" in tables
    assert "0.500 (0.450 to 0.550)" in tables
    assert "+0.300 (+0.250 to +0.350)" in tables
    assert "Styles" not in tables


def test_a_result_of_one_model_has_no_interval() -> None:
    one = result("clip", 0.5)
    one["object"]["all"]["raw"]["recall_at_10_interval"] = None
    assert "0.200 (no interval)" in render_tables([one])


def test_rewrite_touches_only_what_is_between_the_markers() -> None:
    begin, end = "<!-- results:begin -->", "<!-- results:end -->"
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    assert rewrite(text, "results", "new") == f"before\n{begin}\nnew\n{end}\nafter\n"
    assert between_markers(rewrite(text, "results", "a\n\nb"), "results") == "a\n\nb"
    for broken in (f"{end}\n{begin}", f"{begin}\n", f"{text}{text}"):
        with pytest.raises(ValueError, match="README: wanted one line <!-- results:begin -->"):
            rewrite(broken, "results", "new")
