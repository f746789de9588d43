"""A hub's cache with one repository in it, as huggingface_hub lays it out: blobs by hash, links to them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import CLIPTokenizer

from attribution.files import sha256_file

MODEL = "someone/small-diffusion"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def as_published(folder: Path, *, variant: str = "fp16") -> Path:
    """Turns a saved pipeline into what a repository of the hub holds, and returns it.

    Weights in files of `variant` alone, a safety checker that is pickled, a tokenizer in vocab.json and
    merges.txt, a README.
    """
    if variant:
        for path in folder.glob("*/*.safetensors"):
            path.rename(path.with_suffix(f".{variant}.safetensors"))
    for tokenizer in folder.glob("tokenizer*"):
        _old_tokenizer(tokenizer)
    index = json.loads((folder / "model_index.json").read_text())
    if index["_class_name"] == "StableDiffusionPipeline":
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        (folder / "safety_checker").mkdir()
        (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"no pickle")
        (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("# Small")
    return folder


def fill_cache(cache: Path, repository: Path, names: list[str] | None = None) -> Path:
    """The snapshot of `repository` (or of the files `names` of it) in `cache`."""
    home = cache / f"models--{MODEL.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    for path in sorted(repository.rglob("*")):
        name = str(path.relative_to(repository))
        if path.is_file() and (names is None or name in names):
            blob = home / "blobs" / sha256_file(path)
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, blob)
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).unlink(missing_ok=True)
            (snapshot / name).symlink_to(blob)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    return snapshot


def _old_tokenizer(folder: Path) -> None:
    """As tokenizers were saved before tokenizer.json."""
    saved = json.loads((folder / "tokenizer.json").read_text())
    model, config = saved["model"], json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]))
    keys = ("bos_token", "eos_token", "unk_token", "pad_token", "model_max_length")
    config = {key: config[key] for key in keys if key in config}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config, "add_prefix_space": False, "tokenizer_class": "CLIPTokenizer"})
    )
    assert isinstance(CLIPTokenizer.from_pretrained(folder), CLIPTokenizer)
