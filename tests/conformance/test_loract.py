"""LoRAct keeps to what every method must keep to."""

from __future__ import annotations

from tests.conformance.suite import MethodSuite


class TestLayerScope(MethodSuite):
    fragment = {"activations": {"kind": "loract", "first_input": "compressed"}}


class TestSublayerScope(MethodSuite):
    fragment = {"activations": {"kind": "loract", "scope": "sublayer"}}


class TestLinearScopeInFullFineTuning(MethodSuite):
    fragment = {"adapter": "none", "activations": {"kind": "loract", "scope": "linear"}}


class TestAutoRankUnderAutocast(MethodSuite):
    fragment = {
        "activations": {"kind": "loract", "rank": "auto", "report_every": 1},
        "train": {"precision": "bf16_mixed"},
    }
