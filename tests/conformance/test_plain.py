"""The plain choices of every axis keep the contract that methods must keep."""

from __future__ import annotations

from tests.conformance.suite import MethodSuite


class TestFullFineTuning(MethodSuite):
    fragment = {"adapter": {"kind": "none"}}


class TestLora(MethodSuite):
    fragment = {"adapter": {"kind": "lora"}}


class TestLoraWithCheckpointing(MethodSuite):
    fragment = {"activations": "checkpoint"}


class TestForeachAdamW(MethodSuite):
    fragment = {"optimizer": {"implementation": "foreach"}}


class TestMasterWeights(MethodSuite):
    fragment = {"train": {"precision": "bf16", "master": "fp32"}}


class TestStochasticRounding(MethodSuite):
    fragment = {"train": {"precision": "bf16", "master": "stochastic_rounding"}}


class TestMixedPrecision(MethodSuite):
    fragment = {"train": {"precision": "bf16_mixed"}, "model": {"dtype": "bf16"}}
