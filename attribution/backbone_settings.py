"""One row of `featurize.settings` in params.yaml."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from attribution.preprocessing import Preprocessing

NETS = ("timm", "open_clip", "torchscript")


@dataclass(frozen=True)
class ReadyFeatures:
    """Features in clip-retrieval's layout, in place of pictures (attribution.clip_retrieval).

    `folder` counts from the repository's root. `model` is what clip-retrieval was told to take, its
    --clip_model, for its files do not say. `name_column` of their metadata tells the pictures apart (null:
    the first of image_path, key, url).
    """

    folder: str
    model: str
    name_column: str | None = None


@dataclass(frozen=True)
class BackboneSettings:
    """Which net, with which weights, on which pixels, in which arithmetic.

    `model` is a name of the library, "hf-hub:organization/name", "local-dir:folder" in the hub's layout, or a
    folder with a config.json. `weights` is a file, "hf-hub:organization/name/file", a pretrained tag of the
    library ("pretrained" in timm: the tag is part of the model's name), or null for seeded random weights.
    Paths count from the repository's root. What comes from the hub wants a `revision`, a commit. `sha256` is
    that of the file of weights, checked before anything is read from it.

    `image_size` is what the model takes, in pixels a side. `dtype` is what is stored, `precision` what is
    computed in (null: float32; the others by autocast). `preprocessing` stands in for the library's own,
    `rename` maps beginnings of the weights' names onto the net's (attribution.weights.read_weights).
    `normalized` vectors are brought to length 1. `ready_distractors` stand in for the distractors' pictures.
    """

    library: Literal["pixels", "color_histogram", "timm", "open_clip", "torchscript"]
    model: str | None
    weights: str | None
    image_size: int
    dtype: Literal["float32", "float16"]
    batch_size: int
    revision: str | None = None
    sha256: str | None = None
    precision: Literal["float32", "float16", "bfloat16"] | None = None
    preprocessing: Preprocessing | None = None
    rename: dict[str, str] | None = None
    normalized: bool | None = None
    ready_distractors: ReadyFeatures | None = None

    def __post_init__(self) -> None:
        needs_model = self.library in ("timm", "open_clip")
        if needs_model != (self.model is not None):
            raise ValueError(
                f"{self.library} {'needs a' if needs_model else 'takes no'} model, got {self.model}"
            )
        if self.library not in NETS:
            for key in ("weights", "revision", "sha256", "precision", "preprocessing", "rename"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{self.library} takes no {key}, got {getattr(self, key)}")
        if self.image_size < 1 or self.batch_size < 1:
            raise ValueError(
                f"image_size {self.image_size} and batch_size {self.batch_size}: wanted 1 or more"
            )
        if self.revision is not None and not re.fullmatch("[0-9a-f]{40}", self.revision):
            raise ValueError(f"revision {self.revision}: wanted a commit, 40 hex digits; names can move")
        if self.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 {self.sha256}: wanted 64 hex digits")
        if self.library == "torchscript":
            for key in ("weights", "preprocessing"):
                if getattr(self, key) is None:
                    raise ValueError(f"torchscript needs {key}, got null")
        if self.preprocessing is not None and self.preprocessing.crop != self.image_size:
            raise ValueError(
                f"image_size {self.image_size}, but preprocessing.crop {self.preprocessing.crop}"
            )
