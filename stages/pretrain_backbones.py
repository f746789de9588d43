"""Pretrain the mini world's backbones on the base model's corpus, each by another kind of supervision.

In:   the renderer and data/base/mini's tokenizer.
Out:  data/backbones/{supervised,ssl,clip} (fp16 safetensors).
Cost: see the README's table of stages; this stage is frozen, its output is shipped.

supervised: a timm ResNet that reads class, colours, texture, background and medium; its reading heads are
kept in heads.safetensors for the gate. ssl: the same net under SimCLR (arXiv:2002.05709), no labels. clip: an
open_clip model on (picture, caption) pairs (arXiv:2103.00020).
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from attribution.backbones import write_backbone
from attribution.command import command_line
from attribution.files import atomic_path, content_key
from attribution.params import load_params
from miniworld.corpus import corpus_scene
from miniworld.readings import READINGS, true_readings
from stages.mini_base import Params as CorpusParams
from stages.mini_base import load_tokenizer
from stages.pretrain import render_corpus, tokenize_corpus
from stages.training import open_device

_PREPROCESS = {"size": 64, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"}
_RESNET: dict[str, Any] = {"architecture": "resnet10t", "kwargs": {"channels": [24, 48, 96, 128]}}
_RESNET_DIM = 128


@dataclass(frozen=True)
class Params:
    """`pretrain_backbones` in params.yaml."""

    seed: int
    batch: int
    learning_rate: float
    supervised_steps: int
    ssl_steps: int
    ssl_temperature: float
    clip_steps: int
    clip_width: int
    clip_layers: int


def new_resnet() -> nn.Module:
    """The small ResNet of the supervised and the self-supervised backbone, untrained.

    Channels last: with bf16 that is more than twice as fast on a CPU.
    """
    net = timm.create_model(_RESNET["architecture"], num_classes=0, **_RESNET["kwargs"])
    return net.to(memory_format=torch.channels_last)


def new_heads() -> nn.ModuleDict:
    """One linear classifier per reading, on the supervised backbone's features."""
    return nn.ModuleDict({name: nn.Linear(_RESNET_DIM, len(values)) for name, values in READINGS.items()})


def _pixels(batch: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def _augment(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Random resized crop, mirror, blur, brightness, contrast and channel gains, one draw per picture."""
    count, device = len(pixels), pixels.device
    scale = torch.from_numpy(np.sqrt(rng.uniform(0.35, 1.0, count))).float()
    shift = torch.from_numpy(rng.uniform(-1, 1, (count, 2))).float() * (1 - scale)[:, None]
    mirror = torch.from_numpy(rng.choice([-1.0, 1.0], count)).float()
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * mirror, scale, shift
    grid = F.affine_grid(theta.to(device), list(pixels.shape), align_corners=False)
    views = F.grid_sample(pixels, grid, align_corners=False, padding_mode="reflection")
    gain = torch.from_numpy(rng.uniform(0.75, 1.25, (count, 3, 1, 1))).float()
    offset = torch.from_numpy(rng.uniform(-0.2, 0.2, (count, 1, 1, 1))).float()
    return _blur(views, rng) * gain.to(device) + offset.to(device)


def _blur(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Half of the pictures through a Gaussian: no backbone should live on detail that decoders lose."""
    sigma, places = rng.uniform(0.3, 1.2), torch.arange(-3.0, 4.0)
    kernel = torch.exp(-0.5 * (places / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 7).to(pixels.device)
    blurred = F.pad(pixels, (3, 3, 3, 3), mode="reflect")
    blurred = F.conv2d(F.conv2d(blurred, kernel, groups=3), kernel.transpose(2, 3), groups=3)
    chosen = torch.from_numpy(rng.random((len(pixels), 1, 1, 1)) < 0.5)
    return torch.where(chosen.to(pixels.device), blurred, pixels)


def _train(
    modules: nn.Module,
    loss_of: Callable[[np.random.Generator], torch.Tensor],
    params: Params,
    steps: int,
    name: str,
) -> None:
    optimizer = torch.optim.AdamW(modules.parameters(), params.learning_rate, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, params.learning_rate, total_steps=steps, pct_start=0.1
    )
    device = next(modules.parameters()).device
    modules.train()
    bar = tqdm(range(steps), desc=name, disable=None)
    for step in bar:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_of(np.random.default_rng((params.seed, 4, step)))
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}")


def _nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """SimCLR's loss: each view's partner among all other views of the batch."""
    views = F.normalize(torch.cat([first, second]).float(), dim=1)
    logits = views @ views.T / temperature
    logits.fill_diagonal_(float("-inf"))
    count = len(first)
    partner = torch.cat([torch.arange(count, 2 * count), torch.arange(count)]).to(views.device)
    return F.cross_entropy(logits, partner)


def train_supervised(
    params: Params, corpus: np.ndarray, labels: np.ndarray, device: torch.device
) -> tuple[nn.Module, nn.ModuleDict]:
    """The net and its reading heads."""
    torch.manual_seed(params.seed)
    net, heads = new_resnet().to(device), new_heads().to(device)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        index = np.sort(rng.integers(len(corpus), size=params.batch))
        pixels = _blur(_pixels(corpus[index]).to(device), rng)
        if rng.random() < 0.5:
            pixels = pixels.flip(3)
        features = net(pixels)
        truth = torch.from_numpy(labels[index]).to(device)
        losses = [F.cross_entropy(heads[name](features), truth[:, i]) for i, name in enumerate(READINGS)]
        return torch.stack(losses).sum()

    _train(nn.ModuleList([net, heads]), loss_of, params, params.supervised_steps, "supervised")
    return net, heads


def train_ssl(params: Params, corpus: np.ndarray, device: torch.device) -> nn.Module:
    """The net trained to find the other view of the same picture."""
    torch.manual_seed(params.seed + 1)
    net = new_resnet().to(device)
    projector = nn.Sequential(nn.Linear(_RESNET_DIM, 128), nn.ReLU(), nn.Linear(128, 64)).to(device)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        pixels = _pixels(corpus[np.sort(rng.integers(len(corpus), size=params.batch))]).to(device)
        views = [projector(net(_augment(pixels, rng))) for _ in range(2)]
        return _nt_xent(views[0], views[1], params.ssl_temperature)

    _train(nn.ModuleList([net, projector]), loss_of, params, params.ssl_steps, "ssl")
    return net


def train_clip(
    params: Params, corpus: np.ndarray, tokens: np.ndarray, config: dict[str, Any], device: torch.device
) -> nn.Module:
    """The open_clip model trained to match pictures with their captions."""
    torch.manual_seed(params.seed + 2)
    net = CLIP(**config).to(device)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        index = np.sort(rng.integers(len(corpus), size=params.batch))
        text = tokens[index, rng.integers(tokens.shape[1], size=params.batch)].astype(np.int64)
        pixels = _blur(_pixels(corpus[index]).to(device), rng)
        image, words, scale = net(pixels, torch.from_numpy(text).to(device))[:3]
        logits = scale.clamp(max=100) * image @ words.T
        target = torch.arange(len(index), device=device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    _train(net, loss_of, params, params.clip_steps, "clip")
    return net


def clip_config(params: Params, vocabulary: int, positions: int) -> dict[str, Any]:
    """Arguments of open_clip.model.CLIP."""
    width = params.clip_width
    return {
        "embed_dim": width,
        "vision_cfg": {
            "image_size": 64, "patch_size": 8, "layers": params.clip_layers, "width": width, "head_width": 32,
        },
        "text_cfg": {
            "context_length": positions, "vocab_size": vocabulary, "layers": 2, "width": 64, "heads": 4,
        },
    }  # fmt: skip


def run(params: Params, corpus_params: CorpusParams, *, base: Path, out: Path, scratch: Path) -> None:
    """Trains what `scratch`, of this corpus, does not hold for `params`; writes all backbones to `out`."""
    device = open_device(corpus_params.device)
    corpus = render_corpus(corpus_params, scratch / "corpus.npy")
    tokenizer = load_tokenizer(base / "tokenizer")
    done = scratch / f"backbones-{content_key(params, base / 'tokenizer')}"
    revision = f"corpus {corpus_params.seed}/{corpus_params.pictures}"
    resnet = {"library": "timm", **_RESNET, "preprocess": _PREPROCESS, "revision": revision}
    if not (done / "supervised" / "heads.safetensors").exists():
        scenes = (corpus_scene(corpus_params.seed, i) for i in range(len(corpus)))
        labels = np.array([list(true_readings(scene).values()) for scene in scenes])
        net, heads = train_supervised(params, corpus, labels, device)
        write_backbone(done / "supervised", resnet, net)
        with atomic_path(done / "supervised" / "heads.safetensors") as temporary:
            save_file({k: v.half() for k, v in heads.state_dict().items()}, temporary)
    if not (done / "ssl").exists():
        write_backbone(done / "ssl", resnet, train_ssl(params, corpus, device))
    if not (done / "clip").exists():
        tokens = tokenize_corpus(corpus_params, tokenizer, scratch / "tokens.npy")
        config = clip_config(params, len(tokenizer), corpus_params.text_positions)
        net = train_clip(params, corpus, tokens, config, device)
        write_backbone(
            done / "clip",
            {"library": "open_clip", "model_cfg": config, "preprocess": _PREPROCESS, "revision": revision},
            net,
        )
    with atomic_path(out) as temporary:
        shutil.copytree(done, temporary)


def main() -> None:
    """`python -m stages.pretrain_backbones`."""
    corpus_params = load_params(CorpusParams, "pretrain")
    run(
        load_params(Params, "pretrain_backbones"), corpus_params, base=Path("data/base/mini"),
        out=Path("data/backbones"), scratch=corpus_params.scratch(Path("data/pretraining")),
    )  # fmt: skip


if __name__ == "__main__":
    with command_line("stages.pretrain_backbones", __doc__) as parser:
        parser.parse_args()
        main()
