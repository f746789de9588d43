"""attribution.backbones: the pixels a net sees, the vectors that come out, and whose weights made them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attribution.backbones import Backbone, BackboneSettings, Preprocessing, load_backbone, write_backbone
from attribution.features import LENGTH_ONE
from attribution.images import ImageError
from attribution.params import load_params

RNG = np.random.default_rng(11)
PREPROCESS = {"size": 16, "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.5, 1], "interpolation": "bicubic"}
CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
}
VIT_CONFIG: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
SETTINGS = BackboneSettings("timm", "net", "net/model.safetensors", 16, "float32", 3)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGES = [picture(16, 16), picture(40, 23), picture(9, 30), picture(16, 17), picture(64, 64)]


def control(library: Any, size: int, batch_size: int = 4) -> Backbone:
    settings = BackboneSettings(library, None, None, size, "float32", batch_size)
    return load_backbone(library, settings, root=Path())


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A root with one shipped timm backbone, and the net as it was before it was written."""
    import timm

    root = tmp_path_factory.mktemp("vit")
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT_CONFIG).eval()
    config = {"library": "timm", "architecture": "vit_tiny_patch16_224", "kwargs": VIT_CONFIG}
    write_backbone(root / "net", {**config, "preprocess": PREPROCESS, "revision": "1"}, net)
    return root, net


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from open_clip.model import CLIP

    root = tmp_path_factory.mktemp("clip")
    net = CLIP(**CLIP_CONFIG).eval()
    config = {"library": "open_clip", "model_cfg": CLIP_CONFIG, "preprocess": PREPROCESS, "revision": "1"}
    write_backbone(root / "net", config, net)
    return root, net


def normalized(preprocessing: Preprocessing, images: list[Image.Image]) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    pixels = torch.from_numpy(preprocessing.pixels(images)).permute(0, 3, 1, 2).float()
    return pixels.div(255).sub(mean).div(std)


def assert_encodes(backbone: Backbone, net: Any, transform: Any) -> None:
    """The library's own transform and the net, one image at a time, give what the backbone gives."""
    wanted = torch.stack([transform(image) for image in IMAGES])
    assert torch.equal(normalized(backbone.preprocessing, IMAGES), wanted)
    with torch.inference_mode():
        vectors = torch.cat([net(inputs[None]) for inputs in wanted]).numpy()
    np.testing.assert_allclose(backbone.encode(IMAGES), vectors, atol=1e-5)


def test_pixels_are_box_means_between_minus_one_and_one() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2, :2] = [255, 0, 0]
    image[2:, 2:] = [[[0, 100, 255], [0, 200, 255]]] * 2
    backbone = control("pixels", 2)
    row = np.array([255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 150, 255]) / 127.5 - 1
    np.testing.assert_allclose(backbone.encode([Image.fromarray(image)]), [row], atol=1e-6)
    assert backbone.space.dim == 12


def test_a_histogram_counts_joint_colours_and_forgets_places() -> None:
    backbone = control("color_histogram", 4)
    half = np.zeros((4, 4, 3), np.uint8)
    half[:2] = [255, 32, 0]
    (vector,) = backbone.encode([Image.fromarray(half)])
    assert np.flatnonzero(vector).tolist() == [0, 7 * 64 + 8]
    np.testing.assert_allclose(vector[[0, 7 * 64 + 8]], np.sqrt([0.5, 0.5]))
    shuffled = RNG.permutation(half.reshape(-1, 3)).reshape(4, 4, 3)
    np.testing.assert_array_equal(backbone.encode([Image.fromarray(shuffled)])[0], vector)
    np.testing.assert_allclose(
        np.linalg.norm(control("color_histogram", 16).encode(IMAGES), axis=1), 1, rtol=1e-6
    )


@pytest.mark.parametrize("library", ["pixels", "color_histogram"])
def test_controls_are_the_same_in_any_batch(library: str) -> None:
    wanted = np.concatenate([control(library, 8).encode([image]) for image in IMAGES])
    for batch_size in (1, 2, 5, 9):
        np.testing.assert_array_equal(control(library, 8, batch_size).encode(IMAGES), wanted)
    assert control(library, 8).encode([]).shape == (0, wanted.shape[1])


def test_controls_need_no_torch() -> None:
    """They are two of six backbones of every run: seconds of import each."""
    import subprocess
    import sys

    code = (
        "import sys\nfrom pathlib import Path\n"
        "from attribution.backbones import BackboneSettings, load_backbone\n"
        "load_backbone('pixels', BackboneSettings('pixels', None, None, 4, 'float32', 1), root=Path())\n"
        "assert not {'torch', 'timm', 'open_clip', 'torchvision'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_shipped_timm_net_gives_its_vectors(vit: tuple[Path, Any]) -> None:
    root, net = vit
    backbone = load_backbone("ssl", SETTINGS, root=root)
    assert (backbone.space.backbone, backbone.space.dim, backbone.space.dtype) == ("ssl", 24, "float32")
    wanted = net(normalized(backbone.preprocessing, IMAGES)).detach().numpy()
    # Weights are shipped in float16.
    np.testing.assert_allclose(backbone.encode(IMAGES), wanted, atol=5e-3)


def test_a_shipped_open_clip_net_gives_its_image_embedding(clip: tuple[Path, Any]) -> None:
    root, net = clip
    settings = dataclasses.replace(SETTINGS, library="open_clip")
    backbone = load_backbone("clip", settings, root=root)
    wanted = net.encode_image(normalized(backbone.preprocessing, IMAGES)).detach().numpy()
    np.testing.assert_allclose(backbone.encode(IMAGES), wanted, atol=5e-3)
    assert np.ptp(np.linalg.norm(backbone.encode(IMAGES), axis=1)) > 1e-3  # un-normalized


def test_normalized_vectors_have_length_one_in_a_space_of_their_own(vit: tuple[Path, Any]) -> None:
    root, _ = vit
    plain = load_backbone("vit", SETTINGS, root=root)
    settings = dataclasses.replace(SETTINGS, normalized=True)
    normal = load_backbone("vit", settings, root=root)
    vectors = plain.encode(IMAGES)
    wanted = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(normal.encode(IMAGES), wanted, atol=1e-6)
    assert normal.space == dataclasses.replace(
        plain.space, preprocessing=plain.space.preprocessing + LENGTH_ONE
    )


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_a_net_s_vectors_do_not_depend_on_the_batch(vit: tuple[Path, Any], batch_size: int) -> None:
    root, _ = vit
    wanted = load_backbone("ssl", SETTINGS, root=root).encode(IMAGES)
    settings = dataclasses.replace(SETTINGS, batch_size=batch_size)
    np.testing.assert_allclose(load_backbone("ssl", settings, root=root).encode(IMAGES), wanted, atol=1e-5)


def test_untrained_is_seeded_and_leaves_the_generators_alone(vit: tuple[Path, Any]) -> None:
    root, _ = vit
    untrained = dataclasses.replace(SETTINGS, weights=None)
    before = torch.get_rng_state()
    one = load_backbone("untrained", untrained, root=root)
    torch.manual_seed(99)
    other = load_backbone("untrained", untrained, root=root)
    assert one.space == other.space
    np.testing.assert_array_equal(one.encode(IMAGES), other.encode(IMAGES))
    assert one.space.revision != load_backbone("untrained", SETTINGS, root=root).space.revision
    torch.set_rng_state(before)
    load_backbone("untrained", untrained, root=root)
    assert torch.equal(before, torch.get_rng_state())


def test_other_weights_are_another_space(vit: tuple[Path, Any], tmp_path: Path) -> None:
    root, net = vit
    with torch.no_grad():
        net.norm.bias[0] += 1
    config = json.loads((root / "net" / "config.json").read_text())
    write_backbone(tmp_path / "net", config, net)
    with torch.no_grad():
        net.norm.bias[0] -= 1
    one, other = (load_backbone("ssl", SETTINGS, root=path).space for path in (root, tmp_path))
    assert one.revision != other.revision
    assert dataclasses.replace(one, revision=other.revision) == other


def test_written_backbones_are_equal_bytes_and_compact(vit: tuple[Path, Any], tmp_path: Path) -> None:
    root, net = vit
    config = json.loads((root / "net" / "config.json").read_text())
    write_backbone(tmp_path / "net", config, net)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "net" / name).read_bytes() == (root / "net" / name).read_bytes()
    count = sum(parameter.numel() for parameter in net.parameters())
    assert (root / "net" / "model.safetensors").stat().st_size < 2 * count + 4000
    with torch.no_grad():
        net.norm.bias[0] += 1e6
    with pytest.raises(ValueError, match=r"weight norm\.bias: values that float16 cannot hold"):
        write_backbone(tmp_path / "net", config, net)
    with torch.no_grad():
        net.norm.bias[0] -= 1e6


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_an_open_clip_name_with_a_weights_file(
    clip: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    import open_clip
    from safetensors.torch import save_file

    _, net = clip
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    (tmp_path / "tiny-clip.json").write_text(json.dumps(CLIP_CONFIG))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    file = tmp_path / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(net.state_dict(), file)
    settings = BackboneSettings("open_clip", "tiny-clip", file.name, 16, "float16", 3)
    backbone = load_backbone("clip", settings, root=tmp_path)
    _, _, transform = open_clip.create_model_and_transforms("tiny-clip", load_weights=False)
    assert_encodes(backbone, net.encode_image, transform)
    assert (backbone.space.dim, backbone.space.dtype) == (12, "float16")
    assert backbone.space.preprocessing.startswith("shortest 16 bicubic, crop 16, mean 0.481455")


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_an_open_clip_folder_in_the_hub_s_layout(clip: tuple[Path, Any], tmp_path: Path, mode: str) -> None:
    """As SigLIP is published: its own mean, std and resizing."""
    import open_clip
    from safetensors.torch import save_file

    _, net = clip
    folder = tmp_path / "siglip"
    folder.mkdir()
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": mode}
    config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(net.state_dict(), folder / "open_clip_model.safetensors")
    settings = BackboneSettings("open_clip", "local-dir:siglip", "pretrained", 16, "float32", 3)
    if mode == "longest":
        with pytest.raises(ValueError, match="siglip: resizing by longest, wanted shortest or squash"):
            load_backbone("siglip", settings, root=tmp_path)
        return
    backbone = load_backbone("siglip", settings, root=tmp_path)
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert_encodes(backbone, net.encode_image, transform)
    assert backbone.space.preprocessing == f"{mode} 16 bilinear, crop 16, mean 0.5/0.5/0.5, std 0.5/0.5/0.5"


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_timm_name_with_a_weights_file_that_has_a_head(tmp_path: Path, suffix: str) -> None:
    import timm
    from safetensors.torch import save_file

    net = timm.create_model("test_vit", num_classes=1000).eval()
    file = tmp_path / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(net.state_dict(), file)
    settings = BackboneSettings("timm", "test_vit", file.name, 160, "float32", 2)
    backbone = load_backbone("vit", settings, root=tmp_path)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    net.reset_classifier(0)
    assert_encodes(backbone, net, transform)
    # crop_pct 0.95: floor(160 / 0.95) = 168 pixels, of which 160 are kept.
    assert backbone.space.preprocessing.startswith("shortest 168 bicubic, crop 160")


@pytest.mark.parametrize(
    ("crop_mode", "crop_pct"), [("center", 0.875), ("center", 1.0), ("squash", 0.9), ("border", 1)]
)
def test_a_timm_folder_in_the_hub_s_layout(tmp_path: Path, crop_mode: str, crop_pct: float) -> None:
    import timm
    from safetensors.torch import save_file

    net = timm.create_model("test_vit", num_classes=0).eval()
    folder = tmp_path / "vit"
    folder.mkdir()
    pretrained = {"input_size": [3, 160, 160], "crop_mode": crop_mode, "crop_pct": crop_pct, "num_classes": 0}
    pretrained |= {"interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    pretrained |= {"first_conv": "patch_embed.proj", "classifier": "head", "fixed_input_size": True}
    (folder / "config.json").write_text(
        json.dumps({"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": pretrained})
    )
    save_file(net.state_dict(), folder / "model.safetensors")
    settings = BackboneSettings("timm", "local-dir:vit", "pretrained", 160, "float32", 3)
    if crop_mode == "border":
        with pytest.raises(ValueError, match="vit: resizing by border, wanted shortest or squash"):
            load_backbone("vit", settings, root=tmp_path)
        return
    backbone = load_backbone("vit", settings, root=tmp_path)
    config = {
        **timm.data.resolve_model_data_config(net),
        **{key: pretrained[key] for key in ("crop_mode", "crop_pct")},
    }
    config |= {"interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert_encodes(backbone, net, timm.data.create_transform(**config))


def test_a_pickle_that_is_more_than_weights_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Bomb()}, tmp_path / "weights.pth")
    settings = BackboneSettings("timm", "test_vit", "weights.pth", 160, "float32", 2)
    with pytest.raises(ValueError, match=r"weights\.pth: refused by the weights_only loader.*tensors alone"):
        load_backbone("vit", settings, root=tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image_size": 24}, ValueError, "ssl: image_size 24, but the model takes 16 pixels"),
        ({"library": "open_clip"}, ValueError, r"net/config\.json: library timm, but ssl says open_clip"),
        (
            {"model": "data/gone"},
            FileNotFoundError,
            r"data/gone/config\.json: no such file \(model of backbone ssl\)",
        ),
        (
            {"weights": "net/gone.safetensors"},
            FileNotFoundError,
            r"gone\.safetensors: no such file \(weights of",
        ),
        ({"weights": "openai"}, ValueError, "ssl: weights openai: wanted a file, for the model is a folder"),
        ({"weights": "net/config.json"}, ValueError, r"config\.json: refused by the weights_only"),
        (
            {"model": "test_vit", "weights": "openai"},
            ValueError,
            "weights openai: wanted a file, pretrained or null",
        ),
        (
            {"model": "vit_base_patch16_225", "weights": None},
            ValueError,
            "ssl: timm has no model 'vit_base_patch16_225'; it has: vit_base_patch16_224",
        ),
        (
            {"model": "vit_base_patch16_224.dinoo", "weights": "pretrained"},
            ValueError,
            r"ssl: timm has no model 'vit_base_patch16_224\.dinoo'; it has: vit_base_patch16_224\.dino",
        ),
        (
            {"library": "open_clip", "model": "ViT-B-33", "weights": None},
            ValueError,
            "ssl: open_clip has no model 'ViT-B-33'; it has: .*ViT-B-32",
        ),
        (
            {"model": "hf-hub:a/b"},
            ValueError,
            "hf-hub:a/b brings its own weights; wanted weights: pretrained or null",
        ),
    ],
)
def test_wrong_settings_are_refused_by_name(
    vit: tuple[Path, Any], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_backbone("ssl", dataclasses.replace(SETTINGS, **changes), root=vit[0])


def test_weights_of_another_net_are_refused(vit: tuple[Path, Any], clip: tuple[Path, Any]) -> None:
    settings = dataclasses.replace(SETTINGS, weights=str(clip[0] / "net" / "model.safetensors"))
    with pytest.raises(ValueError, match=r"model\.safetensors: not the weights of this model: .*blocks\.0"):
        load_backbone("ssl", settings, root=vit[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"library": "pixels"}, "pixels takes no model, got net"),
        ({"model": None}, "timm needs a model, got None"),
        ({"library": "pixels", "model": None}, "pixels takes no weights, got net"),
        ({"batch_size": 0}, "image_size 16 and batch_size 0: wanted 1 or more"),
        ({"image_size": 0}, "image_size 0 and batch_size 3: wanted 1 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_a_picture_of_extreme_shape_is_refused_not_blown_up() -> None:
    preprocessing = Preprocessing("shortest", 224, 224, "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    with pytest.raises(ImageError, match="1 x 30000 pixels: sides too unequal"):
        preprocessing.pixels([Image.new("RGB", (1, 30000))])


ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["ssl", "supervised", "clip"])
def test_a_vector_does_not_depend_on_what_is_encoded_with_it(name: str) -> None:
    """The shipped ResNets normalize by batch while they train; the nets of the other tests never do."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 80 * i + 15, (64, 64, 3), dtype=np.uint8)) for i in range(1, 4)]
    backbone = load_backbone(name, load_params(BackboneSettings, f"featurize.settings.{name}"), root=ROOT)
    together, alone = backbone.encode(images), np.concatenate([backbone.encode([one]) for one in images])
    np.testing.assert_allclose(together, alone, atol=1e-4 * np.abs(alone).max())
