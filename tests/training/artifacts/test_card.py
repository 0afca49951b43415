"""The model card of a result says what was trained and how it is used, and nothing private."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raymem.training.artifacts.card import public, write_card
from tests.helpers.support import make_recipe, run_fragment, train

HUB = {"model": {"name": "org/base", "revision": "abc123"}, "data": {"train": "org/texts", "sequence_length": 64}}


def card(directory: Path) -> Any:
    from huggingface_hub import ModelCard

    return ModelCard((directory / "README.md").read_text())


def written(directory: Path, *fragments: dict[str, Any], adapter: bool, **facts: Any) -> Any:
    directory.mkdir()
    recipe = make_recipe(*fragments)
    (directory / "raymem.json").write_text(json.dumps({"recipe": recipe.to_dict(), "step": 7, **facts}))
    if adapter:
        (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    write_card(directory)
    return card(directory)


def test_a_run_leaves_a_card(llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = make_recipe(run_fragment(examples, tmp_path, evaluated=True), model=llama)
    outcome, rows = train(recipe)
    assert outcome is not None and outcome.eval_loss is not None
    found = card(Path(outcome.artifact))
    assert (found.data.library_name, found.data.license) == ("peft", "unknown")
    assert "lora" in found.data.tags
    text = str(found)
    for words in (
        f"| training loss | {rows[-1]['loss']:.4f} |",
        f"| evaluation loss | {outcome.eval_loss:.4f} (perplexity {outcome.eval_perplexity:.2f}) |",
        "| training data | `train.jsonl` |",
        "AutoPeftModelForCausalLM.from_pretrained",
        "raymem generate DIR",
        f"vllm serve {llama.name} ",
    ):
        assert words in text, words
    assert str(tmp_path) not in text and str(llama) not in text and str(examples) not in text
    before = (Path(outcome.artifact) / "README.md").read_bytes()
    again, _ = train(recipe)  # complete already: the result is written once more
    assert again is not None and (Path(again.artifact) / "README.md").read_bytes() == before


def test_ids_of_the_hub_are_metadata(tmp_path: Path) -> None:
    found = written(tmp_path / "a", HUB, adapter=True, peak_bytes=3 << 29, predicted_peak_bytes=1 << 30)
    assert (found.data.base_model, found.data.datasets) == ("org/base", ["org/texts"])
    assert "base_model:adapter:org/base" in found.data.tags
    assert "| base model | `org/base` at revision `abc123` |" in str(found)
    assert "| peak memory of a worker | 1.50 GiB (predicted: 1.00 GiB) |" in str(found)
    whole = written(tmp_path / "m", HUB, {"adapter": {"kind": "none"}}, adapter=False)
    assert whole.data.library_name == "transformers"
    assert "base_model:finetune:org/base" in whole.data.tags
    assert "AutoModelForCausalLM.from_pretrained" in str(whole)


def test_each_kind_says_how_it_is_loaded(tmp_path: Path) -> None:
    moram = written(tmp_path / "a", HUB, {"adapter": {"kind": "moram", "rank": 4}}, adapter=True)
    assert "import raymem.methods.moram" in str(moram)
    merged = written(tmp_path / "m", HUB, adapter=False, merged_from="/x")
    assert "with its adapter folded in" in str(merged)
    assert "AutoModelForCausalLM.from_pretrained" in str(merged)


def test_a_directory_without_a_recipe_gets_none(tmp_path: Path) -> None:
    (tmp_path / "raymem.json").write_text('{"merged_from": "/x"}')
    write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/ann/secret project/data.jsonl", "data.jsonl"),
        ("s3://bucket/path/train.parquet?region=x", "train.parquet"),
        ("~/model/", "model"),
        ("org/name", "org/name"),
        ("hf://datasets/org/name/a.jsonl", "hf://datasets/org/name/a.jsonl"),
        ("demo:text", "demo:text"),
        ("a\x1b[2J\nb", "a\\x1b[2J b"),
    ],
)
def test_of_a_path_its_last_part_is_shown(value: str, shown: str) -> None:
    assert public(value) == shown


def test_names_do_not_end_a_cell(tmp_path: Path) -> None:
    data = {"data": {"train": "a|b`c.jsonl", "sequence_length": 64}}
    assert "| training data | `a\\|b'c.jsonl` |" in str(written(tmp_path / "a", HUB, data, adapter=True))
