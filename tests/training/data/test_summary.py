"""Prepared data as people are shown them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from raymem.recipe.data import DataSection, Source
from raymem.training.data import summary
from raymem.training.data.packed.shards import prepare
from tests.helpers.talks import sentencepiece_like, turn


def sources(*paths: str) -> list[Source]:
    return [Source(path=path) for path in paths]


def text_of(example: list[summary.Part]) -> str:
    return summary.plain(example)


def test_figures_and_reasons(write_jsonl: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path) -> None:
    talk = [turn("user", "one"), turn("assistant", "two")]
    rows = [{"messages": talk}] * 3 + [{"messages": talk[:1]}, {"messages": [talk[0], talk[1] | {"weight": 0}]}]
    path = write_jsonl("talks.jsonl", rows)
    texts = write_jsonl("texts.jsonl", [{"text": "one two three"}] * 2)
    section = DataSection(train=sources(str(path), str(texts)), sequence_length=16)
    prepared = prepare(section, "train", str(tokenizer_dir), tmp_path)
    first, second = summary.summarise(section.train, prepared)
    assert (first.num_read, first.num_kept, first.truncated) == (5, 3, 0)
    assert first.dropped == {
        "no turn has the role assistant, only user": 1,
        "the assistant's turns are empty or marked not to be learned": 1,
    }
    assert first.num_targets == 3 * 2  # two and the end of the turn
    assert (second.num_read, second.num_kept, second.dropped) == (2, 2, {})
    assert second.fill == second.num_tokens / 16
    table = summary.table([first, second])
    head, one, two, *about = table.splitlines()
    assert head.split() == ["source", "rows", "examples", "dropped", "truncated", "tokens", "targets", "fill"]
    assert one.split()[:5] == ["train[0]", "5", "3", "2", "0"] and f"{6 / first.num_tokens:.1%}" in one.split()
    assert len({len(line) for line in (head, one, two)}) == 1
    assert about[:3] == [
        f"train[0]: {path}",
        "  format messages, template: chat (the tokenizer's)",
        "  tokens of an example: half of them up to 10, 95% up to 10, the longest 10",
    ]
    assert about[3].startswith("  1 dropped: no turn has the role assistant") and about[5] == f"train[1]: {texts}"


def test_the_table_of_large_data_is_80_columns_wide_and_cuts_no_number() -> None:
    many = summary.SourceSummary(
        "data.train[0]", "x" * 100, "format text", 1_234_567, 1_234_561, {"empty": 6}, 123_456, 987_654_321,
        987_654_320, 0.999, {},
    )  # fmt: skip
    head, row, *_ = summary.table([many]).splitlines()
    assert len(head) == len(row) <= 80
    assert row.split() == ["train[0]", "1,234,567", "1,234,561", "6", "123,456", "987,654,321", "100.0%", "99.9%"]


def test_examples_come_from_all_sources_with_their_targets(
    write_jsonl: Callable[..., Path], tokenizer: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    talks = [turn("user", "a  b"), turn("assistant", "one \n\ttwo"), turn("user", "[x]"), turn("assistant", "three")]
    path = write_jsonl("talks.jsonl", [{"messages": talks}])
    texts = write_jsonl("texts.jsonl", [{"text": "one two"}, {"text": "blue sky of the value"}])
    section = DataSection(train=sources(str(path), str(texts)), sequence_length=64)
    prepared = prepare(section, "train", str(tokenizer_dir), tmp_path)
    shown = [text_of(example) for example in summary.examples(prepared, tokenizer)]
    assert shown[0] == (
        "<|user|>\\n\na\u00b7\u00b7b<|end|>\\n\n<|assistant|>\\n\n[[one\u00b7\\n\n\\ttwo<|end|>]]\\n\n"
        "<|user|>\\n\n[x]<|end|>\\n\n<|assistant|>\\n\n[[three<|end|>]]\\n\n"
    )
    # The first token of a row is no target; the space at the beginning of the next one can be seen.
    assert shown[1:] == ["blue[[\u00b7sky of the value<|end|>]]", "one[[\u00b7two<|end|>]]"]
    said = summary.overview(section.train, prepared, tokenizer)
    assert said.splitlines()[0].startswith("source") and said.endswith(f"for example:\n{shown[0]}")
    assert len(list(islice(summary.examples(prepared, tokenizer), 2))) == 2


def test_spaces_of_words_and_half_characters() -> None:
    words = sentencepiece_like()
    ids = words("yes yes")["input_ids"]
    assert [part.text for part in summary.parts(words, ids, [False, False, True])] == ["<s> yes", "\u00b7yes"]


def test_half_a_character_spoils_no_more_than_itself(tokenizer: Any) -> None:
    ids = tokenizer("one \U0001f600 two", add_special_tokens=False)["input_ids"]
    for cut in range(1, len(ids)):
        shown = summary.parts(tokenizer, ids, [index >= cut for index in range(len(ids))])
        joined = "".join(part.text for part in shown)
        assert len(shown) == 2 and joined.startswith("one") and joined.endswith("two")
