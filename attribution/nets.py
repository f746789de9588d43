"""The nets that timm and open_clip know by name or in the hub's layout, and TorchScript archives."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attribution.backbone_settings import BackboneSettings
from attribution.files import sha256_bytes
from attribution.preprocessing import Preprocessing, library_preprocessing
from attribution.weights import (
    HUB,
    check_sha256,
    fitting,
    hub_file,
    read_weights,
    weights_digest,
    weights_file,
)

if TYPE_CHECKING:
    import torch

LOCAL = "local-dir:"


@dataclass(frozen=True)
class Net:
    """`module` in evaluation mode, `encode` from normalized pixels to vectors, `revision` of the weights."""

    module: torch.nn.Module
    encode: Callable[[Any], Any]
    preprocessing: Preprocessing
    revision: str


def load_torchscript(name: str, settings: BackboneSettings, root: Path) -> Net:
    """The program in a TorchScript archive, such as SSCD is published in.

    Such an archive is code, which PyTorch's interpreter runs: no Python and no pickle of ours, but any
    operator of PyTorch, with the rights of this process. What is trusted is therefore the sha256 in the
    settings: these very bytes are hashed before they are loaded, and who wrote it down vouches for them.
    """
    import torch

    assert settings.weights is not None
    assert settings.preprocessing is not None
    file = weights_file(name, settings, root)
    if file is None:
        raise ValueError(f"{name}: weights {settings.weights}: wanted a file")
    archive = file.read_bytes()
    digest = sha256_bytes(archive)
    if settings.sha256 is None:
        do = "write it down as sha256 if you trust where the file came from"
        raise ValueError(f"{file}: a TorchScript archive is a program; this one's sha256 is {digest}: {do}")
    if digest != settings.sha256:
        raise ValueError(f"{file}: sha256 {digest}, wanted {settings.sha256} (weights of backbone {name})")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit")  # the whole of it is deprecated
        try:
            module = torch.jit.load(io.BytesIO(archive), map_location="cpu")
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{file}: not a TorchScript archive: {reason}") from error
    return Net(module, module, settings.preprocessing, digest[:16])


def build_open_clip(name: str, settings: BackboneSettings, root: Path) -> Net:
    """The image tower of a model of open_clip; the text tower is built, for its weights, and left."""
    import open_clip

    said: dict[str, Any] = {}

    def of_tag(model: str, tag: str) -> tuple[str, str]:
        said.update(_open_clip_tag(name, model, tag))
        repository, _, filename = said["hf_hub"].rpartition("/")
        return repository, filename

    files = ("open_clip_config.json", "open_clip_model.safetensors")
    if ":" not in str(settings.model):
        _check_known(name, "open_clip", str(settings.model), open_clip.list_models())
    model, file = _model_and_weights(name, settings, root, files, of_tag)
    with _no_chatter():
        net = open_clip.create_model(
            model,
            load_weights=False,
            pretrained_image=False,
            pretrained_text=False,
            force_preprocess_cfg=said,
        )
    if file is not None:
        check_sha256(name, file, settings.sha256)
        with fitting(file):
            if settings.rename is not None:
                net.visual.load_state_dict(read_weights(file, settings.rename), strict=True)
            else:
                read_weights(file)  # refuses what is not plain tensors; the converters below take a path
                open_clip.factory.load_checkpoint(net, str(file), strict=True, weights_only=True)
    config = net.visual.preprocess_cfg
    size = config["size"]
    if isinstance(size, tuple | list):
        size = _square(name, size)
    own = settings.preprocessing or library_preprocessing(name, config["resize_mode"], size, size, config)

    def encode(inputs: torch.Tensor) -> torch.Tensor:
        vectors = net.visual(inputs)
        return vectors[0] if isinstance(vectors, tuple) else vectors  # CoCa gives its tokens too

    return Net(net.visual, encode, own, weights_digest(net.visual))


def _open_clip_tag(name: str, model: str, tag: str) -> dict[str, Any]:
    import open_clip

    said = open_clip.get_pretrained_cfg(model, tag)
    if not said:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
        raise ValueError(f"{name}: weights {tag}: no file and no tag of {model}; tags: {tags or 'none'}")
    if not said.get("hf_hub"):
        raise ValueError(f"{name}: weights {tag}: not on the hub; fetch {said.get('url')} and name the file")
    config = open_clip.get_model_config(model)
    if said.get("quick_gelu", False) != config.get("quick_gelu", False):
        wanted = f"{model}-quickgelu" if said.get("quick_gelu", False) else model.removesuffix("-quickgelu")
        raise ValueError(f"{name}: weights {tag} were trained with another activation: wanted model {wanted}")
    return said


def build_timm(name: str, settings: BackboneSettings, root: Path) -> Net:
    """A model of timm without its head; no weight of it is left at random when there are weights."""
    import timm
    from timm.data import resolve_model_data_config

    def of_tag(model: str, tag: str) -> tuple[str, str]:
        if tag != "pretrained":
            wanted = "wanted a file, pretrained or null (tags go into the model's name)"
            raise ValueError(f"{name}: weights {tag}: {wanted}")
        known = timm.get_pretrained_cfg(model)
        if known is None or not known.hf_hub_id:
            raise ValueError(f"{name}: no pretrained weights of {model} on the hub; wanted a file")
        return known.hf_hub_id, known.hf_hub_filename or ""

    if ":" not in str(settings.model):
        architecture, _, tag = str(settings.model).partition(".")
        if not timm.is_model(architecture):  # which knows older names too
            _check_known(name, "timm", architecture, timm.list_models())
        if tag:
            tagged = timm.list_models(f"{architecture}.*", pretrained=True)
            _check_known(name, "timm", str(settings.model), tagged)
    model, file = _model_and_weights(name, settings, root, ("config.json", "model.safetensors"), of_tag)
    options = {}
    known = None if ":" in model else timm.get_pretrained_cfg(model)
    if settings.preprocessing and known and known.input_size[1] != settings.image_size:
        # Nets that take one size only are told which; their position embeddings are resampled.
        options = {"img_size": settings.image_size} if known.fixed_input_size else {}
    overlay = None
    if file is not None:
        check_sha256(name, file, settings.sha256)
        overlay = {"state_dict": read_weights(file, settings.rename), "source": "", "custom_load": False}
    with fitting(file), _nothing_missing(file):
        net = timm.create_model(
            model, pretrained=file is not None, pretrained_cfg_overlay=overlay, num_classes=0, **options
        )
    net.pretrained_cfg.pop("state_dict", None)
    own = settings.preprocessing
    if own is None:
        config = resolve_model_data_config(net)
        size = _square(name, config["input_size"][1:])
        mode = {"center": "shortest"}.get(config["crop_mode"], config["crop_mode"])
        own = library_preprocessing(name, mode, int(size / config["crop_pct"]), size, config)
    return Net(net, net, own, weights_digest(net))


def _model_and_weights(
    name: str,
    settings: BackboneSettings,
    root: Path,
    files: tuple[str, str],
    of_tag: Callable[[str, str], tuple[str, str]],
) -> tuple[str, Path | None]:
    """What to call the model before its library, and the file of its weights; None: it has random ones.

    `files` are the usual names of config and weights in a folder or on the hub, `of_tag` gives repository and
    file (or "") of a pretrained tag of a model.
    """
    folder = _own_folder(name, settings, root, files)
    if folder is not None:
        return f"{LOCAL}{folder}", None if settings.weights is None else _weights_in(folder, files[1])
    model = str(settings.model)
    file = weights_file(name, settings, root)
    if settings.weights is not None and file is None:
        repository, filename = of_tag(model, settings.weights)
        file = hub_file(name, repository, filename or files[1], settings.revision)
    return model, file


def _own_folder(name: str, settings: BackboneSettings, root: Path, files: Sequence[str]) -> Path | None:
    """The folder of a model that brings its own weights; None for the library's names."""
    model = str(settings.model)
    if ":" not in model:
        return None
    if settings.weights not in (None, "pretrained"):
        wanted = f"wanted weights: pretrained or null, got {settings.weights}"
        raise ValueError(f"{name}: {model} brings its own weights; {wanted}")
    if model.startswith(LOCAL):
        folder = root / model.removeprefix(LOCAL)
        if not (folder / files[0]).is_file():
            raise FileNotFoundError(f"{folder / files[0]}: no such file (model of backbone {name})")
        return folder
    if not model.startswith(HUB):
        raise ValueError(f"{name}: model {model}: wanted {HUB}..., {LOCAL}..., a folder or a name")
    for file in files if settings.weights else files[:1]:
        fetched = hub_file(name, model.removeprefix(HUB), file, settings.revision)
    return fetched.parent


def _weights_in(folder: Path, usual: str) -> Path:
    patterns = (usual, "*.safetensors", "*.bin", "*.pth", "*.pt")
    found = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    if not found:
        raise FileNotFoundError(f"{folder}: no file of weights; wanted {usual}")
    return found[0]


def _check_known(name: str, library: str, model: str, known: Sequence[str]) -> None:
    """Raises ValueError with names like it for a model that the library does not know."""
    if model not in known:
        near = ", ".join(difflib.get_close_matches(model, known, 5, cutoff=0.5))
        raise ValueError(f"{name}: {library} has no model {model!r}" + f"; it has: {near}" * bool(near))


@contextlib.contextmanager
def _nothing_missing(file: Path | None) -> Iterator[None]:
    """timm loads what fits and merely logs what was missing, a whole net at random: here that is an error."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("timm.models._builder")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
    missing = [message for message in said if message.startswith("Missing keys")]
    if missing:
        raise ValueError(f"{file}: not the weights of this model: {missing[0][:200]}")


@contextlib.contextmanager
def _no_chatter() -> Iterator[None]:
    """open_clip logs on the root logger that a model without weights is random, as it is meant to be."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _square(name: str, size: Sequence[int]) -> int:
    if size[0] != size[1]:
        raise ValueError(f"{name}: the model takes {size[0]} x {size[1]} pixels, wanted a square")
    return size[0]
