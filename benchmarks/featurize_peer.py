"""clip-retrieval's own inference over a folder of pictures, a round for each line on stdin, random weights.

    /path/to/its/python benchmarks/featurize_peer.py MODEL FOLDER BATCH_SIZE WORKERS

Run by a Python that has clip-retrieval (benchmarks.featurize --peer-python), so it imports nothing of this
project. A round is its FilesReader, ClipMapper and NumpyWriter, in the order of its Runner; only what loads
the weights is replaced, and what logs is left out; of a line "loader", the reader alone. Prints its versions
as a line of JSON, then for each round {"seconds": wall, "cpu_seconds": of this process and its workers}.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import resource
import sys
import tempfile
import time
from typing import Any


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    import open_clip
    import torch

    wrapping = importlib.import_module("all_clip.open_clip")
    modules: list[Any] = [
        importlib.import_module(f"clip_retrieval.clip_inference.{name}")
        for name in ("mapper", "reader", "writer")
    ]
    mapping, reading, writing = modules
    model, folder, batch_size, workers = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net, _, transform = open_clip.create_model_and_transforms(model, load_weights=False, device=device)
    wrapped = wrapping.OpenClipWrapper(net.eval(), device)
    mapping.load_clip = lambda **asked: (wrapped, transform, None)
    says = {name: importlib.metadata.version(name) for name in ("clip_retrieval", "torch", "open_clip_torch")}
    print(json.dumps(says), flush=True)
    for line in sys.stdin:
        started, used = time.perf_counter(), cpu_seconds()
        shown = {"enable_text": False, "enable_image": True, "enable_metadata": False}
        reader = reading.FilesReader(lambda keys: keys, transform, None, folder, batch_size, workers, **shown)
        mapper = mapping.ClipMapper(use_mclip=False, clip_model=model, use_jit=False, mclip_model="", **shown)
        with tempfile.TemporaryDirectory() as output:
            writer = writing.NumpyWriter(0, output, output_partition_count=1, **shown)
            for batch in reader:
                if line.strip() != "loader":
                    writer(mapper(batch))
            writer.flush()
        took = {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - used}
        print(json.dumps(took), flush=True)


if __name__ == "__main__":
    main()
