from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raymem.storage.publish import verify
from raymem.training.data import demo
from raymem.training.data.demo import CORPORA, SPLITS, DemoPaths, build_corpus, ensure_demo, split_of, train_tokenizer


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    return ensure_demo(tmp_path_factory.mktemp("demo"))


def rows(paths: DemoPaths, corpus: str, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in paths.corpus(corpus, split).read_text().splitlines()]


def test_it_is_large_enough_and_split(paths: DemoPaths) -> None:
    verify(paths.directory)
    for corpus, least in (("functions", 3000), ("text", 1000)):
        train, evaluation = rows(paths, corpus, "train"), rows(paths, corpus, "eval")
        assert len(train) > least
        assert 0.04 < len(evaluation) / len(train) < 0.15
        assert len({json.dumps(row) for row in train + evaluation}) == len(train) + len(evaluation)


def test_functions_are_whole_code(paths: DemoPaths) -> None:
    for row in rows(paths, "functions", "eval"):
        (function,) = ast.parse(row["prompt"] + row["completion"]).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        (docstring_only,) = ast.parse(row["prompt"]).body
        assert isinstance(docstring_only, ast.FunctionDef | ast.AsyncFunctionDef) and len(docstring_only.body) == 1
        assert ast.get_docstring(docstring_only) == ast.get_docstring(function)
        assert row["completion"].endswith("\n") and len(function.body) > 1


def test_it_is_built_once(paths: DemoPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_build", lambda directory: pytest.fail("built twice"))
    assert ensure_demo(paths.directory.parents[1]) == paths


def test_the_tokenizer(paths: DemoPaths) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(paths.tokenizer)
    assert len(tokenizer) == 4096
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    text = "def f(x):\n    return 'gr\u00fc\u00dfe' + x\n\x00 \U0001f600"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    code = rows(paths, "functions", "eval")[0]["completion"]
    assert len(tokenizer(code)["input_ids"]) < len(code) / 2.5
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<|user|>\nq<|end|>\n<|assistant|>\na<|end|>\n"
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|user|>\nq<|end|>\n<|assistant|>\n"
    assert tokenizer(asked)["input_ids"].count(tokenizer.convert_tokens_to_ids("<|assistant|>")) == 1


def few_modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    modules = {name: source for name, source in demo._modules() if name.startswith(("json", "email", "http"))}
    assert {split_of(name) for name in modules} == set(SPLITS)
    monkeypatch.setattr(demo, "_modules", lambda: iter(modules.items()))
    return modules


def test_the_same_interpreter_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_modules(monkeypatch)
    made: list[dict[str, bytes]] = []
    for directory in (tmp_path / "one", tmp_path / "two"):
        directory.mkdir()
        build_corpus(directory)
        train_tokenizer([DemoPaths(directory).corpus(c, "train") for c in CORPORA], directory / "tokenizer")
        made.append({p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()})
    assert made[0] == made[1] and len(made[0]) == 7


def test_no_module_is_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = few_modules(monkeypatch)
    build_corpus(tmp_path)
    for split in SPLITS:
        own = [source.decode() for name, source in modules.items() if split_of(name) == split]
        for row in rows(DemoPaths(tmp_path), "text", split)[:50]:
            if "\n" in row["text"].strip():
                first = max(row["text"].splitlines(), key=len)
                assert any(first in source for source in own)


def test_another_library_is_another_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def library(body: str) -> Any:
        def modules() -> Iterator[tuple[str, bytes]]:
            yield "m", f'def f():\n    """Doc."""\n    return {body}\n'.encode()

        return modules

    monkeypatch.setattr(demo, "train_tokenizer", lambda files, directory: None)
    monkeypatch.setattr(demo, "_library_digest", demo._library_digest.__wrapped__)  # a process has one library
    made = []
    for body in ("1", "2", "1"):
        monkeypatch.setattr(demo, "_modules", library(body))
        made.append(ensure_demo(tmp_path).directory)
    assert made[0] == made[2] != made[1]


def test_the_demo_may_be_imported_first_and_is_light() -> None:
    code = (
        "import raymem.training.data.demo, raymem.training.data, sys; "
        "assert not {'transformers', 'datasets', 'ray', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
