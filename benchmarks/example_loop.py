"""What diffusers' example script for Custom Diffusion does in a step, for Stable Diffusion 1 and 2: the peer.

One concept at a time. Every step encodes its pictures and texts anew; autocast runs a half-precision UNet and
autoencoder with a float32 text encoder; the whole token table has a gradient, of which all rows but the new
token's are wiped, and AdamW moments. Pictures come ready from memory here: there, processes load them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from torch import Tensor, nn


@dataclass(frozen=True)
class Example:
    """One concept: pictures in [-1, 1] and ids of their prompts, instances before as many of the class."""

    pixels: Tensor
    ids: Tensor
    new: int


def train_example(
    pipe: StableDiffusionPipeline, example: Example, *, steps: int, on_step: Callable[[], object]
) -> None:
    """Trains that many steps; the pipeline is as before afterwards, but for its text encoder's precision."""
    unet, encoder, dtype = pipe.unet, pipe.text_encoder.float(), pipe.unet.dtype
    device = pipe.device.type
    before = dict(unet.attn_processors)
    trained = add_processors(unet)
    table = encoder.get_input_embeddings().weight.requires_grad_()
    others = torch.arange(len(table), device=table.device) != example.new
    optimizer = torch.optim.AdamW([table, *trained], lr=1e-5, weight_decay=1e-2)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16 and device == "cuda")
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    try:
        for _ in range(steps):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                with torch.no_grad():
                    latents = pipe.vae.encode(example.pixels.to(pipe.vae.dtype)).latent_dist.sample()
                    latents = latents * pipe.vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(1000, (len(latents),), device=latents.device)
                noisy = scheduler.add_noise(latents, noise, timesteps)
                text = encoder(example.ids)[0]
                output = unet(noisy, timesteps, encoder_hidden_states=text).sample
            instance, prior = F.mse_loss(output.float(), noise.float(), reduction="none").chunk(2)
            scaler.scale(instance.mean() + prior.mean()).backward()
            assert table.grad is not None
            table.grad[others] = 0
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(itertools.chain(encoder.parameters(), trained), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            on_step()
    finally:
        table.requires_grad_(False)
        unet.set_attn_processor(before)


def add_processors(unet: Any) -> list[nn.Parameter]:
    """diffusers' own processors: trained float32 keys and values of the text, which start as the base's."""
    processors = {}
    trained: list[nn.Parameter] = []
    for name in unet.attn_processors:
        layer = unet.get_submodule(name.removesuffix(".processor"))
        reads_text = name.endswith("attn2.processor")
        processor = CustomDiffusionAttnProcessor2_0(
            train_kv=reads_text,
            train_q_out=False,
            hidden_size=layer.to_k.out_features,
            cross_attention_dim=layer.to_k.in_features if reads_text else None,
        ).to(layer.to_k.weight.device)
        if reads_text:
            processor.to_k_custom_diffusion.weight.data.copy_(layer.to_k.weight)
            processor.to_v_custom_diffusion.weight.data.copy_(layer.to_v.weight)
            trained += processor.parameters()
        processors[name] = processor
    unet.set_attn_processor(processors)
    return trained
