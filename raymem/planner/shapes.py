"""Finds the config of a planned model: in a directory, on the Hub, in its cache, or among the shapes raymem ships.

A plan needs of a model nothing but its config. Those of popular models lie beside this file, for machines that cannot
ask the Hub; training needs the model itself and never looks here. Every config has the values of the published one that
decide what is built; tests hold the number of parameters to the published figure.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
from pathlib import Path
from typing import Any

from raymem.errors import ModelError
from raymem.recipe.axes import BASES
from raymem.recipe.schema import Recipe


@functools.cache
def _shipped() -> dict[str, Any]:
    shapes: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text())
    return shapes


def shipped_models() -> dict[str, dict[str, Any]]:
    """Map the Hugging Face id of every model whose shape is shipped to its config."""
    return {
        model: {**shape["config"], **changes}
        for shape in _shipped()["shapes"]
        for model, changes in shape["models"].items()
    }


def located(recipe: Recipe) -> tuple[Recipe, str | None]:
    """Return the recipe with its model's config at hand, and a sentence if raymem's own shape stands in for it.

    Of a hub id only ``config.json`` is fetched.

    Raises:
        ModelError: the config cannot be had, and no shape of that name is shipped.
    """
    name, revision = recipe.model.name, recipe.model.revision
    base = BASES.of(recipe)
    stands_alone = not base.is_planned(recipe.base) and base.directory(recipe.base) is not None
    if name is None or stands_alone or "://" in name or Path(name).is_dir() or Path(name).is_absolute():
        return recipe, None
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from raymem.training.model.build import not_to_be_had

    try:
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=["config.json"]))
    except HFValidationError as error:
        raise ModelError(not_to_be_had(name, error)) from None
    except (HfHubHTTPError, OSError) as error:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)  # of a download that was not finished
        if not isinstance(cached, str):
            shape = shipped_models().get(name)
            if shape is None or _status(error) == 404:  # the Hub did answer
                raise ModelError(f"{not_to_be_had(name, error)}{_near(name)}") from None
            return _with_model(recipe, name=None, config=shape), (
                f"model.name: {name}: the Hub cannot be asked ({_why(error)}); planned from the shape that raymem "
                f"ships (as of {_shipped()['as_of']})"
            )
        directory = Path(cached).parent
    return _with_model(recipe, name=str(directory)), None


def _with_model(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": None, **changes})})


def circumstances() -> list[Any]:
    """Return the user's settings that decide whether the Hub can be asked."""
    return [os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HOME")] + ["HF_TOKEN" in os.environ]


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _why(error: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if status in (401, 403):
        return f"{status}: it wants HF_TOKEN of an account that may read this model"
    reason = error.__cause__ if status is None and error.__cause__ is not None else error
    return (str(reason).strip().splitlines() or [type(reason).__name__])[0]


def _near(name: str) -> str:
    near = difflib.get_close_matches(name, shipped_models(), n=3, cutoff=0.75)
    return f"; without the Hub raymem can plan {', '.join(near)}" if near else ""
