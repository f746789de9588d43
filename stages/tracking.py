"""Mirrors results into MLflow: one flat run per backbone and result. Nothing is ever read back from it.

In:   metrics/<backbone>.json, data/evaluation/<backbone>, data/mappers/<backbone>/history.csv
Out:  MLflow at MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the repository
Cost: about 5 s a result, of which 3 s are MLflow's import. `python -m stages.tracking` logs what is not there
      yet, for results that were pulled and not computed.
"""

from __future__ import annotations

import csv
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attribution.command import command_line
from attribution.files import content_key, read_json

EXPERIMENT = "attribution"
VARIANTS = ("raw", "mapped", "own_kind", "whitening", "permuted", "own_kind_permuted", "chance", "ceiling")


def log_result(
    metrics_path: Path,
    *,
    evaluation_dir: Path | None = None,
    history_path: Path | None = None,
) -> str | None:
    """The id of the MLflow run that holds this result: a new one, or the one that holds it already.

    What goes wrong here is a RuntimeWarning and None, never an error: the result itself is in `metrics_path`.
    """
    try:
        return _log(metrics_path, evaluation_dir, history_path)
    except Exception as error:
        warnings.warn(
            f"{metrics_path}: not mirrored to MLflow ({type(error).__name__}: {error}); "
            "once it can be reached, run: python -m stages.tracking",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What MLflow compares: recall_at_10 (objects, mapped) and the like, then <kind>/<variant>_<metric>."""
    found: dict[str, float] = {}
    for prefix, tables in (("", metrics), ("hard_", metrics.get("hard_gallery", {}))):
        for kind in ("object", "style"):
            for variant, name, value in _of_kind(tables.get(kind, {}).get("all", {})):
                found[f"{kind}/{prefix}{variant}_{name}"] = value
                if variant == "mapped" and not prefix and (kind == "object" or "object" not in metrics):
                    found[name] = value
    after = metrics.get("calibration", {}).get("after", {})
    return found | {name: value for name, value in after.items() if isinstance(value, int | float)}


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else a database in the repository that DVC runs for (also from a copy of it)."""
    path = str(_root() / "mlflow.db")
    if set("%?") & set(path):  # which a URL means otherwise, and MLflow neither way everywhere
        path = os.path.relpath(path)
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{path}"


def _log(metrics_path: Path, evaluation_dir: Path | None, history_path: Path | None) -> str:
    # An unreachable server would otherwise hold the stage for minutes of retries.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import filelock
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    metrics = read_json(metrics_path)
    backbone = metrics["backbone"]
    key = content_key(metrics)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # Two writers would both create the tables, the experiment, or the run of one result.
    with filelock.FileLock(_root() / "mlflow.db.lock", timeout=120):
        client = MlflowClient(tracking_uri=tracking_uri())  # makes the tables, where there are none
        experiment_id = _experiment(client)
        known = client.search_runs(
            [experiment_id], f"tags.result_key = '{key}' and attributes.status = 'FINISHED'"
        )
        if known:
            return known[0].info.run_id
        tags = {"backbone": backbone, "world": _world(), "result_key": key}
        tags["mlflow.source.name"] = "stages.evaluate"
        tags |= {
            name: os.environ[name] for name in ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV") if name in os.environ
        }
        run_id = client.create_run(experiment_id, run_name=backbone, tags=tags).info.run_id
        try:
            now = int(time.time() * 1000)
            params = _params(evaluation_dir)
            logged = [Metric(name, value, now, 0) for name, value in headline(metrics).items()]
            logged += [Metric(name, value, now, step) for name, value, step in _history(history_path)]
            client.log_batch(
                run_id,
                metrics=logged[:1000],
                params=[Param(name, value) for name, value in params.items()][:100],
                tags=[RunTag("customized_models", str(_models(metrics)))],
            )
            client.log_artifact(run_id, str(metrics_path))
            if evaluation_dir is not None and evaluation_dir.is_dir():
                for plot in sorted(evaluation_dir.glob("*.png")):
                    client.log_artifact(run_id, str(plot), "plots")
        except BaseException:
            client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id, "FINISHED")
        return run_id


def _experiment(client: Any) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return found.experiment_id
    # A server has its own place for artifacts; for a database, MLflow would take the current folder.
    local = not tracking_uri().startswith(("http://", "https://", "databricks"))
    place = (_root() / "mlartifacts").as_uri() if local else None
    return client.create_experiment(EXPERIMENT, artifact_location=place)


def _of_kind(table: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    for variant in VARIANTS:
        for name, value in table.get(variant, {}).items():
            if isinstance(value, int | float):
                yield variant, name, float(value)


def _models(metrics: Mapping[str, Any]) -> int:
    return sum(
        metrics.get(kind, {}).get("all", {}).get("customized_models", 0) for kind in ("object", "style")
    )


def _params(evaluation_dir: Path | None) -> dict[str, str]:
    """What was recorded beside the result, as section.name; what is not there is not guessed."""
    if evaluation_dir is None or not (evaluation_dir / "params.json").is_file():
        return {}
    flat: dict[str, str] = {}
    for section, values in read_json(evaluation_dir / "params.json").items():
        flat |= {
            f"{section}.{name}": str(value) for name, value in values.items() if not isinstance(value, dict)
        }
    return flat


def _history(path: Path | None) -> Iterator[tuple[str, float, int]]:
    if path is None or not path.is_file():
        return
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("epoch"))
            yield from ((name, float(value), step) for name, value in row.items())


def _world() -> str:
    """Whose results these are: the name of a folder of worlds/, where its stages run, or default."""
    here = Path.cwd()
    return here.name if here.parent.name == "worlds" else "default"


def _root() -> Path:
    # DVC_ROOT is the repository itself even where an experiment runs in a copy.
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def backfill(metrics_dir: Path, evaluations_dir: Path, mappers_dir: Path) -> dict[str, str | None]:
    """The run of each backbone's result in `metrics_dir`, logged now where it was not yet."""
    runs = {}
    for path in sorted(metrics_dir.glob("*.json")):
        if "backbone" in read_json(path):
            runs[path.stem] = log_result(
                path,
                evaluation_dir=evaluations_dir / path.stem,
                history_path=mappers_dir / path.stem / "history.csv",
            )
    return runs


def main() -> None:
    runs = backfill(Path("metrics"), Path("data/evaluation"), Path("data/mappers"))
    for backbone, run_id in runs.items():
        print(f"{backbone}: {run_id or 'not logged'}")
    if not runs:
        raise FileNotFoundError("metrics: no results there; run from the repository's root, after: dvc repro")
    if None in runs.values():
        sys.exit(1)


if __name__ == "__main__":
    with command_line("stages.tracking", __doc__) as parser:
        parser.parse_args()
        main()
