"""MoRAM keeps the contract of every method, whether its connections need data or not."""

from __future__ import annotations

from tests.conformance.suite import MethodSuite

MORAM = {"kind": "moram", "rank": 4, "density": 0.25, "criterion": "random"}


class TestMoRAM(MethodSuite):
    fragment = {"adapter": {**MORAM, "formulation": "fast"}}


class TestMoRAMByGradients(MethodSuite):
    fragment = {"adapter": {**MORAM, "criterion": "gradient", "selection_batches": 2}}


class TestMoRAMFrugalMixedPrecision(MethodSuite):
    fragment = {
        "adapter": {**MORAM, "criterion": "magnitude", "formulation": "frugal"},
        "activations": "checkpoint",
        "train": {"precision": "bf16_mixed"},
        "model": {"dtype": "bf16"},
    }
