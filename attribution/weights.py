"""Files of weights: where they are, whether they are the wanted ones, the tensors in them. No pickle runs."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attribution.backbone_settings import BackboneSettings
from attribution.files import sha256_file

if TYPE_CHECKING:
    from torch import Tensor, nn

HUB = "hf-hub:"
# Where training scripts put the weights among what else they save.
_NESTED = ("state_dict", "model_state_dict", "model")


def weights_file(name: str, settings: BackboneSettings, root: Path) -> Path | None:
    """The file that `settings.weights` name, its sha256 checked; None for null and for a library's tag.

    Raises FileNotFoundError for a file that is not there, ValueError for another one than was wanted.
    """
    if settings.weights is None:
        return None
    if settings.weights.startswith(HUB):
        repository, _, filename = settings.weights.removeprefix(HUB).rpartition("/")
        if "/" not in repository:
            raise ValueError(
                f"{name}: weights {settings.weights}: wanted {HUB}organization/name/file.safetensors"
            )
        file: Path | None = hub_file(name, repository, filename, settings.revision)
    else:
        file = _local_weights(name, settings.weights, root)
    if file is not None:
        check_sha256(name, file, settings.sha256)
    return file


def hub_file(name: str, repository: str, filename: str, revision: str | None) -> Path:
    """That file of the Hugging Face hub at that commit, in the local cache; from there alone when offline.

    Raises ValueError for no revision, FileNotFoundError for a file that cannot be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    where = f"{name}: {HUB}{repository}"
    if revision is None:
        look = f"git ls-remote https://huggingface.co/{repository} HEAD"
        raise ValueError(f"{where}: wanted a revision, the commit to take; look it up: {look}")
    try:
        return Path(hf_hub_download(repository, filename, revision=revision))
    except (OSError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"{where}: no {filename} at {revision}: {reason}") from error


def check_sha256(name: str, file: Path, wanted: str | None) -> None:
    """Raises ValueError if the file holds other bytes than the wanted ones. Anything will do for None."""
    if wanted is not None and (got := sha256_file(file)) != wanted:
        raise ValueError(f"{file}: sha256 {got}, wanted {wanted} (weights of backbone {name})")


def read_weights(file: Path, rename: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a checkpoint of PyTorch, by name, on the CPU.

    A checkpoint is read by PyTorch's weights_only loader: tensors, numbers and texts, never code. Weights
    that lie under "state_dict", "model_state_dict" or "model" are found there. With `rename`, only tensors
    whose names begin with one of its keys (the longest counts) are kept, with that beginning replaced. Raises
    ValueError for a file that holds anything else, and for a key that fits no name.
    """
    tensors = _read(file)
    if not tensors:
        raise ValueError(f"{file}: no tensors in it")
    if rename is None:
        wrapped = all(name.startswith("module.") for name in tensors)
        return {name.removeprefix("module.") if wrapped else name: one for name, one in tensors.items()}
    renamed: dict[str, Tensor] = {}
    used = set()
    for name, tensor in tensors.items():
        fitting = [start for start in rename if name.startswith(start)]
        if fitting:
            start = max(fitting, key=len)
            used.add(start)
            renamed[rename[start] + name[len(start) :]] = tensor
    for start in rename:
        if start not in used:
            some = ", ".join(list(tensors)[:3])
            raise ValueError(f"{file}: rename: no name begins with {start!r}; there are: {some}, ...")
    return renamed


@contextlib.contextmanager
def fitting(file: Path | None) -> Iterator[None]:
    """Inside, what PyTorch says of weights that do not fit becomes one line that names the file."""
    try:
        yield
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{file}: not the weights of this model: {' '.join(str(error).split())}") from error


def weights_digest(net: nn.Module) -> str:
    """16 hex digits of every tensor of the net with its name, type and shape."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _local_weights(name: str, weights: str, root: Path) -> Path | None:
    """The file that `weights` names, counted from `root`; None for what can only be a library's tag.

    Raises FileNotFoundError for the path of a file that is not there.
    """
    file = root / weights
    if file.is_file():
        return file
    if "/" in weights or file.suffix:
        raise FileNotFoundError(f"{file}: no such file (weights of backbone {name})")
    return None


def _read(file: Path) -> dict[str, Tensor]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a safetensors file: {error}") from error
    try:
        # Training scripts like to keep their arguments beside the weights; a Namespace does nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            held: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own advice in this error is to load it unsafely.
        asked = re.search(r"Unsupported (?:global|operand|class).*? (\S+\.\S+)", str(error))
        reason = f"refused by the weights_only loader{f': it asks for {asked[1]}' if asked else ''}"
        raise ValueError(f"{file}: {reason}; wanted tensors alone") from error
    except Exception as error:  # on a file that is cut the unpickler raises nearly anything
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{file}: not a file of torch.save: {said}") from error
    for key in _NESTED:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping):
        raise ValueError(f"{file}: wanted tensors by name, got {type(held).__name__}")
    return {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}
