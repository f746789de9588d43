"""The full world's backbones: their pixels are their library's, their dims their papers'; no real weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attribution import nets
from attribution.backbones import BackboneSettings, Preprocessing
from attribution.params import load_params
from stages import featurize

ROOT = Path(__file__).resolve().parents[1]
WORLD = ROOT / "worlds" / "full"
ROWS = load_params(featurize.Params, "featurize", WORLD / "params.yaml").settings
RNG = np.random.default_rng(3)
SIZES = [(500, 375), (375, 500), (288, 288), (640, 200), (301, 800), (60, 41), (224, 225), (700, 699)]
NOISE = Image.fromarray(RNG.integers(0, 256, (90, 70, 3), dtype=np.uint8))
IMAGES = [NOISE.resize(size) for size in SIZES]
DIMS = {"clip": 512, "dino": 768, "moco": 768, "vit": 768, "sscd": 512}
DIMS |= {"dinov2": 768, "siglip": 768, "clip_l14": 768, "csd": 768}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def assert_same_pixels(preprocessing: Preprocessing, transform: Any) -> None:
    """To the last bit, through the same conversion to floats."""
    for image in IMAGES:
        pixels = torch.from_numpy(preprocessing.pixels([image])[0]).permute(2, 0, 1).float().div(255)
        mean, std = (torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
        assert torch.equal((pixels - mean) / std, transform(image)), image.size


def build(name: str, row: BackboneSettings) -> nets.Net:
    """The net in its true size, without memory for its weights."""
    library = {"open_clip": nets.build_open_clip, "timm": nets.build_timm}[row.library]
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(nets, "weights_digest", lambda net: "0" * 16)
        patch.setattr("open_clip.factory._set_model_device_and_precision", lambda *arguments: None)
        return library(name, row, WORLD)


@pytest.fixture(scope="module")
def built() -> dict[str, nets.Net]:
    """Every net that a library builds."""
    rows = {name: row for name, row in ROWS.items() if row.library in ("open_clip", "timm")}
    return {
        name: build(name, dataclasses.replace(row, weights=None, rename=None)) for name, row in rows.items()
    }


def test_the_reference_s_five_and_the_four_newer_ones_are_there() -> None:
    assert {*DIMS, "pixels", "color_histogram"} == set(ROWS)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.library in ("timm", "open_clip")])
def test_dims_and_sizes_are_those_of_the_nets(built: dict[str, nets.Net], name: str) -> None:
    net, row = built[name], ROWS[name]
    assert net.preprocessing.crop == row.image_size
    inputs = torch.zeros(1, 3, row.image_size, row.image_size, device="meta")
    with torch.inference_mode():
        assert net.encode(inputs).shape == (1, DIMS[name])


@pytest.mark.parametrize(
    ("name", "resize", "crop", "interpolation", "values"),
    [
        ("clip", 224, 224, "bicubic", CLIP),
        ("dino", 256, 224, "bicubic", IMAGENET),
        ("moco", 256, 224, "bilinear", IMAGENET),
        ("vit", 384, 384, "bicubic", HALF),
        ("sscd", 288, 288, "bilinear", IMAGENET),
    ],
)
def test_the_reference_s_preprocessing_pixel_for_pixel(
    built: dict[str, nets.Net], name: str, resize: int, crop: int, interpolation: str, values: Any
) -> None:
    from torchvision import transforms  # type: ignore[import-untyped]

    row = ROWS[name]
    ours = row.preprocessing if name == "sscd" else built[name].preprocessing
    assert ours is not None
    mode = transforms.InterpolationMode(interpolation)
    assert_same_pixels(
        ours,
        transforms.Compose(
            [
                transforms.Resize(resize, interpolation=mode),
                transforms.CenterCrop(crop),
                transforms.ToTensor(),
                transforms.Normalize(*values),
            ]
        ),
    )


@pytest.mark.parametrize("name", ["clip", "siglip", "clip_l14", "csd"])
def test_preprocessing_of_open_clip_pixel_for_pixel(built: dict[str, nets.Net], name: str) -> None:
    """Against the transform that open_clip builds for the tag, which is not downloaded for it."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    row = ROWS[name]
    tag = row.weights if row.weights in ("openai", "webli") else "openai"
    said = open_clip.get_pretrained_cfg(row.model, tag)
    keys = ("mean", "std", "interpolation", "resize_mode")
    config = PreprocessCfg(size=row.image_size, **{key: said[key] for key in keys})
    net = built[name]
    if name == "siglip":  # mean, std and resizing come with the tag
        tagged = dataclasses.replace(row, weights="webli", revision="0" * 40)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nets, "hub_file", lambda *arguments: None)
            net = build(name, tagged)
    assert_same_pixels(net.preprocessing, image_transform_v2(config, is_train=False))


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_preprocessing_of_timm_pixel_for_pixel(built: dict[str, nets.Net], name: str) -> None:
    import timm

    config = timm.data.resolve_model_data_config(built[name].module)
    assert_same_pixels(built[name].preprocessing, timm.data.create_transform(**config))
