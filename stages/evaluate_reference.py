"""Ranks of the reference's queries by its protocol, raw and mapped, from the records of import_reference.

In:   data/reference/: exemplars.parquet, queries.parquet, features/<backbone>, mappers/ and calibrators/
Out:  data/reference/metrics/<backbone>.json
Cost: one product of all queries with all distractors for each mapper: 85,000 queries against 1 M distractors
      of dim 512 are 87 TFLOP, hours on a few cores. Distractors are streamed.

Protocol (arXiv:2306.09345): gallery = all distractors and the exemplars of the query's own customized model;
recall@k = hits in the top k / P; AP = (1/P) sum_j j/rank_j; means over queries by prompt kind. Scores are
accumulated in float64 and rounded to float32; equal scores count against the exemplar. It is not known how
the reference breaks ties, nor how its own float32 scores order near-equal ones: single ranks may differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from attribution.calibrator import Calibrator
from attribution.command import command_line
from attribution.evaluation import Intervals
from attribution.features import FeatureSet
from attribution.files import write_json
from attribution.mapper import Mapper
from attribution.params import load_params, require_at_least
from attribution.queries import Queries, open_features, read_exemplars, read_queries
from attribution.ranking import (
    average_precision,
    chance_average_precision,
    chance_recall,
    count_rivals,
    own_scores,
    ranks_from_rivals,
    recall_at,
    recall_ceiling,
)


@dataclass(frozen=True)
class Params:
    """`block_rows` distractors are mapped and counted at a time."""

    recall_at: tuple[int, ...]
    block_rows: int
    resamples: int
    seed: int

    def __post_init__(self) -> None:
        if self.block_rows < 1 or min(self.recall_at, default=0) < 1:
            raise ValueError(f"recall_at {self.recall_at}, block_rows {self.block_rows}: wanted 1 or more")
        require_at_least(self, resamples=1, seed=0)


def run(params: Params, backbone: str, *, folder: Path) -> str:
    """Writes the metrics of one backbone and returns a line on them."""
    mapper_path = folder / "mappers" / backbone / "mapper.safetensors"
    calibrator_path = folder / "calibrators" / f"{backbone}.json"
    if not (features := folder / "features" / backbone).is_dir():
        raise FileNotFoundError(f"{features}: no such features; run: python -m stages.import_reference ROOT")
    mapper = Mapper.load(mapper_path, backbone=backbone) if mapper_path.is_file() else None
    metrics = evaluate(params, backbone, mapper, folder)
    if calibrator_path.is_file():
        calibrator = Calibrator.load(calibrator_path)
        # How far below the best match a score still gives influence.
        reach = calibrator.reach() if calibrator.b < 0 else None
        metrics["calibrator"] = {"inv_tau": calibrator.inv_tau, "b": calibrator.b, "reach": reach}
    path = folder / "metrics" / f"{backbone}.json"
    write_json(path, metrics)
    said = ["a mapper" if mapper else "no mapper", f"{'a' if 'calibrator' in metrics else 'no'} calibrator"]
    return f"reference {backbone}: {metrics['distractors']:,} distractors, {', '.join(said)}: {path}"


def evaluate(params: Params, backbone: str, mapper: Mapper | None, folder: Path) -> dict[str, Any]:
    """Metrics at test_lists.<test list>.<prompt kind | all>.<raw | mapped>.recall_at_10 and the like."""
    exemplars = read_exemplars(folder / "exemplars.parquet")
    queries = read_queries(folder / "queries.parquet", exemplars, split="test")
    list_of = np.array(
        pq.read_table(folder / "queries.parquet", columns=["test_list"])["test_list"].to_pylist()
    )
    sets = open_features(folder / "features" / backbone, backbone)
    dim = sets[0].space.dim
    if mapper is not None and mapper.dim != dim:
        raise ValueError(f"{backbone}: a mapper of dim {mapper.dim} for features of dim {dim}")
    variants = {"raw": Mapper.identity(dim)} | ({} if mapper is None else {"mapped": mapper})
    ranks = {
        name: rank(params, one, queries, exemplars.image_ids, sets, name) for name, one in variants.items()
    }
    tables: dict[str, Any] = {}
    for name in np.unique(list_of).tolist():
        of_list = list_of == name
        cells = {"all": of_list}
        cells |= {
            kind: of_list & (queries.prompt_kinds == kind)
            for kind in np.unique(queries.prompt_kinds[of_list]).tolist()
        }
        tables[name] = {
            cell: tabulate(
                params,
                {variant: one[mask] for variant, one in ranks.items()},
                queries.take(mask),
                len(sets[2]),
            )
            for cell, mask in cells.items()
        }
    return {"backbone": backbone, "distractors": len(sets[2]), "test_lists": tables}


def rank(
    params: Params,
    mapper: Mapper,
    queries: Queries,
    exemplar_ids: np.ndarray,
    sets: tuple[FeatureSet, FeatureSet, FeatureSet],
    name: str,
) -> np.ndarray:
    """Ranks of each query's own exemplars among all distractors and themselves; distractors are streamed."""
    exemplar_set, query_set, distractor_set = sets
    asked = mapper.map_synth(query_set.select(queries.image_ids))
    scores = own_scores(asked, mapper.map_real(exemplar_set.select(exemplar_ids)), queries.own)
    rivals = np.zeros(scores.shape, dtype=np.int64)
    with tqdm(total=len(distractor_set), desc=f"rank {name}", unit="image", disable=None) as progress:
        for shard in distractor_set.shards:
            for block in np.split(shard, range(params.block_rows, len(shard), params.block_rows)):
                rivals += count_rivals(asked, mapper.map_real(block), scores)
                progress.update(len(block))
    return ranks_from_rivals(rivals, scores)


def tabulate(
    params: Params, ranks: Mapping[str, np.ndarray], queries: Queries, distractors: int
) -> dict[str, Any]:
    """Means over the queries, each with its interval by customized model, beside ceiling and chance."""
    names = [*(f"recall_at_{k}" for k in params.recall_at), "mean_average_precision"]
    sizes = queries.sizes
    any_ranks = next(iter(ranks.values()))
    galleries = (sizes + distractors).tolist()
    chances = [np.array([chance_recall(k, size) for size in galleries]) for k in params.recall_at]
    fixed = {
        "ceiling": [*(recall_ceiling(any_ranks, k) for k in params.recall_at), np.ones(len(queries))],
        "chance": [*chances, chance_average_precision(sizes, sizes + distractors)],
    }
    cell: dict[str, Any] = {"queries": len(queries), "customized_models": len(np.unique(queries.concept_ids))}
    for variant, columns in fixed.items():
        cell[variant] = {name: float(column.mean()) for name, column in zip(names, columns, strict=True)}
    intervals = Intervals(params.resamples, params.seed)
    for variant, one in ranks.items():
        values = np.stack([*(recall_at(one, k) for k in params.recall_at), average_precision(one)], axis=1)
        ends = intervals.of(values, queries.concept_ids)
        cell[variant] = {name: float(mean) for name, mean in zip(names, values.mean(axis=0), strict=True)}
        for column, name in enumerate(names):
            cell[variant][f"{name}_interval"] = ends and [float(end[column]) for end in ends]
    return cell


def main() -> None:
    """Evaluates the backbone on the command line once more, as import_reference has done."""
    with command_line("stages.evaluate_reference", __doc__) as parser:
        parser.add_argument("backbone")
        parser.add_argument(
            "--folder", type=Path, default=Path("data/reference"), help="default: data/reference"
        )
        options = parser.parse_args()
        print(run(load_params(Params, "evaluate_reference"), options.backbone, folder=options.folder))


if __name__ == "__main__":
    main()
