"""What saves memory exactly, or is widely used besides, keeps to what every method must keep to."""

from __future__ import annotations

import pytest

from raymem.testing import ConformanceSuite
from raymem.testing.tiny import TINY_LLAMA

# Matrices of 8192 numbers, so that some are held in 8 bits and others are too small.
WIDER = {**TINY_LLAMA, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.mark.slow
class TestAdamW8bit(ConformanceSuite):
    fragment = {"adapter": "none", "optimizer": "adamw_8bit"}
    model_config = WIDER


@pytest.mark.slow
class TestAdamW8bitWithMasters(ConformanceSuite):
    fragment = {"adapter": "none", "optimizer": "adamw_8bit", "train": {"precision": "bf16", "master": "fp32"}}
    model_config = WIDER


@pytest.mark.slow
class TestOffload(ConformanceSuite):
    fragment = {"activations": "offload"}


@pytest.mark.slow
class TestOffloadWithCheckpointing(ConformanceSuite):
    fragment = {
        "adapter": "none",
        "activations": {"kind": "offload", "checkpoint": True},
        "train": {"precision": "bf16_mixed"},
    }


@pytest.mark.slow
class TestStreamedBase(ConformanceSuite):
    fragment = {"base": {"offload": True}}


@pytest.mark.slow
class TestStreamedBaseUnderAutocast(ConformanceSuite):
    fragment = {
        "base": {"offload": True},
        "activations": {"kind": "offload", "checkpoint": True},
        "train": {"precision": "bf16_mixed"},
        "model": {"dtype": "bf16"},
    }
