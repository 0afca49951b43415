"""What stands beside the text of a turn, turns in the layouts of others, and what is said of the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymem.recipe.data import Source
from raymem.training.data.formats import Messages, PromptCompletion, resolve_format, to_example
from raymem.training.data.readers import index_file, read_block
from raymem.training.data.unread import line, unread

USER, BAD, GOOD = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "bad"), ("assistant", "good")))
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "sky"}}}
SYSTEM = {"role": "system", "content": "S"}


def convert(row: dict[str, Any], **options: Any) -> Any:
    source = Source(path="x", columns=options.pop("columns", {}))
    return to_example(row, resolve_format(source, row, "data.train[0]"), source.columns, "x.jsonl:17", **options)


def beside(
    row: dict[str, Any], template: str = "", columns: dict[str, str] | None = None, row_format: Any = None
) -> list[str]:
    """What is not read under a template that reads these keys; without any, texts are taken as they are."""
    row_format = row_format or resolve_format(Source(path="x", columns=columns or {}), row, "data.train[0]")
    example = to_example(row, row_format, columns or {}, "x.jsonl:17", renders=lambda prompt: bool(template))
    as_turns = isinstance(example, Messages)
    return list(unread(row, row_format, columns or {}, template.split().__contains__, as_turns=as_turns))


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"weight": "0"},
        {"train": False},
        {"train": "false"},
        {"training": False},
        {"trainable": False},
        {"loss": False},
        {"weight": 1, "train": False},
    ],
    ids=str,
)
def test_a_turn_that_is_marked_so_is_silent_in_every_layout(mark: dict[str, Any]) -> None:
    silent = Messages([USER, BAD, USER, GOOD], None, frozenset({1}))
    assert convert({"messages": [USER, BAD | mark, USER, GOOD | {"weight": 1}]}) == silent
    shares = [{"from": f, "value": v} for f, v in (("human", "q"), ("gpt", "bad"), ("human", "q"), ("gpt", "good"))]
    shares[1] |= mark
    assert convert({"conversations": shares}) == silent
    told = {"prompt": [USER], "completion": [BAD | mark, USER, GOOD]}
    assert convert(told) == silent


@pytest.mark.parametrize("mark", [{"weight": 1}, {"weight": None}, {"train": True}, {"loss": "true"}], ids=str)
def test_a_turn_that_is_marked_to_be_learned_is(mark: dict[str, Any]) -> None:
    assert convert({"messages": [USER, GOOD | mark]}) == Messages([USER, GOOD])


def test_a_system_column_is_the_system_turn() -> None:
    assert convert({"system": "S", "messages": [USER, GOOD]}) == Messages([SYSTEM, USER, GOOD])
    assert convert({"system": "S", "messages": [USER, BAD | {"weight": 0}]}).silent == {2}
    shares = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}]
    assert convert({"system": "S", "conversations": shares}) == Messages([SYSTEM, USER, GOOD])
    assert convert({"system": "S", "instruction": "q", "output": "good"}) == Messages([SYSTEM, USER, GOOD])
    assert convert({"system": "S", "prompt": [USER], "completion": [GOOD]}) == Messages([SYSTEM, USER, GOOD])
    assert convert({"sys": "S", "messages": [USER, GOOD]}, columns={"system": "sys"}) == Messages([SYSTEM, USER, GOOD])
    empty = {"role": "system", "content": ""}
    assert convert({"system": "S", "messages": [empty, USER, GOOD]}) == Messages([SYSTEM, USER, GOOD])
    for nothing in ("", None):
        assert convert({"system": nothing, "messages": [USER, GOOD]}) == Messages([USER, GOOD])


def test_the_conversation_s_own_system_turn_stands_and_the_other_is_named() -> None:
    row = {"system": "other", "messages": [SYSTEM, USER, GOOD]}
    assert convert(row) == Messages([SYSTEM, USER, GOOD])
    assert beside(row) == ["system (beside another system turn)"]
    assert beside(row | {"system": "S"}) == []
    read = {"system": "other", "prompt": [SYSTEM, USER], "completion": [GOOD]}
    for beside_it in (
        [True],
        [{"role": "system", "content": "other"}, USER],
    ):  # a column that this format does not read
        named = beside(read | {"messages": beside_it}, row_format="prompt_completion")
        assert named == ["system (beside another system turn)", "messages"]


@pytest.mark.parametrize("history", [[["a", "b"], ["c", "d"]], '[["a", "b"], ["c", "d"]]'], ids=str)
def test_history_precedes(history: Any) -> None:
    row = {"system": "S", "instruction": "q", "input": "", "output": "good", "history": history}
    before = [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, "abcd", strict=True)]
    assert convert(row) == Messages([SYSTEM, *before, USER, GOOD])
    assert beside(row) == []
    assert convert(row | {"history": [], "system": None}) == Messages([USER, GOOD])


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), json.dumps(TOOL), [json.dumps(TOOL)], TOOL], ids=str)
def test_tools_are_schemas_or_the_text_of_schemas(tools: Any) -> None:
    row = {"tools": tools, "messages": [USER, GOOD]}
    assert convert(row) == Messages([USER, GOOD], [TOOL])
    assert beside(row, "tools") == []
    assert beside(row) == ["tools"]
    no_tools: tuple[Any, ...] = ("", "[]", [], None)
    for nothing in no_tools:
        assert convert(row | {"tools": nothing}) == Messages([USER, GOOD])


def test_what_is_lost_of_an_answer_is_not_learned() -> None:
    assert convert({"instruction": "q", "output": None}).silent == {1}
    assert convert({"prompt": [USER], "completion": None}) == Messages([USER])
    assert convert({"prompt": [USER, BAD], "completion": []}) == Messages([USER, BAD], None, frozenset({1}))
    assert convert({"prompt": "", "completion": []}) == PromptCompletion("", "")


def test_turns_may_be_written_as_in_the_other_layout() -> None:
    shares = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good", "weight": 0}]
    told = Messages([USER, GOOD], None, frozenset({1}))
    assert convert({"messages": shares}) == told == convert({"conversations": [USER, GOOD | {"weight": 0}]})
    assert beside({"messages": shares}) == beside({"conversations": [USER, GOOD]}) == []


def test_an_answer_of_null_is_an_empty_one() -> None:
    empty = Messages([USER, {"role": "assistant", "content": ""}])
    assert convert({"messages": [USER, {"role": "assistant", "content": None}]}) == empty
    assert convert({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": None}]}) == empty


def test_a_call_of_before_tools_is_one_of_today() -> None:
    call = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    row = {"messages": [USER, call, {"role": "function", "name": "look_up", "content": "blue"}, GOOD]}
    said = convert(row).messages
    assert said[1] == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert convert(row, calls=False).messages == row["messages"]
    assert beside(row, "tool_calls name") == []
    assert beside(row, "name") == ["messages[].function_call"]


def test_prompt_and_completion_may_be_turns() -> None:
    turns = {"prompt": [SYSTEM, USER, BAD, USER], "completion": [GOOD], "tools": [TOOL]}
    assert convert(turns) == Messages([SYSTEM, USER, BAD, USER, GOOD], [TOOL], frozenset({2}))
    assert convert({"prompt": [USER], "completion": "good"}) == Messages([USER, GOOD])
    assert convert({"prompt": "q", "completion": [GOOD]}) == Messages([USER, GOOD])


def test_content_may_be_parts_of_text_or_nothing_beside_calls() -> None:
    parts = [{"type": "text", "text": "go"}, {"type": "text", "text": "od", "image": None}]
    assert convert({"messages": [USER, GOOD | {"content": parts}]}) == Messages([USER, GOOD])
    asked = {"role": "assistant", "tool_calls": [CALL]}
    told = {"role": "tool", "content": "blue", "name": "look_up"}
    wanted = Messages([USER, asked | {"content": None}, told, GOOD])
    assert convert({"messages": [USER, asked, told, GOOD]}) == wanted
    assert convert({"messages": [USER, asked | {"content": None}, told, GOOD]}) == wanted


def test_calls_and_observations_of_sharegpt() -> None:
    written = json.dumps(CALL["function"])
    pairs = [("human", "q"), ("function_call", written), ("observation", "blue"), ("gpt", "good")]
    row: dict[str, Any] = {"conversations": [{"from": f, "value": v} for f, v in pairs], "tools": json.dumps([TOOL])}
    asked = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    told = {"role": "tool", "content": "blue"}
    assert convert(row) == Messages([USER, asked, told, GOOD], [TOOL])
    # A template without tool calls would write nothing; the text is what there is.
    as_text = {"role": "assistant", "content": written}
    assert convert(row, calls=False) == Messages([USER, as_text, told, GOOD], [TOOL])
    row["conversations"][1]["value"] = "no JSON"
    assert convert(row).messages[1] == {"role": "assistant", "content": "no JSON"}


@pytest.mark.parametrize(
    ("row", "template", "names"),
    [
        ({"text": "t", "id": 5, "source": "web", "doc_id": "x", "label": None, "note": ""}, "", []),
        ({"text": "t", "weight": 0}, "", ["weight"]),
        ({"text": "t", "system": "S", "tools": [TOOL]}, "tools", ["system", "tools"]),
        ({"prompt": "p", "completion": "c", "system": "S"}, "", ["system"]),
        ({"instruction": "q", "output": "a", "text": "rendered"}, "", ["text"]),
        ({"messages": [USER, GOOD | {"thinking": "hm"}]}, "", ["messages[].thinking"]),
        ({"messages": [USER, GOOD | {"thinking": "hm", "id": 3}]}, "thinking", []),
        ({"messages": [USER, GOOD | {"tool_calls": [CALL]}]}, "", ["messages[].tool_calls"]),
        ({"messages": [USER | {"weight": 0}, GOOD | {"weight": 1}]}, "", []),
        ({"messages": [USER, GOOD | {"weight": 0.5}]}, "", ["messages[].weight that says neither yes nor no"]),
        ({"messages": [USER | {"train": True}]}, "", ["messages[].train of a turn that is not the assistant's"]),
        (
            {"conversations": [{"from": "gpt", "value": "v", "mood": "sad", "train": True}]},
            "",
            ["conversations[].mood"],
        ),
        ({"prompt": [USER | {"mood": "sad"}], "completion": [GOOD]}, "", ["prompt[].mood"]),
    ],
    ids=str,
)
def test_what_is_not_read_is_named(row: dict[str, Any], template: str, names: list[str]) -> None:
    assert beside(row, template) == names


def test_it_is_named_as_the_data_name_it() -> None:
    row = {"talk": [USER, GOOD | {"mood": "sad"}], "functions": [TOOL], "label": 1}
    columns = {"messages": "talk", "tools": "functions"}
    names = ["label", "talk[].mood", "functions"]
    assert beside(row, columns=columns) == names
    said = line("data.train[0]", {"label": 3, "talk[].mood": 7} | {f"c{i:02}": 1 for i in range(20)})
    assert said.startswith(
        "data.train[0]: neither raymem nor the chat template reads talk[].mood in 7, label in 3, c00"
    )
    assert "c09 in 1, and 10 more (counted" in said and "\n" not in said


def test_keys_that_parquet_adds_are_no_part_of_a_row(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    other = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    asked = [{"role": "assistant", "content": None, "tool_calls": [call]} for call in (CALL, other)]
    rows = [{"messages": [USER, call, GOOD | {"weight": 0}], "note": None} for call in asked]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    _, (block,) = index_file(tmp_path / "x.parquet", 10)
    read = [row for _, row in read_block(block)]
    assert list(read[0]) == ["messages", "note"]
    _, (block,) = index_file(write_jsonl("x.jsonl", rows), 10)
    assert [convert(row) for row in read] == [convert(row) for _, row in read_block(block)]
    assert convert(read[0]) == Messages([USER, asked[0], GOOD], None, frozenset({2}))
