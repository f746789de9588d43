"""The pretraining recipes at a toy size: they learn, resume where they stopped, and others can load them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file

from attribution.backbones import BackboneSettings, load_backbone
from attribution.files import read_json
from attribution.params import load_params
from miniworld.captions import vocabulary
from stages import mini_base, pretrain, pretrain_backbones, training

PARAMS = replace(
    load_params(mini_base.Params, "pretrain"),
    device="cpu",
    pictures=24,
    captions_per_picture=2,
    workers=1,
    autoencoder_steps=3,
    autoencoder_batch=4,
    steps=4,
    batch=4,
    warmup_steps=2,
    unet_channels=(16, 16),
    text_width=16,
    text_layers=1,
    checkpoint_seconds=0.0,
)
BACKBONES = pretrain_backbones.Params(
    seed=0, batch=8, learning_rate=1e-3, supervised_steps=2, ssl_steps=2, ssl_temperature=0.2, clip_steps=2,
    clip_width=32, clip_layers=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    pretrain.run(PARAMS, out=folder / "base", scratch=folder / "scratch")
    return folder


def test_pipeline_is_opened_by_diffusers_and_draws(trained: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(
        trained / "base", dtype=torch.float32, local_files_only=True, low_cpu_mem_usage=False
    )
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red apple", num_inference_steps=2, output_type="np", height=64, width=64).images
    assert image.shape == (1, 64, 64, 3)
    stored = load_file(trained / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


def test_every_word_of_the_grammar_is_one_token(trained: Path) -> None:
    tokenizer = mini_base.load_tokenizer(trained / "base" / "tokenizer")
    for word in vocabulary():
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    assert len(tokenizer("zebra", add_special_tokens=False).input_ids) > 1


def test_a_stopped_training_resumes_to_the_same_weights(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = training._save, []

    def save_then_stop(path: Path, step: int, *rest: Any) -> None:
        save(path, step, *rest)
        saved.append((path.name, step))
        if saved[-1] == ("text_to_image.safetensors", 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(PARAMS, out=tmp_path / "base", scratch=tmp_path / "scratch")
    assert not (tmp_path / "base").exists()
    pretrain.run(PARAMS, out=tmp_path / "base", scratch=tmp_path / "scratch")
    assert saved.count(("autoencoder.safetensors", 3)) == 1
    name = "unet/diffusion_pytorch_model.safetensors"
    again, once = load_file(tmp_path / "base" / name), load_file(trained / "base" / name)
    assert again.keys() == once.keys()
    apart = torch.cat([(again[key].float() - once[key].float()).abs().flatten() for key in once])
    # Adam's first steps have the size of the learning rate, 1e-3, whatever the gradient: a lost moment shows.
    assert apart.mean() < 2e-5


def test_a_gpu_that_is_not_there_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training.open_device("auto") == torch.device("cpu")
    with pytest.raises(RuntimeError, match="wanted cuda, but torch sees no GPU; set it to cpu or auto"):
        training.open_device("cuda")


@pytest.mark.gpu
def test_base_and_backbones_train_on_a_gpu(tmp_path: Path) -> None:
    params = replace(PARAMS, device="cuda")
    pretrain.run(params, out=tmp_path / "base", scratch=tmp_path / "scratch")
    pretrain_backbones.run(
        BACKBONES, params, base=tmp_path / "base", out=tmp_path / "backbones", scratch=tmp_path / "scratch"
    )
    assert all((tmp_path / "backbones" / name / "model.safetensors").exists() for name in ("clip", "ssl"))


def test_autoencoder_learns(tmp_path: Path) -> None:
    params = replace(PARAMS, autoencoder_steps=25, warmup_steps=5, ema_decay=0.8, checkpoint_seconds=1e9)
    corpus = pretrain.render_corpus(params, tmp_path / "corpus.npy")

    def error(model: AutoencoderKL) -> float:
        pixels = pretrain._pixels(corpus[:8], np.zeros(8, dtype=bool))
        with torch.inference_mode():
            decoded = model.decode(model.encode(pixels).latent_dist.mean).sample
        return float((decoded - pixels).square().mean())

    torch.manual_seed(params.seed)
    untrained = error(mini_base.new_autoencoder(params).eval())
    assert error(pretrain.train_autoencoder(params, corpus, tmp_path)) < 0.7 * untrained


def test_other_settings_begin_anew_where_other_machines_go_on(trained: Path, tmp_path: Path) -> None:
    here = PARAMS.scratch(tmp_path)
    assert here.parent == tmp_path
    assert replace(PARAMS, device="cpu", workers=9, checkpoint_seconds=1.5).scratch(tmp_path) == here
    assert replace(PARAMS, pictures=PARAMS.pictures + 1).scratch(tmp_path) != here
    for width in (32, 64):
        pretrain_backbones.run(
            replace(BACKBONES, clip_width=width), PARAMS, base=trained / "base", out=tmp_path / "backbones",
            scratch=trained / "scratch",
        )  # fmt: skip
        assert read_json(tmp_path / "backbones" / "clip" / "config.json")["model_cfg"]["embed_dim"] == width


def test_backbones_are_written_and_loaded(trained: Path, tmp_path: Path) -> None:
    pretrain_backbones.run(
        BACKBONES, PARAMS, base=trained / "base", out=tmp_path / "backbones", scratch=trained / "scratch"
    )
    for name in ("clip", "ssl", "supervised"):
        settings = BackboneSettings(
            "open_clip" if name == "clip" else "timm",
            f"backbones/{name}",
            f"backbones/{name}/model.safetensors",
            64,
            "float32",
            8,
        )
        backbone = load_backbone(name, settings, root=tmp_path)
        assert backbone.space.dim == (32 if name == "clip" else 128)
    heads = load_file(tmp_path / "backbones" / "supervised" / "heads.safetensors")
    assert heads["noun.weight"].shape == (24, 128)
