"""Some queries on the device: their workspace, and the calls of the library that walk rows for them."""

import ctypes
import math
from typing import Any

import numpy as np
import torch

from attribution import cuda_library as cuda
from attribution.cuda_device import allocate, stream_of
from attribution.cuda_rows import Rows

# Below these, float32 arithmetic overflows nowhere (csrc/cuda/exact.h has the same).
SAFE_PRODUCT, SAFE_NORM = 2.0**100, 2.0**60
# Queries that are on the device already must not be longer: it is checked when their answers are read.
ENQUEUED_NORM = 2.0**30


class Batch:
    """which: the queries' numbers in the call. Nothing here waits for the device but what reads from it."""

    def __init__(
        self,
        library: Any,
        device: torch.device,
        storage: str,
        operand: str,
        center: torch.Tensor | None,
        which: np.ndarray,
        values: np.ndarray | torch.Tensor,
        offset: np.ndarray | None,
        capacity: int,
    ) -> None:
        self.library, self.device, self.which, self.capacity = library, device, which, capacity
        if isinstance(values, np.ndarray) and not values.flags.writeable:
            values = values.copy()  # or torch warns
        self.values = values if isinstance(values, torch.Tensor) else torch.from_numpy(values).to(device)
        self.offset = None if offset is None else torch.from_numpy(offset).to(device)
        self.shape = (len(which), values.shape[1])
        self.storage, self.operand = cuda.STORAGES.index(storage), cuda.OPERANDS.index(operand)
        self.center = center
        self.size = ENQUEUED_NORM  # not known without waiting
        if isinstance(values, np.ndarray):
            most = max(float(values.max(initial=0)), -float(values.min(initial=0)))
            self.size = most * values.shape[1] ** 0.5 * 1.001
        self.largest_offset = 0.0 if offset is None else float(np.abs(offset).max(initial=0))
        properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        self.processors = properties.multi_processor_count if properties else 3
        self.hopper = (
            cuda.kernel_allowed() == "hopper"
            and library.has_hopper
            and (properties is None or (properties.major, properties.minor) == (9, 0))
        )
        self.seen = 0
        self.fresh = True
        self.settled = False  # whether candidates have canonical scores, and are no more than are wanted
        self.workspace: torch.Tensor | None = None
        self.cuts: torch.Tensor | None = None
        self.answer_shapes: list[tuple[tuple[int, ...], torch.dtype]] = []
        self.noted: list[Rows] = []

    def note(self, rows: list[Rows], largest: float) -> None:
        """The rows that are walked next, and all that candidates may lie in."""
        if self.workspace is None or len(rows) != len(self.noted):
            self._allocate(len(rows))
        self.noted = rows
        self.slabs = (cuda.Slab * len(rows))(*(one.slab() for one in rows))
        self.plan.slabs = ctypes.cast(self.slabs, ctypes.POINTER(cuda.Slab))
        reach = largest * max(self.size, self.largest_offset) if largest > 0 else 0.0
        self.plan.unsafe = not (largest < SAFE_NORM and reach < SAFE_PRODUCT)
        if self.fresh:
            self.library.begin(ctypes.byref(self.plan))
            self.fresh = False
            if self.cuts is not None:
                self.library.set_cuts(ctypes.byref(self.plan), *cuda.pointers(self.cuts, None))
        else:
            self.library.replace_slabs(ctypes.byref(self.plan))

    def release(self) -> None:
        """The workspace may be used for others."""
        self.workspace = None
        del self.block

    def _allocate(self, slabs: int) -> None:
        self.at = self.library.layout(*self.shape, self.operand, self.capacity, slabs)
        self.workspace = allocate((self.at["all"],), torch.uint8, self.device, "candidates")
        pointers = cuda.pointers(self.center, self.values, self.offset, self.workspace)
        self.plan = cuda.Plan(
            *self.shape, self.storage, self.capacity, self.operand, *pointers, None, slabs, self.processors,
            self.hopper, 0, stream_of(self.device),
        )  # fmt: skip
        self.fresh = True

    # What the device has written; looked for when it is read, not while the device waits for its first work.

    @property
    def selected(self) -> torch.Tensor:
        """[queries, SELECTED_WORDS]"""
        return self._words("selected", self.shape[0], cuda.SELECTED_WORDS, torch.int32)

    @property
    def keys(self) -> torch.Tensor:
        """[queries, capacity]"""
        return self._words("buffer", self.shape[0], self.capacity, torch.int64)

    @property
    def fault(self) -> torch.Tensor:
        """[1, 1]"""
        return self._words("fault", 1, 1, torch.int64)

    def _words(self, place: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        assert self.workspace is not None
        some = self.workspace[self.at[place] : self.at[place] + rows * columns * dtype.itemsize]
        return some.view(dtype).view(rows, columns)

    # A walk for the best rows.

    def walk(self, index: int, rows: Rows, first: int, growth: int, search: cuda.Search) -> None:
        """All rows of the slab, in chunks that grow; who overflows stays as it was before that chunk."""
        # Once there are rows: without any, nothing is settled.
        self.settled = index + 1 == len(self.noted) and rows.rows.shape[0] > 0
        self.library.walk(
            ctypes.byref(self.plan), index, self.seen, first, growth, ctypes.byref(search), int(self.settled)
        )
        self.seen += rows.rows.shape[0]

    def walk_carefully(self, index: int, rows: Rows, first: int, growth: int, search: cuda.Search) -> None:
        """The same; a chunk in which some queries overflow is walked again for these, in halves. Waits."""
        self.settled = False
        begin, count = 0, rows.rows.shape[0]
        while begin < count:
            length = first - self.seen if self.seen < first else self.seen * (growth - 1)
            end = min(begin + -(-length // 256) * 256, count)
            self._chunk(index, begin, end, search, np.zeros(self.shape[0], bool))
            self.seen += end - begin
            begin = end

    def _chunk(self, index: int, begin: int, end: int, search: cuda.Search, still: np.ndarray) -> None:
        direct = self.seen == 0 and begin == 0 and end <= self.capacity and not still.any()
        self.library.chunk(ctypes.byref(self.plan), index, begin, end, int(direct), ctypes.byref(search), 0)
        overflowed = self.overflowed()
        if not overflowed.any():
            return
        if end - begin <= 1:
            raise AssertionError("a chunk of one row cannot overflow")
        middle = begin + max(1, (end - begin) // 2)
        if end - begin > 512:
            middle = begin + (end - begin) // 2 // 256 * 256
        for some in ((begin, middle), (middle, end)):
            self._hold(~overflowed)
            self._chunk(index, *some, search, ~overflowed)
        self._hold(still)

    def _hold(self, still: np.ndarray) -> None:
        words = torch.from_numpy(still.astype(np.int32)).to(self.device)
        self.library.set_cuts(ctypes.byref(self.plan), *cuda.pointers(None, words))

    def settle(self, search: cuda.Search) -> None:
        """Leaves canonical scores alone."""
        self.library.settle(ctypes.byref(self.plan), ctypes.byref(search))

    def finish(self, search: cuda.Search) -> np.ndarray:
        """Candidates are final and sorted; True for the queries that overflowed. Waits."""
        self.enqueue_answers(search, influence=search.b < 0)
        self.words = self.selected.cpu().numpy()
        overflowed = self.words[:, cuda.STATUS] == 1
        self.require_finite_scores()
        self.kept = np.flatnonzero(~overflowed)
        return overflowed

    def overflowed(self) -> np.ndarray:
        """True for queries whose chunk emitted more than there is room for. Waits."""
        return self.selected[:, cuda.STATUS].cpu().numpy() == 1

    def require_finite_scores(self) -> None:
        """ValueError names a query and a row whose score is beyond float32. Waits."""
        require_finite_scores(self.fault, self.which)

    def without(self, overflowed: np.ndarray) -> "Batch":
        """This batch, read as if it had only the other queries."""
        self.which = self.which[~overflowed]
        return self

    def wide(self) -> np.ndarray:
        """True for queries with more weight outside their top k than is kept."""
        return self.words[self.kept, cuda.WIDE] != 0

    def candidates(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the wanted ones among these queries: begin, ids and scores, sorted. Waits."""
        chosen = self.kept[wanted]
        fill = self.words[chosen, cuda.FILL].astype(np.int64)
        begin = np.concatenate([[0], np.cumsum(fill)]).astype(np.int64)
        # Only what was written: reading the rest would hide, from initcheck, what should not be read.
        at = np.arange(begin[-1]) + np.repeat(chosen * self.capacity - begin[:-1], fill)
        keys = self.keys.view(-1)[torch.from_numpy(at).to(self.device)].cpu().numpy().view(np.uint64)
        bits = (keys >> np.uint64(32)).astype(np.uint32)
        bits ^= np.where(bits >> 31 != 0, np.uint32(0x80000000), np.uint32(0xFFFFFFFF))
        ids = (np.uint64(0xFFFFFFFF) - (keys & np.uint64(0xFFFFFFFF))).astype(np.int64)
        return begin, ids, bits.view(np.float32)

    def answers(self) -> list[np.ndarray]:
        """ids and scores; if b < 0, also influence, support, shown, remainder, of narrow queries. Waits."""
        whole = len(self.kept) == self.shape[0]
        return [tensor.numpy()[... if whole else self.kept] for tensor in self._answers_in(self.block.cpu())]

    def enqueue_answers(self, search: cuda.Search, *, influence: bool = True) -> list[torch.Tensor]:
        """Final candidates, and in device memory what `answers` returns. Does not wait."""
        count, k = self.shape[0], search.k
        self.answer_shapes = [((count, k), torch.int64), ((count, k), torch.float32)]
        if influence:
            self.answer_shapes += [((count, k), torch.float32), ((count,), torch.int64)]
            self.answer_shapes += [((count,), torch.float32), ((count,), torch.float32)]
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.answer_shapes)
        self.block = allocate((size,), torch.uint8, self.device, "answers")
        tensors = self._answers_in(self.block)
        answers = cuda.Answers(*cuda.pointers(*tensors))
        self.library.finish(
            ctypes.byref(self.plan), ctypes.byref(search), ctypes.byref(answers), int(self.settled)
        )
        return tensors

    def _answers_in(self, block: torch.Tensor) -> list[torch.Tensor]:
        """One behind the other, for one copy to fetch; the wide ones first, so that none is padded."""
        found: dict[int, torch.Tensor] = {}
        at = 0
        for i, (shape, dtype) in sorted(enumerate(self.answer_shapes), key=lambda one: -one[1][1].itemsize):
            size = math.prod(shape) * dtype.itemsize
            found[i] = block[at : at + size].view(dtype).view(shape)
            at += size
        return [found[i] for i in range(len(found))]

    # Walks with sums.

    def begin_counting(self, cuts: np.ndarray, levels: np.ndarray, or_equal: bool) -> None:
        """Candidates will be what reaches the cuts."""
        self.cuts = torch.from_numpy(cuts).to(self.device)
        self.begin_tally(levels.shape[1], [None, None, levels], or_equal, 1.0, 0.0)

    def begin_tally(
        self, words: int, chosen: list[np.ndarray | None], or_equal: bool, inv_tau: float, b: float
    ) -> None:
        """Sums of so many words a query; chosen: best scores, top bins, thresholds."""
        self.compared = [
            None if values is None else torch.from_numpy(np.ascontiguousarray(values)).to(self.device)
            for values in chosen
        ]
        self.sums = torch.zeros((self.shape[0], words), dtype=torch.int64, device=self.device)
        best, top, thresholds, sums = cuda.pointers(*self.compared, self.sums)
        count = words if self.compared[2] is not None else 0
        self.sought = cuda.Tallied(best, top, thresholds, count, or_equal, inv_tau, b, sums)

    def count(self, index: int, rows: Rows) -> None:
        """Adds the rows of the slab whose scores exceed the thresholds."""
        self.library.count(ctypes.byref(self.plan), index, 0, rows.rows.shape[0], ctypes.byref(self.sought))

    def counted(self) -> tuple[np.ndarray, np.ndarray]:
        """The counts, and True for the queries that overflowed and have none. Waits."""
        overflowed = self.overflowed()
        self.require_finite_scores()
        return self.sums.cpu().numpy(), overflowed

    def tally(self, index: int, kind: int) -> None:
        """Adds all rows of the slab to the sums."""
        self.library.tally(ctypes.byref(self.plan), index, kind, ctypes.byref(self.sought))

    def tallied(self) -> np.ndarray:
        """[queries, words] of unsigned sums. Waits."""
        self.require_finite_scores()
        return self.sums.cpu().numpy().view(np.uint64)

    def score(self, ids: np.ndarray) -> np.ndarray:
        """Canonical scores of these rows; -inf for id -1. Waits."""
        rows = torch.from_numpy(ids).to(self.device)
        scores = torch.empty(ids.shape, dtype=torch.float32, device=self.device)
        wanted, written = cuda.pointers(rows, scores)
        self.library.score(ctypes.byref(self.plan), wanted, ids.shape[1], written)
        self.require_finite_scores()
        return scores.cpu().numpy()


def require_finite_scores(fault: torch.Tensor, which: np.ndarray) -> None:
    """ValueError names a query, by its number in `which`, and a row whose score is beyond float32. Waits."""
    code = int(fault.item())
    if code == -1:
        return
    row, query = divmod(code, 2**32)
    raise ValueError(
        f"query row {which[query]} and gallery row {row}: their score is beyond the range of float32"
    )
