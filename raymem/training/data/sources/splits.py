"""Chooses the files of a directory that make a split by their names, as the Hugging Face hub does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from raymem.errors import DataError
from raymem.recipe.paths import COMPRESSIONS, DATA_SUFFIXES, TEXT_SUFFIX

_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD = {word: split for split, words in _ALIASES.items() for word in words}
_SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}(?!\d)")
_BESIDE_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that the library ``datasets`` writes beside data files."""

_TEXTS = tuple(TEXT_SUFFIX + packed for packed in ("", *COMPRESSIONS))

Entries = Callable[[str], Iterable[tuple[str, bool]]]
"""Lists (name, is a folder) of the entries in a relative folder; "" is the directory itself."""


def data_files(entries: Entries) -> list[str]:
    """List the relative names, sorted, of the data files of a directory.

    They lie directly in it or in its ``data/``, or anywhere in a folder there that is named after a split. Plain text
    files are data where there are no others: beside these they are notes and licences.
    """
    names: list[str] = []

    def visit(folder: str, *, in_split: bool) -> None:
        for name, is_folder in sorted(entries(folder)):
            path = f"{folder}/{name}" if folder else name
            if name.startswith("."):
                continue
            if not is_folder:
                if name.endswith(DATA_SUFFIXES) and name not in _BESIDE_DATA:
                    names.append(path)
            elif in_split or _words(name):
                visit(path, in_split=True)
            elif path == "data":
                visit(path, in_split=False)

    visit("", in_split=False)
    return sorted([name for name in names if not name.endswith(_TEXTS)] or names)


def split_of(name: str) -> str | None:
    """Return the word by which a file's relative name says its split; None where it says none, or several.

    ``train_sft-00000-of-00002.parquet`` says train_sft; else a folder says it (``test/a.csv``), else the file does
    (``my-dev.jsonl``).
    """
    *folders, file = name.split("/")
    if shard := _SHARD.match(file):
        return shard["split"]
    for part in (*reversed(folders), file):
        if words := _words(part):
            return words.pop() if len(words) == 1 else None
    return None


def choose(names: Sequence[str], split: str | None, where: str, directory: str) -> list[str]:
    """Choose the files of a directory that make ``split``; None stands for ``train`` where there are several splits.

    Args:
        where: where the recipe names the directory.
        directory: its own name, which may be that of a split.

    Raises:
        DataError: there is no such split, or the files do not say.
    """
    words = {name: split_of(name) for name in names}
    said = sorted({word for word in words.values() if word is not None})
    silent = [name for name, word in words.items() if word is None]
    if not said:
        if split is None or _canonical(split) == "train" or _canonical(split) in map(_canonical, _words(directory)):
            return list(names)
        raise DataError(
            f"{where}.split={split!r}: its files do not say of which split they are ({_listed(names)}): name them for "
            f"it (test.jsonl, test-00000-of-00001.parquet, test/...), or give the path of the right file and leave "
            f"split out."
        )
    if split is None and len({_canonical(word) for word in said}) == 1:
        return list(names)
    if silent:
        raise DataError(
            f"{where} holds files of the splits {', '.join(said)}, but {_listed(silent)} does not say of which it is: "
            f"rename it (train-more.jsonl), or give the paths of the files themselves."
        )
    asked = "train" if split is None else split
    of_split = [name for name in names if _canonical(str(words[name])) == _canonical(asked)]
    exact = [name for name in names if words[name] == asked] if split is not None else []
    if not of_split:
        which = "and none that says train" if split is None else f"not {split!r}"
        raise DataError(f"{where} holds files of the splits {', '.join(said)}, {which}: set its split to one of them.")
    if not exact and split is not None and len(several := sorted({str(words[name]) for name in of_split})) > 1:
        raise DataError(f"{where}.split={split!r} may mean {' or '.join(several)} there: set split to one of them.")
    return exact or of_split


def check_single(name: str, split: str | None, where: str) -> None:
    """Refuse the split of a single file that is not the one that its name says.

    Raises:
        DataError: it says another, or none.
    """
    word = split_of(name)
    if split is None or _canonical(split) == ("train" if word is None else _canonical(word)):
        return
    says = "a single file, which has no splits" if word is None else f"a file of split {word!r} by its name"
    raise DataError(f"{where}.split={split!r}, but the path is {says}: leave split out, or give a directory.")


def _canonical(split: str) -> str:
    return _SPLIT_OF_WORD.get(split, split)


def _words(part: str) -> set[str]:
    """Find names of splits in a part of a path, set off as the Hugging Face hub wants it."""
    return {word for word in re.split(r"[-._ 0-9]+", part.lower()) if word in _SPLIT_OF_WORD}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
