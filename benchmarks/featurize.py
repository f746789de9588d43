"""Images a second of featurize, loader and net together, beside clip-retrieval's loop, on random weights.

    python -m benchmarks.featurize [--backbone clip] [--images 2048] [--side 384] [--workers 8] [--record]

Pictures are JPEGs of random shapes, made beforehand, the same for both; the net is the full world's row of
that name with random weights, which cost what trained ones do. Ours is the stage's own path: threads decode
and resize, the net takes batches, shards are written. The peer is the loop that clip-retrieval documents for
its inference: a PyTorch DataLoader whose worker processes apply the library's own transform, then
encode_image, in half precision on a GPU, vectors to numpy. It is written out here, for clip-retrieval pins
versions that this project does not have. Rounds take turns, the best of each counts. Prints a table and
writes benchmarks/results/featurize.json; with --record, the rate also goes to the cost sheet
(benchmarks.rates).
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from attribution.backbones import Backbone, BackboneSettings, load_backbone
from attribution.files import sha256_bytes, write_json
from attribution.params import load_params
from benchmarks.rates import Rate, record
from stages.featurize import EncodedImage, ShardStore

RESULTS = Path(__file__).parent / "results"


class Pictures(torch.utils.data.Dataset):
    """Encoded pictures, decoded and transformed on access, in whichever process asks."""

    def __init__(self, encoded: Sequence[bytes], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.encoded, self.transform = encoded, transform

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, row: int) -> torch.Tensor:
        with Image.open(io.BytesIO(self.encoded[row])) as image:
            return self.transform(image.convert("RGB"))


def make_pictures(count: int, side: int) -> list[bytes]:
    """JPEGs with shorter sides about `side`, as smooth as photos, so that they decode as photos do."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        width, height = (int(side * scale) for scale in rng.uniform(1, 1.5, 2))
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((width, height)).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def ours(backbone: Backbone, encoded: Sequence[bytes], workers: int) -> float:
    """Seconds for all pictures through the stage's own path, shards written to a temporary folder."""
    images = [EncodedImage(str(row), data, sha256_bytes(data)) for row, data in enumerate(encoded)]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        ShardStore(Path(folder), backbone, workers).shard_of(images, lambda count: None)
        return time.perf_counter() - start


def peer(
    encode: Callable[[torch.Tensor], torch.Tensor],
    transform: Callable[[Image.Image], torch.Tensor],
    encoded: Sequence[bytes],
    *,
    batch_size: int,
    workers: int,
) -> float:
    """Seconds for all pictures through clip-retrieval's loop."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    start = time.perf_counter()
    loader: Any = torch.utils.data.DataLoader(
        Pictures(encoded, transform), batch_size=batch_size, num_workers=workers, pin_memory=on_gpu
    )
    vectors = []
    with torch.inference_mode():
        for batch in loader:
            inputs = batch.to(device)
            if on_gpu:
                inputs = inputs.half()
            features = encode(inputs)
            features = features / features.norm(dim=-1, keepdim=True)
            vectors.append(features.cpu().numpy())
    assert len(np.concatenate(vectors)) == len(encoded)
    return time.perf_counter() - start


def library_net(settings: BackboneSettings) -> tuple[Any, Any]:
    """The same net as the peer loads it, in half precision on a GPU, and its library's transform."""
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


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both in turn, and what they say."""
    settings = load_params(BackboneSettings, f"featurize.settings.{options.backbone}", options.params)
    if settings.library not in ("open_clip", "timm"):
        raise ValueError(f"{options.backbone}: wanted a net of open_clip or timm, got {settings.library}")
    settings = replace(settings, weights=None, sha256=None, revision=None, rename=None)
    settings = replace(settings, batch_size=options.batch_size or settings.batch_size)
    backbone = load_backbone(options.backbone, settings, root=options.params.parent)
    encoded = make_pictures(options.images, options.side)
    # One batch: kernels are chosen, allocators filled, and its memory told before the peer's net is there.
    ours(backbone, encoded[: settings.batch_size], options.workers)
    peak_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    encode, transform = library_net(settings)
    found: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(options.rounds):
        found["ours"].append(ours(backbone, encoded, options.workers))
        seconds = peer(encode, transform, encoded, batch_size=settings.batch_size, workers=options.workers)
        found["peer"].append(seconds)
    rows = [
        {
            "loop": name,
            "images_per_second": round(options.images / min(seconds), 2),
            "all_seconds": [round(one, 3) for one in seconds],
        }
        for name, seconds in found.items()
    ]
    return {
        "backbone": options.backbone,
        "model": settings.model,
        "precision": settings.precision or "float32",
        "images": options.images,
        "shorter_side": options.side,
        "bytes_per_image": round(sum(map(len, encoded)) / len(encoded)),
        "batch_size": settings.batch_size,
        "workers": options.workers,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "peak_bytes": peak_bytes,
        "dim": backbone.space.dim,
        "torch": torch.__version__,
        "rows": rows,
    }


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backbone", default="clip", help="a row of featurize.settings with a net")
    parser.add_argument("--params", type=Path, default=Path("worlds/full/params.yaml"))
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--side", type=int, default=384, help="shorter side of the pictures, in pixels")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch-size", type=int, help="other than the row's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="keep the rate for the cost sheet")
    parser.add_argument("--output", type=Path, default=RESULTS / "featurize.json")
    options = parser.parse_args()
    report = run(options)
    print(f"{report['backbone']} ({report['model']}, {report['precision']}) on {report['device']}")
    for row in report["rows"]:
        print(f"  {row['loop']:5} {row['images_per_second']:10.1f} images/s")
    write_json(options.output, report)
    if options.record:
        rate = Rate(
            1 / report["rows"][0]["images_per_second"],
            report["device"],
            f"python -m benchmarks.featurize --backbone {options.backbone}",
            peak_bytes=report["peak_bytes"],
            dim=report["dim"],
        )
        record(f"featurize@{options.backbone}", rate)


if __name__ == "__main__":
    main()
