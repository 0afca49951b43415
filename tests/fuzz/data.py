"""Data files of every kind and format, and conversations."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from unittest import mock

from hypothesis import strategies as st

from raymem.recipe.data import DataSection
from raymem.training.data import tokenizer as tokenizers
from raymem.training.data.encode import Encoder
from raymem.training.data.formats import Format, to_example
from raymem.training.data.packed import shards
from tests.fuzz.cases import DEEP, ODD, VALUES, Target
from tests.helpers.templates import SHAPES, TOOL, tokenizer_for

_FORMATS = get_args(Format)
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_TEXT = st.text(max_size=30) | ODD
_ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation"])
_CALL = st.fixed_dictionaries(
    {}, optional={"function": st.fixed_dictionaries({}, optional={"name": _TEXT, "arguments": VALUES}), "type": VALUES}
)
_TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": _ROLES | VALUES,
        "content": _TEXT | VALUES,
        "from": _ROLES | VALUES,
        "value": _TEXT | VALUES,
        "tool_calls": st.lists(_CALL | VALUES, max_size=2) | VALUES,
        "function_call": _CALL | VALUES,
        "reasoning_content": VALUES,
        "weight": VALUES,
    },
)
_PLAIN_TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": _TEXT},
    optional={"tool_calls": st.lists(_CALL, max_size=2), "reasoning_content": _TEXT, "train": st.booleans()},
)
_TALK = st.lists(st.sampled_from(["user", "assistant", "tool"]), max_size=5).flatmap(
    lambda roles: st.tuples(
        *(
            st.builds(lambda turn, role: {**turn, "role": role}, _PLAIN_TURN, st.just(role))
            for role in ["user", *roles, "assistant"]
        )
    ).map(list)
)
_TURNS = _TALK | _TALK | st.lists(_PLAIN_TURN, max_size=5) | st.lists(_TURN | VALUES, max_size=4)
_IDS = st.lists(st.integers(-200, 700), max_size=9)
_COLUMNS: dict[str, st.SearchStrategy[Any]] = {
    "text": _TEXT,
    "id": VALUES,
    "prompt": _TEXT | _TURNS,
    "completion": _TEXT | _TURNS,
    "messages": _TURNS,
    "conversations": _TURNS,
    "instruction": _TEXT,
    "input": _TEXT,
    "output": _TEXT,
    "history": st.lists(st.lists(_TEXT, max_size=2), max_size=2) | _TEXT,
    "system": _TEXT,
    "tools": st.lists(st.just(TOOL) | VALUES, max_size=2) | _TEXT | st.sampled_from(DEEP),
    "input_ids": _IDS,
    "labels": _IDS,
    "attention_mask": st.lists(st.integers(0, 1), max_size=9),
}
ROWS = st.fixed_dictionaries({}, optional={name: column | column | VALUES for name, column in _COLUMNS.items()})
_OF_FORMAT = st.sampled_from(
    [("text",), ("prompt", "completion"), ("messages",), ("conversations",), ("instruction", "output"), ("input_ids",)]
).flatmap(
    lambda names: st.fixed_dictionaries(
        {name: _COLUMNS[name] for name in names},
        optional={name: column for name, column in _COLUMNS.items() if name not in names},
    )
)
CHANGES = st.lists(
    st.tuples(st.sampled_from(["cut", "flip", "insert", "repeat"]), st.integers(0, 1 << 16), st.integers(0, 255)),
    max_size=2,
)
_INSERTED = (
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b'"',
    b"\\ud800",
    b"\n",
    b",",
    b"{",
    b"]",
    *(text[:5000].encode() for text in DEEP),
)


def damaged(content: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    """``content`` with bytes that are others, more or fewer."""
    for what, number, value in changes:
        at = number % (len(content) + 1)
        if what == "cut":
            content = content[:at]
        elif what == "flip":
            content = content[:at] + bytes([value]) + content[at + 1 :]
        elif what == "insert":
            content = content[:at] + _INSERTED[value % len(_INSERTED)] + content[at:]
        else:
            content = content[:at] + content[at // 2 :]
    return content


def _as_file(rows: list[Any], suffix: str, encoding: str) -> bytes:
    if suffix in (".jsonl", ".json"):
        lines = [json.dumps(row, ensure_ascii=encoding == "ascii") for row in rows]
        text = "\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]"
    elif suffix == ".csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        cells = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
        text = "\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in cells)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pa.Table.from_pylist(rows)
        except Exception:  # Arrow cannot hold these rows: then their JSON text
            table = pa.table({"text": [json.dumps(row) for row in rows]})
        out = io.BytesIO()
        with contextlib.suppress(pa.ArrowException):
            pq.write_table(table, out, row_group_size=2)
        return out.getvalue()
    return text.encode(
        "utf-8" if encoding == "ascii" else encoding, "replace" if encoding == "latin-1" else "surrogatepass"
    )


@st.composite
def _files(draw: st.DrawFn) -> dict[str, Any]:
    rows = draw(
        _OF_FORMAT.flatmap(lambda row: st.lists(st.just(row), min_size=1, max_size=3))
        | st.lists(_OF_FORMAT | ROWS, max_size=4)
    )
    suffix = draw(st.sampled_from(_SUFFIXES))
    encoding = draw(st.sampled_from(["utf-8", *["ascii"] * 8, "utf-8-sig", "utf-16", "utf-16-le", "latin-1"]))
    content = damaged(_as_file(rows, suffix, encoding), draw(st.just([]) | st.just([]) | CHANGES))
    packed = draw(st.sampled_from(["", "", "", ".gz", ".zst"])) if suffix != ".parquet" else ""
    return {
        "name": f"x{suffix}{packed}",
        "content": content,
        "damage": draw(CHANGES) if packed else [],
        "format": draw(st.sampled_from(["auto"] * 12 + list(_FORMATS))),
        "columns": draw(
            st.just({})
            | st.just({})
            | st.dictionaries(st.sampled_from(sorted(_COLUMNS)), st.sampled_from(sorted(_COLUMNS)) | ODD, max_size=1)
        ),
        "packing": draw(st.sampled_from(["bfd", "none", "wrapped"])),
    }


@functools.cache
def _tokenizer() -> str:
    folder = tempfile.mkdtemp(prefix="raymem-fuzz-")
    tokenizer = tokenizer_for(SHAPES["chatml"].template, "<|im_end|>")
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def _loaded_once() -> Iterator[None]:
    """Load the tokenizer once per process; it takes longer than everything else."""
    with (
        mock.patch.object(shards, "load_tokenizer", _load),
        mock.patch.object(shards, "tokenizer_key", _key),
        mock.patch.object(shards, "cached_tokenizer", lambda path, key: _load(path)),
    ):
        yield


_load = functools.cache(tokenizers.load_tokenizer)
_key = functools.cache(lambda tokenizer: tokenizers.tokenizer_key(tokenizer))


def _prepared(case: dict[str, Any]) -> Any:
    import pyarrow as pa

    content, name = case["content"], case["name"]
    if name.endswith(".gz"):
        content = damaged(gzip.compress(content, 1), case["damage"])
    elif name.endswith(".zst"):
        content = damaged(pa.compress(content, "zstd", asbytes=True), case["damage"])
    folder = Path(tempfile.mkdtemp(prefix="raymem-fuzz-"))
    try:
        (folder / name).write_bytes(content)
        source = {"path": str(folder / name), "format": case["format"], "columns": case["columns"]}
        section = DataSection.model_validate({"train": source, "sequence_length": 64, "packing": case["packing"]})
        with _loaded_once():
            return shards.prepare(section, "train", _tokenizer(), folder / "cache")
    finally:
        shutil.rmtree(folder)


@functools.cache
def _encoder(shape: str) -> Encoder:
    from raymem.training.data.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer_for(SHAPES[shape].template, SHAPES[shape].eos).save_pretrained(folder)
        return Encoder(load_tokenizer(folder), shape)


def _encoded(case: tuple[str, dict[str, Any]]) -> Any:
    shape, row = case
    encoder = _encoder(shape)
    example = to_example(row, "messages", {}, "x.jsonl:1", calls=encoder.in_template("tool_calls"))
    return encoder.encode([example], ["x.jsonl:1"])


_TALKS = st.fixed_dictionaries(
    {"messages": _TURNS}, optional={"system": _TEXT | VALUES, "tools": _COLUMNS["tools"] | VALUES}
)
TARGETS = {
    "data files": Target(_files(), _prepared),
    "conversations": Target(st.tuples(st.sampled_from(sorted(SHAPES)), _TALKS), _encoded),
}
