"""The loss in chunks as kinds of the ``loss`` axis: asked for by name, or taken where it is right for the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from raymem.errors import RecipeError
from raymem.kinds import OPTIONS_RULES, Advice, LossFunction, LossKind, OfLogits, cross_entropy_sum


@dataclass(frozen=True)
class AutoLoss:
    """``chunked`` where it is right for the model, which is tried on a small clone; else ``full``, with a warning."""

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["auto"] = "auto"


@dataclass(frozen=True)
class ChunkedLoss:
    """Exact cross-entropy by chunks of positions: logits of all tokens are never there at once."""

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["chunked"] = "chunked"


class InChunks:
    """Cross-entropy by chunks of positions.

    Args:
        replay: through the model's own head, see :func:`raymem.methods.chunked_loss.chunked_loss_sum`.
    """

    chunked = True
    note: str | None = None

    def __init__(self, *, replay: bool) -> None:
        self._replay = replay

    def rough_bytes(self, *, tokens: int, vocabulary: int, hidden_size: int, itemsize: int, device: str) -> int:
        """Count the limit of one chunk, and the gradient of the last hidden states."""
        from raymem.methods.chunked_loss.rows import CHUNK_BYTES, FEWEST_ROWS

        chunk = min(max(CHUNK_BYTES[device], FEWEST_ROWS[device] * vocabulary * 4), 4 * tokens * vocabulary)
        return chunk + tokens * hidden_size * itemsize

    def __call__(self, model: Any, inputs: dict[str, Any], ids_N: Any, positions_T: Any) -> Any:
        from raymem.methods.chunked_loss.causal_lm import chunked_loss_sum

        return chunked_loss_sum(model, inputs, ids_N, positions_T, replay=self._replay)


class AutoLossKind(LossKind[AutoLoss]):
    """Takes the loss in chunks, or of the whole logits where chunks are not right."""

    options = AutoLoss
    is_cross_entropy = True

    def prepare(self, model: Any, options: AutoLoss) -> LossFunction:
        from raymem.methods.chunked_loss.choice import choose

        choice = choose(model)
        if choice.chunked:
            return InChunks(replay=choice.replay)
        return OfLogits(
            cross_entropy_sum,
            f"loss: auto is full for {type(model).__name__}, because the chunked loss is not right for it: "
            f"{choice.reason}",
        )

    def advice(self) -> Sequence[Advice]:
        time = "little: each chunk's logits are used while they are there, and only those with a target are made"
        return [Advice("loss=auto", ("loss",), cost=20, applies=_holds_logits, exact=True, time=time)]


class ChunkedLossKind(LossKind[ChunkedLoss]):
    """Takes the loss in chunks, or refuses the model."""

    options = ChunkedLoss
    is_cross_entropy = True

    def prepare(self, model: Any, options: ChunkedLoss) -> LossFunction:
        from raymem.methods.chunked_loss.choice import choose

        choice = choose(model)
        if not choice.chunked:
            raise RecipeError(
                f"loss: chunked is not right for {type(model).__name__}: {choice.reason}; use loss: full, or auto, "
                "which takes it by itself"
            )
        return InChunks(replay=choice.replay)


def _holds_logits(recipe: Any) -> bool:
    return not isinstance(recipe.loss, AutoLoss | ChunkedLoss)
