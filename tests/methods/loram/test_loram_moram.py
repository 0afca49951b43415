"""MoRAM adapters of a pruned model: every connection comes back at its place in the full layer, nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from raymem.errors import RecoveryMismatch
from raymem.methods.loram import PruneOptions, load_pruned, prune_model, recover_adapter, stamp_adapter, verify_recovery
from raymem.methods.loram.coupling import couple
from raymem.methods.loram.index_map import place
from raymem.methods.loram.manifest import read_manifest
from raymem.methods.moram import MoRAMConfig, select_indices
from raymem.methods.moram.layer import layers
from raymem.storage.checksums import CHECKSUMS
from tests.helpers.loram_families import config_of, logits, random_model, save, token_ids

pytestmark = pytest.mark.numerics

IDS = token_ids(2, 16, seed=7)
EPS = torch.finfo(torch.float32).eps


def train_moram(pruned: Path, out: Path, **options: object) -> None:
    torch.manual_seed(0)
    model = get_peft_model(load_pruned(pruned), MoRAMConfig(r=3, task_type="CAUSAL_LM", **options))  # type: ignore[arg-type]
    select_indices(model, criterion="random", seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    stamp_adapter(out, pruned)


def deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: layer.get_delta_weight("default") for name, layer in layers(model)}


@pytest.mark.parametrize("options", [{"density": 0.3}, {"k": 5}, {"density": 1.0}], ids=str)
@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("phi3", "gpt_neox"))])
def test_recovery_is_exact(family: str, options: dict[str, float], tmp_path: Path) -> None:
    full, pruned, trained, out = (tmp_path / name for name in ("full", "pruned", "trained", "recovered"))
    manifest = prune_model(save(full, family), pruned, PruneOptions(layer_ratios=(0.0, 0.5, 0.7, 0.25)))
    train_moram(pruned, trained, **options)
    recover_adapter(trained, pruned, out)
    checked = verify_recovery(trained, pruned, out, full=full)
    assert checked.num_weights and checked.logit_difference < 1e-5  # type: ignore[operator]

    small = deltas(PeftModel.from_pretrained(load_pruned(pruned), trained))
    adapted = PeftModel.from_pretrained(random_model(family), out).eval()  # accepts the weights, or would raise
    coupling = couple(config_of(family))
    for name, found in deltas(adapted).items():
        placement = place(coupling, manifest.kept, name.removeprefix("base_model.model."))
        expected, inside = small[name], found
        outside = torch.ones_like(found, dtype=torch.bool)
        rows = torch.arange(len(found)) if placement.rows is None else placement.rows.indices_K
        columns = torch.arange(found.shape[1]) if placement.columns is None else placement.columns.indices_K
        inside = found[rows][:, columns]
        outside[rows[:, None], columns[None]] = False
        # A product of a part is rounded otherwise than that part of the whole product.
        torch.testing.assert_close(inside, expected, rtol=0, atol=16 * EPS * float(expected.abs().max()))
        assert not found[outside].any()
    assert (logits(adapted, IDS) - logits(random_model(family), IDS)).abs().max() > 0.01


def test_what_is_not_the_trained_adapter_is_noticed(tmp_path: Path) -> None:
    full, pruned, trained, out = (tmp_path / name for name in ("full", "pruned", "trained", "recovered"))
    prune_model(save(full), pruned, PruneOptions(layer_ratios=(0.0, 0.5, 0.7, 0.25)))
    train_moram(pruned, trained, density=0.3)
    recover_adapter(trained, pruned, out)
    assert read_manifest(out, with_weights=False).digest == read_manifest(pruned).digest
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.1.self_attn.o_proj.moram_index"))
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, file, metadata={"format": "pt"})
    (out / CHECKSUMS).unlink()
    with pytest.raises(RecoveryMismatch, match=r"moram_index of .*o_proj is not the trained one; recover it again"):
        verify_recovery(trained, pruned, out)
