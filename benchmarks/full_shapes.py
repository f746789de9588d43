"""Pipelines of the true shapes with random weights: what time and memory depend on, and nothing else.

The configurations are facts about Stable Diffusion 1.5 and SDXL as published. `small` keeps their structure
and shrinks every width, for trying the code.
"""

from __future__ import annotations

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

from attribution.base_model import Pipeline

Family = Literal["sd15", "sdxl"]
VOCABULARY = 49408
WORDS = 77

UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 1280,
    },
}
SMALL_UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        **UNETS["sd15"],
        "sample_size": 8,
        "block_out_channels": (32, 32, 64, 64),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "layers_per_block": 1,
    },
    "sdxl": {
        **UNETS["sdxl"],
        "sample_size": 8,
        "block_out_channels": (32, 32, 64),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": 32 + 64,
        "layers_per_block": 1,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 64,
    },
}
SCALING = {"sd15": 0.18215, "sdxl": 0.13025}


def build(family: Family, device: str, dtype: torch.dtype, *, small: bool = False) -> Pipeline:
    """The frozen pipeline, made where it will be used ("meta": shapes alone)."""
    with torch.device(device):
        unet = UNet2DConditionModel(**(SMALL_UNETS if small else UNETS)[family])
        parts = {"vae": _vae(family, small), "unet": unet, **_text(family, small)}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype).requires_grad_(False).eval()
    if family == "sdxl" and dtype == torch.float16:
        parts["vae"].float()  # as load_base leaves it
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    if family == "sdxl":
        return StableDiffusionXLPipeline(**parts, scheduler=scheduler, add_watermarker=False)
    return StableDiffusionPipeline(
        **parts,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tokenizer() -> CLIPTokenizer:
    """As many tokens as CLIP's; those that are words are the letters."""
    letters = [chr(code) for code in range(33, 127)]
    known = [*letters, *(f"{letter}</w>" for letter in letters)]
    ends = ["<|startoftext|>", "<|endoftext|>"]
    others = [f"unused{number}</w>" for number in range(VOCABULARY - len(known) - len(ends))]
    table = {piece: number for number, piece in enumerate([*known, *others, *ends])}
    return CLIPTokenizer(vocab=table, merges=[], model_max_length=WORDS)


def _vae(family: Family, small: bool) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 32) if small else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1 if small else 2,
        sample_size=8 * UNETS[family]["sample_size"],
        scaling_factor=SCALING[family],
    )


def _text(family: Family, small: bool) -> dict[str, Any]:
    """CLIP ViT-L's encoder and, for SDXL, OpenCLIP ViT-bigG's."""
    ends = {"vocab_size": VOCABULARY, "bos_token_id": VOCABULARY - 2, "max_position_embeddings": WORDS}
    sizes: dict[str, dict[str, Any]] = {
        "text_encoder": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
        "text_encoder_2": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20},
    }
    if small:
        for size, width in zip(sizes.values(), (32, 64), strict=True):
            size |= {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2}
    for size in sizes.values():
        size |= {"intermediate_size": 4 * size["hidden_size"], "projection_dim": size["hidden_size"]}
    one = CLIPTextConfig(**ends, **sizes["text_encoder"], eos_token_id=VOCABULARY - 1)
    found = {"text_encoder": CLIPTextModel(one), "tokenizer": tokenizer()}
    if family == "sdxl":
        two = CLIPTextConfig(**ends, **sizes["text_encoder_2"], hidden_act="gelu", eos_token_id=2)
        found |= {"text_encoder_2": CLIPTextModelWithProjection(two), "tokenizer_2": tokenizer()}
    return found
