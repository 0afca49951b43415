"""What is pushed to the hub is whole, says whose licence it is under, and names no path of this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from raymem.cli.main import run_app
from raymem.errors import ModelError, StorageError
from raymem.storage.checksums import CHECKSUMS, check_files, write_checksums
from raymem.training.artifacts.card import write_card
from raymem.training.artifacts.hub import check_push, push
from tests.helpers.fake_hub import TOKEN, FakeHub, reached_hub
from tests.helpers.support import make_recipe

RECIPE = {
    "model": {"name": "org/base"},
    "data": {"train": "/secret/place/train.jsonl", "sequence_length": 64},
    "storage": {"path": "/secret/place/runs"},
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with reached_hub(monkeypatch) as running:
        yield running


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", "org/base")


def write_adapter(directory: Path, base: str) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "base_model_name_or_path": base})
    )
    (directory / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    facts = {"recipe": make_recipe(RECIPE).to_dict(), "step": 7, "note": "of /several words"}
    (directory / "raymem.json").write_text(json.dumps(facts))
    write_card(directory)
    write_checksums(directory)
    return directory


def test_an_adapter_arrives_whole_with_the_licence_of_its_base_and_without_paths(
    hub: FakeHub, adapter: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert push(adapter, "org/tuned", private=True) == f"{hub.url}/org/tuned/commit/{'1' * 40}"
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    arrived = hub.files["org/tuned"]
    assert arrived.keys() == before.keys() and hub.private == {"org/tuned": True}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert arrived[name] == before[name]
    assert b"license: apache-2.0" in arrived["README.md"] and b"license: unknown" in before["README.md"]
    facts = json.loads(arrived["raymem.json"])
    assert facts["recipe"]["storage"]["path"] == "runs" and facts["note"] == "of /several words"
    assert not [name for name, content in arrived.items() if b"/secret/place" in content]
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in arrived.items():
        (copy / name).write_bytes(content)
    assert CHECKSUMS in arrived
    check_files(copy, ModelError)


def test_a_repository_that_exists_gets_another_commit_with_its_message(hub: FakeHub, adapter: Path) -> None:
    push(adapter, "org/tuned")
    push(adapter, "org/tuned", message="better")
    assert hub.messages == ["Upload adapter with raymem", "better"]


def test_a_base_without_a_card_leaves_the_licence_open(hub: FakeHub, tmp_path: Path) -> None:
    push(write_adapter(tmp_path / "adapter", "org/gone"), "org/tuned")
    assert b"license: unknown" in hub.files["org/tuned"]["README.md"]


def test_what_nobody_else_could_load_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    local = write_adapter(tmp_path / "adapter", str(tmp_path))
    with pytest.raises(ModelError, match="which nobody else can load; push the base first"):
        push(local, "org/tuned")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds neither an adapter nor a model"):
        push(tmp_path / "empty", "org/tuned")
    assert hub.files == {}


def test_a_damaged_file_and_a_link_to_elsewhere_are_not_pushed(hub: FakeHub, adapter: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("word")
    (adapter / "notes.txt").symlink_to(secret)
    with pytest.raises(StorageError, match="outside of the artefact, and would be uploaded"):
        push(adapter, "org/tuned")
    (adapter / "notes.txt").unlink()
    (adapter / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is not as raymem wrote it"):
        push(adapter, "org/tuned")
    assert hub.files == {}


@pytest.mark.parametrize(
    ("part", "status", "cure"),
    [("/api/repos/create", 403, "ask its owner for the right to write"), ("/commit/", 400, "push it again")],
)
def test_a_refusal_of_the_hub_is_a_sentence_with_a_cure(
    hub: FakeHub, adapter: Path, part: str, status: int, cure: str
) -> None:
    hub.refused[part] = status
    with pytest.raises(StorageError, match=rf"org/tuned: the hub refuses the upload \(.*\); {cure}"):
        push(adapter, "org/tuned")


def test_a_hub_that_does_not_answer_is_a_sentence_too(
    hub: FakeHub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match=r"org/tuned: the upload failed .*; push it again"):
        push(adapter, "org/tuned")


def test_what_is_wrong_is_known_before_anything_is_sent(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with pytest.raises(StorageError, match="is no name of a repository"):
        check_push("a/b/c")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(StorageError, match=r"without a token of the hub; log in with `hf auth login`, or set HF_TOKEN"):
        check_push("org/tuned")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match="HF_HUB_OFFLINE is set"):
        check_push("org/tuned")


def test_the_command(hub: FakeHub, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app("push", str(adapter), "org/tuned", "--private", "-m", "first") == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"pushed: {hub.url}/org/tuned/commit/{'1' * 40}\n", "")
    assert (hub.private, hub.messages) == ({"org/tuned": True}, ["first"])
    hub.refused["/commit/"] = 403
    assert run_app("push", str(adapter), "org/tuned") == 1
    out, err = capsys.readouterr()
    assert "org/tuned: the hub refuses the upload" in err and TOKEN not in out + err
