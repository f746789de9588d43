"""Command lines: a fault that has been foreseen is told in a line, one that has not with its traceback."""

from __future__ import annotations

import argparse
import contextlib
import linecache
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORESEEN = (ValueError, OSError, RuntimeError, ImportError)


@contextlib.contextmanager
def command_line(module: str, doc: str | None) -> Iterator[argparse.ArgumentParser]:
    """A parser that tells `doc` for --help; a fault in the block ends the program with a line, status 1.

    An interrupt ends it with status 130. Errors that `in_a_line` has no line for are raised.
    """
    name = module.rpartition(".")[2]
    parser = argparse.ArgumentParser(
        f"python -m {module}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    try:
        yield parser
    except KeyboardInterrupt:
        print(f"{name}: interrupted; nothing is half written, run it again", file=sys.stderr)
        sys.exit(130)
    except FORESEEN as error:
        line = in_a_line(error)
        if line is None:
            raise
        sys.exit(f"{name}: {line}")


def in_a_line(error: BaseException) -> str | None:
    """What is wrong, for a person who is to put it right; None for an error that nobody foresaw.

    Foreseen is what a `raise` of this repository says in its own words, and what an operating system says of
    a file.
    """
    notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, OSError) and error.errno is not None:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}{notes}"
    for frame in traceback.extract_tb(error.__traceback__)[-1:]:
        file = Path(frame.filename)
        # numpy's errors from C have this repository's line too, but no `raise` on it.
        is_said = linecache.getline(frame.filename, frame.lineno or 0).lstrip().startswith("raise ")
        if is_said and file.is_relative_to(ROOT) and "site-packages" not in file.parts:
            return f"{error}{notes}"
    return None
