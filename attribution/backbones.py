"""Backbones: images in, one un-normalized vector each out, in a named and versioned space."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from attribution.backbone_settings import NETS, BackboneSettings
from attribution.features import LENGTH_ONE, Space, length_one
from attribution.files import atomic_path, read_json, write_json
from attribution.memory import halving
from attribution.nets import Net, build_open_clip, build_timm, load_torchscript
from attribution.preprocessing import Preprocessing, library_preprocessing
from attribution.weights import fitting, read_weights, weights_digest, weights_file

if TYPE_CHECKING:
    import torch

# torch, timm and open_clip cost seconds to import: only where a net is built.

HISTOGRAM_BINS = 8
UNTRAINED_SEED = 0
Forward = Callable[[UInt8[np.ndarray, "images height width 3"]], Float[np.ndarray, "images dim"]]


@dataclasses.dataclass
class Backbone:
    """`encode` gives each RGB image's vector in `space`, un-normalized.

    `batch_size` images go through at once; where memory does not hold so many, it is halved, with a warning.
    `one_core_each`: several batches at once, in threads of attribution.threads, are faster than one on all
    cores.
    """

    space: Space
    preprocessing: Preprocessing
    batch_size: int
    forward: Forward
    one_core_each: bool = False

    def encode(self, images: Sequence[Image.Image]) -> Float[np.ndarray, "images dim"]:
        """One float32 row per image, in order."""
        step = self.batch_size
        batches = [images[start : start + step] for start in range(0, len(images), step)]

        def encode(batch: Sequence[Image.Image]) -> np.ndarray:
            return self.encode_pixels(self.preprocessing.pixels(batch))

        if self.one_core_each and len(batches) > 1:
            from attribution.threads import one_core_each

            with one_core_each(len(os.sched_getaffinity(0))) as pool:
                rows = list(pool.map(encode, batches))
        else:
            rows = list(map(encode, batches))
        return np.concatenate([np.empty((0, self.space.dim), np.float32), *rows])

    def encode_pixels(
        self, pixels: UInt8[np.ndarray, "images height width 3"]
    ) -> Float[np.ndarray, "images dim"]:
        """One float32 row per image that went through `preprocessing`, in order."""
        rows, self.batch_size = halving(
            self.forward, pixels, self.batch_size, where=self.space.backbone, noun="images"
        )
        return np.concatenate([np.empty((0, self.space.dim), np.float32), *rows])


def load_backbone(name: str, settings: BackboneSettings, *, root: Path) -> Backbone:
    """The backbone that `settings` describe, ready to encode; paths in them count from `root`.

    Its space's revision is a digest of the weights in use, and the precision if that is not float32. Raises
    FileNotFoundError for a model folder or weights that are not there, ValueError for weights that do not fit
    or are not the wanted ones, and for another image size than the model's.
    """
    if settings.library == "pixels":
        side = settings.image_size
        plain = Preprocessing("squash", side, side, "box", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        return _backbone(name, settings, "1", plain, _pixels)
    if settings.library == "color_histogram":
        side = settings.image_size
        plain = Preprocessing("squash", side, side, "box", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return _backbone(name, settings, f"1, {HISTOGRAM_BINS} bins a channel", plain, _color_histogram)
    import torch

    assert settings.library in NETS
    net = _load_net(name, settings, root)
    if net.preprocessing.crop != settings.image_size:
        raise ValueError(
            f"{name}: image_size {settings.image_size}, but the model takes {net.preprocessing.crop} pixels"
        )
    halved = settings.precision not in (None, "float32")
    revision = f"{net.revision}, {settings.precision}" if halved else net.revision
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    forward = _net_forward(net, device, settings.precision if halved else None)
    backbone = _backbone(name, settings, revision, net.preprocessing, forward)
    return dataclasses.replace(backbone, one_core_each=device.type == "cpu")


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
    encode = (lambda pixels: length_one(forward(pixels))) if settings.normalized else forward
    dim = encode(np.zeros((1, preprocessing.crop, preprocessing.crop, 3), np.uint8)).shape[1]
    said = str(preprocessing) + LENGTH_ONE * bool(settings.normalized)
    space = Space(name, revision, said, dim, settings.dtype)
    return Backbone(space, preprocessing, settings.batch_size, encode)


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


def _net_forward(net: Net, device: torch.device, precision: str | None) -> Forward:
    """Resized pixels to float32 vectors; half precisions by autocast."""
    import torch

    # Pixels come with their channels together, which convolutions on CPUs and tensor cores like best.
    net.module.to(device).to(memory_format=torch.channels_last).eval()
    mean, std = (
        torch.tensor(values, device=device)[:, None, None]
        for values in (net.preprocessing.mean, net.preprocessing.std)
    )

    def arithmetic() -> contextlib.AbstractContextManager[Any]:
        if precision is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=getattr(torch, precision))

    @torch.inference_mode()
    def forward(pixels: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float()
        with arithmetic():
            vectors = net.encode(inputs.div_(255).sub_(mean).div_(std))
        return vectors.float().cpu().numpy()

    return forward


def _load_net(name: str, settings: BackboneSettings, root: Path) -> Net:
    """The net that `settings` describe, on the CPU; the random generators are left alone."""
    import torch

    if settings.library == "torchscript":
        return load_torchscript(name, settings, root)
    assert settings.model is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        if (root / settings.model / "config.json").is_file():
            return _build_from_folder(name, settings, root)
        if "/" in settings.model and ":" not in settings.model:
            where = root / settings.model / "config.json"
            raise FileNotFoundError(f"{where}: no such file (model of backbone {name})")
        build = build_open_clip if settings.library == "open_clip" else build_timm
        return build(name, settings, root)


def _build_from_folder(name: str, settings: BackboneSettings, root: Path) -> Net:
    folder = root / str(settings.model)
    config = read_json(folder / "config.json")
    if config["library"] != settings.library:
        raise ValueError(
            f"{folder}/config.json: library {config['library']}, but {name} says {settings.library}"
        )
    file = weights_file(name, settings, root)
    if settings.weights is not None and file is None:
        raise ValueError(f"{name}: weights {settings.weights}: wanted a file, for the model is a folder")
    if settings.library == "open_clip":
        from open_clip.model import CLIP

        net: Any = CLIP(**config["model_cfg"])
    else:
        import timm

        net = timm.create_model(config["architecture"], num_classes=0, **config["kwargs"])
    if file is not None:
        with fitting(file):
            # float16 on disk, float32 in the net: load_state_dict converts.
            net.load_state_dict(read_weights(file, settings.rename), strict=True)
    size = config["preprocess"]["size"]
    own = library_preprocessing(name, "shortest", size, size, config["preprocess"])
    encode = net.encode_image if settings.library == "open_clip" else net
    return Net(net, encode, settings.preprocessing or own, weights_digest(net))


def _compact(name: str, tensor: torch.Tensor) -> torch.Tensor:
    compact = tensor.detach().cpu().contiguous()
    if compact.is_floating_point():
        compact = compact.half()
        if not compact.isfinite().all():
            raise ValueError(f"weight {name}: values that float16 cannot hold")
    return compact
