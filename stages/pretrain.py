"""Pretrain the mini world's base model: a StableDiffusionPipeline trained from nothing on rendered pictures.

In:   the renderer alone.
Out:  data/base/mini, a folder `StableDiffusionPipeline.from_pretrained` opens (fp16).
Cost: see the README's table of stages; this stage is frozen, its output is shipped. To run it again:
`dvc repro --force --single-item pretrain` after `frozen: false`, or `python -m stages.pretrain`.

Four steps, each resumable from data/pretraining/: render the corpus, train the AutoencoderKL, encode the
corpus once, train UNet2DConditionModel and CLIPTextModel together on the cached latents (v-prediction,
min-SNR weights arXiv:2303.09556, 10 % caption dropout, EMA).

`torchrun --nproc-per-node N -m stages.pretrain` shares every batch among N processes. On CPU one
single-threaded process per core is half again as fast as one process with as many threads: the nets are
small.
"""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from attribution.files import atomic_path
from attribution.params import load_params
from miniworld.captions import vocabulary
from miniworld.corpus import corpus_captions, corpus_pictures

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Params:
    """`pretrain` in params.yaml."""

    seed: int
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


# Processes


def _world() -> tuple[int, int]:
    """(rank, number of processes) of this run."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _first_alone() -> Any:
    """A context in which the first process works while the others wait, so that they find its files."""

    @contextlib.contextmanager
    def turns() -> Iterator[None]:
        rank, size = _world()
        if size > 1 and rank > 0:
            dist.barrier()
        yield
        if size > 1 and rank == 0:
            dist.barrier()

    return turns()


def _average_gradients(model: torch.nn.Module) -> None:
    _, size = _world()
    if size > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= size
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


# The corpus


def render_corpus(params: Params, path: Path) -> np.ndarray:
    """The pictures as uint8 [pictures, 64, 64, 3], memory-mapped from `path`."""
    if not path.exists():
        with atomic_path(path) as temporary:
            shape = (params.pictures, 64, 64, 3)
            corpus = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
            pictures = corpus_pictures(params.seed, range(params.pictures), workers=params.workers)
            for i, picture in enumerate(tqdm(pictures, total=params.pictures, desc="render", disable=None)):
                corpus[i] = picture
            corpus.flush()
    return np.load(path, mmap_mode="r")


def _pixels(batch: np.ndarray, flip: np.ndarray) -> torch.Tensor:
    """uint8 [batch, 64, 64, 3] -> float32 [batch, 3, 64, 64] in [-1, 1], the flagged ones mirrored."""
    batch = np.where(flip[:, None, None, None], batch[:, :, ::-1], batch)
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


# Training, resumable


def _save_training(path: Path, step: int, model: torch.nn.Module, ema: Tensors, optimizer: Any) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    with atomic_path(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"step": str(step)})


def _load_training(path: Path, model: torch.nn.Module, ema: Tensors, optimizer: Any) -> int:
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    ema.update({k[4:]: v for k, v in tensors.items() if k.startswith("ema.")})
    state: dict[int, Tensors] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


def _train(
    model: torch.nn.Module,
    loss_of: Any,
    *,
    steps: int,
    learning_rate: float,
    params: Params,
    checkpoint: Path,
    name: str,
) -> Tensors:
    """The EMA weights of `model` after `steps` steps on `loss_of(rng)`."""
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(
        model.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    start = _load_training(checkpoint, model, ema, optimizer)
    saved = time.monotonic()
    log = checkpoint.with_suffix(".jsonl")
    recent: list[float] = []
    rank, _ = _world()
    decay_steps = max(1, int(params.decay_fraction * steps))
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, disable=None)
    for step in bar:
        rate = learning_rate * min(1.0, (step + 1) / params.warmup_steps, (steps - step) / decay_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rng = np.random.default_rng((params.seed, 3, step, rank))
        loss = loss_of(rng)
        loss.backward()
        _average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(params.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            current = model.state_dict()
            torch._foreach_lerp_(list(ema.values()), [current[k] for k in ema], 1 - decay)
        recent.append(float(loss.detach()))
        if len(recent) == 100 and rank == 0:
            with log.open("a") as file:
                file.write(
                    json.dumps({"step": step + 1, "loss": sum(recent) / 100, "time": time.time()}) + "\n"
                )
            recent = []
        if rank == 0 and (time.monotonic() - saved > params.checkpoint_seconds or step + 1 == steps):
            _save_training(checkpoint, step + 1, model, ema, optimizer)
            saved = time.monotonic()
    return ema


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


def train_autoencoder(params: Params, corpus: np.ndarray, scratch: Path) -> AutoencoderKL:
    """The autoencoder trained on L1 + squared error with a small KL; latents scaled to unit deviation."""
    torch.manual_seed(params.seed)
    model = new_autoencoder(params)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        index = np.sort(rng.integers(len(corpus), size=params.autoencoder_batch // _world()[1]))
        pixels = _pixels(corpus[index], rng.random(len(index)) < 0.5)
        noise = torch.from_numpy(
            rng.standard_normal((len(index), params.latent_channels, 8, 8), dtype=np.float32)
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = model.encode(pixels).latent_dist
            latents = posterior.mean + posterior.std * noise
            decoded = model.decode(latents).sample.float()
        error = decoded - pixels
        kl = posterior.kl().float().mean() / latents[0].numel()
        return error.abs().mean() + 2 * error.square().mean() + params.kl_weight * kl

    ema = _train(
        model, loss_of, steps=params.autoencoder_steps, learning_rate=params.autoencoder_learning_rate,
        params=params, checkpoint=scratch / "autoencoder.safetensors", name="autoencoder",
    )  # fmt: skip
    model.load_state_dict(ema)
    return model.eval()


@torch.inference_mode()
def encode_corpus(model: AutoencoderKL, corpus: np.ndarray, path: Path) -> np.ndarray:
    """Posterior means of all pictures and their mirror images: float16 [2, pictures, channels, 8, 8]."""
    if not path.exists():
        with atomic_path(path) as temporary:
            shape = (2, len(corpus), model.config.latent_channels, 8, 8)
            latents = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
            for start in tqdm(range(0, len(corpus), 250), desc="encode", disable=None):
                part = slice(start, start + 250)
                for flip in (0, 1):
                    pixels = _pixels(corpus[part], np.full(len(corpus[part]), bool(flip)))
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        latents[flip, part] = model.encode(pixels).latent_dist.mean.float().numpy()
            latents.flush()
    return np.load(path, mmap_mode="r")


# Text


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


def tokenize_corpus(params: Params, tokenizer: CLIPTokenizer, path: Path) -> np.ndarray:
    """Token ids of every picture's captions: int16 [pictures, captions, positions]."""
    if not path.exists():
        rows = []
        for i in tqdm(range(params.pictures), desc="captions", disable=None):
            captions = corpus_captions(params.seed, i, params.captions_per_picture)
            ids = tokenizer(captions, padding="max_length", truncation=True).input_ids
            rows.append(np.array(ids, dtype=np.int16))
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.stack(rows))
    return np.load(path)


# The diffusion model


class _Float32Attention:
    """Attention whose scores stay in float32 under autocast: bf16 backward is several times slower on CPU."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
    ) -> torch.Tensor:
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(hidden_states), attn.to_k(read), attn.to_v(read))
        query, key, value = (
            part.float().unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in projected
        )
        with torch.autocast(query.device.type, enabled=False):
            mixed = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))


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


def train_text_to_image(
    params: Params,
    latents: np.ndarray,
    tokens: np.ndarray,
    empty: np.ndarray,
    scale: float,
    parts: Any,
    scratch: Path,
) -> None:
    """Trains UNet and text encoder together; `parts` (their ModuleDict) ends with the EMA weights."""
    scheduler = new_scheduler()
    alphas = scheduler.alphas_cumprod

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        batch = params.batch // _world()[1]
        index = rng.integers(latents.shape[1], size=batch)
        clean = torch.from_numpy(latents[rng.integers(2, size=batch), index].astype(np.float32)) * scale
        ids = tokens[index, rng.integers(tokens.shape[1], size=batch)]
        ids = np.where((rng.random(batch) < params.caption_dropout)[:, None], empty, ids)
        t = torch.from_numpy(rng.integers(len(alphas), size=batch))
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
        noisy = scheduler.add_noise(clean, noise, t)
        target = scheduler.get_velocity(clean, noise, t)
        snr = alphas[t] / (1 - alphas[t])
        weight = torch.minimum(snr, torch.full_like(snr, params.min_snr_gamma)) / (snr + 1)
        text = parts["text_encoder"](torch.from_numpy(ids.astype(np.int64))).last_hidden_state
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = parts["unet"](noisy, t, text).sample
        error = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        return (weight * error).sum() / weight.sum()

    parts["unet"].set_attn_processor(_Float32Attention())
    ema = _train(
        parts, loss_of, steps=params.steps, learning_rate=params.learning_rate, params=params,
        checkpoint=scratch / "text_to_image.safetensors", name="text-to-image",
    )  # fmt: skip
    parts.load_state_dict(ema)
    parts["unet"].set_attn_processor(AttnProcessor2_0())


def new_parts(params: Params, tokenizer: CLIPTokenizer) -> torch.nn.ModuleDict:
    """UNet and text encoder, untrained, seeded."""
    torch.manual_seed(params.seed + 1)
    return torch.nn.ModuleDict(
        {"unet": new_unet(params), "text_encoder": new_text_encoder(params, tokenizer)}
    )


def save_pipeline(
    out: Path, vae: AutoencoderKL, parts: torch.nn.ModuleDict, tokenizer: CLIPTokenizer
) -> None:
    """Writes the fp16 StableDiffusionPipeline folder, whole or not at all."""
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=parts["text_encoder"], tokenizer=tokenizer, unet=parts["unet"],
        scheduler=new_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    with atomic_path(out) as temporary:
        pipeline.to(torch.float16).save_pretrained(temporary, safe_serialization=True)


def run(params: Params, *, out: Path, scratch: Path) -> None:
    """Trains everything that is not trained yet and writes the pipeline to `out`."""
    scratch.mkdir(parents=True, exist_ok=True)
    with _first_alone():
        corpus = render_corpus(params, scratch / "corpus.npy")
    vae = train_autoencoder(params, corpus, scratch)
    with _first_alone():
        latents = encode_corpus(vae, corpus, scratch / "latents.npy")
        tokenizer = new_tokenizer(params, scratch / "tokenizer")
        tokens = tokenize_corpus(params, tokenizer, scratch / "tokens.npy")
    scale = 1 / float(latents[0, :2000].astype(np.float32).std())
    vae.register_to_config(scaling_factor=scale)
    empty = np.array(tokenizer([""], padding="max_length", truncation=True).input_ids[0])
    parts = new_parts(params, tokenizer)
    train_text_to_image(params, latents, tokens, empty, scale, parts, scratch)
    if _world()[0] == 0:
        save_pipeline(out, vae, parts, tokenizer)


def main() -> None:
    """`python -m stages.pretrain`, or under torchrun."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    run(load_params(Params, "pretrain"), out=Path("data/base/mini"), scratch=Path("data/pretraining"))


if __name__ == "__main__":
    main()
