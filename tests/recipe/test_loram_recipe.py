"""``base.kind: loram`` in a recipe: what it may say, what it means for the model, and its calibration texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.errors import DataError, ModelError, RecipeError
from raymem.methods.loram import LoRAMOptions, PruneOptions, prune_model
from raymem.methods.loram.manifest import read_manifest
from raymem.recipe.load import alignment, parse_recipe
from raymem.recipe.schema import Recipe
from raymem.runs.loram.calibration_texts import calibration_ids
from raymem.storage.storage import Storage
from raymem.training.artifacts.export import export_final
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.dist_env import DistEnv
from raymem.training.model.build import build_model
from tests.helpers.support import make_recipe, prepare_split, run_fragment

BASE = {"kind": "loram", "layer_ratios": [0.5, 0.75]}
TRAIN = {"steps": 3, "global_batch": 2, "micro_batch": 2}


def test_a_recipe_is_the_same_after_its_journey() -> None:
    recipe = make_recipe({"base": {**BASE, "quantize": "nf4", "align": {"train": TRAIN}}})
    assert isinstance(recipe.base, LoRAMOptions)
    assert recipe.base.layer_ratios == (0.5, 0.75)
    assert Recipe.model_validate(recipe.to_dict()) == recipe
    assert recipe.base.pruning == PruneOptions(layer_ratios=(0.5, 0.75))
    assert make_recipe({"base": "loram"}).base == LoRAMOptions()


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ({"ratio": 1.0}, r"base\.ratio: 1\.0 is outside \[0, 1\)"),
        ({"ratio": "half"}, r"base\.ratio: 'half': input should be a valid number"),
        ({"critrion": "taylor"}, r"base\.critrion: unknown key; did you mean 'criterion'\?"),
        ({"criterion": "sparsegpt"}, r"base\.criterion: sparsegpt cannot choose"),
        ({"calibration_length": 1}, r"base\.calibration_length: 1 is too small"),
        ({"artifact": "/pruned", "ratio": 0.3}, r"base\.artifact: /pruned is pruned already, so ratio"),
        ({"align": {"model": {"name": "x"}}}, r"base\.align\.model: not a section of it; known here: data"),
        ({"align": {"train": {"step": 3}}}, r"base\.align: train\.step: unknown key; did you mean 'steps'"),
        ({"align": {"optimizer": {"lr": -1}}}, r"base\.align: optimizer\.lr: -1: input should be greater than 0"),
    ],
    ids=str,
)
def test_what_it_may_not_say(base: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        make_recipe({"base": {"kind": "loram", **base}})
    assert len(str(caught.value).splitlines()) == 1


def test_paths_of_all_its_parts_become_absolute(tmp_path: Path) -> None:
    raw = make_recipe().to_dict()
    align = {"data": {"train": "./general.jsonl"}, "train": TRAIN}
    raw["base"] = {"kind": "loram", "calibration": "./texts.jsonl", "align": align}
    base = parse_recipe(raw, base_dir=tmp_path).base
    assert isinstance(base, LoRAMOptions) and base.align is not None
    assert base.calibration == str(tmp_path / "texts.jsonl")
    assert base.align["data"]["train"][0]["path"] == str(tmp_path / "general.jsonl")
    raw["base"] = {"kind": "loram", "artifact": "pruned"}
    assert parse_recipe(raw, base_dir=tmp_path).base.artifact == str(tmp_path / "pruned")


def test_alignment_trains_all_but_the_head() -> None:
    mlorc = {"kind": "mlorc_adamw", "rank": 2}
    recipe = make_recipe({"base": {**BASE, "align": {"train": TRAIN, "optimizer": mlorc}}})
    run = alignment(recipe, name="aligned")
    assert run is not None
    assert (run.name, run.base.kind, run.adapter.kind, run.optimizer.kind) == ("aligned", "full", "none", "mlorc_adamw")
    assert run.train.steps == 3
    assert run.adapter.freeze == ["lm_head"]
    assert alignment(make_recipe({"base": BASE})) is None


def test_what_is_frozen(llama: Path) -> None:
    model = build_model(make_recipe({"adapter": {"kind": "none", "freeze": ["lm_head"]}}, model=llama), meta=True)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    with pytest.raises(RecipeError, match=r"adapter\.freeze: 'lm_haed' is no module of .*near names: lm_head"):
        build_model(make_recipe({"adapter": {"kind": "none", "freeze": ["lm_haed"]}}, model=llama), meta=True)


def test_a_plan_needs_no_pruned_model_and_training_does(llama: Path, tmp_path: Path) -> None:
    planned = make_recipe({"base": BASE}, model=llama)
    prune_model(llama, tmp_path / "pruned", planned.base.pruning)
    real = make_recipe({"base": {"kind": "loram", "artifact": str(tmp_path / "pruned")}}, model=llama)

    def shapes(recipe: Recipe, meta: bool) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in build_model(recipe, meta=meta).named_parameters()}

    assert shapes(planned, meta=True) == shapes(real, meta=False)
    with pytest.raises(ModelError, match="is not pruned yet; run `raymem loram prune` with this recipe"):
        build_model(planned)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj", "lm_head"]], ids=str)
def test_an_exported_adapter_carries_the_manifest_and_no_base_weights(
    targets: Any, llama: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    manifest = prune_model(llama, tmp_path / "pruned", PruneOptions(layer_ratios=(0.5, 0.75)))
    base = {"kind": "loram", "artifact": str(tmp_path / "pruned")}
    recipe = make_recipe({"base": base, "adapter": {"targets": targets}}, model=llama)
    directory = Path(export_final(build_model(recipe), recipe, DistEnv(), Storage.open(str(tmp_path)), {}))
    assert read_manifest(directory, with_weights=False).digest == manifest.digest
    assert all(".lora_" in name for name in load_file(directory / "adapter_model.safetensors"))
    card = (directory / "README.md").read_text()
    assert f"An adapter of a pruned `{llama.name}`" in card
    assert "| base | `loram` (criterion random, keep_first 4, keep_last 2, ratio 0.5, " in card
    assert str(tmp_path) not in card


def test_qloram_holds_the_pruned_layers_in_four_bits(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    prune_model(llama, tmp_path / "pruned", PruneOptions(layer_ratios=(0.5, 0.5)))
    base = {"kind": "loram", "artifact": str(tmp_path / "pruned"), "quantize": "nf4"}
    model = build_model(make_recipe({"base": base}, model=llama))
    kinds = {type(p).__name__ for name, p in model.named_parameters() if name.endswith("base_layer.weight")}
    assert kinds == {"Params4bit"}
    ids = torch.arange(16).view(1, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_calibration_texts(llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = make_recipe(run_fragment(examples, tmp_path), model=llama)
    rows = PackedRows(prepare_split(recipe, "train").directories)
    first = calibration_ids(rows, 4, 16, seed=0)
    assert first.shape == (4, 16) and first.dtype == torch.int64
    assert torch.equal(first, calibration_ids(rows, 4, 16, seed=0))
    assert not torch.equal(first, calibration_ids(rows, 4, 16, seed=1))
    assert int((first == 1).sum()) == 0, "no padding"
    with pytest.raises(DataError, match=r"base\.calibration: the data has \d+ tokens, and calibration_texts: 1000"):
        calibration_ids(rows, 1000, 16, seed=0)
