"""`raymem init`: values that fit model, data and memory, each with its reason."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from raymem.cli.main import run_app
from raymem.errors import BudgetExceeded, RecipeError
from raymem.planner.types import Above, Plan
from raymem.recipe.axes import starts
from raymem.recipe.load import load_recipe, recipe_of
from raymem.recipe.yaml_text import parse
from raymem.runs.init import Wishes, memory, new_recipe
from raymem.runs.init.data import second_source
from raymem.runs.init.text import text_of
from raymem.training.data.guess import guess

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
WORDS = [f"w{number}" for number in range(30)]


@pytest.fixture(scope="module")
def chat_llama(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, with a chat template."""
    directory = tmp_path_factory.mktemp("chat") / "llama"
    shutil.copytree(llama, directory)
    return with_template(directory)


def with_template(directory: Path) -> Path:
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


def words(number: int, count: int) -> str:
    return " ".join(WORDS[(number * 7 + at) % len(WORDS)] for at in range(count))


def pairs(count: int = 12) -> list[tuple[str, str]]:
    return [(words(number, 3 + number % 5), words(number + 1, 1 + number % 3)) for number in range(count)]


def as_messages(path: Path) -> Path:
    rows = ([{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs())
    return write(path / "talks.jsonl", ({"messages": turns} for turns in rows))


def as_prompts(path: Path) -> Path:
    return write(path / "pairs.jsonl", ({"prompt": q, "completion": a} for q, a in pairs()))


def as_csv(path: Path) -> Path:
    with (path / "gsm.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *pairs()])
    return path / "gsm.csv"


def as_parquet(path: Path) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"instruction": q, "input": q if at % 2 else "", "output": a} for at, (q, a) in enumerate(pairs())]
    parquet.write_table(pa.Table.from_pylist(rows), path / "alpaca.parquet")
    return path / "alpaca.parquet"


def as_text(path: Path) -> Path:
    (path / "book.txt").write_text("\n\n".join(words(number, 40) for number in range(20)))
    return path / "book.txt"


def write(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


LAYOUTS: Sequence[Callable[[Path], Path]] = (as_messages, as_prompts, as_csv, as_parquet, as_text)


class NeedsBytes:
    """A planner of a model that needs 100 bytes a row, and 10 with checkpointing, besides 50."""

    asked: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, gpu: str | None = None) -> None: ...

    def __enter__(self) -> NeedsBytes:
        return self

    def __exit__(self, *_: object) -> None: ...

    def plan_within(self, recipe: Any, limit: int) -> Plan | Above:
        kind, rows = recipe.activations.kind, recipe.train.micro_batch
        self.asked.append((kind, rows))
        needed = 50 + rows * (100 if kind == "none" else 10)
        fields: dict[str, Any] = dict.fromkeys(Plan.__dataclass_fields__, 0)
        return Plan(**fields | {"capacity_bytes": needed}) if needed <= limit else Above(needed, "forward")


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> type[NeedsBytes]:
    monkeypatch.setattr(memory, "Planner", NeedsBytes)
    return NeedsBytes


def made(**wishes: Any) -> dict[str, Any]:
    text = new_recipe(Wishes(**wishes), "mine", lambda _: None).text
    assert all("#" in line or line.rstrip().endswith(":") or ": adamw" in line for line in text.splitlines()), text
    return dict(parse(text))


@pytest.mark.usefixtures("planner")
def test_a_recipe_for_questions_and_answers(
    chat_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, path = as_csv(tmp_path), tmp_path / "my.yaml"
    shutil.copy(data, tmp_path / "gsm-train.csv")
    shutil.copy(data, tmp_path / "gsm-test.csv")
    command = ["init", path, "--model", chat_llama, "--data", tmp_path / "gsm-train.csv", "--budget", "1GiB"]
    assert run_app(*command) == 0
    said = capsys.readouterr().out
    assert f"next: raymem data {path}   then   raymem train {path}" in said
    recipe, text = load_recipe(path), path.read_text()
    (train,), (evaluated,) = recipe.data.train, recipe.data.eval or []
    assert (train.format, train.columns) == ("prompt_completion", {"prompt": "question", "completion": "answer"})
    assert (train.template, evaluated.path) == ("chat", str(tmp_path / "gsm-test.csv"))
    assert recipe.data.sequence_length == 64 and recipe.name == "my" and recipe.budget == "1GiB"
    assert recipe.optimizer.lr == starts()["lora"].values["optimizer.lr"][0] < 1e-3
    assert recipe.train.epochs == 3 and recipe.train.global_batch % recipe.train.rows_per_pass == 0
    assert recipe.activations.kind == "none" and "4.0e-3" not in text and max(map(len, text.splitlines())) < 160

    assert run_app(*command) == 1
    assert "already exists" in capsys.readouterr().err


@pytest.mark.usefixtures("planner")
def test_layouts_and_methods(llama: Path, chat_llama: Path, tmp_path: Path) -> None:
    as_is = {"model": str(llama), "budget": "1GiB"}
    raw = made(**as_is, data=str(as_parquet(tmp_path)), method="full", epochs=0.5)
    assert raw["data"]["train"]["format"] == "alpaca" and raw["data"]["train"]["template"] == "none"
    assert raw["adapter"] == {"kind": "none"} and raw["optimizer"]["lr"] == 1e-5 and raw["train"]["epochs"] == 0.5
    raw = made(**as_is, data=str(as_text(tmp_path)), method="mlorc")
    assert raw["data"]["train"] == {"path": str(tmp_path / "book.txt"), "format": "text"}
    assert raw["optimizer"]["kind"] == "mlorc_adamw" and raw["data"]["sequence_length"] <= 1024
    raw = made(model=str(chat_llama), data=str(as_messages(tmp_path)), budget="1GiB")
    assert raw["data"]["train"]["format"] == "messages" and "template" not in raw["data"]["train"]


def test_checkpointing_comes_only_where_nothing_else_fits(
    llama: Path, tmp_path: Path, planner: type[NeedsBytes]
) -> None:
    wishes = {"model": str(llama), "data": str(as_prompts(tmp_path))}
    assert "activations" not in made(**wishes, budget="300")
    planner.asked.clear()
    raw = made(**wishes, budget="100")
    assert raw["activations"] == {"kind": "checkpoint"} and raw["train"]["micro_batch"] == 2
    assert planner.asked == [("none", 2), ("none", 1), ("checkpoint", 2)]
    too_little = "not even one row at a time fits into 9 B with activations=checkpoint and train.precision=bf16"
    with pytest.raises(BudgetExceeded, match=too_little):
        made(**wishes, budget="9")


def test_without_a_terminal_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app("init", tmp_path / "a.yaml") == 1
    assert "--model and --data: not given, and this is no terminal" in capsys.readouterr().err
    assert run_app("init", tmp_path / "a.yaml", "--data", "x.jsonl") == 1
    assert "init: --model: not given" in capsys.readouterr().err
    assert run_app("init", tmp_path / "a.yaml", "--from", "quickstart", "--model", "x") == 1
    assert "--from copies a recipe as it is" in capsys.readouterr().err
    assert run_app("init", tmp_path / "a.yaml", "--model", "x", "--data", "o/n", "--method", "lorra") == 1
    assert "--method lorra: is no method that raymem knows; did you mean 'lora'" in capsys.readouterr().err
    assert run_app("init", tmp_path / "a.yaml", "--model", "x", "--data", tmp_path / "y.jsonl") == 1
    assert f"--data.path='{tmp_path}/y.jsonl' does not exist" in capsys.readouterr().err
    assert run_app("init", tmp_path / "b" / "a.yaml", "--model", "x", "--data", "o/n") == 1
    assert f"there is no directory {tmp_path}/b; make it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RecipeError, match="--from demo"):
        made(model="demo", data="x.jsonl", budget="1GiB")


def test_on_a_terminal_it_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raymem.cli import init

    answers = {"model": "owner/model", "training": "owner/data", "GPU": "4090", "method": "moram"}
    asked: list[str] = []

    def prompt(text: str, default: str | None = None) -> str:
        asked.append(text.split()[0])
        return answers[asked[-1]]

    class Terminal:
        def isatty(self) -> bool:
            return True

    written: list[tuple[Any, ...]] = []
    monkeypatch.setattr("typer.prompt", prompt)
    monkeypatch.setattr(init, "sys", type("Streams", (), {"stdin": Terminal(), "stdout": Terminal()}))
    monkeypatch.setattr(init, "_write", lambda *values: written.append(values))
    assert run_app("init", tmp_path / "a.yaml") == 0
    assert asked == ["model", "training", "GPU", "method"]
    assert written[0][4:] == ("moram", "4090", None, None)
    answers["GPU"] = "24GiB"
    assert run_app("init", tmp_path / "a.yaml") == 0
    assert written[1][5:7] == (None, "24GiB")


@pytest.mark.parametrize(
    ("row", "guessed"),
    [
        ({"question": "q", "answer": "a"}, ("prompt_completion", {"prompt": "question", "completion": "answer"})),
        ({"Problem": "q", "Answer": "a", "n": 1}, ("prompt_completion", {"prompt": "Problem", "completion": "Answer"})),
        ({"input": "q", "output": "a"}, ("prompt_completion", {"prompt": "input", "completion": "output"})),
        ({"instruction": "q", "reply": "a"}, ("prompt_completion", {"prompt": "instruction", "completion": "reply"})),
        (
            {"instruction": "q", "context": "c", "response": "a", "category": "x"},
            ("alpaca", {"input": "context", "output": "response"}),
        ),
        ({"id": "1", "chat": [{"role": "user", "content": "q"}]}, ("messages", {"messages": "chat"})),
        ({"talk": [{"from": "human", "value": "q"}]}, ("sharegpt", {"conversations": "talk"})),
        ({"title": "t", "content": "c"}, ("text", {"text": "content"})),
        ({"sentence": "s"}, ("text", {"text": "sentence"})),
        ({"a": "x", "b": "y"}, None),
        ({"answer": "a"}, ("text", {"text": "answer"})),
    ],
    ids=str,
)  # fmt: skip
def test_columns_are_guessed_by_their_names(row: dict[str, Any], guessed: Any) -> None:
    assert guess(row) == guessed


def test_a_second_file_or_split_is_found(tmp_path: Path) -> None:
    for name in ("my-train.jsonl", "my-test.jsonl", "my-val.jsonl", "other.jsonl"):
        (tmp_path / name).touch()
    found = second_source(str(tmp_path / "my-train.jsonl"))
    assert found is not None and found.path == str(tmp_path / "my-val.jsonl")
    assert second_source(str(tmp_path / "other.jsonl")) is None and second_source("owner/train") is None
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "train.jsonl").touch()
    assert second_source(str(splits)) is None
    (splits / "test.jsonl").touch()
    found = second_source(str(splits))
    assert found is not None and (found.path, found.split) == (str(splits), "test")


def test_names_that_are_no_yaml_are_quoted_and_comments_stay_on_their_line() -> None:
    values = {"a": {"b": "yes: no", "c": "1e3", "d": "true", "columns": {"prompt": "q #1\n"}}, "e": 2e-4, "f": None}
    text = text_of(values, {"a.b": "x\n\ty\x1b[31m", "f": "later"}, "head\nline")
    assert parse(text) == {key: value for key, value in values.items() if key != "f"}
    assert text.splitlines()[0] == "# head line" and "# x y?[31m" in text and "\n# f: # later\n" in text


def test_every_method_starts_with_a_recipe_that_is_valid() -> None:
    for start in starts().values():
        raw: dict[str, Any] = {"name": "x", "model": {"name": "m"}, "data": {"train": "x.jsonl"}, "train": {"steps": 1}}
        for path, (value, _) in start.values.items():
            section, _, key = path.partition(".")
            raw.setdefault(section, {})[key] = value
        assert recipe_of(raw).optimizer.lr < 1e-3 and start.words


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_what_is_written_plans_and_trains_without_an_edit(
    family: str, layout: Callable[[Path], Path], tmp_path: Path, planned_here: None,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from tests.helpers.support import save_model

    monkeypatch.chdir(tmp_path)
    model = with_template(save_model(tmp_path / "model", family))
    path = tmp_path / "my.yaml"
    assert run_app("init", path, "--model", model, "--data", layout(tmp_path).name) == 0
    assert run_app("plan", path) == 0
    assert run_app("data", path) == 0
    assert "[[" in capsys.readouterr().out
    assert run_app("train", path, "--set", "train.epochs=null", "--set", "train.steps=2", "--set", "tracking=none") == 0
    assert "trained 2 steps" in capsys.readouterr().out
