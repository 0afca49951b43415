"""Defines the base class of the kinds of the ``loss`` axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from raymem.kinds.core import Kind, OptionsT

IGNORED = -100
"""The target of a position that has none (transformers' convention)."""


class LossFunction(Protocol):
    """Summed loss of a micro-batch, made once for a model."""

    chunked: bool
    """Whether the logits of all positions are never there at once."""
    note: str | None
    """A sentence for the person who runs it, or None."""

    def rough_bytes(self, *, tokens: int, vocabulary: int, hidden_size: int, itemsize: int, device: str) -> int:
        """Estimate the bytes for a micro-batch by a formula, for models that cannot be traced.

        Args:
            itemsize: bytes per number of the hidden states.
            device: ``cpu`` or ``cuda``.
        """

    def __call__(self, model: Any, inputs: dict[str, Any], ids_N: Any, positions_T: Any) -> Any:
        """Run the forward pass and return the summed loss, 0-dim fp32.

        Args:
            model: transformers model without wrappers.
            inputs: keyword arguments of its forward.
            ids_N: int64[N], the token that each position of the flattened rows predicts; -100 where there is none.
            positions_T: int64[T], where there is one.
        """


class LossKind(Kind[OptionsT]):
    """A way to compute the loss.

    A kind that needs the logits alone implements :meth:`loss_sum`; one that must not have them whole, :meth:`prepare`.
    """

    is_cross_entropy: ClassVar[bool] = False
    """Whether the loss is cross-entropy in nats, so that exp(loss) is a perplexity."""

    def prepare(self, model: Any, options: OptionsT) -> LossFunction:
        """Return the loss of a complete model (with its adapter attached, loaded or on the meta device).

        Raises:
            RecipeError: it is not right for this model.
        """
        return OfLogits(lambda logits_NV, ids_N: self.loss_sum(logits_NV, ids_N, options))

    def loss_sum(self, logits_NV: Any, ids_N: Any, options: OptionsT) -> Any:
        """Compute the summed loss of fp32 logits [N, V]; positions whose id is -100 do not count."""
        raise NotImplementedError


class OfLogits:
    """A loss of the logits of all positions.

    Args:
        loss_sum: fp32 logits [N, V] and int64 ids [N] -> summed loss, 0-dim fp32.
        note: see :class:`LossFunction`.
    """

    chunked = False

    def __init__(self, loss_sum: Callable[[Any, Any], Any], note: str | None = None) -> None:
        self._loss_sum, self.note = loss_sum, note

    def rough_bytes(self, *, tokens: int, vocabulary: int, hidden_size: int, itemsize: int, device: str) -> int:
        """Count the logits three times in fp32, and once in their own dtype."""
        return (3 * 4 + (itemsize if itemsize < 4 else 0)) * tokens * vocabulary

    def __call__(self, model: Any, inputs: dict[str, Any], ids_N: Any, positions_T: Any) -> Any:
        from raymem.memory.trace import attribute, attribute_backward

        hidden: list[Any] = []

        def enter(head: Any, arguments: tuple[Any, ...]) -> None:
            hidden.append(arguments[0])
            attribute("loss")

        head = model.get_output_embeddings()
        handle = None if head is None else head.register_forward_pre_hook(enter)
        try:
            logits_NV = type(model).forward(model, **inputs).logits.flatten(0, -2)
        finally:
            if handle is not None:
                handle.remove()
        loss = self._loss_sum(logits_NV.float(), ids_N)
        attribute(None)
        if hidden:
            attribute_backward("loss", since=loss, until=hidden[-1])
        return loss


def cross_entropy_sum(logits_NV: Any, ids_N: Any) -> Any:
    """Compute the summed cross-entropy in nats of fp32 logits [N, V], 0-dim."""
    import torch.nn.functional as F

    return F.cross_entropy(logits_NV, ids_N, ignore_index=IGNORED, reduction="sum")
