"""A page of test queries with their best matches, drawn with the pictures."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from attribution.gallery import Gallery
from attribution.images import decode_image, find_rows
from attribution.plots import Match, PageRow, draw_page
from attribution.queries import Queries
from attribution.similarity import Attribution

BEST = 5


def write_page(
    path: Path,
    queries: Queries,
    gallery: Gallery,
    attribution: Attribution,
    picture_paths: Sequence[Path],
    *,
    backbone: str,
    rows: int,
    blanks: bool = False,
) -> None:
    """The PNG shows `rows` queries of models spread over both kinds, with their five best matches.

    `blanks`: distractors without a picture, whose features came ready made, are shown as grey squares.
    """
    chosen = choose_queries(queries, rows)
    best = min(BEST, attribution.ids.shape[1], len(gallery))
    matches = attribution.ids[chosen, :best]
    remainders = np.maximum(1 - attribution.influence[chosen, :best].sum(axis=1), 0)
    match_ids = gallery.image_ids(matches)
    own_ids = gallery.exemplar_ids[queries.own[chosen, 0]]
    wanted = {*queries.image_ids[chosen].tolist(), *own_ids.tolist(), *match_ids.ravel().tolist()}
    distractor_ids = match_ids[matches >= len(gallery.exemplars)].tolist()
    pictures = read_pictures(picture_paths, wanted, may_lack=distractor_ids if blanks else ())
    draw_page(
        path,
        [
            PageRow(
                query=pictures[queries.image_ids[query]],
                exemplar=pictures[own_id],
                caption=f"{queries.kinds[query]}, remainder {beyond:.0%}",
                matches=[
                    Match(
                        picture=pictures[match_id],
                        score=float(attribution.scores[query, place]),
                        influence=float(attribution.influence[query, place]),
                        own=bool(item in queries.own[query]),
                    )
                    for place, (item, match_id) in enumerate(zip(items, ids, strict=True))
                ],
            )
            for query, own_id, items, ids, beyond in zip(
                chosen, own_ids, matches, match_ids, remainders, strict=True
            )
        ],
        title=f"{backbone}. Below a match: its influence (and score). Framed: an own exemplar.",
    )


def choose_queries(queries: Queries, count: int) -> np.ndarray:
    """The first query of customized models evenly spread over each kind, without a look at the results."""
    chosen: list[int] = []
    kinds = np.unique(queries.kinds)
    for kind in kinds:
        rows = np.flatnonzero(queries.kinds == kind)
        _, first = np.unique(queries.concept_ids[rows], return_index=True)
        share = min(len(first), max(1, count // len(kinds)))
        chosen += rows[first[np.linspace(0, len(first) - 1, share).astype(int)]].tolist()
    return np.array(chosen)


def read_pictures(
    paths: Sequence[Path], image_ids: Collection[str], *, may_lack: Collection[str] = ()
) -> dict[str, Image.Image]:
    """These images out of image tables (files or folders), the last that has one; grey those that may lack.

    Raises ValueError naming another one that is not there.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.parquet")) if path.is_dir() else [path])]
    wanted = sorted(image_ids)
    encoded = {name: row["image"] for file in files for name, row in find_rows(file, wanted).items()}
    lacking = set(image_ids) - set(encoded)
    if missing := sorted(lacking - set(may_lack)):
        where = ", ".join(map(str, paths))
        raise ValueError(f"{where}: no picture {missing[0]} ({len(missing)} of {len(image_ids)} missing)")
    pictures = {image_id: decode_image(data, name=image_id) for image_id, data in encoded.items()}
    return pictures | dict.fromkeys(lacking, Image.new("RGB", (64, 64), "lightgrey"))
