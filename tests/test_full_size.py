"""benchmarks.full_size and full_memory: true shapes, the peer is the peer, and memory that adds up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import full_size
from benchmarks.example_loop import Example, add_processors, train_example
from benchmarks.full_memory import Kept, step_memory
from benchmarks.full_shapes import Family, build


@pytest.mark.parametrize(
    ("family", "published"),
    [
        ("sd15", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        ("sdxl", {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}),
    ],
)
def test_shapes_are_as_published(family: Family, published: dict[str, int]) -> None:
    pipe = build(family, "meta", torch.float16)
    for name, count in published.items():
        assert sum(parameter.numel() for parameter in getattr(pipe, name).parameters()) == count


def test_what_is_trained_and_what_is_not_are_counted() -> None:
    pipe = build("sd15", "meta", torch.float16)
    trained = sum(
        layer.to_k.weight.numel() + layer.to_v.weight.numel()
        for name, layer in pipe.unet.named_modules()
        if name.endswith(".attn2")
    )
    assert 19.1e6 < trained < 19.3e6
    one, four = (step_memory(pipe, count, 512, again=False) for count in (1, 4))
    assert one.trained == 16 * (trained + 768)  # weights, gradients and two moments, of four bytes
    assert one.base == 2 * 1_066_235_307 + sum(buffer.nbytes for buffer in pipe.text_encoder.buffers())
    assert 4 * one.trained == four.trained
    again = step_memory(pipe, 4, 512, again=True)
    lines = (Path(__file__).parents[1] / "README.md").read_text().splitlines()
    kept_row = next(number for number, line in enumerate(lines) if line.startswith("| Stable Diffusion 1 |"))
    for row, column, memory in ((kept_row, 2, one), (kept_row, 4, four), (kept_row + 1, 4, again)):
        assert float(lines[row].split("|")[column]) == round(memory.total / 1e9, 1)


def test_what_is_kept_grows_with_concepts_and_pixels_and_less_if_made_again() -> None:
    pipe = build("sd15", "meta", torch.float16, small=True)

    def activations(concepts: int, pixels: int, again: bool = False) -> int:
        return step_memory(pipe, concepts, pixels, again=again).activations

    assert activations(2, 128) == pytest.approx(2 * activations(1, 128), rel=0.02)
    assert activations(1, 256) > 3 * activations(1, 128)
    assert activations(2, 128, again=True) < 0.5 * activations(2, 128)
    single = build("sd15", "meta", torch.float32, small=True)
    assert step_memory(single, 1, 128, again=False).activations > 1.7 * activations(1, 128)


def test_what_is_counted_is_what_autograd_keeps() -> None:
    frozen = nn.Linear(8, 8, bias=False).requires_grad_(False)
    kept = Kept({frozen.weight.untyped_storage()._cdata})
    x = torch.zeros(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        (frozen(x.sin()) * x).sum()
    # x for the sine and for the product, once; the linear layer's result for the product; no weight.
    assert kept.bytes == 2 * 4 * 8 * 4


def test_the_peer_starts_as_the_base_and_leaves_it_as_it_was() -> None:
    pipe = build("sd15", "cpu", torch.float32, small=True)
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    processors = dict(pipe.unet.attn_processors)
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    wanted = pipe.unet(latents, 5, encoder_hidden_states=text).sample
    trained = add_processors(pipe.unet)
    got = pipe.unet(latents, 5, encoder_hidden_states=text).sample
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    pipe.unet.set_attn_processor(dict(processors))
    assert sum(one.numel() for one in trained) > 0

    ids = torch.zeros(2, 77, dtype=torch.int64)
    ids[0, 1] = 49407
    table = pipe.text_encoder.get_input_embeddings().weight
    rows, steps = table.clone(), []
    train_example(
        pipe, Example(torch.zeros(2, 3, 64, 64), ids, 49407), steps=2, on_step=lambda: steps.append(1)
    )
    assert len(steps) == 2
    moved = (table - rows).abs()
    assert moved[49407].max() > 1e-5
    assert moved[:49407].max() < 1e-6  # their gradients are wiped; they decay, as there
    assert pipe.unet.attn_processors == processors
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_benchmark_runs(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    command = f"full_size --small --device cpu --dtype float32 --family {family} --concepts 1 2 --steps 1"
    more = [] if family == "sd15" else ["--only", "again", "--no-drawing"]
    monkeypatch.setattr(sys, "argv", [*command.split(), *more, "--out", str(out)])
    full_size.main()
    report = json.loads(out.read_text())
    rows = report["rows"]
    ways = [(row["way"], row["concepts"], row["gradients_made_again"]) for row in rows]
    again = [("one batch", 1, True), ("one batch", 2, True)]
    plain = [("example script's loop", 1, False), ("one batch", 1, False), ("one batch", 2, False)]
    assert ways == (plain + again if family == "sd15" else again)
    assert all(len(row["all_step_seconds"]) == 1 and row["peak_bytes"] > 0 for row in rows)
    assert all(("computed_bytes" in row) == (row["way"] == "one batch") for row in rows)
    for row in rows:
        assert row["concepts_per_hour"] == pytest.approx(3600 / row["concept_seconds"])
    assert ("draw_seconds" in report) == (family == "sd15")
