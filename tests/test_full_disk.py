"""A disk that fills up while a stage writes: one line, nothing half-written, and the next run goes on."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from attribution.features import FeatureSet
from attribution.files import DiskFullError
from stages import featurize as stage
from stages import import_data
from tests.test_featurize import data, digests, featurize, reused
from tests.test_import_data import bring_in, everything, make_distractors, make_exemplars

__all__ = ["data"]  # a fixture


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.mount("size=64k")

    def mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"needs the right to mount: {done.stderr.strip()}")

    def fill(self, leave: int) -> None:
        """Until so many bytes are free."""
        (self.path / "other's").write_bytes(bytes(shutil.disk_usage(self.path).free - leave))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    found = Disk(tmp_path / "disk")
    yield found
    subprocess.run(["umount", str(found.path)], check=True)


def no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another had filled the disk after there was room."""
    for module in (stage, import_data):
        monkeypatch.setattr(module, "require_space", lambda path, wanted_bytes, what: None)


def test_featurize_goes_on_when_there_is_room_again(
    data: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    featurize(data)
    undisturbed = digests(data)
    for folder in ("pixels", ".shards"):
        (data / "features" / folder).rename(data / f"first {folder}")
    no_check(monkeypatch)
    disk.fill(leave=3 * 4096)
    with pytest.raises(
        DiskFullError, match=r"^\[Errno 28\] .*npy: the disk is full after .* bytes free; what was"
    ) as error:
        featurize(data, shards=disk.path / "shards")
    assert "\n" not in str(error.value)
    whole = list((disk.path / "shards" / "pixels").iterdir())
    assert whole
    assert all(file.suffix == ".npy" and not file.name.startswith(".") for file in whole)
    for finished in (data / "features" / "pixels").glob("*"):
        FeatureSet.open(finished, verify=True)
    (disk.path / "other's").unlink()
    assert reused(featurize(data, shards=disk.path / "shards")) >= 4
    assert digests(data) == undisturbed


def test_import_data_goes_on_when_there_is_room_again(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("calm", "full"):
        make_exemplars(tmp_path / name)
        make_distractors(tmp_path / name, 40)
    bring_in(tmp_path / "calm")
    (tmp_path / "full" / "world").symlink_to(disk.path)
    no_check(monkeypatch)
    disk.fill(leave=6 * 4096)
    with pytest.raises(DiskFullError, match=r": the disk is full after .* free; what was half written"):
        bring_in(tmp_path / "full")
    kept = [path.relative_to(disk.path) for path in disk.path.rglob("*") if path.is_file()]
    assert not [path for path in kept if ".partial-" in str(path)]
    assert Path("exemplars.parquet") not in kept
    (disk.path / "other's").unlink()
    disk.mount("remount,size=1m")
    bring_in(tmp_path / "full")
    for path, wanted in everything(tmp_path / "calm").items():
        assert (tmp_path / "full" / path).read_bytes() == wanted
