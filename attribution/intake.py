"""Pictures of one's own: each is taken in, with an id from its content, or skipped with a reason."""

from __future__ import annotations

import collections
import dataclasses
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from attribution.files import atomic_path, sha256_bytes
from attribution.images import ImageError, decode_image

# Larger files are skipped before they are read.
MAX_BYTES = 256 * 2**20
# The shorter side of anything longer than this cannot be brought to the size that a backbone takes.
MAX_ASPECT = 100
SHRUNK_QUALITY = 95
LONGEST_WEBP_SIDE = 16383
IN_FLIGHT = 4  # pictures that wait for each worker
# Formats in which several frames are an animation; in MPO, which phones write, they are views and thumbnails.
ANIMATED_FORMATS = ("GIF", "WEBP", "PNG", "AVIF", "TIFF")

Reason = Literal["unreadable", "no picture", "animated", "duplicate", "exemplar"]
# Reasons that say something is wrong with the data; the others are as they should be.
FAULTS = ("unreadable",)
SKIPPED_SCHEMA = pa.schema([(name, pa.string()) for name in ("table", "source", "reason", "detail")])


@dataclasses.dataclass(frozen=True)
class Picture:
    """An encoded picture; `source` says where it was found, so that a person finds it again."""

    source: str
    data: bytes
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Something that was found and not taken."""

    source: str
    reason: Reason
    detail: str


@dataclasses.dataclass(frozen=True)
class Taken:
    """A picture that decodes. `image_id` is derived from the bytes of its source, `data` is what to keep."""

    image_id: str
    source: str
    data: bytes
    caption: str


@dataclasses.dataclass(frozen=True)
class Rules:
    """How pictures are taken. Longer sides than `longest_side` are shrunk to it (null: all stay as they are).

    `animated`: take the first frame, or skip the file.
    """

    longest_side: int | None
    animated: Literal["first_frame", "skip"]

    def __post_init__(self) -> None:
        if self.longest_side is not None and not 1 <= self.longest_side <= LONGEST_WEBP_SIDE:
            wanted = f"wanted 1 to {LONGEST_WEBP_SIDE}, or null"
            raise ValueError(f"longest_side: {wanted}, got {self.longest_side}")


def take(picture: Picture, rules: Rules) -> Taken | Skipped:
    """The picture with its encoded bytes as they came, unless it must be shrunk, or why it is skipped.

    16-bit, CMYK, palette, transparent and EXIF-rotated pictures are taken: `attribution.images.decode_image`
    gives them all as upright RGB.
    """
    try:
        image = decode_image(picture.data, name=picture.source)
    except ImageError as error:
        return Skipped(picture.source, "unreadable", str(error).removeprefix(f"{picture.source}: "))
    if max(image.size) > MAX_ASPECT * min(image.size):
        sides = f"{image.width} x {image.height}"
        return Skipped(picture.source, "unreadable", f"{sides} pixels: sides too unequal for any backbone")
    if rules.animated == "skip" and (frames := _frames(picture.data)) > 1:
        return Skipped(picture.source, "animated", f"{frames} frames")
    data = picture.data
    if rules.longest_side is not None and max(image.size) > rules.longest_side:
        data = _shrunk(image, rules.longest_side)
    return Taken(sha256_bytes(picture.data)[:16], picture.source, data, picture.caption)


def take_all(
    pictures: Iterable[Picture | Skipped], rules: Rules, *, workers: int
) -> Iterator[Taken | Skipped]:
    """What comes of each, in their order; a few pictures for each worker are in memory."""
    waiting: collections.deque[Skipped | Future[Taken | Skipped]] = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        for picture in pictures:
            if isinstance(picture, Skipped):
                waiting.append(picture)
            else:
                waiting.append(pool.submit(take, picture, rules))
            if len(waiting) > IN_FLIGHT * workers:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())


def write_skipped(path: Path | str, skipped: Iterable[tuple[str, Skipped]]) -> None:
    """The parquet file holds table, source, reason and detail of each (table, skipped), in order."""
    rows = [{"table": table, **dataclasses.asdict(one)} for table, one in skipped]
    with atomic_path(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, SKIPPED_SCHEMA), partial, compression="zstd")


def check_share(where: str, faults: list[Skipped], seen: int, share: float) -> None:
    """Raises ValueError, with the first of the faults, where more than `share` of what was seen is faulty."""
    if len(faults) > share * seen:
        first = "; ".join(f"{one.source}: {one.detail}" for one in faults[:3])
        raise ValueError(
            f"{where}: {len(faults)} of {seen} cannot be used, more than the share {share} that "
            f"import_data.max_skipped_share allows ({first}{'; ...' if len(faults) > 3 else ''})"
        )


def _result(waiting: Skipped | Future[Taken | Skipped]) -> Taken | Skipped:
    return waiting if isinstance(waiting, Skipped) else waiting.result()


def _frames(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return getattr(image, "n_frames", 1) if image.format in ANIMATED_FORMATS else 1
    except Exception:  # on corrupt bytes behind the first frame Pillow's decoders raise nearly anything
        return 1


def _shrunk(image: Image.Image, longest_side: int) -> bytes:
    image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=SHRUNK_QUALITY)
    return file.getvalue()
