"""Guards the settings that must not change while a run goes on, so that its checkpoints keep their meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raymem.errors import CheckpointError
from raymem.recipe.axes import ADAPTERS, BASES
from raymem.recipe.schema import Recipe
from raymem.text import cut
from raymem.training.data.packed.shards import Prepared

IMMUTABLE_KEYS = (
    "seed",
    "model",
    "base",
    "adapter",
    "optimizer.kind",
    "train.global_batch",
    "train.precision",
    "train.master",
    "data.sequence_length",
    "data.packing",
)


def identity_of(recipe: Recipe, train_data: Prepared) -> dict[str, Any]:
    """Return the settings that a checkpoint is tied to; worker count, batch split, schedule and length are free."""
    raw = recipe.to_dict()
    del raw["model"]["attention"]  # another kernel computes the same thing
    del raw["model"]["trust_remote_code"]  # who may run it, rather than what
    for axis in (BASES, ADAPTERS):
        for option in axis.of(recipe).exact:
            del raw[axis.name][option]
    settings = {path: _lookup(raw, path.split(".")) for path in IMMUTABLE_KEYS}
    settings["data.train"] = [[source.directory.name, source.weight] for source in train_data.sources]
    return settings


def check_identity(
    saved: dict[str, Any], current: dict[str, Any], where: str, train_data: Prepared | None = None
) -> None:
    """Refuse to continue a run whose recipe changed in a setting that must stay.

    Args:
        train_data: what ``current`` was made of; with it an error can say that only the chat template is new.

    Raises:
        CheckpointError: names the first setting that differs, both values and the cure.
    """
    for path, value in current.items():
        if (difference := _difference(path, saved.get(path), value)) is not None:
            if path == "data.train" and train_data is not None and _without_template(train_data) == saved.get(path):
                texts = ", ".join(source.where for source in train_data.sources if source.untemplated is not None)
                raise CheckpointError(
                    f"{where}: this run was started on prompts and completions as they are, but now the chat template "
                    f"renders them: set template: none for {texts} to go on, choose another name, or start over with "
                    "--fresh"
                )
            setting, before, now = difference
            raise CheckpointError(
                f"{where}: this run was started with {setting}={cut(str(before), 120)} but the recipe now says "
                f"{cut(str(now), 120)}; "
                "restore it, choose another name, or start over with --fresh"
            )


def _without_template(train_data: Prepared) -> list[list[Any]]:
    """Return what ``data.train`` in the identity would be with ``template: none`` for every source."""
    return [[source.untemplated or source.directory.name, source.weight] for source in train_data.sources]


def _difference(path: str, before: Any, now: Any) -> tuple[str, Any, Any] | None:
    """Return path and values of the first setting that differs; of two kinds of one axis, the kind."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}, key=lambda key: (key != "kind", key)):
            if (difference := _difference(f"{path}.{key}", before.get(key), now.get(key))) is not None:
                return difference
        return None
    return None if before == now else (path, before, now)


def _lookup(raw: Any, parts: Sequence[str]) -> Any:
    for part in parts:
        raw = raw[part]
    return raw
