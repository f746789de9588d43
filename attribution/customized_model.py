"""A customized model as what it adds to its base: cross-attention keys and values, and one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS_FILE = "pytorch_custom_diffusion_weights.safetensors"
TOKEN_FILE = "new1.safetensors"
TOKEN = "<new1>"
_SUFFIX = ".processor.to_{}_custom_diffusion.weight"


@dataclass(frozen=True)
class CustomizedModel:
    """The delta of one customized model. `weights` maps `<layer>.attn2.to_k` and `.to_v` to [out, in]."""

    weights: Mapping[str, Tensor]
    vector: Float[Tensor, " dim"]
    token: str = TOKEN

    def write(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """`folder` holds the two files that diffusers loads itself.

            pipe.unet.load_attn_procs(folder, weight_name=WEIGHTS_FILE, _pipeline=pipe)
            pipe.load_textual_inversion(folder, weight_name=TOKEN_FILE)

        `_pipeline` is needed: without it diffusers 0.42 reads the file and then sets nothing.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, weight in self.weights.items():
            layer, projection = name.rsplit(".to_", 1)
            tensors[layer + _SUFFIX.format(projection)] = weight.detach().to("cpu", dtype).contiguous()
            # diffusers wants a processor for every attention layer, and reads an empty tensor as untouched.
            # Its save_attn_procs drops these, and load_attn_procs then refuses the file it wrote.
            tensors[layer.removesuffix("attn2") + "attn1.processor"] = torch.zeros(0, dtype=dtype)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        vector = self.vector.detach().to("cpu", dtype).contiguous()
        save_file({self.token: vector}, folder / TOKEN_FILE, metadata={"format": "pt"})

    @staticmethod
    def read(folder: Path) -> CustomizedModel:
        """The delta in `folder`, as float32, whoever wrote it.

        Raises FileNotFoundError for a missing file, ValueError naming file and key that does not belong.
        """
        path = folder / WEIGHTS_FILE
        weights = {}
        for key, tensor in _read(path).items():
            for projection in "kv":
                suffix = _SUFFIX.format(projection)
                if key.endswith(suffix):
                    weights[f"{key.removesuffix(suffix)}.to_{projection}"] = tensor.float()
                    break
            else:
                if len(tensor):
                    raise ValueError(
                        f"{path}: wanted keys like <layer>.attn2{_SUFFIX.format('k')}, got {key}"
                    )
        if not weights:
            raise ValueError(f"{path}: no key ends in {_SUFFIX.format('k')}")
        tokens = _read(folder / TOKEN_FILE)
        if len(tokens) != 1:
            raise ValueError(f"{folder / TOKEN_FILE}: wanted one token, got {', '.join(tokens) or 'none'}")
        ((token, vector),) = tokens.items()
        return CustomizedModel(weights, vector.float().reshape(-1), token)


@dataclass(frozen=True)
class ModelStack:
    """Customized models side by side, so that one batch can serve them all. Names as in CustomizedModel."""

    weights: Mapping[str, Float[Tensor, "models out dim"]]
    vectors: Float[Tensor, "models dim"]
    token: str = TOKEN

    def __len__(self) -> int:
        return len(self.vectors)

    @staticmethod
    def of(models: Sequence[CustomizedModel]) -> ModelStack:
        """Raises ValueError if the models do not share one base architecture and one token."""
        first = models[0]
        shapes = [{name: tuple(weight.shape) for name, weight in model.weights.items()} for model in models]
        if any(shape != shapes[0] for shape in shapes) or any(model.token != first.token for model in models):
            raise ValueError("customized models of different bases or tokens cannot be stacked")
        return ModelStack(
            {name: torch.stack([model.weights[name] for model in models]) for name in first.weights},
            torch.stack([model.vector for model in models]),
            first.token,
        )

    def __getitem__(self, index: int) -> CustomizedModel:
        weights = {name: weight[index].detach() for name, weight in self.weights.items()}
        return CustomizedModel(weights, self.vectors[index].detach(), self.token)

    def to(self, device: torch.device, dtype: torch.dtype) -> ModelStack:
        """The same stack elsewhere."""
        weights = {name: weight.to(device, dtype) for name, weight in self.weights.items()}
        return ModelStack(weights, self.vectors.to(device, dtype), self.token)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error
