"""Drawing with many customized models of one base in one batch.

What differs between customized models is kept apart: one row of the token table, the keys and values that
cross-attention takes from the text, and what else their method tunes. The rest runs once for the whole batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from jaxtyping import Float
from torch import Tensor

from attribution.base_model import Pipeline, latent_shape, leave_device, text_encoders
from attribution.conditioning import encode_text, token_ids, word_vectors
from attribution.cross_attention import Conditioning, Text, project
from attribution.customization import METHODS
from attribution.customized_model import TOKEN, ModelStack


@dataclass(frozen=True)
class Sampler:
    """How noise becomes an image. `eta` is DDIM's share of fresh noise; guidance <= 1 is none."""

    scheduler: Literal["ddim", "dpmsolver++"]
    steps: int
    guidance: float
    eta: float

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: wanted at least 1, got {self.steps}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta: wanted 0 to 1, got {self.eta}")
        if self.scheduler != "ddim" and self.eta:
            raise ValueError(f"eta: only ddim has it; wanted 0 for {self.scheduler}, got {self.eta}")

    def build(self, config: Mapping[str, Any]) -> DDIMScheduler | DPMSolverMultistepScheduler:
        """diffusers' own scheduler with the noise schedule of `config`."""
        if self.scheduler == "ddim":
            # Latents reach beyond [-1, 1]. Configs of other schedulers do not say that they may.
            return DDIMScheduler.from_config(config, clip_sample=False)
        return DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")


@dataclass(frozen=True)
class Drawing:
    """One image to be drawn: which model of the stack, from which words, from which noise."""

    model: int
    prompt: str
    seed: int


def base_stack(pipe: Pipeline, initializers: Sequence[str], *, token: str = TOKEN) -> ModelStack:
    """The base itself, once for each word; the new token's row is that of the word.

    Raises ValueError if that is not one token of the vocabulary.
    """
    return ModelStack("textual_inversion", {}, word_vectors(pipe, initializers), token)


@torch.inference_mode()
def draw_latents(
    pipe: Pipeline,
    stack: ModelStack,
    drawings: Sequence[Drawing],
    sampler: Sampler,
    *,
    batch_size: int,
    on_batch: Callable[[int], object] = lambda images: None,
) -> Float[Tensor, "drawings channels height width"]:
    """What diffusers' pipeline draws with each model alone, seeded by torch.Generator().manual_seed(seed).

    The empty prompt of guidance is read with the model's own keys and values, as there.
    """
    shape = (1, *latent_shape(pipe))
    device, dtype = pipe.unet.device, pipe.unet.dtype
    if not drawings:
        return torch.zeros(0, *shape[1:], device=device, dtype=dtype)
    empty = [(drawing.model, "") for drawing in drawings]
    pairs = [(drawing.model, drawing.prompt) for drawing in drawings]
    place = {pair: number for number, pair in enumerate(dict.fromkeys([*empty, *pairs]))}
    stack = stack.to(device, dtype)
    told = _tell(pipe, stack, list(place))
    leave_device(*(encoder for _, encoder in text_encoders(pipe)))
    scheduler = sampler.build(pipe.scheduler.config)
    guided = sampler.guidance > 1
    options = {"eta": sampler.eta} if sampler.scheduler == "ddim" else {}
    finished = []
    with METHODS[stack.method].network(pipe.unet, stack.weights) as predict:
        for start in range(0, len(drawings), batch_size):
            batch = drawings[start : start + batch_size]
            rows = [place[pair] for pair in pairs[start : start + batch_size]]
            models = torch.tensor([drawing.model for drawing in batch], device=device)
            if guided:
                rows = [place[pair] for pair in empty[start : start + batch_size]] + rows
                models = models.repeat(2)
            index = torch.tensor(rows, device=device)
            batch_told = told.map(operator.itemgetter(index))
            noise = [torch.Generator().manual_seed(drawing.seed) for drawing in batch]
            latents = torch.cat([torch.randn(shape, generator=generator, dtype=dtype) for generator in noise])
            scheduler.set_timesteps(sampler.steps, device=device)
            latents = latents.to(device) * scheduler.init_noise_sigma
            for timestep in scheduler.timesteps:
                inputs = scheduler.scale_model_input(
                    torch.cat([latents, latents] if guided else [latents]), timestep
                )
                output = predict(inputs, timestep, batch_told, models)
                if guided:
                    without, with_text = output.chunk(2)
                    output = without + sampler.guidance * (with_text - without)
                latents = scheduler.step(
                    output, timestep, latents, generator=noise, **options, return_dict=False
                )[0]
            finished.append(latents)
            on_batch(len(batch))
    return torch.cat(finished)


def _tell(pipe: Pipeline, stack: ModelStack, pairs: Sequence[tuple[int, str]]) -> Conditioning:
    """Keys and values by layer, [pairs, words, out] each, of (model, prompt) pairs in any order."""
    own = METHODS[stack.method].text_weights(pipe.unet, stack.weights)
    models = [model for model, _ in pairs]
    ids = token_ids(pipe, [prompt for _, prompt in pairs], models, token=stack.token)
    text = Text.cat([encode_text(pipe, part, stack.vectors) for part in ids.split(256)])
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for model in dict.fromkeys(models):
        mine = torch.tensor([other == model for other in models], device=ids.device)
        weights = {
            name: weight[model : model + 1] if len(weight) > 1 else weight for name, weight in own.items()
        }
        # Bound here, as a lambda in a loop would not be.
        own_text = text.map(operator.itemgetter(mine)).map(operator.itemgetter(None))
        for layer, parts in project(weights, own_text).keys_values.items():
            if layer not in found:
                key, value = (part.new_empty(len(pairs), *part.shape[2:]) for part in parts)
                found[layer] = key, value
            for whole, part in zip(found[layer], parts, strict=True):
                whole[mine] = part[0]
    return Conditioning(found, text.added)
