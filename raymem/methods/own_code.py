"""Models that bring code of their own: raymem runs it only where a recipe says so, and never asks.

Every call of transformers that can load code from a model directory is given ``trust_remote_code=False``. Without a
word about it transformers asks on the terminal, and an answer of ``y`` (or of whatever feeds the standard input) runs
the code. An architecture that transformers has itself is built from its class there, whatever ``auto_map`` says. The
recipe key ``model.trust_remote_code`` counts for the config and the model that are trained, by :func:`as_recipe_says`
alone: code of tokenizers is never run, nor is any where no recipe is at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from raymem.errors import ModelError


@contextmanager
def built_in_only(
    path: object, *, key: str = "model.name", files: str = "config.json", cure: str = ""
) -> Iterator[None]:
    """Turn the refusal of transformers to run a model's own code in the block into an error for the user.

    Args:
        path: the directory or Hugging Face id that is loaded.
        key: of the recipe, which says where to give another one.
        files: that may name the code.
        cure: a further one.

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
            f"architecture is part of transformers, or remove auto_map if the architecture is{cure}"
        ) from None


def as_recipe_says(call: Callable[..., Any], *arguments: Any, trusted: bool, path: object, **options: Any) -> Any:
    """Return what a ``from_pretrained`` or ``from_config`` of transformers gives for the model of a recipe.

    Args:
        trusted: ``model.trust_remote_code`` of the recipe.
        path: the directory or Hugging Face id that is loaded.

    Raises:
        ModelError: the model cannot be loaded without code of its own, and that is not trusted.
    """
    with built_in_only(path, cure="; if you have read the code and trust it, set model.trust_remote_code: true"):
        return call(*arguments, trust_remote_code=trusted, **options)
