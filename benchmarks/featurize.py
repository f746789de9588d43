"""Images a second of featurize, loader and net together, beside clip-retrieval's, on random weights.

    python -m benchmarks.featurize [--backbone clip ...] [--images 2048] [--side 384] [--workers 8]
                                   [--peer-python PATH | --no-peer] [--record]

Pictures are JPEGs of random shapes, made beforehand, the same for both; the net is the full world's row of
that name with random weights, which cost what trained ones do (sscd's is a ResNet-50 of its shape). Ours is
the stage's own path: a table is read, threads or, from 4096 images on, processes decode and resize, the net
takes batches, shards are written. The stage starts its processes once a run; here they start before the
rounds, in a pass of the loader alone that does not count. The peer starts its own anew for each pass.

With --peer-python, the peer is clip-retrieval itself (benchmarks/featurize_peer.py), run by a Python that has
it: it pins versions that this project does not have, and is no dependency of it. For one beside this
project's packages, so that both run the same torch and open_clip, put their folder in a .pth file of a new
environment and `pip install --no-deps` clip-retrieval and what its import asks for. Without, the peer is the
shape of its loop, written out: a PyTorch DataLoader whose worker processes apply the library's own transform,
then encode_image, vectors to numpy; that is not clip-retrieval.

Both are timed whole, and as loaders alone, which is what a GPU waits for. Rounds take turns, the best of each
counts, and a round's processor seconds, which another job on the machine disturbs less. Prints a table (the
loaders alone below) and writes benchmarks/results/featurize.json, a report for each backbone; with --record,
rates also go to the cost sheet (benchmarks.rates).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import io
import json
import multiprocessing
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from attribution.backbones import Backbone, BackboneSettings, load_backbone
from attribution.files import sha256_file, write_json
from attribution.images import decode_image, write_image_table
from attribution.params import load_params, read_yaml
from benchmarks.rates import Rate, machine, record
from stages.decoding import PixelLoader, pixel_loader
from stages.featurize import (
    Encode,
    ShardStore,
    encode_loaded,
    encode_side_by_side,
    grouped,
    read_ahead,
    read_encoded,
)

RESULTS = Path(__file__).parent / "results"
DISTINCT = 1024
PEER = Path(__file__).with_name("featurize_peer.py")


class Pictures(torch.utils.data.Dataset):
    """Encoded pictures, decoded and transformed on access, in whichever process asks."""

    def __init__(self, encoded: Sequence[bytes], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.encoded, self.transform = encoded, transform

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, row: int) -> torch.Tensor:
        with Image.open(io.BytesIO(self.encoded[row])) as image:
            return self.transform(image.convert("RGB"))


def cpu_seconds() -> float:
    """Of this process, all its threads, its worker processes, and the processes it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    ticks = 0
    for worker in multiprocessing.active_children():
        # Fields 14 and 15, of user and system; the second is a name that may hold anything.
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return sum(one.ru_utime + one.ru_stime for one in used) + ticks / os.sysconf("SC_CLK_TCK")


def make_pictures(count: int, side: int) -> list[bytes]:
    """JPEGs with shorter sides about `side`, as smooth as photos, so that they decode as photos do.

    After DISTINCT they repeat.
    """
    rng = np.random.default_rng(0)
    made: list[bytes] = []
    for _ in range(min(count, DISTINCT)):
        width, height = (int(side * scale) for scale in rng.uniform(1, 1.5, 2))
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((width, height)).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return [made[number % DISTINCT] for number in range(count)]


def write_pictures(folder: Path, encoded: Sequence[bytes]) -> Path:
    """The pictures as files in `folder`/pictures, and as the table that is returned."""
    (folder / "pictures").mkdir()
    ids = [f"{row:07}" for row in range(len(encoded))]
    for image_id, data in zip(ids, encoded, strict=True):
        (folder / "pictures" / f"{image_id}.jpg").write_bytes(data)
    rows = pa.table({"image_id": ids, "image": pa.array(encoded, pa.binary())})
    write_image_table(folder / "pictures.parquet", rows)
    return folder / "pictures.parquet"


@dataclass(frozen=True)
class Round:
    """What one pass over all pictures took; `cpu_seconds` of all its threads and processes."""

    seconds: float
    cpu_seconds: float


# Of all, or (True) of the loader alone: decoded and resized, as a GPU waits for it.
Loop = Callable[[bool], Round]


def ours(
    backbone: Backbone, encode: Encode, loader: PixelLoader, table: Path, shard_rows: int, loader_alone: bool
) -> Round:
    """All pictures of the table through the stage's own path, shards written to a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        started, used = time.perf_counter(), cpu_seconds()
        store = ShardStore(Path(folder), backbone)
        with contextlib.closing(read_ahead(grouped(read_encoded(table), shard_rows))) as groups:
            if loader_alone:
                batches = ((None, batch) for group in groups for batch in grouped(group, backbone.batch_size))
                collections.deque(loader.pixels_ahead(batches), 0)
            else:
                store.shards_of(groups, encode, lambda count: None)
        return Round(time.perf_counter() - started, cpu_seconds() - used)


@contextlib.contextmanager
def clip_retrieval(
    python: Path, model: str, folder: Path, *, batch_size: int, workers: int
) -> Iterator[tuple[Loop, dict[str, str]]]:
    """clip-retrieval's inference in a process of that Python, and which versions it runs."""
    command = [str(one) for one in (python, PEER, model, folder, batch_size, workers)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        told, answers = process.stdin, process.stdout
        versions = json.loads(answers.readline() or "null")
        if versions is None:
            raise RuntimeError(f"{python}: wanted a Python with clip-retrieval; what it lacks stands above")

        def loop(loader_alone: bool) -> Round:
            told.write("loader\n" if loader_alone else "\n")
            told.flush()
            return Round(**json.loads(answers.readline()))

        yield loop, versions
        told.close()


def loop_written_out(
    settings: BackboneSettings, encoded: Sequence[bytes], *, batch_size: int, workers: int
) -> Loop:
    """The shape of clip-retrieval's loop; the net is the library's own, in half precision on a GPU."""
    encode, transform = library_net(settings)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")

    def loop(loader_alone: bool) -> Round:
        started, used = time.perf_counter(), cpu_seconds()
        loader: Any = torch.utils.data.DataLoader(
            Pictures(encoded, transform), batch_size=batch_size, num_workers=workers, pin_memory=on_gpu
        )
        vectors = []
        with torch.inference_mode():
            for batch in loader:
                if loader_alone:
                    continue
                inputs = batch.to(device)
                features = encode(inputs.half() if on_gpu else inputs)
                vectors.append((features / features.norm(dim=-1, keepdim=True)).cpu().numpy())
        assert loader_alone or len(np.concatenate(vectors)) == len(encoded)
        return Round(time.perf_counter() - started, cpu_seconds() - used)

    return loop


def library_net(settings: BackboneSettings) -> tuple[Any, Any]:
    """The same net as a user of its library loads it, and the library's transform."""
    assert settings.model is not None
    if settings.library == "open_clip":
        import open_clip

        net, _, transform = open_clip.create_model_and_transforms(settings.model, load_weights=False)
        encode = net.encode_image
    else:
        import timm

        net = timm.create_model(settings.model, num_classes=0)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
        encode = net
    net.eval()
    if torch.cuda.is_available():
        net.half().cuda()
    return encode, transform


def random_torchscript(folder: Path) -> Path:
    """A net of sscd's shape, a ResNet-50 whose last layer has 512 values, as a TorchScript file."""
    import timm

    net = timm.create_model("resnet50", num_classes=512).eval()
    file = folder / "net.torchscript.pt"
    with torch.inference_mode():
        torch.jit.trace(net, torch.zeros(1, 3, 288, 288)).save(str(file))
    return file


def run(name: str, encoded: Sequence[bytes], options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both in turn, and what they say."""
    settings = load_params(BackboneSettings, f"featurize.settings.{name}", options.params)
    peer = not options.no_peer
    if peer and settings.library not in ("open_clip", "timm"):
        raise ValueError(f"{name}: wanted a net of open_clip or timm, or --no-peer, got {settings.library}")
    if options.peer_python and settings.library != "open_clip":
        raise ValueError(f"{name}: clip-retrieval knows nets of open_clip, got {settings.library}")
    precision = settings.precision if torch.cuda.is_available() else None  # on a CPU all is float32
    batch_size = options.batch_size or settings.batch_size
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        script = random_torchscript(folder) if settings.library == "torchscript" else None
        settings = replace(
            settings, weights=None if script is None else str(script),
            sha256=None if script is None else sha256_file(script), revision=None, rename=None,
            precision=precision, batch_size=batch_size,
        )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        backbone = load_backbone(name, settings, root=options.params.parent)
        table = write_pictures(folder, encoded)
        shard_rows = read_yaml(options.params)["featurize"]["shard_rows"]
        # One batch: kernels are chosen, and its memory is told before the peer's net is there.
        pixels = backbone.preprocessing.pixels([decode_image(one) for one in encoded[:batch_size]])
        backbone.encode_pixels(pixels)
        peak_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        loader = stack.enter_context(
            pixel_loader(backbone.preprocessing, batch_size, options.workers, options.images)
        )
        encode: Encode = functools.partial(encode_loaded, backbone, loader)
        if backbone.one_core_each:
            encode = functools.partial(encode_side_by_side, backbone, options.workers)
        ours(backbone, encode, loader, table, shard_rows, loader_alone=True)  # its processes start
        loops: dict[str, Loop] = {
            "ours": lambda alone: ours(backbone, encode, loader, table, shard_rows, alone)
        }
        versions = {"torch": str(torch.__version__)}
        more = {"batch_size": batch_size, "workers": options.workers}
        if options.peer_python:
            started = clip_retrieval(options.peer_python, str(settings.model), folder / "pictures", **more)
            loops["clip-retrieval"], versions = stack.enter_context(started)
            loops["clip-retrieval"](False)  # as ours was warmed
        elif peer:
            loops["loop written out"] = loop_written_out(settings, encoded, **more)
        found: dict[bool, dict[str, list[Round]]] = {}
        for alone in (False, True):
            found[alone] = {name: [] for name in loops}
            for _ in range(options.rounds):
                for name, loop in loops.items():
                    found[alone][name].append(loop(alone))
    return {
        "backbone": name,
        "model": settings.model,
        "precision": settings.precision or "float32",
        "images": options.images,
        "shorter_side": options.side,
        "bytes_per_image": round(sum(map(len, encoded)) / len(encoded)),
        "batch_size": batch_size,
        "workers": options.workers,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "machine": machine(),
        "peak_bytes": peak_bytes,
        "dim": backbone.space.dim,
        "versions": versions,
        "rows": rows_of(found[False], options.images),
        "loader_alone": rows_of(found[True], options.images),
    }


def rows_of(found: Mapping[str, Sequence[Round]], images: int) -> list[dict[str, Any]]:
    """A row for each loop; "ours_over_it" by its best round, in wall time and in processor time."""
    best = {name: min(one.seconds for one in rounds) for name, rounds in found.items()}
    least_cpu = {name: min(one.cpu_seconds for one in rounds) for name, rounds in found.items()}
    return [
        {
            "loop": name,
            "images_per_second": round(images / best[name], 2),
            "cpu_ms_per_image": round(1000 * least_cpu[name] / images, 2),
            "ours_over_it": round(best[name] / best["ours"], 3),
            "ours_over_it_cpu": round(least_cpu[name] / least_cpu["ours"], 3),
            "all_seconds": [round(one.seconds, 3) for one in rounds],
            "all_cpu_seconds": [round(one.cpu_seconds, 3) for one in rounds],
        }
        for name, rounds in found.items()
    ]


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backbone", nargs="+", default=["clip"], help="rows of featurize.settings")
    parser.add_argument("--params", type=Path, default=Path("worlds/full/params.yaml"))
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--side", type=int, default=384, help="shorter side of the pictures, in pixels")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch-size", type=int, help="other than the row's")
    parser.add_argument("--peer-python", type=Path, help="a Python that has clip-retrieval")
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="keep the rate for the cost sheet")
    parser.add_argument("--output", type=Path, default=RESULTS / "featurize.json")
    options = parser.parse_args()
    encoded = make_pictures(options.images, options.side)
    reports = {}
    for name in options.backbone:
        reports[name] = report = run(name, encoded, options)
        print(f"{name} ({report['model']}, {report['precision']}) on {report['machine']}")
        for row in [*report["rows"], *report["loader_alone"]]:
            print(
                f"  {row['loop']:16} {row['images_per_second']:8.1f} images/s, ours "
                f"{row['ours_over_it']:.2f} x; {row['cpu_ms_per_image']:6.1f} ms of processor an image, ours "
                f"{row['ours_over_it_cpu']:.2f} x",
                flush=True,
            )
        write_json(options.output, reports)
        if options.record:
            rate = Rate(
                1 / report["rows"][0]["images_per_second"],
                report["machine"],
                f"python -m benchmarks.featurize --backbone {name}",
                peak_bytes=report["peak_bytes"],
                dim=report["dim"],
            )
            record(f"featurize@{name}", rate)


if __name__ == "__main__":
    main()
