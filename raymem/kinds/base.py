"""Defines the base class of the kinds of the ``base`` axis."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from raymem.kinds.core import Kind, OptionsT


class BaseKind(Kind[OptionsT]):
    """A way to hold the frozen base weights."""

    command: ClassVar[str] = "train"
    """The command that runs a recipe of this kind from its data to its result."""

    replaces_model: ClassVar[bool] = False
    """Whether the weights belong to another model than the one that the recipe names."""

    def directory(self, options: OptionsT) -> str | None:
        """Return the directory that holds the weights, instead of the model that the recipe names; None for that model.

        Raises:
            ModelError: they are still to be made.
        """
        return None

    def is_planned(self, options: OptionsT) -> bool:
        """Say whether the weights are still to be made from the model, so that only their shapes are known."""
        return False

    def located(self, options: OptionsT, directory: str) -> OptionsT:
        """Return options that take the weights, which have been made, from a directory."""
        return options

    def planned_config(self, options: OptionsT, config: Any) -> Any:
        """Return the transformers config of the model that will be made, where :meth:`is_planned`."""
        return config

    def described(self, options: OptionsT, result: Path) -> dict[str, Any]:
        """Return the options that the weights were made with, for the model card of a result that was trained on them.

        Args:
            result: the directory of the result.
        """
        return asdict(options)  # type: ignore[call-overload,no-any-return]

    def building(self, config: Any) -> AbstractContextManager[None]:
        """Let transformers build models of ``config`` in the block with the layers that this kind has changed; for a
        config that is none of its own nothing changes."""
        return nullcontext()

    def prepare(self, model: Any, options: OptionsT) -> None:
        """Change a transformers model on the meta device, before its adapter is attached.

        Raises:
            RecipeError: an option that does not go with the model; begins with ``base.``.
        """

    def is_streamed(self, options: OptionsT) -> bool:
        """Say whether weights of layers lie on the host but while their layer runs."""
        return False

    def alignment(self, options: OptionsT) -> Mapping[str, Any] | None:
        """Return sections of the recipe that trains the weights themselves before the adapter; None where they are used
        as they are."""
        return None

    def with_alignment(self, options: OptionsT, sections: Mapping[str, Any]) -> OptionsT:
        """Return the options with :meth:`alignment` replaced."""
        return options

    def is_of_model(self, directory: str) -> bool:
        """Say whether an adapter trained on these weights has been recovered for the model that the recipe names."""
        return not self.replaces_model

    def why_not_of_model(self, directory: Path) -> str | None:
        """Say why the adapter in a directory, trained on these weights, does not go with the model that it names, and
        what to do; None if it does, or has nothing to do with this kind."""
        return None

    def stamp(self, result: Path, weights: Path) -> None:
        """Add to a written result the facts about these weights that its use on the full model needs.

        Args:
            weights: holds the files beside the weights of :meth:`directory`.
        """
