"""Kinds of the ``base`` axis."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from raymem.kinds.core import Kind, OptionsT


class BaseKind(Kind[OptionsT]):
    """How the frozen base weights are held."""

    command: ClassVar[str] = "train"
    """Command that runs a recipe of this kind from its data to its result."""

    replaces_model: ClassVar[bool] = False
    """Whether the weights are another model's than the one that the recipe names."""

    def directory(self, options: OptionsT) -> str | None:
        """Directory that holds the weights, instead of the model that the recipe names; None for that model.

        Raises:
            ModelError: they are still to be made.
        """
        return None

    def is_planned(self, options: OptionsT) -> bool:
        """Whether the weights are still to be made from the model, so that only their shapes are known."""
        return False

    def located(self, options: OptionsT, directory: str) -> OptionsT:
        """Options that take the weights, which have been made, from a directory."""
        return options

    def planned_config(self, options: OptionsT, config: Any) -> Any:
        """transformers config of the model that will be made, where :meth:`is_planned`."""
        return config

    def building(self, config: Any) -> AbstractContextManager[None]:
        """Inside, transformers builds models of ``config`` with the layers that this kind has made of them; for a
        config that is none of its own nothing changes."""
        return nullcontext()

    def alignment(self, options: OptionsT) -> Mapping[str, Any] | None:
        """Sections of the recipe that trains the weights themselves before the adapter; None where they are used as
        they are."""
        return None

    def with_alignment(self, options: OptionsT, sections: Mapping[str, Any]) -> OptionsT:
        """The options with :meth:`alignment` replaced."""
        return options

    def is_of_model(self, directory: str) -> bool:
        """Whether an adapter that was trained on these weights has been made one of the model that the recipe names."""
        return not self.replaces_model

    def why_not_of_model(self, directory: Path) -> str | None:
        """Why the adapter in a directory, trained on these weights, does not go with the model that it names, and what
        to do; None if it does, or has nothing to do with this kind."""
        return None

    def stamp(self, directory: Path, options: OptionsT) -> None:
        """Add to a written result what must be known of these weights to use it on the full model."""
