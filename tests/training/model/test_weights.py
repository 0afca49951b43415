"""Loading takes little: in tensors (any family, any number of files) and in bytes (one file above a rank's share)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymem.errors import ModelError
from raymem.memory.meter import storage_bytes
from raymem.recipe.schema import Recipe
from raymem.training.dist_env import DistEnv, local_rows
from raymem.training.model.build import build_model
from tests.helpers.resident import status_bytes
from tests.helpers.support import (
    FAMILIES,
    in_processes,
    let_anyone_in,
    make_recipe,
    random_batch,
    realigned,
    save_model,
)

FULL = {"adapter": {"kind": "none"}}
MIB = 1 << 20


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Any:
    """A model directory whose tensors are those of the tiny Llama after ``change``."""

    def make(change: Any) -> Path:
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / file).write_bytes((llama / file).read_bytes())
        tensors = load_file(llama / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return make


def build(directory: Path) -> Any:
    return build_model(make_recipe(FULL, {"data": {"packing": "none"}}, model=directory))


def test_a_complete_copy_loads(copy: Any, llama: Path) -> None:
    inputs = random_batch(1, 12).model_inputs()
    with torch.no_grad():
        assert torch.equal(build(copy(lambda tensors: None))(**inputs).logits, build(llama)(**inputs).logits)


def test_a_missing_tensor_is_named(copy: Any) -> None:
    with pytest.raises(
        ModelError, match=r"1 tensors are missing .*the first is model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        build(copy(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")))


def test_a_tensor_that_the_architecture_lacks_is_left_over(copy: Any) -> None:
    build(copy(lambda tensors: tensors.update({"value_head.weight": torch.zeros(3)})))


def test_a_tensor_of_another_shape_is_named_with_both(copy: Any) -> None:
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[31\] in the checkpoint but \[32\]"):
        build(copy(lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)})))


def test_a_truncated_file_is_named(copy: Any) -> None:
    directory = copy(lambda tensors: None)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a complete safetensors file .*; fetch it again"):
        build(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to act as another user")
def test_a_file_that_this_user_may_not_read_is_not_called_missing(copy: Any, tmp_path: Path) -> None:
    directory = copy(lambda tensors: None)
    (refused,) = in_processes(refusal_of_nobody, 0, tmp_path / "meet", directory)
    assert refused == f"{directory}/model.safetensors: permission denied; let this user read it"


def refusal_of_nobody(directory: Path) -> str:
    build(directory)  # all is imported: the interpreter itself may be closed to others
    let_anyone_in(directory)
    (directory / "model.safetensors").chmod(0o600)
    os.seteuid(65534)
    with pytest.raises(ModelError) as error:
        build(directory)
    return str(error.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", max_shard_size="20KB")
    lost = max(directory.glob("model-*.safetensors"))
    lost.unlink()
    with pytest.raises(ModelError, match=rf"{lost.name}: not a complete safetensors file"):
        build(directory)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", max_shard_size="20KB")
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text()[:50])
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json is not JSON .*; fetch it again"):
        build(directory)


def test_pickled_weights_are_refused_unread(copy: Any) -> None:
    directory = copy(lambda tensors: None)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds no model\.safetensors .*raymem reads no pickled weights"):
        build(directory)


@pytest.mark.parametrize(("rows", "world"), [(8, 2), (7, 2), (3, 4), (1, 3), (0, 2), (5, 1)])
def test_the_rows_of_all_ranks_are_those_of_chunk(rows: int, world: int) -> None:
    numbers = torch.arange(rows)
    found = [numbers[local_rows(rows, rank, world)] for rank in range(world)]
    assert torch.equal(torch.cat(found), numbers)
    for part, chunk in zip(found, torch.chunk(numbers, world), strict=False):
        assert torch.equal(part, chunk)


# About 170 MB in six files: large against what the interpreter itself does meanwhile.
LARGE: dict[str, Any] = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 7,
    "head_dim": 64,
    "num_attention_heads": 8,
}
SLACK = 8 * MIB
"""Config, module objects, shards of norms, gloo buffers; far less than one file."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("large") / "model", max_shard_size="34MB", **LARGE)


def load_and_measure(raw: dict[str, Any]) -> dict[str, int]:
    """Bytes of this rank's share, and how far resident memory rose at most while the model was built."""
    recipe = Recipe.model_validate(raw)
    dist_env = DistEnv.current(recipe)
    tiny = make_recipe(FULL, {"scaling": raw["scaling"]}, model=raw["model"]["tokenizer"])
    build_model(tiny, dist_env)  # imports and first uses are not what is measured
    build_model(recipe, dist_env, meta=True)  # nor is what is asked once about an architecture
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    model = build_model(recipe, dist_env)
    return {"share": storage_bytes(model.parameters()), "rise": status_bytes("VmHWM") - before}


@pytest.mark.parametrize("world", [1, 2])
def test_loading_needs_one_file_above_the_share_of_a_rank(large: Path, llama: Path, tmp_path: Path, world: int) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc/self/clear_refs (Linux)")
    scaling = {"num_workers": world, "strategy": "fsdp2"}
    recipe = make_recipe(FULL, {"scaling": scaling, "model": {"tokenizer": str(llama)}}, model=large)
    found = in_processes(load_and_measure, world, tmp_path, recipe.to_dict())
    index = json.loads((large / "model.safetensors.index.json").read_text())
    whole = index["metadata"]["total_size"]
    files = [path.stat().st_size for path in large.glob("model-*.safetensors")]
    assert whole > 4 * (max(files) + SLACK), "otherwise the bound would prove nothing"
    for rank in found:
        assert rank["share"] == pytest.approx(whole / world, rel=0.01)
        assert rank["rise"] <= rank["share"] + max(files) + SLACK
        assert rank["rise"] >= 0.9 * rank["share"], "the measurement sees the share itself"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["5GB", "15KB"])
def test_logits_are_those_of_transformers(family: str, max_shard_size: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = save_model(tmp_path / "model", family, max_shard_size=max_shard_size)
    assert (len(list(directory.glob("*.safetensors"))) > 1) == (max_shard_size == "15KB")
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    model = build(directory)
    realigned(reference)
    inputs = random_batch(2, 12, packed=False).model_inputs()
    torch.manual_seed(0)  # OPT and GPT-2 have dropout in their configs
    expected = reference(**inputs).logits
    torch.manual_seed(0)
    found = model(**inputs).logits
    assert found.abs().max() > 1e-3
    assert torch.equal(found, expected)
    assert {n: (p.shape, p.dtype) for n, p in model.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in reference.named_parameters()
    }, "and what is tied there is tied here"
    buffers = dict(reference.named_buffers())
    assert {name for name, _ in model.named_buffers()} == set(buffers)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_a_checkpoint_of_another_dtype_is_converted(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = save_model(tmp_path / "model")
    recipe = make_recipe(FULL, {"train": {"precision": "bf16"}}, model=directory)
    inputs = random_batch(1, 8, packed=False).model_inputs()
    reference = realigned(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16))
    assert torch.equal(build_model(recipe)(**inputs).logits, reference(**inputs).logits)
