"""The delta files: ours read by diffusers, diffusers' read by us, same image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from attribution.base_model import BaseSettings, decode_latents, load_base
from attribution.customized_model import TOKEN_FILE, WEIGHTS_FILE, CustomizedModel, ModelStack
from attribution.sampling import Drawing, Sampler, base_stack, draw_latents
from tests.tiny import save_tiny_pipeline

SAMPLERS = [
    Sampler("ddim", steps=4, guidance=3.0, eta=0.7),
    Sampler("ddim", steps=3, guidance=1.0, eta=0.0),
    Sampler("dpmsolver++", steps=4, guidance=5.0, eta=0.0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def stack(folder: Path) -> ModelStack:
    start = base_stack(load_base(BaseSettings(str(folder), None, "cpu", "float32")), ["art", "car"])
    generator = torch.Generator().manual_seed(2)
    weights = {
        name: weight + 0.2 * torch.randn(weight.shape, generator=generator)
        for name, weight in start.weights.items()
    }
    return ModelStack(weights, start.vectors + torch.randn(start.vectors.shape, generator=generator))


def diffusers_alone(folder: Path, sampler: Sampler) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, safety_checker=None, low_cpu_mem_usage=False, local_files_only=True
    )
    pipe.scheduler = sampler.build(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# diffusers' DPM-Solver passes a tensor to np.array, at which NumPy 2 grumbles.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: f"{sampler.scheduler}-{sampler.guidance}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_diffusers_alone_draws_the_same_image(
    folder: Path, tmp_path: Path, stack: ModelStack, sampler: Sampler, dtype: torch.dtype
) -> None:
    deltas = [tmp_path / str(i) for i in range(len(stack))]
    for i, delta in enumerate(deltas):
        stack[i].write(delta, dtype=dtype)
    drawings = [Drawing(i, f"a <new1> {noun}", seed=9 + i) for i in (0, 1) for noun in ("car", "tree")]
    ours = load_base(BaseSettings(str(folder), None, "cpu", "float32"))
    read = ModelStack.of([CustomizedModel.read(delta) for delta in deltas])
    images = decode_latents(ours, draw_latents(ours, read, drawings, sampler, batch_size=3))
    for drawing, image in zip(drawings, images, strict=True):
        pipe = diffusers_alone(folder, sampler)
        delta = deltas[drawing.model]
        pipe.unet.load_attn_procs(delta, weight_name=WEIGHTS_FILE, _pipeline=pipe)
        pipe.load_textual_inversion(delta, weight_name=TOKEN_FILE)
        theirs = pipe(
            drawing.prompt,
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance,
            eta=sampler.eta,
            generator=torch.Generator().manual_seed(drawing.seed),
            output_type="np",
        ).images[0]
        # Half a step is the rounding to bytes.
        assert np.abs(theirs * 255 - image).max() < 0.6


def test_a_delta_survives_the_round_trip(tmp_path: Path, stack: ModelStack) -> None:
    stack[1].write(tmp_path)
    read = CustomizedModel.read(tmp_path)
    assert read.token == "<new1>"
    assert torch.equal(read.vector, stack.vectors[1])
    assert read.weights.keys() == stack.weights.keys()
    assert all(torch.equal(read.weights[name], stack.weights[name][1]) for name in stack.weights)


def test_equal_deltas_are_equal_bytes(tmp_path: Path, stack: ModelStack) -> None:
    for name in ("a", "b"):
        stack[0].write(tmp_path / name)
    for file in (WEIGHTS_FILE, TOKEN_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_file_saved_by_diffusers_is_read(tmp_path: Path, folder: Path, stack: ModelStack) -> None:
    stack[0].write(tmp_path / "ours")
    pipe = diffusers_alone(folder, SAMPLERS[0])
    pipe.unet.load_attn_procs(tmp_path / "ours", weight_name=WEIGHTS_FILE, _pipeline=pipe)
    pipe.unet.save_attn_procs(tmp_path / "theirs")
    save_file({"<new1>": stack.vectors[0].clone()}, tmp_path / "theirs" / TOKEN_FILE)
    assert not any("attn1" in key for key in load_file(tmp_path / "theirs" / WEIGHTS_FILE))
    read = CustomizedModel.read(tmp_path / "theirs")
    assert all(torch.equal(read.weights[name], stack.weights[name][0]) for name in stack.weights)


def test_bad_files_are_named(tmp_path: Path, stack: ModelStack) -> None:
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS_FILE}: no such file"):
        CustomizedModel.read(tmp_path)
    save_file({"unet.lora.weight": torch.ones(2)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"wanted keys like <layer>.attn2.processor.*, got unet.lora.weight"):
        CustomizedModel.read(tmp_path)
    stack[0].write(tmp_path)
    (tmp_path / TOKEN_FILE).write_bytes(b"{}")
    with pytest.raises(ValueError, match=f"{TOKEN_FILE}: not a safetensors file"):
        CustomizedModel.read(tmp_path)
    save_file({"<a>": torch.ones(2), "<b>": torch.ones(2)}, tmp_path / TOKEN_FILE)
    with pytest.raises(ValueError, match="wanted one token, got <a>, <b>"):
        CustomizedModel.read(tmp_path)


def test_models_of_different_bases_do_not_stack(stack: ModelStack) -> None:
    other = CustomizedModel({"down.attn2.to_k": torch.ones(2, 2)}, stack.vectors[0])
    with pytest.raises(ValueError, match="different bases or tokens cannot be stacked"):
        ModelStack.of([stack[0], other])
