"""The methods of customization, as one: what each of them trains, how its models run together, its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from attribution import custom_diffusion, dreambooth, lora, textual_inversion
from attribution.base_model import Pipeline
from attribution.conditioning import row_widths
from attribution.cross_attention import Predict
from attribution.customized_model import TOKEN_FILE, CustomizedModel, read_token, write_token
from attribution.files import read_json
from attribution.training_settings import TrainingSettings

RECORD = "customized.json"


class Method(Protocol):
    """A module that says what of the UNet each model has as its own. Every method trains the token besides.

    `WEIGHTS` is the file or folder of the weights, None if there are none. `TEXT_START_LEARNS`: whether the
    start of the text, the same for every prompt, teaches its keys and values.
    """

    @property
    def WEIGHTS(self) -> str | None: ...  # noqa: D102
    @property
    def TEXT_START_LEARNS(self) -> bool: ...  # noqa: D102

    def start(self, unet: Any, seeds: Sequence[int], settings: TrainingSettings) -> dict[str, Tensor]:
        """The weights of one model per seed before training, [models, ...] each: they draw as the base."""

    def text_weights(self, unet: Any, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Keys and values of the text, `<layer>.attn2.to_k` and `.to_v`: [models or 1, out, dim] each."""

    def network(self, unet: Any, weights: Mapping[str, Tensor]) -> AbstractContextManager[Predict]:
        """Inside, the UNet runs each sample with the weights of its own model."""

    def write(self, folder: Path, weights: Mapping[str, Tensor], unet: Any, dtype: torch.dtype) -> None:
        """`WEIGHTS` in `folder` holds the weights of one model, as diffusers reads them."""

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Those weights as float32. Raises ValueError naming file and key that does not belong."""


METHODS: dict[str, Method] = {
    "custom_diffusion": custom_diffusion,
    "textual_inversion": textual_inversion,
    "lora": lora,
    "dreambooth": dreambooth,
}


def write_model(folder: Path, model: CustomizedModel, pipe: Pipeline, *, dtype: torch.dtype) -> None:
    """`folder` holds the files of the model that diffusers loads itself: its weights, and its token.

    `pipe.load_textual_inversion(folder, weight_name=TOKEN_FILE)` reads the token; each method says who reads
    its weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    METHODS[model.method].write(folder, model.weights, pipe.unet, dtype)
    write_token(folder, model.token, model.vector.split(row_widths(pipe)), dtype)


def read_model(folder: Path, method: str | None = None) -> CustomizedModel:
    """The model in `folder`, as float32, whoever wrote it. Without `method`, customized.json there names it.

    Raises FileNotFoundError for a missing file; ValueError for an unknown method, for another method's
    weights beside, and naming file and key that does not belong.
    """
    method = method or _recorded_method(folder)
    model_files(folder, method)
    token, vector = read_token(folder)
    return CustomizedModel(method, METHODS[method].read(folder), vector, token)


def model_files(folder: Path, method: str | None = None) -> list[Path]:
    """The files and folders that make up the model. Raises as `read_model`, but reads none of them."""
    method = method or _recorded_method(folder)
    if method not in METHODS:
        raise ValueError(f"{folder}: no method {method!r}; there are: {', '.join(METHODS)}")
    wanted = [folder / name for name in (METHODS[method].WEIGHTS, TOKEN_FILE) if name is not None]
    for path in wanted:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file; wanted a model of {method}")
    for name, other in METHODS.items():
        if other.WEIGHTS is not None and (path := folder / other.WEIGHTS) not in wanted and path.exists():
            raise ValueError(f"{path}: weights of {name} beside a model of {method}")
    return wanted


def _recorded_method(folder: Path) -> str:
    record = read_json(folder / RECORD)
    if "method" not in record:
        raise ValueError(f"{folder / RECORD}: no method named; wanted one of: {', '.join(METHODS)}")
    return str(record["method"])
