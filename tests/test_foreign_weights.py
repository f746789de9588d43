"""Weights in the files they are published in, small and random: right ones arrive, wrong ones are told."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from attribution.backbones import Backbone, BackboneSettings, load_backbone
from attribution.files import sha256_file
from attribution.preprocessing import Preprocessing
from attribution.weights import read_weights

RNG = np.random.default_rng(5)
IMAGES = [Image.fromarray(RNG.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((40, 30), (16, 16))]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
}


def plain(resize: int, crop: int, interpolation: Any = "bilinear") -> Preprocessing:
    return Preprocessing("shortest", resize, crop, interpolation, MEAN, STD)


def normalized(backbone: Backbone) -> torch.Tensor:
    one = backbone.preprocessing
    mean, std = (torch.tensor(values)[:, None, None] for values in (one.mean, one.std))
    return (torch.from_numpy(one.pixels(IMAGES)).permute(0, 3, 1, 2).float() / 255 - mean) / std


def assert_is(backbone: Backbone, encode: Any) -> None:
    """The backbone's vectors are those of the net that was saved."""
    with torch.inference_mode():
        wanted = encode(normalized(backbone)).numpy()
    np.testing.assert_allclose(backbone.encode(IMAGES), wanted, atol=1e-5)


@pytest.fixture(scope="module")
def vit() -> Any:
    import timm

    return timm.create_model("test_vit", num_classes=0).eval()


@pytest.fixture
def clip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A CLIP of few weights under a name, with a tag, as open_clip knows the large ones."""
    import open_clip
    from open_clip.model import CLIP

    monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    for name, config in (
        ("tiny", {**CLIP_CONFIG, "quick_gelu": False}),
        ("tiny-quickgelu", CLIP_CONFIG),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / f"{name}.json")
        tag = {"hf_hub": "some/clip/", "quick_gelu": True, "mean": MEAN, "std": STD}
        tag |= {"interpolation": "bilinear", "resize_mode": "squash"}
        lost = {"url": "https://example.org/clip.pt"}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"published": tag, "lost": lost})
    return CLIP(**CLIP_CONFIG).eval()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub's cache, as a machine without a network may have been given it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def snapshot(hub: Path, repository: str) -> Path:
    folder = hub / f"models--{repository.replace('/', '--')}" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


MOCO = BackboneSettings(
    "timm", "test_vit", "moco.pth.tar", 160, "float32", 4,
    preprocessing=plain(176, 160), rename={"module.base_encoder.": ""},
)  # fmt: skip


def save_moco(vit: Any, file: Path) -> None:
    """As MoCo v3 saves: two encoders with projectors in place of heads, a predictor, the optimizer."""
    base = {f"module.base_encoder.{name}": tensor for name, tensor in vit.state_dict().items()}
    momentum = {f"module.momentum_encoder.{name}": -tensor for name, tensor in vit.state_dict().items()}
    projector = {
        "module.base_encoder.head.0.weight": torch.ones(4, 64),
        "module.predictor.0.bias": torch.ones(4),
    }
    optimizer = {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    held = {"epoch": 300, "arch": "vit_base", "state_dict": {**momentum, **base, **projector}}
    torch.save({**held, "optimizer": optimizer, "scaler": {"scale": 65536.0}}, file)


def test_moco_s_checkpoint_gives_its_base_encoder(vit: Any, tmp_path: Path) -> None:
    save_moco(vit, tmp_path / "moco.pth.tar")
    settings = dataclasses.replace(MOCO, sha256=sha256_file(tmp_path / "moco.pth.tar"))
    backbone = load_backbone("moco", settings, root=tmp_path)
    assert_is(backbone, vit)
    assert backbone.space.preprocessing.startswith("shortest 176 bilinear, crop 160, mean 0.485")


def test_weights_that_leave_anything_at_random_are_refused(vit: Any, tmp_path: Path) -> None:
    """timm itself loads nothing here and says nothing."""
    save_moco(vit, tmp_path / "moco.pth.tar")
    with pytest.raises(
        ValueError, match=r"moco\.pth\.tar: not the weights of this .*: Missing keys \(cls_token"
    ):
        load_backbone("moco", dataclasses.replace(MOCO, rename=None), root=tmp_path)
    with pytest.raises(ValueError, match=r"no name begins with 'encoder\.'; there are: module\.mom"):
        load_backbone("moco", dataclasses.replace(MOCO, rename={"encoder.": ""}), root=tmp_path)


def test_csd_s_checkpoint_gives_its_style_head(clip: Any, tmp_path: Path) -> None:
    tower = clip.visual.state_dict()
    style = torch.randn(16, 12)
    held = {f"module.backbone.{name}": tensor for name, tensor in tower.items() if name != "proj"}
    held |= {"module.last_layer_style": style, "module.last_layer_content": -style}
    saved = {"model_state_dict": held, "iter": 80000, "args": argparse.Namespace(arch="vit_large")}
    torch.save({**saved, "fp16_scaler": None}, tmp_path / "csd.pth")
    rename = {"module.backbone.": "", "module.last_layer_style": "proj"}
    settings = BackboneSettings("open_clip", "tiny-quickgelu", "csd.pth", 16, "float32", 4, rename=rename)
    backbone = load_backbone("csd", settings, root=tmp_path)
    with torch.no_grad():
        clip.visual.proj.copy_(style)
    assert_is(backbone, clip.encode_image)
    without = dataclasses.replace(settings, rename={"module.backbone.": ""})
    with pytest.raises(ValueError, match=r"csd\.pth: not the weights of this model: .*Missing key.*proj"):
        load_backbone("csd", without, root=tmp_path)


class Copies(torch.nn.Module):
    """Stands for SSCD: pictures in, unit vectors of 512 out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = torch.nn.Conv2d(3, 8, 16, 16), torch.nn.Linear(8, 512)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self.linear(self.conv(pixels).mean([2, 3])))


SSCD = BackboneSettings("torchscript", None, "sscd.pt", 288, "float32", 4, preprocessing=plain(288, 288))


@pytest.fixture
def sscd(tmp_path: Path) -> Any:
    net = Copies().eval()
    with pytest.warns(FutureWarning, match="torch.jit"):
        torch.jit.trace(net, torch.zeros(1, 3, 288, 288)).save(tmp_path / "sscd.pt")
    return net


def test_a_torchscript_archive_is_run_when_its_sha256_is_the_one_written_down(
    sscd: Any, tmp_path: Path
) -> None:
    digest = sha256_file(tmp_path / "sscd.pt")
    backbone = load_backbone("sscd", dataclasses.replace(SSCD, sha256=digest), root=tmp_path)
    assert_is(backbone, sscd)
    assert (backbone.space.dim, backbone.space.revision) == (512, digest[:16])


def test_a_torchscript_archive_of_other_bytes_is_never_loaded(
    sscd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.jit.load", None)
    digest = sha256_file(tmp_path / "sscd.pt")
    with pytest.raises(ValueError, match=f"is a program; this one's sha256 is {digest}: write it down"):
        load_backbone("sscd", SSCD, root=tmp_path)
    with pytest.raises(ValueError, match=rf"sscd\.pt: sha256 {digest}, wanted 0{{64}} \(weights of"):
        load_backbone("sscd", dataclasses.replace(SSCD, sha256="0" * 64), root=tmp_path)


def test_what_is_no_torchscript_archive_is_told(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "sscd.pt")
    settings = dataclasses.replace(SSCD, sha256=sha256_file(tmp_path / "sscd.pt"))
    with pytest.raises(ValueError, match=r"sscd\.pt: not a TorchScript archive"):
        load_backbone("sscd", settings, root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gone\.pt: no such file \(weights of backbone sscd\)"):
        load_backbone("sscd", dataclasses.replace(settings, weights="gone.pt"), root=tmp_path)


def test_a_timm_model_of_the_hub_is_taken_at_its_commit(vit: Any, tmp_path: Path, hub: Path) -> None:
    save_file(vit.state_dict(), snapshot(hub, "timm/test_vit.r160_in1k") / "model.safetensors")
    pinned = BackboneSettings("timm", "test_vit.r160_in1k", "pretrained", 160, "float32", 4, revision=COMMIT)
    backbone = load_backbone("vit", pinned, root=tmp_path)
    assert_is(backbone, vit)
    named = dataclasses.replace(
        pinned, model="test_vit", weights="hf-hub:timm/test_vit.r160_in1k/model.safetensors"
    )
    assert load_backbone("vit", named, root=tmp_path).space == backbone.space
    checked = dataclasses.replace(pinned, sha256="0" * 64)
    with pytest.raises(ValueError, match=r"model\.safetensors: sha256 \w{64}, wanted 0{64}"):
        load_backbone("vit", checked, root=tmp_path)
    elsewhere = dataclasses.replace(pinned, revision=COMMIT[::-1])
    with pytest.raises(FileNotFoundError, match=r"hf-hub:timm/test_vit\.r160_in1k: no model\.safetensors at"):
        load_backbone("vit", elsewhere, root=tmp_path)
    loose = dataclasses.replace(pinned, revision=None)
    with pytest.raises(ValueError, match=r"wanted a revision, the commit to take; look it up: git ls-"):
        load_backbone("vit", loose, root=tmp_path)


def test_a_model_and_config_of_the_hub_are_taken_at_their_commit(vit: Any, tmp_path: Path, hub: Path) -> None:
    folder = snapshot(hub, "some/vit")
    pretrained = {"input_size": [3, 160, 160], "crop_mode": "center", "crop_pct": 1.0, "num_classes": 0}
    pretrained |= {"interpolation": "bilinear", "mean": list(MEAN), "std": list(STD), "classifier": "head"}
    pretrained |= {"first_conv": "patch_embed.proj", "fixed_input_size": True}
    (folder / "config.json").write_text(
        json.dumps({"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": pretrained})
    )
    save_file(vit.state_dict(), folder / "model.safetensors")
    settings = BackboneSettings("timm", "hf-hub:some/vit", "pretrained", 160, "float32", 4, revision=COMMIT)
    backbone = load_backbone("vit", settings, root=tmp_path)
    assert_is(backbone, vit)
    assert backbone.preprocessing == plain(160, 160)


def test_an_open_clip_tag_brings_its_weights_and_preprocessing(clip: Any, tmp_path: Path, hub: Path) -> None:
    save_file(clip.state_dict(), snapshot(hub, "some/clip") / "open_clip_model.safetensors")
    settings = BackboneSettings("open_clip", "tiny-quickgelu", "published", 16, "float32", 4, revision=COMMIT)
    backbone = load_backbone("clip", settings, root=tmp_path)
    assert_is(backbone, clip.encode_image)
    assert backbone.preprocessing == Preprocessing("squash", 16, 16, "bilinear", MEAN, STD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "tiny"},
            "weights published were trained with another .*wanted model tiny-quickgelu",
        ),
        (
            {"weights": "gone"},
            "weights gone: no file and no tag of tiny-quickgelu; tags: published, lost",
        ),
        (
            {"weights": "lost"},
            "weights lost: not on the hub; fetch https://example.org/clip.pt and name",
        ),
        ({"weights": "hf-hub:clip"}, "weights hf-hub:clip: wanted hf-hub:organization/name/file"),
        ({"model": "http:clip", "weights": None}, r"model http:clip: wanted hf-hub:\.\.\., local-dir:"),
    ],
)
def test_open_clip_names_that_cannot_be_right_are_told(
    clip: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    settings = BackboneSettings("open_clip", "tiny-quickgelu", "published", 16, "float32", 4, revision=COMMIT)
    with pytest.raises(ValueError, match=message):
        load_backbone("clip", dataclasses.replace(settings, **changes), root=tmp_path)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_is_near_and_another_space(vit: Any, tmp_path: Path, precision: Any) -> None:
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    whole = BackboneSettings("timm", "test_vit", "vit.safetensors", 160, "float32", 4)
    one = load_backbone("vit", whole, root=tmp_path)
    half = load_backbone("vit", dataclasses.replace(whole, precision=precision), root=tmp_path)
    assert half.space == dataclasses.replace(one.space, revision=f"{one.space.revision}, {precision}")
    wanted = one.encode(IMAGES)
    difference = np.abs(half.encode(IMAGES) - wanted).max() / np.abs(wanted).max()
    assert 0 < difference < 0.05
    said = dataclasses.replace(whole, precision="float32")
    assert load_backbone("vit", said, root=tmp_path).space == one.space


def test_another_size_resamples_the_positions(vit: Any, tmp_path: Path) -> None:
    import timm

    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    settings = BackboneSettings(
        "timm", "test_vit", "vit.safetensors", 96, "float32", 4, preprocessing=plain(96, 96)
    )
    backbone = load_backbone("vit", settings, root=tmp_path)
    smaller = timm.create_model("test_vit", num_classes=0, img_size=96)
    smaller.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(vit.state_dict(), smaller))
    assert_is(backbone, smaller.eval())


def test_names_of_a_wrapped_model_lose_the_wrapper(tmp_path: Path) -> None:
    held = {"module.a": torch.zeros(1), "module.b": torch.ones(2)}
    torch.save({"model": held}, tmp_path / "w.pth")
    assert {name: len(tensor) for name, tensor in read_weights(tmp_path / "w.pth").items()} == {
        "a": 1,
        "b": 2,
    }


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([torch.zeros(1)], "wanted tensors by name, got list"),
        ({"epoch": 3}, "no tensors in it"),
        ({"x": Path("here")}, "refused by the weights_only loader.*; wanted tensors alone"),
    ],
)
def test_a_checkpoint_without_weights_is_told(tmp_path: Path, held: Any, message: str) -> None:
    torch.save(held, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"w\.pth: {message}"):
        read_weights(tmp_path / "w.pth")
    (tmp_path / "w.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"w\.safetensors: not a safetensors file"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_is_cut_is_told(tmp_path: Path, zipped: bool) -> None:
    torch.save({"a": torch.zeros(4, 4)}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "w.pth").read_bytes()
    said = set()
    for size in range(0, len(whole), 7):
        (tmp_path / "w.pth").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"w\.pth: (not a file of torch\.save|refused by the)") as error:
            read_weights(tmp_path / "w.pth")
        said.add(str(error.value))
    assert any("w.pth: not a file of torch.save: " in one for one in said)
    assert not any("\n" in one for one in said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision": "main"}, "revision main: wanted a commit, 40 hex digits; names can move"),
        ({"sha256": "abc"}, "sha256 abc: wanted 64 hex digits"),
        ({"preprocessing": plain(32, 24)}, r"image_size 16, but preprocessing\.crop 24"),
        ({"library": "torchscript", "model": None}, "torchscript needs preprocessing, got null"),
        ({"library": "torchscript"}, "torchscript takes no model, got net"),
        (
            {"library": "pixels", "model": None, "weights": None, "precision": "float16"},
            "pixels takes no precision, got float16",
        ),
    ],
)
def test_rows_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    settings = BackboneSettings("timm", "net", "net.pth", 16, "float32", 4)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(settings, **changes)


@pytest.mark.parametrize(("resize", "crop", "std"), [(16, 17, 1.0), (16, 0, 1.0), (16, 16, 0.0)])
def test_preprocessing_that_cannot_be_is_refused(resize: int, crop: int, std: float) -> None:
    with pytest.raises(ValueError, match="wanted"):
        Preprocessing("shortest", resize, crop, "bicubic", MEAN, (1.0, 1.0, std))
