"""The MLflow mirror: where it writes, what it holds, and that it never gets in the way."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from stages.tracking import backfill, headline, log_result, main, tracking_uri

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    # MLflow's and SQLAlchemy's own; what this project warns of is tested below.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def cell(recall: float) -> dict:
    variants = {
        name: {
            "recall_at_10": value,
            "recall_at_10_interval": [value - 0.1, value + 0.1],
            "mean_average_precision": 0.3,
        }
        for name, value in (("raw", 0.2), ("mapped", recall), ("whitening", 0.25), ("permuted", 0.2))
    }
    return {"all": {"queries": 8, "customized_models": 2, **variants, "chance": {"recall_at_10": 0.001}}}


def write_result(root: Path, backbone: str = "clip", recall: float = 0.5) -> dict:
    metrics = {
        "backbone": backbone,
        "object": cell(recall),
        "style": cell(recall / 2),
        "hard_gallery": {"object": cell(recall - 0.1)},
        "calibration": {"after": {"expected_calibration_error": 0.05}},
    }
    evaluation = root / "data" / "evaluation" / backbone
    evaluation.mkdir(parents=True, exist_ok=True)
    (root / "metrics").mkdir(exist_ok=True)
    (root / "metrics" / f"{backbone}.json").write_text(json.dumps(metrics))
    (evaluation / "params.json").write_text(
        json.dumps({"train_mapper": {"temperature": 0.07, "kind": "linear"}})
    )
    (evaluation / "page.png").write_bytes(b"picture")
    history = root / "data" / "mappers" / backbone / "history.csv"
    history.parent.mkdir(parents=True, exist_ok=True)
    history.write_text("epoch,train_loss,validation_map\n0,3.0,0.1\n1,2.0,0.2\n")
    return metrics


def log(root: Path, backbone: str = "clip") -> str | None:
    return log_result(
        root / "metrics" / f"{backbone}.json",
        evaluation_dir=root / "data" / "evaluation" / backbone,
        history_path=root / "data" / "mappers" / backbone / "history.csv",
    )


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


def test_a_result_is_one_flat_run_with_its_numbers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    write_result(root)
    monkeypatch.setenv("DVC_EXP_NAME", "warm-lamb")
    run_id = log(root)
    assert run_id
    assert log(root) == run_id  # the same result is the same run
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["backbone"], run.data.tags["DVC_EXP_NAME"]) == ("clip", "warm-lamb")
    assert run.data.tags["result_key"]
    assert run.data.tags["world"] == "default"
    assert run.data.metrics["recall_at_10"] == 0.5
    assert run.data.metrics["style/mapped_recall_at_10"] == 0.25
    assert run.data.metrics["object/hard_mapped_recall_at_10"] == pytest.approx(0.4)
    assert run.data.metrics["object/chance_recall_at_10"] == 0.001
    assert run.data.metrics["expected_calibration_error"] == 0.05
    assert run.data.params == {"train_mapper.temperature": "0.07", "train_mapper.kind": "linear"}
    steps = [(metric.step, metric.value) for metric in client.get_metric_history(run_id, "train_loss")]
    assert sorted(steps) == [(0, 3.0), (1, 2.0)]
    assert run.info.artifact_uri.startswith((root / "mlartifacts").as_uri())
    assert {entry.path for entry in client.list_artifacts(run_id)} == {"clip.json", "plots"}
    assert [entry.path for entry in client.list_artifacts(run_id, "plots")] == ["plots/page.png"]

    # Another result of the same backbone is another run; backfill adds what is not there and no more.
    write_result(root, recall=0.6)
    write_result(root, "ssl")
    (root / "metrics" / "gate.json").write_text('{"class": 0.9}')
    runs = backfill(root / "metrics", root / "data/evaluation", root / "data/mappers")
    assert set(runs) == {"clip", "ssl"}
    assert runs["clip"] != run_id
    assert backfill(root / "metrics", root / "data/evaluation", root / "data/mappers") == runs
    assert len(client.search_runs([run.info.experiment_id])) == 3


def test_a_run_tells_of_which_world_it_is(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    world = root / "worlds" / "own"
    world.mkdir(parents=True)
    write_result(world)
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.chdir(world)
    run = MlflowClient(f"sqlite:///{root / 'mlflow.db'}").get_run(str(log(world)))
    assert run.data.tags["world"] == "own"


@pytest.mark.parametrize("name", ["jobs%2Fmain", "what?now"])
def test_a_repository_may_have_any_name(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = root / name
    write_result(odd)
    monkeypatch.setenv("DVC_ROOT", str(odd))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-W", "ignore", "-m", "stages.tracking"]
    said = subprocess.run(command, cwd=odd, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    assert "not logged" not in said.stdout
    assert sorted(path.name for path in root.iterdir()) == [name]
    with sqlite3.connect(f"{(odd / 'mlflow.db').as_uri()}?mode=ro", uri=True) as connection:
        assert connection.execute("select count(*) from runs").fetchone() == (1,)
    assert len(list(odd.rglob("plots/page.png"))) == 1


def test_two_processes_that_write_first_at_once_lose_nothing(root: Path) -> None:
    write_result(root, "clip")
    write_result(root, "ssl")
    line = "import sys; from pathlib import Path; from stages.tracking import log_result; "
    line += "print(log_result(Path(sys.argv[1])))"
    command = [sys.executable, "-W", "ignore", "-c", line]
    started = [
        subprocess.Popen(
            [*command, str(root / "metrics" / f"{name}.json")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("clip", "ssl")
    ]
    runs = [process.communicate(timeout=120)[0].split()[-1] for process in started]
    assert len(set(runs)) == 2
    assert "None" not in runs


def test_the_environment_names_the_server(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri() == f"sqlite:///{root / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert tracking_uri() == "http://127.0.0.1:9"


def test_the_command_fails_where_nothing_is_logged(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    with pytest.raises(FileNotFoundError, match="metrics: no results there; run from the repository's root"):
        main()
    write_result(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "no-such-scheme://x")
    with pytest.warns(RuntimeWarning, match="not mirrored"), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().out == "clip: not logged\n"


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "no-such-scheme://x"])
def test_a_tracking_failure_warns_and_no_more(uri: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_result(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.warns(
        RuntimeWarning, match=r"clip.json: not mirrored to MLflow .*run: python -m stages.tracking"
    ):
        assert log(root) is None


def test_headline_is_the_mapped_objects_or_the_styles_where_there_are_none() -> None:
    metrics = {"style": cell(0.3)}
    assert headline(metrics)["recall_at_10"] == 0.3
    assert headline({**metrics, "object": cell(0.5)})["recall_at_10"] == 0.5
    assert not any("interval" in name for name in headline(metrics))
