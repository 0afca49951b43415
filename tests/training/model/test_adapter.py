"""LoRA: which layers get it, and continuing an adapter that was trained before."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from raymem.errors import ModelError, RecipeError
from raymem.training.artifacts.load import load_artifact
from raymem.training.artifacts.merge import merge
from raymem.training.dist_env import DistEnv
from raymem.training.model.build import build_model
from raymem.training.optim import build_updater
from raymem.training.step import train_step
from tests.helpers.support import (
    assert_same,
    in_processes,
    make_recipe,
    num_targets,
    random_batch,
    realigned,
    save_model,
    save_tokenizer,
    snapshot,
)


def targets(model: Any) -> set[str]:
    """Last part of the name of every layer that has an adapter."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name.split(".lora_")[0].rpartition(".")[2] for name in names}


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (r".*\.(k|o)_proj", {"k_proj", "o_proj"}),
        (["self_attn.q_proj"], {"q_proj"}),
        ([r".*\.q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ("q_proj", {"q_proj"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # the same in every process
)
def test_targets_choose_layers(llama: Path, wanted: Any, found: set[str]) -> None:
    assert targets(build_model(make_recipe({"adapter": {"targets": wanted}}, model=llama), meta=True)) == found


def test_layers_written_as_conv1d_are_found(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "gpt2", "gpt2")
    assert targets(build_model(make_recipe({"adapter": {"targets": ["c_attn"]}}, model=directory), meta=True)) == {
        "c_attn"
    }


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["q_porj"], r"adapter\.targets: 'q_porj' matches no linear layer of LlamaForCausalLM; near names: q_proj"),
        (["q_proj", "query"], r"adapter\.targets: 'query' matches no linear layer"),
        (["embed_tokens"], r"adapter\.targets: 'embed_tokens' matches no linear layer"),
        ("(q_proj", r"adapter\.targets: '\(q_proj' is not a valid pattern"),
    ],
    ids=str,
)
def test_a_pattern_that_matches_nothing_is_named(llama: Path, wanted: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_model(make_recipe({"adapter": {"targets": wanted}}, model=llama), meta=True)


def test_dropout_acts_in_training_only(llama: Path) -> None:
    model = build_model(make_recipe({"adapter": {"dropout": 0.5}}, model=llama))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.ones_(parameter)
    inputs = random_batch(1, 8).model_inputs()
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.eval()
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.fixture(scope="module")
def trained(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A PEFT directory of rank 4 after a few steps, and its tensors by parameter name."""
    recipe = make_recipe(model=llama)
    model: Any = build_model(recipe)
    updater = build_updater(model, recipe)
    for step in range(3):
        batch = random_batch(2, 12, step)
        train_step(model, [batch], num_targets(batch), updater, step, 1e-2)
    directory = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(directory)
    return directory, snapshot(updater.parameters)


def continuing(directory: Path, **changes: Any) -> dict[str, Any]:
    return {"adapter": {"init_from": str(directory), **changes}}


def test_an_adapter_is_continued_bitwise(llama: Path, trained: Any) -> None:
    directory, weights = trained
    model = build_model(make_recipe(continuing(directory), model=llama))
    assert_same({name: p for name, p in model.named_parameters() if p.requires_grad}, weights)


def test_an_adapter_is_continued_in_the_precision_of_the_recipe(llama: Path, trained: Any) -> None:
    directory, weights = trained
    recipe = make_recipe(continuing(directory), {"train": {"precision": "bf16"}}, model=llama)
    found = {name: p for name, p in build_model(recipe).named_parameters() if p.requires_grad}
    assert_same(found, {name: value.bfloat16() for name, value in weights.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, r"4.*8.*; set adapter\.rank"),
        ({"targets": ["q_proj"]}, r"trained on other layers than adapter\.targets selects .*use the same targets"),
    ],
    ids=["rank", "targets"],
)
def test_an_adapter_of_another_shape_is_refused(llama: Path, trained: Any, changes: Any, message: str) -> None:
    with pytest.raises(ModelError, match=r"adapter\.init_from: .*" + message):
        build_model(make_recipe(continuing(trained[0], **changes), model=llama), DistEnv())


def test_a_directory_without_an_adapter_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"adapter\.init_from: {tmp_path}.*; give a PEFT directory"):
        build_model(make_recipe(continuing(tmp_path), model=llama))


def test_a_damaged_adapter_is_refused(llama: Path, trained: Any, tmp_path: Path) -> None:
    shutil.copytree(trained[0], tmp_path / "copy")
    path = tmp_path / "copy" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ModelError, match=rf"adapter\.init_from: {path}"):
        build_model(make_recipe(continuing(path.parent), model=llama))


@pytest.mark.parametrize("option", ["alpha", "rank"])
def test_an_adapter_that_would_mean_something_else_is_refused(option: str, llama: Path, tmp_path: Path) -> None:
    """The same tensors under another alpha would be another function."""
    build_model(make_recipe(model=llama)).save_pretrained(tmp_path)  # type: ignore[operator]
    changed = {"adapter": {option: 8 if option == "rank" else 99.0, "init_from": str(tmp_path)}}
    with pytest.raises(ModelError, match=rf"would change what it does; set adapter\.{option}"):
        build_model(make_recipe(changed, model=llama))


def loaded_by_lora(model: str) -> tuple[bool, bool]:
    """Whether bitsandbytes was imported, and whether PEFT finds it afterwards."""
    build_model(make_recipe(model=model))
    from peft.import_utils import is_bnb_available

    return "bitsandbytes" in sys.modules, is_bnb_available()


def test_bitsandbytes_is_left_alone_until_a_model_has_its_layers(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    assert in_processes(loaded_by_lora, 0, tmp_path, str(llama)) == [(False, True)]


def with_saved_base(base: Path, directory: Path, change: Any = None) -> dict[str, Any]:
    """An adapter of the head as plain PEFT saves it, with the head itself; and the fragment that continues it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options = {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "q_proj"], "init_lora_weights": False}
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(directory)
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        assert "base_model.model.lm_head.base_layer.weight" in set(file.keys())
    return continuing(directory, rank=4, alpha=8.0, targets=["lm_head", "q_proj"])


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_an_adapter_that_holds_its_base_too_is_continued(family: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = save_model(tmp_path / "base", family)
    fragment = with_saved_base(base, tmp_path / "adapter")
    reference = realigned(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"))
    inputs = random_batch(2, 12, packed=False).model_inputs()
    with torch.no_grad():
        found = build_model(make_recipe(fragment, model=base)).eval()(**inputs).logits
        assert torch.equal(found, reference.eval()(**inputs).logits)


def test_an_adapter_that_holds_another_base_is_refused_with_a_cure_that_works(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    fragment = with_saved_base(base, tmp_path / "adapter", lambda model: model.lm_head.base_layer.weight.mul_(2))
    with pytest.raises(
        ModelError, match=rf"holds lm_head\.weight of the base with other values .*raymem merge {tmp_path}"
    ):
        build_model(make_recipe(fragment, model=base))
    save_tokenizer(tmp_path / "adapter")
    merged = merge(tmp_path / "adapter", tmp_path / "merged")
    expected, _ = load_artifact(tmp_path / "adapter")
    inputs = random_batch(2, 12, packed=False).model_inputs()
    with torch.no_grad():
        found = build_model(make_recipe(model=merged)).eval()(**inputs).logits
        torch.testing.assert_close(found, expected(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_a_resized_base_is_refused_with_a_cure_that_works(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = save_model(tmp_path / "base")
    resized = AutoModelForCausalLM.from_pretrained(base)
    resized.resize_token_embeddings(140)
    resized.save_pretrained(tmp_path / "resized")
    fragment = with_saved_base(tmp_path / "resized", tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"lm_head\.weight of the base as \[140, 32\] but this base has \[128, 32\]"):
        build_model(make_recipe(fragment, model=base))
    resized = AutoModelForCausalLM.from_pretrained(base)
    resized.resize_token_embeddings(140)
    merged = PeftModel.from_pretrained(resized, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    inputs = random_batch(2, 12, packed=False).model_inputs()
    fresh = make_recipe({"model": {"tokenizer": str(base)}}, model=tmp_path / "merged")
    with torch.no_grad():
        found = build_model(fresh).eval()(**inputs).logits
        assert torch.equal(found, realigned(merged).eval()(**inputs).logits)
