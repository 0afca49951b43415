"""Defines the base class of the kinds of the ``optimizer`` axis."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from raymem.kinds.core import Kind, OptionsT


@dataclass(frozen=True)
class OptimizerContext:
    """The arguments that an optimizer is built with besides its options."""

    seed: int
    stochastic_rounding: bool
    """Whether bf16 parameters are to be rounded up or down at random; an optimizer that cannot must raise."""
    embeddings: frozenset[str]
    """The names of the embedding matrices."""


class OptimizerKind(Kind[OptionsT]):
    """A way to update the trained weights. Its options have ``lr``, the peak learning rate.

    The optimizer's state must consist of tensors. Its groups carry the running ``step`` (from 0) and ``lr``.
    """

    free: ClassVar[tuple[str, ...]] = ("lr",)
    rounds: ClassVar[bool] = False
    """Whether it can update bf16 weights with stochastic rounding."""

    @abstractmethod
    def build(self, parameters: Mapping[str, Any], options: OptionsT, context: OptimizerContext) -> Any:
        """Build the torch optimizer over named parameters.

        Raises:
            RecipeError: an option that does not go with them; begins with ``optimizer.``.
        """

    def state_bytes(self, options: OptionsT, tensor: TensorShape) -> int | None:
        """Count the bytes of one tensor's state on one worker in closed form; None where none is known."""
        return None

    def host_state_bytes(self, options: OptionsT, tensor: TensorShape) -> int:
        """Count the part of :meth:`state_bytes` that lies in the memory of a GPU's host."""
        return 0

    def frees_gradients(self, options: OptionsT) -> bool:
        """Say whether gradients are used up during the backward pass, so that they are never all there."""
        return False


@dataclass(frozen=True)
class TensorShape:
    """A trained tensor, as its optimizer's closed form sees it."""

    shape: tuple[int, ...]
    local: tuple[int, ...]
    """The shape of this worker's part: fewer rows where the parameter is sharded."""
    itemsize: int
    """Bytes per number of what is updated: 4 with fp32 masters."""
    rounded: bool
    """Whether a bf16 tensor is updated with stochastic rounding."""
    embedding: bool
    sharded: bool
    """Whether it is a distributed tensor, be it on one worker."""
