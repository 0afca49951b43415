from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from raymem.errors import ModelError
from raymem.training.data.tokenizer import cached_tokenizer, load_tokenizer, tokenizer_key


def key_of(directory: Path) -> str:
    return tokenizer_key(load_tokenizer(str(directory)))


def test_the_key_is_the_content_not_the_path(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_dir, tmp_path / "copy")
    assert key_of(tmp_path / "copy") == key_of(tokenizer_dir)


def test_saving_it_again_keeps_the_key(tokenizer_dir: Path, tmp_path: Path) -> None:
    load_tokenizer(str(tokenizer_dir)).save_pretrained(tmp_path / "again")
    assert key_of(tmp_path / "again") == key_of(tokenizer_dir)


@pytest.mark.parametrize("part", ["vocabulary", "template", "special"])
def test_the_key_covers_all_that_decides_the_ids(tokenizer_dir: Path, tmp_path: Path, part: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tokenizer_dir, copy)
    if part == "template":
        (copy / "chat_template.jinja").write_text("{{ messages }}")
    else:
        path = copy / {"vocabulary": "tokenizer.json", "special": "tokenizer_config.json"}[part]
        content = json.loads(path.read_text())
        if part == "vocabulary":
            content["model"]["merges"].pop()
        else:
            content["eos_token"] = "<|user|>"
        path.write_text(json.dumps(content))
    assert key_of(copy) != key_of(tokenizer_dir)


def test_saved_truncation_and_padding_are_turned_off(tokenizer_dir: Path, tmp_path: Path) -> None:
    backend = load_tokenizer(str(tokenizer_dir)).backend_tokenizer
    shutil.copytree(tokenizer_dir, tmp_path / "copy")
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "copy" / "tokenizer.json"))
    assert key_of(tmp_path / "copy") == key_of(tokenizer_dir)
    text = "one two three four five six seven"
    loaded = load_tokenizer(str(tmp_path / "copy")).backend_tokenizer.encode(text)
    assert len(loaded.ids) == 7


def test_errors_say_what_to_set(tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer .*nothing cannot be loaded .*: set model\.tokenizer to"):
        load_tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match="differs between processes"):
        cached_tokenizer(str(tokenizer_dir), "another")
