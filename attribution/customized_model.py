"""A customized model as what it adds to its base: one token, and the weights that its method tunes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

TOKEN_FILE = "new1.safetensors"
TOKEN = "<new1>"
XL_ROWS = ("clip_l", "clip_g")


@dataclass(frozen=True)
class CustomizedModel:
    """The delta of one customized model; its method says what the `weights` are.

    `vector`: the token's rows in the tables of the text encoders, one after the other.
    """

    method: str
    weights: Mapping[str, Tensor]
    vector: Float[Tensor, " dim"]
    token: str = TOKEN


@dataclass(frozen=True)
class ModelStack:
    """Customized models of one method side by side, so that one batch can serve them all."""

    method: str
    weights: Mapping[str, Tensor]  # [models, ...] each
    vectors: Float[Tensor, "models dim"]
    token: str = TOKEN

    def __len__(self) -> int:
        return len(self.vectors)

    @staticmethod
    def of(models: Sequence[CustomizedModel]) -> ModelStack:
        """Raises ValueError if the models do not share one method, one base architecture and one token."""
        first = models[0]
        kinds = [
            (model.method, model.token, {name: tuple(weight.shape) for name, weight in model.weights.items()})
            for model in models
        ]
        if any(kind != kinds[0] for kind in kinds):
            raise ValueError("customized models of different methods, bases or tokens cannot be stacked")
        return ModelStack(
            first.method,
            {name: torch.stack([model.weights[name] for model in models]) for name in first.weights},
            torch.stack([model.vector for model in models]),
            first.token,
        )

    def __getitem__(self, index: int) -> CustomizedModel:
        weights = {name: weight[index].detach() for name, weight in self.weights.items()}
        return CustomizedModel(self.method, weights, self.vectors[index].detach(), self.token)

    def to(self, device: torch.device, dtype: torch.dtype) -> ModelStack:
        """The same stack elsewhere."""
        weights = {name: weight.to(device, dtype) for name, weight in self.weights.items()}
        return ModelStack(self.method, weights, self.vectors.to(device, dtype), self.token)


def write_token(folder: Path, token: str, rows: Sequence[Tensor], dtype: torch.dtype) -> None:
    """The file that `pipe.load_textual_inversion(folder, weight_name=TOKEN_FILE)` reads.

    The two rows of SDXL have the names that other tools give them, and diffusers takes each by itself:

        rows = safetensors.torch.load_file(folder / TOKEN_FILE)
        pipe.load_textual_inversion(rows["clip_l"], TOKEN, pipe.tokenizer, pipe.text_encoder)
        pipe.load_textual_inversion(rows["clip_g"], TOKEN, pipe.tokenizer_2, pipe.text_encoder_2)
    """
    names = (token,) if len(rows) == 1 else XL_ROWS
    write_tensors(folder / TOKEN_FILE, dict(zip(names, rows, strict=True)), dtype)


def read_token(folder: Path) -> tuple[str, Float[Tensor, " dim"]]:
    """The one token of the file and its row. Raises as `read_tensors`, and ValueError for other than one."""
    tokens = read_tensors(folder / TOKEN_FILE)
    if tokens.keys() == set(XL_ROWS):
        return TOKEN, torch.cat([tokens[name].float().reshape(-1) for name in XL_ROWS])
    if len(tokens) != 1:
        raise ValueError(f"{folder / TOKEN_FILE}: wanted one token, got {', '.join(tokens) or 'none'}")
    ((token, vector),) = tokens.items()
    return token, vector.float().reshape(-1)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """`path` holds these tensors in this precision."""
    kept = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    save_file(kept, path, metadata={"format": "pt"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the file, as they are. Raises FileNotFoundError or ValueError, both naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error
