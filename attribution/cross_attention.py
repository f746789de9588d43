"""Where a UNet reads the text: keys and values of several customized models in one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class Text:
    """Prompts as the encoders read them, and what SDXL is `added` by name: pooled text, sizes of pictures."""

    words: Float[Tensor, "*prompts words dim"]
    added: Mapping[str, Float[Tensor, "*prompts _"]]

    def map(self, change: Callable[[Tensor], Tensor]) -> Text:
        """The same change of the axes of prompts everywhere."""
        return Text(change(self.words), {name: change(part) for name, part in self.added.items()})

    @staticmethod
    def cat(texts: Sequence[Text], dim: int = 0) -> Text:
        """One after the other along an axis of prompts."""
        added = {name: torch.cat([text.added[name] for text in texts], dim) for name in texts[0].added}
        return Text(torch.cat([text.words for text in texts], dim), added)


@dataclass(frozen=True)
class Conditioning:
    """What the UNet takes from the text: keys and values by layer, [..., words, out] each, and the rest."""

    keys_values: Mapping[str, tuple[Tensor, Tensor]]
    added: Mapping[str, Tensor]

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same change of the axes before words everywhere."""
        return Conditioning(
            {layer: (change(key), change(value)) for layer, (key, value) in self.keys_values.items()},
            {name: change(part) for name, part in self.added.items()},
        )


# What the UNet says of latents at timesteps, given the text and the number of each sample's model.
Predict = Callable[[Tensor, Tensor, Conditioning, Tensor], Tensor]


def cross_attention(unet: nn.Module) -> dict[str, Any]:
    """The layers that read the text, by name, in the order of the network."""
    return {name: layer for name, layer in unet.named_modules() if name.endswith(".attn2")}


def base_projections(unet: nn.Module) -> dict[str, Float[Tensor, "out dim"]]:
    """The base's own keys and values of the text: `<layer>.attn2.to_k` and `.to_v`."""
    weights = {}
    for name, layer in cross_attention(unet).items():
        weights[f"{name}.to_k"] = layer.to_k.weight.detach()
        weights[f"{name}.to_v"] = layer.to_v.weight.detach()
    return weights


def project(
    weights: Mapping[str, Float[Tensor, "#models out dim"]], text: Text, *, start_learns: bool = True
) -> Conditioning:
    """Each model's keys and values of its own prompts, by layer: [models, prompts, words, out] each.

    The start of the text, the same for every prompt, teaches nothing unless it `start_learns`.
    """
    models, prompts, words, _ = text.words.shape
    flat = text.words.flatten(1, 2).to(next(iter(weights.values())).dtype)

    def apply(name: str) -> Tensor:
        own = weights[name].expand(models, -1, -1)
        part = torch.bmm(flat, own.transpose(1, 2)).view(models, prompts, words, -1)
        return part if start_learns else torch.cat([part[:, :, :1].detach(), part[:, :, 1:]], dim=2)

    layers = [name.removesuffix(".to_k") for name in weights if name.endswith(".to_k")]
    keys_values = {layer: (apply(f"{layer}.to_k"), apply(f"{layer}.to_v")) for layer in layers}
    return Conditioning(keys_values, text.added)


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
def text_attention(unet: nn.Module) -> Iterator[Callable[..., Tensor]]:
    """Inside, `predict(latents, timesteps, told)` runs the UNet; [samples, words, out] by layer.

    A fourth argument: weights to run it with in place of its own, by name.
    """
    layers = cross_attention(unet)
    given: dict[str, tuple[Tensor, Tensor]] = {}
    before = {name: layer.processor for name, layer in layers.items()}

    def predict(
        latents: Tensor,
        timesteps: Tensor,
        told: Conditioning,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        given.update(told.keys_values)
        # The UNet wants some text to be there; the layers that would read it do not.
        text = latents.new_zeros(len(latents), 1, 1)
        options: dict[str, Any] = {"encoder_hidden_states": text, "return_dict": False}
        if told.added:
            options["added_cond_kwargs"] = dict(told.added)
        if weights is None:
            return unet(latents, timesteps, **options)[0]
        return functional_call(unet, dict(weights), (latents, timesteps), options)[0]

    for name, layer in layers.items():
        layer.set_processor(_TextAttention(name, given))
    try:
        yield predict
    finally:
        for name, layer in layers.items():
            layer.set_processor(before[name])
