"""Backbones: images in, one un-normalized vector each out, in a named and versioned space."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from attribution.features import Space
from attribution.files import atomic_path, read_json, write_json
from attribution.images import MAX_PIXELS, ImageError

if TYPE_CHECKING:
    import torch

# torch, timm and open_clip cost seconds to import: only where a net is built.

HISTOGRAM_BINS = 8
UNTRAINED_SEED = 0
_INTERPOLATION = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
}


@dataclass(frozen=True)
class BackboneSettings:
    """One row of `featurize.settings`.

    `model` is a name of the library (also "hf-hub:..." or "local-dir:...") or a folder with a config.json,
    `weights` a file, a pretrained tag of the library ("pretrained" in timm), or null for seeded random
    weights. Paths count from the repository's root. `image_size` is what the model takes, in pixels a side;
    `dtype` is what is stored.
    """

    library: Literal["pixels", "color_histogram", "timm", "open_clip"]
    model: str | None
    weights: str | None
    image_size: int
    dtype: Literal["float32", "float16"]
    batch_size: int

    def __post_init__(self) -> None:
        needs_model = self.library in ("timm", "open_clip")
        if needs_model != (self.model is not None):
            raise ValueError(
                f"{self.library} {'needs a' if needs_model else 'takes no'} model, got {self.model}"
            )
        if not needs_model and self.weights is not None:
            raise ValueError(f"{self.library} takes no weights, got {self.weights}")
        if self.image_size < 1 or self.batch_size < 1:
            raise ValueError(
                f"image_size {self.image_size} and batch_size {self.batch_size}: wanted 1 or more"
            )


@dataclass(frozen=True)
class Preprocessing:
    """All that happens to the pixels of an RGB image before a backbone, in the arithmetic of torchvision.

    "shortest": the shorter side becomes `resize` pixels, then the centre `crop` pixels square are kept;
    "squash": both sides become `resize`. Then x / 255 - mean, over std.
    """

    mode: Literal["shortest", "squash"]
    resize: int
    crop: int
    interpolation: Literal["bilinear", "bicubic", "box"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __str__(self) -> str:
        mean, std = ("/".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{self.mode} {self.resize} {self.interpolation}, crop {self.crop}, mean {mean}, std {std}"

    def pixels(self, images: Sequence[Image.Image]) -> UInt8[np.ndarray, "images height width 3"]:
        """The images resized and cropped, bytes. No image is resampled that already has the size."""
        pixels = np.empty((len(images), self.crop, self.crop, 3), np.uint8)
        for row, image in enumerate(images):
            pixels[row] = np.asarray(self._fit(image))
        return pixels

    def _fit(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.mode == "squash":
            resized = (self.resize, self.resize)
        elif width <= height:
            resized = (self.resize, self.resize * height // width)
        else:
            resized = (self.resize * width // height, self.resize)
        if resized[0] * resized[1] > MAX_PIXELS:
            raise ImageError(
                f"{width} x {height} pixels: sides too unequal to bring the shorter to {self.resize}"
            )
        if resized != image.size:
            image = image.resize(resized, _INTERPOLATION[self.interpolation])
        if image.size != (self.crop, self.crop):
            left, top = round((image.width - self.crop) / 2), round((image.height - self.crop) / 2)
            image = image.crop((left, top, left + self.crop, top + self.crop))
        return image


@dataclass(frozen=True)
class Backbone:
    """`encode` gives each RGB image's vector in `space`, un-normalized."""

    space: Space
    preprocessing: Preprocessing
    batch_size: int
    forward: Callable[[UInt8[np.ndarray, "images height width 3"]], Float[np.ndarray, "images dim"]]

    def encode(self, images: Sequence[Image.Image]) -> Float[np.ndarray, "images dim"]:
        """One float32 row per image, in order, computed `batch_size` images at a time."""
        starts = range(0, len(images), self.batch_size)
        batches = [images[start : start + self.batch_size] for start in starts]
        rows = [self.forward(self.preprocessing.pixels(batch)) for batch in batches]
        return np.concatenate([np.empty((0, self.space.dim), np.float32), *rows])


def load_backbone(name: str, settings: BackboneSettings, *, root: Path) -> Backbone:
    """The backbone that `settings` describe, ready to encode; paths in them count from `root`.

    Its space's revision is a digest of the weights in use. Raises FileNotFoundError for a model folder or
    weights that are not there, ValueError for weights that do not fit or another image size than the model's.
    """
    if settings.library == "pixels":
        side = settings.image_size
        plain = Preprocessing("squash", side, side, "box", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        return _backbone(name, settings, "1", plain, _pixels)
    if settings.library == "color_histogram":
        side = settings.image_size
        plain = Preprocessing("squash", side, side, "box", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return _backbone(name, settings, f"1, {HISTOGRAM_BINS} bins a channel", plain, _color_histogram)
    net, preprocessing, encode = _load_net(name, settings, root)
    if preprocessing.crop != settings.image_size:
        raise ValueError(
            f"{name}: image_size {settings.image_size}, but the model takes {preprocessing.crop} pixels"
        )
    return _backbone(
        name, settings, _weights_digest(net), preprocessing, _net_forward(net, encode, preprocessing)
    )


def write_backbone(folder: Path, config: dict[str, Any], net: torch.nn.Module) -> None:
    """The folder holds what `load_backbone` needs: config.json and model.safetensors (float16, compact).

    `config` is {"library": "open_clip", "model_cfg": {...}, "preprocess": {...}, "revision": str} or
    {"library": "timm", "architecture": str, "kwargs": {...}, "preprocess": {...}, "revision": str}, with
    preprocess = {"size", "mean", "std", "interpolation"}.
    """
    from safetensors.torch import save_file

    weights = {name: _compact(name, tensor) for name, tensor in net.state_dict().items()}
    with atomic_path(folder) as partial:
        partial.mkdir()
        write_json(partial / "config.json", config)
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})


def _backbone(
    name: str,
    settings: BackboneSettings,
    revision: str,
    preprocessing: Preprocessing,
    forward: Callable[[np.ndarray], np.ndarray],
) -> Backbone:
    dim = forward(np.zeros((1, preprocessing.crop, preprocessing.crop, 3), np.uint8)).shape[1]
    space = Space(name, revision, str(preprocessing), dim, settings.dtype)
    return Backbone(space, preprocessing, settings.batch_size, forward)


def _pixels(pixels: UInt8[np.ndarray, "images height width 3"]) -> Float[np.ndarray, "images dim"]:
    return pixels.reshape(len(pixels), -1).astype(np.float32) / np.float32(127.5) - np.float32(1)


def _color_histogram(pixels: UInt8[np.ndarray, "images height width 3"]) -> Float[np.ndarray, "images dim"]:
    """Roots of the shares of joint RGB bins: unit rows, whose cosine is the Bhattacharyya coefficient."""
    count, cells = len(pixels), HISTOGRAM_BINS**3
    bins = pixels.reshape(count, -1, 3).astype(np.int64) * HISTOGRAM_BINS // 256
    cell = (bins[..., 0] * HISTOGRAM_BINS + bins[..., 1]) * HISTOGRAM_BINS + bins[..., 2]
    offsets = np.arange(count)[:, None] * cells
    counts = np.bincount((cell + offsets).ravel(), minlength=count * cells).reshape(count, cells)
    return np.sqrt(counts / cell.shape[1], dtype=np.float32)


def _net_forward(
    net: torch.nn.Module, encode: Callable[[torch.Tensor], torch.Tensor], preprocessing: Preprocessing
) -> Callable[[np.ndarray], np.ndarray]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.to(device).eval().requires_grad_(False)
    mean, std = (
        torch.tensor(values, device=device)[:, None, None]
        for values in (preprocessing.mean, preprocessing.std)
    )

    @torch.inference_mode()
    def forward(pixels: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float().contiguous()
        vectors = encode(inputs.div_(255).sub_(mean).div_(std))
        return vectors.float().cpu().numpy()

    return forward


def _load_net(
    name: str, settings: BackboneSettings, root: Path
) -> tuple[torch.nn.Module, Preprocessing, Callable[[torch.Tensor], torch.Tensor]]:
    """The net, what its pixels go through, and the function from normalized pixels to vectors."""
    import torch

    assert settings.model is not None
    weights = _weights_source(name, settings, root)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        folder = root / settings.model
        if (folder / "config.json").is_file():
            net, preprocessing = _build_from_folder(name, settings, folder, weights)
        elif "/" in settings.model and ":" not in settings.model:
            raise FileNotFoundError(f"{folder / 'config.json'}: no such file (model of backbone {name})")
        elif settings.library == "open_clip":
            net, preprocessing = _build_open_clip(name, _from_root(settings.model, root), weights)
        else:
            net, preprocessing = _build_timm(name, _from_root(settings.model, root), weights)
    encode: Any = net.encode_image if settings.library == "open_clip" else net
    return net, preprocessing, encode


def _build_from_folder(
    name: str, settings: BackboneSettings, folder: Path, weights: Path | str | None
) -> tuple[torch.nn.Module, Preprocessing]:
    config = read_json(folder / "config.json")
    if config["library"] != settings.library:
        raise ValueError(
            f"{folder}/config.json: library {config['library']}, but {name} says {settings.library}"
        )
    if isinstance(weights, str):
        raise ValueError(f"{name}: weights {weights}: wanted a file, for the model is a folder")
    if settings.library == "open_clip":
        from open_clip.model import CLIP

        net = CLIP(**config["model_cfg"])
    else:
        import timm

        net = timm.create_model(config["architecture"], num_classes=0, **config["kwargs"])
    if weights is not None:
        _load_weights(net, weights)
    size = config["preprocess"]["size"]
    return net, _preprocessing(name, "shortest", size, size, config["preprocess"])


def _build_open_clip(
    name: str, model: str, weights: Path | str | None
) -> tuple[torch.nn.Module, Preprocessing]:
    import open_clip

    own = _brings_its_own_weights(name, model, weights)
    net, _, _ = open_clip.create_model_and_transforms(
        model,
        pretrained=None if own or weights is None else str(weights),
        load_weights=weights is not None,
        require_pretrained=weights is not None,
    )
    config = net.visual.preprocess_cfg
    size = config["size"]
    if isinstance(size, tuple | list):
        size = _square(name, size)
    return net, _preprocessing(name, config["resize_mode"], size, size, config)


def _build_timm(name: str, model: str, weights: Path | str | None) -> tuple[torch.nn.Module, Preprocessing]:
    import timm
    from timm.data import resolve_model_data_config

    _brings_its_own_weights(name, model, weights)
    if isinstance(weights, str) and weights != "pretrained":
        raise ValueError(
            f"{name}: weights {weights}: wanted a file, pretrained or null (tags go into the model's name)"
        )
    overlay = {"file": str(weights)} if isinstance(weights, Path) else None
    net = timm.create_model(
        model, pretrained=weights is not None, pretrained_cfg_overlay=overlay, num_classes=0
    )
    config = resolve_model_data_config(net)
    size = _square(name, config["input_size"][1:])
    mode = {"center": "shortest"}.get(config["crop_mode"], config["crop_mode"])
    return net, _preprocessing(name, mode, int(size / config["crop_pct"]), size, config)


def _preprocessing(name: str, mode: str, resize: int, crop: int, config: dict[str, Any]) -> Preprocessing:
    interpolation = config["interpolation"]
    if mode not in ("shortest", "squash"):
        raise ValueError(f"{name}: resizing by {mode}, wanted shortest or squash")
    if interpolation not in _INTERPOLATION:
        raise ValueError(f"{name}: interpolation {interpolation}, wanted {' or '.join(_INTERPOLATION)}")
    mean, std = (tuple(float(value) for value in config[key]) for key in ("mean", "std"))
    return Preprocessing(mode, resize, crop, interpolation, mean, std)  # type: ignore[arg-type]  # just checked


def _square(name: str, size: Sequence[int]) -> int:
    if size[0] != size[1]:
        raise ValueError(f"{name}: the model takes {size[0]} x {size[1]} pixels, wanted a square")
    return size[0]


def _brings_its_own_weights(name: str, model: str, weights: Path | str | None) -> bool:
    own = ":" in model
    if own and weights not in (None, "pretrained"):
        raise ValueError(
            f"{name}: {model} brings its own weights; wanted weights: pretrained or null, got {weights}"
        )
    return own


def _from_root(model: str, root: Path) -> str:
    prefix = "local-dir:"
    return f"{prefix}{root / model.removeprefix(prefix)}" if model.startswith(prefix) else model


def _weights_source(name: str, settings: BackboneSettings, root: Path) -> Path | str | None:
    """A file that is there, a tag of the library's, or None."""
    if settings.weights is None:
        return None
    file = root / settings.weights
    if file.is_file():
        return file
    if "/" in settings.weights or file.suffix:
        raise FileNotFoundError(f"{file}: no such file (weights of backbone {name})")
    return settings.weights


def _load_weights(net: torch.nn.Module, file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # float16 on disk, float32 in the net: load_state_dict converts.
        net.load_state_dict(load_file(file), strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{file}: not the weights of this model: {' '.join(str(error).split())}") from error


def _weights_digest(net: torch.nn.Module) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _compact(name: str, tensor: torch.Tensor) -> torch.Tensor:
    compact = tensor.detach().cpu().contiguous()
    if compact.is_floating_point():
        compact = compact.half()
        if not compact.isfinite().all():
            raise ValueError(f"weight {name}: values that float16 cannot hold")
    return compact
