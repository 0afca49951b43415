"""Imports what a kind of tracking needs beyond raymem's own dependencies."""

from __future__ import annotations

import importlib
from typing import Any

from raymem.errors import TrackingError


def library(module: str, extra: str) -> Any:
    """Return a module that ``pip install 'raymem[extra]'`` brings.

    Raises:
        TrackingError: it is not installed here, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TrackingError(
            f"tracking.kind: {extra} needs {module}, which cannot be imported here ({error}); "
            f"pip install 'raymem[{extra}]', or choose another kind"
        ) from None
