"""Loads a tokenizer, and computes the hash that says whether two tokenizers encode alike."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from raymem.errors import ModelError
from raymem.methods.own_code import built_in_only
from raymem.storage.json_files import read_object
from raymem.storage.publish import digest
from raymem.text import shown

_GENERATION_CONFIG = "generation_config.json"
_ORIGIN = "origin.txt"


def load_tokenizer(path: str) -> Any:
    """Load the fast tokenizer of a local directory or Hugging Face id.

    Its attribute ``stop_ids`` has what stops generation by the ``generation_config.json`` beside it, other than its own
    end token; ``origin`` has the path that a person gave it under.

    Raises:
        ModelError: it cannot be loaded, or has no ``tokenizer.json`` form.
    """
    from transformers import AutoTokenizer

    try:
        with built_in_only(path, key="model.tokenizer", files="tokenizer_config.json or config.json"):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # the library raises many types here
        reason = str(error).strip().splitlines() or [""]
        raise ModelError(
            f"tokenizer {path} cannot be loaded ({type(error).__name__}: {reason[0]}): set model.tokenizer to a "
            f"directory with tokenizer.json and tokenizer_config.json, a Hugging Face id, or demo."
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(f"tokenizer {path} has no fast form: convert it to a tokenizer.json and set model.tokenizer.")
    # A tokenizer.json may have been saved with these on; lengths are ours to decide.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.stop_ids = [
        token for token in _stop_ids(path) if token < len(tokenizer) and token != tokenizer.eos_token_id
    ]
    origin = Path(path) / _ORIGIN
    tokenizer.origin = origin.read_text(encoding="utf-8") if origin.is_file() else path
    return tokenizer


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write the files that :func:`load_tokenizer` reads, ``stop_ids`` included."""
    tokenizer.save_pretrained(directory)
    (directory / _ORIGIN).write_text(tokenizer.origin, encoding="utf-8")
    if tokenizer.stop_ids:
        content = json.dumps({"eos_token_id": tokenizer.stop_ids})
        (directory / _GENERATION_CONFIG).write_text(content, encoding="ascii")


def _stop_ids(path: str) -> list[int]:
    """Return the end tokens of a tokenizer's ``generation_config.json``; none without one.

    Raises:
        ModelError: the file is malformed.
    """
    from transformers.utils import cached_file

    try:
        file = Path(str(cached_file(path, _GENERATION_CONFIG)))
    except (OSError, ValueError):  # there is none
        return []
    cure = "take a whole copy of it, or remove it"
    ids = read_object(file, ModelError, cure, {"eos_token_id": (int, list, type(None))}).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    if any(type(token) not in (int, type(None)) for token in ids):
        raise ModelError(f"{file}: eos_token_id {shown(ids)} are no ids of tokens; {cure}")
    return [token for token in ids if token is not None and token >= 0]


def tokenizer_key(tokenizer: Any) -> str:
    """Hash everything that decides the ids of a text or conversation: vocabulary, special tokens, chat template."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest([json.loads(tokenizer.backend_tokenizer.to_str()), special, tokenizer.chat_template])


@lru_cache(maxsize=2)
def cached_tokenizer(path: str, key: str) -> Any:
    """Return the tokenizer at ``path``, loaded once per process.

    Raises:
        ModelError: it is not the one that ``key`` was made of.
    """
    tokenizer = load_tokenizer(path)
    if (own_key := tokenizer_key(tokenizer)) != key:
        raise ModelError(f"tokenizer {path} differs between processes ({own_key}, not {key}): give all the same files.")
    return tokenizer
