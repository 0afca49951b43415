from __future__ import annotations

import random
from typing import Any

import pytest

from raymem.errors import DataError, ModelError
from raymem.training.data.encode import Encoder
from raymem.training.data.formats import Messages, PromptCompletion, Text
from tests.helpers.talks import TALK, encoded, plain, sentencepiece_like, targeted, with_template


@pytest.fixture
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, "tiny")


def test_text_is_all_targets_and_ends(tokenizer: Any, encoder: Encoder) -> None:
    made = encoded(encoder, Text("one two"))
    assert made.input_ids.tolist() == [*plain(tokenizer, "one two"), tokenizer.eos_token_id]
    assert made.targets.all() and made.splittable
    assert (str(made.input_ids.dtype), str(made.targets.dtype)) == ("int32", "bool")


def test_a_text_that_already_ends_is_not_ended_twice(tokenizer: Any, encoder: Encoder) -> None:
    assert encoded(encoder, Text("one<|end|>")).input_ids.tolist() == [
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
    made = encoded(encoder, PromptCompletion(prompt, completion))
    assert made.input_ids[~made.targets].tolist() == plain(tokenizer, prompt)
    assert targeted(tokenizer, made) == completion + "<|end|>"
    assert tokenizer.decode(made.input_ids) == prompt + completion + "<|end|>"
    assert not made.splittable


@pytest.mark.parametrize("example", [PromptCompletion("a question", ""), Text("")], ids=str)
def test_what_is_empty_has_no_targets(encoder: Encoder, example: Any) -> None:
    assert not encoded(encoder, example).targets.any()


def test_only_the_assistant_s_turns_are_targets(tokenizer: Any, encoder: Encoder) -> None:
    made = encoded(encoder, Messages(TALK))
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(made.input_ids) == rendered
    assert targeted(tokenizer, made) == "answer two\nthree<|end|>five<|end|>"
    prompt = plain(tokenizer, tokenizer.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True))
    assert made.input_ids[: len(prompt)].tolist() == prompt  # what the model sees when it generates
    assert made.targets.tolist()[: len(prompt) + 1] == [False] * len(prompt) + [True]


def test_a_conversation_without_an_assistant_has_no_targets(encoder: Encoder) -> None:
    assert not encoded(encoder, Messages(TALK[:2])).targets.any()


def test_a_template_without_a_generation_prompt_counts_the_header_to_the_turn(tokenizer: Any) -> None:
    bare = with_template(tokenizer, "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}")
    made = encoded(Encoder(bare, "bare"), Messages(TALK[1:3]))
    assert targeted(tokenizer, made) == "[assistant]answer two\nthree<|end|>"


def test_a_template_s_own_refusal_is_passed_on(tokenizer: Any) -> None:
    strict = with_template(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        DataError, match=r"^x\.jsonl:17: .*strict refuses the turns user, assistant \(roles must alternate\): reorder"
    ):
        encoded(Encoder(strict, "strict"), Messages(TALK[1:3]))


def test_conversations_need_a_chat_template_and_all_need_an_end(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=r"x\.jsonl:17 .*tokenizer plain has no chat template: set model\.tokenizer"):
        encoded(Encoder(with_template(tokenizer, None), "plain"), Messages(TALK))
    endless = with_template(tokenizer, None)
    endless.eos_token = None
    with pytest.raises(ModelError, match="tokenizer endless has no eos_token: write one"):
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
    made = encoded(Encoder(tokenizer, "sp"), PromptCompletion(prompt, completion))
    assert tokenizer.convert_ids_to_tokens(made.input_ids[made.targets].tolist()) == [*pieces, "</s>"]
    assert made.input_ids[~made.targets].tolist() == tokenizer(prompt)["input_ids"]
    assert made.input_ids[0] == 1 and not made.targets[0]
    text = encoded(Encoder(tokenizer, "sp"), Text("yes"))
    assert tokenizer.convert_ids_to_tokens(text.input_ids.tolist()) == ["<s>", "\u2581yes", "</s>"]
    assert text.targets.tolist() == [False, True, True]


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_the_short_way_through_a_text_is_the_long_one(
    tokenizer: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids of a whole text are looked through from its last added token on; the long way encodes every beginning."""
    used = tokenizer if kind == "byte level" else sentencepiece_like()
    words = ["one", " two", "\n", "  ", "yes", "\n\n    ", " yes", used.eos_token, "<|user|>", "<s>", ":"]
    generator = random.Random(0)
    examples = [
        [("".join(generator.choices(words, k=generator.randint(0, 5))), n % 2 == 1) for n in range(6)]
        for _ in range(300)
    ]
    encoder = Encoder(used, kind)
    short = [_ids_of(encoder, pieces) for pieces in examples]
    monkeypatch.setattr(Encoder, "_located", lambda *_: None)
    assert short == [_ids_of(encoder, pieces) for pieces in examples]
    assert len({len(found) for found in short}) > 1  # some are cut in two, some are not


def _ids_of(encoder: Encoder, pieces: list[tuple[str, bool]]) -> list[tuple[list[int], list[bool]]]:
    text = "".join(piece for piece, _ in pieces)
    (encoding,) = encoder._encode_batch([text])
    found = encoder._located(pieces, text, encoding) or encoder._piece_by_piece(pieces)
    return [(ids.tolist(), targets.tolist()) for ids, targets in found]
