"""The second gate: does customization transfer identity?

In:   the exemplars, the queries and their images, the base model, the shipped backbones.
Out:  metrics/gate_customized.json, docs/customized_samples.png.
Cost: half a minute on 2 cores.

A synthesized object image is compared with its own exemplar and with every other exemplar of the same class,
in spaces that were not trained on the pairs: how often is its own the nearer? A model that learned nothing of
its exemplar gives 1/2. Control: samples of the base model for the same prompts without the learned word.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from attribution.backbones import Backbone, BackboneSettings, load_backbone
from attribution.base_model import BaseSettings
from attribution.command import command_line
from attribution.concepts import Concept, read_concepts
from attribution.customized_model import TOKEN
from attribution.files import atomic_path, write_json
from attribution.images import decode_image, iterate_images
from attribution.params import load_params, require_at_least
from attribution.ranking import bootstrap_interval
from attribution.sampling import Sampler
from stages.gate import sample_base, sample_grid

GRID_COLUMNS = 10


@dataclass(frozen=True)
class Params:
    """`wanted` is the share of images that the first backbone must find nearer to their own exemplar."""

    seed: int
    backbones: tuple[str, ...]
    control_prompts: int
    images_per_batch: int
    resamples: int
    sampler: Sampler
    wanted: float

    def __post_init__(self) -> None:
        if not self.backbones:
            raise ValueError("backbones: wanted 1 or more, got none")
        require_at_least(self, seed=0, control_prompts=1, images_per_batch=1, resamples=1)


@dataclass(frozen=True)
class Drawn:
    """Images of object concepts: row i shows concept `concepts[i]` and was asked for with `prompts[i]`."""

    concepts: np.ndarray  # [images] rows of the list of concepts
    prompts: list[str]
    pictures: list[Image.Image]


def read_synthesized(queries: Path, tables: Sequence[Path], concepts: Sequence[Concept]) -> Drawn:
    """All synthesized images of the concepts. One that is in several tables is as the last of them has it."""
    rows = pq.read_table(queries, columns=["image_id", "concept_id", "prompt"]).to_pylist()
    known = {row["image_id"]: row for row in rows}
    number = {concept.concept_id: row for row, concept in enumerate(concepts)}
    pictures: dict[str, Image.Image] = {}
    for table in tables:
        for batch in iterate_images(table):
            for image_id, picture in batch:
                if image_id in known and known[image_id]["concept_id"] in number:
                    pictures[image_id] = picture
    found = [number[known[image_id]["concept_id"]] for image_id in pictures]
    prompts = [known[image_id]["prompt"] for image_id in pictures]
    return Drawn(np.array(found, dtype=np.int64), prompts, list(pictures.values()))


def control_samples(params: Params, base: BaseSettings, drawn: Drawn) -> Drawn:
    """The base model's samples of `control_prompts` of the prompts, without the learned word."""
    rng = np.random.default_rng(params.seed)
    count = min(params.control_prompts, len(drawn.prompts))
    chosen = np.sort(rng.choice(len(drawn.prompts), size=count, replace=False))
    prompts = [drawn.prompts[i].replace(f"{TOKEN} ", "") for i in chosen]
    pictures = sample_base(
        base, prompts, params.sampler, seed=params.seed, images_per_batch=params.images_per_batch
    )
    return Drawn(drawn.concepts[chosen], prompts, [Image.fromarray(picture) for picture in pictures])


def own_nearer(
    images: np.ndarray, own: np.ndarray, exemplars: np.ndarray, nouns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Per image: the share of other exemplars of its noun that are farther than its own, and the mean margin.

    Vectors need not be normalized. Images whose noun has one exemplar only are NaN.
    """
    unit = [
        rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (images, exemplars)
    ]
    scores = unit[0] @ unit[1].T
    mine = scores[np.arange(len(own)), own][:, None]
    rival = (nouns[own][:, None] == nouns) & (np.arange(len(nouns)) != own[:, None])
    count = rival.sum(axis=1)
    with np.errstate(invalid="ignore"):
        share = (rival & (mine > scores)).sum(axis=1) / np.where(count, count, np.nan)
        margin = np.where(rival, mine - scores, 0).sum(axis=1) / np.where(count, count, np.nan)
    return share, margin


def compare(
    params: Params, backbone: Backbone, drawn: Drawn, concepts: Sequence[Concept]
) -> dict[str, float]:
    """The share of images nearer to their own exemplar, with its interval by concept, and the mean margin."""
    pictures = [decode_image(one.exemplars[0].image, name=one.concept_id) for one in concepts]
    nouns = np.array([concept.noun for concept in concepts])
    share, margin = own_nearer(
        backbone.encode(drawn.pictures), drawn.concepts, backbone.encode(pictures), nouns
    )
    valid = np.isfinite(share)
    low, high = bootstrap_interval(
        share[valid, None], drawn.concepts[valid], resamples=params.resamples, seed=params.seed
    )
    return {
        "share": float(share[valid].mean()),
        "interval_low": float(low[0]),
        "interval_high": float(high[0]),
        "margin": float(margin[valid].mean()),
        "images": int(valid.sum()),
    }


def sample_page(drawn: Drawn, concepts: Sequence[Concept], rows: int) -> Image.Image:
    """A row per concept: its exemplar, then what its customized model drew."""
    picked = []
    for number in np.unique(drawn.concepts)[:: max(1, len(np.unique(drawn.concepts)) // rows)][:rows]:
        mine = np.flatnonzero(drawn.concepts == number)
        spread = mine[np.linspace(0, len(mine) - 1, GRID_COLUMNS - 1).astype(int)]
        picked.append(decode_image(concepts[number].exemplars[0].image))
        picked += [drawn.pictures[i] for i in spread]
    return sample_grid(np.stack([np.asarray(picture) for picture in picked]), GRID_COLUMNS)


def run(
    params: Params,
    base: BaseSettings,
    settings: dict[str, BackboneSettings],
    *,
    exemplars: Path,
    queries: Path,
    tables: Sequence[Path],
    metrics: Path,
    page: Path,
    root: Path,
) -> None:
    """Writes the report over all object concepts, and a page of samples."""
    concepts = [concept for concept in read_concepts(exemplars) if concept.kind == "object"]
    drawn = read_synthesized(queries, tables, concepts)
    control = control_samples(params, base, drawn)
    spaces = {}
    for name in tqdm(params.backbones, desc="gate", disable=None):
        backbone = load_backbone(name, settings[name], root=root)
        spaces[name] = {
            "customized": compare(params, backbone, drawn, concepts),
            "base": compare(params, backbone, control, concepts),
        }
    judge = params.backbones[0]
    passed = spaces[judge]["customized"]["share"] >= params.wanted > spaces[judge]["base"]["share"]
    write_json(
        metrics,
        {"spaces": spaces, "judge": judge, "chance": 0.5, "wanted": params.wanted, "passed": passed},
    )
    with atomic_path(page) as temporary:
        sample_page(drawn, concepts, rows=12).save(temporary)
    for name, space in spaces.items():
        shares = (space["customized"]["share"], space["base"]["share"])
        print(f"gate: own exemplar nearer in {name}: {shares[0]:.1%}, base model {shares[1]:.1%}")


def main() -> None:
    """`python -m stages.gate_customized`."""
    params = load_params(Params, "gate_customized")
    run(
        params,
        load_params(BaseSettings, "base"),
        {name: load_params(BackboneSettings, f"featurize.settings.{name}") for name in params.backbones},
        exemplars=Path("data/world/exemplars.parquet"),
        queries=Path("data/queries.parquet"),
        tables=[  # an image that is drawn again, by another method perhaps, has the id of the shipped one
            Path("data/shipped/synthesized.parquet"),
            *sorted(Path("data/synthesized").glob("*.parquet")),
        ],
        metrics=Path("metrics/gate_customized.json"),
        page=Path("docs/customized_samples.png"),
        root=Path(),
    )


if __name__ == "__main__":
    with command_line("stages.gate_customized", __doc__) as parser:
        parser.parse_args()
        main()
