"""The loss without its logits: exact cross-entropy by chunks of positions. README.md beside this file is the map."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymem.methods import lazy_exports

if TYPE_CHECKING:
    from raymem.methods.chunked_loss.causal_lm import chunked_loss_sum
    from raymem.methods.chunked_loss.choice import Choice, choose
    from raymem.methods.chunked_loss.probing import Verdict, probe
    from raymem.methods.chunked_loss.product import cross_entropy_sum

__all__ = ["Choice", "Verdict", "choose", "chunked_loss_sum", "cross_entropy_sum", "probe"]

__getattr__ = lazy_exports(
    __name__,
    {
        "Choice": "choice",
        "Verdict": "probing",
        "choose": "choice",
        "chunked_loss_sum": "causal_lm",
        "cross_entropy_sum": "product",
        "probe": "probing",
    },
)
