"""The tables and the picture of benchmarks.transfer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from attribution.files import atomic_path


def tables(report: dict[str, Any]) -> str:
    """In Markdown: what each method does, and per backbone what each mapper finds of each method's images."""
    backbones, methods = report["recall"], report["methods"]
    lines = [
        "| | "
        + " | ".join(f"nearer to own exemplar, {name}" for name in backbones)
        + " | CPU s a model | kB a model |",
        "|---|" + "---|" * (len(backbones) + 2),
    ]
    for method in ("base", *methods):
        near = [
            interval(one["share"], one["interval_low"], one["interval_high"])
            for one in (report["own_exemplar_nearer"][name][method] for name in backbones)
        ]
        cost = methods.get(method)
        size = (
            ["", ""]
            if cost is None
            else [str(cost["cpu_seconds_per_model"]), f"{cost['bytes_per_model'] / 1e3:,.1f}"]
        )
        lines.append(f"| {method} | {' | '.join([*near, *size])} |")
    for name, found in backbones.items():
        lines += ["", f"| {name}: mapper from | {' | '.join(methods)} |", "|---|" + "---|" * len(methods)]
        for learned in next(iter(found.values())):
            cells = [found[tested][learned] for tested in methods]
            said = [interval(cell["recall_at_10"], *cell["interval"]) for cell in cells]
            lines.append(f"| {learned} | {' | '.join(said)} |")
    return "\n".join(lines)


def interval(value: float, low: float, high: float) -> str:
    """A mean with its 95 % interval."""
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def plot(report: dict[str, Any], path: Path) -> None:
    """Recall@10 by the method a mapper was learned from (rows) and the method it is tested on (columns)."""
    from matplotlib import pyplot

    backbones, methods = report["recall"], list(report["methods"])
    figure, axes = pyplot.subplots(
        1, len(backbones), figsize=(6.2 * len(backbones), 4.6), squeeze=False, layout="constrained"
    )
    for axis, (name, found) in zip(axes[0], backbones.items(), strict=True):
        rows = list(found[methods[0]])
        values = np.array([[found[tested][row]["recall_at_10"] for tested in methods] for row in rows])
        axis.imshow(values, cmap="Blues", vmin=0, vmax=values.max() * 1.7, aspect="auto")
        for i, row in enumerate(rows):
            for j, tested in enumerate(methods):
                low, high = found[tested][row]["interval"]
                axis.text(j, i - 0.1, f"{values[i, j]:.3f}", ha="center", va="center", fontsize=10)
                axis.text(j, i + 0.25, f"{low:.2f} to {high:.2f}", ha="center", va="center", fontsize=7)
        labels = [method.replace("_", "\n") for method in methods]
        axis.set_xticks(range(len(methods)), labels, fontsize=9)
        axis.set_yticks(
            range(len(rows)), ["permuted pairs" if row == "permuted" else row for row in rows], fontsize=9
        )
        axis.set(title=name, xlabel="images of")
    axes[0, 0].set_ylabel("mapper learned from")
    counts = f"{report['distractors']:,} distractors, {report['concepts']['test']} models of each method"
    figure.suptitle(f"Recall@10: {counts}, 95 % intervals")
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
