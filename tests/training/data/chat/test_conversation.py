"""Every assistant turn of a conversation in templates of every shape: behind what inference sees, up to its stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import DataError, ModelError
from raymem.recipe.data import DataSection, Source
from raymem.training.data.chat import conversation as chat
from raymem.training.data.encode import Encoder
from raymem.training.data.formats import Messages
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.pack import Encoded
from raymem.training.data.packed.shards import prepare
from tests.helpers import templates
from tests.helpers.talks import turn
from tests.helpers.templates import CALL, SHAPES, TALK, TOOL, Shape, tokenizer_for

ANSWERS = [i for i, message in enumerate(TALK) if message["role"] == "assistant"]
BESIDE = {"silent": frozenset({4}), "last": frozenset({2, 4})}


def sources(*paths: str) -> list[Source]:
    return [Source(path=path) for path in paths]


def encode(tokenizer: Any, messages: list[Any], tools: Any = None, **options: Any) -> list[Encoded]:
    silent = options.pop("silent", frozenset())
    (examples,) = Encoder(tokenizer, "t", **options).encode([Messages(messages, tools, silent)], ["x.jsonl:17"])
    return examples


def runs(example: Any) -> list[tuple[list[int], list[int]]]:
    """(ids before, ids of the run) of every unbroken run of targets."""
    ids, targets = list(map(int, example.input_ids)), list(map(bool, example.targets))
    begins = [i for i in range(len(ids)) if targets[i] and not (i and targets[i - 1])]
    return [(ids[:b], ids[b : next((e for e in range(b, len(ids)) if not targets[e]), len(ids))]) for b in begins]


def prompt_ids(tokenizer: Any, messages: list[Any], tools: Any = None) -> list[int]:
    # Newer releases of transformers do this themselves.
    both = [{"thinking": m["reasoning_content"], **m} if m.get("reasoning_content") else m for m in messages]
    return list(tokenizer.apply_chat_template(both, tools=tools, add_generation_prompt=True)["input_ids"])


def said_after(tokenizer: Any, examples: Any, messages: list[Any], tools: Any = None) -> list[int]:
    """The targets that stand behind the prompt that ``messages`` make."""
    prompt = prompt_ids(tokenizer, messages, tools)
    (said,) = [run for example in examples for before, run in runs(example) if before == prompt]
    return said


@pytest.mark.parametrize("name", SHAPES)
def test_every_turn_stands_behind_its_prompt_and_ends_with_its_stop(name: str) -> None:
    shape = SHAPES[name]
    tokenizer = tokenizer_for(shape.template, shape.eos)
    examples = encode(tokenizer, TALK, [TOOL])
    assert len(examples) == shape.examples
    assert sum(len(runs(example)) for example in examples) == len(ANSWERS)
    for index in ANSWERS:
        said = said_after(tokenizer, examples, TALK[:index], [TOOL])
        text = tokenizer.decode(said)
        assert tokenizer.decode(said[-1:]) in shape.stops
        assert not any(tokenizer.decode([token]) in shape.stops for token in said[:-1]) or name == "channels"
        message = TALK[index]
        assert "look_up" in text and "sky" in text if message["content"] is None else message["content"] in text
        assert (message["reasoning_content"] in text) == shape.reasons
        assert text.count("<think>") + text.count("</think>") <= 2


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("which", ["silent", "last"])
def test_silent_turns_and_all_but_the_last_have_no_target(name: str, which: str) -> None:
    shape = SHAPES[name]
    tokenizer = tokenizer_for(shape.template, shape.eos)
    every = encode(tokenizer, TALK, [TOOL])
    options: Any = {"turns": "last"} if which == "last" else {"silent": BESIDE["silent"]}
    fewer = encode(tokenizer, TALK, [TOOL], **options)
    left = [i for i in ANSWERS if i not in BESIDE[which]]
    assert sum(len(runs(example)) for example in fewer) == len(left)
    for index in left:
        of_few, of_all = (said_after(tokenizer, found, TALK[:index], [TOOL]) for found in (fewer, every))
        assert of_few == of_all


@pytest.mark.parametrize("name", SHAPES)
def test_a_long_conversation_is_what_the_long_way_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[name]
    tokenizer = tokenizer_for(shape.template, shape.eos)
    plain = [turn(role, f"{role} {i}") for i in range(12) for role in ("user", "assistant")]
    for talk in ([TALK[0], *plain], plain, TALK + TALK[1:] * 3, [*plain, turn("user", "one")]):
        short = encode(tokenizer, talk, [TOOL])
        with monkeypatch.context() as patch:
            patch.setattr(chat, "_FEW", len(talk))
            long = encode(tokenizer, talk, [TOOL])
        assert [(e.input_ids.tolist(), e.targets.tolist()) for e in short] == [
            (e.input_ids.tolist(), e.targets.tolist()) for e in long
        ]


def test_rendering_is_linear_in_the_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_for(templates.CHATML, "<|im_end|>")
    rendered: list[int] = []
    apply = type(tokenizer).apply_chat_template

    def counted(self: Any, talks: Any, **options: Any) -> Any:
        rendered.extend(map(len, talks))
        return apply(self, talks, **options)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counted)
    turns: dict[int, int] = {}
    for count in (50, 100, 200):
        rendered.clear()
        encode(tokenizer, [turn(role, str(i)) for i in range(count // 2) for role in ("user", "assistant")])
        turns[count] = sum(rendered)
    assert turns[200] - turns[100] == 2 * (turns[100] - turns[50]) and turns[200] < 200 * 10


def test_a_token_across_a_boundary_makes_an_example_of_its_own() -> None:
    """An answer is tokenised with its surroundings once more follows."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n{% else %}ans{{ m.content }}<|end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}ans{% endif %}"
    )
    tokenizer = tokenizer_for(template, "</s>")
    talk = [turn("user", "one"), turn("assistant", "wer"), turn("user", "three"), turn("assistant", "blue")]
    assert len(tokenizer("answer")["input_ids"]) == 1
    examples = encode(tokenizer, talk)
    assert len(examples) == 2
    for index in (1, 3):
        said = said_after(tokenizer, examples, talk[:index])
        assert tokenizer.decode(said) == f"{talk[index]['content']}<|end|>"


# Thoughts


@pytest.mark.parametrize("name", ["last thought", "opens thought", "always a thought"])
@pytest.mark.parametrize(
    "content",
    ["<think>\nthought one\n</think>\n\nanswer", "<think>thought one</think>answer", "thought one</think>answer"],
)
def test_a_thought_in_the_text_is_not_opened_twice(name: str, content: str) -> None:
    shape = SHAPES[name]
    tokenizer = tokenizer_for(shape.template, shape.eos)
    talk = [turn("user", "one"), turn("assistant", content)]
    prompt = tokenizer.decode(prompt_ids(tokenizer, talk[:1]))
    said = tokenizer.decode(said_after(tokenizer, encode(tokenizer, talk), talk[:1]))
    whole = prompt + said
    assert whole.count("<think>") == whole.count("</think>") == 1
    assert whole.index("<think>") < whole.index("thought one") < whole.index("</think>") < whole.index("answer")
    assert said.endswith(f"answer{shape.stops[0]}")


def test_a_thought_that_is_open_is_closed_even_where_there_is_none() -> None:
    tokenizer = tokenizer_for(templates.OPENS_THOUGHT, "</s>")
    talk = [turn("user", "one"), turn("assistant", "answer")]
    assert tokenizer.decode(said_after(tokenizer, encode(tokenizer, talk), talk[:1])) == "\n</think>\n\nanswer</s>"


def test_reasoning_is_read_where_it_is_written_or_prompted_for() -> None:
    for name, shape in SHAPES.items():
        encoder = Encoder(tokenizer_for(shape.template, shape.eos), name)
        assert all(encoder.in_template(key) == shape.reasons for key in ("reasoning_content", "thinking", "reasoning"))


def test_reasoning_without_a_place_is_counted() -> None:
    template = templates.CLOSED_THOUGHT.replace(
        "{{ m.content or '' }}", "{{ (m.content or '') }}{# reasoning_content #}"
    )
    encoder = Encoder(tokenizer_for(template, "<|im_end|>"), "t")
    encoder.encode([Messages([turn("user", "one"), turn("assistant", "two") | {"thinking": "thought"}])], ["x"])
    assert dict(encoder.noted) == {chat.UNSAID: 1}
    assert encoder.num_turns == 1


def test_a_prompt_that_the_turn_does_not_continue_is_refused() -> None:
    template = templates.NO_END.replace("<|assistant|>\n{% endif %}", "<|User|>\n{% endif %}")
    with pytest.raises(DataError, match=r"^x\.jsonl:17 messages\[1\]: .* ends its generation prompt with .*<\|User\|>"):
        encode(tokenizer_for(template, "</s>"), [turn("user", "one"), turn("assistant", "two")])


def test_a_turn_before_another_answer_may_be_rewritten() -> None:
    """Qwen3 writes an empty thought in the last turn only, so the prompt for a second answer is no part of the end."""
    shape = SHAPES["last thought"]
    tokenizer = tokenizer_for(shape.template, shape.eos)
    for thought in ({}, {"reasoning_content": "thought"}):
        talk = [turn("user", "one"), turn("assistant", "two") | thought, turn("assistant", "three") | thought]
        examples = encode(tokenizer, talk)
        for index in (1, 2):
            text = tokenizer.decode(said_after(tokenizer, examples, talk[:index]))
            assert text.endswith(f"</think>\n\n{talk[index]['content']}<|im_end|>")
            assert ("thought" in text) == bool(thought)


def test_a_first_turn_of_the_assistant_that_is_not_prompted_for_is_refused() -> None:
    template = "{% if messages and messages[0].role != 'system' %}<|im_start|>system\nyou<|im_end|>\n{% endif %}"
    talk = [turn("assistant", "one"), turn("user", "two"), turn("assistant", "three")]
    tokenizer = tokenizer_for(template + templates.CHATML, "<|im_end|>")
    with pytest.raises(DataError, match=r"messages\[0\]: .* at the very beginning .* mark it with weight: 0"):
        encode(tokenizer, talk)
    (example,) = encode(tokenizer, talk, silent=frozenset({0}))
    assert tokenizer.decode(example.input_ids[example.targets]) == "three<|im_end|>"


@pytest.mark.parametrize("name", ["chatml", "last thought"])
def test_an_empty_turn_is_not_trained_and_counted(name: str) -> None:
    shape = SHAPES[name]
    encoder = Encoder(tokenizer_for(shape.template, shape.eos), "t")
    talk = [turn("user", "one"), turn("assistant", ""), turn("user", "two"), turn("assistant", "three")]
    (examples,) = encoder.encode([Messages(talk)], ["x"])
    assert [len(runs(example)) for example in examples] == [1]
    assert dict(encoder.noted) == {chat.EMPTY: 1}


def test_a_thought_in_the_text_that_the_template_leaves_out_is_counted() -> None:
    template = templates.CHATML.replace("{{ m.content or '' }}", "{{ (m.content or '').split('</think>')[-1] }}")
    encoder = Encoder(tokenizer_for(template, "<|im_end|>"), "t")
    encoder.encode([Messages([turn("user", "one"), turn("assistant", "<think>thought</think>two")])], ["x"])
    assert dict(encoder.noted) == {chat.UNSAID: 1}


@pytest.mark.parametrize(
    ("written", "arguments", "form"),
    [
        ("c.function | tojson", {"word": "sky"}, None),
        ("c.function | tojson", '{"word": "sky"}', "text"),
        ("c.function.arguments", {"word": "sky"}, "object"),
        ("c.function.arguments", '{"word": "sky"}', None),
        ("c.function.name + c.function.arguments", {"word": "sky"}, None),
    ],
)
def test_arguments_that_are_not_written_as_json_are_named(written: str, arguments: Any, form: str | None) -> None:
    tokenizer = tokenizer_for(templates.CHATML.replace("c.function | tojson", written), "<|im_end|>")
    call = {"type": "function", "function": {"name": "look_up", "arguments": arguments}}
    encoder = Encoder(tokenizer, "t")
    encoder.encode([Messages([turn("user", "one"), turn("assistant", "") | {"tool_calls": [call]}])], ["x"])
    assert dict(encoder.noted) == ({chat.MISWRITTEN[form]: 1} if form else {})


# What stops generation


def test_a_turn_that_nothing_stops_is_counted() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    encoder = Encoder(tokenizer_for(template, "</s>"), "t")
    talk = [turn(role, "one") for role in ("user", "assistant", "user", "assistant")]
    (examples,) = encoder.encode([Messages(talk)], ["x"])
    assert dict(encoder.noted) == {chat.UNSTOPPED: 1}  # the end of the sequence stops the last one
    assert [tokenizer_for(template, "</s>").decode(e.input_ids[e.targets])[-4:] for e in examples][-1] == "</s>"


def test_the_end_tokens_of_a_generation_config_count(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    template = templates.CHATML.replace("<|im_end|>\n{% endfor %}", "</tool_call>\n{{ eos_token }}{% endfor %}")
    tokenizer = tokenizer_for(template, "</s>")
    tokenizer.save_pretrained(tmp_path / "model")
    path = write_jsonl("x.jsonl", [{"messages": [turn("user", "one"), turn("assistant", "two")]}])
    section = DataSection(train=sources(str(path)), sequence_length=64, packing="none")
    stop = tokenizer.convert_tokens_to_ids("</tool_call>")
    said: list[str] = []
    for ids in (None, stop, [5, stop, 10**6]):
        if ids is not None:
            (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        row = PackedRows(prepare(section, "train", str(tmp_path / "model"), tmp_path).directories).row(0)
        said.append(tokenizer.decode(row.input_ids[row.targets]))
    # Written in one breath with the end of the sequence it is taken for an end of turn in any case.
    assert said == ["two</tool_call>"] * 3


# The template's own marks

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LONG = [turn(role, f"{role} {i}") for i in range(3) for role in ("user", "assistant")]


def test_marks_are_taken_as_transformers_takes_them() -> None:
    tokenizer = tokenizer_for(MARKED, "</s>")
    found = tokenizer.apply_chat_template(LONG, return_assistant_tokens_mask=True, return_dict=True)
    (example,) = encode(tokenizer, LONG)
    assert example.input_ids.tolist() == found["input_ids"]
    assert example.targets.astype(int).tolist() == found["assistant_masks"]
    assert len(runs(example)) == 3


def test_marks_of_silent_turns_are_left_out_and_stops_are_added() -> None:
    tokenizer = tokenizer_for(MARKED, "</s>")
    (example,) = encode(tokenizer, LONG, silent=frozenset({1}))
    assert [tokenizer.decode(run) for _, run in runs(example)] == ["assistant 1<|im_end|>", "assistant 2<|im_end|>"]
    (example,) = encode(tokenizer, LONG, turns="last")
    assert [tokenizer.decode(run) for _, run in runs(example)] == ["assistant 2<|im_end|>"]
    short = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    (example,) = encode(tokenizer_for(short, "</s>"), LONG)
    assert [tokenizer.decode(run) for _, run in runs(example)] == [f"assistant {i}<|im_end|>" for i in range(3)]
    endless = MARKED.replace("<|im_end|>", "")
    (example,) = encode(tokenizer_for(endless, "</s>"), LONG)
    stops = ("<|im_start|>", "<|im_start|>", "</s>")
    assert [tokenizer.decode(run) for _, run in runs(example)] == [
        f"assistant {i}{stop}" for i, stop in enumerate(stops)
    ]


def test_reasoning_that_is_not_marked_is_counted() -> None:
    encoder = Encoder(tokenizer_for(MARKED + "{# thinking #}", "</s>"), "t")
    encoder.encode([Messages([*LONG[:-1], LONG[-1] | {"thinking": "thought"}])], ["x"])
    assert dict(encoder.noted) == {chat.UNSAID: 1}


def test_marks_that_mark_nothing_do_not_count() -> None:
    tokenizer = tokenizer_for(templates.CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}", "</s>")
    (example,) = encode(tokenizer, LONG)
    assert len(runs(example)) == 3


# Rows of all layouts, through the shards


@pytest.mark.parametrize("name", ["chatml", "last thought", "opens thought", "marked"])
def test_all_layouts_come_to_the_template(name: str, tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    shape = SHAPES[name] if name != "marked" else Shape(MARKED, ("<|im_end|>",), "</s>")
    tokenizer = tokenizer_for(shape.template, shape.eos)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    parts = [{"type": "text", "text": "answer "}, {"type": "text", "text": "two"}]
    turns = [turn("user", "one"), turn("assistant", "answer two"), turn("user", "three"), turn("assistant", "blue")]
    rows = {
        "messages": {"system": "think", "messages": [turns[0], turns[1] | {"content": parts, "weight": 0}, *turns[2:]]},
        "prompt": {"system": "think", "prompt": turns[:3], "completion": turns[3:]},
        "alpaca": {"system": "think", "history": [["one", "answer two"]], "instruction": "three", "output": "blue"},
    }
    whole = [turn("system", "think"), *turns]
    for layout, row in rows.items():
        path = write_jsonl(f"{layout}.jsonl", [row])
        section = DataSection(train=sources(str(path)), sequence_length=128, packing="none", turns="last")
        packed = PackedRows(prepare(section, "train", str(tmp_path / "tokenizer"), tmp_path).directories)
        (only,) = [packed.row(i) for i in range(len(packed))]
        said = tokenizer.decode(said_after(tokenizer, [only], whole[:4]))
        assert "blue" in said and said.endswith(shape.stops[0]) and "answer two" not in said
    # Without turns: last, the mark of the turn is what counts.
    section = DataSection(train=sources(str(tmp_path / "messages.jsonl")), sequence_length=128, packing="none")
    packed = PackedRows(prepare(section, "train", str(tmp_path / "tokenizer"), tmp_path).directories)
    assert len(packed) == 1


def test_what_is_worth_a_warning_is_said_before_training(
    tmp_path: Path, write_jsonl: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer_for(template, "</s>").save_pretrained(tmp_path / "tokenizer")
    talk = [turn(role, "one") for role in ("user", "assistant", "user", "assistant")]
    path = write_jsonl("x.jsonl", [{"messages": talk}] * 3 + [{"messages": [turn("user", "q"), turn("model", "a")]}])
    section = DataSection(train=sources(str(path)), sequence_length=64)
    prepare(section, "train", str(tmp_path / "tokenizer"), tmp_path)
    assert "data.train[0]: behind 3 of 6 assistant turns the chat template writes no token" in caplog.text
    assert "(no turn has the role assistant, only user, model: 1)" in caplog.text


# Input that cannot be


def test_an_empty_rendering_is_refused() -> None:
    with pytest.raises(DataError, match=r"^x\.jsonl:17: .* tokenizer t renders nothing .*: set model\.tokenizer"):
        encode(tokenizer_for("{% if false %}x{% endif %}", "</s>"), LONG)
    with pytest.raises(DataError, match=r"^x\.jsonl:17 messages\[1\]: .* does not write what this turn says \('assist"):
        encode(tokenizer_for("hello", "</s>"), LONG)


def test_a_template_s_words_are_passed_on() -> None:
    refusing = templates.CHATML.replace(
        "{{ m.role }}", "{{ m.role if m.role != 'tool' else raise_exception('no tools!') }}"
    )
    with pytest.raises(DataError, match=r"^x\.jsonl:17: .* refuses the turns .*tool.* \(no tools!\): reorder or leave"):
        encode(tokenizer_for(refusing, "</s>"), TALK)
    failing = templates.CHATML.replace("{{ m.role }}", "{{ m.content + 1 }}")
    with pytest.raises(DataError, match=r"^x\.jsonl:17: .* fails on the turns user, .* \(TypeError: .*\): give"):
        encode(tokenizer_for(failing, "</s>"), LONG)
    with pytest.raises(ModelError, match=r"tokenizer t is no valid template \(line 1: .*\): mend its chat_template"):
        encode(tokenizer_for("{% for %}", "</s>"), LONG)


def test_a_conversation_that_the_assistant_begins() -> None:
    strict = tokenizer_for(templates.NO_SYSTEM, "</s>")
    talk = [turn("assistant", "one"), *LONG]
    with pytest.raises(
        DataError, match=r"^x\.jsonl:17: the conversation begins with a turn of the assistant, .*weight: 0"
    ):
        encode(strict, talk)
    assert len(runs(encode(strict, talk, silent=frozenset({0}))[0])) == 3
    (example,) = encode(tokenizer_for(templates.CHATML, "</s>"), talk)
    assert len(runs(example)) == 4


def test_calls_are_written_once() -> None:
    tokenizer = tokenizer_for(templates.CHATML, "<|im_end|>")
    talk = [turn("user", "one"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    said = tokenizer.decode(said_after(tokenizer, encode(tokenizer, talk), talk[:1]))
    assert said == f"<tool_call>{json.dumps(CALL['function'])}</tool_call><|im_end|>"


@pytest.mark.parametrize(
    "written", ["{{ c.function.arguments + '' }}", "{{ c.function.arguments.items() | list | first | join('=') }}"]
)
@pytest.mark.parametrize("as_text", [False, True])
def test_arguments_of_calls_are_text_or_not_as_the_template_takes_them(written: str, as_text: bool) -> None:
    tokenizer = tokenizer_for(templates.CHATML.replace("{{ c.function | tojson }}", written), "<|im_end|>")
    arguments = json.dumps(CALL["function"]["arguments"]) if as_text else CALL["function"]["arguments"]
    call = {"type": "function", "function": {"name": "look_up", "arguments": arguments}}
    talk = [turn("user", "one"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    said = tokenizer.decode(said_after(tokenizer, encode(tokenizer, talk), talk[:1]))
    assert (
        said == f"<tool_call>{'word=sky' if 'items' in written else json.dumps({'word': 'sky'})}</tool_call><|im_end|>"
    )
