"""Training that a kill interrupts and nothing loses, on one device or shared among processes under torchrun.

On CPU, where nets are small, one single-threaded process per core is half again as fast as one process with
as many threads: `torchrun --nproc-per-node N -m stages.pretrain` shares every batch.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from attribution.files import atomic_path

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Schedule:
    """`steps` of AdamW: a linear warm-up, a constant rate, a linear decay over the last share of them."""

    steps: int
    learning_rate: float
    warmup_steps: int
    decay_fraction: float
    ema_decay: float

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        decay_steps = max(1, int(self.decay_fraction * self.steps))
        return self.learning_rate * min(
            1.0, (step + 1) / max(1, self.warmup_steps), (self.steps - step) / decay_steps
        )


def join_processes() -> None:
    """Under torchrun, joins the other processes; alone, nothing."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def processes() -> tuple[int, int]:
    """(rank, number of processes) of this run."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first process works while the others wait, so that they find its files."""
    rank, size = processes()
    if size > 1 and rank > 0:
        dist.barrier()
    yield
    if size > 1 and rank == 0:
        dist.barrier()


def open_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this process. Raises RuntimeError for cuda where there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device: wanted cuda, but torch sees no GPU; set it to cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", processes()[0] % torch.cuda.device_count())


def train(
    model: torch.nn.Module,
    loss_of: Callable[[np.random.Generator], torch.Tensor],
    schedule: Schedule,
    *,
    seed: int,
    checkpoint: Path,
    checkpoint_seconds: float,
) -> Tensors:
    """The weights of `model`, averaged over time, after `schedule.steps` steps on `loss_of(rng)`.

    Goes on from `checkpoint` where it exists. A step's randomness depends on (seed, step, process) alone.
    """
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(
        model.parameters(), schedule.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    start = _load(checkpoint, model, ema, optimizer)
    saved = time.monotonic()
    rank, _ = processes()
    losses: list[torch.Tensor] = []
    name = checkpoint.stem
    for step in tqdm(
        range(start, schedule.steps), initial=start, total=schedule.steps, desc=name, disable=None
    ):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = loss_of(np.random.default_rng((seed, 3, step, rank)))
        loss.backward()
        _average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(schedule.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            current = model.state_dict()
            torch._foreach_lerp_(list(ema.values()), [current[key] for key in ema], 1 - decay)
        losses.append(loss.detach())
        if len(losses) == 100:
            if rank == 0:
                _log(checkpoint.with_suffix(".jsonl"), step + 1, float(torch.stack(losses).mean()))
            losses = []
        is_last = step + 1 == schedule.steps
        if rank == 0 and (time.monotonic() - saved > checkpoint_seconds or is_last):
            _save(checkpoint, step + 1, model, ema, optimizer)
            saved = time.monotonic()
    return ema


def _average_gradients(model: torch.nn.Module) -> None:
    _, size = processes()
    if size > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= size
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _log(path: Path, step: int, loss: float) -> None:
    with path.open("a") as file:
        file.write(json.dumps({"step": step, "loss": loss, "time": time.time()}) + "\n")


def _save(path: Path, step: int, model: torch.nn.Module, ema: Tensors, optimizer: Any) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    with atomic_path(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"step": str(step)})


def _load(path: Path, model: torch.nn.Module, ema: Tensors, optimizer: Any) -> int:
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for name, value in ema.items():
        value.copy_(tensors[f"ema.{name}"])
    state: dict[int, Tensors] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step
