"""benchmarks.costs: sizes times measured rates, and nothing where nothing was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import costs, featurize, rates
from benchmarks.rates import Rate, read, record

ROOT = Path(__file__).resolve().parents[1]
PARAMS = ROOT / "worlds" / "full" / "params.yaml"
HOUR = Rate(3600.0, "one GPU", "python -m benchmarks.customize", disk_bytes=38e6, peak_bytes=20 * 10**9)


def rows(text: str) -> dict[str, list[str]]:
    lines = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines[2:]}


def test_the_paper_s_sizes_are_counted() -> None:
    work = {one.name: one for one in costs.work_of(PARAMS)}
    assert work["customize"].items == 6930 + 250 + 255
    # 40 images of each of two prompt kinds.
    assert work["synthesize"].items == 80 * 7435
    assert work["featurize@clip"].items == 80 * 7435 + 1_000_000 + 6930 + 1692 + 3081
    backbones = sum(name.startswith("featurize@") for name in work)
    assert work["evaluate"].items == backbones * 80 * (593 + 1000 + 250 + 255) * 1_000_000
    assert work["calibrate"].items == backbones * 4 * 593 * 1_000_000
    assert work["train_mapper"].items == backbones * 80 * 4744 * 30


def test_ready_distractors_are_not_encoded(tmp_path: Path) -> None:
    params = yaml.safe_load(PARAMS.read_text())
    ready = {"folder": "laion", "model": "ViT-B/32"}
    params["featurize"]["settings"]["clip"]["ready_distractors"] = ready
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    work = {one.name: one for one in costs.work_of(tmp_path / "params.yaml")}
    assert work["featurize@clip"].items == work["featurize@dino"].items - 1_000_000


def test_without_rates_every_cell_is_empty() -> None:
    found = rows(costs.table(costs.work_of(PARAMS), {}))
    assert found.pop("all")[0] == f"0 of {len(found)} rows measured"
    for cells in found.values():
        assert cells[1:] == ["not measured", "", "", "", ""]


def test_a_rate_fills_its_row_and_no_other() -> None:
    clip = Rate(0.001, "one GPU", "python -m benchmarks.featurize", peak_bytes=3 * 10**9, dim=512)
    found = rows(costs.table(costs.work_of(PARAMS), {"customize": HOUR, "featurize@clip": clip}))
    where = "one GPU (`python -m benchmarks.customize`)"
    assert found["customize"] == ["7,435 models", "0.0002778", "7,435.0", "282.5", "20.0", where]
    vectors = 80 * 7435 + 1_011_703
    assert found["featurize@clip"][1:5] == ["1,000", "0.4", f"{vectors * 512 * 4 / 1e9:.1f}", "3.0"]
    assert found["featurize@dino"][1] == "not measured"
    assert found["all"] == [f"2 of {len(found) - 1} rows measured", "", "7,435.4 of one GPU", "285.8", "", ""]


def test_what_a_rate_lacks_is_empty_too() -> None:
    found = rows(costs.table(costs.work_of(PARAMS), {"synthesize": Rate(1.0, "one GPU", "x")}))
    assert found["synthesize"] == ["594,800 images", "1", "165.2", "", "", "one GPU (`x`)"]
    assert found["all"][1:4] == ["", "165.2 of one GPU", ""]


def test_rates_stay_beside_each_other(tmp_path: Path) -> None:
    file = tmp_path / "results" / "rates.json"
    assert read(file) == {}
    record("customize", HOUR, file)
    other = Rate(0.5, "another", "y", dim=768)
    record("featurize@dino", HOUR, file)
    record("featurize@dino", other, file)
    assert read(file) == {"customize": HOUR, "featurize@dino": other}


def test_rates_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seconds: wanted > 0, got 0"):
        Rate(0, "one GPU", "x")
    file = tmp_path / "rates.json"
    file.write_text('{"customize": {"hours": 3}}')
    with pytest.raises(ValueError, match=r"rates\.json: customize: not a rate: .*hours"):
        read(file)
    with pytest.raises(ValueError, match="rates of what this world does not run: featurize@gone"):
        costs.table(costs.work_of(PARAMS), {"featurize@gone": HOUR})


def test_what_was_recorded_so_far_is_of_this_world() -> None:
    costs.table(costs.work_of(PARAMS), read(rates.RATES))


def test_the_command_prints_or_rewrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    readme, file = tmp_path / "README.md", tmp_path / "rates.json"
    record("customize", HOUR, file)
    readme.write_text("Costs\n<!-- costs:begin -->\nold\n<!-- costs:end -->\nmore\n")
    monkeypatch.setattr(sys, "argv", ["costs", "--rates", str(file)])
    costs.main()
    printed = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["costs", "--rates", str(file), "--readme", str(readme)])
    costs.main()
    assert readme.read_text() == f"Costs\n<!-- costs:begin -->\n{printed}<!-- costs:end -->\nmore\n"
    assert capsys.readouterr().out == ""


def test_featurize_is_measured_beside_its_peer_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"library": "timm", "model": "test_vit", "weights": "pretrained", "image_size": 160}
    settings = {"clip": {**row, "dtype": "float32", "batch_size": 4}}
    (tmp_path / "params.yaml").write_text(
        yaml.safe_dump({"featurize": {"shard_rows": 4, "settings": settings}})
    )
    file, output = tmp_path / "rates.json", tmp_path / "featurize.json"
    monkeypatch.setattr(featurize, "record", lambda name, rate: record(name, rate, file))
    options = ["--params", str(tmp_path / "params.yaml"), "--images", "6", "--side", "64", "--rounds", "1"]
    monkeypatch.setattr(
        sys, "argv", ["featurize", *options, "--workers", "1", "--record", "--output", str(output)]
    )
    featurize.main()
    told = json.loads(output.read_text())["clip"]
    for rows_told in (told["rows"], told["loader_alone"]):
        assert [one["loop"] for one in rows_told] == ["ours", "loop written out"]
    assert told["rows"][0]["ours_over_it"] == 1
    assert (told["images"], told["batch_size"], told["dim"]) == (6, 4, 64)
    rate = read(file)["featurize@clip"]
    assert rate.dim == 64
    assert rate.seconds == pytest.approx(1 / told["rows"][0]["images_per_second"])
    assert "images/s" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--peer-python", sys.executable])
    with pytest.raises(ValueError, match="clip: clip-retrieval knows nets of open_clip, got timm"):
        featurize.main()
    with (
        pytest.raises(RuntimeError, match="wanted a Python with clip-retrieval"),
        featurize.clip_retrieval(Path("true"), "ViT-B-32", tmp_path, batch_size=1, workers=1),
    ):
        pass
