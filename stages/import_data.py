"""Exemplars and distractors of one's own, in place of the drawn world: docs/own_data.md.

In:   what import_data.exemplars and import_data.distractors name: a folder tree or a table; an image folder,
      WebDataset tars or parquet files as img2dataset writes them.
Out:  data/world/exemplars.parquet and data/world/distractors/part-*.parquet, as `render` writes them, and
      data/world/skipped.parquet: what was found and not taken, with the reason.
Cost: CPU time of 0.2 ms a picture of 64 x 64, 35 ms a photo of 12 megapixels, 200 ms where it is shrunk.

Each tar, parquet file and group of image files that is done stays in data/world/.imported: a killed run goes
on where it was, and one more tar costs one tar. The folder takes as much disk as the distractors at most, and
may be deleted at any time. At most one part of the distractors is in memory, and all exemplars.
"""

from __future__ import annotations

import collections
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from attribution import images, intake, sources
from attribution.command import command_line
from attribution.exemplar_table import SPLITS, Entry, read_entries
from attribution.files import atomic_path, content_key, read_json, require_space, write_json
from attribution.images import write_image_table
from attribution.intake import FAULTS, Rules, Skipped, Taken, check_share, take_all, write_skipped
from attribution.params import load_params
from attribution.sources import Unit, list_units, read_file
from attribution.splits import Shares, assign_splits
from stages.imports import code_key
from stages.incremental import alone_in, prune

# A part is also a row group at most, which its readers hold in memory.
PART_BYTES = 256 * 2**20
RECORD = "unit.json"
NO_DISTRACTORS = pa.schema(
    [*((name, pa.string()) for name in ("image_id", "caption", "source")), ("image", pa.binary())]
).empty_table()
TEXTS = ("image_id", "concept_id", "kind", "noun", "group", "split", "caption", "source")


@dataclass(frozen=True)
class Params:
    """`exemplars` and `distractors` are paths from the repository's root. `workers` changes the speed alone.

    `distractors` null: there are no pictures of them, every backbone has `ready_distractors`.
    `max_skipped_share`: of each table's pictures, how many may be unreadable before the stage fails.
    """

    exemplars: str
    distractors: str | None
    seed: int
    splits: Shares
    longest_side: int | None
    animated: Literal["first_frame", "skip"]
    max_skipped_share: float
    rows_per_part: int
    workers: int

    def __post_init__(self) -> None:
        if "" in (self.exemplars, self.distractors):
            raise ValueError("exemplars, distractors: wanted paths (distractors may be null), got ''")
        if self.rows_per_part < 1 or self.workers < 1:
            raise ValueError(f"rows_per_part {self.rows_per_part}, workers {self.workers}: wanted 1 or more")
        if not 0 <= self.max_skipped_share <= 1:
            raise ValueError(f"max_skipped_share: wanted a share of 1, got {self.max_skipped_share}")
        _ = self.rules  # Rules checks its own

    @property
    def rules(self) -> Rules:
        """How pictures are taken."""
        return Rules(self.longest_side, self.animated)


@dataclass(frozen=True)
class FinishedUnit:
    """A unit's parts on disk, how many pictures it held, and which of them were skipped."""

    parts: list[Path]
    found: int
    skipped: list[Skipped]


def run(params: Params, *, root: Path, exemplars: Path, distractors: Path, skipped: Path, work: Path) -> str:
    """Writes both tables, each whole or not at all, and returns a line on what came of it.

    `skipped` is written whatever happens. Raises ValueError where too many pictures are unreadable, a split
    is left without concepts, or the lists themselves are wrong, StageError where another run is at work.
    """
    passed_over: list[tuple[str, Skipped]] = []
    with alone_in(work):
        try:
            table = exemplar_table(params, root / params.exemplars, passed_over)
            ids = table["image_id"].to_pylist()
            with atomic_path(distractors) as folder:
                folder.mkdir()
                if params.distractors is None:
                    write_image_table(folder / "part-00000.parquet", NO_DISTRACTORS)
                    count = 0
                else:
                    source = root / params.distractors
                    count = import_distractors(params, source, folder, work, ids, passed_over)
            write_image_table(exemplars, table)
        finally:
            write_skipped(skipped, passed_over)
    split_of = dict(zip(table["concept_id"].to_pylist(), table["split"].to_pylist(), strict=True))
    by_split = collections.Counter(split_of.values())
    by_reason = collections.Counter(one.reason for _, one in passed_over)
    splits = ", ".join(f"{by_split[split]} {split}" for split in SPLITS)
    reasons = ", ".join(f"{times:,} {reason}" for reason, times in sorted(by_reason.items())) or "none"
    return (
        f"import_data: {len(table):,} exemplars of {len(split_of):,} concepts ({splits}), {count:,} "
        f"distractors; skipped {len(passed_over):,} ({reasons}), listed in {skipped}"
    )


def exemplar_table(params: Params, source: Path, passed_over: list[tuple[str, Skipped]]) -> pa.Table:
    """One row per exemplar; what is skipped is appended to `passed_over`."""
    entries = read_entries(source)
    found = (read_file(entry.path, entry.source, entry.caption) for entry in entries)
    taken: dict[str, tuple[Entry, Taken]] = {}
    skipped = []
    progress = tqdm(entries, desc="exemplars", unit="image", disable=None)
    for entry, one in zip(progress, take_all(found, params.rules, workers=params.workers), strict=True):
        if isinstance(one, Taken) and one.image_id in taken:
            other, _ = taken[one.image_id]
            detail = f"the same picture as {other.source} of concept {other.concept_id}"
            one = Skipped(entry.source, "duplicate", detail)
        if isinstance(one, Skipped):
            skipped.append(one)
        else:
            taken[one.image_id] = (entry, one)
    passed_over += [("exemplars", one) for one in skipped]
    faults = [one for one in skipped if one.reason in FAULTS]
    check_share(str(source), faults, len(entries), params.max_skipped_share)
    kept = [entry for entry, _ in taken.values()]
    splits = assign_splits(kept, params.splits, params.seed)
    for split in SPLITS:
        if split not in splits.values():
            raise ValueError(
                f"{source}: no concept of split {split} among {len(splits)}; give more concepts, a column "
                f"split, or another share in import_data.splits"
            )
    train = {(entry.kind, entry.group) for entry in kept if splits[entry.concept_id] == "train"}
    rows = [
        {
            **entry.texts,
            "image_id": one.image_id,
            "concept_id": entry.concept_id,
            "kind": entry.kind,
            "noun": entry.noun,
            "group": entry.group,
            "split": splits[entry.concept_id],
            "seen": (entry.kind, entry.group) in train,
            "fresh": True,
            # What the answers show beside a picture: without words, where it lies.
            "caption": one.caption or one.source,
            "source": one.source,
            "image": one.data,
        }
        for entry, one in taken.values()
    ]
    texts = [*TEXTS, *(kept[0].texts if kept else ())]
    bools = [("seen", pa.bool_()), ("fresh", pa.bool_())]
    schema = pa.schema([*((name, pa.string()) for name in texts), *bools, ("image", pa.binary())])
    return pa.Table.from_pylist(rows, schema)


def import_distractors(
    params: Params,
    source: Path,
    folder: Path,
    work: Path,
    exemplar_ids: Iterable[str],
    passed_over: list[tuple[str, Skipped]],
) -> int:
    """Writes the parts into `folder`, no picture twice and no exemplar; returns how many rows they have."""
    units, skipped = list_units(source, files_per_unit=params.rows_per_part)
    shared = content_key(
        params.rules,
        params.rows_per_part,
        code_key(images.__file__, intake.__file__, sources.__file__, __file__),
    )
    kept = [content_key(unit.key(), shared) for unit in units]
    if params.longest_side is None:  # otherwise pictures shrink, and nobody knows to what
        todo = [unit for unit, key in zip(units, kept, strict=True) if not (work / key / RECORD).is_file()]
        require_space(work, sum(unit.size() for unit in todo), f"the pictures of {source}")
    of_exemplars, taken = {int(one, 16) for one in exemplar_ids}, set[int]()
    found, parts = len(skipped), 0
    with tqdm(desc="distractors", unit="image", disable=None) as progress:
        for unit, key in zip(units, kept, strict=True):
            finished = finish_unit(unit, work / key, params)
            for part in finished.parts:
                target = folder / f"part-{parts:05d}.parquet"
                skipped += place_part(part, target, taken, of_exemplars)
                parts += target.exists()
            skipped += finished.skipped
            found += finished.found
            progress.update(finished.found)
    prune(work, kept)
    passed_over += [("distractors", one) for one in skipped]
    faults = [one for one in skipped if one.reason in FAULTS]
    check_share(str(source), faults, found, params.max_skipped_share)
    if not parts:
        raise ValueError(f"{source}: of {found} pictures none is left; see skipped.parquet")
    return len(taken)


def finish_unit(unit: Unit, folder: Path, params: Params) -> FinishedUnit:
    """The unit's parts in `folder`, made now unless an earlier run finished them."""
    if not (folder / RECORD).is_file():
        require_space(folder, unit.size(), f"the pictures of {unit.names[0]}")
        with atomic_path(folder) as partial:
            partial.mkdir()
            skipped: list[Skipped] = []
            found = 0

            def taken() -> Iterator[Taken]:
                nonlocal found
                ids = set()
                for one in take_all(unit.read(), params.rules, workers=params.workers):
                    found += 1
                    if isinstance(one, Taken) and one.image_id in ids:
                        one = Skipped(one.source, "duplicate", f"the same picture as image {one.image_id}")
                    if isinstance(one, Skipped):
                        skipped.append(one)
                    else:
                        ids.add(one.image_id)
                        yield one

            for number, table in enumerate(part_tables(taken(), params.rows_per_part)):
                write_image_table(partial / f"part-{number:05d}.parquet", table)
            write_json(partial / RECORD, {"found": found, "skipped": [asdict(one) for one in skipped]})
    record = read_json(folder / RECORD)
    return FinishedUnit(
        sorted(folder.glob("part-*.parquet")), record["found"], [Skipped(**one) for one in record["skipped"]]
    )


def part_tables(pictures: Iterable[Taken], rows_per_part: int) -> Iterator[pa.Table]:
    """Tables of `rows_per_part` rows, or fewer where the pictures are large."""
    rows: list[dict[str, object]] = []
    held_bytes = 0
    for one in pictures:
        caption = one.caption or one.source
        rows.append({"image_id": one.image_id, "caption": caption, "source": one.source, "image": one.data})
        held_bytes += len(one.data)
        if len(rows) == rows_per_part or held_bytes >= PART_BYTES:
            yield pa.Table.from_pylist(rows)
            rows, held_bytes = [], 0
    if rows:
        yield pa.Table.from_pylist(rows)


def place_part(part: Path, target: Path, taken: set[int], of_exemplars: set[int]) -> list[Skipped]:
    """Puts the rows that are new at `target`, linked when all are; returns those that are not."""
    columns = pq.read_table(part, columns=["image_id", "source"])
    skipped: list[Skipped] = []
    is_new = []
    for image_id, source in zip(columns["image_id"].to_pylist(), columns["source"].to_pylist(), strict=True):
        number = int(image_id, 16)
        is_new.append(number not in taken and number not in of_exemplars)
        if is_new[-1]:
            taken.add(number)
        elif number in of_exemplars:
            skipped.append(Skipped(source, "exemplar", f"image {image_id} is an exemplar"))
        else:
            skipped.append(Skipped(source, "duplicate", f"the same picture as image {image_id}"))
    if all(is_new):
        try:
            os.link(part, target)
        except OSError:  # another disk, or one without links
            shutil.copyfile(part, target)
    elif any(is_new):
        write_image_table(target, pq.read_table(part).filter(pa.array(np.array(is_new))))
    return skipped


def main() -> None:
    """`python -m stages.import_data`, from the repository's root or a world's folder."""
    world = Path("data/world")
    with command_line("stages.import_data", __doc__) as parser:
        parser.parse_args()
        line = run(
            load_params(Params, "import_data"),
            root=Path(),
            exemplars=world / "exemplars.parquet",
            distractors=world / "distractors",
            skipped=world / "skipped.parquet",
            work=world / ".imported",
        )
        print(line)


if __name__ == "__main__":
    main()
