"""DreamBooth (arXiv:2208.12242): each model is a whole UNet of its own.

Models cannot share a batch: each is run for its own samples, one after the other. A stack holds every weight
of every model, and while training their gradients and two moments each, in float32: 14 GB a model for Stable
Diffusion 1, and 1.7 GB on the disk in half precision.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attribution.cross_attention import Conditioning, Predict, base_projections, text_attention
from attribution.customized_model import read_tensors, write_tensors
from attribution.files import read_json, write_json
from attribution.training_settings import TrainingSettings

WEIGHTS = "unet"
TEXT_START_LEARNS = True
_FILE = "diffusion_pytorch_model.safetensors"


def start(unet: nn.Module, seeds: Sequence[int], settings: TrainingSettings) -> dict[str, Tensor]:
    """One copy of the UNet for each model."""
    return {
        name: weight.detach().expand(len(seeds), *weight.shape).clone()
        for name, weight in unet.named_parameters()
    }


def text_weights(
    unet: nn.Module, weights: Mapping[str, Tensor]
) -> Mapping[str, Float[Tensor, "models out dim"]]:
    """Those of the weights that read the text."""
    return {name: weights[f"{name}.weight"] for name in base_projections(unet)}


@contextlib.contextmanager
def network(unet: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[Predict]:
    """Each model's own UNet for its own samples, one model at a time.

    Raises ValueError for weights that are not those of the UNet, one for one; and for a base that checkpoints
    gradients: what is made again on the way back would be made with the weights of the base.
    """
    if others := weights.keys() ^ {name for name, _ in unet.named_parameters()}:
        raise ValueError(f"dreambooth: wanted each weight of the base's UNet, no other; but {min(others)}")
    if getattr(unet, "is_gradient_checkpointing", False) and torch.is_grad_enabled():
        raise ValueError("dreambooth: wanted base.memory.checkpoint_gradients: false")
    with text_attention(unet) as predict:

        def run(latents: Tensor, timesteps: Tensor, told: Conditioning, models: Tensor) -> Tensor:
            # Indexing a stack would make a gradient of the whole stack for each model.
            stacks = {name: weight.unbind() for name, weight in weights.items()}
            timesteps = timesteps.expand(len(latents))
            output = torch.empty_like(latents)
            for model in models.unique().tolist():
                mine = models == model
                own = {name: stack[model].to(latents.dtype) for name, stack in stacks.items()}
                read = told.map(operator.itemgetter(mine))
                output[mine] = predict(latents[mine], timesteps[mine], read, own)
            return output

        yield run


def write(folder: Path, weights: Mapping[str, Tensor], unet: Any, dtype: torch.dtype) -> None:
    """The folder that `UNet2DConditionModel.from_pretrained(folder / WEIGHTS)` reads."""
    unet.save_config(folder / WEIGHTS)
    config = folder / WEIGHTS / "config.json"
    # It says where the base lay, which is nobody's business and would make equal models differ.
    write_json(config, {key: value for key, value in read_json(config).items() if key != "_name_or_path"})
    write_tensors(folder / WEIGHTS / _FILE, weights, dtype)


def read(folder: Path) -> dict[str, Tensor]:
    """Every weight of the UNet, as float32."""
    return {name: weight.float() for name, weight in read_tensors(folder / WEIGHTS / _FILE).items()}
