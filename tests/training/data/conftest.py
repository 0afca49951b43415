"""A tokenizer small enough to be trained for every test session, and helpers to write data files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymem.training.data.demo import train_tokenizer

WORDS = ["def", "return", "the", "a", "of", "value", "answer", "question", "blue", "sky", "first", "second"]
WORDS += ["one", "two", "three", "four", "five", "six", "seven"]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE with <|end|>, <|pad|> and the demo's chat template."""
    directory = tmp_path_factory.mktemp("tokenizer")
    corpus = directory / "corpus.jsonl"
    lines = [{"text": f"{a} {b}\n    {a}({b})\n"} for a in WORDS for b in WORDS]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    train_tokenizer([corpus], directory / "made")
    return directory / "made"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Any:
    from raymem.training.data.tokenizer import load_tokenizer

    return load_tokenizer(str(tokenizer_dir))


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, rows: list[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def sentences(count: int, seed: int = 0) -> list[str]:
    """Texts of very different lengths."""
    import random

    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, 30))) for _ in range(count)]


@pytest.fixture
def texts() -> Callable[..., list[str]]:
    return sentences
