"""What one would use on a GPU otherwise: torch, torch compiled, and a straightforward Triton kernel."""

import functools
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without Triton: its peer is left out
    triton = None

CHUNK_SCORES = 1 << 28  # scores of a chunk, in bfloat16, that torch holds at once
GROUP = 64  # rows of which the Triton kernel keeps the largest score


def peers(
    gallery: torch.Tensor, queries: torch.Tensor, k: int, inv_tau: float, b: float
) -> dict[str, Callable[[], Any]]:
    """Name -> a function that returns (ids, influence)."""
    half = queries.bfloat16()
    step = max(65536, CHUNK_SCORES // len(queries))
    found: dict[str, Callable[[], Any]] = {
        "torch": lambda: _chunked(_chunk, gallery, half, k, step, inv_tau, b),
        "torch, compiled": lambda: _chunked(_compiled(), gallery, half, k, step, inv_tau, b),
    }
    if triton is not None:
        found["triton"] = lambda: _by_groups(gallery, half, k, inv_tau, b)
    return found


@functools.cache
def _compiled() -> Callable[..., Any]:
    """For any number of rows and queries: compiling anew for each would take longer than to measure."""
    return torch.compile(_chunk, dynamic=True)


def _chunk(
    queries: torch.Tensor, rows: torch.Tensor, k: int, inv_tau: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores = queries @ rows.T
    best = scores.topk(min(k, scores.shape[1]), dim=1)
    return best.values, best.indices, torch.logsumexp(scores.float() * inv_tau, dim=1)


def _chunked(
    chunk: Callable[..., Any],
    gallery: torch.Tensor,
    queries: torch.Tensor,
    k: int,
    step: int,
    inv_tau: float,
    b: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top k and an ordinary softmax; the thresholded one needs a second walk, which is not charged."""
    values, ids, sums = [], [], []
    for first in range(0, len(gallery), step):
        best, at, total = chunk(queries, gallery[first : first + step], k, inv_tau)
        values.append(best)
        ids.append(at + first)
        sums.append(total)
    top = torch.cat(values, dim=1).topk(k, dim=1)
    influence = torch.exp(top.values.float() * inv_tau - torch.logsumexp(torch.stack(sums), dim=0)[:, None])
    return torch.cat(ids, dim=1).gather(1, top.indices), influence


def _by_groups(
    gallery: torch.Tensor, queries: torch.Tensor, k: int, inv_tau: float, b: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best rows lie in the k groups of rows with the best maxima: those are scored again."""
    count, (rows, dim) = len(queries), gallery.shape
    groups = -(-rows // GROUP)
    block_q = 16 if count <= 16 else 64 if count <= 64 else 128
    maxima = torch.empty((count, groups), device=gallery.device)
    sums = torch.empty((count, groups), device=gallery.device)
    # One axis: a grid's second one ends at 65,535. Query tiles innermost, so that rows come from memory once.
    query_tiles = triton.cdiv(count, block_q)
    grid = (query_tiles * triton.cdiv(rows, 128),)
    _group_kernel[grid](
        queries,
        gallery,
        maxima,
        sums,
        count,
        rows,
        dim,
        groups,
        inv_tau,
        block_q,
        128,
        64,
        GROUP,
        num_warps=8,
        num_stages=3,
    )
    chosen = maxima.topk(min(k, groups), dim=1).indices
    total = torch.logsumexp(sums, dim=1)
    ids, influence = [], []
    offsets = torch.arange(GROUP, device=gallery.device)
    for q in range(count):
        members = (chosen[q, :, None] * GROUP + offsets).flatten()
        scores = torch.where(members < rows, gallery[members.clamp(max=rows - 1)] @ queries[q], -torch.inf)
        best = scores.topk(k)
        ids.append(members[best.indices])
        influence.append(torch.exp(best.values.float() * inv_tau - total[q]))
    return torch.stack(ids), torch.stack(influence)


if triton is not None:

    @triton.jit
    def _group_kernel(
        queries, gallery, maxima, sums, count, rows, dim, groups, inv_tau,
        block_q: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr, group: tl.constexpr,
    ):  # fmt: skip
        query_tiles = tl.cdiv(count, block_q)
        tile = tl.program_id(0) // query_tiles
        q = tl.program_id(0) % query_tiles * block_q + tl.arange(0, block_q)
        n = tile.to(tl.int64) * block_n + tl.arange(0, block_n)
        scores = tl.zeros((block_q, block_n), tl.float32)
        for first in range(0, dim, block_d):
            d = first + tl.arange(0, block_d)
            a = tl.load(queries + q[:, None] * dim + d, mask=(q[:, None] < count) & (d < dim), other=0.0)
            x = tl.load(gallery + n[:, None] * dim + d, mask=(n[:, None] < rows) & (d < dim), other=0.0)
            scores = tl.dot(a, tl.trans(x), scores)
        scores = tl.where(n < rows, scores, float("-inf"))
        grouped = tl.reshape(scores, (block_q, block_n // group, group))
        largest = tl.max(grouped, 2)
        scaled = tl.sum(tl.exp((grouped - largest[:, :, None]) * inv_tau), 2)
        g = tile * (block_n // group) + tl.arange(0, block_n // group)
        to = q[:, None].to(tl.int64) * groups + g
        inside = (q[:, None] < count) & (g < groups)
        tl.store(maxima + to, largest, mask=inside)
        tl.store(sums + to, largest * inv_tau + tl.log(scaled), mask=inside)
