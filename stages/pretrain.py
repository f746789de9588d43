"""Pretrain the mini world's base model: a StableDiffusionPipeline trained from nothing on rendered pictures.

In:   the renderer alone.
Out:  data/base/mini, a folder `StableDiffusionPipeline.from_pretrained` opens (fp16).
Cost: see the README's table of stages; this stage is frozen, its output is shipped. To run it again:
`dvc repro --force --single-item pretrain` after `frozen: false`, or `python -m stages.pretrain`.

Four steps, each resumable from a folder of these settings in data/pretraining/: render the corpus, train the
AutoencoderKL, encode the corpus once, train UNet2DConditionModel and CLIPTextModel together on the cached
latents (v-prediction, min-SNR weights arXiv:2303.09556, 10 % caption dropout, EMA).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTokenizer

from attribution.command import command_line
from attribution.files import atomic_path
from attribution.params import load_params
from miniworld.corpus import corpus_captions, corpus_pictures
from stages.mini_base import Params, new_autoencoder, new_parts, new_scheduler, new_tokenizer
from stages.training import Schedule, first_alone, join_processes, open_device, processes, train


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


def _schedule(params: Params, steps: int, learning_rate: float) -> Schedule:
    return Schedule(steps, learning_rate, params.warmup_steps, params.decay_fraction, params.ema_decay)


def train_autoencoder(params: Params, corpus: np.ndarray, scratch: Path) -> AutoencoderKL:
    """The autoencoder trained on L1 + squared error with a small KL; latents scaled to unit deviation."""
    torch.manual_seed(params.seed)
    device = open_device(params.device)
    model = new_autoencoder(params).to(device)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        index = np.sort(rng.integers(len(corpus), size=params.autoencoder_batch // processes()[1]))
        pixels = _pixels(corpus[index], rng.random(len(index)) < 0.5).to(device)
        noise = rng.standard_normal((len(index), params.latent_channels, 8, 8), dtype=np.float32)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            posterior = model.encode(pixels).latent_dist
            latents = posterior.mean + posterior.std * torch.from_numpy(noise).to(device)
            decoded = model.decode(latents).sample.float()
        error = decoded - pixels
        kl = posterior.kl().float().mean() / latents[0].numel()
        return error.abs().mean() + 2 * error.square().mean() + params.kl_weight * kl

    schedule = _schedule(params, params.autoencoder_steps, params.autoencoder_learning_rate)
    ema = train(
        model, loss_of, schedule, seed=params.seed,
        checkpoint=scratch / "autoencoder.safetensors", checkpoint_seconds=params.checkpoint_seconds,
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
                    pixels = _pixels(corpus[part], np.full(len(corpus[part]), bool(flip))).to(model.device)
                    with torch.autocast(model.device.type, dtype=torch.bfloat16):
                        mean = model.encode(pixels).latent_dist.mean
                    latents[flip, part] = mean.float().cpu().numpy()
            latents.flush()
    return np.load(path, mmap_mode="r")


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


def train_text_to_image(
    params: Params,
    latents: np.ndarray,
    tokens: np.ndarray,
    empty: np.ndarray,
    scale: float,
    parts: torch.nn.ModuleDict,
    scratch: Path,
) -> None:
    """Trains UNet and text encoder together; `parts` ends with the EMA weights."""
    device = open_device(params.device)
    parts.to(device)
    unet: Any = parts["unet"]
    scheduler = new_scheduler()
    alphas = scheduler.alphas_cumprod

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        batch = params.batch // processes()[1]
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
        noisy, t, target, weight = (part.to(device) for part in (noisy, t, target, weight))
        text = parts["text_encoder"](torch.from_numpy(ids.astype(np.int64)).to(device)).last_hidden_state
        with torch.autocast(device.type, dtype=torch.bfloat16):
            predicted = unet(noisy, t, text).sample
        error = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        return (weight * error).sum() / weight.sum()

    if device.type == "cpu":
        unet.set_attn_processor(_Float32Attention())
    ema = train(
        parts, loss_of, _schedule(params, params.steps, params.learning_rate), seed=params.seed,
        checkpoint=scratch / "text_to_image.safetensors", checkpoint_seconds=params.checkpoint_seconds,
    )  # fmt: skip
    parts.load_state_dict(ema)
    unet.set_attn_processor(AttnProcessor2_0())


def save_pipeline(
    out: Path, vae: AutoencoderKL, parts: torch.nn.ModuleDict, tokenizer: CLIPTokenizer
) -> None:
    """Writes the fp16 StableDiffusionPipeline folder, whole or not at all."""
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=parts["text_encoder"], tokenizer=tokenizer, unet=parts["unet"],
        scheduler=new_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    with atomic_path(out) as temporary:
        pipeline.to("cpu", torch.float16).save_pretrained(temporary, safe_serialization=True)


def run(params: Params, *, out: Path, scratch: Path) -> None:
    """Trains everything that is not trained yet and writes the pipeline to `out`."""
    scratch.mkdir(parents=True, exist_ok=True)
    with first_alone():
        corpus = render_corpus(params, scratch / "corpus.npy")
    vae = train_autoencoder(params, corpus, scratch)
    with first_alone():
        latents = encode_corpus(vae, corpus, scratch / "latents.npy")
        tokenizer = new_tokenizer(params, scratch / "tokenizer")
        tokens = tokenize_corpus(params, tokenizer, scratch / "tokens.npy")
    scale = 1 / float(latents[0, :2000].astype(np.float32).std())
    vae.register_to_config(scaling_factor=scale)
    empty = np.array(tokenizer([""], padding="max_length", truncation=True).input_ids[0])
    parts = new_parts(params, tokenizer)
    train_text_to_image(params, latents, tokens, empty, scale, parts, scratch)
    if processes()[0] == 0:
        save_pipeline(out, vae, parts, tokenizer)


def main() -> None:
    """`python -m stages.pretrain`, or under torchrun."""
    join_processes()
    params = load_params(Params, "pretrain")
    run(params, out=Path("data/base/mini"), scratch=params.scratch(Path("data/pretraining")))


if __name__ == "__main__":
    with command_line("stages.pretrain", __doc__) as parser:
        parser.parse_args()
        main()
