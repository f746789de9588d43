"""What the design promises about files, imports and the graph, held as tests."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from attribution.params import load_params
from miniworld.concepts import draw_concepts
from miniworld.scene import BACKGROUNDS, CLASSES, MEDIA
from stages import render

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PACKAGES = ("attribution", "stages", "miniworld")
# Who may import whom. The compiled extension is imported by attribution.similarity alone.
ALLOWED = {
    "stages": {"stages", "miniworld", "attribution"},
    "miniworld": {"miniworld"},
    "attribution": {"attribution"},
}
EXTENSION_SOURCES = {"csrc", "CMakeLists.txt"}
MODULES = sorted(
    path for package in PACKAGES for path in (ROOT / package).glob("*.py") if path.name != "__init__.py"
)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


@cache
def imported_names(path: Path) -> frozenset[str]:
    """Dotted names that a file imports, also inside functions; `from a.b import c` gives a.b and a.b.c."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def own_files(path: Path) -> set[Path]:
    """Modules of this repository that a file imports itself."""
    candidates = (ROOT / Path(*name.split(".")).with_suffix(".py") for name in imported_names(path))
    return {candidate for candidate in candidates if candidate.is_file()}


def import_closure(path: Path) -> set[str]:
    """Everything whose change can change what running this module does, as paths from the root."""
    seen, todo = {path}, [path]
    while todo:
        found = own_files(todo.pop()) - seen
        seen |= found
        todo += sorted(found)
    names = {str(file.relative_to(ROOT)) for file in seen}
    return names | EXTENSION_SOURCES if "attribution/similarity.py" in names else names


def stage_definitions() -> dict[str, dict]:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("stage", sorted(stage_definitions()))
def test_code_dependencies_of_a_stage_equal_its_import_closure(stage: str) -> None:
    definition = stage_definitions()[stage]
    listed = {dep for dep in definition["deps"] if dep.endswith(".py") or dep in EXTENSION_SOURCES}
    wanted = import_closure(ROOT / "stages" / f"{stage}.py")
    lines = "\n".join(f"    - {name}" for name in sorted(wanted))
    assert listed == wanted, f"dvc.yaml: {stage}: wanted these code dependencies:\n{lines}"


@pytest.mark.parametrize("stage", sorted(stage_definitions()))
def test_a_stage_is_run_as_its_module(stage: str) -> None:
    command = stage_definitions()[stage]["cmd"]
    assert command in (f"python -m stages.{stage}", f"python -m stages.{stage} ${{item.backbone}}")


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(module: Path) -> None:
    package = module.parent.name
    roots = {name.split(".")[0] for name in imported_names(module)}
    wrong = roots & {*PACKAGES, "tests", "benchmarks"} - ALLOWED[package]
    assert not wrong, f"{module}: {package} must not import {sorted(wrong)}"
    if "attribution_extension" in roots or '"attribution_extension"' in module.read_text():
        assert module.name == "similarity.py", f"{module}: go through attribution.similarity"


@pytest.mark.parametrize("package", PACKAGES)
def test_package_inits_import_nothing(package: str) -> None:
    init = ROOT / package / "__init__.py"
    assert init.is_file()
    assert not imported_names(init)


def test_no_drawer_modules() -> None:
    names = {Path(name).stem for name in git("ls-files", "*.py").split()}
    assert not names & {"utils", "util", "common", "helpers", "helper", "scripts", "misc"}


def test_every_stage_output_is_ignored_or_kept_in_git_by_intention() -> None:
    """DVC writes a .gitignore of its own beside an output that the root's .gitignore misses."""
    nested = [
        name
        for name in git("ls-files", "*.gitignore").split()
        if name not in (".gitignore", ".dvc/.gitignore")
    ]
    assert not nested
    for stage, definition in stage_definitions().items():
        for key in ("outs", "metrics", "plots"):
            for entry in definition.get(key, []):
                ((path, options),) = entry.items() if isinstance(entry, dict) else [(entry, {})]
                path = path.replace("${item.backbone}", "clip")
                in_git = (
                    subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 1
                )
                assert in_git == (options.get("cache") is False), f"{stage}: {path}: list it in .gitignore"


def test_tracked_files_hold_no_pickle_and_no_lock_and_stay_small() -> None:
    tracked = [Path(name) for name in git("ls-files", "-z").split("\0") if name]
    bad = [name for name in tracked if name.suffix in {".pkl", ".pickle", ".pt", ".pth", ".joblib"}]
    bad += [name for name in tracked if name.name == "uv.lock" or name.match("pylock*.toml")]
    assert not bad
    sizes = {name: (ROOT / name).stat().st_size for name in tracked if (ROOT / name).is_file()}
    assert sum(sizes.values()) < 40e6, sorted(sizes.items(), key=lambda item: -item[1])[:10]


@pytest.mark.parametrize("stage", [name for name, one in stage_definitions().items() if one.get("frozen")])
def test_a_frozen_stage_keeps_the_parameters_of_what_is_shipped(stage: str) -> None:
    locked = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"][stage]["params"]["params.yaml"]
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert {section: params[section] for section in locked} == locked, f"params.yaml: run stages.{stage} anew"


def test_the_graph_in_the_readme_is_the_graph() -> None:
    command = [str(Path(sys.executable).with_name("dvc")), "dag", "--md", "evaluate@clip"]
    drawn = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    wanted = f"<!-- graph:begin -->\n{drawn}\n<!-- graph:end -->"
    assert wanted in README.read_text(), "README.md: paste the output of: uv run dvc dag --md evaluate@clip"


def test_what_the_readme_says_of_the_world_is_so() -> None:
    params = load_params(render.Params, "render", ROOT / "params.yaml")
    concepts = list(draw_concepts(params.seed, params.objects, params.styles, fresh_every=params.fresh_every))
    text = " ".join(README.read_text().split())
    for claim in (
        f"{len(CLASSES)} classes of objects before {len(BACKGROUNDS)} backgrounds in {len(MEDIA)} media",
        f"There are {len(concepts)} concepts",
        f"customizes {sum(concept.fresh for concept in concepts)} of them afresh",
        f"The gallery has {params.distractors:,} distractors",
    ):
        assert claim in text


def test_commands_in_the_readme_name_what_exists() -> None:
    text = README.read_text()
    modules = set(re.findall(r"python -m ([\w.]+)", text)) - {"benchmarks."}
    assert {"attribution", "stages.pretrain", "stages.ship_synthesized"} <= modules
    for module in modules:
        assert importlib.util.find_spec(module), f"README.md: python -m {module}"
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    settings = re.findall(r"-S '?([\w.]+)=", text)
    assert settings
    for name in settings:
        value = params
        for part in name.split("."):
            assert part in value, f"README.md: -S {name}"
            value = value[part]
    made = (ROOT / "dvc.yaml").read_text()
    for path in re.findall(r"`((?:data|docs|csrc|metrics|stages|attribution|miniworld)/[\w./]*)`", text):
        assert (ROOT / path).exists() or path.rstrip("/") in made, f"README.md: {path}"
