"""A few random inputs of every kind, always the same: each is a value or one short sentence."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.cases import check

TARGETS = {
    name: target
    for module in ("recipes", "data")
    for name, target in importlib.import_module(f"tests.fuzz.{module}").TARGETS.items()
}
FEW = settings(
    max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@FEW
@pytest.mark.parametrize("name", sorted(TARGETS))
@given(data=st.data())
def test_a_few(name: str, data: Any) -> None:
    check(TARGETS[name], data.draw(TARGETS[name].cases))


@pytest.mark.slow
@FEW
@given(data=st.data())
def test_a_few_artefacts(data: Any) -> None:
    target = importlib.import_module("tests.fuzz.artefacts").TARGETS["artefacts"]
    check(target, data.draw(target.cases))
