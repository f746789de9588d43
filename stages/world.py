"""Writes the graph of another world beside its parameters: `python -m stages.world full`.

In:   worlds/<name>/params.yaml, this repository's dvc.yaml.
Out:  worlds/<name>/dvc.yaml, and a data/shipped/synthesized.parquet without rows: nothing is shipped there.
Cost: none.

A world is a folder with its own parameters, data, metrics and dvc.lock: choosing it touches nothing of the
default run (whose customized models another world's would prune), and both may be up to date at once. The
graph is dvc.yaml's from `customize` on, with `import_data` in place of the drawn world; `featurize` depends
on ready features where a backbone has them, and on the distractors' pictures where not. Run it by

    dvc repro --dry --force worlds/full/dvc.yaml    (what would run; --force: nothing is there to compare)
    dvc repro worlds/full/dvc.yaml
    dvc exp run worlds/full/dvc.yaml -S worlds/full/params.yaml:customize.training.custom_diffusion.steps=300
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from attribution.backbone_settings import BackboneSettings
from attribution.command import command_line
from attribution.files import atomic_path
from attribution.images import write_image_table
from attribution.params import load_params, read_yaml
from stages import featurize, import_data
from stages.imports import imported_files

STAGES = ("customize", "synthesize", "featurize", "train_mapper", "calibrate", "evaluate")
# Inputs of the mini world alone.
MINI = ("data/backbones", "data/base/mini")
CODE = (".py", "csrc", "CMakeLists.txt")
DISTRACTORS = "data/world/distractors"
IMPORTED = ("data/world/exemplars.parquet", DISTRACTORS, "data/world/skipped.parquet")
READY = "ready_distractors"
HEADER = (
    "# Made from the repository's dvc.yaml by `python -m stages.world {name}`: edit that, run it again.\n"
)


def run(name: str, *, graph: Path, worlds: Path) -> str:
    """Writes the world's graph and returns what to do next.

    Raises FileNotFoundError for a world without parameters, ValueError for a name that is none and for what
    is wrong in the parameters that the graph is made from.
    """
    # Path("..").name is "..", whose graph would take the place of the repository's own.
    if name in ("", "..") or Path(name).name != name:
        raise ValueError(f"world {name!r}: wanted the name of a folder in {worlds}")
    folder = worlds / name
    if not (folder / "params.yaml").is_file():
        known = ", ".join(sorted(path.parent.name for path in worlds.glob("*/params.yaml"))) or "none"
        do = f"copy those of another world; there are: {known}"
        raise FileNotFoundError(f"{folder / 'params.yaml'}: no such file; {do}")
    check_sections(folder / "params.yaml")
    params = read_yaml(folder / "params.yaml")
    stages = {"import_data": import_stage(graph.parent, params)}
    stages |= {stage: elsewhere(read_yaml(graph)["stages"][stage]) for stage in STAGES}
    stages["featurize"] = with_ready_distractors(stages["featurize"], params)
    with atomic_path(folder / "dvc.yaml") as partial:
        text = yaml.safe_dump({"stages": stages}, sort_keys=False, width=110)
        partial.write_text(HEADER.format(name=name) + text)
    write_image_table(
        folder / "data" / "shipped" / "synthesized.parquet",
        pa.table({"image_id": pa.array([], pa.string()), "image": pa.array([], pa.binary())}),
    )
    return (
        f"{folder}/dvc.yaml: {len(stages)} stages. Put pictures where import_data in {folder}/params.yaml"
        f" says, fill in what is null there, then: dvc repro {folder}/dvc.yaml"
    )


def check_sections(path: Path) -> None:
    """Raises ValueError naming file and key."""
    load_params(import_data.Params, "import_data", path)
    for name in load_params(featurize.Params, "featurize", path).backbones:
        load_params(BackboneSettings, f"featurize.settings.{name}", path)


def elsewhere(definition: dict[str, Any]) -> dict[str, Any]:
    """The stage as it stands two folders down: its code up here, its data beside it."""
    deps = [f"../../{dep}" if dep.endswith(CODE) else dep for dep in definition["deps"] if dep not in MINI]
    # The modules are imported from the repository, the files opened in the world.
    return {**definition, "cmd": f"PYTHONPATH=../.. {definition['cmd']}", "deps": deps}


def with_ready_distractors(definition: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """`featurize` with each backbone's own distractors; as it was where no backbone has ready ones."""
    rows = {name: params["featurize"]["settings"][name] for name in params["featurize"]["backbones"]}
    ready = {name: row[READY]["folder"] for name, row in rows.items() if row.get(READY)}
    if not ready:
        return definition
    each = {name: {"distractors": ready.get(name, DISTRACTORS)} for name in rows}
    others = {name: value for name, value in definition.items() if name != "matrix"}
    text = yaml.safe_dump(others).replace("${item.backbone}", "${key}")
    return {"foreach": each, "do": yaml.safe_load(text.replace(DISTRACTORS, "${item.distractors}"))}


def import_stage(root: Path, params: dict[str, Any]) -> dict[str, Any]:
    """What makes the exemplars and distractors, from where the parameters say they are."""
    sources = [name for name in ("exemplars", "distractors") if params["import_data"][name] is not None]
    code = sorted(
        str(path.relative_to(root)) for path in imported_files(root / "stages/import_data.py", root)
    )
    return elsewhere(
        {
            "cmd": "python -m stages.import_data",
            "deps": [*code, *(f"${{import_data.{name}}}" for name in sources)],
            "params": ["import_data"],
            "outs": list(IMPORTED),
        }
    )


def main() -> None:
    """Takes the name of the world."""
    with command_line("stages.world", __doc__) as parser:
        parser.add_argument("name", help="a folder in worlds/ with a params.yaml")
        print(run(parser.parse_args().name, graph=Path("dvc.yaml"), worlds=Path("worlds")))


if __name__ == "__main__":
    main()
