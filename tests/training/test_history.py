"""One line per step in metrics.jsonl, whatever is killed, full or away."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from raymem.errors import StorageError, TransientStorageError
from raymem.storage.storage import Storage
from raymem.training.history import FILE, History, read_history


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage.open(str(tmp_path / "run"))
    return Storage.open(request.getfixturevalue("s3_uri")).child(tmp_path.name)


def steps(run: Storage) -> list[float]:
    return [json.loads(line)["step"] for line in run.read_bytes(FILE).splitlines()]


def begun(run: Storage, step: int) -> History:
    history = History(run)
    history.begin(step)
    return history


def test_a_history_goes_on_at_the_checkpoint(run: Storage) -> None:
    history = begun(run, 0)
    for step in (1, 2, 3):
        history.add({"step": step, "loss": 0.5})
    history.save()
    history.add({"step": 4, "loss": 0.5})  # and then it is killed
    assert steps(run) == ([1, 2, 3, 4] if run.is_local else [1, 2, 3])
    assert [row["step"] for row in read_history(run, 3)] == [1, 2, 3]
    again = begun(run, 2)
    for step in (3, 4):
        again.add({"step": step, "loss": 0.25})
    again.save()
    assert [(row["step"], row["loss"]) for row in read_history(run, 9)] == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25)]
    assert steps(run) == [1, 2, 3, 4]


def test_a_writer_writes_the_rows_up_to_its_checkpoint(s3_uri: str, tmp_path: Path) -> None:
    """It is called later, in another thread, when there may be more."""
    run = Storage.open(s3_uri).child(tmp_path.name)
    history = begun(run, 0)
    history.add({"step": 1})
    write = history.writer()
    history.add({"step": 2})
    assert read_history(run, 9) == []
    write()
    assert steps(run) == [1]
    history.writer()()
    assert steps(run) == [1, 2]


def test_a_new_run_begins_a_new_history(run: Storage) -> None:
    history = begun(run, 0)
    history.add({"step": 1})
    begun(run, 0).save()
    assert read_history(run, 9) == []


def test_what_is_no_row_is_left_out_and_missing_steps_are_said(run: Storage, caplog: pytest.LogCaptureFixture) -> None:
    lines = ['{"step": 2, "loss": 1}', '{"step": 2, "loss": 7}', "[]", "7", "null", '{"loss": 3}', '{"step": []}',
             "\udcff{", '{"step": 4, "lo']  # fmt: skip
    run.write_bytes(FILE, "\n".join(lines).encode(errors="surrogateescape"))
    assert read_history(run, 9) == [{"step": 2, "loss": 7}]
    begun(run, 3)
    assert f"{run.join(FILE)} has 1 of 3 steps" in caplog.text
    assert steps(run) == [2]


def test_a_disk_that_is_full_for_a_while_costs_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when a line was written in half; if it is full at a checkpoint still, that fails."""
    run = Storage.open(str(tmp_path))
    history = begun(run, 0)
    history.add({"step": 1})
    truncate, full = os.truncate, [True]

    class HalfWritten:
        def __init__(self, descriptor: int) -> None:
            self.descriptor = descriptor

        def __enter__(self) -> HalfWritten:
            return self

        def __exit__(self, *_: object) -> None:
            os.close(self.descriptor)

        def truncate(self, length: int) -> None:
            truncate(self.descriptor, length)

        def seek(self, place: int) -> None:
            os.lseek(self.descriptor, place, os.SEEK_SET)

        def write(self, content: bytes) -> None:
            os.write(self.descriptor, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(descriptor: int, mode: str) -> object:
        return HalfWritten(descriptor) if full[0] else open(descriptor, mode)

    monkeypatch.setattr("raymem.training.history.open", opened, raising=False)
    history.add({"step": 2})
    history.add({"step": 3})
    assert len(caplog.records) == 1 and "metrics.jsonl: cannot be written now: No space left" in caplog.text
    with pytest.raises(StorageError, match=r"metrics\.jsonl: no space left on the device.*; free some") as caught:
        history.save()
    assert not isinstance(caught.value, TransientStorageError)
    full[0] = False
    history.add({"step": 4})
    history.save()
    assert steps(run) == [1, 2, 3, 4]


def test_a_history_that_somebody_deletes_costs_no_run(tmp_path: Path) -> None:
    run = Storage.open(str(tmp_path))
    history = begun(run, 0)
    history.add({"step": 1})
    (tmp_path / FILE).unlink()
    history.add({"step": 2})
    history.save()
    assert steps(run) == [2]
