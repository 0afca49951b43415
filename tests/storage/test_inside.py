"""Names and links that would lead out of their directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raymem.errors import ModelError, StorageError
from raymem.storage import publish
from raymem.storage.connect import verify_names
from raymem.storage.inside import is_inside, leads_out
from raymem.storage.safetensors_io import shard_files
from raymem.storage.storage import Storage
from raymem.training.artifacts.vllm import copy_adapter
from raymem.training.model.companions import copy_companions

OUTSIDE = ["../outside", "/etc/hostname", "a/../../outside"]


@pytest.mark.parametrize("name", [*OUTSIDE, "", "a\0b", 3, None])
def test_names(name: object) -> None:
    assert not is_inside(name)
    assert is_inside("a/b.safetensors") and is_inside("..a")


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_files_of_its_model(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="is no file of the directory"):
        shard_files(tmp_path)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_files_of_its_directory(tmp_path: Path, name: str) -> None:
    made = tmp_path / "made"
    publish.publish(made, lambda directory: {"written": (directory / "a").write_text("x")})
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["a"]
    (tmp_path / "outside").write_text("x")
    (made / "manifest.json").write_text(json.dumps(publish.seal(manifest)))
    assert publish.read_manifest(made) is None
    with pytest.raises(StorageError, match="leads out of it"):
        verify_names("s3://bucket/made", {}, [name])
    with pytest.raises(StorageError, match="listed but missing"):  # a download copies what is listed there, not here
        Storage.open(str(tmp_path)).download_dir("made", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "credentials"
    path.write_text("secret")
    return path


def test_files_behind_links_are_not_copied(tmp_path: Path, secret: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, target = tmp_path / "base", tmp_path / "target"
    base.mkdir()
    target.mkdir()
    (base / "LICENSE").symlink_to(secret)
    (base / "kept.txt").write_text("kept")
    (base / "NOTICE").symlink_to(base / "kept.txt")
    copy_companions(base, target, same_tokenizer=True)
    assert sorted(path.name for path in target.iterdir()) == ["NOTICE", "kept.txt"]
    assert "LICENSE is a link to a file outside of the model" in caplog.text
    with pytest.raises(StorageError, match=r"LICENSE is a link to .*credentials, outside of the adapter"):
        copy_adapter(base, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_links_of_the_hub_cache_stay_in_it(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/c0ffee", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "12").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/12")
    assert not leads_out(snapshot / "config.json", snapshot)
