"""Rewrites the result and gate tables in README.md, between their markers, from metrics/*.json.

In:   metrics/<backbone>.json, metrics/gate.json, metrics/gate_customized.json, README.md
Out:  README.md
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attribution.command import command_line
from attribution.files import atomic_path, read_json

NO_WEIGHTS = ("pixels", "color_histogram", "untrained")
LEGEND = (
    "Means with 95 % intervals, resampled by customized model. *Raw*: the backbone's features. *Whitening*: "
    "both sides whitened, no pairs. *Mapped*: one mapper from pairs of both kinds; *own kind*: one from "
    "pairs of this kind alone (that of both, where these are too few). *Permuted*: the same training, each "
    "concept paired with another's exemplars. "
    "*Hard gallery*: the exemplars of all other concepts compete too."
)
RECALL_COLUMNS = ("raw", "whitening", "mapped", "permuted", "own_kind", "own_kind_permuted")
TITLES = {"object": "Objects", "style": "Styles"}


def render_tables(results: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table per kind: one row per backbone, best of own kind first, weightless controls last."""
    return "\n\n".join(
        _table(kind, [result for result in results if kind in result])
        for kind in TITLES
        if any(kind in result for result in results)
    )


def read_results(metrics_dir: Path) -> list[dict[str, Any]]:
    """All results of backbones in the folder; other metrics are passed over."""
    found = [read_json(path) for path in sorted(metrics_dir.glob("*.json"))]
    return [metrics for metrics in found if isinstance(metrics, dict) and "backbone" in metrics]


def render_gates(base: Mapping[str, Any], customized: Mapping[str, Any]) -> str:
    """Two Markdown tables: what is read from the base model's samples, and whose exemplar is the nearer."""
    lines = [
        f"| read from {base['prompts']} samples of the base model | right | wanted | permuted prompts "
        "| chance | renderings |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in base["readings"].items():
        wanted = f"{base['wanted'][name]:.0%}" if name in base["wanted"] else ""
        share = f"{row['share']:.1%} ({row['interval_low']:.1%} to {row['interval_high']:.1%})"
        controls = f"{row['permuted']:.1%} | {row['chance']:.1%} | {row['rendered']:.1%}"
        lines.append(f"| {name} | {share} | {wanted} | {controls} |")
    lines += [
        "",
        "| nearer to their own exemplar than to another of the class, in | customized | wanted | base model "
        "| chance |",
        "|---|---|---|---|---|",
    ]
    for name, space in customized["spaces"].items():
        shares = [
            f"{row['share']:.1%} ({row['interval_low']:.1%} to {row['interval_high']:.1%})"
            for row in (space["customized"], space["base"])
        ]
        wanted = f"{customized['wanted']:.0%}" if name == customized["judge"] else ""
        lines.append(f"| {name} | {shares[0]} | {wanted} | {shares[1]} | {customized['chance']:.0%} |")
    return "\n".join(lines)


def rewrite(readme: str, name: str, block: str) -> str:
    """The text with `block` between the markers of `name`. Raises ValueError when they are not there once."""
    begin, end = _markers(name)
    if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
        raise ValueError(f"README: wanted one line {begin} and after it one line {end}")
    return f"{readme[: readme.index(begin)]}{begin}\n{block}\n{readme[readme.index(end) :]}"


def between_markers(readme: str, name: str) -> str:
    """What stands between the markers of `name`."""
    begin, end = _markers(name)
    return readme[readme.index(begin) + len(begin) : readme.index(end)].strip("\n")


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def _table(kind: str, results: Sequence[Mapping[str, Any]]) -> str:
    first = results[0]
    cell, gallery = first[kind]["all"], first["gallery"]
    lines = [
        f"**{TITLES[kind]}**: {cell['queries']:,} queries of {cell['customized_models']} customized models, "
        f"{gallery['distractors']:,} distractors. Recall@10: "
        f"ceiling {_number(cell['ceiling']['recall_at_10'])}, chance {cell['chance']['recall_at_10']:.4f}.",
        "",
        "| backbone | Recall@10 raw | whitening | mapped | permuted | own kind | own kind, permuted | "
        "own kind - raw | own kind, hard gallery | mAP raw | mAP mapped | mAP own kind |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in sorted(results, key=lambda result: _order(result, kind)):
        cell, hard = result[kind]["all"], result["hard_gallery"][kind]["all"]
        columns = [
            result["backbone"] + (" (control)" if result["backbone"] in NO_WEIGHTS else ""),
            *(_with_interval(cell[name], "recall_at_10") for name in RECALL_COLUMNS),
            _with_interval(cell["own_kind_minus_raw"], "recall_at_10", sign=True),
            _with_interval(hard["own_kind"], "recall_at_10"),
            *(_with_interval(cell[name], "mean_average_precision") for name in ("raw", "mapped", "own_kind")),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _order(result: Mapping[str, Any], kind: str) -> tuple[bool, float, str]:
    return (
        result["backbone"] in NO_WEIGHTS,
        -result[kind]["all"]["own_kind"]["recall_at_10"],
        result["backbone"],
    )


def _with_interval(table: Mapping[str, Any], name: str, *, sign: bool = False) -> str:
    interval = table[f"{name}_interval"]
    bounds = " to ".join(_number(end, sign) for end in interval) if interval else "no interval"
    return f"{_number(table[name], sign)} ({bounds})"


def _number(value: float, sign: bool = False) -> str:
    return f"{value:+.3f}" if sign else f"{value:.3f}"


def main() -> None:
    path, metrics = Path("README.md"), Path("metrics")
    commit = subprocess.run(
        ["git", "rev-parse", "--short=10", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    note = f"{LEGEND} Made at commit {commit} by `make repro`."
    gates = render_gates(read_json(metrics / "gate.json"), read_json(metrics / "gate_customized.json"))
    text = path.read_text(encoding="utf-8")
    text = rewrite(text, "results", f"{render_tables(read_results(metrics))}\n\n{note}")
    text = rewrite(text, "gates", gates)
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with command_line("stages.report", __doc__) as parser:
        parser.parse_args()
        main()
