"""What runs, sweeps and stages wrote down and somebody has damaged: a sentence, or made again where that is all."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymem import cache
from raymem.errors import StorageError
from raymem.runs.loram.results import record_of
from raymem.storage.storage import Storage
from raymem.sweeps.driver import _same_sweep
from raymem.sweeps.options import SweepOptions
from raymem.sweeps.trial import RESULT, earlier_result
from raymem.training.model.revision import RECORD, began_with
from tests.helpers.support import make_recipe

DAMAGED = ["", '{"key": ', "[]", "{}"]


@pytest.mark.parametrize("text", DAMAGED)
@pytest.mark.parametrize("stage", ["verify", "train"])
def test_a_stage_of_loram_says_which_file_to_delete(tmp_path: Path, stage: str, text: str) -> None:
    run = Storage.open(str(tmp_path))
    assert record_of(run, stage) == {}
    (tmp_path / "loram").mkdir()
    (tmp_path / "loram" / f"{stage}.json").write_text(text)
    with pytest.raises(StorageError, match=rf"loram/{stage}\.json .*delete"):
        record_of(run, stage)


@pytest.mark.parametrize("text", DAMAGED)
def test_a_sweep_says_how_to_start_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(StorageError, match=r"sweep\.json .*; start over with "):
        _same_sweep(Storage.open(str(tmp_path)), make_recipe(), {}, SweepOptions(budget_bytes=1 << 30, samples=1))


@pytest.mark.parametrize("text", DAMAGED)
def test_the_end_of_a_trial_is_named(tmp_path: Path, text: str) -> None:
    run = Storage.open(str(tmp_path))
    run.write_json(RESULT, {})
    Path(run.join(RESULT)).write_text(text)
    with pytest.raises(StorageError, match=r"\.json "):
        earlier_result(run)


@pytest.mark.parametrize("text", ["", "[]", '{"name": 3}'])
def test_what_a_run_began_with_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(StorageError, match=rf"{RECORD}.*delete it"):
        began_with(Storage.open(str(tmp_path)))


@pytest.mark.parametrize("text", [*DAMAGED, "[" * 200_000])
def test_what_can_be_made_again_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_answers", {})
    file = tmp_path / "probes" / f"{cache.key_of('fact')}.json"
    file.parent.mkdir()
    file.write_text(text)
    assert cache.remembered("probes", "fact", lambda: {"found": 1}) == {"found": 1}
    assert cache.read_json(file) == {"found": 1}
