"""A base text-to-image pipeline, and drawing with many customized models of it in one batch.

Only what differs between customized models is kept apart: one row of the token table, and the keys and values
that cross-attention takes from the text. Everything else runs once for the whole batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from attribution.customized_model import TOKEN, ModelStack
from attribution.files import content_key

# A layer's keys and values, one row of text each: [..., words, out].
KeysValues = Mapping[str, tuple[Tensor, Tensor]]


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
        if self.scheduler != "ddim" and self.eta:
            raise ValueError(f"eta: only ddim has it; wanted 0 for {self.scheduler}, got {self.eta}")

    def build(self, config: Mapping[str, Any]) -> DDIMScheduler | DPMSolverMultistepScheduler:
        """diffusers' own scheduler with the noise schedule of `config`."""
        if self.scheduler == "ddim":
            return DDIMScheduler.from_config(config)
        return DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")


@dataclass(frozen=True)
class Drawing:
    """One image to be drawn: which model of the stack, from which words, from which noise."""

    model: int
    prompt: str
    seed: int


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


def seed_from(*parts: object) -> int:
    """A seed in [0, 2**63) that depends on the parts alone."""
    return int(content_key(*parts), 16) >> 1


def latent_shape(pipe: StableDiffusionPipeline) -> tuple[int, int, int]:
    """Channels, height, width of the latents of one image at the pipeline's own size."""
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return pipe.unet.config.in_channels, height, width


def cross_attention(unet: nn.Module) -> dict[str, Any]:
    """The layers that read the text, by name, in the order of the network."""
    return {name: layer for name, layer in unet.named_modules() if name.endswith(".attn2")}


def base_stack(
    pipe: StableDiffusionPipeline, initializers: Sequence[str], *, token: str = TOKEN
) -> ModelStack:
    """One copy of the base for each word; the new token's row is that of the word.

    Raises ValueError if that is not one token of the vocabulary.
    """
    models = len(initializers)
    words = [_word_id(pipe, word) for word in initializers]
    weights = {}
    for name, layer in cross_attention(pipe.unet).items():
        weights[f"{name}.to_k"] = layer.to_k.weight.detach().repeat(models, 1, 1)
        weights[f"{name}.to_v"] = layer.to_v.weight.detach().repeat(models, 1, 1)
    return ModelStack(weights, pipe.text_encoder.get_input_embeddings().weight[words].detach(), token)


def token_ids(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], models: Sequence[int], *, token: str = TOKEN
) -> Int[Tensor, "prompts words"]:
    """Ids padded to the pipeline's length; where `token` stands, vocabulary size + the number of the model.

    Raises ValueError for a prompt that is too long: diffusers would cut it, and the concept with it.
    """
    tokenizer = pipe.tokenizer
    tokenizer.add_tokens(token)
    new = tokenizer.convert_tokens_to_ids(token)
    if new != len(tokenizer) - 1:
        raise ValueError(f"{token}: wanted a token that the base does not know, got its token {new}")
    length = tokenizer.model_max_length
    rows = tokenizer(list(prompts), padding="max_length", max_length=length).input_ids
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row) > length:
            raise ValueError(f"prompt {prompt!r}: {len(row)} tokens, wanted at most {length}")
    ids = torch.tensor(rows, device=pipe.device)
    return torch.where(ids == new, ids + torch.tensor(models, device=pipe.device)[:, None], ids)


class _TokenTable(nn.Module):
    """The frozen table of the base, with ids from `first` on taken from `vectors`."""

    def __init__(self, table: nn.Module, vectors: Tensor, first: int) -> None:
        super().__init__()
        self.table, self.vectors, self.first = table, vectors, first

    def forward(self, ids: Tensor) -> Tensor:
        is_new = ids >= self.first
        old = self.table(ids.masked_fill(is_new, 0))
        new = F.embedding((ids - self.first).clamp(min=0), self.vectors)
        return torch.where(is_new[..., None], new.to(old.dtype), old)


def encode_text(
    pipe: StableDiffusionPipeline, ids: Int[Tensor, "prompts words"], vectors: Float[Tensor, "models dim"]
) -> Float[Tensor, "prompts words text"]:
    """What the UNet reads for `ids` (of `token_ids`), model m's token having row `vectors[m]`."""
    encoder = pipe.text_encoder
    table = encoder.get_input_embeddings()
    encoder.set_input_embeddings(_TokenTable(table, vectors, len(pipe.tokenizer) - 1))
    try:
        # No mask, as in diffusers: the padding is read too, except where the encoder's config says otherwise.
        return encoder(ids)[0]
    finally:
        encoder.set_input_embeddings(table)


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


@torch.inference_mode()
def draw_latents(
    pipe: StableDiffusionPipeline,
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
    device, dtype = pipe.device, pipe.unet.dtype
    if not drawings:
        return torch.zeros(0, *shape[1:], device=device, dtype=dtype)
    empty = [(drawing.model, "") for drawing in drawings]
    pairs = [(drawing.model, drawing.prompt) for drawing in drawings]
    place = {pair: number for number, pair in enumerate(dict.fromkeys([*empty, *pairs]))}
    keys_values = _keys_values(pipe, stack, list(place))
    scheduler = sampler.build(pipe.scheduler.config)
    guided = sampler.guidance > 1
    options = {"eta": sampler.eta} if sampler.scheduler == "ddim" else {}
    finished = []
    with text_attention(pipe.unet) as predict:
        for start in range(0, len(drawings), batch_size):
            batch = drawings[start : start + batch_size]
            rows = [place[pair] for pair in pairs[start : start + batch_size]]
            if guided:
                rows = [place[pair] for pair in empty[start : start + batch_size]] + rows
            index = torch.tensor(rows, device=device)
            batch_keys_values = {layer: (k[index], v[index]) for layer, (k, v) in keys_values.items()}
            noise = [torch.Generator().manual_seed(drawing.seed) for drawing in batch]
            latents = torch.cat([torch.randn(shape, generator=generator, dtype=dtype) for generator in noise])
            scheduler.set_timesteps(sampler.steps, device=device)
            latents = latents.to(device) * scheduler.init_noise_sigma
            for timestep in scheduler.timesteps:
                inputs = scheduler.scale_model_input(
                    torch.cat([latents, latents] if guided else [latents]), timestep
                )
                output = predict(inputs, timestep, batch_keys_values)
                if guided:
                    without, with_text = output.chunk(2)
                    output = without + sampler.guidance * (with_text - without)
                latents = scheduler.step(
                    output, timestep, latents, generator=noise, **options, return_dict=False
                )[0]
            finished.append(latents)
            on_batch(len(batch))
    return torch.cat(finished)


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
    """RGB images of latents in the UNet's scale."""
    parts = []
    for start in range(0, len(latents), batch_size):
        batch = latents[start : start + batch_size] / pipe.vae.config.scaling_factor
        pixels = (pipe.vae.decode(batch, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
        parts.append((pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(parts)


def _word_id(pipe: StableDiffusionPipeline, word: str) -> int:
    ids = pipe.tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == pipe.tokenizer.unk_token_id:
        pieces = ", ".join(pipe.tokenizer.convert_ids_to_tokens(ids))
        raise ValueError(
            f"token initializer {word!r}: wanted one word of the base's vocabulary, got: {pieces}"
        )
    return int(ids[0])


def _keys_values(
    pipe: StableDiffusionPipeline, stack: ModelStack, pairs: Sequence[tuple[int, str]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Keys and values by layer, [pairs, words, out] each, of (model, prompt) pairs in any order."""
    stack = stack.to(pipe.device, pipe.unet.dtype)
    models = [model for model, _ in pairs]
    ids = token_ids(pipe, [prompt for _, prompt in pairs], models, token=stack.token)
    text = torch.cat([encode_text(pipe, part, stack.vectors) for part in ids.split(256)])
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for model in dict.fromkeys(models):
        mine = torch.tensor([other == model for other in models], device=text.device)
        weights = {name: weight[model : model + 1] for name, weight in stack.weights.items()}
        for layer, parts in project(weights, text[mine][None]).items():
            if layer not in found:
                key, value = (part.new_empty(len(pairs), *part.shape[2:]) for part in parts)
                found[layer] = key, value
            for whole, part in zip(found[layer], parts, strict=True):
                whole[mine] = part[0]
    return found
