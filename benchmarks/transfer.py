"""Does a mapper learned from one method's images find the sources of another method's?

`python -m benchmarks.transfer [--train 48 --val 16 --test 32] [--workers 2]`, from the repository's root,
after `dvc repro`: customizes the same object concepts by every method, each with its settings in params.yaml,
draws their images, learns a mapper from each method's train concepts (and one from all of them), and ranks
the test concepts' exemplars among all distractors; in the space of the default run's mapper for objects too,
which learned from all train concepts of one method, and of its control. Works in build/transfer, where a
killed run goes on. The method of the default run is not run again: its images are taken. Prints tables;
writes benchmarks/results/transfer.json and transfer.png. Cost: 6 CPU s per concept and method, 8 for
dreambooth, and 9 MB on the disk for each of its models.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from attribution.backbones import Backbone, BackboneSettings, load_backbone
from attribution.base_model import BaseSettings
from attribution.concepts import Concept, read_concepts
from attribution.customization import METHODS, write_model
from attribution.evaluation import Intervals, Vectors, rank
from attribution.features import FeatureSet, write_feature_set
from attribution.files import atomic_path, write_json
from attribution.images import read_image_table, write_image_table
from attribution.lessons import train
from attribution.mapper import Mapper
from attribution.params import load_params
from attribution.queries import Queries, open_features, read_exemplars, read_queries
from attribution.ranking import chance_recall, recall_at
from benchmarks.rates import machine
from benchmarks.transfer_plot import plot, tables
from stages import customize, gate_customized, synthesize, train_mapper
from stages.incremental import prune
from stages.lesson_plan import prepare
from stages.query_table import write_queries
from stages.synthesizer import SCHEMA
from stages.workers import base_pipeline

BACKBONES = ("supervised", "clip")
SPLITS = ("train", "val", "test")
ALL = "all methods"
DEFAULTS = {"default run": "mapper.safetensors", "default run, permuted": "permuted.safetensors"}
EXEMPLARS = Path("data/world/exemplars.parquet")
FEATURES, MAPPERS = Path("data/features"), Path("data/mappers")
RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Place:
    """Where one method's things are kept."""

    root: Path

    @property
    def images(self) -> Path:
        return self.root / "synthesized"

    @property
    def queries(self) -> Path:
        return self.root / "queries.parquet"

    def features(self, backbone: str) -> Path:
        return self.root / "features" / backbone

    def mapper(self, backbone: str, name: str = "mapper") -> Path:
        return self.root / "mappers" / backbone / f"{name}.safetensors"


def choose(counts: Sequence[int], seed: int) -> list[Concept]:
    """So many object concepts of each split, drawn evenly; more are these and others."""
    rng = np.random.default_rng(seed)
    known = [concept for concept in read_concepts(EXEMPLARS) if concept.kind == "object"]
    chosen = []
    for split, count in zip(SPLITS, counts, strict=True):
        of_split = [concept for concept in known if concept.split == split]
        if count > len(of_split):
            raise ValueError(f"--{split} {count}: the world has {len(of_split)} object concepts of it")
        chosen += [of_split[i] for i in sorted(rng.permutation(len(of_split))[:count])]
    return chosen


def draw(place: Place, params: customize.Params, base: BaseSettings, exemplars: Path) -> None:
    """Customizes and draws what is not there yet."""
    customized = place.root / "customized"
    drawing = replace(load_params(synthesize.Params, "synthesize"), workers=params.workers)
    paths = {"exemplars": exemplars, "customized": customized}
    print(f"{params.method}: {customize.run(params, base, **paths, fresh=None)}", flush=True)
    summary = synthesize.run(
        drawing, base, **paths, prompts=Path("data/prompts"), synthesized=place.images, fresh=None
    )
    print(f"{params.method}: {summary}", flush=True)


def take(place: Place, concepts: Sequence[Concept]) -> None:
    """The default run's own images of these concepts, fresh and shipped."""
    shipped = read_image_table("data/shipped/synthesized.parquet")
    prune(place.images, [f"{concept.concept_id}.parquet" for concept in concepts])
    for concept in concepts:
        name = f"{concept.concept_id}.parquet"
        fresh = Path("data/synthesized") / name
        rows = shipped.filter(pc.equal(shipped["concept_id"], concept.concept_id))
        rows = read_image_table(fresh) if fresh.is_file() else rows
        if not len(rows):
            raise FileNotFoundError(f"{fresh}: no such file, and nothing shipped; run: dvc repro synthesize")
        write_image_table(place.images / name, rows.cast(SCHEMA))


def cost(params: customize.Params, base: BaseSettings, concepts: Sequence[Concept]) -> dict[str, Any]:
    """What one model takes, of a few trained in one batch on one thread."""
    pipe = base_pipeline(base)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        lessons = [prepare(pipe, params, concept, Path(folder)) for concept in concepts]
        torch.set_num_threads(1)
        started = time.process_time()
        stack, _ = train(pipe, lessons, params.settings, method=params.method, seed=params.seed)
        spent = time.process_time() - started
        torch.set_num_threads(threads)
        model = Path(folder) / "model"
        write_model(model, stack[0], pipe, dtype=getattr(torch, params.saved_dtype))
        size = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    return {
        "training": asdict(params.settings),
        "cpu_seconds_per_model": round(spent / len(concepts), 2),
        "bytes_per_model": size,
    }


def featurize(place: Place, backbone: Backbone, drawn: gate_customized.Drawn, ids: Sequence[str]) -> None:
    """The queries' vectors beside those of the default run's exemplars and distractors."""
    name = backbone.space.backbone
    folder = place.features(name)
    write_feature_set(folder / "queries", backbone.space, ids, [backbone.encode(drawn.pictures)])
    link_gallery(folder, name)


def link_gallery(folder: Path, backbone: str) -> None:
    """`folder` has the default run's vectors of exemplars and distractors."""
    for name in ("exemplars", "distractors"):
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to((FEATURES / backbone / name).resolve())


def merge(places: dict[str, Place], place: Place) -> None:
    """All methods' queries and vectors in one, each id with its method before it."""
    parts = []
    for method, other in places.items():
        rows = pq.read_table(other.queries)
        ids = pc.binary_join_element_wise(method, rows["image_id"], "/")
        parts.append(rows.set_column(rows.schema.get_field_index("image_id"), "image_id", ids))
    with atomic_path(place.queries) as partial:
        pq.write_table(pa.concat_tables(parts), partial)
    for name in BACKBONES:
        sets = [FeatureSet.open(other.features(name) / "queries") for other in places.values()]
        ids = [
            f"{method}/{one}" for method, a_set in zip(places, sets, strict=True) for one in a_set.image_ids
        ]
        write_feature_set(
            place.features(name) / "queries", sets[0].space, ids, [a_set.vectors() for a_set in sets]
        )
        link_gallery(place.features(name), name)


def learn(place: Place, exemplars: Path) -> None:
    """A mapper for each backbone, and its control from permuted pairs."""
    params = replace(load_params(train_mapper.Params, "train_mapper"), pairs="object")
    for name in BACKBONES:
        train_mapper.run(
            params,
            backbone=name,
            features_dir=place.features(name),
            queries_path=place.queries,
            exemplars_path=exemplars,
            output_dir=place.mapper(name).parent,
        )


def judge(
    tested: Place, mappers: dict[str, Mapper], own: str, name: str, exemplars: Path, intervals: Intervals
) -> dict[str, Any]:
    """Recall@10 of one method's test queries in each mapper's space, against raw and against its own."""
    known = read_exemplars(exemplars)
    queries = read_queries(tested.queries, known, split="test")
    exemplar_set, query_set, distractors = open_features(tested.features(name), name)
    raw = Vectors(
        query_set.select(queries.image_ids), exemplar_set.select(known.image_ids), distractors.vectors()
    )
    hits = {key: recall_at(rank(raw.map(mapper), queries, ()).own, 10) for key, mapper in mappers.items()}
    found: dict[str, Any] = {key: mean(values, queries, intervals) for key, values in hits.items()}
    for key in mappers:
        others = {"minus_raw": "raw", "minus_own": own, "minus_permuted": f"{key}, permuted"}
        for difference, other in others.items():
            if other in hits and key != other:
                found[key][difference] = mean(hits[key] - hits[other], queries, intervals)
    return found


def mean(values: np.ndarray, queries: Queries, intervals: Intervals) -> dict[str, Any]:
    ends = intervals.of(values[:, None], queries.concept_ids)
    assert ends is not None
    return {"recall_at_10": float(values.mean()), "interval": [float(end[0]) for end in ends]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for split, count in zip(SPLITS, (48, 16, 32), strict=True):
        parser.add_argument(f"--{split}", type=int, default=count, help="object concepts")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--work", type=Path, default=Path("build/transfer"))
    options = parser.parse_args()
    concepts = choose([getattr(options, split) for split in SPLITS], options.seed)
    base = load_params(BaseSettings, "base")
    exemplars = options.work / "exemplars.parquet"
    rows = read_image_table(EXEMPLARS)
    mine = pa.array([concept.concept_id for concept in concepts])
    write_image_table(exemplars, rows.filter(pc.is_in(rows["concept_id"], value_set=mine)))
    places = {method: Place(options.work / method) for method in METHODS}
    default = replace(load_params(customize.Params, "customize"), workers=options.workers)
    costs = {}
    for method, place in places.items():
        params = replace(default, method=cast(Any, method))
        costs[method] = cost(params, base, concepts[:2])
        if method == default.method:
            take(place, concepts)
        else:
            draw(place, params, base, exemplars)
        line = write_queries(place.queries, base, exemplars=exemplars, synthesized=place.images, shipped=None)
        print(f"{method}: {line}", flush=True)

    backbones = {
        name: load_backbone(name, load_params(BackboneSettings, f"featurize.settings.{name}"), root=Path())
        for name in BACKBONES
    }
    gate = replace(load_params(gate_customized.Params, "gate_customized"), resamples=options.resamples)
    everyone = [concept for concept in read_concepts(EXEMPLARS) if concept.kind == "object"]
    nearer: dict[str, Any] = {name: {} for name in BACKBONES}
    for method, place in places.items():
        parts = sorted(place.images.glob("*.parquet"))
        drawn = gate_customized.read_synthesized(place.queries, parts, everyone)
        ids = [
            one for part in parts for one in pq.read_table(part, columns=["image_id"])["image_id"].to_pylist()
        ]
        if method == next(iter(places)):
            control = gate_customized.control_samples(gate, base, drawn)
            for name, backbone in backbones.items():
                nearer[name]["base"] = gate_customized.compare(gate, backbone, control, everyone)
        for name, backbone in backbones.items():
            featurize(place, backbone, drawn, ids)
            nearer[name][method] = gate_customized.compare(gate, backbone, drawn, everyone)
        learn(place, exemplars)
    together = Place(options.work / "all")
    merge(places, together)
    learn(together, exemplars)

    intervals = Intervals(options.resamples, options.seed)
    recall: dict[str, Any] = {}
    for name in BACKBONES:
        dim = backbones[name].space.dim
        learned = {
            method: Mapper.load(place.mapper(name), backbone=name, dim=dim)
            for method, place in {**places, ALL: together}.items()
        }
        defaults = {
            key: Mapper.load(MAPPERS / name / file, backbone=name, dim=dim, own_kind="object")
            for key, file in DEFAULTS.items()
        }
        recall[name] = {}
        for method, place in places.items():
            permuted = Mapper.load(place.mapper(name, "permuted"), backbone=name, dim=dim)
            mappers = {"raw": Mapper.identity(dim), **learned, "permuted": permuted, **defaults}
            recall[name][method] = judge(place, mappers, method, name, exemplars, intervals)
    distractors = len(FeatureSet.open(FEATURES / BACKBONES[0] / "distractors").image_ids)
    report = {
        "machine": machine(),
        "seed": options.seed,
        "base": base.model,
        "concepts": {split: getattr(options, split) for split in SPLITS},
        "images_per_concept": len(pq.read_table(places["lora"].queries)) // len(concepts),
        "distractors": distractors,
        "chance": chance_recall(10, distractors + 1),
        "methods": costs,
        "own_exemplar_nearer": nearer,
        "recall": recall,
    }
    write_json(RESULTS / "transfer.json", report)
    plot(report, RESULTS / "transfer.png")
    print(tables(report))


if __name__ == "__main__":
    main()
