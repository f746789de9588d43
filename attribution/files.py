"""Files that are written whole or not at all, and content hashes that do not depend on where or when."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PARTIAL_PREFIX = ".partial-"
_serial = itertools.count()
# A full disk in the words of those who keep the number to themselves: numpy, pyarrow, safetensors.
_FULL = re.compile(rf"\d+ requested and \d+ written|No space left on device|errno {errno.ENOSPC}\b")


class DiskFullError(OSError):
    """Says in one line where there is no room, what was wanted, what there is. `errno` is ENOSPC."""


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """`path` holds either all of what was written, or what it held before.

    Yields a sibling that does not exist yet, with the same suffix, to be made a file or a folder; it takes
    the place of `path` when the block ends, and is removed when the block raises. Parent folders are made.
    What a killed process on this host left behind for the same `path` is cleared away first. Raises
    FileNotFoundError if the block wrote nothing, DiskFullError if it filled the disk, PermissionError for a
    folder that takes no files, FileExistsError rather than put a file where a folder or a device is.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK | os.X_OK):  # also where the disk is mounted read-only
        raise PermissionError(errno.EACCES, f"{path.parent.resolve()}: nothing can be written there")
    _remove_abandoned(path)
    stem = f"{PARTIAL_PREFIX}{socket.gethostname()}-{os.getpid()}-{next(_serial)}"
    partial = path.with_name(f"{stem}-{path.name}")
    try:
        yield partial
        if not partial.exists():
            raise FileNotFoundError(f"{path}: nothing was written to {partial.name}")
        _replace(partial, path, aside=path.with_name(f"{stem}-old-{path.name}"))
    except Exception as error:
        if isinstance(error, DiskFullError) or not _is_full_disk(error):
            raise
        written = _size(partial)
        _remove(partial)
        do = "what was half written is removed: make room, then run again"
        raise DiskFullError(
            errno.ENOSPC, f"{path}: the disk is full after {_amount(written)} of it, {_free(path)}; {do}"
        ) from error
    finally:
        _remove(partial)


def require_space(path: Path | str, wanted_bytes: int, what: str) -> None:
    """Returns only where `wanted_bytes` more fit on the disk that holds, or is to hold, `path`.

    `what` stands in the error: "40,000 images". Ask before the work, not after. Raises DiskFullError.
    """
    if wanted_bytes > _free_bytes(Path(path)):
        wanted = f"{_amount(wanted_bytes)} wanted for {what}"
        raise DiskFullError(errno.ENOSPC, f"{path}: {wanted}, {_free(Path(path))}; make room, then run again")


def write_json(path: Path | str, obj: Any) -> None:
    """The file holds `obj` as JSON with sorted keys: equal objects, equal bytes.

    Raises ValueError for NaN and infinity, which JSON lacks, and TypeError for what JSON cannot hold.
    """
    try:
        text = json.dumps(obj, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False, default=_plain)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: cannot be written as JSON: {error}") from error
    with atomic_path(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path | str) -> Any:
    """The object in the file. Raises FileNotFoundError or ValueError, both naming the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def is_of_the_system(error: BaseException) -> bool:
    """Whether the operating system refused a file, which may be whole; pyarrow says of damage OSError too."""
    return isinstance(error, OSError) and error.errno is not None


def sha256_file(path: Path | str) -> str:
    """64 hex digits of the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_bytes(data: bytes) -> str:
    """64 hex digits of the bytes."""
    return hashlib.sha256(data).hexdigest()


def content_key(*parts: object) -> str:
    """16 hex digits that are equal when the parts are equal in content.

    sha256 over canonical JSON. A `Path` stands for what is in the file, or for the sorted relative names and
    contents of the folder, never for its own name; dataclasses and numpy values stand for their values.
    Raises FileNotFoundError for a path to nothing, TypeError for a part without a canonical form.
    """
    text = json.dumps(_canonical(list(parts)), sort_keys=True, allow_nan=False, separators=(",", ":"))
    return sha256_bytes(text.encode())[:16]


def _canonical(part: Any) -> Any:
    if isinstance(part, Path):
        return {"sha256 of path": _path_digest(part)}
    if isinstance(part, bytes):
        return {"sha256 of bytes": sha256_bytes(part)}
    if isinstance(part, np.ndarray):
        return {"sha256 of array": [str(part.dtype), list(part.shape), sha256_bytes(part.tobytes())]}
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return {field.name: _canonical(getattr(part, field.name)) for field in dataclasses.fields(part)}
    if isinstance(part, dict):
        if not all(isinstance(key, str) for key in part):
            # json would turn 1 into "1" and so confuse two different keys.
            raise TypeError(f"content_key: a dict needs str keys, got {list(part)[:5]}")
        return {key: _canonical(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [_canonical(value) for value in part]
    if part is None or isinstance(part, str | int | float):
        return part
    return _plain(part)


def _path_digest(path: Path) -> Any:
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    members = sorted(member.relative_to(path).as_posix() for member in path.rglob("*") if member.is_file())
    return [
        [member, sha256_file(path / member)]
        for member in members
        if "__pycache__" not in member and not Path(member).name.startswith(PARTIAL_PREFIX)
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"no canonical form for {type(value).__name__}: {value!r}")


def _is_full_disk(error: Exception) -> bool:
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or (number is None and bool(_FULL.search(str(error))))


def _free(path: Path) -> str:
    return f"{_amount(_free_bytes(path))} free"


def _free_bytes(path: Path) -> int:
    path = path.absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def _size(path: Path) -> int:
    members = path.rglob("*") if path.is_dir() else (path,)
    return sum(member.lstat().st_size for member in members if member.is_file())


def _amount(count: int) -> str:
    """Bytes for a reader."""
    scaled, units = float(count), iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while scaled >= 1000 and unit != "TB":
        scaled, unit = scaled / 1000, next(units)
    return f"{scaled:.3g} {unit}"


def _replace(partial: Path, path: Path, aside: Path) -> None:
    if path.exists() and not path.is_file() and not partial.is_dir():
        # What somebody keeps in a folder is no earlier version of a file.
        raise FileExistsError(errno.EEXIST, f"{path}: wanted to write a file, but there is something else")
    if partial.is_dir() and path.exists():
        # rename() does not replace a folder that has something in it.
        path.rename(aside)
        partial.rename(path)
        _remove(aside)
    else:
        os.replace(partial, path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    host = re.escape(socket.gethostname())
    mine = re.compile(rf"{re.escape(PARTIAL_PREFIX)}{host}-(\d+)-\d+-(old-)?{re.escape(path.name)}")
    with os.scandir(path.parent) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(PARTIAL_PREFIX)]
    for name in names:
        match = mine.fullmatch(name)
        if match is None or _is_running(int(match[1])):
            continue
        if match[2] and not path.exists():  # ended between the two renames of _replace
            path.with_name(name).rename(path)
        else:
            _remove(path.with_name(name))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
