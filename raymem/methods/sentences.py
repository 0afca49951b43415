"""Turns errors of transformers and PEFT into sentences, at the few places where a user's values reach them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from raymem.errors import ModelError, RaymemError
from raymem.methods.probe import first_line


@contextmanager
def as_sentence(kind: type[RaymemError], where: str, cure: str) -> Iterator[None]:
    """Turn whatever a library raises in the block into an error for the user, with the library's words.

    Args:
        kind: of the error.
        where: the place of the recipe and what was tried.
        cure: what works instead.
    """
    try:
        yield
    except RaymemError:
        raise
    except Exception as error:  # model code may raise anything
        raise kind(f"{where}: {type(error).__name__}: {first_line(error)}; {cure}") from error


@contextmanager
def first_step(model: object, *, is_first: bool) -> Iterator[None]:
    """Turn an error of a model's code in the first step of a session into a sentence.

    Among several workers a RuntimeError may tell of another one that died; then it stays what it is, for a restart.
    """
    if not is_first:
        yield
        return
    try:
        with as_sentence(
            ModelError,
            f"model: the first step of {type(model).__name__} failed",
            "try model.attention: eager, other adapter.targets or another model",
        ):
            yield
    except ModelError as error:
        cause = error.__cause__
        if isinstance(cause, RuntimeError) and dist.is_initialized() and dist.get_world_size() > 1:
            raise cause from None
        raise
