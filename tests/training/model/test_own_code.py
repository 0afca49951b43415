"""A model that brings code of its own: the code never runs, nobody is asked, and one sentence says so."""

from __future__ import annotations

import ast
import builtins
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import raymem
from raymem.cluster.doctor.local import check_model
from raymem.errors import ModelError
from raymem.methods.loram.nonuniform import read_config
from raymem.training.artifacts.load import load_artifact
from raymem.training.data.tokenizer import load_tokenizer
from raymem.training.model.build import load_config, on_meta
from tests.helpers.commands import run_command
from tests.helpers.support import make_recipe, run_fragment, train

FILES = sorted(Path(raymem.__file__).parent.rglob("*.py"))
SENTENCE = r"brings code of its own \(auto_map in .*\), which raymem does not run; use a model whose architecture"


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    """Every call of a ``from_pretrained`` or ``from_config`` that may load code from a directory."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_peft = isinstance(node.func.value, ast.Name) and node.func.value.id.startswith("Peft")
            if node.func.attr in ("from_pretrained", "from_config") and not of_peft:
                yield node


def says_no(call: ast.Call) -> bool:
    return any(
        word.arg == "trust_remote_code" and isinstance(word.value, ast.Constant) and word.value.value is False
        for word in call.keywords
    )


def test_every_call_that_could_run_foreign_code_says_no() -> None:
    found = [(path, call) for path in FILES for call in calls(ast.parse(path.read_text()))]
    assert len(found) >= 8
    assert [f"{path}:{call.lineno}" for path, call in found if not says_no(call)] == []


def test_only_one_function_passes_on_what_a_recipe_says() -> None:
    """Elsewhere transformers' functions are called, or handed to that one with the recipe's own key."""
    handed, yes = [], []
    for path in FILES:
        tree = ast.parse(path.read_text())
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "as_recipe_says":
                (trusted,) = [ast.unparse(word.value) for word in node.keywords if word.arg == "trusted"]
                assert trusted in ("recipe.model.trust_remote_code", "trusted"), f"{path}:{node.lineno}"
                called.add(id(node.args[0]))
                handed.append(node)
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False":
                yes.append(path.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "from_config"):
                assert id(node) in called, f"{path}:{node.lineno} takes the function without calling it"
    assert len(handed) == 2
    assert yes == ["own_code.py"]


@pytest.mark.parametrize(
    "call", ["AutoConfig.from_pretrained(x)", "transformers.AutoModel.from_config(c, trust_remote_code=True)"]
)
def test_the_rule_sees_a_call_that_says_nothing(call: str) -> None:
    assert [says_no(found) for found in calls(ast.parse(call))] == [False]


@pytest.fixture(autouse=True)
def _nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any) -> str:
        raise AssertionError("transformers asked whether to run code")

    monkeypatch.setattr(builtins, "input", ask)


def with_code(model: Path, directory: Path, model_type: str | None = None, *, tokenizer: bool = True) -> Path:
    """A copy whose files name code, which leaves a file behind if it runs."""
    shutil.copytree(model, directory)
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config["model_type"] = model_type or config["model_type"]
    (directory / "config.json").write_text(json.dumps(config))
    if tokenizer:
        path = directory / "tokenizer_config.json"
        content = json.loads(path.read_text())
        content["auto_map"] = {"AutoTokenizer": ["own.Slow", "own.Fast"]}
        if model_type is not None:
            content["tokenizer_class"] = "NowhereTokenizer"
        path.write_text(json.dumps(content))
    (directory / "own.py").write_text(f"open({str(directory / 'ran')!r}, 'w').close()\n")
    return directory


@pytest.mark.parametrize(
    "load",
    [
        lambda path: load_config(make_recipe(model=path)),
        lambda path: load_artifact(path),
        lambda path: read_config(path),
    ],
    ids=["config", "artifact", "loram"],
)
def test_an_unknown_architecture_is_refused_in_a_sentence(
    llama: Path, tmp_path: Path, load: Callable[[Path], object]
) -> None:
    path = with_code(llama, tmp_path / "own", "nowhere")
    with pytest.raises(ModelError, match=SENTENCE) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert not (path / "ran").exists()


def test_commands_say_it_too(llama: Path, tmp_path: Path) -> None:
    path = with_code(llama, tmp_path / "own", "nowhere")
    (check,) = check_model(make_recipe(model=path))
    assert not check.ok
    done = run_command("generate", path, "--prompt", "w1")
    assert done.returncode == 1
    assert "brings code of its own" in done.stderr + done.stdout
    assert not (path / "ran").exists()


def test_a_tokenizer_of_its_own_is_refused_in_a_sentence(llama: Path, tmp_path: Path) -> None:
    path = with_code(llama, tmp_path / "own", "nowhere")
    with pytest.raises(ModelError, match=rf"model\.tokenizer: .*{SENTENCE}"):
        load_tokenizer(str(path))
    assert not (path / "ran").exists()


def test_a_known_architecture_is_taken_from_transformers(llama: Path, examples: Path, tmp_path: Path) -> None:
    path = with_code(llama, tmp_path / "own")
    recipe = make_recipe(run_fragment(examples, tmp_path), {"train": {"steps": 1}}, model=path)
    assert type(on_meta(load_config(recipe), recipe)).__module__.startswith("transformers.")
    outcome, _ = train(recipe)
    assert outcome is not None
    load_artifact(outcome.artifact)
    assert not (path / "ran").exists()
