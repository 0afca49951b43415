"""What leaves a run is read by the plain tools, and computes what was trained."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.errors import StorageError
from raymem.recipe.schema import Recipe
from raymem.storage.storage import Storage
from raymem.training.artifacts.export import artifact_name, export_final
from raymem.training.dist_env import DistEnv
from raymem.training.model.build import build_model
from raymem.training.optim import build_updater
from raymem.training.step import train_step
from tests.helpers.support import FAMILIES, make_recipe, num_targets, random_batch, realigned, save_model

FULL = {"adapter": {"kind": "none"}}


def trained(recipe: Recipe) -> Any:
    model = build_model(recipe)
    updater = build_updater(model, recipe)
    for step in range(2):
        batch = random_batch(2, 12, step)
        train_step(model, [batch], num_targets(batch), updater, step, 1e-2)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**random_batch(2, 12, 9, packed=False).model_inputs()).logits


def export(model: Any, recipe: Recipe, directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    return Path(export_final(model, recipe, DistEnv(), Storage.open(str(directory)), {"step": 2}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fragment", [FULL, {}], ids=["full", "lora"])
def test_the_plain_tools_load_what_was_trained(family: str, fragment: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = save_model(tmp_path / "base", family)
    recipe = make_recipe(fragment, {"data": {"packing": "none"}}, model=directory)
    model = trained(recipe)
    path = export(model, recipe, tmp_path / "run")
    assert path.name == artifact_name(recipe) == ("model" if fragment else "adapter")
    if fragment:
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        named = json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert named == str(directory)
        base = AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, path)
    assert torch.equal(logits(realigned(loaded)), logits(model))
    assert not torch.equal(logits(model), logits(build_model(recipe))), "training did something"
    assert AutoTokenizer.from_pretrained(path).eos_token == "<end>"
    assert not list(path.glob("*.bin")) and not list(path.parent.glob(".*"))


COMPANIONS = {
    "generation_config.json": '{"eos_token_id": [0, 5, 7], "do_sample": false, "temperature": 0.3, "top_p": 0.8}',
    "chat_template.jinja": "{{ messages[0].content }}",
    "special_tokens_map.json": '{"eos_token": "<end>"}',
    "preprocessor_config.json": '{"size": 3}',
    "processor_config.json": '{"kind": "p"}',
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "LICENSE": "yes",
    "NOTICE.txt": "of something",
}
OF_TRAINING = ("optimizer.pt", "trainer_state.json", "rng_state.pth", "model-00009.safetensors", "x.gguf",
               "pytorch_model.bin", "pytorch_model.bin.index.json", "training_args.bin", "LICENSE.large")  # fmt: skip


def with_companions(directory: Path) -> Path:
    (directory / "additional_chat_templates").mkdir()
    for name, text in COMPANIONS.items():
        (directory / name).write_text(text)
    for name in OF_TRAINING:
        (directory / name).write_text("{}" if name != "LICENSE.large" else "x" * (1 << 21))
    return directory


def assert_companions(directory: Path, leaving: set[str] | frozenset[str] = frozenset()) -> None:
    for name, text in COMPANIONS.items():
        if name in leaving:
            assert not (directory / name).exists(), name
        else:
            assert (directory / name).read_text() == text, name
    assert not [name for name in OF_TRAINING if (directory / name).exists()]


def test_what_lies_beside_the_weights_of_a_base_leaves_with_a_trained_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = with_companions(save_model(tmp_path / "base"))
    recipe = make_recipe(FULL, model=base)
    path = export(trained(recipe), recipe, tmp_path / "run")
    assert_companions(path)
    assert AutoModelForCausalLM.from_pretrained(path).generation_config.eos_token_id == [0, 5, 7]
    assert AutoTokenizer.from_pretrained(path).chat_template is not None


def test_another_tokenizer_keeps_its_own_files(llama: Path, tmp_path: Path) -> None:
    base = with_companions(save_model(tmp_path / "base"))
    recipe = make_recipe(FULL, {"model": {"tokenizer": str(llama)}}, model=base)
    path = export(build_model(recipe), recipe, tmp_path / "run")
    templates = {"chat_template.jinja", "special_tokens_map.json", "additional_chat_templates/tools.jinja"}
    assert_companions(path, templates)


def test_a_merged_model_has_them_too(tmp_path: Path) -> None:
    from raymem.training.artifacts.merge import merge

    base = with_companions(save_model(tmp_path / "base"))
    recipe = make_recipe(model=base)
    adapter = export(trained(recipe), recipe, tmp_path / "run")
    assert not (adapter / "generation_config.json").exists() and not (adapter / "LICENSE").exists()
    assert_companions(merge(adapter, tmp_path / "merged"))


def test_a_trained_model_says_nothing_of_a_quantisation(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    (base / "quantize_config.json").write_text("{}")
    recipe = make_recipe(FULL, model=base)
    path = export(build_model(recipe), recipe, tmp_path / "run")
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
    assert not (path / "quantize_config.json").exists()


def test_a_bf16_run_leaves_bf16(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    recipe = make_recipe(FULL, {"train": {"precision": "bf16"}}, model=llama)
    path = export(trained(recipe), recipe, tmp_path / "run")
    assert AutoModelForCausalLM.from_pretrained(path, dtype="auto").dtype == torch.bfloat16


def test_raymems_own_facts_lie_beside(llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(model=llama)
    path = export(trained(recipe), recipe, tmp_path / "run")
    facts = json.loads((path / "raymem.json").read_text())
    assert facts["step"] == 2
    assert Recipe.model_validate(facts["recipe"]) == recipe
    assert path.stat().st_mode & 0o055 == 0o055, "others may read it, as the files beside it"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("fragment", [FULL, {}], ids=["full", "lora"])
def test_every_file_has_the_rights_of_the_umask(
    llama: Path, tmp_path: Path, umask: int, fragment: dict[str, Any]
) -> None:
    recipe = make_recipe(fragment, model=llama)
    before = os.umask(umask)
    try:
        path = export(build_model(recipe), recipe, tmp_path / "run")
    finally:
        os.umask(before)
    files = {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()}
    assert any(name.endswith(".safetensors") for name in files)
    assert set(files.values()) == {0o666 & ~umask}, files


def test_a_second_export_replaces_the_first(llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(model=llama)
    model = build_model(recipe)
    (export(model, recipe, tmp_path / "run") / "old.txt").write_text("")
    path = export(trained(recipe), recipe, tmp_path / "run")
    assert not (path / "old.txt").exists() and (path / "raymem.json").exists()


def test_what_a_killed_export_left_does_not_stay(llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(model=llama)
    model = build_model(recipe)
    left = tmp_path / "run" / ".export" / "half.safetensors"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    path = export(model, recipe, tmp_path / "run")
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == [path.name]
    assert not (path / left.name).exists()


def test_an_export_that_cannot_be_written_leaves_the_earlier_one(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(model=llama)
    model = build_model(recipe)
    path = export(model, recipe, tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(StorageError, match=r"cannot write .*run/adapter: no space left .*only repeats this last part"):
        export(model, recipe, tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before
    assert (path / "raymem.json").is_file()


def test_buffers_of_a_trained_model_leave_with_it(llama: Path, tmp_path: Path) -> None:
    """Some routers keep a trained bias in a buffer; it is not a parameter and must not be lost."""
    recipe = make_recipe(FULL, model=llama)
    model: Any = build_model(recipe)
    model.model.layers[0].register_buffer("router_bias", torch.full((3,), 0.7))
    model.model.layers[0].register_buffer("scratch", torch.ones(3), persistent=False)
    from safetensors.torch import load_file

    saved = load_file(export(model, recipe, tmp_path / "run") / "model.safetensors")
    assert torch.equal(saved["model.layers.0.router_bias"], torch.full((3,), 0.7))
    assert "model.layers.0.scratch" not in saved


def test_a_full_disk_is_a_storage_error(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    model = build_model(make_recipe(model=llama))

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(StorageError, match="no space left on the device"):
        export(model, make_recipe(model=llama), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
