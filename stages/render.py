"""Render the mini world: the exemplars of every concept, and the distractors.

In:   nothing but parameters. Out: data/world/exemplars.parquet and data/world/distractors/part-*.parquet.
Cost: about 4 CPU ms a picture.

Distractors are the first pictures of the corpus that the base model was trained on. Exemplars come from
another stream of the same generator: no exemplar instance occurs in the corpus.
"""

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from attribution.command import command_line
from attribution.files import atomic_path, require_space, sha256_bytes
from attribution.images import write_image_table
from attribution.params import load_params, require_at_least
from miniworld.captions import PLACES, describe_object, full_caption
from miniworld.concepts import Counts, draw_concepts
from miniworld.corpus import corpus_scene, process_map
from miniworld.draw import render
from miniworld.scene import Scene


@dataclass(frozen=True)
class Params:
    """`render` in params.yaml. The seed is the corpus's: distractors are what the base model saw."""

    seed: int
    objects: Counts
    styles: Counts
    fresh_every: int
    distractors: int
    distractors_per_part: int
    workers: int

    def __post_init__(self) -> None:
        require_at_least(self, fresh_every=1, distractors_per_part=1)


def picture(scene: Scene) -> bytes:
    """The scene as a PNG."""
    buffer = io.BytesIO()
    render(scene).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def exemplar_table(params: Params) -> pa.Table:
    """One row per exemplar image."""
    concepts = draw_concepts(params.seed, params.objects, params.styles, fresh_every=params.fresh_every)
    pairs = [(concept, scene) for concept in concepts for scene in concept.scenes]
    with process_map(params.workers) as each:
        images = list(each(picture, [scene for _, scene in pairs]))
    rows = [
        {
            "image_id": sha256_bytes(image)[:16],
            "concept_id": concept.concept_id,
            "kind": concept.kind,
            "noun": concept.noun,
            "group": concept.group,
            "split": concept.split,
            "seen": concept.seen,
            "fresh": concept.fresh,
            "caption": full_caption(scene),
            "medium": scene.artist.medium,
            "thing": describe_object(scene),
            "place": PLACES[scene.background],
            "image": image,
        }
        for (concept, scene), image in zip(pairs, images, strict=True)
    ]
    return pa.Table.from_pylist(rows)


def distractor(seed: int, index: int) -> dict[str, object]:
    """Picture `index` of the corpus and its full caption."""
    scene = corpus_scene(seed, index)
    image = picture(scene)
    return {"image_id": sha256_bytes(image)[:16], "caption": full_caption(scene), "image": image}


def distractor_tables(params: Params) -> Iterator[pa.Table]:
    """The distractors in parts of `distractors_per_part` rows."""
    with process_map(params.workers) as each:
        rows = each(partial(distractor, params.seed), range(params.distractors))
        drawn = iter(tqdm(rows, total=params.distractors, desc="distractors", disable=None))
        while part := list(itertools.islice(drawn, params.distractors_per_part)):
            yield pa.Table.from_pylist(part)


def run(params: Params, *, exemplars: Path, distractors: Path) -> str:
    """Writes both image tables, each whole or not at all, and returns a line of counts.

    Raises DiskFullError before it draws distractors that the disk has no room for.
    """
    rows = exemplar_table(params)
    require_space(exemplars, rows.nbytes, f"{len(rows):,} exemplars")
    write_image_table(exemplars, rows)
    bytes_each = exemplars.stat().st_size / max(1, len(rows))
    wanted = round(params.distractors * bytes_each)
    require_space(distractors, wanted, f"{params.distractors:,} distractors")
    with atomic_path(distractors) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        for part, table in enumerate(distractor_tables(params)):
            write_image_table(folder / f"part-{part:05d}.parquet", table)
    return f"render: {len(rows)} exemplars, {params.distractors} distractors"


def main() -> None:
    """`python -m stages.render`."""
    world = Path("data/world")
    line = run(
        load_params(Params, "render"),
        exemplars=world / "exemplars.parquet",
        distractors=world / "distractors",
    )
    print(line)


if __name__ == "__main__":
    with command_line("stages.render", __doc__) as parser:
        parser.parse_args()
        main()
