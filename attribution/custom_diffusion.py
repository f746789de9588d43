"""Custom Diffusion (arXiv:2212.04488): each model has its own keys and values of cross-attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attribution.cross_attention import Predict, base_projections, text_attention
from attribution.customized_model import read_tensors, write_tensors
from attribution.training_settings import TrainingSettings

WEIGHTS = "pytorch_custom_diffusion_weights.safetensors"
TEXT_START_LEARNS = False
_SUFFIX = ".processor.to_{}_custom_diffusion.weight"


def start(unet: nn.Module, seeds: Sequence[int], settings: TrainingSettings) -> dict[str, Tensor]:
    """One copy of the base's keys and values for each model: `<layer>.attn2.to_k` and `.to_v`, [out, in]."""
    return {name: weight.repeat(len(seeds), 1, 1) for name, weight in base_projections(unet).items()}


def text_weights(
    unet: nn.Module, weights: Mapping[str, Float[Tensor, "models out dim"]]
) -> Mapping[str, Float[Tensor, "models out dim"]]:
    """All that is trained."""
    return weights


@contextlib.contextmanager
def network(unet: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[Predict]:
    """Whatever does not read the text is the base, once for the whole batch."""
    with text_attention(unet) as predict:
        yield lambda latents, timesteps, told, models: predict(latents, timesteps, told)


def write(folder: Path, weights: Mapping[str, Tensor], unet: nn.Module, dtype: torch.dtype) -> None:
    """The file that diffusers reads.

        pipe.unet.load_attn_procs(folder, weight_name=WEIGHTS, _pipeline=pipe)

    `_pipeline` is needed: without it diffusers 0.42 reads the file and then sets nothing.
    """
    tensors = {}
    for name, weight in weights.items():
        layer, projection = name.rsplit(".to_", 1)
        tensors[layer + _SUFFIX.format(projection)] = weight
        # diffusers wants a processor for every attention layer, and reads an empty tensor as untouched.
        # Its save_attn_procs drops these, and load_attn_procs then refuses the file it wrote.
        tensors[layer.removesuffix("attn2") + "attn1.processor"] = torch.zeros(0)
    write_tensors(folder / WEIGHTS, tensors, dtype)


def read(folder: Path) -> dict[str, Tensor]:
    """Keys and values as float32, whoever wrote them; ValueError naming file and key that does not belong."""
    path = folder / WEIGHTS
    weights = {}
    for key, tensor in read_tensors(path).items():
        for projection in "kv":
            suffix = _SUFFIX.format(projection)
            if key.endswith(suffix):
                weights[f"{key.removesuffix(suffix)}.to_{projection}"] = tensor.float()
                break
        else:
            if len(tensor):
                raise ValueError(f"{path}: wanted keys like <layer>.attn2{_SUFFIX.format('k')}, got {key}")
    if not weights:
        raise ValueError(f"{path}: no key ends in {_SUFFIX.format('k')}")
    return weights
