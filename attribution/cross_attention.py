"""Where a UNet reads the text: keys and values of several customized models in one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# A layer's keys and values, one row of text each: [..., words, out].
KeysValues = Mapping[str, tuple[Tensor, Tensor]]


def cross_attention(unet: nn.Module) -> dict[str, Any]:
    """The layers that read the text, by name, in the order of the network."""
    return {name: layer for name, layer in unet.named_modules() if name.endswith(".attn2")}


def project(
    weights: Mapping[str, Float[Tensor, "models out dim"]], text: Float[Tensor, "models prompts words dim"]
) -> KeysValues:
    """Each model's keys and values of its own prompts, by layer: [models, prompts, words, out] each."""
    models, prompts, words, _ = text.shape
    flat = text.flatten(1, 2).to(next(iter(weights.values())).dtype)

    def apply(name: str) -> Tensor:
        return torch.bmm(flat, weights[name].transpose(1, 2)).view(models, prompts, words, -1)

    layers = [name.removesuffix(".to_k") for name in weights if name.endswith(".to_k")]
    return {layer: (apply(f"{layer}.to_k"), apply(f"{layer}.to_v")) for layer in layers}


class _TextAttention:
    """Cross-attention over keys and values that were made beforehand: text does not change while drawing."""

    def __init__(self, layer: str, given: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.layer, self.given = layer, given

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> Tensor:
        key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in self.given[self.layer])
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        key, value = key.to(query.dtype), value.to(query.dtype)
        read = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        return attn.to_out[1](attn.to_out[0](read.transpose(1, 2).flatten(2)))


@contextlib.contextmanager
def text_attention(unet: nn.Module) -> Iterator[Callable[[Tensor, Tensor, KeysValues], Tensor]]:
    """Inside, `predict(latents, timesteps, keys_values)` runs the UNet; [samples, words, out] by layer."""
    layers = cross_attention(unet)
    given: dict[str, tuple[Tensor, Tensor]] = {}
    before = {name: layer.processor for name, layer in layers.items()}

    def predict(latents: Tensor, timesteps: Tensor, keys_values: KeysValues) -> Tensor:
        given.update(keys_values)
        # The UNet wants some text to be there; the layers that would read it do not.
        text = latents.new_zeros(len(latents), 1, 1)
        return unet(latents, timesteps, encoder_hidden_states=text, return_dict=False)[0]

    for name, layer in layers.items():
        layer.set_processor(_TextAttention(name, given))
    try:
        yield predict
    finally:
        for name, layer in layers.items():
            layer.set_processor(before[name])
