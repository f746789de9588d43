"""Ranks each test query's own exemplars in the gallery: recall, mAP, intervals, controls, plots.

In:   data/features/<backbone>, data/mappers/<backbone>/ (mapper, whitening, permuted, history.csv),
      data/calibrators/<backbone>.json, data/queries.parquet, and for the page the pictures themselves:
      data/world/exemplars.parquet, data/world/distractors, data/synthesized, data/shipped/synthesized.parquet
Out:  metrics/<backbone>.json and data/evaluation/<backbone>/; a run in MLflow
Cost: 2,300 queries against 20,000 images, dim 512: about 10 s on 2 cores. Distractors stay on disk: 2,000
      queries against 1 M images, dim 768, take three minutes and 1.1 GB (benchmarks.full_stages).

Metrics are at <kind>.<seen|unseen>.<prompt kind>.<variant>.recall_at_10 and <kind>.all.<variant>.recall_at_10
over the gallery "distractors + own exemplars", and at hard_gallery.<the same> over the gallery "distractors +
everyone's exemplars".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from attribution.calibrator import Calibrator
from attribution.command import command_line
from attribution.evaluation import Intervals, Ranks, rank_in_spaces, tabulate
from attribution.files import atomic_path, read_json, write_json
from attribution.gallery import Attributions, Gallery
from attribution.mapper import Mapper
from attribution.params import load_params, require_at_least
from attribution.plots import Curve, plot_curves, plot_reliability
from attribution.queries import Queries, open_features, read_exemplars, read_queries
from attribution.ranking import NO_RANK, chance_recall, recall_at, recall_ceiling
from attribution.reliability import Reliability, influence_due, reliability
from attribution.similarity import Attribution
from stages import tracking
from stages.page import write_page

# "own_kind": each kind of concept by the mapper that was trained on pairs of that kind alone; where these
# were too few for one, by the main one.
OWN_KIND = {"own_kind": "mapper.safetensors", "own_kind_permuted": "permuted.safetensors"}
FILES = {
    "mapped": "mapper.safetensors",
    **{name: f"{name}.safetensors" for name in ("whitening", "permuted")},
}
COLUMNS = pa.schema(  # of attributions.parquet
    {
        "image_id": pa.string(),
        "concept_id": pa.string(),
        "gallery_ids": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
        "influence": pa.list_(pa.float32()),
        "support": pa.int64(),
        "remainder": pa.float32(),
        "exemplar_ranks": pa.list_(pa.int64()),
    }
)
WRITTEN = 4096  # queries whose matches' ids are in memory at a time


@dataclasses.dataclass(frozen=True)
class Params:
    """`recall_at` are the reported K, `curve_at` those of the chart; `resamples` those of the bootstrap."""

    recall_at: tuple[int, ...]
    curve_at: tuple[int, ...]
    gallery_sizes: tuple[int, ...]
    top_k: int
    resamples: int
    page_queries: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("recall_at", "curve_at", "gallery_sizes", "top_k", "resamples", "page_queries"):
            value = getattr(self, name)
            if not np.size(value) or np.min(value) < 1:
                raise ValueError(f"{name}: wanted 1 or more, got {value}")
        if 10 not in self.recall_at:
            raise ValueError(f"recall_at: wanted 10 among them (the headline), got {self.recall_at}")
        require_at_least(self, seed=0)


def run(
    params: Params,
    *,
    backbone: str,
    features_dir: Path,
    mapper_dir: Path,
    calibrator_path: Path,
    queries_path: Path,
    exemplars_path: Path,
    picture_paths: Sequence[Path],
    output_dir: Path,
    metrics_path: Path,
) -> None:
    exemplars = read_exemplars(exemplars_path)
    queries = read_queries(queries_path, exemplars, split="test")
    exemplar_set, query_set, distractor_set = open_features(features_dir, backbone)
    places = draw_places(len(distractor_set), params.seed)
    gallery = Gallery(exemplars.image_ids, exemplar_set.select(exemplars.image_ids), distractor_set, places)
    asked = query_set.select(queries.image_ids)
    kinds = np.unique(queries.kinds).tolist()
    mappers = load_mappers(mapper_dir, backbone, exemplar_set.space.dim)
    spaces = {variant: dict.fromkeys(kinds, mapper) for variant, mapper in mappers.items()}
    for variant, file in OWN_KIND.items():
        spaces[variant] = {
            kind: Mapper.load(mapper_dir / file, backbone=backbone, own_kind=kind) for kind in kinds
        }
    mapped, calibrators = mappers["mapped"], load_calibrators(calibrator_path)
    attributing = Attributions(
        gallery, mapped, mapped.map_synth(asked), calibrators, k=min(params.top_k, len(gallery))
    )
    ranks = rank_in_spaces(
        spaces, asked, queries, gallery, params.gallery_sizes, beside=[(mapped, attributing.add)]
    )
    attributions = attributing.conclude()
    claims = {
        name: reliability(one.influence, influence_due(one.ids, queries.own))
        for name, one in attributions.items()
    }
    own_size = queries.sizes + len(distractor_set)
    hard_size = np.full(len(queries), len(gallery))
    settings = (params.recall_at, Intervals(params.resamples, params.seed))
    metrics = {
        "backbone": backbone,
        "gallery": {"distractors": len(distractor_set), "exemplars": len(exemplars.image_ids)},
        "calibration": {name: calibration(claims[name], one) for name, one in attributions.items()},
        **tabulate({name: one.own for name, one in ranks.items()}, queries, own_size, *settings),
        "hard_gallery": tabulate(
            {name: one.hard for name, one in ranks.items()}, queries, hard_size, *settings
        ),
    }
    about = {
        "features": dataclasses.asdict(exemplar_set.space),
        "train_mapper": {"kind": mapped.kind, **mapped.config},
        "calibrate": read_json(calibrator_path),
        "evaluate": dataclasses.asdict(params),
    }
    after = attributions["after"]
    with atomic_path(output_dir) as partial:
        partial.mkdir()
        write_json(partial / "params.json", about)
        write_attributions(partial / "attributions.parquet", queries, gallery, after, ranks["mapped"].hard)
        write_recall_at_k(partial, backbone, ranks, queries, own_size, params)
        plot_gallery_size(partial / "gallery_size.png", backbone, ranks, queries, params)
        title = f"{backbone}: influence, claimed and due"
        plot_reliability(partial / "reliability.png", claims, top=after.ids.shape[1], title=title)
        write_page(
            partial / "page.png",
            queries,
            gallery,
            after,
            picture_paths,
            backbone=backbone,
            rows=params.page_queries,
            blanks=distractor_set.is_ready_made,
        )
    write_json(metrics_path, metrics)


def draw_places(distractors: int, seed: int) -> np.ndarray:
    """The place of each in an order drawn at random."""
    places = np.empty(distractors, np.int64)
    places[np.random.default_rng(seed).permutation(distractors)] = np.arange(distractors)
    return places


def load_mappers(folder: Path, backbone: str, dim: int) -> dict[str, Mapper]:
    """The mapper of each variant; raw is the identity."""
    loaded = {
        variant: Mapper.load(folder / file, backbone=backbone, dim=dim) for variant, file in FILES.items()
    }
    return {"raw": Mapper.identity(dim), **loaded}


def load_calibrators(path: Path) -> dict[str, Calibrator]:
    """The calibrator as it was before the fit, and after."""
    after = Calibrator.load(path)
    before = read_json(path)["before"]
    return {"before": Calibrator(before["inv_tau"], before["b"]), "after": after}


def calibration(claims: Reliability, attribution: Attribution) -> dict[str, float]:
    """Calibration error over the test queries; support (images) and remainder as means."""
    return {
        "expected_calibration_error": round(claims.error, 6),
        "support": round(float(attribution.support.mean()), 6),
        "remainder": round(float(attribution.remainder.mean()), 6),
    }


def write_attributions(
    path: Path,
    queries: Queries,
    gallery: Gallery,
    attribution: Attribution,
    hard_ranks: np.ndarray,
) -> None:
    """One row per test query: its best matches among distractors and everyone's exemplars, best first."""
    found = slice(0, min(attribution.ids.shape[1], len(gallery)))
    with atomic_path(path) as partial, pq.ParquetWriter(partial, COLUMNS, compression="zstd") as writer:
        for first in range(0, len(queries), WRITTEN):
            some = slice(first, first + WRITTEN)
            columns = {
                "image_id": queries.image_ids[some],
                "concept_id": queries.concept_ids[some],
                "gallery_ids": gallery.image_ids(attribution.ids[some, found]).tolist(),
                "scores": list(attribution.scores[some, found]),
                "influence": list(attribution.influence[some, found]),
                "support": attribution.support[some],
                "remainder": attribution.remainder[some],
                "exemplar_ranks": [row[row != NO_RANK] for row in hard_ranks[some]],
            }
            writer.write_table(pa.table(columns, COLUMNS))


def write_recall_at_k(
    folder: Path,
    backbone: str,
    ranks: Mapping[str, Ranks],
    queries: Queries,
    gallery_sizes: np.ndarray,
    params: Params,
) -> None:
    """recall_at_k.csv, one column per kind and variant, and its chart; over distractors and own exemplars."""
    ks = params.curve_at
    columns = {name: np.stack([recall_at(one.own, k) for k in ks], axis=1) for name, one in ranks.items()}
    chance = np.array([[chance_recall(k, int(size)) for k in ks] for size in gallery_sizes])
    ceiling = np.stack([recall_ceiling(ranks["mapped"].own, k) for k in ks], axis=1)
    panels: dict[str, dict[str, Curve]] = {}
    for kind in np.unique(queries.kinds).tolist():
        of_kind = queries.kinds == kind
        panels[kind] = {name: curve(ks, values, of_kind, queries, params) for name, values in columns.items()}
        panels[kind]["chance"] = Curve(ks, chance[of_kind].mean(axis=0))
        panels[kind]["ceiling"] = Curve(ks, ceiling[of_kind].mean(axis=0))
    header = ["k", *(f"{kind}_{name}" for kind, curves in panels.items() for name in curves)]
    rows = zip(ks, *(one.y for curves in panels.values() for one in curves.values()), strict=True)
    lines = [",".join(header), *(",".join(f"{value:.6g}" for value in row) for row in rows)]
    with atomic_path(folder / "recall_at_k.csv") as partial:
        partial.write_text("\n".join(lines) + "\n")
    title = f"{backbone}: own exemplars found among {max(ranks['raw'].by_size):,} distractors"
    plot_curves(folder / "recall_at_k.png", panels, title=title, x_label="k", y_label="recall@k")


def plot_gallery_size(
    path: Path, backbone: str, ranks: Mapping[str, Ranks], queries: Queries, params: Params
) -> None:
    panels = {}
    sizes = list(ranks["raw"].by_size)
    for kind in np.unique(queries.kinds).tolist():
        panels[kind] = {
            name: curve(
                sizes,
                np.stack([recall_at(one, 10) for one in ranks[name].by_size.values()], axis=1),
                queries.kinds == kind,
                queries,
                params,
            )
            for name in ("raw", "mapped", "own_kind")
        }
    title = f"{backbone}: recall@10 as the gallery grows"
    plot_curves(path, panels, title=title, x_label="distractors", y_label="recall@10")


def curve(x: Sequence[int], values: np.ndarray, mask: np.ndarray, queries: Queries, params: Params) -> Curve:
    """Means of the columns over the masked queries, with their intervals."""
    ends: Any = Intervals(params.resamples, params.seed).of(values[mask], queries.concept_ids[mask])
    return Curve(x, values[mask].mean(axis=0), *(ends or ()))


def main(backbone: str) -> None:
    mapper_dir = Path("data/mappers") / backbone
    output_dir, metrics_path = Path("data/evaluation") / backbone, Path("metrics") / f"{backbone}.json"
    run(
        load_params(Params, "evaluate"),
        backbone=backbone,
        features_dir=Path("data/features") / backbone,
        mapper_dir=mapper_dir,
        calibrator_path=Path("data/calibrators") / f"{backbone}.json",
        queries_path=Path("data/queries.parquet"),
        exemplars_path=Path("data/world/exemplars.parquet"),
        picture_paths=[
            Path("data/world/exemplars.parquet"),
            Path("data/world/distractors"),
            Path("data/shipped/synthesized.parquet"),
            Path("data/synthesized"),
        ],
        output_dir=output_dir,
        metrics_path=metrics_path,
    )
    tracking.log_result(metrics_path, evaluation_dir=output_dir, history_path=mapper_dir / "history.csv")


if __name__ == "__main__":
    with command_line("stages.evaluate", __doc__) as parser:
        parser.add_argument("backbone", help="a row of featurize.settings in params.yaml")
        main(parser.parse_args().backbone)
