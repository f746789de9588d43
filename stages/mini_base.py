"""The parts of the mini world's base model, untrained: the classes that load Stable Diffusion, small."""

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from attribution.files import content_key
from miniworld.captions import vocabulary


@dataclass(frozen=True)
class Params:
    """`pretrain` in params.yaml. `device`: cpu, cuda, or auto for a GPU where there is one."""

    seed: int
    device: Literal["auto", "cpu", "cuda"]
    pictures: int
    captions_per_picture: int
    workers: int
    autoencoder_steps: int
    autoencoder_batch: int
    autoencoder_learning_rate: float
    latent_channels: int
    kl_weight: float
    steps: int
    batch: int
    learning_rate: float
    warmup_steps: int
    decay_fraction: float
    unet_channels: tuple[int, ...]
    text_width: int
    text_layers: int
    text_positions: int
    ema_decay: float
    caption_dropout: float
    min_snr_gamma: float
    checkpoint_seconds: float

    def scratch(self, folder: Path) -> Path:
        """Where their unfinished work lies, in `folder`: no other settings' is ever taken for it."""
        machine = ("device", "workers", "checkpoint_seconds")
        return folder / content_key({key: value for key, value in asdict(self).items() if key not in machine})


def new_autoencoder(params: Params) -> AutoencoderKL:
    """An untrained AutoencoderKL: 64 x 64 x 3 to 8 x 8 x latent_channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=params.latent_channels,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def _merge(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: the pair of the lowest rank is joined until none is known."""
    while pairs := [pair for pair in itertools.pairwise(pieces) if pair in ranks]:
        place = list(itertools.pairwise(pieces)).index(min(pairs, key=ranks.__getitem__))
        pieces = [*pieces[:place], pieces[place] + pieces[place + 1], *pieces[place + 2 :]]
    return pieces


def new_tokenizer(params: Params, folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the grammar is one token and any other is spelled.

    Merges are made word by word, not learned: tokenizers' BPE trainer breaks ties anew in every process, and
    ids that wander between two runs of a resumed training ruin it silently.
    """
    ranks: dict[tuple[str, str], int] = {}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-,.'"
    vocab = [*letters, *(f"{letter}</w>" for letter in letters)]
    for word in vocabulary():
        pieces = _merge([*word[:-1], f"{word[-1]}</w>"], ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            vocab.append(pieces[0] + pieces[1])
            pieces = _merge(pieces, ranks)
    table = {token: row for row, token in enumerate([*vocab, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=table, merges=list(ranks), model_max_length=params.text_positions)
    tokenizer.save_pretrained(folder)
    return tokenizer


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a pipeline folder."""
    return CLIPTokenizer.from_pretrained(folder)


def new_text_encoder(params: Params, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text model for the tokenizer's vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=params.text_width,
            intermediate_size=2 * params.text_width,
            projection_dim=params.text_width,
            num_hidden_layers=params.text_layers,
            num_attention_heads=4,
            max_position_embeddings=params.text_positions,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet(params: Params) -> UNet2DConditionModel:
    """An untrained UNet2DConditionModel with cross-attention at every level."""
    levels = len(params.unet_channels)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=params.latent_channels,
        out_channels=params.latent_channels,
        block_out_channels=params.unet_channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=params.text_width,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """The noise schedule of the base model."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip


def new_parts(params: Params, tokenizer: CLIPTokenizer) -> torch.nn.ModuleDict:
    """UNet and text encoder, untrained, seeded."""
    torch.manual_seed(params.seed + 1)
    return torch.nn.ModuleDict(
        {"unet": new_unet(params), "text_encoder": new_text_encoder(params, tokenizer)}
    )
