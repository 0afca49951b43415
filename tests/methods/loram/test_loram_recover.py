"""Recovery: bitwise where kept, zero elsewhere, the same function on both sides; and what cannot be recovered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from raymem.errors import ModelError, RecoveryMismatch
from raymem.methods.loram import (
    PruneOptions,
    load_pruned,
    mark_aligned,
    prune_model,
    read_manifest,
    recover_adapter,
    stamp_adapter,
    verify_recovery,
)
from raymem.methods.loram.coupling import couple
from raymem.methods.loram.index_map import place
from raymem.storage.checksums import CHECKSUMS
from tests.helpers.loram_families import FAMILIES, config_of, logits, random_model, save, token_ids

pytestmark = pytest.mark.numerics

RATIOS = PruneOptions(layer_ratios=(0.0, 0.5, 0.7, 0.25))
IDS = token_ids(2, 16, seed=7)


def train_lora(
    pruned: Path, out: Path, *, steps: int = 6, save_options: dict[str, Any] | None = None, **lora: Any
) -> Any:
    """A few AdamW steps of PEFT's LoRA in anyone's loop; B is no longer zero anywhere."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora})
    model = get_peft_model(load_pruned(pruned), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out, **(save_options or {}))
    return model.eval()


def factors(tensors: dict[str, torch.Tensor], module: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tensors[f"base_model.model.{module}.lora_B.weight"], tensors[f"base_model.model.{module}.lora_A.weight"]


def product_agrees(found: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> bool:
    """Whether ``found`` is ``B @ A`` but for rounding: either product of r terms errs by at most r eps / 2 |B| |A|.

    Not bit for bit: how a sum is rounded depends on the shape of the whole product, and on the processor.
    """
    bound = A.shape[0] * torch.finfo(A.dtype).eps * (B.abs() @ A.abs())
    return bool(((found - B @ A).abs() <= bound).all())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with ``full``, ``pruned``, another pruned one ``seed1`` and an ``adapter``; read only."""
    folder = tmp_path_factory.mktemp("loram")
    save(folder / "full")
    prune_model(folder / "full", folder / "pruned", RATIOS, name="org/full", revision="abc")
    prune_model(folder / "full", folder / "seed1", PruneOptions(layer_ratios=RATIOS.layer_ratios, seed=1))
    train_lora(folder / "pruned", folder / "adapter")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_recovery_is_exact(family: str, tmp_path: Path) -> None:
    full, pruned, trained, out = (tmp_path / name for name in ("full", "pruned", "trained", "recovered"))
    manifest = prune_model(save(full, family), pruned, RATIOS)
    small = train_lora(pruned, trained, lora_bias=family == "qwen2", use_rslora=family == "opt")
    recover_adapter(trained, pruned, out)

    coupling, before = couple(config_of(family)), load_file(trained / "adapter_model.safetensors")
    after = load_file(out / "adapter_model.safetensors")
    reference = random_model(family)
    modules = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in before}
    assert len(modules) == 4 * len(coupling.linears)
    for module in modules:
        placement, (B, A), (large_B, large_A) = (
            place(coupling, manifest.kept, module), factors(before, module), factors(after, module)
        )  # fmt: skip
        found = large_B @ large_A
        assert found.shape == reference.get_submodule(module).weight.shape
        outputs, inputs = found.shape
        rows = torch.arange(outputs) if placement.rows is None else placement.rows.indices_K
        columns = torch.arange(inputs) if placement.columns is None else placement.columns.indices_K
        assert torch.equal(large_B[rows], B) and torch.equal(large_A[:, columns], A)
        assert product_agrees(found[rows][:, columns], B, A)
        assert not product_agrees(found[rows][:, columns.roll(1)], B, A), "every unit has its own place"
        outside = torch.ones(outputs, inputs, dtype=torch.bool)
        outside[rows[:, None], columns[None]] = False
        assert not found[outside].any()
        assert found.any()

    checked = verify_recovery(trained, pruned, out, full=full)
    assert checked.num_factors == len(before) and checked.num_weights and checked.logit_difference < 1e-5  # type: ignore[operator]
    adapted = PeftModel.from_pretrained(reference, out).eval()
    assert (logits(adapted, IDS) - logits(small, IDS)).abs().max() > 0.05, "the full model is another"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_leaves_pruned_positions_bit_identical(llama: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    recover_adapter(llama / "adapter", llama / "pruned", tmp_path / "recovered")
    original = random_model("llama").to(dtype)
    weights = {name: value.clone() for name, value in original.state_dict().items()}
    merged = PeftModel.from_pretrained(original, tmp_path / "recovered").merge_and_unload()
    manifest, coupling = read_manifest(llama / "pruned"), couple(config_of("llama"))
    anything_changed = False
    for name, value in merged.state_dict().items():
        placement = place(coupling, manifest.kept, name.removesuffix(".weight"))
        changed = value != weights[name]
        anything_changed |= bool(changed.any())
        if placement.rows is not None:
            assert not changed.index_fill(0, placement.rows.indices_K, False).any()
        if placement.columns is not None:
            assert not changed.index_fill(1, placement.columns.indices_K, False).any()
    assert anything_changed


def test_ratio_zero_is_lora(llama: Path, tmp_path: Path) -> None:
    """The limit: the same training on an unpruned copy and on the full model gives the same adapter, and recovery is
    the identity."""
    prune_model(llama / "full", tmp_path / "copy", PruneOptions(ratio=0.0))
    train_lora(tmp_path / "copy", tmp_path / "adapter")
    train_lora(llama / "full", tmp_path / "lora")
    recover_adapter(tmp_path / "adapter", tmp_path / "copy", tmp_path / "recovered")
    expected = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    found = load_file(tmp_path / "recovered" / "adapter_model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_an_aligned_model_recovers_into_the_original(llama: Path, tmp_path: Path) -> None:
    """Trained further after pruning: other weights, the same units; the adapter belongs to it alone."""
    model = load_pruned(llama / "pruned")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "aligned")
    with pytest.raises(ModelError, match="is not of the sizes"):
        mark_aligned(llama / "full", llama / "pruned", {})
    manifest = mark_aligned(tmp_path / "aligned", llama / "pruned", {"steps": 3})
    assert manifest.digest != read_manifest(llama / "pruned").digest
    train_lora(tmp_path / "aligned", tmp_path / "adapter")
    stamp_adapter(tmp_path / "adapter", tmp_path / "aligned")
    with pytest.raises(RecoveryMismatch, match="was trained on another pruned model"):
        recover_adapter(tmp_path / "adapter", llama / "pruned", tmp_path / "recovered")
    recover_adapter(tmp_path / "adapter", tmp_path / "aligned", tmp_path / "recovered")
    checked = verify_recovery(tmp_path / "adapter", tmp_path / "aligned", tmp_path / "recovered", full=llama / "full")
    assert checked.num_weights is None and checked.logit_difference is not None


@pytest.mark.parametrize("criterion", ["magnitude", "sparsegpt"])
def test_of_zeros_in_dense_weights_recovery_is_the_identity(llama: Path, criterion: Any, tmp_path: Path) -> None:
    options = PruneOptions(structure="2:4", criterion=criterion, keep_first=0, keep_last=0)
    pruned = tmp_path / "zeros"
    prune_model(llama / "full", pruned, options, None if criterion == "magnitude" else IDS)
    train_lora(pruned, tmp_path / "adapter")
    recover_adapter(tmp_path / "adapter", pruned, tmp_path / "recovered")
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    after = load_file(tmp_path / "recovered" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    checked = verify_recovery(tmp_path / "adapter", pruned, tmp_path / "recovered", full=llama / "full")
    assert (checked.num_weights is None) == (criterion == "sparsegpt")


def test_the_result_names_the_full_base(llama: Path, tmp_path: Path) -> None:
    adapter = copied(llama / "adapter", tmp_path / "adapter")
    (adapter / "raymem.json").write_text(json.dumps({"step": 6, "peak_bytes": 123}))
    (adapter / "tokenizer.json").write_text("{}")
    stamp_adapter(adapter, llama / "pruned")
    out = recover_adapter(adapter, llama / "pruned", tmp_path / "new" / "recovered")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/full", "abc")
    facts = json.loads((out / "raymem.json").read_text())
    assert facts["peak_bytes"] == 123
    assert facts["loram"]["manifest"] == read_manifest(llama / "pruned").digest
    assert facts["loram"]["criterion"] == "random"
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "loram_manifest.json",
        "raymem.json",
        "raymem.sha256",
        "tokenizer.json",
    ]
    assert recover_adapter(adapter, llama / "pruned", out) == out
    assert sorted(path.name for path in out.parent.iterdir()) == ["recovered"]


def test_a_tied_head_may_be_a_target(tmp_path: Path) -> None:
    prune_model(save(tmp_path / "full", "qwen3"), tmp_path / "pruned", RATIOS)
    targets = ["q_proj", "lm_head"]
    train_lora(tmp_path / "pruned", tmp_path / "adapter", target_modules=targets)
    recover_adapter(tmp_path / "adapter", tmp_path / "pruned", tmp_path / "recovered")
    verify_recovery(tmp_path / "adapter", tmp_path / "pruned", tmp_path / "recovered", full=tmp_path / "full")


def test_the_head_may_be_a_target(llama: Path, tmp_path: Path) -> None:
    """PEFT then saves the head's base weights too; they are dropped only because they are the base's."""
    targets = ["q_proj", "down_proj", "lm_head"]
    train_lora(
        llama / "pruned", tmp_path / "adapter", target_modules=targets, save_options={"save_embedding_layers": True}
    )
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    copies = [key for key in load_file(path) if "lora_" not in key]
    assert copies, "PEFT no longer saves a targeted head; the rule can go"
    recover_adapter(tmp_path / "adapter", llama / "pruned", tmp_path / "recovered")
    found = load_file(tmp_path / "recovered" / "adapter_model.safetensors")
    assert all("lora_" in key for key in found) and any("lm_head.lora_B" in key for key in found)

    tensors = load_file(path)
    tensors[copies[0]][0, 0] += 1
    save_file(tensors, path)
    with pytest.raises(RecoveryMismatch, match="a whole weight, which would overwrite the full model's"):
        recover_adapter(tmp_path / "adapter", llama / "pruned", tmp_path / "again")


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"use_dora": True}, "use_dora=True cannot be recovered exactly: DoRA's magnitudes"),
        ({"bias": "all"}, "bias='all' cannot be recovered exactly"),
        ({"bias": "lora_only"}, "bias='lora_only' cannot be recovered exactly"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.'lm_head'. cannot be recovered exactly"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' cannot .* changes the base weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embedding LoRA, which would overwrite"),
    ],
)
def test_what_peft_can_do_and_recovery_cannot(llama: Path, lora: dict[str, Any], words: str, tmp_path: Path) -> None:
    lora = {"target_modules": ["q_proj", "down_proj"], **lora}
    train_lora(llama / "pruned", tmp_path / "adapter", steps=1, save_options={"save_embedding_layers": False}, **lora)
    with pytest.raises(RecoveryMismatch, match=words):
        recover_adapter(tmp_path / "adapter", llama / "pruned", tmp_path / "recovered")
    assert not (tmp_path / "recovered").exists()


@pytest.mark.parametrize("option", ["corda", "loftq", "pissa_niter_4", "mica", "something_new"])
def test_starts_that_change_the_base_are_refused_by_config(llama: Path, option: str, tmp_path: Path) -> None:
    adapter = edited(llama / "adapter", tmp_path / "adapter", init_lora_weights=option)
    with pytest.raises(RecoveryMismatch, match=f"init_lora_weights='{option}'"):
        recover_adapter(adapter, llama / "pruned", tmp_path / "recovered")


def test_options_of_a_later_peft_are_refused(llama: Path, tmp_path: Path) -> None:
    adapter = edited(llama / "adapter", tmp_path / "adapter", use_new_idea=True)
    with pytest.raises(RecoveryMismatch, match=r"use_new_idea=True .*it is unknown what this option does"):
        recover_adapter(adapter, llama / "pruned", tmp_path / "recovered")


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True, "lora_bias": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal", "r": 4},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 2]},
    ],
)
def test_what_recovers_beside_the_plain_thing(llama: Path, lora: dict[str, Any], tmp_path: Path) -> None:
    train_lora(llama / "pruned", tmp_path / "adapter", steps=2, **lora)
    recover_adapter(tmp_path / "adapter", llama / "pruned", tmp_path / "recovered")
    verify_recovery(tmp_path / "adapter", llama / "pruned", tmp_path / "recovered", full=llama / "full")


def copied(adapter: Path, target: Path) -> Path:
    target.mkdir()
    for path in adapter.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def edited(adapter: Path, target: Path, **options: Any) -> Path:
    copied(adapter, target)
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **options}))
    return target


def test_an_adapter_of_another_plan_is_refused(llama: Path, tmp_path: Path) -> None:
    """Equal shapes, other units: only the manifest can tell."""
    with pytest.raises(RecoveryMismatch, match="it cannot be known which units it was trained on"):
        recover_adapter(llama / "adapter", llama / "seed1", tmp_path / "recovered")
    adapter = copied(llama / "adapter", tmp_path / "adapter")
    stamp_adapter(adapter, llama / "pruned")
    with pytest.raises(RecoveryMismatch, match="was trained on another pruned model"):
        recover_adapter(adapter, llama / "seed1", tmp_path / "recovered")


def test_shapes_that_do_not_fit_are_refused(llama: Path, tmp_path: Path) -> None:
    adapter = copied(llama / "adapter", tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "layers.1.mlp.up_proj.lora_B" in key)
    save_file({**tensors, key: tensors[key][:-1].contiguous()}, path)
    with pytest.raises(RecoveryMismatch, match=r"lora_B.weight has shape \[23, 3\] but the pruned layer is \[24, 32\]"):
        recover_adapter(adapter, llama / "pruned", tmp_path / "recovered")


def _swap_units(tensors: dict[str, torch.Tensor]) -> None:
    key = next(key for key in tensors if "layers.2.mlp.up_proj.lora_B" in key)
    tensors[key] = tensors[key].flip(0).contiguous()


def _leave_a_rest(tensors: dict[str, torch.Tensor]) -> None:
    key = next(key for key in tensors if "layers.2.mlp.down_proj.lora_A" in key)
    tensors[key][:, (tensors[key] == 0).all(0).nonzero()[0]] = 1e-9


def _lose_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[0]]


@pytest.mark.parametrize("damage", [_swap_units, _leave_a_rest, _lose_one])
def test_the_verifier_sees_a_wrong_recovery(
    llama: Path, damage: Callable[[dict[str, torch.Tensor]], None], tmp_path: Path
) -> None:
    """The same adapter in the wrong units, a value outside them, a factor lost."""
    out = recover_adapter(llama / "adapter", llama / "pruned", tmp_path / "recovered")
    tensors = load_file(out / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, out / "adapter_model.safetensors")
    (out / CHECKSUMS).unlink()
    with pytest.raises(RecoveryMismatch, match="recover it again"):
        verify_recovery(llama / "adapter", llama / "pruned", out, forward=False)


def test_the_verifier_refuses_another_base(llama: Path, tmp_path: Path) -> None:
    out = recover_adapter(llama / "adapter", llama / "pruned", tmp_path / "recovered")
    other = tmp_path / "other"
    random_model("llama", seed=1).save_pretrained(other)
    with pytest.raises(ModelError, match=r"is not the base that was pruned .model.safetensors differs"):
        verify_recovery(llama / "adapter", llama / "pruned", out, full=other)


def test_adapters_that_are_none(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="give the directory of a PEFT adapter"):
        recover_adapter(tmp_path, llama / "pruned", tmp_path / "out")
    with pytest.raises(ModelError, match="is not of LoRAM"):
        recover_adapter(llama / "adapter", llama / "full", tmp_path / "out")
    adapter = edited(llama / "adapter", tmp_path / "adapter", peft_type="LOHA")
    with pytest.raises(RecoveryMismatch, match="an adapter of kind LOHA"):
        recover_adapter(adapter, llama / "pruned", tmp_path / "out")
    cut = copied(llama / "adapter", tmp_path / "cut") / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-8])
    with pytest.raises(ModelError, match="not a complete safetensors file"):
        recover_adapter(cut.parent, llama / "pruned", tmp_path / "out")
    with pytest.raises(ModelError, match="is not the recovery of"):
        recover_adapter(llama / "adapter", llama / "pruned", tmp_path)
