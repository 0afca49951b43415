"""Kinds of somebody else in the suite that raymem ships for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from raymem.recipe.axes import ADAPTERS, LOSSES, OPTIMIZERS
from raymem.testing import ConformanceSuite
from tests.helpers import toy_kinds


@pytest.fixture(scope="module", autouse=True)
def toys() -> Iterator[None]:
    """Known in this process only; ranks are told of them."""
    ADAPTERS.register(toy_kinds.ShiftKind)
    OPTIMIZERS.register(toy_kinds.SignKind)
    LOSSES.register(toy_kinds.SmoothKind)
    yield
    ADAPTERS.unregister("toy_shift")
    OPTIMIZERS.unregister("toy_sign")
    LOSSES.unregister("toy_smooth")


class TestTensorsOfEverySort(ConformanceSuite):
    """An adapter that PEFT does not know, an optimizer without a closed form, a loss that is no cross-entropy."""

    fragment = {"adapter": "toy_shift", "optimizer": {"kind": "toy_sign", "lr": 1e-3}, "loss": "toy_smooth"}
