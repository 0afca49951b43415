"""Artefacts on an object store (moto on loopback) as files of this node: fetched once, and only whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymem.errors import StorageError
from raymem.runs.artifacts import local_copy
from raymem.storage.checksums import CHECKSUMS, write_checksums
from raymem.storage.remote import copies
from raymem.storage.storage import Storage
from raymem.training.artifacts.facts import FACTS


@pytest.fixture
def remote(s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path / "node"))
    return Storage.open(s3_uri).child(f"artifacts-{tmp_path.name}")


def written(folder: Path) -> Path:
    (folder / "more").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", FACTS, "more/chat.jinja"):
        (folder / name).write_text(name)
    write_checksums(folder)
    return folder


def test_a_whole_model_is_fetched_once(remote: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = written(tmp_path / "made")
    remote.upload_dir(made, "run/model", last=FACTS)
    fetched: list[str] = []
    fetch = copies._fetch

    def noted(storage: Storage, name: str, target: Path) -> None:
        fetched.append(name)
        fetch(storage, name, target)

    monkeypatch.setattr(copies, "_fetch", noted)
    directory = Path(local_copy(remote.join("run/model")))
    assert local_copy(remote.join("run/model")) == str(directory)
    files = sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file())
    assert sorted(fetched) == files == sorted(
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    )  # fmt: skip
    assert all((directory / name).read_bytes() == (made / name).read_bytes() for name in files)
    assert directory.is_relative_to(tmp_path / "node")


def test_what_is_not_whole_is_refused(remote: Storage, tmp_path: Path) -> None:
    remote.upload_dir(written(tmp_path / "made"), "run/model", last=FACTS)
    remote.delete_file(f"run/model/{FACTS}")
    with pytest.raises(StorageError, match=rf"run/model.* has no {FACTS}: its upload never finished"):
        local_copy(remote.join("run/model"))
    remote.delete_file(f"run/model/{CHECKSUMS}")
    assert (Path(local_copy(remote.join("run/model"))) / "config.json").is_file(), "somebody else's model"
    with pytest.raises(StorageError, match=r"run/none.* has no files; check the address"):
        local_copy(remote.join("run/none"))


def test_a_directory_is_where_it_is(tmp_path: Path) -> None:
    assert local_copy(str(tmp_path)) == str(tmp_path)
