"""A sweep's journal on an object store (moto): the same study as in a file, whole after a kill, and for one writer."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymem.errors import StorageError
from raymem.storage.storage import Storage
from raymem.sweeps import journal
from raymem.sweeps.journal import ObjectJournal, open_study
from raymem.sweeps.options import Objective

LOSS = Objective(("eval_loss",))


@pytest.fixture
def folder(s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr(journal, "PART_BYTES", 1000)
    return Storage.open(s3_uri).child(tmp_path.name, "sweep")


def run_trials(folder: Storage, count: int) -> None:
    study = open_study(folder, LOSS, "sweep")
    for _ in range(count):
        trial = study.ask()
        trial.set_user_attr("point", {"adapter.rank": trial.suggest_categorical("adapter.rank", [2, 4])})
        study.tell(trial, 1.0 / (1 + trial.number))


def told(folder: Storage) -> list[object]:
    trials = open_study(folder, LOSS, "sweep").get_trials()
    return [(trial.number, trial.state, trial.values, list(trial.user_attrs)) for trial in trials]


def test_it_is_the_journal_of_a_directory_in_parts(folder: Storage, tmp_path: Path) -> None:
    in_directory = Storage.open(str(tmp_path))
    for place in (folder, in_directory):
        run_trials(place, 2)
        run_trials(place, 2)  # as after a kill
    assert told(folder) == told(in_directory) and len(told(folder)) == 4
    parts = sorted(folder.sizes(journal.FOLDER))
    assert parts == [f"{number:06d}.jsonl" for number in range(len(parts))] and len(parts) > 2
    assert all(size <= 1000 for size in folder.sizes(journal.FOLDER).values())
    (tmp_path / "copy").mkdir()
    whole = b"".join(folder.read_bytes(f"{journal.FOLDER}/{part}") for part in parts)
    (tmp_path / "copy" / journal.FILE).write_bytes(whole)
    assert told(Storage.open(str(tmp_path / "copy"))) == told(folder), "one after the other they are the file"


@pytest.mark.parametrize("size", [100, 970])
def test_a_driver_that_was_overtaken_adds_nothing(folder: Storage, size: int) -> None:
    """Be it to the part that both know, or in a new one that each would begin."""
    first = ObjectJournal(folder)
    first.append_logs([{"pad": "x" * size}])
    second = ObjectJournal(folder)
    second.append_logs([{"by": "second", "b": 1}])
    with pytest.raises(StorageError, match="another driver has gone on with this sweep"):
        first.append_logs([{"by": "first", "c": 2}])
    assert [log.get("by") for log in ObjectJournal(folder).read_logs(0)] == [None, "second"]
    assert len(folder.sizes(journal.FOLDER)) == (1 if size == 100 else 2)


def test_what_is_damaged_is_named(folder: Storage) -> None:
    run_trials(folder, 4)
    whole = folder.read_bytes("journal/000000.jsonl")
    folder.write_bytes("journal/000000.jsonl", whole[:-5])
    with pytest.raises(StorageError, match=r"journal/000000\.jsonl.* is damaged \(.*start over with --fresh"):
        open_study(folder, LOSS, "sweep")
    folder.filesystem.delete_file(f"{folder.root}/journal/000000.jsonl")
    with pytest.raises(StorageError, match=r"000000\.jsonl is missing and 000001\.jsonl is there"):
        open_study(folder, LOSS, "sweep")
