"""MoRAM keeps the contract of every method. Its connections here need no data: a model is ready once it is built."""

from __future__ import annotations

from tests.conformance.suite import MethodSuite

MORAM = {"kind": "moram", "rank": 4, "density": 0.25, "criterion": "random"}


class TestMoRAM(MethodSuite):
    fragment = {"adapter": {**MORAM, "formulation": "fast"}}


class TestMoRAMFrugalMixedPrecision(MethodSuite):
    fragment = {
        "adapter": {**MORAM, "criterion": "magnitude", "formulation": "frugal"},
        "activations": "checkpoint",
        "train": {"precision": "bf16_mixed"},
        "model": {"dtype": "bf16"},
    }
