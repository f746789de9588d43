"""The base as it is loaded: frozen, of the families we can customize, with as little memory as is asked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor
from safetensors.torch import load_file

from attribution.base_model import (
    BaseSettings,
    MemorySettings,
    decode_latents,
    encode_images,
    find_device,
    load_base,
)
from tests.tiny import save_tiny_pipeline

NONE = MemorySettings(checkpoint_gradients=False, slice_attention=False, slice_vae=False, offload=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("xl"), xl=True)


def settings(model: Path, **changes: Any) -> BaseSettings:
    return replace(BaseSettings(str(model), None, "cpu", "float32"), **changes)


def test_half_weights_on_disk_are_single_in_memory_and_frozen(folder: Path) -> None:
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    pipe = load_base(settings(folder))
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
        assert not any(parameter.requires_grad for parameter in part.parameters())


def test_the_key_of_a_base_is_its_content(folder: Path, tmp_path: Path) -> None:
    same = save_tiny_pipeline(tmp_path / "same")
    other = save_tiny_pipeline(tmp_path / "other", seed=1)
    assert settings(same).key() == settings(folder).key() != settings(other).key()
    saving = settings(folder, memory=replace(NONE, slice_vae=True))
    assert saving.key() == settings(folder).key() != settings(folder, dtype="float16").key()


@pytest.mark.parametrize(
    ("xl", "dtype", "vae"),
    [
        (True, "float16", torch.float32),
        (True, "bfloat16", torch.bfloat16),
        (False, "float16", torch.float16),
    ],
)
def test_the_autoencoder_of_sdxl_does_not_overflow(
    folder: Path, xl_folder: Path, xl: bool, dtype: str, vae: torch.dtype
) -> None:
    pipe = load_base(settings(xl_folder if xl else folder, dtype=dtype))
    assert isinstance(pipe, StableDiffusionXLPipeline if xl else StableDiffusionPipeline)
    assert pipe.unet.dtype == getattr(torch, dtype)
    assert pipe.vae.dtype == vae


def test_auto_is_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"base\.device: no cuda:1 here; wanted auto or one of: cpu$"):
        find_device("cuda:1")
    with pytest.raises(ValueError, match=r"base\.device: wanted auto, cpu, cuda, .*, got gpu$"):
        find_device("gpu")
    found = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert find_device("auto") == find_device("cuda") == found
    assert find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"no cuda:2 here; wanted auto or one of: cpu, cuda:0, cuda:1"):
        find_device("cuda:2")


def test_self_attention_is_torchs_own_unless_it_is_sliced(folder: Path) -> None:
    pipe = load_base(settings(folder))
    assert {type(one) for one in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}
    sliced = load_base(settings(folder, memory=replace(NONE, slice_attention=True)))
    assert {type(one) for one in sliced.unet.attn_processors.values()} == {SlicedAttnProcessor}


def test_pictures_pass_the_autoencoder_one_at_a_time(folder: Path) -> None:
    plain, sliced = (load_base(settings(folder, memory=replace(NONE, slice_vae=on))) for on in (False, True))
    sizes: list[int] = []
    for part in (sliced.vae.encoder, sliced.vae.decoder):
        part.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    pictures = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    latents = encode_images(sliced, pictures)
    torch.testing.assert_close(latents, encode_images(plain, pictures), atol=1e-5, rtol=0)
    drawn = decode_latents(sliced, latents).astype(int)
    assert np.abs(drawn - decode_latents(plain, latents)).max() <= 1
    assert sizes == [1] * 6


def edit(folder: Path, part: str, **changes: Any) -> None:
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"time_cond_proj_dim": 8}, "configured with time_cond_proj_dim, which is not supported"),
        ("unet", {"dual_cross_attention": True}, "configured with dual_cross_attention"),
        ("vae", {"latents_mean": [0.0] * 4}, "configured with latents_mean"),
        ("text_encoder", {"use_attention_mask": True}, "configured with use_attention_mask"),
    ],
)
def test_a_base_that_is_told_more_than_words_is_refused(
    folder: Path, tmp_path: Path, part: str, changes: dict, message: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    edit(copy, part, **changes)
    with pytest.raises(ValueError, match=message):
        load_base(settings(copy))


def without_text() -> dict[str, Any]:
    return {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "mid_block_type": None,
    }


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        ({"in_channels": 9}, "takes 9 channels and gives 4, the latents have 4: for inpainting, editing or"),
        ({"in_channels": 8}, "takes 8 channels and gives 4, the latents have 4"),
        (without_text(), "no layer of the UNet reads the text; there is nothing to customize"),
    ],
    ids=["inpainting", "editing", "without text"],
)
def test_a_unet_that_cannot_be_customized_is_refused(tmp_path: Path, unet: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_base(settings(save_tiny_pipeline(tmp_path / "base", unet=unet)))


def with_scheduler(folder: Path, copy: Path, name: str, **changes: Any) -> Path:
    shutil.copytree(folder, copy)
    for path, values in (
        (copy / "scheduler" / "scheduler_config.json", {"_class_name": name, **changes}),
        (copy / "model_index.json", {"scheduler": ["diffusers", name]}),
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return copy


@pytest.mark.parametrize(
    ("scheduler", "prediction"), [("DDIMScheduler", "sample"), ("EDMEulerScheduler", "epsilon")]
)
def test_another_noise_schedule_is_refused(
    folder: Path, tmp_path: Path, scheduler: str, prediction: str
) -> None:
    copy = with_scheduler(folder, tmp_path / "copy", scheduler, prediction_type=prediction)
    wanted = "wanted a schedule of DDPM's kind, epsilon or v_prediction, got"
    with pytest.raises(ValueError, match=f"{wanted} {scheduler} with prediction_type {prediction}"):
        load_base(settings(copy))


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "EulerDiscreteScheduler"])
def test_the_schedulers_of_published_bases_will_do(folder: Path, tmp_path: Path, scheduler: str) -> None:
    found = load_base(settings(with_scheduler(folder, tmp_path / "copy", scheduler))).scheduler
    assert type(found).__name__ == scheduler
    torch.testing.assert_close(found.alphas_cumprod, load_base(settings(folder)).scheduler.alphas_cumprod)
