"""A base whose idle parts wait in the CPU's memory: the same results, and no part on the device in vain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from torch import nn

from attribution.base_model import (
    BaseSettings,
    MemorySettings,
    Pipeline,
    decode_latents,
    encode_images,
    load_base,
)
from attribution.customization import METHODS
from attribution.lessons import train
from attribution.sampling import Drawing, Sampler, draw_latents
from tests.test_lessons import lesson
from tests.tiny import save_tiny_pipeline
from tests.tiny_models import noisy_stack, training_settings

SAMPLER = Sampler("ddim", steps=2, guidance=3.0, eta=0.0)
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=[False, True], ids=["1", "xl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("base"), xl=request.param)


def load(folder: Path, offload: bool, device: str = "cpu") -> Pipeline:
    memory = MemorySettings(
        checkpoint_gradients=False, slice_attention=False, slice_vae=True, offload=offload
    )
    return load_base(BaseSettings(str(folder), None, device, "float32", memory))


def everything(pipe: Pipeline, method: str = "custom_diffusion") -> list[torch.Tensor]:
    """What is learned, drawn, encoded and decoded."""
    lessons = [lesson("one"), lesson("two", noun="tree")]
    learned, losses = train(pipe, lessons, training_settings(method, steps=2), method=method, seed=0)
    drawings = [Drawing(i, "a <new1> car", i) for i in range(2)]
    latents = draw_latents(pipe, noisy_stack(pipe, 2, method), drawings, SAMPLER, batch_size=1)
    encoded = encode_images(pipe, PICTURES)
    images = torch.from_numpy(decode_latents(pipe, latents).astype(np.float32))
    return [*learned.weights.values(), learned.vectors, torch.from_numpy(losses), latents, encoded, images]


@pytest.mark.parametrize("method", METHODS)
def test_results_are_the_same(folder: Path, method: str) -> None:
    plain, offloading = (everything(load(folder, offload), method) for offload in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(plain, offloading, strict=True))


def test_each_part_is_on_the_device_while_it_works_and_no_longer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load(folder, offload=True)
    names = {id(part): name for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    there: set[str] = set()
    with_unet: list[set[str]] = []
    come, go = CpuOffload.pre_forward, CpuOffload.init_hook

    def coming(self: CpuOffload, module: nn.Module, *rest: Any, **options: Any) -> Any:
        there.add(names[id(module)])
        return come(self, module, *rest, **options)

    def going(self: CpuOffload, module: nn.Module) -> nn.Module:
        there.discard(names[id(module)])
        return go(self, module)

    monkeypatch.setattr(CpuOffload, "pre_forward", coming)
    monkeypatch.setattr(CpuOffload, "init_hook", going)
    pipe.unet.register_forward_pre_hook(lambda *_: with_unet.append(set(there)))
    encoders = {name for name in names.values() if name.startswith("text_encoder")}
    settings = training_settings("custom_diffusion", steps=2)
    train(pipe, [lesson("one")], settings, method="custom_diffusion", seed=0)
    # Each step's gradient goes through them to the token.
    assert with_unet == [encoders] * 2
    assert not there
    with_unet.clear()
    stack = noisy_stack(pipe, 1)
    latents = draw_latents(pipe, stack, [Drawing(0, "a <new1> car", 1)], SAMPLER, batch_size=1)
    assert with_unet == [set()] * SAMPLER.steps
    pipe.vae.decoder.register_forward_pre_hook(lambda *_: with_unet.append(set(there)))
    decode_latents(pipe, latents)
    encode_images(pipe, PICTURES)
    assert with_unet[SAMPLER.steps :] == [{"vae"}]
    assert not there


@pytest.mark.gpu
def test_a_gpu_holds_the_unet_alone_and_draws_the_same(folder: Path) -> None:
    plain = everything(load(folder, False, "auto"))
    pipe = load(folder, True, "auto")
    offloading = everything(pipe)
    for one, other in zip(plain, offloading, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    assert {name for name, part in parts.items() if part.device.type == "cuda"} == {"unet"}
