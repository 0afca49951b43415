from __future__ import annotations

from typing import Any

import pytest

from raymem.errors import DataError, ModelError
from raymem.training.data.encode import Encoder
from raymem.training.data.formats import Messages, PromptCompletion, Text
from tests.helpers.talks import PLACE, TALK, plain, sentencepiece_like, targeted, with_template


@pytest.fixture
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, "tiny")


def test_text_is_all_targets_and_ends(tokenizer: Any, encoder: Encoder) -> None:
    encoded = encoder.encode(Text("one two"), PLACE)
    assert encoded.input_ids.tolist() == [*plain(tokenizer, "one two"), tokenizer.eos_token_id]
    assert encoded.targets.all() and encoded.splittable
    assert (str(encoded.input_ids.dtype), str(encoded.targets.dtype)) == ("int32", "bool")


def test_a_text_that_already_ends_is_not_ended_twice(tokenizer: Any, encoder: Encoder) -> None:
    assert encoder.encode(Text("one<|end|>"), PLACE).input_ids.tolist() == [
        *plain(tokenizer, "one"),
        tokenizer.eos_token_id,
    ]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("def one():\n", "    return two\n"),  # the line break would join the spaces
        ("val", "ue"),  # one token if joined
        ("question:", " blue"),
        ("question: ", "blue"),
        ("blue\n\n", "\nsky"),
        ("", "blue"),
    ],
)
def test_a_prompt_has_the_ids_it_has_alone(tokenizer: Any, encoder: Encoder, prompt: str, completion: str) -> None:
    encoded = encoder.encode(PromptCompletion(prompt, completion), PLACE)
    assert encoded.input_ids[~encoded.targets].tolist() == plain(tokenizer, prompt)
    assert targeted(tokenizer, encoded) == completion + "<|end|>"
    assert tokenizer.decode(encoded.input_ids) == prompt + completion + "<|end|>"
    assert not encoded.splittable


@pytest.mark.parametrize("example", [PromptCompletion("a question", ""), Text("")], ids=str)
def test_what_is_empty_has_no_targets(encoder: Encoder, example: Any) -> None:
    assert not encoder.encode(example, PLACE).targets.any()


def test_only_the_assistant_s_turns_are_targets(tokenizer: Any, encoder: Encoder) -> None:
    encoded = encoder.encode(Messages(TALK), PLACE)
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(encoded.input_ids) == rendered
    assert targeted(tokenizer, encoded) == "answer two\nthree<|end|>\nfive<|end|>\n"
    prompt = plain(tokenizer, tokenizer.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True))
    assert encoded.input_ids[: len(prompt)].tolist() == prompt  # what the model sees when it generates
    assert encoded.targets.tolist()[: len(prompt) + 1] == [False] * len(prompt) + [True]


def test_a_conversation_without_an_assistant_has_no_targets(encoder: Encoder) -> None:
    assert not encoder.encode(Messages(TALK[:2]), PLACE).targets.any()


def test_a_template_without_a_generation_prompt_counts_the_header_to_the_turn(tokenizer: Any) -> None:
    bare = with_template(tokenizer, "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}")
    encoded = Encoder(bare, "bare").encode(Messages(TALK[1:3]), PLACE)
    assert targeted(tokenizer, encoded) == "[assistant]answer two\nthree<|end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    rewriting = with_template(
        tokenizer,
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' and loop.last %}<think>{% endif %}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    )
    encoder = Encoder(rewriting, "thinking")
    assert targeted(tokenizer, encoder.encode(Messages(TALK[1:3]), PLACE)) == "<think>answer two\nthree<|end|>"[:-7]
    with pytest.raises(DataError, match=r"^x\.jsonl:17 messages\[2\]: the chat template of tokenizer thinking .*: end"):
        encoder.encode(Messages(TALK), PLACE)


def test_a_template_s_own_refusal_is_passed_on(tokenizer: Any) -> None:
    strict = with_template(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"^x\.jsonl:17: .*strict refuses the turns user, assistant \(roles must alt"):
        Encoder(strict, "strict").encode(Messages(TALK[1:3]), PLACE)


def test_conversations_need_a_chat_template_and_all_need_an_end(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=r"x\.jsonl:17 .*tokenizer plain has no chat template: set model\.tokenizer"):
        Encoder(with_template(tokenizer, None), "plain").encode(Messages(TALK), PLACE)
    endless = with_template(tokenizer, None)
    endless.eos_token = None
    with pytest.raises(ModelError, match="tokenizer endless has no eos_token: set one"):
        Encoder(endless, "endless")


@pytest.mark.parametrize(
    ("prompt", "completion", "pieces"),
    [
        ("answer:", "yes", ["yes"]),
        ("answer:", " yes", ["\u2581yes"]),
        ("answer: ", "yes", ["yes"]),  # the space is the prompt's; the completion must not bring another one
        ("e", "yes\nyes", ["yes", "\n", "yes"]),
    ],
)
def test_begin_tokens_and_leading_spaces_are_as_the_tokenizer_has_them(
    prompt: str, completion: str, pieces: list[str]
) -> None:
    tokenizer = sentencepiece_like()
    encoded = Encoder(tokenizer, "sp").encode(PromptCompletion(prompt, completion), PLACE)
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.targets].tolist()) == [*pieces, "</s>"]
    assert encoded.input_ids[~encoded.targets].tolist() == tokenizer(prompt)["input_ids"]
    assert encoded.input_ids[0] == 1 and not encoded.targets[0]
    text = Encoder(tokenizer, "sp").encode(Text("yes"), PLACE)
    assert tokenizer.convert_ids_to_tokens(text.input_ids.tolist()) == ["<s>", "\u2581yes", "</s>"]
    assert text.targets.tolist() == [False, True, True]
