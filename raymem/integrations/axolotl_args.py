"""The section that raymem's plugin adds to a config of axolotl, apart from what imports axolotl itself."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class RaymemArgs(BaseModel):
    """Keys of a config of axolotl."""

    raymem: dict[str, Any] | str | None = None
    """What :func:`raymem.integrations.hf.apply` takes: a mapping of axes with ``budget`` and ``seed``, or a file."""
