"""Splits of plain files, by the names that Hugging Face gives them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from raymem.errors import DataError
from raymem.recipe.data import DataSection, Source
from raymem.training.data.packed.shards import prepare
from raymem.training.data.sources.opened import open_source
from raymem.training.data.sources.splits import check_single, choose, split_of

PLACE = "data.eval[0]"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("training.csv.gz", "training"),
        ("my_train_data.jsonl", "train"),
        ("data/test-00000-of-00002.parquet", "test"),
        ("train-00001-of-00004-0a1b2c3d4e5f.parquet", "train"),
        ("data/train_sft-00000-of-00001.parquet", "train_sft"),
        ("dev.json", "dev"),
        ("wiki.valid.jsonl", "valid"),
        ("Validation 1.csv", "validation"),
        ("test/a.jsonl", "test"),
        ("test/part/a.jsonl", "test"),
        ("val/train-like.jsonl", "val"),
        ("eval.jsonl", "eval"),
        ("a.jsonl", None),
        ("trainers.jsonl", None),
        ("contest.jsonl", None),
        ("train-test.jsonl", None),
    ],
)
def test_what_a_name_says(name: str, split: str | None) -> None:
    assert split_of(name) == split


BOTH = ["train.jsonl", "test.jsonl"]


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (BOTH, None, ["train.jsonl"]),
        (BOTH, "train", ["train.jsonl"]),
        (BOTH, "test", ["test.jsonl"]),
        (BOTH, "eval", ["test.jsonl"]),
        (["train.jsonl", "dev.jsonl"], "validation", ["dev.jsonl"]),
        (["train.jsonl", "validation.jsonl"], "val", ["validation.jsonl"]),
        (["train.jsonl", "test.jsonl", "eval.jsonl"], "test", ["test.jsonl"]),
        (["train.jsonl", "training.jsonl", "test.jsonl"], None, ["train.jsonl", "training.jsonl"]),
        (["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"], "test_sft",
         ["data/test_sft-00000-of-00001.parquet"]),
        (["train/0.csv", "train/1.csv", "test/0.csv"], "train", ["train/0.csv", "train/1.csv"]),
        # of one split, or of none: the whole directory
        (["test.jsonl"], None, ["test.jsonl"]),
        (["a.jsonl", "b.jsonl"], None, ["a.jsonl", "b.jsonl"]),
        (["a.jsonl", "b.jsonl"], "train", ["a.jsonl", "b.jsonl"]),
        (["a.jsonl", "train.jsonl"], None, ["a.jsonl", "train.jsonl"]),
    ],
)  # fmt: skip
def test_the_files_of_a_split(names: list[str], split: str | None, chosen: list[str]) -> None:
    assert choose(names, split, PLACE, "files") == chosen


def test_a_directory_may_be_named_after_its_split() -> None:
    assert choose(["a.jsonl"], "test", PLACE, "test") == ["a.jsonl"]


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["a.jsonl", "b.jsonl"], "test", r"split='test': its files do not say .*\(a\.jsonl, b\.jsonl\): name them"),
        (BOTH, "validation", r"holds files of the splits test, train, not 'validation': set its split to one of them"),
        (BOTH, "train[:10]", r"not 'train\[:10\]'"),
        (["dev.jsonl", "test.jsonl"], None, r"splits dev, test, and none that says train: set its split"),
        ([*BOTH, "more.jsonl"], "test", r"but more\.jsonl does not say of which it is: rename it"),
        ([*BOTH, "train-test.jsonl"], None, r"but train-test\.jsonl does not say"),
        (["train.jsonl", "dev.jsonl", "val.jsonl"], "validation", r"split='validation' may mean dev or val there"),
    ],
)
def test_what_the_files_do_not_say_is_refused(names: list[str], split: str | None, message: str) -> None:
    with pytest.raises(DataError, match=rf"^data\.eval\[0\].*{message}"):
        choose(names, split, PLACE, "files")


def test_a_single_file_has_the_split_that_it_says_or_none() -> None:
    for name, split in [("a.jsonl", None), ("a.jsonl", "train"), ("test.jsonl", "eval"), ("x/dev.csv", "valid")]:
        check_single(name, split, PLACE)
    for name, split in [("a.jsonl", "test"), ("train.jsonl", "test"), ("test/a.jsonl", "train")]:
        with pytest.raises(DataError, match=rf"^data\.eval\[0\]\.split='{split}', but the path is a .*leave split out"):
            check_single(name, split, PLACE)


def files_of(directory: Path, split: str | None, cache: Path) -> list[str]:
    opened = open_source(Source(path=str(directory), split=split), PLACE, cache, 100)
    return [str(Path(file.name).relative_to(directory)) for file in opened.files]


def test_files_lie_in_data_and_in_folders_of_splits(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    for name in ("data/train-00000-of-00001.jsonl", "test/deep/er/a.jsonl", "runs/train.jsonl", ".test/b.jsonl"):
        write_jsonl(f"d/{name}", [{"text": name}])
    write_jsonl("d/dataset_info.json", [{"features": 1}])
    assert files_of(tmp_path / "d", None, tmp_path) == ["data/train-00000-of-00001.jsonl"]
    assert files_of(tmp_path / "d", "test", tmp_path) == ["test/deep/er/a.jsonl"]


def test_a_recipe_s_two_splits_of_one_directory(
    tmp_path: Path, write_jsonl: Callable[..., Path], tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl("d/train-00000-of-00002.jsonl", [{"text": "one two three"}] * 3)
    write_jsonl("d/train-00001-of-00002.jsonl", [{"text": "one two three"}] * 4)
    write_jsonl("d/test.jsonl", [{"text": "four five six"}] * 2)
    section = DataSection.model_validate(
        {"train": str(tmp_path / "d"), "eval": {"path": str(tmp_path / "d"), "split": "test"}, "sequence_length": 32}
    )
    with caplog.at_level(logging.WARNING):
        counts = [
            prepare(section, split, str(tokenizer_dir), tmp_path / "cache").sources[0].num_examples
            for split in ("train", "eval")
        ]
    assert counts == [7, 2]
    assert "also trained on" not in caplog.text


def test_trained_on_is_a_matter_of_contents(
    tmp_path: Path, write_jsonl: Callable[..., Path], tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import gzip

    rows = [{"text": "one two three"}] * 3
    write_jsonl("d/train.jsonl", rows)
    write_jsonl("d/test.jsonl", [{"text": "four five six"}] * 3)
    copy = write_jsonl("elsewhere/held-out.jsonl", rows)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(copy.read_bytes()))
    other = write_jsonl("other.jsonl", [{"text": "one two seven"}] * 3)
    gone = {"path": str(tmp_path / "gone.jsonl")}

    def warned(evaluation: dict[str, str]) -> str:
        caplog.clear()
        train = [gone, {"path": str(tmp_path / "d")}]
        section = DataSection.model_validate({"train": train, "eval": evaluation, "sequence_length": 32})
        prepare(section, "eval", str(tokenizer_dir), tmp_path / "cache")
        return caplog.text

    assert "data.eval[0] is also trained on" in (text := warned({"path": str(copy)}))
    assert f"{copy} has the contents of {tmp_path}/d/train.jsonl, a file of data.train[1]" in text
    assert "data.eval[0] is also trained on" in warned({"path": str(tmp_path / "packed.jsonl.gz")})
    # A split of the same directory, which a comparison of recipe lines would have to be told of.
    assert "also trained on" not in warned({"path": str(tmp_path / "d"), "split": "test"})
    assert "also trained on" in warned({"path": str(tmp_path / "d"), "split": "train"})
    assert other.stat().st_size == copy.stat().st_size
    assert "also trained on" not in warned({"path": str(other)})


def test_the_same_split_of_the_hub_is_the_same_contents(
    tmp_path: Path, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    splits = {"train": [{"text": "one two three"}], "test": [{"text": "four five six"}]}
    monkeypatch.setattr(datasets, "load_dataset", lambda _, split, **__: datasets.Dataset.from_list(splits[split]))

    def warned(split: str | None) -> bool:
        caplog.clear()
        evaluation = {"path": "org/name", "split": split}
        section = DataSection.model_validate({"train": "org/name", "eval": evaluation, "sequence_length": 32})
        prepare(section, "eval", str(tokenizer_dir), tmp_path / "cache")
        return "data.eval[0] is also trained on" in caplog.text

    assert warned("train") and warned(None) and not warned("test")
