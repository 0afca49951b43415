"""LoRAct keeps to what every method must keep to."""

from __future__ import annotations

import pytest

from raymem.testing import ConformanceSuite


class TestLayerScope(ConformanceSuite):
    fragment = {"activations": {"kind": "loract", "first_input": "compressed"}}


class TestSublayerScope(ConformanceSuite):
    fragment = {"activations": {"kind": "loract", "scope": "sublayer"}}


@pytest.mark.slow
class TestLinearScopeInFullFineTuning(ConformanceSuite):
    fragment = {"adapter": "none", "activations": {"kind": "loract", "scope": "linear"}}


@pytest.mark.slow
class TestAutoRankUnderAutocast(ConformanceSuite):
    fragment = {
        "activations": {"kind": "loract", "rank": "auto", "report_every": 1},
        "train": {"precision": "bf16_mixed"},
    }
