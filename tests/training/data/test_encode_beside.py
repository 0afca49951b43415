"""Targets, tools, begin tokens and odd characters: what a row holds beside plain text, in ids."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import DataError
from raymem.recipe.data import DataSection
from raymem.training.data.encode import Encoder
from raymem.training.data.formats import Messages, PromptCompletion, Text
from raymem.training.data.packed.shards import prepare
from tests.helpers.talks import TALK, encoded, plain, sentencepiece_like, targeted, turn, with_template

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "blue", "arguments": {"one": "two"}}}
WITH_TOOLS = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_silent_turn_has_no_target(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, "tiny")
    both, second = encoded(encoder, Messages(TALK)), encoded(encoder, Messages(TALK, None, frozenset({2})))
    assert tokenizer.decode(second.input_ids) == tokenizer.decode(both.input_ids)
    assert targeted(tokenizer, second) == "five<|end|>"
    prompt = tokenizer.apply_chat_template(TALK[:4], tokenize=False, add_generation_prompt=True)
    assert second.input_ids[: len(plain(tokenizer, prompt))].tolist() == plain(tokenizer, prompt)
    assert not encoded(encoder, Messages(TALK, None, frozenset({2, 4}))).targets.any()


def test_tools_and_calls_reach_the_template(tokenizer: Any) -> None:
    changed = with_template(tokenizer, WITH_TOOLS)
    talk = [turn("user", "sky"), {"role": "assistant", "content": None, "tool_calls": [CALL]}, turn("tool", "blue")]
    talk.append(turn("assistant", "the answer"))
    made = encoded(Encoder(changed, "tools"), Messages(talk, [TOOL]))
    assert tokenizer.decode(made.input_ids) == changed.apply_chat_template(talk, tools=[TOOL], tokenize=False)
    assert tokenizer.decode(made.input_ids).startswith(f"[{json.dumps([TOOL])}]<user>sky")
    assert targeted(tokenizer, made) == json.dumps(CALL["function"]) + "<|end|>the answer<|end|>"


@pytest.mark.parametrize(
    ("content", "turns"),
    [
        ("m.content", "<user>q<assistant>(call)"),  # would say None
        ("m.content + ''", "<user>q<assistant>(call)"),  # would fail
        ("m.content or 'nothing'", "<user>q<assistant>nothing(call)"),  # knows it
    ],
)
def test_no_content_is_as_the_template_takes_it(tokenizer: Any, content: str, turns: str) -> None:
    template = f"{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ {content} }}}}"
    changed = with_template(tokenizer, template + "{% if m.tool_calls %}(call){% endif %}{% endfor %}")
    talk = [turn("user", "q"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    assert tokenizer.decode(encoded(Encoder(changed, "x"), Messages(talk)).input_ids) == turns + "<|end|>"


def test_calls_that_the_template_cannot_write_are_not_an_empty_answer(tokenizer: Any) -> None:
    talk = [turn("user", "q"), {"role": "assistant", "content": None, "tool_calls": [CALL]}, turn("assistant", "two")]
    assert targeted(tokenizer, encoded(Encoder(tokenizer, "tiny"), Messages(talk))) == "two<|end|>"
    talk[1]["content"] = "one"
    assert targeted(tokenizer, encoded(Encoder(tokenizer, "tiny"), Messages(talk))) == "one<|end|>two<|end|>"


def test_which_keys_a_template_speaks_of(tokenizer: Any) -> None:
    encoder = Encoder(with_template(tokenizer, WITH_TOOLS + "{{ messages[0]['reasoning_content'] }}"), "x")
    assert all(map(encoder.in_template, ("tools", "tool_calls", "thinking", "reasoning")))
    assert not any(map(encoder.in_template, ("tool", "documents", "train", "a.b")))
    several = copy.copy(tokenizer)
    several.chat_template = {"default": "{{ messages }}", "tool_use": WITH_TOOLS}
    assert Encoder(several, "x").in_template("tools")


@pytest.mark.parametrize("begin", ["", "<s>", "<s><s>"])
def test_one_begin_token_whether_or_not_the_text_has_it(begin: str) -> None:
    tokenizer = sentencepiece_like()
    encoder = Encoder(tokenizer, "sp")
    for with_begin, without in (
        (Text(f"{begin}yes"), Text("yes")),
        (PromptCompletion(f"{begin}answer:", " yes"), PromptCompletion("answer:", " yes")),
        (PromptCompletion("", f"{begin}yes"), PromptCompletion("", "yes")),
        (Text(begin), Text("")),
    ):
        found, wanted = encoded(encoder, with_begin), encoded(encoder, without)
        assert found.input_ids.tolist() == wanted.input_ids.tolist()
        assert found.targets.tolist() == wanted.targets.tolist()
        assert found.input_ids.tolist().count(1) == 1 and not found.targets[0]
    tokenizer.chat_template = f"{begin}{{% for m in messages %}}{{{{ m.content }}}}\n{{% endfor %}}"
    talk = Messages([turn("user", "yes"), turn("assistant", "yes")])
    ids = encoded(Encoder(tokenizer, "sp"), talk).input_ids.tolist()
    assert ids.count(1) == bool(begin)  # what the template writes is all there is, as at inference
    assert tokenizer.convert_ids_to_tokens(ids)[bool(begin) :] == ["\u2581yes", "\n", "yes", "\n", "</s>"]


def test_a_begin_token_of_the_text_stays_where_the_tokenizer_adds_none(tokenizer: Any) -> None:
    ids = encoded(Encoder(tokenizer, "tiny"), Text("<|end|>one")).input_ids.tolist()
    assert ids == [tokenizer.eos_token_id, *plain(tokenizer, "one"), tokenizer.eos_token_id]


@pytest.mark.parametrize(
    "example",
    [
        Text("cut emoji \ud83d here"),
        PromptCompletion("\ud83d", "one"),
        PromptCompletion("one", "two \udc00"),
        Messages([turn("user", "\ud83d"), turn("assistant", "one")]),
    ],
    ids=ascii,
)
def test_half_a_character_is_refused(tokenizer: Any, example: Any) -> None:
    with pytest.raises(
        DataError, match=r"^x\.jsonl:17 holds '\\ud[8c][30][d0]' after '.*', which is half .*: remove it"
    ):
        encoded(Encoder(tokenizer, "tiny"), example)
    assert "\ufffd" not in tokenizer.decode(encoded(Encoder(tokenizer, "tiny"), Text("\U0001f600")).input_ids)


def test_a_source_says_once_what_it_holds_beside(
    write_jsonl: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("raymem.training.data.packed.shards.BLOCK_ROWS", 2)
    talk = [turn("user", "q"), turn("assistant", "one") | {"weight": 0}, turn("user", "q"), turn("assistant", "two")]
    rows = [{"id": i, "messages": talk, "tools": [TOOL], "mood": "sad"} for i in range(5)]
    rows.append({"id": 5, "messages": talk[:2]})
    path = write_jsonl("x.jsonl", rows)
    recipe = DataSection.model_validate({"train": str(path), "sequence_length": 64})
    (source,) = prepare(recipe, "train", str(tokenizer_dir), tmp_path).sources
    assert (source.num_examples, source.dropped) == (6, 1)
    assert source.num_targets == 5 * 2  # two and the end of the turn
    (said,) = [record.message for record in caplog.records if "neither raymem" in record.message]
    assert "reads mood in 5, tools in 5 (counted" in said
    assert "data.train[0]: 1 of 6 examples dropped" in caplog.text


def test_a_place_is_named_for_half_a_character(
    write_jsonl: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = write_jsonl("x.jsonl", [{"text": "one"}, {"text": "cut \ud83d"}])
    with pytest.raises(DataError, match=r"x\.jsonl:2: it holds '\\ud83d' after 'cut '"):
        prepare(DataSection.model_validate({"train": str(path)}), "train", str(tokenizer_dir), tmp_path)
