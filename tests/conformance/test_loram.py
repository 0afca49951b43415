"""LoRAM keeps to what every method must keep to, on a base whose layers differ in size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymem.methods.loram import PruneOptions, prune_model
from raymem.testing import ConformanceSuite


class OnPruned(ConformanceSuite):
    adapter: dict[str, Any]

    def make_fragment(self, model: Path, folder: Path) -> dict[str, Any]:
        """Half of the first layer is kept, and three quarters of the second."""
        prune_model(model, folder / "pruned", PruneOptions(layer_ratios=(0.5, 0.75), seed=1))
        return {"base": {"kind": "loram", "artifact": str(folder / "pruned")}, "adapter": self.adapter}


class TestLoRAM(OnPruned):
    adapter = {"kind": "lora", "rank": 4}


@pytest.mark.slow
class TestLoRAMWithMoRAM(OnPruned):
    adapter = {"kind": "moram", "rank": 4, "density": 0.25, "criterion": "random"}
