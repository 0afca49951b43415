"""What leaves a run is read by the plain tools, and computes what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import FAMILIES, make_recipe, num_targets, random_batch, realigned, save_model

from raymem.errors import StorageError
from raymem.training.export import artifact_name, export_final
from raymem.training.layout import Layout
from raymem.training.model import build_model
from raymem.training.optim import build_updater
from raymem.training.recipe import Recipe
from raymem.training.step import train_step
from raymem.training.storage import Storage

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
        return model.eval()(**random_batch(2, 12, 9, packed=False).model_inputs()).logits  # type: ignore[no-any-return]


def export(model: Any, recipe: Recipe, directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    return Path(export_final(model, recipe, Layout(), Storage.open(str(directory)), {"step": 2}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fragment", [FULL, {}], ids=["full", "lora"])
def test_the_plain_tools_load_what_was_trained(family: str, fragment: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = save_model(tmp_path / "base", family)
    recipe = make_recipe(fragment, model=directory)
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
    with pytest.raises(StorageError, match=r"run/adapter: the result cannot be written: No space left"):
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
    with pytest.raises(StorageError, match="No space left"):
        export(model, make_recipe(model=llama), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
