"""Prompts and completions that are texts: rendered by the chat template, or taken as they are."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from raymem.errors import CheckpointError, DataError, ModelError
from raymem.recipe.data import DataSection
from raymem.training.data import summary
from raymem.training.data.chat.template import Template
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.shards import Prepared, prepare
from raymem.training.data.tokenizer import load_tokenizer
from raymem.training.resume_rules import check_identity, identity_of
from tests.helpers.support import make_recipe

PAIR = {"prompt": "one two?", "completion": "three four"}
MARKED = {"prompt": "<|user|>\none two?<|end|>\n<|assistant|>\n", "completion": "three"}
Prepare = Callable[..., Prepared]


@pytest.fixture
def bare_tokenizer(tokenizer_dir: Path, tmp_path: Path) -> Path:
    """The same without a chat template."""
    copy = tmp_path / "bare"
    shutil.copytree(tokenizer_dir, copy)
    (copy / "chat_template.jinja").unlink()
    return copy


@pytest.fixture
def prepared(write_jsonl: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path) -> Prepare:
    def run(rows: list[Any], tokenizer: Path = tokenizer_dir, sequence_length: int = 32, **options: Any) -> Prepared:
        name = f"{len(list(tmp_path.glob('*.jsonl')))}.jsonl"
        train = {"path": str(write_jsonl(name, rows)), **options.pop("source", {})}
        raw = {"train": train, "sequence_length": sequence_length, "packing": "none", **options}
        return prepare(DataSection.model_validate(raw), "train", str(tokenizer), tmp_path)

    return run


def shown(prepared: Prepared, tokenizer: Any) -> list[str]:
    return [summary.plain(example) for example in summary.examples(prepared, tokenizer)]


def test_a_pair_is_trained_as_the_same_conversation(prepared: Prepare, tokenizer: Any) -> None:
    roles = {"prompt": "user", "completion": "assistant"}
    talk = {"messages": [{"role": role, "content": PAIR[column]} for column, role in roles.items()]}
    pairs, talks = (PackedRows(prepared([row]).directories).row(0) for row in (PAIR, talk))
    for of_pair, of_talk in ((pairs.input_ids, talks.input_ids), (pairs.targets, talks.targets)):
        assert np.array_equal(of_pair, of_talk)
    assert shown(prepared([PAIR]), tokenizer) == [
        "<|user|>\\n\none two?<|end|>\\n\n<|assistant|>\\n\n[[three four<|end|>]]\\n\n"
    ]
    assert shown(prepared([PAIR], source={"template": "none"}), tokenizer) == ["one two?[[three four<|end|>]]"]


def test_auto_leaves_a_prompt_with_the_template_s_marks_as_it_is(
    prepared: Prepare, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    whole = "<|user|>\\n\none two?<|end|>\\n\n<|assistant|>\\n\n[[three<|end|>]]"
    alone = prepared([MARKED])
    assert shown(alone, tokenizer) == [whole] and "hold its marks" not in caplog.text
    both = prepared([MARKED, PAIR, PAIR | {"completion": ""}])
    assert shown(both, tokenizer)[0] == whole and shown(both, tokenizer)[1].endswith("[[three four<|end|>]]\\n\n")
    assert "renders 1 examples, but not 1 whose prompts hold its marks already" in caplog.text
    forced = prepared([MARKED], source={"template": "chat"})
    assert shown(forced, tokenizer)[0].startswith("<|user|>\\n\n<|user|>")


@pytest.mark.parametrize(
    ("template", "marks", "unmarked"),
    [
        ("[INST] {c} [/INST]{a}</s>", ["</s>", "[INST]"], "the answer of the user"),
        ("USER: {c}\n", ["USER:"], "a user: of the assistant"),
        ("<|im_start|>user\n{c}<|im_end|>\n", ["<|im_start|>", "<|im_end|>"], "user\nassistant"),
    ],
)
def test_marks_are_what_the_template_writes_before_a_user_s_turn(
    tokenizer_dir: Path, template: str, marks: list[str], unmarked: str
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "</s>"]})
    user, _, end = template.partition("{a}")
    before, _, after = user.partition("{c}")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}" + before + "{{ m.content }}" + after
        + "{% else %}{{ m.content }}" + (end or after) + "{% endif %}{% endfor %}"
    )  # fmt: skip
    found = Template(tokenizer, "x")
    assert set(marks) == set(found.marks)
    assert not found.is_in(unmarked) and all(found.is_in(f"so {mark} it is") for mark in marks)


def test_older_data_is_found_again_under_none_and_never_taken_for_rendered(prepared: Prepare) -> None:
    (rendered,), (plain,) = prepared([PAIR]).sources, prepared([PAIR], source={"template": "none"}).sources
    assert rendered.directory != plain.directory and rendered.untemplated == plain.directory.name
    assert plain.untemplated is None
    talks = [{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "one"}]}]
    assert prepared(talks).sources[0].untemplated is None  # was rendered before there was a choice


def test_an_older_run_is_told_how_to_go_on(prepared: Prepare) -> None:
    recipe = make_recipe()
    began = identity_of(recipe, prepared([PAIR], source={"template": "none"}))
    now = prepared([PAIR])
    with pytest.raises(CheckpointError, match=r"^here: .* set template: none for data\.train\[0\] to go on"):
        check_identity(began, identity_of(recipe, now), "here", now)
    other = prepared([PAIR, PAIR])
    with pytest.raises(CheckpointError, match=r"started with data\.train="):
        check_identity(began, identity_of(recipe, other), "here", other)


def test_without_a_template_glued_words_are_pointed_out(
    prepared: Prepare, bare_tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spaced = [{"prompt": "one ", "completion": "two"}, {"prompt": "one", "completion": "\ntwo"}]
    wide = {"prompt": "one", "completion": "\u4e2d\u6587"}
    prepared([*spaced, wide, {"prompt": "one<|end|>", "completion": "two"}], bare_tokenizer)
    assert "nothing stands between" not in caplog.text
    source = prepared([PAIR, *spaced, PAIR], bare_tokenizer).sources[0]
    assert "data.train[0]: in 2 examples nothing stands between the end of the prompt and" in caplog.text
    assert (source.template, source.untemplated) == ("none", None)


def test_instructions_without_a_template_are_paragraphs(
    prepared: Prepare, bare_tokenizer: Path, tokenizer: Any
) -> None:
    row = {"instruction": "one", "input": "two", "output": "three"}
    assert shown(prepared([row], bare_tokenizer), tokenizer) == ["one\\n\n\\n\ntwo\\n\n\\n\n[[three<|end|>]]"]
    assert shown(prepared([row]), tokenizer)[0].startswith("<|user|>\\n\none\\n\n\\n\ntwo<|end|>")


def test_a_template_that_means_nothing_is_refused(prepared: Prepare, bare_tokenizer: Path) -> None:
    with pytest.raises(ValidationError, match="template: none does not go with format: messages"):
        prepared([], source={"format": "messages", "template": "none"})
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(DataError, match=r"^data\.train\[0\]\.template: none does not go with format: messages"):
        prepared([talk], source={"template": "none"})
    with pytest.raises(DataError, match=r"^data\.train\[0\]\.template: chat does not go with format: text"):
        prepared([{"text": "one two"}], source={"template": "chat"})
    with pytest.raises(ModelError, match=r"^data\.train\[0\]\.template: chat, but tokenizer .*bare has no chat templ"):
        prepared([PAIR], bare_tokenizer, source={"template": "chat"})


def test_a_source_that_loses_most_of_its_examples_is_refused_with_the_reasons(
    prepared: Prepare, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [PAIR] * 4 + [{"prompt": "one " * 60, "completion": "two"}] * 5 + [{"prompt": "one", "completion": ""}]
    said = (
        r"^data\.train\[0\]: 6 of 10 examples would be dropped, .*\(cut before their first target by "
        r"data\.sequence_length=32: 5; the completion is empty: 1; the 95th percentile of the lengths is (\d+) tokens, "
        r"the longest has \1\), and data\.max_dropped=0\.5 allows 5: raise data\.sequence_length to \1 and give the "
    )
    with pytest.raises(DataError, match=said) as refused:
        prepared(rows)
    enough = re.search(said, str(refused.value))
    assert enough is not None
    assert prepared(rows, sequence_length=int(enough[1])).sources[0].dropped == 1  # the cure works
    assert prepared(rows, max_dropped=0.6).sources[0].dropped == 6
    with pytest.raises(DataError, match="would be dropped"):  # although it is prepared now
        prepared(rows)
    with pytest.raises(DataError, match=r"1 of 2 .*empty: 1\), and data\.max_dropped=0 allows 0: give the others"):
        prepared([PAIR, {"prompt": "one", "completion": ""}], max_dropped=0)
