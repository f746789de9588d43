"""The files of customized models: ours read by diffusers, diffusers' read by us, same image."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from attribution import custom_diffusion, dreambooth, lora
from attribution.base_model import BaseSettings, decode_latents, load_base
from attribution.customization import METHODS, RECORD, model_files, read_model, write_model
from attribution.customized_model import TOKEN_FILE, CustomizedModel, ModelStack
from attribution.files import write_json
from attribution.sampling import Drawing, Sampler, draw_latents
from attribution.training_settings import LoraSettings
from tests.tiny import save_tiny_pipeline
from tests.tiny_models import drawn_by_diffusers, noisy_stack

SAMPLERS = [
    Sampler("ddim", steps=4, guidance=3.0, eta=0.7),
    Sampler("ddim", steps=3, guidance=1.0, eta=0.0),
    Sampler("dpmsolver++", steps=4, guidance=5.0, eta=0.0),
]
CASES = [
    *(("custom_diffusion", sampler, torch.float16) for sampler in SAMPLERS),
    *((method, SAMPLERS[0], torch.float32) for method in METHODS),
    *((method, SAMPLERS[0], torch.float16) for method in METHODS if method != "custom_diffusion"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> StableDiffusionPipeline:
    return load_base(BaseSettings(str(folder), None, "cpu", "float32"))


def write(folder: Path, model: CustomizedModel, pipe: StableDiffusionPipeline, **options) -> Path:
    """As the stage leaves it."""
    write_model(folder, model, pipe, **{"dtype": torch.float32, **options})
    write_json(folder / RECORD, {"method": model.method})
    return folder


def diffusers_alone(folder: Path, sampler: Sampler) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, safety_checker=None, low_cpu_mem_usage=False, local_files_only=True
    )
    pipe.scheduler = sampler.build(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_weights(pipe: StableDiffusionPipeline, method: str, folder: Path) -> None:
    """By diffusers' own means."""
    match method:
        case "custom_diffusion":
            pipe.unet.load_attn_procs(folder, weight_name=custom_diffusion.WEIGHTS, _pipeline=pipe)
        case "lora":
            pipe.load_lora_weights(folder)
        case "dreambooth":
            pipe.unet = UNet2DConditionModel.from_pretrained(
                folder / dreambooth.WEIGHTS, dtype=torch.float32, low_cpu_mem_usage=False
            )


# diffusers' DPM-Solver passes a tensor to np.array, at which NumPy 2 grumbles.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("method", "sampler", "dtype"), CASES, ids=lambda one: getattr(one, "scheduler", str(one))
)
def test_diffusers_alone_draws_the_same_image(
    folder: Path,
    pipe: StableDiffusionPipeline,
    tmp_path: Path,
    method: str,
    sampler: Sampler,
    dtype: torch.dtype,
) -> None:
    stack = noisy_stack(pipe, 2, method)
    deltas = [write(tmp_path / str(i), stack[i], pipe, dtype=dtype) for i in range(len(stack))]
    drawings = [Drawing(i, f"a <new1> {noun}", seed=9 + i) for i in (0, 1) for noun in ("car", "tree")]
    read = ModelStack.of([read_model(delta) for delta in deltas])
    images = decode_latents(pipe, draw_latents(pipe, read, drawings, sampler, batch_size=3))
    assert np.abs(images[0].astype(float) - images[2]).mean() > 5
    for drawing, image in zip(drawings, images, strict=True):
        theirs = diffusers_alone(folder, sampler)
        load_weights(theirs, method, deltas[drawing.model])
        theirs.load_textual_inversion(deltas[drawing.model], weight_name=TOKEN_FILE)
        picture = drawn_by_diffusers(theirs, drawing, sampler)
        # Half a step is the rounding to bytes.
        assert np.abs(picture * 255 - image).max() < 0.6


@pytest.mark.parametrize("method", METHODS)
def test_a_model_survives_the_round_trip(pipe: StableDiffusionPipeline, tmp_path: Path, method: str) -> None:
    stack = noisy_stack(pipe, 2, method)
    read = read_model(write(tmp_path, stack[1], pipe))
    assert (read.method, read.token) == (method, "<new1>")
    assert torch.equal(read.vector, stack.vectors[1])
    assert read.weights.keys() == stack.weights.keys()
    assert all(torch.equal(read.weights[name], stack.weights[name][1]) for name in stack.weights)


@pytest.mark.parametrize("method", METHODS)
def test_equal_models_are_equal_bytes(
    pipe: StableDiffusionPipeline, folder: Path, tmp_path: Path, method: str
) -> None:
    stack = noisy_stack(pipe, 1, method)
    a, b = (write(tmp_path / name, stack[0], pipe) for name in "ab")
    names = [path.relative_to(a) for path in a.rglob("*") if path.is_file()]
    assert len(names) == {"textual_inversion": 2, "dreambooth": 4}.get(method, 3)
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)
    assert not any(str(folder).encode() in (a / name).read_bytes() for name in names)


def test_a_file_saved_by_diffusers_is_read(
    pipe: StableDiffusionPipeline, folder: Path, tmp_path: Path
) -> None:
    stack = noisy_stack(pipe, 1)
    write(tmp_path / "ours", stack[0], pipe)
    theirs = diffusers_alone(folder, SAMPLERS[0])
    load_weights(theirs, "custom_diffusion", tmp_path / "ours")
    theirs.unet.save_attn_procs(tmp_path / "theirs")
    save_file({"<new1>": stack.vectors[0].clone()}, tmp_path / "theirs" / TOKEN_FILE)
    assert not any("attn1" in key for key in load_file(tmp_path / "theirs" / custom_diffusion.WEIGHTS))
    read = read_model(tmp_path / "theirs", "custom_diffusion")
    assert all(torch.equal(read.weights[name], stack.weights[name][0]) for name in stack.weights)


def test_a_lora_trained_by_peft_is_read(pipe: StableDiffusionPipeline, folder: Path, tmp_path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    theirs = diffusers_alone(folder, SAMPLERS[0])
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    theirs.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=targets))
    state = get_peft_model_state_dict(theirs.unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, convert_state_dict_to_diffusers(state))
    save_file({"<new1>": torch.ones(24)}, tmp_path / TOKEN_FILE)
    read = read_model(tmp_path, "lora")
    start = lora.start(pipe.unet, [0], LoraSettings(1, 1.0, 1.0, 0.0, 1, 0, 0.0, rank=2))
    assert read.weights.keys() == start.keys()
    assert all(torch.equal(read.weights[name], state[name]) for name in start)


def test_bad_files_are_named(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    stack = noisy_stack(pipe, 1)
    with pytest.raises(FileNotFoundError, match=rf"{RECORD}"):
        read_model(tmp_path)
    write_json(tmp_path / RECORD, {"token": "<new1>"})
    with pytest.raises(ValueError, match=rf"{RECORD}: no method named; wanted one of: custom_diffusion, "):
        read_model(tmp_path)
    write_json(tmp_path / RECORD, {"method": "hypernetwork"})
    with pytest.raises(ValueError, match="no method 'hypernetwork'; there are: custom_diffusion, "):
        model_files(tmp_path)
    write_json(tmp_path / RECORD, {"method": "custom_diffusion"})
    path = tmp_path / custom_diffusion.WEIGHTS
    with pytest.raises(FileNotFoundError, match=f"{path.name}: no such file; wanted a model of custom_diffu"):
        read_model(tmp_path)
    write(tmp_path, stack[0], pipe)
    save_file({"unet.lora.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"wanted keys like <layer>.attn2.processor.*, got unet.lora.weight"):
        read_model(tmp_path)
    write(tmp_path, stack[0], pipe)
    (tmp_path / TOKEN_FILE).write_bytes(b"{}")
    with pytest.raises(ValueError, match=f"{TOKEN_FILE}: not a safetensors file"):
        read_model(tmp_path)
    save_file({"<a>": torch.ones(2), "<b>": torch.ones(2)}, tmp_path / TOKEN_FILE)
    with pytest.raises(ValueError, match="wanted one token, got <a>, <b>"):
        read_model(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_another_method_are_refused_by_name(
    pipe: StableDiffusionPipeline, tmp_path: Path, method: str
) -> None:
    write(tmp_path, noisy_stack(pipe, 1, method)[0], pipe)
    other = "lora" if method != "lora" else "dreambooth"
    write(tmp_path, noisy_stack(pipe, 1, other)[0], pipe)
    write_json(tmp_path / RECORD, {"method": method})
    with pytest.raises(ValueError, match=f"{METHODS[other].WEIGHTS}: weights of {other} beside a model of"):
        read_model(tmp_path)


def test_a_lora_with_an_alpha_is_refused(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    write(tmp_path, noisy_stack(pipe, 1, "lora")[0], pipe)
    tensors = load_file(tmp_path / lora.WEIGHTS)
    save_file({**tensors, "unet.down_blocks.0.attn1.to_q.alpha": torch.tensor(4.0)}, tmp_path / lora.WEIGHTS)
    with pytest.raises(ValueError, match=r"wanted keys like unet.<layer>.lora_A.weight, got .*to_q.alpha"):
        read_model(tmp_path)


def test_models_that_do_not_belong_together_do_not_stack(pipe: StableDiffusionPipeline) -> None:
    mine = noisy_stack(pipe, 1)[0]
    message = "different methods, bases or tokens cannot be stacked"
    for other in (
        CustomizedModel("custom_diffusion", {"down.attn2.to_k": torch.ones(2, 2)}, mine.vector),
        CustomizedModel("custom_diffusion", mine.weights, mine.vector, "<other>"),
        noisy_stack(pipe, 1, "textual_inversion")[0],
    ):
        with pytest.raises(ValueError, match=message):
            ModelStack.of([mine, other])


@pytest.mark.parametrize("said", [{"r": 2, "lora_alpha": 4}, {"r": 2, "lora_alpha": 2, "use_rslora": True}])
def test_a_lora_with_an_alpha_beside_its_weights_is_refused(
    pipe: StableDiffusionPipeline, tmp_path: Path, said: dict[str, Any]
) -> None:
    """Where today's diffusers writes it."""
    write(tmp_path, noisy_stack(pipe, 1, "lora")[0], pipe)
    tensors = load_file(tmp_path / lora.WEIGHTS)
    for beside, refused in (({**said, "lora_alpha": 2, "use_rslora": False}, False), (said, True)):
        metadata = {
            "lora_adapter_metadata": json.dumps({f"unet.{name}": one for name, one in beside.items()})
        }
        save_file(tensors, tmp_path / lora.WEIGHTS, metadata)
        if refused:
            with pytest.raises(ValueError, match=r"wanted lora_alpha equal to r everywhere, got \d and 2"):
                read_model(tmp_path)
        else:
            read_model(tmp_path)


@pytest.mark.parametrize("method", ["lora", "dreambooth"])
@pytest.mark.parametrize("how", ["missing", "more"])
def test_weights_are_those_of_the_base_one_for_one(
    pipe: StableDiffusionPipeline, method: str, how: str
) -> None:
    """What is missing would be the base's, and what is more would be left out, silently."""
    stack = noisy_stack(pipe, 1, method)
    name = next(iter(stack.weights))
    others = {key: weight for key, weight in stack.weights.items() if key != name}
    weights = others if how == "missing" else {**stack.weights, f"conv_in.{name}": stack.weights[name]}
    named = re.escape(name if how == "missing" else f"conv_in.{name}")
    with (
        pytest.raises(ValueError, match=rf"{method}: wanted .*no other; but {named}"),
        METHODS[method].network(pipe.unet, weights),
    ):
        pass
