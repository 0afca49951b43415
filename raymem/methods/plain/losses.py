"""Losses of the logits of all positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from raymem.kinds import IGNORED, OPTIONS_RULES, LossKind


@dataclass(frozen=True)
class FullLoss:
    """Cross-entropy of the logits of all tokens, held three times in fp32."""

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["full"] = "full"


class FullLossKind(LossKind[FullLoss]):
    """torch's cross-entropy."""

    options = FullLoss
    is_cross_entropy = True

    def loss_sum(self, logits_NV: Any, ids_N: Any, options: FullLoss) -> Any:
        return cross_entropy_sum(logits_NV, ids_N)


def cross_entropy_sum(logits_NV: Any, ids_N: Any) -> Any:
    """Summed cross-entropy in nats of fp32 logits [N, V], 0-dim."""
    import torch.nn.functional as F

    return F.cross_entropy(logits_NV, ids_N, ignore_index=IGNORED, reduction="sum")
