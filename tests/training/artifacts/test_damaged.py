"""Adapters that somebody else has damaged: one sentence and a status that says so, in every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymem.errors import ModelError, StorageError
from raymem.methods.peft.kind import read_tensors
from raymem.storage.checksums import CHECKSUMS
from raymem.training.artifacts.load import load_artifact
from raymem.training.artifacts.merge import merge
from raymem.training.model.adapter import continuing
from raymem.training.model.revision import trained_from
from tests.helpers.commands import run_command
from tests.helpers.support import make_recipe, run_fragment, train


@pytest.fixture(scope="module")
def trained(llama: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trained")
    outcome, _ = train(make_recipe(run_fragment(examples, place), {"train": {"steps": 1}}, model=llama))
    assert outcome is not None
    return Path(outcome.artifact)


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy that is taken as it is, as one of an earlier version: without digests."""
    shutil.copytree(trained, tmp_path / "adapter")
    (tmp_path / "adapter" / CHECKSUMS).unlink()
    return tmp_path / "adapter"


def pickled(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    weights.unlink()


def with_value(value: float) -> Callable[[Path], None]:
    def damage(adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors[min(tensors)].view(-1)[3] = value
        save_file(tensors, path, {"format": "pt"})

    return damage


def writing(file: str, text: str) -> Callable[[Path], None]:
    def damage(adapter: Path) -> None:
        (adapter / file).write_text(text)

    return damage


def with_rank(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": "x"}))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickled": (pickled, "holds no adapter_model.safetensors; raymem reads no pickled weights"),
    "nan": (with_value(float("nan")), "lora_A.weight holds numbers that are nan or infinite"),
    "inf": (with_value(float("inf")), "lora_A.weight holds numbers that are nan or infinite"),
    "list": (writing("adapter_config.json", "[]"), "adapter_config.json holds a list in place of an object"),
    "cut": (writing("adapter_config.json", '{"r": '), "adapter_config.json is not JSON"),
    "rank": (with_rank, "adapter_config.json: r is a text ('x') in place of a whole number"),
    "facts": (writing("raymem.json", "{"), "raymem.json is not JSON"),
    "facts list": (writing("raymem.json", "[]"), "raymem.json holds a list in place of an object"),
    "tokenizer": (writing("tokenizer_config.json", "[]"), "adapter"),
    "tokenizer cut": (writing("tokenizer_config.json", "{"), "adapter"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_generating_with_it_is_one_sentence(adapter: Path, damage: str) -> None:
    do, sentence = DAMAGES[damage]
    do(adapter)
    done = run_command("generate", adapter, "--prompt", "w1 w3")
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "Traceback" not in said
    assert sentence in " ".join(said.split()), said
    with pytest.raises((ModelError, StorageError)):
        merge(adapter, adapter.parent / "merged")
    assert not (adapter.parent / "merged").exists()


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        (
            "generation_config.json",
            "{",
            r"generation_config\.json is not JSON .*; take a whole copy of it, or remove it",
        ),
        ("generation_config.json", '{"eos_token_id": "x"}', r"eos_token_id is a text \('x'\) in place of"),
        ("generation_config.json", '{"eos_token_id": [1.5]}', r"eos_token_id \[1\.5\] are no ids of tokens"),
        ("config.json", "[]", "model cannot be loaded"),
        ("config.json", '{"model_type": 3}', "model cannot be loaded"),
        ("tokenizer.json", "{", "tokenizer .* cannot be loaded"),
        ("tokenizer_config.json", "[" * 9000, "tokenizer .* cannot be loaded"),
    ],
)
def test_damaged_files_of_a_model_are_named(llama: Path, tmp_path: Path, file: str, text: str, sentence: str) -> None:
    directory = shutil.copytree(llama, tmp_path / "model")
    (directory / file).write_text(text)
    with pytest.raises(ModelError, match=sentence):
        load_artifact(directory)


@pytest.mark.parametrize("damage", ["nan", "inf"])
def test_an_adapter_of_nan_is_not_evaluated_or_continued(adapter: Path, damage: str) -> None:
    DAMAGES[damage][0](adapter)
    with pytest.raises(ModelError, match="holds numbers that are nan or infinite"):
        read_tensors(adapter / "adapter_model.safetensors", str(adapter))


def test_a_config_with_a_rank_that_is_none_is_not_continued(adapter: Path) -> None:
    with_rank(adapter)
    with pytest.raises(ModelError, match=r"adapter_config\.json is no config of a lora adapter \(rank: "):
        continuing(adapter)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ModelError, match=r"it has no r\b"):
        continuing(adapter)


@pytest.mark.parametrize("facts", ['{"recipe": []}', '{"recipe": {"model": 1}}'])
def test_facts_of_another_shape_name_their_part(adapter: Path, facts: str) -> None:
    (adapter / "raymem.json").write_text(facts)
    with pytest.raises(StorageError, match=r"raymem\.json: (recipe|model) holds .* in place of an object"):
        trained_from(str(adapter), "any")
