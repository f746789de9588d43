"""What one backbone says of every exemplar, query and distractor.

In:   data/world/exemplars.parquet, data/world/distractors/, rows of data/queries.parquet with their images in
      data/synthesized/ and data/shipped/synthesized.parquet, the backbone's weights.
Out:  data/features/<backbone>/{exemplars,queries,distractors}: feature sets of one space.
Cost: about 15 s for 27,000 images of 64 x 64 and a small net on 2 CPU cores, a few seconds for pixels.

Finished shards stay in data/features/.shards/<backbone>, named by the digest of their images, their space and
the code that made them: a killed run goes on where it was, and images added to the end of a table cost one
shard; those added before others cost the shards of these too. A second run of the backbone is refused. The
folder takes as much disk as the features at most, and may be deleted at any time. Whether the rest fits on
the disk is asked before anything is computed.

Where a backbone has `ready_distractors`, these vectors are its distractors, opened where they lie
(attribution.clip_retrieval); they are read once, to be checked: some four seconds a gigabyte.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float
from tqdm import tqdm

from attribution import backbone_settings, backbones, images, nets, preprocessing, weights
from attribution.backbone_settings import ReadyFeatures
from attribution.backbones import Backbone, BackboneSettings, load_backbone
from attribution.clip_retrieval import link_features, said_missing
from attribution.command import command_line
from attribution.features import FeatureSet, assemble_feature_set, write_shard
from attribution.files import atomic_path, content_key, read_json, require_space, sha256_bytes
from attribution.images import decode_image, iterate_encoded, table_parts
from attribution.params import load_params
from attribution.same_model import check_model, least_cosine, pictures_of
from stages.decoding import EncodedImage, PixelLoader, pixel_loader, prepare
from stages.incremental import alone_in

T = TypeVar("T")

# What a vector depends on besides its image and its space.
CODE = tuple(
    Path(module.__file__)
    for module in (backbone_settings, backbones, images, nets, preprocessing, weights)
    if module.__file__
)
FEWEST_BATCHES = 16  # that a shard is divided into on a CPU, so that of few images, too, every core has some
COMPARED = 16  # pictures that are encoded again where ready features still have theirs


@dataclass(frozen=True)
class Params:
    """`backbones` are the graph's, each with a row in `settings`; a kill costs `shard_rows` images.

    On a CPU, `workers` threads decode and resize and encode, each a batch of its own; for a GPU they decode
    and resize, and are processes where there are many images. Fewer take less memory. One per core when null.
    They change no result.
    """

    backbones: tuple[str, ...]
    shard_rows: int
    settings: dict[str, BackboneSettings]
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in self.backbones:
            self.settings_of(name)
        if self.shard_rows < 1:
            raise ValueError(f"shard_rows {self.shard_rows}: wanted 1 or more")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers {self.workers}: wanted 1 or more, or null")

    def settings_of(self, backbone: str) -> BackboneSettings:
        """Raises ValueError for a backbone without settings."""
        if backbone not in self.settings:
            raise ValueError(f"no settings for backbone {backbone}; there are: {', '.join(self.settings)}")
        return self.settings[backbone]


@dataclass
class Shard:
    """A file with one vector per image; `rows` are those that are not in it yet."""

    file: Path
    image_ids: list[str]
    digests: list[str]
    rows: list[np.ndarray] = field(default_factory=list)


# Vectors of images in order, a batch at a time, each with the shard that it is of.
Encode = Callable[[Iterable[tuple[Shard, Sequence[EncodedImage]]]], Iterator[tuple[Shard, np.ndarray]]]


@dataclass
class ShardStore:
    """Shards of one backbone on disk, by content; `encoded` counts the images that were not there yet."""

    folder: Path
    backbone: Backbone
    used: set[str] = field(default_factory=set)
    encoded: int = 0

    def __post_init__(self) -> None:
        self.code = content_key(*CODE)

    def shards_of(
        self, groups: Iterable[Sequence[EncodedImage]], encode: Encode, advance: Callable[[int], object]
    ) -> list[Shard]:
        """A shard for each group in order, its file made now unless an earlier run finished it."""
        space, shards = self.backbone.space, []

        def unfinished() -> Iterator[tuple[Shard, Sequence[EncodedImage]]]:
            for group in groups:
                digests = [image.sha256 for image in group]
                file = self.folder / f"{content_key(self.code, space, digests)}.npy"
                shards.append(Shard(file, [image.image_id for image in group], digests))
                self.used.add(file.name)
                if file.exists():
                    advance(len(group))
                else:
                    yield shards[-1], group

        for shard, vectors in encode(unfinished()):
            shard.rows.append(vectors)
            advance(len(vectors))
            if sum(map(len, shard.rows)) == len(shard.image_ids):
                write_shard(shard.file, space, shard.image_ids, np.concatenate(shard.rows))
                shard.rows.clear()
                self.encoded += len(shard.image_ids)
        return shards

    def check_room(self, images: int) -> None:
        """Raises OSError if what is still to be written of so many vectors does not fit on the disk."""
        space = self.backbone.space
        finished = sum(file.stat().st_size for file in self.folder.glob("*.npy"))
        wanted = images * space.dim * np.dtype(space.dtype).itemsize - finished
        require_space(self.folder, wanted, f"what is left of {images:,} vectors")

    def prune(self) -> None:
        """Only the shards of this run are left."""
        for file in self.folder.glob("*.npy"):
            if file.name not in self.used:
                file.unlink()


def run(
    params: Params,
    backbone: str,
    *,
    exemplars: Path,
    distractors: Path,
    queries: Path,
    synthesized: Path,
    shipped: Path,
    features: Path,
    shards: Path,
    root: Path,
) -> str:
    """Writes `features`/{exemplars,queries,distractors} and returns a line on what it took.

    The sets follow their tables' order; that of queries is shipped ones, then fresh ones by concept. Raises
    ValueError naming the image that cannot be read, or a query that no table holds.
    """
    settings = params.settings_of(backbone)
    loaded = load_backbone(backbone, settings, root=root)
    ready, said = settings.ready_distractors, ""
    if ready is not None:
        check_model(backbone, settings, ready.model)
    started = time.perf_counter()  # what follows grows with the images; loading does not
    workers = params.workers or len(os.sched_getaffinity(0))
    store = ShardStore(shards / backbone, loaded)
    sets = {
        "exemplars": lambda: read_encoded(exemplars),
        "queries": lambda: read_queries(queries, synthesized, shipped),
        "distractors": lambda: read_encoded(distractors),
    }
    counts = {"exemplars": count_rows(exemplars), "queries": count_rows(queries)}
    if ready is None:
        counts["distractors"] = count_rows(distractors)
        if not counts["distractors"]:
            do = f"name ready_distractors in featurize.settings.{backbone}, or pictures in import_data"
            raise ValueError(f"{distractors}: no distractors; {do}")
    total = sum(counts.values())
    store.check_room(total)
    with (
        encoder(loaded, workers, total) as encode,
        tqdm(total=total, desc=f"featurize {backbone}", unit="image", disable=None) as progress,
    ):
        for name in counts:
            with contextlib.closing(read_ahead(grouped(sets[name](), params.shard_rows))) as groups:
                done = store.shards_of(groups, encode, progress.update)
            made = assemble_feature_set(
                features / backbone / name,
                loaded.space,
                [image_id for shard in done for image_id in shard.image_ids],
                [shard.file for shard in done],
                image_sha256=[digest for shard in done for digest in shard.digests],
            )
            if ready is not None and name == "exemplars":
                # Early, for what is refused is refused here.
                paused = time.perf_counter()
                said = "; " + link_ready(ready, loaded, made, root, features / backbone / "distractors")
                started += time.perf_counter() - paused
    store.prune()
    elapsed_s = time.perf_counter() - started
    return (
        f"featurize {backbone}: {total} images ({total - store.encoded} from finished shards) "
        f"in {elapsed_s:.1f} s, {total / elapsed_s:.0f} images/s{said}"
    )


def link_ready(
    ready: ReadyFeatures, backbone: Backbone, exemplars: FeatureSet, root: Path, path: Path
) -> str:
    """Makes the feature set at `path` of the ready features but those of exemplars; returns what is known.

    Raises ValueError where the dim, the dtype, the lengths or the pictures are not the backbone's, and where
    no features are left.
    """
    source, space = root / ready.folder, backbone.space
    with atomic_path(path) as partial:
        linked = link_features(
            source, partial, space, name_column=ready.name_column, apart_from=exemplars.vectors()
        )
        left_out = sum(len(shard["without"]) for shard in read_json(partial / "space.json")["shards"])
        if not len(linked):
            what = f"all {left_out:,} rows are of exemplars, and left out"
            raise ValueError(f"{source}: {what}; wanted features of distractors")
        said = f"{len(linked):,} distractors ready made in {source}, {left_out:,} left out as exemplars, "
        pictures = pictures_of(linked, source, COMPARED)
        if not pictures:
            known = f"by {ready.model} as params.yaml says: none of their pictures is here"
            return said + known + said_missing(source)
        encoded = backbone.encode([decode_image(file) for file in pictures.values()])
        least = least_cosine(source, linked, list(pictures), encoded)
    known = f"{len(pictures)} of them encoded again: cosines of {least:.4f} and more"
    return said + known + said_missing(source)


def read_encoded(table: Path) -> Iterator[EncodedImage]:
    """The images of a table in its order, undecoded."""
    for batch in iterate_encoded(table):
        for image_id, data in batch:
            yield EncodedImage(image_id, data, sha256_bytes(data))


def read_queries(queries: Path, synthesized: Path, shipped: Path) -> Iterator[EncodedImage]:
    """The images of the rows of `queries` and no others: shipped ones, then fresh ones by concept."""
    rows = pq.read_table(queries, columns=["image_id", "concept_id", "source"]).to_pylist()
    wanted: dict[Path, set[str]] = {}
    for row in sorted(rows, key=lambda row: (row["source"] != "shipped", row["concept_id"])):
        fresh = synthesized / f"{row['concept_id']}.parquet"
        wanted.setdefault(shipped if row["source"] == "shipped" else fresh, set()).add(row["image_id"])
    for table, ids in wanted.items():
        found = set()
        for image in read_encoded(table):
            if image.image_id in ids:
                found.add(image.image_id)
                yield image
        if found != ids:
            missing = sorted(ids - found)
            where = f"{queries}: query {missing[0]} is not in {table} ({len(missing)} such)"
            raise ValueError(f"{where}; run: dvc repro synthesize")


def count_rows(table: Path) -> int:
    """Rows by the tables' own records, without reading them."""
    return sum(pq.read_metadata(part).num_rows for part in table_parts(table))


def grouped(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in order, `size` at a time."""
    group: list[T] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def read_ahead(groups: Iterator[list[T]]) -> Generator[list[T], None, None]:
    """The groups in order; a thread reads the next while one is in use."""
    with ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(next, groups, None)
        while (group := upcoming.result()) is not None:
            upcoming = reader.submit(next, groups, None)
            yield group


@contextlib.contextmanager
def encoder(backbone: Backbone, workers: int, images: int) -> Iterator[Encode]:
    """What encodes so many `images` in all, as is fastest for the backbone where it is."""
    if backbone.one_core_each:
        yield functools.partial(encode_side_by_side, backbone, workers)
    else:
        with pixel_loader(backbone.preprocessing, backbone.batch_size, workers, images) as loader:
            yield functools.partial(encode_loaded, backbone, loader)


def encode_loaded(
    backbone: Backbone, loader: PixelLoader, jobs: Iterable[tuple[T, Sequence[EncodedImage]]]
) -> Iterator[tuple[T, Float[np.ndarray, "images dim"]]]:
    """The vectors of each job in order, a batch at a time; the next job's images are loaded meanwhile."""
    batches = ((owner, batch) for owner, job in jobs for batch in grouped(job, backbone.batch_size))
    for owner, pixels in loader.pixels_ahead(batches):
        yield owner, backbone.encode_pixels(pixels)


def encode_side_by_side(
    backbone: Backbone, workers: int, jobs: Iterable[tuple[T, Sequence[EncodedImage]]]
) -> Iterator[tuple[T, Float[np.ndarray, "images dim"]]]:
    """The vectors of each job in order, a batch at a time; each of so many threads prepares and encodes."""
    from attribution.threads import one_core_each  # here, where torch has been imported for the net

    def encode(batch: Sequence[EncodedImage]) -> np.ndarray:
        return backbone.encode_pixels(prepare(batch, backbone.preprocessing))

    for owner, job in jobs:
        size = min(backbone.batch_size, -(-len(job) // FEWEST_BATCHES))
        with one_core_each(workers) as pool:
            for vectors in pool.map(encode, grouped(job, size)):
                yield owner, vectors


def main(backbone: str) -> None:
    """Runs the stage for one backbone, from the repository's root."""
    data = Path("data")
    params, shards = load_params(Params, "featurize"), data / "features" / ".shards"
    with alone_in(shards / backbone):
        line = run(
            params,
            backbone,
            exemplars=data / "world" / "exemplars.parquet",
            distractors=data / "world" / "distractors",
            queries=data / "queries.parquet",
            synthesized=data / "synthesized",
            shipped=data / "shipped" / "synthesized.parquet",
            features=data / "features",
            shards=shards,
            root=Path(),
        )
    print(line)


if __name__ == "__main__":
    with command_line("stages.featurize", __doc__) as parser:
        parser.add_argument("backbone", help="a row of featurize.settings in params.yaml")
        main(parser.parse_args().backbone)
