from __future__ import annotations

from typing import Any

import pytest

from raymem.errors import DataError
from raymem.recipe.data import Source
from raymem.training.data.formats import Messages, PromptCompletion, Text, resolve_format, to_example, without_targets

PLACE = "data.train[0]"
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def convert(row: dict[str, Any], **options: Any) -> Any:
    source = Source(path="x", **options)
    renders = source.template != "none"
    row_format = resolve_format(source, row, PLACE)
    return to_example(row, row_format, source.columns, "x.jsonl:17", renders=lambda prompt: renders)


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"text": "t"}, Text("t")),
        ({"prompt": "q", "completion": "a"}, Messages(TURNS)),
        ({"prompt": "p", "completion": None}, PromptCompletion("p", "")),
        ({"messages": TURNS}, Messages(TURNS)),
        ({"instruction": "q", "output": "a"}, Messages(TURNS)),
        ({"instruction": "q", "input": "", "output": "a", "text": "rendered"}, Messages(TURNS)),
        ({"instruction": "q", "input": None, "output": "a"}, Messages(TURNS)),
        (
            {"instruction": "q", "input": "more", "output": "a"},
            Messages([{"role": "user", "content": "q\n\nmore"}, TURNS[1]]),
        ),
        (
            {"conversations": [{"from": f, "value": f} for f in ("system", "human", "gpt", "user", "assistant")]},
            Messages(
                [
                    {"role": role, "content": name}
                    for role, name in [
                        ("system", "system"),
                        ("user", "human"),
                        ("assistant", "gpt"),
                        ("user", "user"),
                        ("assistant", "assistant"),
                    ]
                ]
            ),
        ),
    ],
)
def test_auto_decides_by_the_columns(row: dict[str, Any], example: Any) -> None:
    assert convert(row) == example


def test_the_format_can_be_said() -> None:
    assert convert({"text": "t", "prompt": "p", "completion": "c"}, format="text") == Text("t")


def test_columns_rename_and_may_swap() -> None:
    row = {"q": "p", "a": "c", "text": "t"}
    said = PromptCompletion("p", "c")
    assert convert(row, template="none", columns={"prompt": "q", "completion": "a"}) == said
    swapped = {"prompt": "c", "completion": "p"}
    assert convert(swapped, template="none", columns={"prompt": "completion", "completion": "prompt"}) == said


def test_a_pair_in_texts_becomes_turns_with_what_stands_beside_it() -> None:
    system, tool = {"role": "system", "content": "s"}, {"type": "function", "function": {"name": "f"}}
    row = {"prompt": "q", "completion": "a", "system": "s", "tools": [tool]}
    assert convert(row) == Messages([system, *TURNS], [tool])
    assert convert(row, template="none") == PromptCompletion("q", "a")
    assert convert(row | {"completion": ""}) == PromptCompletion("q", "")


def test_an_instruction_without_a_template_stands_in_paragraphs() -> None:
    row = {"instruction": "q", "input": "more", "output": "a", "history": [["q0", "a0"]], "system": "s"}
    assert convert(row, template="none") == PromptCompletion("s\n\nq0\n\na0\n\nq\n\nmore\n\n", "a")
    assert convert(row | {"output": None}, template="none") == PromptCompletion("s\n\nq0\n\na0\n\nq\n\nmore\n\n", "")


def test_a_renamed_column_no_longer_counts_under_its_old_name() -> None:
    assert convert({"messages": "t"}, columns={"text": "messages"}) == Text("t")


def test_message_keys_for_the_template_stay_and_parquet_s_nulls_go() -> None:
    turn = {"role": "user", "content": "q", "name": "ann", "tool_calls": None}
    assert convert({"messages": [turn]}) == Messages([{"role": "user", "content": "q", "name": "ann"}])


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"question": "q", "answer": "a"},
            {},
            r"data\.train\[0\]\.format=auto finds columns question, answer, .*"
            r"data\.train\[0\]\.columns to one of: messages .*; prompt \+ completion .*; input_ids \(tokens\) "
            r"\(perhaps data\.train\[0\]\.columns=\{prompt: question, completion: answer\}\)\.",
        ),
        (
            {"question": "q", "answer": "a"},
            {"columns": {"prompt": "quesion", "completion": "answer"}},
            r"data\.train\[0\]\.columns\.prompt='quesion' is none .* question, answer; did you mean 'question'\?",
        ),
        ({"text": "t"}, {"columns": {"txt": "text"}}, r"\.columns: 'txt' is no column of ours, the names are messages"),
        ({"prompt": "p"}, {"format": "prompt_completion"}, r"^x\.jsonl:17 has no column 'completion', only prompt"),
        ({"text": 5}, {}, r"^x\.jsonl:17 column 'text' is int 5, not a string"),
        ({"text": None}, {}, r"^x\.jsonl:17 column 'text' is NoneType"),
        ({"prompt": None, "completion": "c"}, {}, r"^x\.jsonl:17 column 'prompt' is NoneType"),
        ({"prompt": "p", "completion": 5}, {}, r"^x\.jsonl:17 column 'completion' is int 5, not a string"),
        (
            {"prompt": [], "completion": TURNS[0]},
            {},
            r"^x\.jsonl:17 column 'completion' is dict .*: write a list of t",
        ),
        ({"prompt": [], "completion": "c", "system": 5}, {}, r"^x\.jsonl:17 column 'system' is int 5, not a string"),
        ({"prompt": ["p"], "completion": "c"}, {}, r"^x\.jsonl:17 prompt\[0\] is str 'p': write an object"),
        ({"messages": TURNS, "tools": "look up"}, {}, r"^x\.jsonl:17 column 'tools' is str 'look up', not a list of t"),
        ({"messages": TURNS, "tools": [5]}, {}, r"^x\.jsonl:17 column 'tools' is list \[5\], not a list of tools"),
        ({"instruction": "q", "output": "a", "history": ["a"]}, {}, r"^x\.jsonl:17 column 'history' is list .*pairs"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url"}]}]},
            {},
            r"^x\.jsonl:17 messages\[0\] content\[1\] is of type 'image_url', but only text is .*: leave such examples",
        ),
        ({"messages": [{"role": "user", "content": None}]}, {}, r"messages\[0\] is dict .* null beside tool_calls"),
        ({"messages": []}, {}, r"^x\.jsonl:17 column 'messages' is list \[\], not a list of turns"),
        ({"messages": "hi"}, {}, r"column 'messages' is str 'hi', not a list of turns"),
        ({"messages": ["hi"]}, {}, r"^x\.jsonl:17 messages\[0\] is str 'hi': write an object with .* role and content"),
        ({"messages": [TURNS[0], {"role": "tool"}]}, {}, r"^x\.jsonl:17 messages\[1\] is dict"),
        ({"conversations": [{"from": "human"}]}, {}, r"conversations\[0\] is dict .* the strings from and value"),
        ({"conversations": [{"from": "bing", "value": "v"}]}, {}, r"is from 'bing': use one of human, user, gpt"),
    ],
)
def test_errors_name_place_value_and_cure(row: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        convert(row, **options)


def test_a_text_of_which_the_tokenizer_makes_nothing_is_not_called_empty() -> None:
    assert without_targets(Text("")) == "the text is empty"
    assert without_targets(Text("sky")) == "the tokenizer makes no token of the text"
    assert without_targets(PromptCompletion("p", "c")) == "the tokenizer makes no token of the completion"
