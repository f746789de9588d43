"""The gate: does the base model draw what it is told? If this fails, nothing after it counts.

In:   data/base/mini and the supervised backbone with its reading heads.
Out:  metrics/gate.json, docs/base_samples.png.
Cost: a minute on 2 cores; cached like any stage.

Prompts `a MEDIUM of a COLOR NOUN PLACE` are drawn over the whole grammar, each is sampled once, and a
classifier trained on rendered pictures reads the samples. Controls: chance, the same readings against another
prompt's words (permuted), and the same classifier on renderings of the same prompts, which bounds what can be
read.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from attribution.backbones import BackboneSettings, load_backbone
from attribution.base_model import BaseSettings, decode_latents, load_base
from attribution.command import command_line
from attribution.files import atomic_path, write_json
from attribution.params import load_params
from attribution.sampling import Drawing, Sampler, base_stack, draw_latents
from attribution.seeds import seed_from
from miniworld.captions import PLACES
from miniworld.draw import render
from miniworld.readings import READINGS, true_readings
from miniworld.scene import Scene, draw_artist, draw_scene

READ = ("noun", "color", "medium", "background")
_STREAM = 5


@dataclass(frozen=True)
class Params:
    """`gate` in params.yaml; `wanted` is the least share of prompts read back right."""

    seed: int
    prompts: int
    images_per_batch: int
    sampler: Sampler
    wanted: dict[str, float]


def draw_scenes(params: Params) -> list[Scene]:
    """The scenes the prompts describe: no palette, an ordinary pose, a plain texture or any."""
    scenes = []
    for index in range(params.prompts):
        rng = np.random.default_rng((params.seed, _STREAM, index))
        scenes.append(draw_scene(rng, artist=draw_artist(rng, toned=0.0), ordinary_pose=True))
    return scenes


def prompt(scene: Scene) -> str:
    """What the base model is told."""
    instance = scene.instance
    return f"a {scene.artist.medium} of a {instance.color} {instance.noun} {PLACES[scene.background]}"


def sample_base(
    base: BaseSettings, prompts: list[str], sampler: Sampler, *, seed: int, images_per_batch: int
) -> np.ndarray:
    """One sample of the base model per prompt: uint8 [prompts, height, width, 3]."""
    pipe = load_base(base)
    drawings = [Drawing(0, text, seed_from(seed, "gate", i)) for i, text in enumerate(prompts)]
    stack = base_stack(pipe, ["a"])
    return decode_latents(pipe, draw_latents(pipe, stack, drawings, sampler, batch_size=images_per_batch))


def read_pictures(
    pictures: np.ndarray, settings: BackboneSettings, heads: Path, *, root: Path
) -> dict[str, np.ndarray]:
    """What the classifier reads in each picture, by reading: an index into its values."""
    backbone = load_backbone("supervised", settings, root=root)
    features = backbone.encode([Image.fromarray(picture) for picture in pictures])
    linear = load_file(heads)
    return {
        name: np.argmax(features @ linear[f"{name}.weight"].T + linear[f"{name}.bias"], axis=1)
        for name in READINGS
    }


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share of `count` independent trials."""
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return float(centre - half), float(centre + half)


def reading_report(name: str, drawn: np.ndarray, rendered: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The share of prompts read back right from the samples, its interval and its controls."""
    share = float(np.mean(drawn == truth))
    low, high = wilson(share, len(truth))
    return {
        "share": share,
        "interval_low": low,
        "interval_high": high,
        "chance": 1 / len(READINGS[name]),
        "permuted": float(np.mean(drawn == np.roll(truth, len(truth) // 2))),
        "rendered": float(np.mean(rendered == truth)),
    }


def sample_grid(pictures: np.ndarray, columns: int) -> Image.Image:
    """The pictures in rows, twice their size."""
    rows = len(pictures) // columns
    count, height, width, _ = pictures[: rows * columns].shape
    grid = pictures[:count].reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    image = Image.fromarray(np.ascontiguousarray(grid.reshape(rows * height, columns * width, 3)))
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)


def run(
    params: Params,
    base: BaseSettings,
    classifier: BackboneSettings,
    *,
    heads: Path,
    metrics: Path,
    grid: Path,
    root: Path,
) -> None:
    """Draws, reads and writes the report and a page of samples."""
    scenes = draw_scenes(params)
    pictures = sample_base(
        base,
        [prompt(scene) for scene in scenes],
        params.sampler,
        seed=params.seed,
        images_per_batch=params.images_per_batch,
    )
    drawn = read_pictures(pictures, classifier, heads, root=root)
    renderings = np.stack([np.asarray(render(scene)) for scene in scenes])
    rendered = read_pictures(renderings, classifier, heads, root=root)
    truth = [true_readings(scene) for scene in scenes]
    report = {
        name: reading_report(name, drawn[name], rendered[name], np.array([true[name] for true in truth]))
        for name in READ
    }
    passed = all(report[name]["share"] >= least for name, least in params.wanted.items())
    write_json(
        metrics,
        {"prompts": params.prompts, "readings": report, "wanted": params.wanted, "passed": passed},
    )
    with atomic_path(grid) as temporary:
        sample_grid(pictures[:96], columns=16).save(temporary)
    for name, least in params.wanted.items():
        print(f"gate: {name} read right in {report[name]['share']:.1%} of samples, wanted {least:.0%}")


def main() -> None:
    """`python -m stages.gate`."""
    run(
        load_params(Params, "gate"), load_params(BaseSettings, "base"),
        load_params(BackboneSettings, "featurize.settings.supervised"),
        heads=Path("data/backbones/supervised/heads.safetensors"), metrics=Path("metrics/gate.json"),
        grid=Path("docs/base_samples.png"), root=Path(),
    )  # fmt: skip


if __name__ == "__main__":
    with command_line("stages.gate", __doc__) as parser:
        parser.parse_args()
        main()
