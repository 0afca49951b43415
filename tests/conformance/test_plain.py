"""The plain choices of every axis keep the contract that methods must keep."""

from __future__ import annotations

import pytest

from raymem.testing import ConformanceSuite


class TestFullFineTuning(ConformanceSuite):
    fragment = {"adapter": {"kind": "none"}}


class TestLora(ConformanceSuite):
    fragment = {"adapter": {"kind": "lora"}}


class TestLoraWithCheckpointing(ConformanceSuite):
    fragment = {"activations": "checkpoint"}


@pytest.mark.slow
class TestForeachAdamW(ConformanceSuite):
    fragment = {"optimizer": {"implementation": "foreach"}}


class TestMasterWeights(ConformanceSuite):
    fragment = {"train": {"precision": "bf16", "master": "fp32"}}


class TestStochasticRounding(ConformanceSuite):
    fragment = {"train": {"precision": "bf16", "master": "stochastic_rounding"}}


@pytest.mark.slow
class TestMixedPrecision(ConformanceSuite):
    fragment = {"train": {"precision": "bf16_mixed"}, "model": {"dtype": "bf16"}}
