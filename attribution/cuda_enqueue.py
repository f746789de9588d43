"""Attribution that is queued on a stream and not waited for, so that a CUDA graph can hold it."""

from dataclasses import dataclass

import numpy as np
import torch

from attribution import cuda_library as cuda
from attribution import cuda_walk, similarity
from attribution.cuda_batch import ENQUEUED_NORM, Batch, require_finite_scores
from attribution.cuda_call import Settings
from attribution.cuda_device import require_current
from attribution.cuda_gallery import Gallery


@dataclass(frozen=True)
class Enqueued:
    """Answers in device memory, valid once the stream has come to them, and only where `settled`."""

    gallery: Gallery
    largest_norm: torch.Tensor  # of the queries
    selected: torch.Tensor  # [queries, SELECTED_WORDS]
    fault: torch.Tensor
    ids: torch.Tensor
    scores: torch.Tensor
    influence: torch.Tensor
    support: torch.Tensor
    support_mass: torch.Tensor
    remainder: torch.Tensor

    def settled(self) -> np.ndarray:
        """True for queries whose answer is final; ask `attribute` about the others. Waits."""
        norm = float(self.largest_norm)
        if not norm <= ENQUEUED_NORM:
            raise ValueError(f"enqueue: wanted finite queries with |q| <= 2^30, got one with |q| = {norm}")
        require_finite_scores(self.fault, np.arange(len(self.selected)))
        words = self.selected.cpu().numpy()
        return (words[:, cuda.STATUS] == 0) & (words[:, cuda.WIDE] == 0)


def enqueue(queries: torch.Tensor, gallery: Gallery, *, k: int, inv_tau: float, b: float) -> Enqueued:
    """`attribute`, queued on the current stream without waiting for it, so that a CUDA graph can hold it.

    queries: [queries, dim] of float32 on the gallery's device, finite, |q| <= 2^30; b < 0.
    """
    k = similarity.check_settings(k, inv_tau, b)
    wanted = (torch.float32, gallery.device, gallery.dim)
    if queries.ndim != 2 or (queries.dtype, queries.device, queries.shape[1]) != wanted or b == 0:
        raise ValueError(
            f"enqueue: wanted float32 queries [queries, {gallery.dim}] on {gallery.device} and b < 0, got "
            f"{queries.dtype} {list(queries.shape)} on {queries.device} and b = {b}"
        )
    search = Settings(k, float(inv_tau), float(b)).search()
    require_current(gallery.library, gallery.device)
    operand = cuda_walk.coded_operand(gallery, len(queries), search.k)
    capacity, first, growth = cuda_walk.plan_chunks(
        search.k, search.window, gallery.rows, len(queries), operand
    )
    center = None if operand is None or gallery.coded is None else gallery.coded.center
    shards, bound = gallery.scaled(None, coded=operand is not None)
    values = queries.detach().contiguous()
    which = np.arange(len(values))
    batch = Batch(
        gallery.library, gallery.device, gallery.storage, operand or gallery.storage, center, which, values,
        None, capacity,
    )  # fmt: skip
    batch.note(shards, bound)
    for index, rows in enumerate(shards):
        batch.walk(index, rows, first, growth, search)
    norms = torch.linalg.vector_norm(values, dim=1)
    largest = norms.amax() if len(values) else norms.sum()
    answers = batch.enqueue_answers(search)
    # Not the batch itself: its workspace may be used by whoever comes next on this stream.
    return Enqueued(gallery, largest, batch.selected.clone(), batch.fault.clone(), *answers)
