"""Trains the mapper of one backbone on (exemplar, synthesized image) pairs, and two controls beside it.

In:   data/features/<backbone>, data/queries.parquet, data/world/exemplars.parquet
Out:  data/mappers/<backbone>/mapper.safetensors, with mappers trained on each kind of concept alone beside
      the main one, and history.csv of the main one;
      permuted.safetensors: the same training, each concept's images paired with another's exemplars, one
      epoch at least;
      whitening.safetensors: no pairs at all.
Cost: 160 concepts x 20 images: about 8 CPU s at dim 128, 40 at dim 768; on all cores. 200,000 distractors are
      in memory at most.
"""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from attribution.command import command_line
from attribution.features import FeatureSet
from attribution.files import atomic_path
from attribution.mapper import Kind, Mapper, apply_head, whitening
from attribution.params import load_params, require_at_least
from attribution.queries import Exemplars, Queries, open_features, read_exemplars, read_queries
from attribution.threads import one_core_each

HISTORY_COLUMNS = ("epoch", "train_loss", "validation_loss", "validation_map", "validation_recall_at_10")
PAIRS = {"object": ("object",), "style": ("style",), "joint": ("object", "style")}
# Of more distractors, a covariance learns nothing from the rest, which need not be in memory.
WHITENED_ROWS = 200_000
VALIDATED = 1024  # queries whose scores of all validation distractors are in memory


@dataclasses.dataclass(frozen=True)
class Params:
    """`temperature` of the NT-Xent loss, in cosine; `patience` in epochs without a better validation mAP.

    Adam's step is `learning_rate` / sqrt(dim).
    """

    kind: Kind
    pairs: Literal["object", "style", "joint"]
    hidden: int
    temperature: float
    learning_rate: float
    orthogonality: float
    batch_size: int
    epochs: int
    patience: int
    validation_distractors: int
    whitening_shrinkage: float
    seed: int

    def __post_init__(self) -> None:
        for name in (
            *("hidden", "temperature", "learning_rate", "epochs", "patience"),
            *("validation_distractors", "whitening_shrinkage"),
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: wanted > 0, got {getattr(self, name)}")
        require_at_least(self, orthogonality=0, seed=0)
        if self.batch_size < 2:
            raise ValueError(f"batch_size: wanted 2 or more (the negatives), got {self.batch_size}")
        if self.kind == "mlp" and self.orthogonality:
            raise ValueError("orthogonality: wanted 0 with kind mlp, which has no one matrix")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Scaled features of a split's synthesized images, and of exemplars. `own`: rows of `real`, then -1."""

    synth: Tensor
    real: Tensor
    own: Int[np.ndarray, "pairs slots"]
    concepts: Int[np.ndarray, " pairs"]
    kinds: Int[np.ndarray, " pairs"]

    def draw(self, rng: np.random.Generator) -> Int[np.ndarray, " pairs"]:
        """One own exemplar for each synthesized image, evenly from its set."""
        places = rng.integers((self.own >= 0).sum(axis=1))
        return np.take_along_axis(self.own, places[:, None], axis=1)[:, 0]


def run(
    params: Params,
    *,
    backbone: str,
    features_dir: Path,
    queries_path: Path,
    exemplars_path: Path,
    output_dir: Path,
) -> None:
    exemplars = read_exemplars(exemplars_path)
    exemplar_set, query_set, distractor_set = open_features(features_dir, backbone)
    real = exemplar_set.select(exemplars.image_ids)
    train, val = (read_queries(queries_path, exemplars, split=split) for split in ("train", "val"))
    synth = query_set.select(train.image_ids)
    distractors = _sample_rows(distractor_set, params.validation_distractors, params.seed)
    # In units of the mean length, so that one learning rate suits every backbone, weights and biases.
    scale = float(np.linalg.norm(np.concatenate([synth, distractors]), axis=1).mean()) or 1.0
    others = torch.from_numpy(distractors / np.float32(scale))
    permuted_own = permute_concepts(train, exemplars, params.seed)
    about = {"backbone": backbone, "revision": exemplar_set.space.revision, **dataclasses.asdict(params)}

    def learn(job: tuple[str, bool]) -> tuple[Mapper, list[tuple[float, ...]]]:
        """The mapper from pairs of these kinds, or its control from permuted pairs, and the history."""
        name, permuted = job
        chosen, asked = (np.isin(queries.kinds, PAIRS[name]) for queries in (train, val))
        if not (chosen.any() and asked.any()):
            raise ValueError(
                f"{queries_path}: wanted train and val queries of kind {' or '.join(PAIRS[name])}"
            )
        own = (permuted_own if permuted else train.own)[chosen]
        pairs = _pairs(train.take(chosen), own, query_set, real, scale)
        validation = _pairs(val.take(asked), val.own[asked], query_set, real, scale)
        config = {**about, "pairs": name, "control": "permuted" if permuted else None}
        # The control is stopped by true pairs, as the mapper is, but always trained: its strongest form.
        return fit(params, pairs, validation, others, scale, config, keep_from=int(permuted))

    kinds = [
        kind
        for kind in np.intersect1d(train.kinds, val.kinds).tolist()
        if PAIRS[params.pairs] != (kind,) and len(np.unique(train.concept_ids[train.kinds == kind])) > 1
    ]
    learned = learn_all(
        learn, [(name, permuted) for name in (params.pairs, *kinds) for permuted in (False, True)]
    )
    for permuted, name in ((False, "mapper.safetensors"), (True, "permuted.safetensors")):
        main, _ = learned[params.pairs, permuted]
        main.save(output_dir / name, own_kind={kind: learned[kind, permuted][0] for kind in kinds})
    _, history = learned[params.pairs, False]
    whitened = _sample_rows(distractor_set, WHITENED_ROWS, params.seed)
    white = whitening(whitened, synth, shrinkage=params.whitening_shrinkage)
    white = dataclasses.replace(white, config={"backbone": backbone, "control": "whitening"})
    white.save(output_dir / "whitening.safetensors")
    with atomic_path(output_dir / "history.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HISTORY_COLUMNS)
        writer.writerows([epoch, *(f"{value:.6g}" for value in row)] for epoch, row in enumerate(history))


def learn_all(
    learn: Callable[[tuple[str, bool]], tuple[Mapper, list[tuple[float, ...]]]], jobs: list[tuple[str, bool]]
) -> dict[tuple[str, bool], tuple[Mapper, list[tuple[float, ...]]]]:
    """What each job gives, side by side on the cores."""
    with one_core_each(min(len(jobs), os.cpu_count() or 1)) as pool:
        done = tqdm(pool.map(learn, jobs), total=len(jobs), desc="train_mapper", unit="mapper", disable=None)
        return dict(zip(jobs, done, strict=True))


def fit(
    params: Params,
    pairs: Pairs,
    validation: Pairs,
    distractors: Tensor,
    scale: float,
    about: dict[str, Any],
    *,
    keep_from: int = 0,
) -> tuple[Mapper, list[tuple[float, ...]]]:
    """The mapper of the epoch with the best validation mAP, and the rest of `HISTORY_COLUMNS` per epoch.

    Epoch 0 is the identity: the mapper is never worse than raw features on the validation concepts. With
    `keep_from` 1 it is no candidate.
    """
    if len(np.unique(pairs.concepts)) < 2:
        raise ValueError("train_mapper: wanted at least 2 concepts to train on, got 1: it has no negatives")
    start = Mapper.identity(pairs.real.shape[1], params.kind, hidden=params.hidden, seed=params.seed)
    heads = [
        {name: torch.tensor(tensor, requires_grad=True) for name, tensor in head.items()}
        for head in (start.real, start.synth)
    ]
    # Adam moves every entry alike: the wider the matrix, the further one step moves what comes out.
    rate = params.learning_rate / start.dim**0.5
    optimizer = torch.optim.Adam([tensor for head in heads for tensor in head.values()], lr=rate)
    rng = np.random.default_rng(params.seed)
    history: list[tuple[float, ...]] = []
    best, best_map, best_epoch = heads, -1.0, 0
    for epoch in range(params.epochs + 1):
        # The identity's loss is recorded as epoch 0, before any step.
        loss = _epoch(params, heads, pairs, rng, optimizer if epoch else None)
        val_loss, val_map, val_recall = _validate(params, heads, validation, distractors)
        history.append((loss, val_loss, val_map, val_recall))
        if val_map > best_map and epoch >= keep_from:
            best = [{name: tensor.detach().clone() for name, tensor in head.items()} for head in heads]
            best_map, best_epoch = val_map, epoch
        if epoch - max(best_epoch, keep_from) >= params.patience:
            break
    real, synth = (_unscale(head, scale) for head in best)
    return Mapper(params.kind, real, synth, {**about, "epoch": best_epoch}), history


def nt_xent(
    synth: Float[Tensor, "batch dim"],
    real: Float[Tensor, "batch dim"],
    concepts: Int[Tensor, " batch"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Normalized temperature cross-entropy, both directions, against the batch's other concepts.

        l_i = -log( exp(s_ii / temperature) / sum_{j = i or of another concept} exp(s_ij / temperature) )

    Pairs of the same concept in one batch are no negatives of each other.
    """
    scores = synth @ real.T / temperature
    same = concepts[:, None] == concepts[None, :]
    same.fill_diagonal_(False)
    scores = scores.masked_fill(same, -torch.inf)
    target = torch.arange(len(scores))
    return (functional.cross_entropy(scores, target) + functional.cross_entropy(scores.T, target)) / 2


def permute_concepts(queries: Queries, exemplars: Exemplars, seed: int) -> Int[np.ndarray, "queries slots"]:
    """`own` with every concept's exemplars replaced by those of another concept of its kind.

    A kind with a single concept keeps its own: there is no other.
    """
    rng = np.random.default_rng([seed, 1])
    other: dict[str, str] = {}
    for kind in np.unique(queries.kinds):
        order = rng.permutation(np.unique(queries.concept_ids[queries.kinds == kind]))
        other |= dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    own_of = dict(zip(queries.concept_ids.tolist(), queries.own, strict=True))
    return np.stack([own_of[other[concept]] for concept in queries.concept_ids.tolist()])


def _epoch(
    params: Params,
    heads: list[dict[str, Tensor]],
    pairs: Pairs,
    rng: np.random.Generator,
    optimizer: torch.optim.Optimizer | None,
) -> float:
    """Mean loss over one pass; with an optimizer, a step after each batch."""
    order, drawn = rng.permutation(len(pairs.synth)), pairs.draw(rng)
    losses = []
    for rows in _batches(params, order):
        # An exemplar that stands in many pairs of the batch goes through its head once.
        unique, place = np.unique(drawn[rows], return_inverse=True)
        with torch.set_grad_enabled(optimizer is not None):
            real = _forward(params.kind, heads[0], pairs.real[torch.from_numpy(unique)])
            synth = _forward(params.kind, heads[1], pairs.synth[torch.from_numpy(rows)])
            loss = nt_xent(
                synth,
                real[torch.from_numpy(place)],
                torch.from_numpy(pairs.concepts[rows]),
                params.temperature,
            )
            if params.orthogonality:
                loss = loss + params.orthogonality * sum(_departure(params.kind, head) for head in heads)
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses))


def _batches(params: Params, order: Int[np.ndarray, " pairs"]) -> list[Int[np.ndarray, " batch"]]:
    """Of about `batch_size` pairs; the last is no smaller than the others."""
    return np.array_split(order, max(1, round(len(order) / params.batch_size)))


@torch.no_grad()
def _validate(
    params: Params, heads: list[dict[str, Tensor]], pairs: Pairs, distractors: Tensor
) -> tuple[float, float, float]:
    """Loss, mAP and recall@10 over "these distractors + own exemplars". A monitor; evaluate ranks exactly.

    The loss is that of batches as in training, each epoch the same ones. mAP is the geometric mean over the
    kinds: neither may be given up for the other, however far apart they are. Distractors serve here alone and
    are no negatives of the loss: all of them lack what exemplars have in common, and a map that learned this
    would find exemplars, not sources.
    """
    synth = _forward(params.kind, heads[1], pairs.synth)
    real = _forward(params.kind, heads[0], pairs.real)
    others = _forward(params.kind, heads[0], distractors)
    own, concepts, kinds = (torch.from_numpy(one) for one in (pairs.own, pairs.concepts, pairs.kinds))
    blocks = zip(synth.split(VALIDATED), own.split(VALIDATED), strict=True)
    ranks = torch.cat([_ranks(some, real, others, their_own) for some, their_own in blocks])
    sizes, places = (own >= 0).sum(dim=1), torch.arange(own.shape[1])
    used = places < sizes[:, None]
    average_precision = ((places + 1) / ranks * used).sum(dim=1) / sizes
    recall = ((ranks <= 10) & used).sum(dim=1) / sizes
    order = np.random.default_rng(params.seed).permutation(len(synth))
    losses = [
        float(nt_xent(synth[rows], real[own[rows, 0]], concepts[rows], params.temperature))
        for rows in map(torch.from_numpy, _batches(params, order))
    ]
    of_kinds = torch.stack([average_precision[kinds == kind].mean() for kind in kinds.unique()])
    return float(np.mean(losses)), float(of_kinds.log().mean().exp()), float(recall.mean())


def _ranks(
    queries: Float[Tensor, "queries dim"],
    real: Float[Tensor, "exemplars dim"],
    others: Float[Tensor, "distractors dim"],
    own: Int[Tensor, "queries slots"],
) -> Int[Tensor, "queries slots"]:
    """Ranks of each query's own exemplars, best first; whatever in unused places."""
    scores = torch.einsum("qd,qsd->qs", queries, real[own.clamp(min=0)]).masked_fill(own < 0, -torch.inf)
    scores = scores.sort(dim=1, descending=True).values
    rivals = queries @ others.T
    ahead = [torch.count_nonzero(rivals >= level[:, None], dim=1) for level in scores.T]
    return torch.stack(ahead, dim=1) + torch.arange(1, own.shape[1] + 1)


def _forward(kind: str, head: dict[str, Tensor], features: Tensor) -> Tensor:
    return functional.normalize(apply_head(kind, head, features), dim=1)


def _departure(kind: str, head: dict[str, Tensor]) -> Tensor:
    """||W'W - 1||^2 / dim: 0 when the head keeps all angles."""
    if kind == "scale":
        return (head["scale"] ** 2 - 1).square().mean()
    weight = head["weight"]
    return (weight.T @ weight - torch.eye(len(weight))).square().sum() / len(weight)


def _unscale(head: dict[str, Tensor], scale: float) -> dict[str, np.ndarray]:
    """The head for raw features: what was trained on x / scale, times scale, which normalization removes."""
    factors = {"bias": scale, "bias_in": scale, "bias_out": scale}
    return {
        name: tensor.detach().numpy() * np.float32(factors.get(name, 1.0)) for name, tensor in head.items()
    }


def _pairs(queries: Queries, own: np.ndarray, query_set: FeatureSet, real: np.ndarray, scale: float) -> Pairs:
    """Features of these queries and of the exemplars in `own` alone; all divided by `scale`."""
    rows = np.unique(own[own >= 0])
    return Pairs(
        synth=torch.from_numpy(query_set.select(queries.image_ids) / np.float32(scale)),
        real=torch.from_numpy(real[rows] / np.float32(scale)),
        own=np.where(own < 0, -1, np.searchsorted(rows, own)),
        concepts=np.unique(queries.concept_ids, return_inverse=True)[1],
        kinds=np.unique(queries.kinds, return_inverse=True)[1],
    )


def _sample_rows(distractors: FeatureSet, count: int, seed: int) -> np.ndarray:
    """So many distractors drawn evenly, or all, in their order and as float32."""
    rng = np.random.default_rng([seed, 2])
    count = min(count, len(distractors))
    return distractors.take(np.sort(rng.choice(len(distractors), size=count, replace=False)))


def main(backbone: str) -> None:
    run(
        load_params(Params, "train_mapper"),
        backbone=backbone,
        features_dir=Path("data/features") / backbone,
        queries_path=Path("data/queries.parquet"),
        exemplars_path=Path("data/world/exemplars.parquet"),
        output_dir=Path("data/mappers") / backbone,
    )


if __name__ == "__main__":
    with command_line("stages.train_mapper", __doc__) as parser:
        parser.add_argument("backbone", help="a row of featurize.settings in params.yaml")
        main(parser.parse_args().backbone)
