"""Merging layer by layer: to the bit what PEFT makes of the whole model, in the room of two matrices."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.errors import ModelError
from raymem.storage.checksums import difference
from raymem.storage.safetensors_io import read_header, read_tensor
from raymem.training.artifacts import merge as merging
from raymem.training.artifacts.load import load_artifact
from raymem.training.artifacts.merge import merge
from tests.helpers.peft_adapters import save_peft
from tests.helpers.resident import status_bytes
from tests.helpers.support import in_processes, save_model

MIB = 2**20


def save_adapter(folder: Path, base: Path, **options: Any) -> Path:
    """Write a LoRA with random values, as plain PEFT does."""
    from peft import LoraConfig

    return save_peft(folder, base, LoraConfig(r=4, lora_alpha=8, **options))


def refuse(*_: Any) -> Any:
    raise AssertionError("the model was merged in memory")


def by_peft(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)
    state: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return state


def stored(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    entries = {key: entry for file in files for key, entry in read_header(directory, file)[1].items()}
    return {key: read_tensor(directory, entry) for key, entry in entries.items()}


LINEAR = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": "all-linear", "use_rslora": True}),
        ("llama", {"target_modules": LINEAR, "use_dora": True}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]}),
        ("gpt_neox", {"target_modules": ["query_key_value"], "bias": "all"}),
        ("gpt_neox", {"target_modules": ["query_key_value", "dense"], "lora_bias": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
    ids=["plain", "dora", "embedding and head", "biases", "bias of its own", "transposed"],
)
def test_every_tensor_is_what_peft_makes_of_the_whole_model(
    family: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    base = save_model(tmp_path / "base", family, max_shard_size="20KB", dtype=dtype)
    adapter = save_adapter(tmp_path / "adapter", base, **options)
    monkeypatch.setattr(merging, "_write_whole", refuse)
    monkeypatch.setattr(merging, "_BLOCK", 200)  # a few rows
    merged = merge(adapter, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(merged, dtype=dtype).state_dict()
    for name, tensor in by_peft(base, adapter, dtype).items():
        assert torch.equal(loaded[name], tensor.to(dtype)), name
    found, before = stored(merged), stored(base)
    assert found.keys() == before.keys() and all(tensor.dtype == dtype for tensor in found.values())
    assert sum(not torch.equal(tensor, before[name]) for name, tensor in found.items()) >= 4
    assert difference(merged) is None
    assert {path.name for path in base.glob("*.safetensors*")} == {path.name for path in merged.glob("*.safetensors*")}
    assert len(list(merged.glob("*.safetensors"))) > 1
    index, its_base = (json.loads((d / "model.safetensors.index.json").read_text()) for d in (merged, base))
    assert index["weight_map"] == its_base["weight_map"]
    assert index["metadata"]["total_size"] == its_base["metadata"]["total_size"]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["adapted embedding", "saved embedding", "saved head", "adapted head"],
)
def test_what_was_tied_has_a_value_of_its_own_where_only_one_side_is_changed(
    options: dict[str, Any], tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", "llama_tied")
    adapter = save_adapter(tmp_path / "adapter", base, **options)
    merged = merge(adapter, tmp_path / "merged")
    config = json.loads((merged / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head.weight" in stored(merged)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = load_artifact(adapter)[0](input_ids=ids).logits
        found = load_artifact(merged)[0](input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_base_that_the_adapter_changes_when_it_is_attached_is_merged_in_memory(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], init_lora_weights="pissa")
    merged, expected = stored(merge(adapter, tmp_path / "merged")), by_peft(base, adapter, torch.float32)
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(merged[name], expected[name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged[name], stored(base)[name], atol=1e-3)


def test_a_weight_that_is_not_finite_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = save_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight holds numbers that are nan"):
        merge(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


# Layers of 8 MiB; about 170 MB in all.
LARGE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 5,
    "head_dim": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
_M_MMAP_THRESHOLD = -3
SLACK = 8 * MIB
"""Module objects, headers, the interpreter's own; far less than the model."""


def rise(small: str, adapter: str, output: str) -> int:
    """How far resident memory rises at most while an adapter is merged, once a small one was."""
    merge(small, f"{output}-small")  # imports and first uses are not what is measured
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MIB)  # else glibc keeps what is freed, up to the largest matrix twice
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    merge(adapter, output)
    return status_bytes("VmHWM") - before


def test_it_takes_two_matrices_above_the_adapter(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc/self/clear_refs (Linux)")
    base = save_model(tmp_path / "base", max_shard_size="30MB", **LARGE)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules="all-linear")
    small = save_adapter(tmp_path / "small", save_model(tmp_path / "small-base"), target_modules="all-linear")
    (found,) = in_processes(rise, 0, tmp_path / "meet", str(small), str(adapter), str(tmp_path / "merged"))
    tensors = stored(base)
    largest = max(tensor.nbytes for tensor in tensors.values())
    own = (adapter / "adapter_model.safetensors").stat().st_size
    assert sum(tensor.nbytes for tensor in tensors.values()) > 3 * (2 * largest + own + SLACK)
    assert found <= 2 * largest + own + SLACK
