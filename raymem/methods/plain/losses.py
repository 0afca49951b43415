"""Computes losses of the logits of all positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from raymem.kinds import OPTIONS_RULES, LossKind, cross_entropy_sum


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
