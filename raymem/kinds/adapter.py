"""Defines the base class of the kinds of the ``adapter`` axis."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from raymem.errors import ModelError
from raymem.kinds.core import Kind, OptionsT

ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class AttachContext:
    """The facts that attaching needs besides the options."""

    dtype: Any
    """The torch dtype of the trained weights."""
    base_name: str | None
    """The directory or Hugging Face id that the adapter's config is to name; None where there is none yet."""
    base_revision: str | None


class AdapterKind(Kind[OptionsT]):
    """A choice of the weights that are trained."""

    trains_base: ClassVar[bool] = False
    """Says whether the result is a whole model rather than an adapter."""
    usage: ClassVar[str | None] = None
    """Lines of Python that load a result from "DIR" into ``model`` and ``tokenizer``, for model cards; None where only
    :func:`raymem.load` does."""

    reads_base: ClassVar[bool] = True
    """Whether it reads or writes base weights elsewhere than in the forward and backward pass of their layer, so that
    they cannot be streamed."""

    @abstractmethod
    def attach(self, model: Any, options: OptionsT, context: AttachContext) -> Any:
        """Prepare a model (usually on the meta device) for this kind's training; return the model to train.

        Raises:
            RecipeError: an option that does not go with the model; begins with ``adapter.``.
        """

    def register(self) -> None:
        """Teach libraries to read its files, before one of them is loaded."""

    def initial_value(self, name: str, shape: Sequence[int], seed: int) -> Any:
        """Start of a tensor that :meth:`attach` added, the same on every rank; of its own dtype, or fp32.

        It is asked of every parameter, trained or not, and of every buffer, since models are built on the meta device,
        where what a module's constructor wrote is lost.

        Raises:
            AssertionError: the name is none of its tensors.
        """
        raise AssertionError(f"{type(self).__name__}.initial_value knows no start of {name}, which attach added")

    def buffers(self, model: Any) -> dict[str, Any]:
        """Return buffers of the attached model that a checkpoint and the saved adapter must hold beside what is
        trained: all whose values :meth:`initial_value` does not give again.
        """
        return {}

    def save(self, model: Any, directory: Path, tensors: Mapping[str, Any], options: OptionsT) -> None:
        """Write the trained tensors, or the whole model if :attr:`trains_base`, with a config that says what they are.

        Args:
            directory: exists and is empty.
            tensors: gathered, by the names of ``model``.
        """
        if self.trains_base:
            model.save_pretrained(directory, state_dict=tensors)
            return
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / ADAPTER_FILE)
        config = {"raymem_kind": self.name, "options": asdict(options)}  # type: ignore[call-overload]
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")

    def continues(self, config: Mapping[str, Any]) -> bool:
        """Say whether it can go on with an adapter that has this adapter_config.json."""
        return config.get("raymem_kind") == self.name

    def continuing(self, config: Mapping[str, Any], directory: str) -> OptionsT:
        """Return the options that continue the adapter in ``directory``, whose adapter_config.json is ``config``.

        Raises:
            ModelError: the options have no field ``init_from``.
        """
        if "init_from" not in {field.name for field in fields(self.options)}:
            raise ModelError(
                f"{directory}: adapters of kind {self.name} cannot be loaded again: their options have no init_from"
            )
        options: OptionsT = self.options(**{**config["options"], "init_from": directory})
        return options

    def source(self, options: OptionsT) -> str | None:
        """Return the directory of the adapter that is continued; None to begin with :meth:`initial_value`."""
        return getattr(options, "init_from", None)

    def read(self, directory: str, model: Any) -> dict[str, Any]:
        """Read a saved adapter under the names of ``model``, whose base is filled. Collective if it is sharded.

        Raises:
            ModelError: it is incomplete, or of another rank or set of layers.
        """
        from safetensors.torch import load_file

        tensors: dict[str, Any] = load_file(Path(directory) / ADAPTER_FILE)
        expected = self.buffers(model) | {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name in sorted(set(tensors) | set(expected)):
            here, there = expected.get(name), tensors.get(name)
            if here is None or there is None or here.shape != there.shape:
                raise ModelError(
                    f"adapter.init_from: {directory} and this recipe's adapter differ in {name}: "
                    f"{None if there is None else list(there.shape)} and {None if here is None else list(here.shape)}; "
                    "use the options that it was trained with"
                )
        return tensors

    def loaded(self, model: Any, options: OptionsT, seed: int) -> None:
        """Do further work once base and adapter have their values, before the first step of a new run."""

    def check_base(self, model: Any) -> None:
        """Refuse base weights that are not those for which an adapter of this kind in ``model`` was made, where it can
        tell; both have their values. Collective if the model is sharded.

        Raises:
            ModelError, AdapterError: they are others.
        """

    def trained_shapes(self, model: Any, options: OptionsT) -> dict[str, tuple[int, ...]]:
        """Map each trained tensor of an attached model to its shape: read from it, unless a closed form is known."""
        return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}

    def buffer_bytes(self, model: Any, options: OptionsT) -> int:
        """Count the bytes of the buffers that it adds to the model."""
        return 0

    def owns_buffer(self, name: str) -> bool:
        """Say whether :meth:`buffer_bytes` counts a buffer of the attached model."""
        return False
