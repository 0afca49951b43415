"""MoRAM keeps the contract of every method, whether its connections need data or not."""

from __future__ import annotations

import pytest

from raymem.testing import ConformanceSuite

MORAM = {"kind": "moram", "rank": 4, "density": 0.25, "criterion": "random"}


class TestMoRAM(ConformanceSuite):
    fragment = {"adapter": {**MORAM, "formulation": "fast"}}


@pytest.mark.slow
class TestMoRAMByGradients(ConformanceSuite):
    fragment = {"adapter": {**MORAM, "criterion": "gradient", "selection_batches": 2}}


@pytest.mark.slow
class TestMoRAMFrugalMixedPrecision(ConformanceSuite):
    fragment = {
        "adapter": {**MORAM, "criterion": "magnitude", "formulation": "frugal"},
        "activations": "checkpoint",
        "train": {"precision": "bf16_mixed"},
        "model": {"dtype": "bf16"},
    }
