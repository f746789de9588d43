"""Fits the calibrator of one backbone on the validation concepts, against the full gallery.

In:   data/features/<backbone>, data/mappers/<backbone>/mapper.safetensors, data/queries.parquet,
      data/world/exemplars.parquet
Out:  data/calibrators/<backbone>.json: inv_tau, b, and likelihood and calibration error before and after
Cost: 48 concepts against 20,000 images, dim 512: about 5 s on 2 cores. Distractors stay on disk: 100 concepts
      against 1 M images, dim 768, take a minute or two and 1.1 GB (benchmarks.full_stages).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from attribution.calibrator import Calibrator, fit, losses
from attribution.command import command_line
from attribution.gallery import Gallery, attribute_all
from attribution.mapper import Mapper
from attribution.params import load_params, require_at_least
from attribution.queries import Queries, open_features, read_exemplars, read_queries
from attribution.reliability import influence_due, reliability
from attribution.score_bins import ScoreBins

SHOWN = 100  # items per query whose influence is known one by one; the rest is one bin
EXACT_ROWS = 1 << 16  # a larger gallery's scores are not kept one by one
SCORED = 8192  # rows whose scores with all queries are in memory at a time


@dataclasses.dataclass(frozen=True)
class Params:
    """The start is the calibrator "before"; a query takes 200 kB and more of memory in a large gallery."""

    inv_tau_start: float
    b_start: float
    queries_per_model: int
    seed: int

    def __post_init__(self) -> None:
        Calibrator(self.inv_tau_start, self.b_start)
        require_at_least(self, queries_per_model=1, seed=0)


def run(
    params: Params,
    *,
    backbone: str,
    features_dir: Path,
    mapper_path: Path,
    queries_path: Path,
    exemplars_path: Path,
    output_path: Path,
) -> None:
    exemplars = read_exemplars(exemplars_path)
    exemplar_set, query_set, distractor_set = open_features(features_dir, backbone)
    mapper = Mapper.load(mapper_path, backbone=backbone, dim=exemplar_set.space.dim)
    queries = sample_queries(read_queries(queries_path, exemplars, split="val"), params)
    vectors = mapper.map_synth(query_set.select(queries.image_ids))
    gallery = Gallery(
        exemplars.image_ids,
        exemplar_set.select(exemplars.image_ids),
        distractor_set,
        np.arange(len(distractor_set)),
    )
    own = np.zeros((len(queries), len(gallery.exemplars)), dtype=bool)
    row, slot = np.nonzero(queries.own >= 0)
    own[row, queries.own[row, slot]] = True
    scores, counts = score_all(gallery, mapper, vectors)
    start = Calibrator(params.inv_tau_start, params.b_start)
    fitted = fit(scores, own, start=start, counts=counts)
    calibrators = {"before": start, "after": fitted}
    found = attribute_all(gallery, mapper, vectors, calibrators, k=SHOWN)

    def report(name: str) -> dict[str, float]:
        calibrator, shown = calibrators[name], found[name]
        return {
            "inv_tau": calibrator.inv_tau,
            "b": calibrator.b,
            "log_likelihood": -float(losses(scores, own, calibrator, counts).mean()),
            "expected_calibration_error": reliability(
                shown.influence, influence_due(shown.ids, queries.own)
            ).error,
        }

    fitted.save(
        output_path,
        backbone=backbone,
        revision=exemplar_set.space.revision,
        gallery=len(gallery),
        queries=len(queries),
        customized_models=len(np.unique(queries.concept_ids)),
        before=report("before"),
        after=report("after"),
    )


def score_all(gallery: Gallery, mapper: Mapper, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Scores of the mapped queries with all exemplars, then distractors, and how many items each stands for.

    Each for one (None) in a gallery of EXACT_ROWS or fewer, else as `ScoreBins` says of the distractors.
    """
    blocks = gallery.mapped_blocks(mapper)
    exemplars = next(blocks)
    of_exemplars = queries @ exemplars.T
    if len(gallery) <= EXACT_ROWS:
        distractors = np.concatenate([exemplars[:0], *blocks])
        return np.concatenate([of_exemplars, queries @ distractors.T], axis=1), None
    bins = ScoreBins(len(queries))
    for block in blocks:
        for some in np.split(block, range(SCORED, len(block), SCORED)):
            bins.add(queries @ some.T)
    scores, counts = bins.points()
    return (
        np.concatenate([of_exemplars, scores], axis=1),
        np.concatenate([np.ones_like(of_exemplars), counts], axis=1),
    )


def sample_queries(queries: Queries, params: Params) -> Queries:
    """At most `queries_per_model` of each customized model's queries, drawn evenly, in their order."""
    rng = np.random.default_rng(params.seed)
    chosen: list[int] = []
    for concept in np.unique(queries.concept_ids):
        rows = np.flatnonzero(queries.concept_ids == concept)
        chosen += rng.permutation(rows)[: params.queries_per_model].tolist()
    return queries.take(np.sort(np.array(chosen, dtype=np.int64)))


def main(backbone: str) -> None:
    run(
        load_params(Params, "calibrate"),
        backbone=backbone,
        features_dir=Path("data/features") / backbone,
        mapper_path=Path("data/mappers") / backbone / "mapper.safetensors",
        queries_path=Path("data/queries.parquet"),
        exemplars_path=Path("data/world/exemplars.parquet"),
        output_path=Path("data/calibrators") / f"{backbone}.json",
    )


if __name__ == "__main__":
    with command_line("stages.calibrate", __doc__) as parser:
        parser.add_argument("backbone", help="a row of featurize.settings in params.yaml")
        main(parser.parse_args().backbone)
