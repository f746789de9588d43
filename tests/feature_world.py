"""A world of features and tables without images behind the features: what the learning stages read."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from attribution.features import Space, write_feature_set
from attribution.images import write_image_table

DIM = 16


@dataclasses.dataclass(frozen=True)
class FeatureWorld:
    """Paths of one world, as the stages take them."""

    root: Path
    backbone: str = "toy"

    @property
    def inputs(self) -> dict[str, Path]:
        return {
            "features_dir": self.root / "features",
            "queries_path": self.root / "queries.parquet",
            "exemplars_path": self.root / "exemplars.parquet",
        }

    @property
    def pictures(self) -> list[Path]:
        return [self.root / "exemplars.parquet", self.root / "distractors", self.root / "synthesized"]


def make_world(
    root: Path,
    *,
    objects: int = 12,
    styles: int = 6,
    per_model: int = 4,
    distractors: int = 200,
    noise: float = 0.6,
    seed: int = 0,
) -> FeatureWorld:
    """Synthesized images are their concept's direction, twisted by one fixed rotation, plus noise.

    The rotation is the same for all concepts, so that a linear head learned on some undoes it for the others.
    """
    rng = np.random.default_rng(seed)
    left, _, right = np.linalg.svd(np.eye(DIM) + rng.standard_normal((DIM, DIM)) / np.sqrt(DIM))
    twist = left @ right  # the rotation nearest to that matrix
    exemplars: list[dict[str, Any]] = []
    queries: list[dict[str, Any]] = []
    real, synth = [], []
    splits = ("train", "train", "val", "test", "test")
    for number in range(objects + styles):
        kind = "object" if number < objects else "style"
        concept = {
            "concept_id": f"{kind}-{number:03d}",
            "kind": kind,
            "noun": "art" if kind == "style" else f"thing{number % 4}",
            "split": splits[number % len(splits)],
            "seen": number % 2 == 0,
        }
        center = rng.standard_normal(DIM)
        for place in range(1 if kind == "object" else 3 + number % 2):
            image_id = f"{concept['concept_id']}-e{place}"
            exemplars.append({"image_id": image_id, **concept, "image": picture(rng)})
            real.append(center + 0.3 * (kind == "style") * rng.standard_normal(DIM))
        for place in range(per_model):
            prompt_kind = ("media" if kind == "object" else "object", "gpt")[place % 2]
            prompt_split = "test" if concept["split"] == "test" else "train"
            row = {
                "prompt_kind": prompt_kind,
                "prompt": "a <new1>",
                "prompt_split": prompt_split,
                "seed": place,
            }
            queries.append(
                {"image_id": f"{concept['concept_id']}-q{place}", **concept, **row, "source": "fresh"}
            )
            synth.append(twist @ center + noise * rng.standard_normal(DIM))
    sets: dict[str, tuple[list[str], np.ndarray]] = {
        "exemplars": ([row["image_id"] for row in exemplars], np.array(real)),
        "queries": ([row["image_id"] for row in queries], np.array(synth)),
        "distractors": ([f"d{i:05d}" for i in range(distractors)], rng.standard_normal((distractors, DIM))),
    }
    for name, (ids, vectors) in sets.items():
        write_vectors(root / "features" / name, ids, vectors)
    write_image_table(root / "exemplars.parquet", pa.Table.from_pylist(exemplars))
    pq.write_table(pa.Table.from_pylist(queries), root / "queries.parquet")
    for path, ids in (
        (root / "distractors" / "part-00000.parquet", sets["distractors"][0]),
        (root / "synthesized" / "all.parquet", sets["queries"][0]),
    ):
        path.parent.mkdir()
        write_image_table(path, pa.table({"image_id": ids, "image": [picture(rng) for _ in ids]}))
    return FeatureWorld(root)


def write_vectors(path: Path, ids: list[str], vectors: np.ndarray, *, backbone: str = "toy") -> None:
    space = Space(
        backbone=backbone, revision="r1", preprocessing="none", dim=vectors.shape[1], dtype="float32"
    )
    write_feature_set(path, space, ids, [vectors.astype(np.float32)])


def picture(rng: np.random.Generator) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(stream, format="PNG")
    return stream.getvalue()
