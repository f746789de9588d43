"""stages.world: the full world's parameters load, and its graph is the default one two folders down."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from attribution.base_model import BaseSettings
from attribution.concepts import Concept
from attribution.params import load_params, read_yaml
from stages import calibrate, customize, evaluate, featurize, import_data, synthesize, train_mapper, world
from stages.image_requests import KINDS, choose, read_prompts
from tests.test_architecture import EXTENSION_SOURCES, import_closure

ROOT = Path(__file__).resolve().parents[1]
FULL = ROOT / "worlds" / "full"
PARAMS = {
    "base": BaseSettings,
    "calibrate": calibrate.Params,
    "customize": customize.Params,
    "evaluate": evaluate.Params,
    "featurize": featurize.Params,
    "import_data": import_data.Params,
    "synthesize": synthesize.Params,
    "train_mapper": train_mapper.Params,
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the code and both graphs; the full world's is made."""
    root = tmp_path_factory.mktemp("repository")
    for name in ("dvc.yaml", "params.yaml", "CMakeLists.txt", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, root)
    for name in ("attribution", "csrc", "stages", "miniworld", "worlds/full/data/prompts"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(FULL / "params.yaml", root / "worlds" / "full")
    run(root, "git", "init", "--quiet")
    run(root, "dvc", "init", "--quiet", "--force")
    world.run("full", graph=root / "dvc.yaml", worlds=root / "worlds")
    return root


def run(root: Path, *command: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "GIT_"))}
    done = subprocess.run(
        command, cwd=root, env={**environment, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def stages_of(copy: Path) -> dict[str, Any]:
    return read_yaml(copy / "worlds" / "full" / "dvc.yaml")["stages"]


@pytest.mark.parametrize("section", PARAMS)
def test_every_section_loads(section: str) -> None:
    load_params(PARAMS[section], section, FULL / "params.yaml")


def test_a_model_has_forty_images_of_each_prompt_kind() -> None:
    params = load_params(synthesize.Params, "synthesize", FULL / "params.yaml")
    prompts = read_prompts(FULL / "data" / "prompts")
    for kind, prompt_kinds in KINDS.items():
        for split in ("train", "test"):
            concept = Concept("some", kind, "bird", split, True, ())
            requests = choose(params, concept, prompts)
            counts = [sum(one.prompt_kind == name for one in requests) for name in prompt_kinds]
            assert counts == [40, 40]


def test_words_fit_the_tokenizer_of_stable_diffusion() -> None:
    """Its vocabulary is CLIP's, which open_clip brings along."""
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    params = load_params(customize.Params, "customize", FULL / "params.yaml")
    for words in (params.object, params.style):
        assert len(tokenizer.encode(words.initializer)) == 1
    prompts = read_prompts(FULL / "data" / "prompts")
    listed = [
        one
        for kinds in prompts.values()
        for splits in kinds.values()
        for some in splits.values()
        for one in some
    ]
    # Start, end, and what the new token and a noun of three tokens add to their letters in braces.
    assert max(len(tokenizer.encode(one)) for one in listed) < 77 - 5


def test_stages_depend_on_the_code_up_here_and_the_data_down_there(copy: Path) -> None:
    stages = stages_of(copy)
    assert list(stages) == ["import_data", *world.STAGES]
    for name, definition in stages.items():
        wanted = {f"../../{dep}" for dep in import_closure(ROOT / "stages" / f"{name}.py")}
        deps = definition["deps"]
        assert {dep for dep in deps if dep.endswith((".py", *EXTENSION_SOURCES))} == wanted
        assert not [dep for dep in deps if "mini" in dep or ("backbones" in dep and not dep.endswith(".py"))]
        assert definition["cmd"].startswith(f"PYTHONPATH=../.. python -m stages.{name}")


def test_a_backbone_with_ready_distractors_depends_on_their_folder(copy: Path) -> None:
    own = copy / "worlds" / "own"
    own.mkdir(exist_ok=True)
    params = read_yaml(copy / "worlds" / "full" / "params.yaml")
    params["featurize"]["settings"]["clip"][world.READY] = {"folder": "data/own/laion", "model": "ViT-B/32"}
    params["import_data"]["distractors"] = None
    (own / "params.yaml").write_text(yaml.safe_dump(params))
    world.run("own", graph=copy / "dvc.yaml", worlds=copy / "worlds")
    stages = read_yaml(own / "dvc.yaml")["stages"]
    assert not [dep for dep in stages["import_data"]["deps"] if "distractors" in dep]
    for name in ("data/own/exemplars", "data/own/laion"):
        (own / name).mkdir(parents=True)
    (own / "data/own/laion/img_emb_0.npy").write_bytes(b"some")
    named = [f"worlds/own/dvc.yaml:featurize@{name}" for name in ("clip", "dino")]
    status = json.loads(run(copy, "dvc", "status", "--json", *named))
    of_clip, of_dino = (status[name][0]["changed deps"] for name in named)
    ready, pictures = "worlds/own/data/own/laion", "worlds/own/data/world/distractors"
    assert (ready in of_clip, pictures in of_clip) == (True, False)
    assert (ready in of_dino, pictures in of_dino) == (False, True)
    shutil.rmtree(own)


def test_dvc_would_run_every_stage_for_every_backbone(copy: Path) -> None:
    told = run(copy, "dvc", "repro", "--dry", "--force", "worlds/full/dvc.yaml")
    backbones = load_params(featurize.Params, "featurize", FULL / "params.yaml").backbones
    wanted = {"import_data", "customize", "synthesize"}
    wanted |= {f"{stage}@{name}" for stage in world.STAGES[2:] for name in backbones}
    lines = [line for line in told.splitlines() if line.startswith("Running stage")]
    assert {line.split(":")[1].strip("'") for line in lines} == wanted


def test_the_default_graph_knows_nothing_of_it(copy: Path) -> None:
    names = run(copy, "dvc", "stage", "list", "--name-only").split()
    assert names
    assert not [name for name in names if "worlds" in name or name.endswith("@dino")]


def test_pictures_of_ones_own_are_seen_by_dvc_and_not_by_git(copy: Path) -> None:
    """DVC passes over folders that git ignores; what it does not see, `dvc checkout` removes."""
    for folder in ("data/own/pictures", "worlds/full/data/own/pictures"):
        (copy / folder).mkdir(parents=True)
        (copy / folder / "x.png").write_text("x")
        (copy / f"{folder}.dvc").write_text("outs:\n- path: pictures\n")
    script = "from dvc.repo import Repo; print(*(stage.relpath for stage in Repo().index.stages))"
    seen = run(copy, "python", "-c", script).split()
    git_sees = run(copy, "git", "ls-files", "--others", "--exclude-standard").split()
    for found in (seen, git_sees):
        own = [name for name in found if name.endswith("pictures.dvc")]
        assert sorted(own) == ["data/own/pictures.dvc", "worlds/full/data/own/pictures.dvc"]
    assert not [name for name in git_sees if name.endswith("x.png")]
    for folder in ("data/own", "worlds/full/data/own"):
        shutil.rmtree(copy / folder)


def test_a_stage_runs_there_on_the_code_up_here(copy: Path) -> None:
    """Far enough to find its modules, its parameters and its missing input."""
    folder = copy / "worlds" / "full"
    environment = {**os.environ, "PYTHONPATH": "../.."}
    command = [sys.executable, "-m", "stages.import_data"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "data/own/exemplars: " in done.stderr.splitlines()[-1]
    assert pq.read_table(folder / "data" / "shipped" / "synthesized.parquet").num_rows == 0


def test_made_again_it_is_the_same(copy: Path) -> None:
    file = copy / "worlds" / "full" / "dvc.yaml"
    before = file.read_bytes()
    assert world.run("full", graph=copy / "dvc.yaml", worlds=copy / "worlds").startswith(str(file))
    assert file.read_bytes() == before
    assert yaml.safe_load(before)["stages"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no section import_data; the file has: nothing"),
        (None, "featurize.settings.pixels: unknown key librari; missing key library"),
    ],
)
def test_parameters_that_give_no_graph_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "own" / "params.yaml"
    file.parent.mkdir()
    full = (FULL / "params.yaml").read_text()
    file.write_text(full.replace("library: pixels", "librari: pixels") if text is None else text)
    with pytest.raises(ValueError, match=f"{file}: {message}"):
        world.run("own", graph=ROOT / "dvc.yaml", worlds=tmp_path)
    assert not (tmp_path / "own" / "dvc.yaml").exists()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "nowhere",
            FileNotFoundError,
            r"nowhere/params\.yaml: no such file; copy those of another world; there are: full",
        ),
        ("", ValueError, "world '': wanted the name of a folder"),
        ("../full", ValueError, r"world '\.\./full': wanted the name of a folder"),
        # Its graph and its shipped images would take the place of the repository's own.
        ("..", ValueError, r"world '\.\.': wanted the name of a folder"),
    ],
)
def test_what_is_no_world_is_told(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        world.run(name, graph=ROOT / "dvc.yaml", worlds=ROOT / "worlds")
