"""What one backbone says of every exemplar, query and distractor.

In:   data/world/exemplars.parquet, data/world/distractors/, rows of data/queries.parquet with their images in
      data/synthesized/ and data/shipped/synthesized.parquet, the backbone's weights.
Out:  data/features/<backbone>/{exemplars,queries,distractors}: feature sets of one space.
Cost: about 15 s for 27,000 images of 64 x 64 and a small net on 2 CPU cores, a few seconds for pixels.

Finished shards stay in data/features/.shards/<backbone>, named by the digest of their images, their space and
the code that made them: a killed run goes on where it was, and one more exemplar costs one shard. The folder
takes as much disk as the features at most, and may be deleted at any time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from attribution import backbones, images
from attribution.backbones import Backbone, BackboneSettings, load_backbone
from attribution.features import assemble_feature_set, write_shard
from attribution.files import content_key, sha256_bytes
from attribution.images import decode_image, iterate_encoded, table_parts
from attribution.params import load_params


@dataclass(frozen=True)
class Params:
    """`backbones` are the graph's, each with a row in `settings`; a kill costs `shard_rows` images."""

    backbones: tuple[str, ...]
    shard_rows: int
    settings: dict[str, BackboneSettings]

    def __post_init__(self) -> None:
        for name in self.backbones:
            self.settings_of(name)
        if self.shard_rows < 1:
            raise ValueError(f"shard_rows {self.shard_rows}: wanted 1 or more")

    def settings_of(self, backbone: str) -> BackboneSettings:
        """Raises ValueError for a backbone without settings."""
        if backbone not in self.settings:
            raise ValueError(f"no settings for backbone {backbone}; there are: {', '.join(self.settings)}")
        return self.settings[backbone]


@dataclass(frozen=True)
class EncodedImage:
    """A picture as its table holds it."""

    image_id: str
    data: bytes
    sha256: str


@dataclass
class ShardStore:
    """Shards of one backbone on disk, by content; `encoded` counts the images that were not there yet."""

    folder: Path
    backbone: Backbone
    used: set[str] = field(default_factory=set)
    encoded: int = 0

    def __post_init__(self) -> None:
        self.code = content_key(Path(backbones.__file__), Path(images.__file__))

    def shard_of(self, batch: Sequence[EncodedImage], advance: Callable[[int], object]) -> Path:
        """The file with one vector per image, made now unless an earlier run finished it."""
        space = self.backbone.space
        file = self.folder / f"{content_key(self.code, space, [image.sha256 for image in batch])}.npy"
        self.used.add(file.name)
        if file.exists():
            advance(len(batch))
            return file
        rows = []
        for decoded in decode_ahead(batch, self.backbone.batch_size):
            rows.append(self.backbone.encode(decoded))
            advance(len(decoded))
        write_shard(file, space, [image.image_id for image in batch], np.concatenate(rows))
        self.encoded += len(batch)
        return file

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
    loaded = load_backbone(backbone, params.settings_of(backbone), root=root)
    started = time.perf_counter()  # what follows grows with the images; loading does not
    store = ShardStore(shards / backbone, loaded)
    sets = {
        "exemplars": lambda: read_encoded(exemplars),
        "queries": lambda: read_queries(queries, synthesized, shipped),
        "distractors": lambda: read_encoded(distractors),
    }
    total = count_rows(exemplars) + count_rows(queries) + count_rows(distractors)
    with tqdm(total=total, desc=f"featurize {backbone}", unit="image", disable=None) as progress:
        for name, read in sets.items():
            files, ids, digests = [], [], []
            for batch in grouped(read(), params.shard_rows):
                files.append(store.shard_of(batch, progress.update))
                ids += [image.image_id for image in batch]
                digests += [image.sha256 for image in batch]
            assemble_feature_set(features / backbone / name, loaded.space, ids, files, image_sha256=digests)
    store.prune()
    elapsed_s = time.perf_counter() - started
    return (
        f"featurize {backbone}: {total} images ({total - store.encoded} from finished shards) "
        f"in {elapsed_s:.1f} s, {total / elapsed_s:.0f} images/s"
    )


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


def grouped(items: Iterable[EncodedImage], size: int) -> Iterator[list[EncodedImage]]:
    """The items in order, `size` at a time."""
    group: list[EncodedImage] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def decode_ahead(batch: Sequence[EncodedImage], batch_size: int) -> Iterator[list[Image.Image]]:
    """Batches of decoded images; the next is decoded while one is in use."""

    def decode(start: int) -> list[Image.Image]:
        part = batch[start : start + batch_size]
        return [decode_image(image.data, name=f"image {image.image_id}") for image in part]

    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(decode, 0)
        for start in range(batch_size, len(batch) + batch_size, batch_size):
            decoded = upcoming.result()
            if start < len(batch):
                upcoming = pool.submit(decode, start)
            yield decoded


def main() -> None:
    """Runs the stage for the backbone on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("backbone", help="a row of featurize.settings in params.yaml")
    backbone = parser.parse_args().backbone
    data = Path("data")
    line = run(
        load_params(Params, "featurize"),
        backbone,
        exemplars=data / "world" / "exemplars.parquet",
        distractors=data / "world" / "distractors",
        queries=data / "queries.parquet",
        synthesized=data / "synthesized",
        shipped=data / "shipped" / "synthesized.parquet",
        features=data / "features",
        shards=data / "features" / ".shards",
        root=Path(),
    )
    print(line)


if __name__ == "__main__":
    main()
