"""The pictures of an evaluation: curves, a reliability diagram, a page of queries with their best matches."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# A notebook hands down its own, which need not be installed here.
os.environ["MPLBACKEND"] = "Agg"

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont, ImageOps

from attribution.files import atomic_path
from attribution.reliability import BIN_ENDS, Reliability

STYLES: dict[str, dict[str, Any]] = {
    "mapped": {"color": "#0072b2", "marker": "o"},
    "raw": {"color": "#d55e00", "marker": "s"},
    "whitening": {"color": "#009e73", "linestyle": "--"},
    "permuted": {"color": "#cc79a7", "linestyle": "--"},
    "own_kind": {"color": "#56b4e9", "marker": "^"},
    "own_kind_permuted": {"color": "#e69f00", "linestyle": "--"},
    "chance": {"color": "#777777", "linestyle": ":"},
    "ceiling": {"color": "#000000", "linestyle": ":"},
}
# tight_layout() would find them itself, for a second a figure.
MARGINS = {"left": 0.1, "right": 0.97, "bottom": 0.13, "top": 0.83, "wspace": 0.08}
ABOVE_LEGEND = {**MARGINS, "bottom": 0.27, "top": 0.85}
TILE, GAP, TEXT = 96, 10, 30


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a chart; `low` and `high` are the ends of its interval, where there is one."""

    x: Sequence[int]
    y: Float[np.ndarray, " points"]
    low: Float[np.ndarray, " points"] | None = None
    high: Float[np.ndarray, " points"] | None = None


@dataclasses.dataclass(frozen=True)
class Match:
    """One gallery image of a query's row on the page."""

    picture: Image.Image
    score: float
    influence: float
    own: bool


@dataclasses.dataclass(frozen=True)
class PageRow:
    """A query, one of its own exemplars, and its best matches in order."""

    query: Image.Image
    exemplar: Image.Image
    caption: str
    matches: Sequence[Match]


def plot_curves(
    path: Path, panels: Mapping[str, Mapping[str, Curve]], *, title: str, x_label: str, y_label: str
) -> None:
    """The PNG shows one panel per kind, one line per variant, intervals shaded, over a logarithmic x."""
    size = (5.2 * len(panels), 4.6)
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, sharey=True, squeeze=False, gridspec_kw=ABOVE_LEGEND
    )
    ticks: Sequence[int] = next(iter(next(iter(panels.values())).values())).x
    for axis, (name, curves) in zip(axes[0], panels.items(), strict=True):
        for variant, curve in curves.items():
            style = STYLES.get(variant, {})
            axis.plot(curve.x, curve.y, label=variant, markersize=4, **style)
            if curve.low is not None and curve.high is not None:
                axis.fill_between(curve.x, curve.low, curve.high, color=style.get("color"), alpha=0.15, lw=0)
        axis.set(title=name, xlabel=x_label, xscale="log", ylim=(0, 1.02))
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(y_label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8)
    _save(figure, path, title)


def plot_reliability(path: Path, found: Mapping[str, Reliability], *, top: int, title: str) -> None:
    """The PNG shows influence due against influence claimed per bin and calibrator; area = influence.

    Both are of the `top` matches of each query.
    """
    figure, axis = plt.subplots(figsize=(5.2, 4.4), gridspec_kw={**MARGINS, "left": 0.15})
    low = BIN_ENDS[0]
    axis.plot([low, 1], [low, 1], color="#777777", linestyle=":", label="as claimed")
    for (name, one), color in zip(found.items(), ("#d55e00", "#0072b2", "#009e73"), strict=False):
        filled = one.items > 0
        claimed, due, items = one.claimed[filled], one.due[filled], one.items[filled]
        axis.scatter(
            claimed / items,
            (due / items).clip(low),
            s=20 + 400 * claimed,
            color=color,
            alpha=0.7,
            label=f"{name}: error {one.error:.3f}, beyond the first {top} {max(one.claimed[-1], 0):.0%}",
        )
    axis.set(xscale="log", yscale="log", xlim=(low, 1.3), ylim=(low / 1.3, 1.3))
    axis.minorticks_off()
    axis.set(xlabel="mean influence claimed", ylabel="mean influence due")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left")
    _save(figure, path, title)


def draw_page(path: Path, rows: Sequence[PageRow], *, title: str) -> None:
    """The PNG shows one row per query: it, an own exemplar, its best matches; own exemplars are framed."""
    columns = 2 + max((len(row.matches) for row in rows), default=0)
    step, height = TILE + GAP, TILE + TEXT + GAP
    page = Image.new("RGB", (columns * step + 3 * GAP, len(rows) * height + 2 * TEXT), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=11)
    draw.text((_left(0), 8), title, fill="black", font=font)
    for column, name in enumerate(
        ("query", "own exemplar", "best match", "2nd", "3rd", "4th", "5th")[:columns]
    ):
        draw.text((_left(column), TEXT + 8), name, fill="black", font=font)
    for number, row in enumerate(rows):
        top = 2 * TEXT + number * height
        for column, picture in enumerate(
            (row.query, row.exemplar, *(match.picture for match in row.matches))
        ):
            tile = ImageOps.pad(picture, (TILE, TILE), Image.Resampling.BICUBIC, color="white")
            page.paste(tile, (_left(column), top))
        draw.text((_left(0), top + TILE + 2), row.caption, fill="black", font=font)
        for column, match in enumerate(row.matches, start=2):
            left = _left(column)
            if match.own:
                draw.rectangle(
                    (left - 3, top - 3, left + TILE + 2, top + TILE + 2), outline="#009e73", width=3
                )
            text = f"{match.influence:.1%}  ({match.score:.3f})"
            draw.text((left, top + TILE + 2), text, fill="#009e73" if match.own else "black", font=font)
    with atomic_path(path) as partial:
        page.save(partial, format="PNG")


def _left(column: int) -> int:
    # The matches stand apart from the query and its exemplar.
    return GAP + column * (TILE + GAP) + (GAP if column > 1 else 0)


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=11)
    with atomic_path(path) as partial:
        # Without the version of the drawing library in it, equal curves are equal bytes.
        figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
