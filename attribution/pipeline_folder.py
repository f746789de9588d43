"""Where a base's files lie: a folder in diffusers' layout, or a hub's repository at one commit."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from attribution.files import read_json

INDEX = "model_index.json"
# The pipelines that can be customized, and the parts of each that hold weights.
FAMILIES = {
    "StableDiffusionPipeline": ("unet", "vae", "text_encoder"),
    "StableDiffusionXLPipeline": ("unet", "vae", "text_encoder", "text_encoder_2"),
}
_STEM = r"(?:model|diffusion_pytorch_model)"
_PICKLED = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class PipelineFolder:
    """A folder with all that a pipeline of `family` needs, its weights in the files of `variant`."""

    path: Path
    family: str
    variant: str | None


def find_pipeline(model: str, revision: str | None, *, halves: bool = False) -> PipelineFolder:
    """The pipeline in the folder `model`, or of the hub id `model` at the commit `revision`.

    What the hub's cache holds is not asked for again; of a repository that must be fetched, only the wanted
    safetensors files and configurations are. Files of half precision are taken where there are no others, and
    with `halves` where both are. Raises FileNotFoundError for what is not there, ValueError for what is there
    but cannot serve: another kind of pipeline, weights that are pickled, a revision that is no commit.
    """
    folder = Path(model)
    if folder.is_file():
        do = "StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)"
        raise ValueError(f"{model}: a file; wanted a folder in diffusers' layout; make it by {do}")
    if not folder.is_dir():
        folder = _snapshot(model, checked_commit(model, revision), halves)
    family = _family(folder)
    weights = wanted_weights(_names(folder), FAMILIES[family], halves=halves, where=str(folder))
    return PipelineFolder(folder, family, "fp16" if any(".fp16" in name for name in weights) else None)


def checked_commit(model: str, revision: str | None) -> str:
    """The revision, if it is a commit. Raises ValueError: a branch moves, and what we keep would not know."""
    if revision is None:
        raise ValueError(f"base.model: {model}: no such folder; a hub id wants base.revision: a commit")
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        look = f"git ls-remote https://huggingface.co/{model}"
        raise ValueError(
            f"base.revision: wanted a commit of 40 hex digits, got {revision}: a name may come to mean other"
            f" weights, and what was made from these would be kept; look the commit up: {look}"
        )
    return revision


def wanted_weights(
    names: Iterable[str], parts: Sequence[str], *, halves: bool = False, where: str = "base"
) -> list[str]:
    """Of all files' names, the safetensors files of one precision for each of the `parts`.

    Raises ValueError naming a part without any, and why.
    """
    listed = list(names)
    wanted = []
    for part in parts:
        ways = [_complete(listed, part, variant) for variant in ("", ".fp16")]
        found = next(filter(None, reversed(ways) if halves else ways), None)
        if found is None:
            raise ValueError(f"{where}: {_reason(listed, part)}")
        wanted += found
    return wanted


def _complete(names: Sequence[str], part: str, variant: str) -> list[str]:
    """The one file of the part's weights, or all of its shards. Empty if any is missing."""
    pattern = rf"{part}/{_STEM}{re.escape(variant)}(?:-\d+-of-(\d+))?\.safetensors"
    found = [match for name in names if (match := re.fullmatch(pattern, name))]
    if any(match[1] is None for match in found):
        return [match[0] for match in found if match[1] is None]
    return [match[0] for match in found] if found and len(found) == int(found[0][1]) else []


def _reason(names: Sequence[str], part: str) -> str:
    mine = [name for name in names if name.startswith(f"{part}/")]
    if any(name.endswith(".safetensors") for name in mine):
        return f"{part}: wanted all safetensors files of one precision, got {', '.join(mine)}"
    if pickled := [name for name in mine if name.endswith(_PICKLED)]:
        return (
            f"{part}: got only {', '.join(pickled)}; wanted .safetensors: nothing is unpickled here; where"
            " you trust it: StableDiffusionPipeline.from_pretrained(folder).save_pretrained(other)"
        )
    return f"no weights of {part}; wanted {part}/*.safetensors"


def _family(folder: Path) -> str:
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder}: no {INDEX}; wanted a folder written by save_pretrained")
    index = read_json(folder / INDEX)
    family = index.get("_class_name") if isinstance(index, dict) else None
    # Of a pipeline of one's own it is a list.
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{folder / INDEX}: a {family}; wanted one of {', '.join(FAMILIES)}")
    return family


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.glob("*/*") if path.is_file())


def _snapshot(model: str, revision: str, halves: bool) -> Path:
    """The folder of the hub's cache, with the wanted files in it, fetched if they are not there yet."""
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    cached = try_to_load_from_cache(model, INDEX, revision=revision)
    if isinstance(cached, str):
        folder = Path(cached).parent
        parts = FAMILIES[_family(folder)]
        # If not all of it is here, the hub knows whether the rest can be had.
        with contextlib.suppress(ValueError):
            wanted_weights(_names(folder), parts, halves=halves)
            if _configurations(parts) <= set(_names(folder)):
                return folder
    with _asking(model, revision):
        index = Path(snapshot_download(model, revision=revision, allow_patterns=[INDEX]))
        names = HfApi().list_repo_files(model, revision=revision)
    weights = wanted_weights(names, FAMILIES[_family(index)], halves=halves, where=model)
    with _asking(model, revision):
        wanted = [*weights, "*.json", "*/merges.txt"]
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))


def _configurations(parts: Sequence[str]) -> set[str]:
    tokenizers = {part.replace("text_encoder", "tokenizer") for part in parts if "text_encoder" in part}
    return {
        "scheduler/scheduler_config.json",
        *(f"{part}/config.json" for part in parts),
        *(f"{tokenizer}/tokenizer_config.json" for tokenizer in tokenizers),
    }


@contextlib.contextmanager
def _asking(model: str, revision: str) -> Iterator[None]:
    """Inside, whatever the hub's client says of what it cannot have becomes one line with what to do."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, HTTPError) as error:
        kinds = " ".join(f"--include '{kind}'" for kind in ("*.json", "*/merges.txt", "*.safetensors"))
        reason = " ".join(str(error).split()).rstrip(".")
        raise FileNotFoundError(
            f"base.model: {model} at {revision}: not in {HF_HUB_CACHE}, and cannot be fetched ({reason});"
            f" where the hub can be reached: hf download {model} --revision {revision} {kinds}"
        ) from error
