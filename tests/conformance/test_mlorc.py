"""MLorc keeps to what every method must keep to."""

from __future__ import annotations

import pytest

from raymem.testing import ConformanceSuite

# Square, wide and tall matrices are left; each takes seconds on fake tensors.
NONE = {"kind": "none", "freeze": ["k_proj", "v_proj", "gate_proj", "up_proj"]}


class TestMLorcAdamW(ConformanceSuite):
    fragment = {"adapter": NONE, "optimizer": {"kind": "mlorc_adamw", "min_dim": 8}}


@pytest.mark.slow
class TestMLorcAdamWSqrt(ConformanceSuite):
    fragment = {"adapter": NONE, "optimizer": {"kind": "mlorc_adamw", "min_dim": 8, "second_moment": "sqrt"}}


class TestMLorcLion(ConformanceSuite):
    fragment = {"adapter": NONE, "optimizer": {"kind": "mlorc_lion", "min_dim": 8}}
