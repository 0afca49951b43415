"""MoRAM adapters in the formats of other methods, which stock PEFT reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.errors import AdapterError
from raymem.methods.moram import export_lora, export_shira
from raymem.methods.moram.layer import layers
from tests.helpers.moram_cases import logits, ready, small_gpt2, small_llama


def test_shira_in_stock_peft_is_the_same_update(tmp_path: Path) -> None:
    from peft import PeftModel

    model = ready(density=0.1)
    export_shira(model, tmp_path)
    loaded = PeftModel.from_pretrained(small_llama(), tmp_path)
    for name, layer in layers(model):
        theirs = loaded.get_submodule(name).get_delta_weight("default").to_dense()
        assert torch.equal(theirs, layer.get_delta_weight("default"))
    torch.testing.assert_close(logits(loaded), logits(model))
    assert torch.equal(
        PeftModel.from_pretrained(small_llama(), tmp_path).merge_and_unload().model.layers[0].mlp.up_proj.weight,
        model.merge_and_unload().model.layers[0].mlp.up_proj.weight,
    )


def test_shira_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="has no Conv1D; merge the adapter instead"):
        export_shira(ready(small_gpt2(), target_modules=["c_attn"]), tmp_path)
    with pytest.raises(AdapterError, match=r"SHiRA would need r=\d+ for the widest layer"):
        export_shira(ready(density=0.9), tmp_path)


@pytest.mark.parametrize("base", [small_llama, small_gpt2], ids=["linear", "conv1d"])
def test_lora_keeps_the_energy_that_it_says(base: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    model = ready(base())
    energies = export_lora(model, tmp_path, rank=6)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    for name, layer in layers(model):
        update, theirs = layer.get_delta_weight("default"), loaded.get_submodule(name).get_delta_weight("default")
        kept = 1 - float((update - theirs).square().sum() / update.square().sum())
        assert energies[name] == pytest.approx(kept, abs=1e-4)
        assert 0.3 < kept < 0.999
    full = export_lora(ready(base(), target_modules=["o_proj" if base is small_llama else "c_attn"]), tmp_path, rank=32)
    assert min(full.values()) == pytest.approx(1.0)
    with pytest.raises(AdapterError, match="rank: 33 is not between 1 and 32"):
        export_lora(model, tmp_path, rank=33)
