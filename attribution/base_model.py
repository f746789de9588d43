"""The base text-to-image pipeline: which one, loaded frozen, and its way from pixels to latents and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import diffusers
import numpy as np
import torch
import transformers
from accelerate import cpu_offload_with_hook
from accelerate.hooks import CpuOffload
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from attribution.cross_attention import cross_attention
from attribution.files import content_key
from attribution.pipeline_folder import checked_commit, find_pipeline

Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline
# What the UNets of neither family have: they would be told more than text and time.
_STRANGE = (
    *("class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim"),
    *("only_cross_attention", "mid_block_only_cross_attention", "dual_cross_attention"),
)


@dataclass(frozen=True)
class MemorySettings:
    """What takes less memory and more time; results change by rounding only.

    `checkpoint_gradients`: the UNet's activations are made again on the way back. `slice_attention`:
    self-attention runs some heads at a time, where torch's own attention is not enough. `slice_vae`: pictures
    pass through the autoencoder one at a time. `offload`: the autoencoder and the text encoders are on the
    device only while they work, else in the CPU's memory; the UNet stays.
    """

    checkpoint_gradients: bool
    slice_attention: bool
    slice_vae: bool
    offload: bool


@dataclass(frozen=True)
class BaseSettings:
    """Which pipeline: a folder in diffusers' layout, or a hub id with its commit as the revision.

    `device`: as torch names it, or auto: an accelerator if there is one. `memory`: null saves none.
    """

    model: str
    revision: str | None
    device: str
    dtype: Literal["float32", "float16", "bfloat16"]
    memory: MemorySettings | None = None

    def key(self) -> str:
        """Equal for equal weights in equal precision, wherever the folder lies; no unpinned hub id."""
        if Path(self.model).is_dir():
            return content_key(Path(self.model), self.dtype)
        return content_key(self.model, checked_commit(self.model, self.revision), self.dtype)


def load_base(settings: BaseSettings) -> Pipeline:
    """The frozen pipeline, in the wanted precision whatever the files hold. Reads safetensors only.

    The autoencoder of SDXL stays in float32 where its configuration says that it overflows in float16.
    Raises FileNotFoundError for a folder that is not a pipeline's and for a hub id that cannot be had;
    ValueError for a pipeline that we cannot customize, and for a device that is not there.
    """
    device, dtype = find_device(settings.device), getattr(torch, settings.dtype)
    found = find_pipeline(settings.model, settings.revision, halves=settings.dtype == "float16")
    is_xl = found.family == "StableDiffusionXLPipeline"
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    left_out: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}
    left_out |= {} if is_xl else {"safety_checker": None, "requires_safety_checker": False}
    pipe = getattr(diffusers, found.family).from_pretrained(
        found.path,
        variant=found.variant,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        # With accelerate, tensors go from the file to their place, and no other net is made before.
        low_cpu_mem_usage=diffusers.utils.is_accelerate_available(),
        **left_out,
    )
    _check(pipe, settings.model)
    pipe.to(device)
    if is_xl and dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.float()
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    if settings.memory is not None:
        save_memory(pipe, settings.memory)
    return pipe


def find_device(name: str) -> torch.device:
    """The device of that name; of auto, the accelerator (CUDA, MPS, ...), or else the CPU.

    Raises ValueError for a name that is none, or of a device that is not there.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"base.device: wanted auto, cpu, cuda, cuda:1, mps ..., got {name}") from error
    there = ["cpu"]
    if accelerator is not None:
        there += [f"{accelerator.type}:{number}" for number in range(torch.accelerator.device_count())]
    if name not in {*there, *(one.partition(":")[0] for one in there)}:
        raise ValueError(f"base.device: no {device} here; wanted auto or one of: {', '.join(there)}")
    return device


def save_memory(pipe: Pipeline, memory: MemorySettings) -> None:
    """From here on the pipeline works as `memory` says."""
    if memory.checkpoint_gradients:
        pipe.unet.enable_gradient_checkpointing()
    if memory.slice_attention:
        pipe.enable_attention_slicing()
    if memory.slice_vae:
        pipe.vae.enable_slicing()
    if memory.offload:
        for part in (pipe.vae, *(encoder for _, encoder in text_encoders(pipe))):
            cpu_offload_with_hook(part, pipe.unet.device)


def leave_device(*parts: nn.Module) -> None:
    """Where the base offloads, these parts give their place on the device to others; called, they return.

    Where gradients are wanted, only after the way back.
    """
    for part in parts:
        hook = getattr(part, "_hf_hook", None)
        if isinstance(hook, CpuOffload):
            hook.init_hook(part)


def text_encoders(pipe: Pipeline) -> list[tuple[Any, Any]]:
    """The tokenizer and encoder of Stable Diffusion 1 and 2, or both pairs of SDXL."""
    pairs = [(pipe.tokenizer, pipe.text_encoder)]
    if isinstance(pipe, StableDiffusionXLPipeline):
        pairs.append((pipe.tokenizer_2, pipe.text_encoder_2))
    return pairs


def _check(pipe: Pipeline, name: str) -> None:
    """Raises ValueError for a base that is told more than words, and for layers that we cannot customize."""
    unet, vae = pipe.unet.config, pipe.vae.config
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise ValueError(
            f"{name}: the UNet takes {unet.in_channels} channels and gives {unet.out_channels}, the latents"
            f" have {vae.latent_channels}: for inpainting, editing or upscaling; wanted text to image"
        )
    is_xl = isinstance(pipe, StableDiffusionXLPipeline)
    strange = [key for key in _STRANGE if np.any(unet.get(key) or False)]
    strange += [key for key in ("latents_mean", "shift_factor") if vae.get(key)]
    if unet.addition_embed_type != ("text_time" if is_xl else None):
        strange.append("addition_embed_type")
    if any(getattr(encoder.config, "use_attention_mask", False) for _, encoder in text_encoders(pipe)):
        strange.append("use_attention_mask")
    prediction = pipe.scheduler.config.get("prediction_type")
    if prediction not in ("epsilon", "v_prediction") or not hasattr(pipe.scheduler, "alphas_cumprod"):
        got = f"{type(pipe.scheduler).__name__} with prediction_type {prediction}"
        raise ValueError(f"{name}: wanted a schedule of DDPM's kind, epsilon or v_prediction, got {got}")
    if strange:
        raise ValueError(f"{name}: configured with {', '.join(strange)}, which is not supported")
    layers = cross_attention(pipe.unet)
    if not layers:
        raise ValueError(f"{name}: no layer of the UNet reads the text; there is nothing to customize")
    for layer, module in layers.items():
        if not module.is_cross_attention:
            raise ValueError(f"{name}: {layer}: wanted cross-attention, got a layer that reads no text")
        if module.norm_cross or module.to_k.bias is not None or module.to_v.bias is not None:
            raise ValueError(f"{name}: {layer}: keys or values with a norm or a bias are not supported")


def latent_shape(pipe: Pipeline) -> tuple[int, int, int]:
    """Channels, height, width of the latents of one image at the pipeline's own size."""
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return pipe.unet.config.in_channels, height, width


@torch.inference_mode()
def encode_images(
    pipe: Pipeline, images: UInt8[np.ndarray, "images height width 3"], *, batch_size: int = 32
) -> Float[Tensor, "images channels rows columns"]:
    """The latents (the mode of the posterior, in the UNet's scale) of RGB images."""
    parts = []
    for start in range(0, len(images), batch_size):
        pixels = torch.from_numpy(images[start : start + batch_size]).to(pipe.unet.device)
        pixels = pixels.permute(0, 3, 1, 2).to(pipe.vae.dtype) / 127.5 - 1
        parts.append(pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor)
    leave_device(pipe.vae)
    return torch.cat(parts)


@torch.inference_mode()
def decode_latents(
    pipe: Pipeline,
    latents: Float[Tensor, "images channels rows columns"],
    *,
    batch_size: int = 32,
) -> UInt8[np.ndarray, "images height width 3"]:
    """RGB images of latents in the UNet's scale. Raises ValueError for pixels that are no numbers."""
    parts = []
    for start in range(0, len(latents), batch_size):
        batch = latents[start : start + batch_size].to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
        pixels = (pipe.vae.decode(batch, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
        if pixels.isnan().any():  # they would come out black
            raise ValueError("the decoder makes pixels that are no numbers; try base.dtype: float32")
        parts.append((pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
    leave_device(pipe.vae)
    return np.concatenate(parts)
