"""Stages that keep one file or folder per concept: what is done already, what must go, what came of it."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from attribution.files import content_key

T = TypeVar("T")


@dataclass
class Summary:
    """What a run did with each item, for one line at its end."""

    noun: str
    done: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    pruned: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = (len(self.done), len(self.reused), len(self.pruned), len(self.failed))
        return f"{self.noun}: {counts[0]} done, {counts[1]} reused, {counts[2]} pruned, {counts[3]} failed"

    def raise_failures(self) -> None:
        """Raises RuntimeError naming the items that failed; what is done stays done."""
        if self.failed:
            reasons = "; ".join(f"{item}: {reason}" for item, reason in sorted(self.failed.items()))
            raise RuntimeError(f"{self}: {reasons}")


def code_key(*modules: str) -> str:
    """Equal while the modules (paths of .py files) hold equal code: comments and docstrings do not count."""
    return content_key([_code(Path(module)) for module in modules])


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`items` in order, `size` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


def batches(wanted: Sequence[T], pending: Sequence[T], size: int) -> list[Sequence[T]]:
    """`pending`, part of `wanted`, in batches of `size`: first the chunks of `wanted` of which none is done.

    So a run that resumes forms the batches an undisturbed run would have formed, whichever of them were done:
    batched arithmetic rounds by batch, and the results stay equal to the bit.
    """
    whole, rest = [], []
    for chunk in chunks(wanted, size):
        left = [item for item in chunk if item in pending]
        if len(left) == len(chunk):
            whole.append(chunk)
        else:
            rest += left
    return [*whole, *chunks(rest, size)]


def prune(folder: Path, keep: Iterable[str]) -> list[str]:
    """Nothing is left in `folder` but the names to keep; returns the names that went."""
    wanted = set(keep)
    stale = sorted((path for path in folder.glob("*") if path.name not in wanted), key=lambda path: path.name)
    for path in stale:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in stale]


def _code(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node, clean=False) is not None
            node.body = node.body[has_docstring:]
    return ast.dump(tree)
