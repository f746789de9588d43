"""Memory of customization at full size, computed: no device runs anything, nothing here is measured.

`python -m benchmarks.full_memory [--family sd15] [--dtype float16] [--pixels 512] [--concepts 1 2 4 8]`. One
training step is taken on torch's meta device, which has shapes and no data, and what autograd keeps for the
way back is counted, each storage once: attention as its fused kernel keeps it (queries, keys, values, result
and one number a row). To that come the weights of the base, and of each concept its weights, gradients and
AdamW's two moments in float32. Not counted: what a kernel needs while it runs, what an allocator wastes, the
CUDA context, all in all a few GB on top.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attribution import custom_diffusion
from attribution.base_model import Pipeline, text_encoders
from attribution.conditioning import encode_text, row_widths
from attribution.cross_attention import Text, project
from attribution.training_settings import TrainingSettings
from benchmarks.full_shapes import VOCABULARY, build

VIEWS, PRIORS = 2, 2


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step."""

    base: int
    trained: int
    activations: int

    @property
    def total(self) -> int:
        return self.base + self.trained + self.activations


class Kept:
    """Storages that autograd keeps, each counted once; not those of the frozen net."""

    def __init__(self, frozen: set[int]) -> None:
        self.frozen = frozen
        self.storages: dict[int, Any] = {}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.frozen:
            self.storages[storage._cdata] = storage  # held, so that no other takes its address
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


class _Fused(torch.autograd.Function):
    """What a fused attention kernel keeps for its gradients, which are never asked for here."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        a_number_each = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, a_number_each)
        return result


def step_memory(pipe: Pipeline, concepts: int, pixels: int, *, again: bool) -> Memory:
    """Of customizing so many concepts in one batch, with the UNet's gradients kept or made `again`.

    `pipe` is on the meta device.
    """
    nets = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    tensors = [tensor for net in nets for tensor in (*net.parameters(), *net.buffers())]
    kept = Kept({tensor.untyped_storage()._cdata for tensor in tensors})
    settings = TrainingSettings(1, 1.0, 1.0, 0.0, VIEWS, PRIORS, 1.0)
    start = custom_diffusion.start(pipe.unet, range(concepts), settings)
    weights = {name: weight.float().requires_grad_() for name, weight in start.items()}
    vectors = torch.zeros(concepts, sum(row_widths(pipe)), device="meta", requires_grad=True)
    for tensor in (*weights.values(), vectors):
        kept.frozen.add(tensor.untyped_storage()._cdata)
    trained = sum(tensor.nbytes for tensor in (*weights.values(), vectors))
    samples = concepts * (VIEWS + PRIORS)
    side = pixels // pipe.vae_scale_factor
    latents = torch.zeros(samples, 4, side, side, device="meta", dtype=pipe.unet.dtype)
    largest = 0

    def made_again(module: nn.Module, *inputs: Any) -> Any:
        nonlocal largest
        for one in inputs:
            if isinstance(one, Tensor):
                kept.add(one)
        inside = Kept(kept.frozen)
        with torch.autograd.graph.saved_tensors_hooks(inside.add, lambda tensor: tensor):
            result = module(*inputs)
        largest = max(largest, inside.bytes)
        return result

    if again:
        pipe.unet.enable_gradient_checkpointing(made_again)
    else:
        pipe.unet.disable_gradient_checkpointing()
    with (
        _fused_attention(),
        torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor),
        custom_diffusion.network(pipe.unet, weights) as predict,
    ):
        words = sum(tokenizer.model_max_length for tokenizer, _ in text_encoders(pipe))
        ids = torch.full((concepts * (VIEWS + 1), words), VOCABULARY, device="meta")
        text = encode_text(pipe, ids, vectors).map(lambda part: part.unflatten(0, (concepts, VIEWS + 1)))
        told = project(weights, Text(text.words, text.added), start_learns=False)

        def arrange(part: Tensor) -> Tensor:
            repeated = part[:, VIEWS:].expand(-1, PRIORS, *part.shape[2:])
            return torch.cat([part[:, :VIEWS], repeated], dim=1).flatten(0, 1)

        times = torch.zeros(samples, device="meta", dtype=torch.int64)
        output = predict(latents, times, told.map(arrange), torch.zeros(samples, device="meta"))
        (output.float() - latents.float()).square().mean()
    base = sum(tensor.nbytes for tensor in tensors)
    return Memory(base, 4 * trained, kept.bytes + largest)


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    def fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Fused.apply(query, key, value)

    with mock.patch.object(F, "scaled_dot_product_attention", fused):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    options = parser.parse_args()
    pipe = build(options.family, "meta", getattr(torch, options.dtype))
    print(f"computed, {options.family}, {options.dtype}, {options.pixels} pixels, GB")
    print("| concepts | base | trained | activations | in all | made again | in all |")
    print("|---|---|---|---|---|---|---|")
    for count in options.concepts:
        kept, again = (step_memory(pipe, count, options.pixels, again=again) for again in (False, True))
        cells = (kept.base, kept.trained, kept.activations, kept.total, again.activations, again.total)
        print(f"| {count} | {' | '.join(f'{cell / 1e9:.1f}' for cell in cells)} |")


if __name__ == "__main__":
    main()
