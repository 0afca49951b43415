"""LoRAM keeps to what every method must keep to, on a base whose layers differ in size."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymem.methods.loram import PruneOptions, prune_model
from raymem.recipe.schema import Recipe
from tests.conformance.suite import MethodSuite
from tests.helpers.support import make_recipe, merged


@pytest.fixture(scope="module")
def pruned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with half of its first layer and a quarter of its second; read only."""
    out = tmp_path_factory.mktemp("loram") / "pruned"
    prune_model(llama, out, PruneOptions(layer_ratios=(0.5, 0.75), seed=1))
    return out


class OnPruned(MethodSuite):
    @pytest.fixture
    def recipe(self, llama: Path, pruned: Path) -> Recipe:
        return make_recipe(merged({"base": {"kind": "loram", "artifact": str(pruned)}}, self.fragment), model=llama)


class TestLoRAM(OnPruned):
    fragment = {}


class TestLoRAMWithMoRAM(OnPruned):
    fragment = {"adapter": {"kind": "moram", "rank": 4, "density": 0.25, "criterion": "random"}}
