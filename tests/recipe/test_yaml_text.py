"""Odd YAML is read as YAML 1.2 does, or refused in one short sentence, at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import RecipeError
from raymem.recipe.load import load_recipe, recipe_of
from raymem.recipe.yaml_text import YamlTextError, parse, write

MINIMAL = "model: {name: org/model}\ndata: {train: data.jsonl}\ntrain: {steps: 10}\n"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("+7", 7),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("1e-4", 1e-4),
        ("-.5E+2", -50.0),
        ("1.", 1.0),
        ("-.inf", float("-inf")),
        ("yes", "yes"),
        ("off", "off"),
        ("True", True),
        ("~", None),
        ("", None),
        ("2026-02-31", "2026-02-31"),
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z"),
        ("=", "="),
        ("!!str 12", "12"),
        ("! 12", "12"),
        ("!!float 3", 3.0),
        ("!!int 3", 3),
        ("'10'", "10"),
    ],
)
def test_scalars_are_read_by_the_core_schema(text: str, value: Any) -> None:
    found = parse(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: !!int abc", 2, r"'abc' is no !!int"),
        ("a: !!timestamp q", 1, r"tag '!!timestamp' does not belong"),
        ("a: !!binary =", 1, "tag '!!binary'"),
        ("a: !!set {b}", 1, "tag '!!set'"),
        ("a: !mine {b: 1}", 1, "tag '!mine'"),
        ("a: 1\nb: 2\x00", 2, r"character '\\x00'"),
        ('a: "\\0"', 1, r"character '\\x00'"),
        ('a: "\\ud800"', 1, r"character '\\ud800'"),
        ('a: "\\UFFFFFFFF"', None, "too large"),
        ("a: " + "9" * 5000, 1, "an integer of 5000 digits"),
        ("a: 1e999", 1, "too large"),
        ("a: &x\n  b: *x", 2, r"\*x stands inside of what it refers to"),
        ("a: *x", 1, r"\*x has no &x before it"),
        ("[" * 2000, 1, "nested more than 50 deep"),
        ("\n".join(" " * n + "a:" for n in range(400)), 51, "nested more than 50 deep"),
        (BOMB, None, "over 10000 values"),
        ("x" * 300_000, None, "longer than 200000 characters"),
        ("a: 1\nb: 2\na: 3", 3, "'a' is given twice, first in line 1"),
        ("{a: 1, 'a': 2}", 1, "'a' is given twice"),
        ("1: a\n0x1: b", 2, "1 is given twice"),
        ("<<: {a: 1}\n<<: {b: 1}", 2, "'<<' is given twice"),
        ("<<: 3", 1, "takes a mapping"),
        ("? [a]\n: 1", 1, "a key is a list or mapping"),
        ("a: 1\n---\nb: 1", 2, "a second document"),
    ],
)
def test_what_is_not_read_is_one_short_sentence_at_once(
    tmp_path: Path, text: str, line: int | None, words: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    started = time.perf_counter()
    with pytest.raises(YamlTextError, match=words) as caught:
        parse(text)
    with pytest.raises(RecipeError) as said:
        load_recipe(file)
    assert time.perf_counter() - started < 2  # two reads, on a busy machine; the bomb took 26 s
    assert line is None or caught.value.line == line
    assert len(str(said.value)) < 1000 and "\n" not in str(said.value)
    with pytest.raises(RecipeError, match="--set") as said:
        recipe_of({}, [f"train.steps={text}"])
    assert len(str(said.value)) < 2000


def test_merged_sections_and_aliases_are_copies() -> None:
    value = parse("base: &b {x: 1, y: [1]}\none: {<<: *b, x: 2}\ntwo: *b\nmany: {<<: [{x: 5}, *b]}\n")
    assert value["one"] == {"x": 2, "y": [1]} and value["many"] == {"x": 5, "y": [1]}
    value["two"]["y"].append(2)
    assert value["base"] == {"x": 1, "y": [1]}


@pytest.mark.parametrize("text", ["010", "09", "0o10", "1e5", "1:30", "yes", "2026-01-01", "1_0", "null", "<<", "é"])
def test_what_is_written_is_read_back(text: str) -> None:
    inner = [1, 1e-5, True, None]
    value = {text: text, "list": [text, inner, inner]}
    assert parse(write(value)) == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("scaling.use_gpu=yes", r"scaling\.use_gpu: 'yes': .*boolean.*; write true or false$"),
        ("train.steps=1:30", r"train\.steps: '1:30': .*; write it as a plain number, without quotes, _ and :$"),
        ("seed=1_000", r"seed: '1_000': .*; write it as a plain number"),
        (f"train.steps={'x' * 50_000}", r"train\.steps: 'x+'\.\.\. \(50000 characters\): "),
        (f"{'x' * 50_000}=1", r"unknown key"),
        (f"{'a.' * 3000}b=1", r"names 3000 sections"),
        ("data.train.²=1", r"cannot be looked up"),
    ],
)
def test_the_schema_says_what_to_write_and_cuts_what_it_shows(override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        recipe_of({"name": "a", **parse(MINIMAL), "data": {"train": ["a.jsonl"]}}, [override])
    assert len(str(caught.value)) < 2000


def test_many_problems_are_counted() -> None:
    with pytest.raises(RecipeError, match=r"and \d+ more problems$") as caught:
        recipe_of({"name": "a", **parse(MINIMAL), **{f"key{n}": 1 for n in range(5000)}})
    assert len(str(caught.value)) < 4000


@pytest.mark.parametrize(("name", "words"), [("~nosuchuser/x", "no such user"), ("a\0b.jsonl", "NUL")])
def test_a_path_that_cannot_exist_is_no_traceback(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_of({"name": "a", **parse(MINIMAL), "data": {"train": name}})


def test_a_name_that_is_too_long_for_a_file_is_an_id() -> None:
    assert recipe_of({"name": "a", **parse(MINIMAL), "data": {"train": "x" * 5000}}).data.train[0].path == "x" * 5000
