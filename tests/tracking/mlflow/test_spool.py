"""Rows that wait for a server lie in files, on a disk and on an object store, and none is lost or read twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import fs

from raymem.tracking.mlflow.spool import Spool


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[fs.FileSystem, str]:
    if request.param == "disk":
        return fs.LocalFileSystem(), str(tmp_path / "run" / "mlflow")
    filesystem, path = fs.FileSystem.from_uri(request.getfixturevalue("s3_uri"))
    return filesystem, f"{path}/run/mlflow"


def test_what_one_process_left_the_next_one_reads_once(place: tuple[fs.FileSystem, str]) -> None:
    first = Spool(*place)
    assert not list(first.batches())
    key = first.state()["key"]
    first.note({"key": key, "reports": 5})
    for step in range(1, 4):
        first.add([(step * 1000, {"step": float(step), "loss": float("nan")})])
    second = Spool(*place)
    assert second.state() == {"key": key, "reports": 5}
    second.add([(4000, {"step": 4.0})])
    reading = second.batches()
    assert [row["step"] for _, row in next(reading)] == [1.0, 2.0, 3.0, 4.0]
    assert len(next(Spool(*place).batches())) == 4, "not forgotten before they are delivered"
    with pytest.raises(StopIteration):
        next(reading)
    assert not list(Spool(*place).batches())


def test_many_rows_come_in_parts(tmp_path: Path) -> None:
    spool = Spool(fs.LocalFileSystem(), str(tmp_path / "mlflow"))
    for part in range(3):
        spool.add([(0, {"step": float(part)})] * 600)
    assert [len(rows) for rows in spool.batches()] == [1200, 600]


def test_a_damaged_file_costs_its_own_rows_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = Spool(fs.LocalFileSystem(), str(tmp_path))
    for step in (1, 2):
        spool.add([(0, {"step": step})])
    (tmp_path / "waiting-000000001.json").write_text("[[0, {")
    assert list(spool.batches()) == [[(0, {"step": 2})]]
    assert "is damaged, its metrics are lost" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["waiting-000000001.json.damaged"]
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(ValueError, match="it holds no key; delete it, and a new run begins"):
        spool.state()
