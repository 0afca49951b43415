"""Takes the model as it is, in its own precision or in 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from raymem.kinds import OPTIONS_RULES, BaseKind


@dataclass(frozen=True)
class FullBase:
    """The model as it is."""

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["full"] = "full"
    quantize: Literal["none", "nf4"] = "none"
    """``nf4`` stores frozen linear layers and experts in 4 bits (bitsandbytes, ``pip install raymem[quant]``)."""


class FullBaseKind(BaseKind[FullBase]):
    """The kind with every weight of the model that the recipe names."""

    options = FullBase
