"""Customization in half precision and with gradients checkpointed: as without, up to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution import lessons
from attribution.base_model import BaseSettings, MemorySettings, Pipeline, decode_latents, load_base
from attribution.conditioning import word_vectors
from attribution.customization import METHODS
from attribution.lessons import LossScale, train
from attribution.sampling import Drawing, Sampler, base_stack, draw_latents
from attribution.seeds import seed_from
from tests.test_lessons import lesson
from tests.tiny import save_tiny_pipeline
from tests.tiny_models import training_settings

LESSONS = [lesson("one"), lesson("two", noun="tree", initializer="red")]
SAVING = MemorySettings(checkpoint_gradients=True, slice_attention=False, slice_vae=False, offload=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    return {xl: save_tiny_pipeline(tmp_path_factory.mktemp("base"), xl=xl) for xl in (False, True)}


def load(folder: Path, dtype: Any = "float32", memory: MemorySettings | None = None) -> Pipeline:
    return load_base(BaseSettings(str(folder), None, "cpu", dtype, memory))


def directions(pipe: Pipeline, method: str = "custom_diffusion") -> tuple[torch.Tensor, torch.Tensor]:
    """Where one step moves all weights of each model, and the losses."""
    settings = training_settings(method, steps=1, weight_decay=0.0)
    stack, losses = train(pipe, LESSONS, settings, method=method, seed=0)
    assert {tensor.dtype for tensor in (*stack.weights.values(), stack.vectors)} == {torch.float32}
    start = METHODS[method].start(
        pipe.unet, [seed_from(0, one.concept_id, "start") for one in LESSONS], settings
    )
    moved = [stack.vectors - word_vectors(pipe, [one.initializer for one in LESSONS])]
    moved += [stack.weights[name] - weight for name, weight in start.items()]
    return torch.cat([part.flatten(1) for part in moved], dim=1), torch.from_numpy(losses)


@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_base_trains_float32_weights(
    folders: dict[bool, Path], xl: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales: list[LossScale] = []

    def note(*arguments: Any) -> LossScale:
        scales.append(LossScale(*arguments))
        return scales[-1]

    monkeypatch.setattr(lessons, "LossScale", note)
    wanted, wanted_losses = directions(load(folders[xl]))
    moved, losses = directions(load(folders[xl], dtype))
    assert len(scales) == (dtype == "float16")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, wanted_losses, rtol=0.05, atol=0)
    assert (torch.cosine_similarity(moved, wanted) > 0.9).all()


def test_small_gradients_do_not_vanish_and_overflow_costs_one_model_one_step() -> None:
    weights = torch.zeros(3, 2, requires_grad=True)
    scale = LossScale(3, torch.device("cpu"))

    def loss(factors: list[float]) -> torch.Tensor:
        return (weights.half() * torch.tensor(factors).half()[:, None]).float().sum(dim=1) * 1e-6

    # Without a scale, half precision knows nothing between 0 and 6e-8.
    loss([0.02, 0.02, 1.0]).sum().backward()
    assert weights.grad is not None
    assert weights.grad[0].tolist() == [0, 0]
    weights.grad = None
    scale.backward(loss([0.02, 0.02, 1.0]), [weights])
    assert weights.grad is not None
    torch.testing.assert_close(weights.grad[:, 0], torch.tensor([2e-8, 2e-8, 1e-6]), rtol=0.05, atol=0)
    weights.grad = None
    scale.backward(loss([0.02, 0.02, 1.0]) * torch.tensor([1.0, 1e12, 1.0]), [weights])
    assert weights.grad is not None
    torch.testing.assert_close(weights.grad[:, 0], torch.tensor([2e-8, 0.0, 1e-6]), rtol=0.05, atol=0)
    assert scale.factors.tolist() == [4096, 2048, 4096]


@pytest.mark.parametrize(("method", "xl"), [("custom_diffusion", False), ("lora", False), ("lora", True)])
def test_gradients_made_again_are_the_same(folders: dict[bool, Path], method: str, xl: bool) -> None:
    plain, saving = load(folders[xl]), load(folders[xl], memory=SAVING)
    runs = {id(pipe): 0 for pipe in (plain, saving)}

    def count(pipe: Pipeline) -> None:
        def hook(*_: object) -> None:
            runs[id(pipe)] += 1

        pipe.unet.up_blocks[0].resnets[0].register_forward_pre_hook(hook)

    count(plain)
    count(saving)
    wanted, _ = directions(plain, method)
    moved, _ = directions(saving, method)
    torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=1e-6)
    # Not in training mode, and made twice all the same.
    assert not saving.unet.training
    assert runs == {id(plain): 1, id(saving): 2}


def test_dreambooth_refuses_to_make_gradients_again(folders: dict[bool, Path]) -> None:
    with pytest.raises(ValueError, match=r"dreambooth: wanted base\.memory\.checkpoint_gradients: false"):
        directions(load(folders[False], memory=SAVING), "dreambooth")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("xl", [False, True])
def test_a_gpu_trains_and_draws_as_the_cpu(folders: dict[bool, Path], xl: bool, dtype: Any) -> None:
    on_gpu = load_base(BaseSettings(str(folders[xl]), None, "auto", dtype, SAVING))
    assert on_gpu.unet.device.type == "cuda"
    wanted, wanted_losses = directions(load(folders[xl]))
    moved, losses = directions(on_gpu)
    torch.testing.assert_close(losses, wanted_losses, rtol=0.05, atol=0)
    assert (torch.cosine_similarity(moved.cpu(), wanted) > 0.9).all()
    sampler = Sampler("ddim", steps=3, guidance=3.0, eta=0.0)
    drawn = [
        decode_latents(
            pipe,
            draw_latents(
                pipe, base_stack(pipe, ["art"]), [Drawing(0, "a <new1> car", 1)], sampler, batch_size=1
            ),
        )
        for pipe in (on_gpu, load(folders[xl]))
    ]
    assert np.abs(drawn[0].astype(float) - drawn[1]).mean() < 3
