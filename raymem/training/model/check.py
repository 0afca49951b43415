"""Refusing a model before anything is loaded or started: by its config, and by the headers of its weights."""

from __future__ import annotations

from pathlib import Path

from raymem.recipe.axes import BASES
from raymem.recipe.schema import Recipe
from raymem.training.model import build, packing, weights
from raymem.training.model.base_name import base_name


def check_model(recipe: Recipe) -> str:
    """Refuse what loading would refuse of the recipe's model: its config, and the tensors of one that lies here.

    Returns:
        What it is, in a few words.

    Raises:
        ModelError, RecipeError: see :func:`build_model`.
    """
    config = build.load_config(recipe)
    planned = BASES.of(recipe).is_planned(recipe.base)
    name = recipe.model.name if planned else base_name(recipe)[0]
    base_model = build.on_meta(config, recipe)
    packing.refuse_leaks(base_model, recipe)
    kind = f"{name or 'random weights'} ({config.model_type})"
    if name is None or planned or not Path(name).is_dir():
        return kind
    weights.check_checkpoint(base_model, Path(name))
    return f"{kind}, every tensor accounted for"


def check_weights_here(recipe: Recipe) -> None:
    """Refuse what loading would refuse, where the model is a directory with weights; any other one is not looked at.

    Raises:
        ModelError, RecipeError: see :func:`check_model`.
    """
    name = recipe.model.name
    if name is not None and next(Path(name).glob("*.safetensors"), None) is not None:
        check_model(recipe)
