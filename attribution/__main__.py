"""Any picture's most influential gallery images, printed and as a page: python -m attribution IMAGE..."""

from __future__ import annotations

import argparse
import base64
import html
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attribution.backbones import Backbone, BackboneSettings, load_backbone
from attribution.calibrator import Calibrator
from attribution.captions import describe
from attribution.command import FORESEEN, in_a_line
from attribution.features import FeatureSet, check_same_space
from attribution.files import atomic_path, read_json
from attribution.gallery import Gallery, attribute_all
from attribution.images import ImageError, decode_image, find_rows
from attribution.mapper import Mapper
from attribution.params import load_params, read_yaml
from attribution.similarity import Attribution

THUMBNAIL_PIXELS = 192
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem }
section { border-top: 1px solid #ccc; padding: 1rem 0 }
.row { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; width: 12rem }
img { width: 12rem; height: 12rem; object-fit: contain; background: #f3f3f3; image-rendering: auto }
figcaption { overflow-wrap: anywhere; font-size: 13px }
.bar { height: 6px; background: #c33 }
"""


@dataclass(frozen=True)
class Match:
    """One gallery image's part in one picture; `influence` is its share of 1."""

    rank: int
    image_id: str
    kind: str
    score: float
    influence: float


@dataclass(frozen=True)
class Answer:
    """The matches shown for one picture, and what is left for all others."""

    name: str
    matches: list[Match]
    remainder: float
    others: int
    gallery: int


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 after a line on stderr for each picture, or for the one thing, that cannot be used."""
    options = _parse(arguments)
    thumbnails: dict[Path, str] = {}
    status = 0
    # First all pictures, for a mistyped path should not cost the seconds of loading a backbone.
    for path in dict.fromkeys(options.images):
        try:
            thumbnails[path] = _embedded(decode_image(path))
        except ImageError as error:
            _complain(str(error))
            status = 2
    if not thumbnails:
        return status
    readable = len(thumbnails)
    try:
        text, page = _attribute_all(thumbnails, options.backbone, options.top, root=Path())
        _tell(text)
        with atomic_path(options.page) as partial:
            partial.write_text(page, encoding="utf-8")
    except FORESEEN as error:
        if (line := in_a_line(error)) is None:
            raise
        _complain(line)
        return 2
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    _tell(f"page: {_printable(str(options.page))}")
    return status if len(thumbnails) == readable else 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m attribution", description=__doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--backbone", help="a row of featurize.settings in params.yaml (default: its first backbone)"
    )
    parser.add_argument("--top", type=_positive, default=10, help="images to show for each (default: 10)")
    parser.add_argument(
        "--page", type=_page_path, default=Path("attribution.html"), help="default: attribution.html"
    )
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number of 1 or more, got {text!r}")
    return int(text)


def _page_path(text: str) -> Path:
    """Refused before the work, not after it: a page takes the place of an earlier one, of nothing else."""
    path = Path(text)
    if path.exists() and not (path.is_file() and path.suffix.lower() in (".html", ".htm")):
        raise argparse.ArgumentTypeError(f"wanted a new file, or a page (.html) to replace, got {text!r}")
    return path


def _attribute_all(thumbnails: dict[Path, str], name: str | None, top: int, *, root: Path) -> tuple[str, str]:
    """The attributions of the pictures, as text and as a page. Drops those that the backbone cannot take."""
    params = root / "params.yaml"
    name = name or _first_backbone(params)
    settings = load_params(BackboneSettings, f"featurize.settings.{name}", params)
    data = root / "data"
    paths = {
        "distractors": data / "features" / name / "distractors",
        "exemplars": data / "features" / name / "exemplars",
        "mapper": data / "mappers" / name / "mapper.safetensors",
        "calibrator": data / "calibrators" / f"{name}.json",
        "distractor images": data / "world" / "distractors",
        "exemplar images": data / "world" / "exemplars.parquet",
    }
    missing = [path for path in paths.values() if not path.exists()]
    if missing:
        raise FileNotFoundError(f"{missing[0]}: not made yet; run: dvc repro")
    sets = [FeatureSet.open(paths[kind], backbone=name) for kind in ("distractors", "exemplars")]
    mapper = Mapper.load(paths["mapper"], backbone=name, dim=sets[0].space.dim)
    calibrator = Calibrator.load(paths["calibrator"])
    backbone = load_backbone(name, settings, root=root)
    for features in sets:
        # Other weights or other preprocessing since the features were made: the scores would mean nothing.
        check_same_space(features.path, backbone.space, features.space)
    distractors, exemplars = sets
    all_exemplars = exemplars.take(np.arange(len(exemplars)))
    gallery = Gallery(exemplars.image_ids, all_exemplars, distractors, np.arange(len(distractors)))
    queries = mapper.map_synth(_encode(backbone, thumbnails))
    found = attribute_all(gallery, mapper, queries, {name: calibrator}, k=min(top, len(gallery)))[name]
    answers = [_answer(str(path), found, query, gallery) for query, path in enumerate(thumbnails)]
    shown = sorted({match.image_id for answer in answers for match in answer.matches})
    # Ready features have no pictures here, but what their own table says of them.
    rows = describe(distractors, shown)
    for table in (paths["distractor images"], paths["exemplar images"]):
        rows |= find_rows(table, shown, ("image", "caption"))
    sure = _how_sure(root / "metrics" / f"{name}.json")
    text = "\n".join([*(_as_text(answer, rows) for answer in answers), *sure])
    sections = [_as_html(*pair, rows) for pair in zip(answers, thumbnails.values(), strict=True)]
    return text, _page(name, [*sections, *(f"<p>{_escaped(line)}</p>" for line in sure)])


def _encode(backbone: Backbone, thumbnails: dict[Path, str]) -> np.ndarray:
    """A row for each picture. One that is refused is told of, and dropped; raises ValueError if all are."""
    vectors = []
    for path in list(thumbnails):
        try:
            vectors.append(backbone.encode([decode_image(path)]))
        except ImageError as error:
            _complain(f"{path}: {error}")
            del thumbnails[path]
    if not vectors:
        raise ValueError(f"no picture that {backbone.space.backbone} can take")
    return np.concatenate(vectors)


def _first_backbone(params: Path) -> str:
    try:
        return str(read_yaml(params)["featurize"]["backbones"][0])
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{params}: featurize.backbones: wanted a list of one or more") from None


def _answer(name: str, found: Attribution, query: int, gallery: Gallery) -> Answer:
    rows = found.ids[query][found.ids[query] >= 0]
    columns = (rows, gallery.image_ids(rows), found.scores[query], found.influence[query])
    matches = [
        Match(
            rank,
            image_id,
            "exemplar" if row < len(gallery.exemplars) else "distractor",
            float(score),
            float(share),
        )
        for rank, (row, image_id, score, share) in enumerate(zip(*columns, strict=False), start=1)
    ]
    shown_support = sum(match.influence > 0 for match in matches)
    others = int(found.support[query]) - shown_support
    return Answer(name, matches, float(found.remainder[query]), others, len(gallery))


def _how_sure(metrics: Path) -> list[str]:
    """A line on how often such answers were right in the evaluation, if there was one."""
    if not metrics.is_file():
        return []
    found = read_json(metrics)
    recalls = []
    for kind in sorted(found.keys() & {"object", "style"}):
        share, chance = (found[kind]["all"][name]["recall_at_10"] for name in ("mapped", "chance"))
        recalls.append(f"{share:.1%} for {kind}s (by chance {chance:.2%})")
    error = found["calibration"]["after"]["expected_calibration_error"]
    return [
        f"how sure: of the known sources of test images, the first 10 held {', '.join(recalls)}; "
        f"influence given and influence due differed by {error:.1%} ({metrics})"
    ]


def _as_text(answer: Answer, rows: dict[str, dict[str, Any]]) -> str:
    width = max(len(match.image_id) for match in answer.matches)
    lines = [_printable(answer.name), f"  rank   score  influence  {'image':{width}}  kind        caption"]
    for match in answer.matches:
        caption = _printable(rows.get(match.image_id, {}).get("caption") or "")
        share, image_id = f"{match.influence:.2%}", _printable(match.image_id)
        lines.append(
            f"{match.rank:6} {match.score:7.4f} {share:>10}  {image_id:{width}}  {match.kind:10}  {caption}"
        )
    return "\n".join([*lines, f"  {_rest(answer)}"])


def _rest(answer: Answer) -> str:
    return (
        f"remainder {answer.remainder:.2%}, the influence of {answer.others:,} other images "
        f"in a gallery of {answer.gallery:,}"
    )


def _as_html(answer: Answer, thumbnail: str, rows: dict[str, dict[str, Any]]) -> str:
    figures = [
        f'<figure><img src="{thumbnail}" alt="the picture"><figcaption>the picture</figcaption></figure>'
    ]
    most = max(match.influence for match in answer.matches) or 1.0
    for match in answer.matches:
        row = rows.get(match.image_id)
        image = _embedded(decode_image(row["image"], name=match.image_id)) if row and "image" in row else ""
        caption = _escaped((row or {}).get("caption") or "")
        figures.append(
            f'<figure><img src="{image}" alt="{caption}">'
            f'<div class="bar" style="width: {match.influence / most:.2%}"></div>'
            f"<figcaption>{match.rank}. <b>{match.influence:.2%}</b>, score {match.score:.4f}<br>"
            f"{match.kind} {_escaped(match.image_id)}<br>{caption}</figcaption></figure>"
        )
    title, row_html = _escaped(answer.name), "\n".join(figures)
    return f'<section><h2>{title}</h2>\n<div class="row">{row_html}</div>\n<p>{_rest(answer)}</p></section>'


def _page(backbone: str, sections: list[str]) -> str:
    title = f"Most influential images ({_escaped(backbone)})"
    body = "\n".join(sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def _embedded(image: Image.Image) -> str:
    """The image, at most THUMBNAIL_PIXELS a side, as a data URI."""
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _escaped(text: str) -> str:
    return html.escape(_printable(text))


def _printable(text: str) -> str:
    """The text on one line: file names may hold line breaks, terminal codes or bytes that are no text."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _tell(text: str) -> None:
    """On stdout, in the characters it has, and as long as somebody reads."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has seen enough; what is left in the buffer must go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str) -> None:
    print(f"attribution: {_printable(message)}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
