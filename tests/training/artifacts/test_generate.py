"""What a result says: in its chat template, up to the end of its turn, within its context."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raymem.errors import DataError, ModelError
from raymem.training.artifacts.chat import Conversation
from raymem.training.artifacts.generate import Responder, generate
from tests.helpers.speaking import save_speaker
from tests.helpers.templates import HEADERS, NO_END, NO_SYSTEM

GREEDY = {"temperature": 0.0, "max_new_tokens": 40}


def answer(directory: Path, prompt: str = "one", *, raw: bool = False, system: str | None = None) -> str:
    return generate(directory, prompt, max_new_tokens=40, temperature=0.0, seed=0, raw=raw, system=system).text


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaker(tmp_path_factory.mktemp("models") / "speaker", " blue sky")


def test_the_template_makes_a_question_of_a_prompt_and_raw_leaves_it_off(speaker: Path) -> None:
    assert answer(speaker) == "blue sky"
    assert answer(speaker, raw=True) == ""


@pytest.mark.parametrize(
    ("template", "stop", "eos"),
    [
        (HEADERS, "<|eot|>", "</s>"),  # the template's own end of turn, which no config names
        (NO_SYSTEM, "<stop>", "</s>"),
        (NO_END, "<|user|>", "</s>"),  # no end of turn: the marker of the turn that would follow
        (HEADERS, "</s>", "</s>"),
    ],
)
def test_every_token_that_ends_a_turn_ends_the_answer(tmp_path: Path, template: str, stop: str, eos: str) -> None:
    directory = save_speaker(tmp_path / "m", "blue sky", template=template, stop=stop, eos=eos)
    found = generate(directory, "two", seed=0, max_new_tokens=40, temperature=0.0)
    assert (found.text, found.is_whole) == ("blue sky", True)


def test_the_end_tokens_of_the_generation_config_count(tmp_path: Path) -> None:
    directory = save_speaker(tmp_path / "m", "blue sky", stop="<|return|>")
    limited = generate(directory, "two", seed=0, max_new_tokens=9, temperature=0.0)
    assert not limited.is_whole
    config = json.loads((directory / "generation_config.json").read_text())
    ids = [Responder(directory).tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|return|>")]
    (directory / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": ids}))
    assert generate(directory, "two", seed=0, max_new_tokens=9, temperature=0.0).is_whole


def test_the_system_text_needs_a_place(tmp_path: Path, speaker: Path) -> None:
    ids = Responder(speaker).read_turns([{"role": "system", "content": "two"}, {"role": "user", "content": "one"}])
    assert "two" in Responder(speaker).tokenizer.decode(ids)
    assert answer(speaker, system="two") == "blue sky"
    with pytest.raises(ModelError, match="--system: --raw leaves the chat template off"):
        answer(speaker, raw=True, system="two")
    bare = save_speaker(tmp_path / "bare", " blue", template=None)
    with pytest.raises(ModelError, match=r"--system: the tokenizer of .*bare has no chat template"):
        answer(bare, system="two")
    assert answer(bare) == " blue"
    refusing = "{{ raise_exception('no system here') if messages[0].role == 'system' }}" + NO_SYSTEM
    odd = save_speaker(tmp_path / "odd", "blue", template=refusing, stop="<stop>")
    with pytest.raises(DataError, match="no system here"):
        answer(odd, system="two")


def test_a_prompt_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    directory = save_speaker(tmp_path / "m", "blue sky", context=32)
    with pytest.raises(ModelError, match=r"the prompt is \d+ tokens long, and the model's context of 32 tokens"):
        answer(directory, "one two three " * 20)
    with pytest.raises(ModelError, match="the prompt is"):
        answer(directory, "one two three " * 20, raw=True)
    with pytest.raises(ModelError, match="--prompt: it is empty"):
        answer(directory, "", raw=True)


def said(conversation: Conversation, text: str) -> tuple[str, int]:
    pieces: list[str] = []
    found, left_out = conversation.say(text, on_text=pieces.append, **GREEDY)  # type: ignore[arg-type]
    assert found is not None
    assert "".join(pieces) == found.text
    return found.text, left_out


def test_a_conversation_keeps_its_history_and_streams(speaker: Path) -> None:
    conversation = Conversation(Responder(speaker), "two")
    assert said(conversation, "one") == (" blue sky", 0)
    assert said(conversation, "three") == (" blue sky", 0)
    assert [turn["content"] for turn in conversation.turns] == ["one", " blue sky", "three", " blue sky"]


def test_a_full_context_forgets_the_oldest_turns_and_a_turn_that_never_fits_changes_nothing(tmp_path: Path) -> None:
    conversation = Conversation(Responder(save_speaker(tmp_path / "m", " blue sky", context=64)))
    gone = [said(conversation, f"one two three {number}")[1] for number in range(8)]
    assert gone[0] == 0 and gone[-1] > 0 and not any(count % 2 for count in gone)
    assert conversation.turns[0]["role"] == "user"
    before = list(conversation.turns)
    with pytest.raises(ModelError, match="the prompt is"):
        said(conversation, "one two three " * 40)
    assert conversation.turns == before


def test_ctrl_c_ends_an_answer_and_keeps_what_came(speaker: Path) -> None:
    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    conversation = Conversation(Responder(speaker))
    found, _ = conversation.say("one", on_text=interrupt, **GREEDY)  # type: ignore[arg-type]
    assert found is None
    assert conversation.turns[-1]["role"] == "assistant"
    assert said(conversation, "two")[0] == " blue sky"
