"""How long and how fast each method of customization trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attribution.params import require_at_least

MethodName = Literal["custom_diffusion", "textual_inversion", "lora", "dreambooth"]


@dataclass(frozen=True)
class TrainingSettings:
    """Per step and concept, `views_per_step` views of exemplars and `priors_per_step` images of the base.

    `learning_rate` is that of the weights: null where the token alone is trained.
    """

    steps: int
    learning_rate: float | None
    token_learning_rate: float
    weight_decay: float
    views_per_step: int
    priors_per_step: int
    prior_weight: float

    def __post_init__(self) -> None:
        if self.steps < 1 or self.views_per_step < 1 or self.priors_per_step < 0:
            raise ValueError("wanted steps >= 1, views_per_step >= 1, priors_per_step >= 0")
        require_at_least(self, learning_rate=0, token_learning_rate=0, weight_decay=0, prior_weight=0)


@dataclass(frozen=True)
class LoraSettings(TrainingSettings):
    """`rank` of what is added to each matrix."""

    rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank: wanted at least 1, got {self.rank}")


@dataclass(frozen=True)
class MethodSettings:
    """Those of every method, of which one is used."""

    custom_diffusion: TrainingSettings
    textual_inversion: TrainingSettings
    lora: LoraSettings
    dreambooth: TrainingSettings

    def __post_init__(self) -> None:
        if self.textual_inversion.learning_rate is not None:
            raise ValueError("textual_inversion.learning_rate: wanted null: it trains the token alone")
        for name in ("custom_diffusion", "lora", "dreambooth"):
            if self.of(name).learning_rate is None:
                raise ValueError(f"{name}.learning_rate: wanted that of its weights, got null")

    def of(self, method: str) -> TrainingSettings:
        """Those of this method."""
        return getattr(self, method)
