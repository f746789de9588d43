"""Reads what the reference released into this project's records, and evaluates it by its protocol.

In:   ROOT, with feats/<backbone>/laion_subset.pth, feats/<backbone>/<test list>.pth, a <test list>.json (in
      ROOT or up to two folders down) and, where there are, weights/{mapper,calibrator}/<backbone>_tuned.pth.
Out:  data/reference/: exemplars.parquet, queries.parquet, mappers/<backbone>/mapper.safetensors,
      calibrators/<backbone>.json, features/<backbone>/{exemplars,queries,distractors}, and the metrics of
      stages.evaluate_reference
Cost: a copy of the features; then what stages.evaluate_reference costs.

What is not known of the formats, and what is done about it, stands in attribution/released.py.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from attribution.command import command_line
from attribution.features import Space, write_feature_set
from attribution.files import atomic_path, content_key
from attribution.params import load_params
from attribution.released import (
    ReleasedModel,
    read_calibrator,
    read_distractor_features,
    read_list_features,
    read_mapper,
    read_test_list,
)
from stages import evaluate_reference

SHARD_ROWS = 65536
DISTRACTORS = "laion_subset"
# The prompt kinds of a model tell what it was customized toward.
KIND_OF_PROMPTS = {"media": "object", "object": "style"}


@dataclass(frozen=True)
class TestList:
    """A released test list; `concept_ids` and `exemplar_ids` go with its models, in order."""

    __test__ = False  # not pytest's

    name: str
    kind: str
    models: Sequence[ReleasedModel]
    concept_ids: Sequence[str]
    exemplar_ids: Sequence[Sequence[str]]

    @staticmethod
    def of(name: str, models: Sequence[ReleasedModel]) -> TestList:
        """Ids derive from paths; what has the same path a second time is numbered.

        The kind, object or style, shows in the prompt kinds. Raises ValueError where it does not.
        """
        prompts = {kind for model in models for kind in model.synth}
        kinds = {KIND_OF_PROMPTS[one] for one in prompts & {*KIND_OF_PROMPTS}}
        if len(kinds) != 1:
            raise ValueError(
                f"{name}: wanted prompt kinds with either media (of objects) or object (of styles), "
                f"got {', '.join(sorted(prompts))}"
            )
        keys = unique_keys([(name, *sorted(model.exemplars)) for model in models])
        concept_ids = [
            f"{name}-{model.class_id}-{key}".replace("/", "-")
            for model, key in zip(models, keys, strict=True)
        ]
        exemplar_ids = [
            unique_keys([(concept_id, path) for path in model.exemplars])
            for concept_id, model in zip(concept_ids, models, strict=True)
        ]
        return TestList(name, kinds.pop(), models, concept_ids, exemplar_ids)


def run(root: Path, *, out: Path, unseen: Sequence[str] = ()) -> list[str]:
    """Imports every backbone under ROOT/feats; returns their names.

    `unseen` names the test lists whose concepts' classes no mapper was trained on: the files do not say.
    Raises FileNotFoundError or ValueError, naming the file, for what is not as described.
    """
    backbones = sorted(path.parent.name for path in (root / "feats").glob(f"*/{DISTRACTORS}.pth"))
    if not backbones:
        wanted = f"feats/<backbone>/{DISTRACTORS}.pth"
        raise FileNotFoundError(f"{root}: no {wanted}; give the folder that holds feats/ and weights/")
    names = sorted({path.stem for path in (root / "feats").glob("*/*.pth")} - {DISTRACTORS})
    if unknown := sorted({*unseen} - {*names}):
        raise ValueError(f"--unseen {', '.join(unknown)}: no such test list; there are: {', '.join(names)}")
    lists = [TestList.of(name, read_test_list(find_list(root, name))) for name in names]
    write_exemplars(out / "exemplars.parquet", lists, unseen)
    for number, backbone in enumerate(backbones):
        source = root / "feats" / backbone
        rows = import_features(source, lists, out / "features" / backbone, unseen)
        # The same images in the same order for every backbone, or its features are of other lists.
        write_queries(out / "queries.parquet", rows, is_first=number == 0, where=source)
        import_learned(root / "weights", backbone, out)
    return backbones


def find_list(root: Path, name: str) -> Path:
    """The test list's JSON. Raises FileNotFoundError or ValueError unless there is exactly one."""
    found = [path for depth in ("", "*/", "*/*/") for path in sorted(root.glob(f"{depth}{name}.json"))]
    if not found:
        raise FileNotFoundError(
            f"{root}: no {name}.json here or up to two folders down; copy the test list there"
        )
    if len(found) > 1:
        raise ValueError(f"{root}: {name}.json more than once: {', '.join(map(str, found))}; leave one")
    return found[0]


def write_exemplars(path: Path, lists: Sequence[TestList], unseen: Sequence[str]) -> None:
    """The exemplars of every test list, as the learning stages read them; without pictures."""
    rows = [
        {"image_id": image_id, **_concept(one, number, unseen), "fresh": False, "path": exemplar}
        for one in lists
        for number, model in enumerate(one.models)
        for image_id, exemplar in zip(one.exemplar_ids[number], model.exemplars, strict=True)
    ]
    _write_table(path, pa.Table.from_pylist(rows))


def write_queries(path: Path, rows: pa.Table, *, is_first: bool, where: Path) -> None:
    """The queries of every test list. Raises ValueError where a further backbone has other ones."""
    if is_first:
        _write_table(path, rows)
    elif rows["image_id"] != pq.read_table(path)["image_id"]:
        raise ValueError(f"{where}: features of other images than those of the backbone before")


def import_features(source: Path, lists: Sequence[TestList], folder: Path, unseen: Sequence[str]) -> pa.Table:
    """Writes the three feature sets of a backbone, and returns the rows of its queries, in their order."""
    paths, feats = read_distractor_features(source / f"{DISTRACTORS}.pth")
    space = Space(source.name, "the reference's", "the reference's", feats.shape[1], "float32")
    write_feature_set(
        folder / "distractors", space, unique_keys([(one,) for one in paths]), [feats], shard_rows=SHARD_ROWS
    )
    exemplar_ids: list[str] = []
    exemplars, queries, rows = [], [], []
    for one in lists:
        file = source / f"{one.name}.pth"
        found = read_list_features(file, one.models)
        if found.exemplars.shape[1] != space.dim:
            raise ValueError(f"{file}: dim {found.exemplars.shape[1]}, but the distractors have {space.dim}")
        for number, (start, end) in enumerate(found.chunks.tolist()):
            exemplar_ids += one.exemplar_ids[number]
            exemplars.append(found.exemplars[start:end])
        for kind in found.synth:
            queries.append(found.synth[kind])
            keys = unique_keys([(one.name, kind, path) for path in found.synth_paths[kind]])
            for key, number, path in zip(
                keys, found.synth_models[kind].tolist(), found.synth_paths[kind], strict=True
            ):
                asked = {"prompt_kind": kind, "prompt_split": "test", "source": "reference"}
                rows.append({"image_id": key, **_concept(one, number, unseen), **asked, "path": path})
    write_feature_set(folder / "exemplars", space, exemplar_ids, exemplars)
    write_feature_set(folder / "queries", space, [row["image_id"] for row in rows], queries)
    return pa.Table.from_pylist(rows)


def import_learned(weights: Path, backbone: str, out: Path) -> None:
    """The mapper and the calibrator of the backbone where they were released, written as this project's."""
    mapper, calibrator = (weights / kind / f"{backbone}_tuned.pth" for kind in ("mapper", "calibrator"))
    mapper_out = out / "mappers" / backbone / "mapper.safetensors"
    calibrator_out = out / "calibrators" / f"{backbone}.json"
    for stale in (mapper_out, calibrator_out):
        stale.unlink(missing_ok=True)
    if mapper.is_file():
        read_mapper(mapper, backbone).save(mapper_out)
    if calibrator.is_file():
        read_calibrator(calibrator).save(calibrator_out, backbone=backbone, source="the reference")


def unique_keys(parts: Sequence[tuple[str, ...]]) -> list[str]:
    """A key per tuple from its content; of equal ones, the second is numbered 1, the third 2."""
    seen: collections.Counter[tuple[str, ...]] = collections.Counter()
    keys = []
    for part in parts:
        keys.append(content_key(*part, *([seen[part]] if seen[part] else [])))
        seen[part] += 1
    return keys


def _concept(one: TestList, number: int, unseen: Sequence[str]) -> dict[str, Any]:
    model = one.models[number]
    return {
        "concept_id": one.concept_ids[number],
        "kind": one.kind,
        "noun": model.category or "art",
        "group": model.class_id,
        "split": "test",
        "seen": one.name not in unseen,
        "test_list": one.name,
    }


def _write_table(path: Path, table: pa.Table) -> None:
    with atomic_path(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def main() -> None:
    """`python -m stages.import_reference ROOT`, from the repository's root."""
    with command_line("stages.import_reference", __doc__) as parser:
        parser.add_argument("root", type=Path, metavar="ROOT", help="the folder with feats/ and weights/")
        parser.add_argument(
            "--out", type=Path, default=Path("data/reference"), help="default: data/reference"
        )
        parser.add_argument(
            "--unseen", nargs="+", default=(), metavar="LIST", help="test lists of unseen concepts"
        )
        options = parser.parse_args()
        params = load_params(evaluate_reference.Params, "evaluate_reference")
        for backbone in run(options.root, out=options.out, unseen=options.unseen):
            print(evaluate_reference.run(params, backbone, folder=options.out))


if __name__ == "__main__":
    main()
