from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import DataError, StorageError
from raymem.recipe.data import DataSection
from raymem.storage.publish import file_sha256, publish, read_manifest, verify
from raymem.training.data.packed import shards
from raymem.training.data.packed.facts import Counts
from raymem.training.data.packed.shards import Task, plan_sources, prepare


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BLOCK_ROWS", 7)


@pytest.fixture
def data(write_jsonl: Callable[..., Path], texts: Callable[..., list[str]]) -> Path:
    rows = [{"prompt": f"{text}\n", "completion": f"    {text}"} for text in texts(30)]
    return write_jsonl("data.jsonl", rows)


def section(path: Path | str, **options: Any) -> DataSection:
    return DataSection.model_validate({"train": str(path), "sequence_length": 32} | options)


def keys_of(data: DataSection, tokenizer: Path, cache: Path) -> list[str]:
    return [plan.key for plan in plan_sources(data, "train", str(tokenizer), cache)]


def contents(directory: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in directory.iterdir()}


def scattered(fn: Callable[[Task], Counts], tasks: Sequence[Task]) -> list[Counts]:
    """As on a cluster: everything crosses a process border, and blocks are done in any order."""
    done = {task.index: pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(fn))(task))) for task in reversed(tasks)}
    return [done[task.index] for task in tasks]


@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
def test_the_same_bytes_wherever_and_in_whatever_order(
    data: Path, tokenizer_dir: Path, tmp_path: Path, packing: str
) -> None:
    one = prepare(section(data, packing=packing), "train", str(tokenizer_dir), tmp_path / "one")
    moved = tmp_path / "moved" / "same.jsonl"
    moved.parent.mkdir()
    shutil.copy(data, moved)
    shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    two = prepare(section(moved, packing=packing), "train", str(tmp_path / "tokenizer"), tmp_path / "two", scattered)
    assert two.key == one.key and two.sources[0].directory != one.sources[0].directory
    assert contents(one.sources[0].directory) == contents(two.sources[0].directory)
    assert len(list(one.sources[0].directory.glob("*.arrow"))) == 5
    assert one.sources[0].directory == tmp_path / "one" / "data" / one.sources[0].directory.name
    verify(one.sources[0].directory)


def test_the_first_rows_are_data_of_their_own(data: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    def prepared(**options: Any) -> Any:
        (source,) = prepare(
            section(data, train=[{"path": str(data), **options}]), "train", str(tokenizer_dir), tmp_path
        ).sources
        return source

    whole, ten = prepared(), prepared(max_rows=10)
    assert (whole.num_examples, ten.num_examples) == (30, 10)
    assert whole.directory != ten.directory
    assert prepared(max_rows=None).directory == whole.directory


def test_rows_are_made_once(data: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    def never(fn: Callable[[Task], Counts], tasks: Sequence[Task]) -> list[Counts]:
        raise AssertionError("tokenised twice")

    first = prepare(section(data), "train", str(tokenizer_dir), tmp_path)
    assert prepare(section(data), "train", str(tokenizer_dir), tmp_path, never) == first
    assert keys_of(section(data), tokenizer_dir, tmp_path) == [first.sources[0].directory.name]


def test_the_key_covers_what_decides_the_rows(
    data: Path, write_jsonl: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(path: Path = data, **options: Any) -> str:
        (name,) = keys_of(section(path, **options), tokenizer_dir, tmp_path)
        return name

    other = write_jsonl("other.jsonl", [{"prompt": "a", "completion": "b"}])
    swapped = {"path": str(data), "columns": {"prompt": "completion", "completion": "prompt"}}
    as_text = {"path": str(data), "columns": {"text": "prompt"}, "format": "text"}
    explicit = {"path": str(data), "format": "prompt_completion", "weight": 2.0}
    base = key()
    assert key(train=explicit) == base
    keys = [base, key(other), key(sequence_length=16), key(packing="none"), key(train=swapped), key(train=as_text)]
    either = write_jsonl("either.jsonl", [{"prompt": "a", "completion": "b", "text": "c"}])
    keys += [key(either), key(train={"path": str(either), "format": "text"})]
    copy = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, copy)
    (copy / "chat_template.jinja").write_text("another")
    keys += keys_of(section(data), copy, tmp_path)
    monkeypatch.setattr(shards, "SCHEMA_VERSION", shards.SCHEMA_VERSION + 1)
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_weights_and_order_of_sources_decide_the_key_of_the_whole(
    data: Path, write_jsonl: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    other = write_jsonl("other.jsonl", [{"text": "one two three"}])

    def key(*sources: tuple[Path, float]) -> str:
        train = [{"path": str(path), "weight": weight} for path, weight in sources]
        return prepare(section(data, train=train), "train", str(tokenizer_dir), tmp_path).key

    assert (
        len({key((data, 1), (other, 1)), key((other, 1), (data, 1)), key((data, 1), (other, 2)), key((data, 1))}) == 4
    )


def test_counts(write_jsonl: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path, caplog: Any) -> None:
    rows = [{"prompt": "one two", "completion": " three"}] * 10
    rows += [{"prompt": "one", "completion": " two" * 60}] * 2 + [{"prompt": "one" * 200, "completion": "two"}] * 3
    path = write_jsonl("x.jsonl", rows)
    recipe = section(path, train={"path": str(path), "weight": 0.5, "template": "none"}, packing="none")
    (source,) = prepare(recipe, "train", str(tokenizer_dir), tmp_path).sources
    assert (source.num_rows, source.num_examples, source.dropped, source.truncated) == (12, 15, 3, 2)
    assert source.num_tokens == 10 * 4 + 2 * 32
    assert source.num_targets == 10 * 2 + 2 * 31
    assert source.weight == 0.5
    lengths = "the 95th percentile of the lengths is 202 tokens, the longest has 202"
    assert (
        "data.train[0]: 3 of 15 examples dropped: nothing in them is to be predicted (cut before their first target by "
        f"data.sequence_length=32: 3; {lengths})" in caplog.text
    )
    assert f"data.train[0]: 2 of 15 examples truncated: longer than data.sequence_length=32 ({lengths})" in caplog.text


def test_killed_between_shards_and_manifest(
    data: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directories = "raymem.storage.publish"

    class Killed(BaseException):
        pass

    def killed(directory: Path) -> Any:
        assert list(directory.glob("*.arrow"))
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"{directories}._describe", killed)
        patch.setattr(f"{directories}.shutil.rmtree", lambda *_, **__: None)  # the dead do not tidy up
        with pytest.raises(Killed):
            prepare(section(data), "train", str(tokenizer_dir), tmp_path)
    (left,) = (tmp_path / "data").iterdir()
    (name,) = keys_of(section(data), tokenizer_dir, tmp_path)
    assert left.name != name and read_manifest(left) is None
    (source,) = prepare(section(data), "train", str(tokenizer_dir), tmp_path).sources
    assert verify(source.directory)["facts"]["num_rows"] == source.num_rows > 0


def test_a_task_that_was_killed_and_started_again(data: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    def retried(fn: Callable[[Task], Counts], tasks: Sequence[Task]) -> list[Counts]:
        (directory,) = (tmp_path / "one" / "data").iterdir()
        (directory / ".writing-shard-000001.arrow-0").write_bytes(b"half")
        shards.serial(fn, tasks[:2])
        return shards.serial(fn, tasks)

    (one,) = prepare(section(data), "train", str(tokenizer_dir), tmp_path / "one", retried).sources
    (two,) = prepare(section(data), "train", str(tokenizer_dir), tmp_path / "two").sources
    assert contents(one.directory) == contents(two.directory)


def test_evaluating_on_what_is_trained_on_is_pointed_out(
    data: Path, write_jsonl: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path, caplog: Any
) -> None:
    other = write_jsonl("other.jsonl", [{"text": "one two three"}])
    evaluation = [str(other), {"path": str(data), "weight": 2.0}]
    prepare(section(data, eval=evaluation), "eval", str(tokenizer_dir), tmp_path)
    assert "data.eval[1] is also trained on" in caplog.text and "data.eval[0] is also" not in caplog.text


def test_a_block_without_rows_leaves_no_shard(
    write_jsonl: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    nothing, something = {"prompt": "one" * 200, "completion": "two"}, {"prompt": "one", "completion": "two"}
    path = write_jsonl("x.jsonl", [nothing] * 7 + [something] * 7 + [nothing])
    (source,) = prepare(section(path, max_dropped=0.6), "train", str(tokenizer_dir), tmp_path).sources
    assert [path.name for path in source.directory.glob("*.arrow")] == ["shard-000001.arrow"]
    assert (source.num_examples, source.dropped) == (15, 8)


def test_errors_name_place_value_and_cure(
    data: Path, write_jsonl: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    def failing(match: str, path: Path, split: Any = "train", map_blocks: Any = shards.serial, **options: Any) -> None:
        with pytest.raises((DataError, StorageError), match=match):
            prepare(section(path, **options), split, str(tokenizer_dir), tmp_path, map_blocks)

    late = write_jsonl("late.jsonl", [{"text": "one"}] * 9 + [{"txt": "one"}])
    failing(r"late\.jsonl:10 has no column 'text', only txt", late)
    barren = write_jsonl("barren.jsonl", [{"prompt": "one" * 200, "completion": "two"}] * 9)
    failing(
        r"data\.train\[0\]\.path='.*': none of its 9 examples .*sequence_length=32: 9; .*raise .* to 209\.$", barren
    )
    failing(r"data\.eval is not set", data, "eval")
    failing(r"data\.eval\[0\]\.path='.*gone\.jsonl' does not exist", data, "eval", eval=str(tmp_path / "gone.jsonl"))

    def elsewhere(fn: Callable[[Task], Counts], tasks: Sequence[Task]) -> list[Counts]:
        return [{"shard": "shard-000000.arrow", "num_rows": 1}]

    failing(
        r"shard-000000\.arrow was written by another process but is not here: set storage\.path",
        data,
        "train",
        elsewhere,
    )
    assert [path.name for path in (tmp_path / "data").iterdir()] == []


def test_a_file_that_is_written_while_it_is_prepared_is_refused(
    data: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    def meanwhile(fn: Callable[[Task], Counts], tasks: Sequence[Task]) -> list[Counts]:
        results = shards.serial(fn, tasks)
        data.write_text(data.read_text().replace("one", "two"))
        return results

    with pytest.raises(DataError, match=rf"{data} changed while it was prepared: run again"):
        prepare(section(data), "train", str(tokenizer_dir), tmp_path, meanwhile)
    assert not list((tmp_path / "data").iterdir())


def test_long_rows_make_blocks_of_fewer(
    write_jsonl: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymem.training.data.readers.BLOCK_BYTES", 100)
    path = write_jsonl("x.jsonl", [{"text": "one two three four five"}] * 14)  # 36 bytes each
    (source,) = prepare(section(path), "train", str(tokenizer_dir), tmp_path).sources
    assert len(list(source.directory.glob("*.arrow"))) == 5
    assert source.num_examples == 14


def test_the_other_process_wins(data: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Two runs that start together prepare the same data; the later one uses what the earlier one made."""

    def late(fn: Callable[[Task], Counts], tasks: Sequence[Task]) -> list[Counts]:
        prepare(section(data), "train", str(tokenizer_dir), tmp_path)
        return shards.serial(fn, tasks)

    (source,) = prepare(section(data), "train", str(tokenizer_dir), tmp_path, late).sources
    verify(source.directory)
    publish(source.directory, lambda _: pytest.fail("not finished"))
    assert len(list((tmp_path / "data").iterdir())) == 1
