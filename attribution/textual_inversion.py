"""Textual inversion (arXiv:2208.01618): each model has its own row for the new token, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attribution.cross_attention import Predict, base_projections, text_attention
from attribution.training_settings import TrainingSettings

WEIGHTS = None
TEXT_START_LEARNS = True


def start(unet: nn.Module, seeds: Sequence[int], settings: TrainingSettings) -> dict[str, Tensor]:
    """No weights."""
    return {}


def text_weights(unet: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Float[Tensor, "1 out dim"]]:
    """The base's, for every model."""
    return {name: weight[None] for name, weight in base_projections(unet).items()}


@contextlib.contextmanager
def network(unet: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[Predict]:
    """The base, once for the whole batch."""
    with text_attention(unet) as predict:
        yield lambda latents, timesteps, told, models: predict(latents, timesteps, told)


def write(folder: Path, weights: Mapping[str, Tensor], unet: nn.Module, dtype: torch.dtype) -> None:
    """Nothing: the file of the token is the whole model."""


def read(folder: Path) -> dict[str, Tensor]:
    """No weights."""
    return {}
