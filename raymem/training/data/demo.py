"""Makes data for a first run without a network: Python's own standard library, and a tokenizer trained on it.

The running interpreter brings some ten megabytes of documented code. ``functions`` are completions (signature and
docstring -> body), ``text`` is plain text for pre-training (module docstrings and pieces of code). Both are split by
module, so that no part of an evaluated module was trained on, and duplicates are kept once. The same interpreter always
gives the same bytes.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import json
import sysconfig
import textwrap
import tokenize
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from raymem.cache import publish_entry
from raymem.storage.publish import digest

CORPORA = ("functions", "text")
SPLITS = ("train", "eval")
VOCABULARY = 4096
END, PAD = "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

_SCHEMA_VERSION = 1
_EVAL_PERCENT = 12  # of the modules, which hold about 8 % of the text
# Tests and bundled tools are not the library; encodings and pydoc_data are tables.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data"} | {
    "site-packages",
    "dist-packages",
    "lib-dynload",
}
_CHUNK_CHARS = 1500
_LONGEST_BODY_CHARS = 4000

Example = dict[str, str]


@dataclass(frozen=True)
class DemoPaths:
    """The directory of the demo data."""

    directory: Path

    @property
    def tokenizer(self) -> Path:
        """The directory that transformers loads as a fast tokenizer."""
        return self.directory / "tokenizer"

    def corpus(self, name: str, split: str) -> Path:
        """Return the JSON lines file of ``functions`` or ``text``, split ``train`` or ``eval``."""
        assert name in CORPORA and split in SPLITS
        return self.directory / f"{name}-{split}.jsonl"


def ensure_demo(cache_dir: Path) -> DemoPaths:
    """Return corpus and tokenizer under ``<cache_dir>/demo/<key>/``; builds them if missing (seconds).

    Any number of processes may ask at once.

    Raises:
        StorageError: ``cache_dir`` cannot be written.
    """
    key = digest([_SCHEMA_VERSION, _library_digest(), version("tokenizers"), version("transformers")])
    paths = DemoPaths(cache_dir / "demo" / key)
    publish_entry(paths.directory, _build)
    return paths


@functools.cache
def _library_digest() -> str:
    """Digest the standard library's source; that takes half a second, and a sweep asks for it in every trial."""
    content = hashlib.sha256()
    for module, source in _modules():
        content.update(f"{module}\0{len(source)}\0".encode())
        content.update(source)
    return content.hexdigest()


def _build(directory: Path) -> dict[str, Any]:
    paths = DemoPaths(directory)
    facts: dict[str, Any] = dict(build_corpus(directory))
    train_tokenizer((paths.corpus(name, "train") for name in CORPORA), paths.tokenizer)
    return facts


def build_corpus(directory: Path) -> dict[str, int]:
    """Write ``functions-{train,eval}.jsonl`` ({prompt, completion}) and ``text-{train,eval}.jsonl`` ({text}).

    Returns:
        examples per file name.
    """
    rows: dict[Path, list[str]] = {DemoPaths(directory).corpus(c, s): [] for c in CORPORA for s in SPLITS}
    seen: set[str] = set()
    for module, source in _modules():
        text = io.TextIOWrapper(io.BytesIO(source), encoding=_encoding(source)).read()
        tree = ast.parse(text)
        lines = _lines(text)
        for corpus, examples in (("functions", _functions(tree, lines)), ("text", _texts(tree, lines))):
            file = DemoPaths(directory).corpus(corpus, split_of(module))
            for example in examples:
                row = json.dumps(example) + "\n"
                if row not in seen:
                    seen.add(row)
                    rows[file].append(row)
    for file, content in rows.items():
        file.write_text("".join(content), encoding="ascii")
    return {file.name: len(content) for file, content in rows.items()}


def split_of(module: str) -> str:
    """Return ``eval`` for about one module in eight, by a hash of the dotted name."""
    return "eval" if int(hashlib.sha256(module.encode()).hexdigest(), 16) % 100 < _EVAL_PERCENT else "train"


def train_tokenizer(files: Iterable[Path], directory: Path) -> None:
    """Train a byte-level BPE tokenizer on JSON lines and save it as a ``PreTrainedTokenizerFast`` directory.

    It has 4096 tokens, the end token ``<|end|>``, ``<|pad|>`` and a chat template of one line per turn.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    roles = [f"<|{role}|>" for role in ("system", "user", "assistant")]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD, *roles],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # A third says enough about which letters go together, and takes a third of the time.
    texts = (
        "".join(json.loads(line).values())
        for file in files
        for line in file.read_text(encoding="ascii").splitlines()[::3]
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(str(directory))


def _modules() -> Iterator[tuple[str, bytes]]:
    """Yield (dotted name, source bytes) of every module of the standard library, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if not _SKIPPED.intersection(relative.parts):
            yield ".".join(relative.with_suffix("").parts), path.read_bytes()


def _encoding(source: bytes) -> str:
    return tokenize.detect_encoding(io.BytesIO(source).readline)[0]


def _lines(text: str) -> list[str]:
    """Split the source into lines as the parser counts them; str.splitlines would also split at form feeds."""
    return list(io.StringIO(text))


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield functions in the order of ``ast.walk``, without the expressions that it visits: no function is in one."""
    waiting = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            waiting.extend(getattr(node, block, ()))


def _functions(tree: ast.Module, lines: list[str]) -> Iterator[Example]:
    for node in _statements(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or ast.get_docstring(node) is None:
            continue
        header_end = node.body[0].end_lineno
        if len(node.body) < 2 or header_end is None or node.body[1].lineno <= header_end:
            continue
        whole = _lines(textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])))
        at = header_end - node.lineno + 1
        prompt, completion = "".join(whole[:at]), "".join(whole[at:]).rstrip() + "\n"
        # A string that reaches to the left margin keeps a method from being unindented.
        if whole[0].startswith(("def ", "async def ")) and len(completion) <= _LONGEST_BODY_CHARS:
            yield {"prompt": prompt, "completion": completion}


def _texts(tree: ast.Module, lines: list[str]) -> Iterator[Example]:
    """Yield the module docstring, then runs of whole top-level statements of about ``_CHUNK_CHARS`` characters."""
    docstring = ast.get_docstring(tree)
    statements = tree.body if docstring is None else tree.body[1:]
    if docstring:
        yield {"text": docstring + "\n"}
    begins = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1 for node in statements]
    chunk: list[str] = []
    for begin, end in pairwise([*begins, len(lines)]):
        chunk += lines[begin:end]
        if sum(map(len, chunk)) >= _CHUNK_CHARS:
            yield {"text": "".join(chunk)}
            chunk = []
    if chunk:
        yield {"text": "".join(chunk)}
