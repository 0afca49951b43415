"""Models that bring code of their own: raymem never runs it, and says so instead of asking.

Every call of transformers that can load code from a model directory is given ``trust_remote_code=False``. Without a
word about it transformers asks on the terminal, and an answer of ``y`` (or of whatever feeds the standard input) runs
the code. An architecture that transformers has itself is built from its class there, whatever ``auto_map`` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from raymem.errors import ModelError


@contextmanager
def built_in_only(path: object, *, key: str = "model.name", files: str = "config.json") -> Iterator[None]:
    """Turn the refusal of transformers to run a model's own code in the block into an error for the user.

    Args:
        path: the directory or Hugging Face id that is loaded.
        key: of the recipe, which says where to give another one.
        files: that may name the code.

    Raises:
        ModelError: the model cannot be loaded without code of its own.
    """
    try:
        yield
    except ValueError as error:
        # No type of its own tells this refusal apart; the option's name is in all of its wordings.
        if "trust_remote_code" not in str(error):
            raise
        raise ModelError(
            f"{key}: {path} brings code of its own (auto_map in {files}), which raymem does not run; use a model whose "
            "architecture is part of transformers, or remove auto_map if the architecture is"
        ) from None
