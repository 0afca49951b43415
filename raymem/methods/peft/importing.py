"""Imports PEFT without the libraries that it loads for nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Let PEFT be imported, and wrap a model, without bitsandbytes, which brings the whole compiler: seconds.

    PEFT imports it wherever it is installed. A model with its layers has imported it before; then nothing is hidden.
    """
    if "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]
        if "peft.import_utils" in sys.modules:
            from peft import import_utils

            for remembered in (import_utils.is_bnb_available, import_utils.is_bnb_4bit_available):
                remembered.cache_clear()
