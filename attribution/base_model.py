"""The base text-to-image pipeline: which one, loaded frozen, and its way from pixels to latents and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import diffusers
import numpy as np
import torch
import transformers
from diffusers import StableDiffusionPipeline
from jaxtyping import Float, UInt8
from torch import Tensor

from attribution.cross_attention import cross_attention
from attribution.files import content_key


@dataclass(frozen=True)
class BaseSettings:
    """Which pipeline: a folder in diffusers' layout, or a hub id with the revision pinned."""

    model: str
    revision: str | None
    device: str
    dtype: Literal["float32", "float16", "bfloat16"]

    def key(self) -> str:
        """Equal for equal weights in equal precision, wherever the folder lies; no unpinned hub id."""
        if Path(self.model).is_dir():
            return content_key(Path(self.model), self.dtype)
        if self.revision is None:
            raise ValueError(
                f"base.model: {self.model}: no such folder; a hub id wants base.revision: a commit"
            )
        return content_key(self.model, self.revision, self.dtype)


def load_base(settings: BaseSettings) -> StableDiffusionPipeline:
    """The frozen pipeline, in the wanted precision whatever the files hold. Reads safetensors only.

    Raises FileNotFoundError for a folder that is not a pipeline's; ValueError for layers we cannot customize.
    """
    folder = Path(settings.model)
    local = folder.is_dir()
    if local and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder}: no model_index.json; wanted a folder written by save_pretrained")
    halves = local and any(folder.glob("unet/*.fp16.safetensors"))
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(
        settings.model,
        revision=settings.revision,
        variant="fp16" if halves else None,
        dtype=getattr(torch, settings.dtype),
        use_safetensors=True,
        local_files_only=local,
        low_cpu_mem_usage=False,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(settings.device)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    for name, layer in cross_attention(pipe.unet).items():
        if layer.norm_cross or layer.to_k.bias is not None or layer.to_v.bias is not None:
            raise ValueError(
                f"{settings.model}: {name}: keys or values with a norm or a bias are not supported"
            )
    return pipe


def latent_shape(pipe: StableDiffusionPipeline) -> tuple[int, int, int]:
    """Channels, height, width of the latents of one image at the pipeline's own size."""
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return pipe.unet.config.in_channels, height, width


@torch.inference_mode()
def encode_images(
    pipe: StableDiffusionPipeline, images: UInt8[np.ndarray, "images height width 3"], *, batch_size: int = 32
) -> Float[Tensor, "images channels rows columns"]:
    """The latents (the mode of the posterior, in the UNet's scale) of RGB images."""
    parts = []
    for start in range(0, len(images), batch_size):
        pixels = torch.from_numpy(images[start : start + batch_size]).to(pipe.device)
        pixels = pixels.permute(0, 3, 1, 2).to(pipe.vae.dtype) / 127.5 - 1
        parts.append(pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor)
    return torch.cat(parts)


@torch.inference_mode()
def decode_latents(
    pipe: StableDiffusionPipeline,
    latents: Float[Tensor, "images channels rows columns"],
    *,
    batch_size: int = 32,
) -> UInt8[np.ndarray, "images height width 3"]:
    """RGB images of latents in the UNet's scale. Raises ValueError for pixels that are no numbers."""
    parts = []
    for start in range(0, len(latents), batch_size):
        batch = latents[start : start + batch_size] / pipe.vae.config.scaling_factor
        pixels = (pipe.vae.decode(batch, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
        if pixels.isnan().any():  # they would come out black
            raise ValueError("the decoder makes pixels that are no numbers; try base.dtype: float32")
        parts.append((pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(parts)
