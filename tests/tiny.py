"""Stable Diffusion pipelines of a few thousand random weights, in the classes and files of the real one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

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
    seed: int = 0,
) -> StableDiffusionPipeline:
    """A pipeline that draws pictures of latents[1] * factor pixels; its weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = word_tokenizer(positions=positions)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=text_width,
                intermediate_size=2 * text_width,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=positions,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        # transformers starts embeddings at a deviation of 0.02: too little for words to show in the pictures.
        torch.nn.init.normal_(text_encoder.get_input_embeddings().weight)
        channels, side = latents
        unet = UNet2DConditionModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=widths,
            down_block_types=("CrossAttnDownBlock2D",) * (len(widths) - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(widths) - 1),
            layers_per_block=1,
            cross_attention_dim=text_width,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        depth = factor.bit_length() - 1
        vae = AutoencoderKL(
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
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_tiny_pipeline(folder: Path, *, half: bool = True, **options) -> Path:
    """`folder` holds such a pipeline as safetensors (float16 unless told otherwise) and is returned."""
    pipe = build_pipeline(**options)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder) if half else ():
        part.half()
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder
