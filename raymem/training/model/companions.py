"""Copies the files that go with the weights of a model: those for generation, chat rendering and processing.

Weights, the config and the tokenizer are written by those who changed them; this copies the rest, byte for byte.
"""

from __future__ import annotations

import fnmatch
import logging
import shutil
from pathlib import Path

from raymem.storage.inside import leads_out

log = logging.getLogger(__name__)

GENERATION = "generation_config.json"
"""A file that transformers writes too, but from the config alone: without further eos ids and sampling options."""
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
"""Names of files that may be companions."""
_NEVER = (
    "config.json",
    "*.index.json",
    "adapter_config.json",
    "raymem*.json",
    "loram_*.json",
    "trainer_state.json",
    "all_results.json",
    "*_results.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "requirements*.txt",
    ".*",
)
_OF_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
)
_TEMPLATES = "additional_chat_templates"
_MOST_BYTES = 16 << 20
_MOST_LICENCE_BYTES = 1 << 20


def copy_companions(base: Path, target: Path, *, same_tokenizer: bool) -> None:
    """Copy the companion files of a model directory to another that is written already; existing files stay.

    Only the generation config is replaced by the base's, even where transformers has written its own.

    Args:
        base: where the weights came from.
        target: where the changed ones lie.
        same_tokenizer: the tokenizer in ``target`` is that of ``base``, so that its further files belong there too.
    """
    candidates = [*base.iterdir(), *((base / _TEMPLATES).glob("*.jinja"))]
    for path in sorted(candidates):
        name = path.name
        if not path.is_file() or not _matches(name, COMPANIONS) or _matches(name, _NEVER):
            continue
        if leads_out(path, base):
            log.warning("%s is a link to a file outside of the model and is not copied", path)
            continue
        licence = _matches(name, ("LICENSE*", "NOTICE*"))
        if path.stat().st_size > (_MOST_LICENCE_BYTES if licence else _MOST_BYTES):
            continue
        if not same_tokenizer and _matches(name, _OF_TOKENIZER):
            continue
        copy = target / path.relative_to(base)
        if copy.exists() and name != GENERATION:
            continue
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
