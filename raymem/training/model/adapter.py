"""Attaches a recipe's adapter, and finds the kind that continues a saved one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raymem.errors import ModelError
from raymem.kinds import AdapterKind, AttachContext
from raymem.methods.peft.kind import merged_instead, read_config
from raymem.recipe.axes import ADAPTERS, BASES
from raymem.recipe.schema import Recipe
from raymem.training.model.base_name import base_name


def attach(model: Any, recipe: Recipe, dtype: torch.dtype) -> Any:
    """Attach the recipe's adapter to a model (usually on the meta device); the rest is frozen.

    Args:
        dtype: of the adapter's weights.

    Raises:
        RecipeError: a target pattern that matches nothing, or an option that a layer cannot have.
    """
    planned = BASES.of(recipe).is_planned(recipe.base)
    name, revision = (None, None) if planned else base_name(recipe)
    return ADAPTERS.of(recipe).attach(model, recipe.adapter, AttachContext(dtype, name, revision))


def _kind_of(config: dict[str, Any], directory: str) -> AdapterKind[Any]:
    for kind in ADAPTERS.kinds():
        if kind.continues(config):
            return kind
    raise ModelError(
        f"adapter.init_from: {Path(directory) / 'adapter_config.json'} is a {_type(config)} adapter; only those of "
        f"adapter.kind {', '.join(kind.name for kind in ADAPTERS.kinds() if not kind.trains_base)} are continued; "
        + merged_instead(directory)
    )


def _type(config: dict[str, Any]) -> str:
    return str(config.get("peft_type") or config.get("raymem_kind"))


def is_peft(directory: str | Path) -> bool:
    """Say whether a directory holds an adapter of PEFT, rather than a whole model or an adapter in another form."""
    path = Path(directory) / "adapter_config.json"
    return path.is_file() and "raymem_kind" not in read_config(directory)


def continuing(directory: str | Path) -> Any:
    """Return the recipe's adapter section that continues the adapter in a PEFT directory.

    Raises:
        ModelError: there is none, or it is of a kind that nobody continues.
    """
    config = read_config(directory)
    return _kind_of(config, str(directory)).continuing(config, str(directory))


def read_adapter(directory: str, model: Any, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Read a saved adapter under the names of a wrapped model whose base is filled. Collective if it is sharded.

    Raises:
        ModelError: no such directory, or an adapter of other targets, another kind, rank, alpha or variant.
    """
    config, ours = read_config(directory), ADAPTERS.of(recipe)
    if not ours.continues(config):
        raise ModelError(
            f"adapter.init_from: {directory} is a {_type(config)} adapter; set adapter.kind: "
            f"{_kind_of(config, directory).name}"
        )
    return ours.read(directory, model)
