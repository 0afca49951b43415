"""MLorc keeps to what every method must keep to."""

from __future__ import annotations

from suite import MethodSuite


class TestMLorcAdamW(MethodSuite):
    fragment = {"adapter": "none", "optimizer": {"kind": "mlorc_adamw", "min_dim": 8}}


class TestMLorcAdamWSqrt(MethodSuite):
    fragment = {"adapter": "none", "optimizer": {"kind": "mlorc_adamw", "min_dim": 8, "second_moment": "sqrt"}}


class TestMLorcLion(MethodSuite):
    fragment = {"adapter": "none", "optimizer": {"kind": "mlorc_lion", "min_dim": 8}}
