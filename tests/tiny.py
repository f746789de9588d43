"""Stable Diffusion pipelines of a few thousand random weights, in the classes and files of the real one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = (
    *(
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "with",
        "and",
        "art",
        "picture",
        "style",
        "painting",
        "drawing",
        "photo",
    ),
    *("sketch", "red", "blue", "green", "car", "tree", "cat", "bird", "house", "sun", "small", "very", "far"),
    *("away", "zoomed", "close", "up", "beach", "forest", "tones"),
)
START, END = "<|startoftext|>", "<|endoftext|>"


def word_tokenizer(words: Sequence[str] = WORDS, *, positions: int = 16) -> CLIPTokenizer:
    """A CLIP tokenizer to which each of `words` is one token, and any other word its letters."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = _merge([*word[:-1], word[-1] + "</w>"], ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            vocabulary.append(pieces[0] + pieces[1])
            pieces = _merge(pieces, ranks)
    table = {piece: number for number, piece in enumerate(dict.fromkeys([*vocabulary, START, END]))}
    return CLIPTokenizer(vocab=table, merges=list(ranks), model_max_length=positions)


def _merge(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    while pairs := [pair for pair in itertools.pairwise(pieces) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        place = next(i for i in range(len(pieces)) if tuple(pieces[i : i + 2]) == best)
        pieces = [*pieces[:place], "".join(best), *pieces[place + 2 :]]
    return pieces


def build_pipeline(
    *,
    latents: tuple[int, int] = (4, 4),  # channels, side
    factor: int = 4,  # pixels per latent cell
    widths: tuple[int, ...] = (16, 32),
    text_width: int = 24,
    positions: int = 16,
    prediction_type: Literal["epsilon", "v_prediction"] = "v_prediction",
    unet: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    padding: str | None = None,
    seed: int = 0,
) -> StableDiffusionPipeline:
    """A pipeline that draws pictures of latents[1] * factor pixels; its weights depend on `seed` alone.

    `unet` and `text` are more of the configurations of the UNet and of the text encoder; `padding` is the
    word that fills prompts up.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = word_tokenizer(positions=positions)
        if padding is not None:
            tokenizer.pad_token = padding
        text_encoder = CLIPTextModel(text_config(tokenizer, text_width, positions, **(text or {})))
        # transformers starts embeddings at a deviation of 0.02: too little for words to show in the pictures.
        torch.nn.init.normal_(text_encoder.get_input_embeddings().weight)
        net = build_unet(latents, widths, text_width, **(unet or {}))
        vae = build_vae(latents, factor)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=net,
        scheduler=build_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def text_config(tokenizer: CLIPTokenizer, width: int, positions: int, **more: Any) -> CLIPTextConfig:
    """Two layers, unless `more` says otherwise."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=2,
        max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"eos_token_id": tokenizer.eos_token_id, "num_hidden_layers": 2, **more},
    )


def build_unet(
    latents: tuple[int, int], widths: tuple[int, ...], text_width: int, **more: Any
) -> UNet2DConditionModel:
    channels, side = latents
    config = {
        "sample_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "down_block_types": ("CrossAttnDownBlock2D",) * (len(widths) - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(widths) - 1),
        "layers_per_block": 1,
        "cross_attention_dim": text_width,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **more})


def build_vae(latents: tuple[int, int], factor: int) -> AutoencoderKL:
    channels, side = latents
    depth = factor.bit_length() - 1
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(8,) * (depth + 1),
        down_block_types=("DownEncoderBlock2D",) * (depth + 1),
        up_block_types=("UpDecoderBlock2D",) * (depth + 1),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=side * factor,
        scaling_factor=0.5,
    )


def build_scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_xl_pipeline(
    *,
    latents: tuple[int, int] = (4, 4),
    factor: int = 4,
    widths: tuple[int, ...] = (16, 32),
    text_widths: tuple[int, int] = (24, 16),
    positions: int = 16,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    force_zeros_for_empty_prompt: bool = True,
    seed: int = 0,
) -> StableDiffusionXLPipeline:
    """The same of SDXL: two tokenizers that pad differently, two encoders, sizes and pooled text told too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizers = word_tokenizer(positions=positions), word_tokenizer(positions=positions)
        tokenizers[1].pad_token = "!"
        one = text_config(tokenizers[0], text_widths[0], positions)
        # As published: transformers takes this 2 to mean the largest id, not the end of text.
        two = text_config(
            tokenizers[1], text_widths[1], positions, hidden_act="gelu", projection_dim=12, eos_token_id=2
        )
        encoders = CLIPTextModel(one), CLIPTextModelWithProjection(two)
        for encoder in encoders:
            torch.nn.init.normal_(encoder.get_input_embeddings().weight)
        torch.nn.init.normal_(encoders[1].text_projection.weight)
        net = build_unet(
            latents,
            widths,
            sum(text_widths),
            use_linear_projection=True,
            transformer_layers_per_block=(1,) * (len(widths) - 1) + (2,),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 12,
        )
        vae = build_vae(latents, factor)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=net,
        scheduler=build_scheduler(prediction_type),
        force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        add_watermarker=False,
    )


def save_tiny_pipeline(folder: Path, *, half: bool = True, xl: bool = False, **options) -> Path:
    """`folder` holds such a pipeline as safetensors (float16 unless told otherwise) and is returned."""
    pipe = build_xl_pipeline(**options) if xl else build_pipeline(**options)
    for part in pipe.components.values() if half else ():
        if isinstance(part, torch.nn.Module):
            part.half()
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder
