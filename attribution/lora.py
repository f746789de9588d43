"""LoRA (arXiv:2106.09685): each model adds its own low-rank matrices to the projections of attention.

    y = W x + B A x,   A [rank, in] normal with deviation 1 / rank at the start, B [out, rank] zero

on queries, keys, values and outputs of every attention layer of the UNet, as diffusers' and peft's example
has them, with alpha = rank.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from attribution.cross_attention import Conditioning, Predict, base_projections, text_attention
from attribution.customized_model import read_tensors, write_tensors
from attribution.training_settings import LoraSettings, TrainingSettings

WEIGHTS = "pytorch_lora_weights.safetensors"
TEXT_START_LEARNS = True
_PREFIX = "unet."
_A, _B = ".lora_A.weight", ".lora_B.weight"
# As diffusers' own writer names them.
_OTHER_NAMES = {".lora.down.weight": _A, ".lora.up.weight": _B}


def start(unet: nn.Module, seeds: Sequence[int], settings: TrainingSettings) -> dict[str, Tensor]:
    """`<layer>.lora_A.weight` and `.lora_B.weight` of each adapted projection; A is drawn from the seed."""
    assert isinstance(settings, LoraSettings)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    weights = {}
    for name, layer in _projections(unet).items():
        drawn = [torch.randn(settings.rank, layer.in_features, generator=one) for one in generators]
        weights[name + _A] = torch.stack(drawn).to(layer.weight.device) / settings.rank
        weights[name + _B] = weights[name + _A].new_zeros(len(seeds), layer.out_features, settings.rank)
    return weights


def text_weights(
    unet: nn.Module, weights: Mapping[str, Tensor]
) -> Mapping[str, Float[Tensor, "models out dim"]]:
    """The base's keys and values of the text with each model's own part added."""
    return {
        name: torch.bmm(weights[name + _B], weights[name + _A]) + weight
        for name, weight in base_projections(unet).items()
    }


@contextlib.contextmanager
def network(unet: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[Predict]:
    """The base, with each sample's own part added to every other projection.

    Raises ValueError for weights of other layers, and for layers without any.
    """
    if others := weights.keys() ^ {name + end for name in _projections(unet) for end in (_A, _B)}:
        raise ValueError(f"lora: wanted A and B of each attention layer, no other; but {min(others)}")
    chosen: dict[str, Tensor] = {}

    def add(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            a, b = (weights[name + end][chosen["models"]].to(output.dtype) for end in (_A, _B))
            return torch.baddbmm(output, torch.bmm(inputs[0], a.transpose(1, 2)), b.transpose(1, 2))

        return hook

    with text_attention(unet) as predict, contextlib.ExitStack() as added:
        for name, layer in _projections(unet).items():
            if name not in base_projections(unet):
                added.callback(layer.register_forward_hook(add(name)).remove)

        def run(latents: Tensor, timesteps: Tensor, told: Conditioning, models: Tensor) -> Tensor:
            chosen["models"] = models
            return predict(latents, timesteps, told)

        yield run


def write(folder: Path, weights: Mapping[str, Tensor], unet: nn.Module, dtype: torch.dtype) -> None:
    """The file that `pipe.load_lora_weights(folder)` reads, where peft is installed."""
    write_tensors(folder / WEIGHTS, {_PREFIX + name: weight for name, weight in weights.items()}, dtype)


def read(folder: Path) -> dict[str, Tensor]:
    """A and B as float32, whoever wrote them.

    Raises ValueError naming file and key that does not belong, such as an alpha, and for another alpha than
    the rank in what diffusers writes beside them.
    """
    path = folder / WEIGHTS
    weights = {}
    for key, tensor in read_tensors(path).items():
        name = key
        for theirs, ours in _OTHER_NAMES.items():
            name = name.replace(theirs, ours)
        if not name.startswith(_PREFIX) or not name.endswith((_A, _B)):
            raise ValueError(f"{path}: wanted keys like {_PREFIX}<layer>{_A}, got {key}")
        weights[name.removeprefix(_PREFIX)] = tensor.float()
    if not weights:
        raise ValueError(f"{path}: no key ends in {_A}")
    with safe_open(path, framework="pt") as file:
        said = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    rank, alpha = said.get("unet.r"), said.get("unet.lora_alpha")
    if alpha != rank or any(said.get(f"unet.{name}") for name in ("alpha_pattern", "use_rslora")):
        raise ValueError(f"{path}: wanted lora_alpha equal to r everywhere, got {alpha} and {rank}")
    return weights


def _projections(unet: nn.Module) -> dict[str, Any]:
    """Every adapted layer of the UNet, by name."""
    return {
        f"{name}.{projection}": layer.get_submodule(projection)
        for name, layer in unet.named_modules()
        if isinstance(layer, Attention)
        for projection in ("to_q", "to_k", "to_v", "to_out.0")
    }
