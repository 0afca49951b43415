"""Attaches a recipe's adapter, and finds the kind that continues a saved one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from raymem.errors import ModelError, RaymemError
from raymem.kinds import AdapterKind, AttachContext
from raymem.methods.peft.files import adapter_values, load_adapter
from raymem.methods.peft.kind import merged_instead, read_config
from raymem.methods.probe import first_line
from raymem.recipe.axes import ADAPTERS, BASES
from raymem.recipe.axis_field import adapter_of
from raymem.recipe.schema import Recipe
from raymem.storage.checksums import check_files
from raymem.training.dist_env import DistEnv
from raymem.training.model import experts, weights
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


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer by its name, each once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def fill(model: nn.Module, added: Sequence[str], recipe: Recipe, dist_env: DistEnv) -> None:
    """Give what an adapter has added to its base its start, or the values of ``adapter.init_from``.

    Args:
        added: names of its parameters, trained or not, and of its buffers.
    """
    kind = ADAPTERS.of(recipe)
    if kind.trains_base:
        return
    source = kind.source(recipe.adapter)
    given = {} if source is None else read_adapter(source, model, recipe)
    tensors, places = tensors_of(model), weights.slots(model)
    for name in added:
        tensor = tensors[name]
        full = given.get(name)
        if full is None:
            full = kind.initial_value(name, tensor.shape, recipe.seed)
        if isinstance(tensor, nn.Parameter):
            weights.put(*places[name], lambda rows, full=full: full if rows is None else full[rows], dist_env, name)  # type: ignore[misc]
        else:
            tensor.copy_(full)


def lay(base_model: Any, directory: Path, *, in_base_dtype: bool = True) -> tuple[Any, dict[str, torch.Tensor]]:
    """Put the adapter of a PEFT directory on a model on the meta device, where it can be sharded with its base.

    Args:
        in_base_dtype: see :func:`raymem.methods.peft.files.load_adapter`.

    Returns:
        The wrapped model, still without values, and those of the adapter, whole: name in that model -> tensor.

    Raises:
        ModelError: as :func:`load_adapter`, or an adapter that needs the whole base to be put on it.
    """
    of_base = {id(tensor) for tensor in tensors_of(base_model).values()}
    for kind in ADAPTERS.kinds():
        kind.register()
    cure = f"use one worker, or merge it into its base (raymem merge {directory} -o MERGED) and use MERGED"
    with experts.shown_to_peft(base_model):
        try:
            model = load_adapter(base_model, directory, "cpu", in_base_dtype=in_base_dtype)
        except ModelError as error:  # such as of PiSSA, which changes the base's values
            raise ModelError(f"{error}. Workers that share a base have no values yet at that point: {cure}") from None
        values = adapter_values(model, directory)
    for name, tensor in tensors_of(model).items():
        if id(tensor) not in of_base and name not in values:
            raise ModelError(
                f"{directory}: {name} is not in its file but made when a {_type(read_config(directory))} adapter is "
                f"put on its whole base, which no worker has that shares it: {cure}"
            )
    return model, values


@torch.no_grad()
def fill_laid(
    model: nn.Module, values: Mapping[str, torch.Tensor], dist_env: DistEnv, *, any_base: bool = False
) -> None:
    """Copy this rank's share of an adapter's values into a model whose base is filled. Collective.

    Args:
        any_base: also on another base than the adapter was made for.

    Raises:
        ModelError, AdapterError: the adapter was made for another base, or a tensor has another shape.
    """
    places = weights.slots(model)
    for name, value in values.items():
        weights.put(*places[name], lambda rows, value=value: value if rows is None else value[rows], dist_env, name)  # type: ignore[misc]
    for kind in ADAPTERS.kinds() if not any_base else ():
        kind.check_base(model)


def _kind_of(config: dict[str, Any], directory: str) -> AdapterKind[Any]:
    if (own := config.get("raymem_kind")) is not None:
        if own not in ADAPTERS:
            raise ModelError(
                f"adapter.init_from: {directory} is an adapter of kind {own}, which is not known here; install the "
                "package that brings it, or register it"
            )
        return ADAPTERS[own]
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
    """Say whether a directory holds an adapter of PEFT, not a whole model or an adapter of a kind of its own."""
    return (Path(directory) / "adapter_config.json").is_file() and not is_of_own_kind(directory)


def is_of_own_kind(directory: str | Path) -> bool:
    """Say whether a directory holds an adapter whose kind has a file format of its own."""
    return (Path(directory) / "adapter_config.json").is_file() and "raymem_kind" in read_config(directory)


def continuing(directory: str | Path) -> Any:
    """Return the recipe's adapter section that continues the adapter in a PEFT directory.

    Raises:
        ModelError: there is none, or it is of a kind that nobody continues.
    """
    check_files(directory, ModelError, weights=False)
    config = read_config(directory)
    kind = _kind_of(config, str(directory))
    try:
        options = kind.continuing(config, str(directory))
        # A kind takes values as they stand there; they are checked as those of a recipe are.
        fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        section: type = type(options)
        return adapter_of(section).validate_python(fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, RaymemError):
            raise
        raise ModelError(
            f"adapter.init_from: {Path(directory) / 'adapter_config.json'} is no config of a {kind.name} adapter "
            f"({_first_problem(error)}); take a whole copy of the adapter"
        ) from None


def _first_problem(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return f"it has no {error.args[0]}" if isinstance(error, KeyError) and error.args else first_line(error)


def read_adapter(directory: str, model: Any, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Read a saved adapter under the names of a wrapped model whose base is filled. Collective if it is sharded.

    Raises:
        ModelError: no such directory, or an adapter of other targets, another kind, rank, alpha or variant.
    """
    check_files(directory, ModelError)
    config, ours = read_config(directory), ADAPTERS.of(recipe)
    if not ours.continues(config):
        raise ModelError(
            f"adapter.init_from: {directory} is a {_type(config)} adapter; set adapter.kind: "
            f"{_kind_of(config, directory).name}"
        )
    return ours.read(directory, model)
