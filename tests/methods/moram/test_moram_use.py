"""MoRAM in other people's loops, in runs of raymem, and on several workers."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.errors import ModelError, RecipeError
from raymem.methods.moram import MoRAMConfig, select_indices
from raymem.methods.moram.layer import layers
from raymem.methods.peft.kind import stored_buffers
from raymem.recipe.schema import Recipe
from raymem.training.dist_env import DistEnv
from raymem.training.model.build import build_model
from tests.helpers.moram_cases import small_llama, token_batches, trainable, with_moram
from tests.helpers.support import (
    assert_same,
    column,
    in_processes,
    make_recipe,
    realigned,
    run_fragment,
    save_model,
    train,
)

MORAM = {"kind": "moram", "rank": 4, "density": 0.25, "selection_batches": 2}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_three_lines_in_a_bare_loop(checkpointing: bool) -> None:
    from peft import get_peft_model

    model, batches = small_llama(), token_batches(4)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(model.train(), MoRAMConfig(r=4, density=0.25, target_modules="all-linear"))
    select_indices(model, batches)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)

    losses = []
    for _ in range(5):
        loss = model(**batches[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


def test_three_lines_with_the_trainer(tmp_path: Path) -> None:
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    rows = [{name: tensor[0] for name, tensor in batch.items()} for batch in token_batches(8, rows=1)]
    model = get_peft_model(small_llama(), MoRAMConfig(r=4, density=0.25, target_modules="all-linear"))
    select_indices(model, token_batches(2))
    options = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [], "use_cpu": True,
               "logging_steps": 1, "lr_scheduler_type": "constant", "disable_tqdm": True, "save_steps": 2}  # fmt: skip
    trainer = Trainer(model, TrainingArguments(str(tmp_path), max_steps=4, **options), train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    indices = {name: layer.moram_index["default"].clone() for name, layer in layers(model)}

    fresh = get_peft_model(small_llama(), MoRAMConfig(r=4, density=0.25, target_modules="all-linear"))
    resumed = Trainer(fresh, TrainingArguments(str(tmp_path), max_steps=4, **options), train_dataset=rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same({name: layer.moram_index["default"] for name, layer in layers(fresh)}, indices)
    for one, other in zip(trainable(fresh), trainable(model), strict=True):
        torch.testing.assert_close(one, other)


def moram_recipe(llama: Path, examples: Path, storage: Path, *fragments: dict[str, Any]) -> Recipe:
    evaluated = run_fragment(examples, storage, evaluated=True)
    steps = {"train": {"steps": 6, "save_every": 3, "eval_every": 3}, "adapter": MORAM}
    return make_recipe(evaluated, steps, *fragments, model=llama)


def test_a_run_selects_trains_evaluates_merges_and_is_continued(llama: Path, examples: Path, tmp_path: Path) -> None:
    from raymem.training.artifacts.load import load_artifact
    from raymem.training.artifacts.merge import merge

    recipe = moram_recipe(llama, examples, tmp_path)
    outcome, rows = train(recipe)
    assert outcome is not None
    assert column(rows)[-1] < column(rows)[0]
    model, _ = load_artifact(outcome.artifact)
    ids = {"input_ids": torch.arange(3, 20)[None]}
    with torch.no_grad():
        adapted = realigned(model)(**ids).logits
        merged, _ = load_artifact(merge(outcome.artifact, tmp_path / "merged"))
        torch.testing.assert_close(merged(**ids).logits, adapted)
    continued = build_model(
        make_recipe({"adapter": {**MORAM, "init_from": outcome.artifact}}, model=llama), DistEnv()
    ).eval()
    with torch.no_grad():
        assert torch.equal(continued(**ids).logits, adapted)
    with pytest.raises(
        ModelError, match=r"trained with density=0\.25 .* recipe has 0\.5.*; set adapter\.density: 0\.25"
    ):
        build_model(make_recipe({"adapter": {**MORAM, "density": 0.5, "init_from": outcome.artifact}}, model=llama))
    with pytest.raises(ModelError, match=r"is a MORAM adapter; set adapter\.kind: moram"):
        build_model(make_recipe({"adapter": {"init_from": outcome.artifact}}, model=llama))


def test_evaluation_of_a_run_reads_its_adapter(llama: Path, examples: Path, tmp_path: Path) -> None:
    outcome, _ = train(moram_recipe(llama, examples, tmp_path))
    assert outcome is not None
    plain = moram_recipe(llama, examples, tmp_path, {"adapter": {"kind": "none"}})
    model: Any = build_model(plain, DistEnv(), adapter_at=Path(outcome.artifact))
    assert all((layer.moram_index["default"] >= 0).all() for _, layer in layers(model))
    continued: Any = build_model(
        moram_recipe(llama, examples, tmp_path, {"adapter": {"init_from": outcome.artifact}}), DistEnv()
    )
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = continued.eval()(input_ids=ids, use_cache=False).logits
        assert torch.equal(model.eval()(input_ids=ids, use_cache=False).logits, expected)
        with model.disable_adapter():
            assert not torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("refresh", [None, 2], ids=["chosen once", "refreshed"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    llama: Path, examples: Path, tmp_path: Path, refresh: int | None
) -> None:
    again = {"adapter": {"refresh_every": refresh}}
    whole, rows = train(moram_recipe(llama, examples, tmp_path / "whole", again))
    part = moram_recipe(llama, examples, tmp_path / "part", again)
    assert train(part, stop_after=5)[0] is None
    resumed, later = train(part)
    assert whole is not None and resumed is not None
    assert resumed.started_at == 3
    assert column(later)[-3:] == column(rows)[-3:]
    one, other = (Path(o.artifact) / "adapter_model.safetensors" for o in (whole, resumed))
    assert one.read_bytes() == other.read_bytes()


def test_refreshing_changes_the_connections(llama: Path, examples: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    stored = []
    for name, refresh in (("once", None), ("again", 2)):
        outcome, _ = train(moram_recipe(llama, examples, tmp_path / name, {"adapter": {"refresh_every": refresh}}))
        assert outcome is not None
        stored.append(load_file(Path(outcome.artifact) / "adapter_model.safetensors"))
    changed = [k for k in stored[0] if k.endswith("moram_index") and not torch.equal(stored[0][k], stored[1][k])]
    assert changed


def test_a_base_that_changed_under_a_run_is_refused(examples: Path, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    recipe = moram_recipe(base, examples, tmp_path / "runs")
    train(recipe, stop_after=5)
    shutil.rmtree(base)
    save_model(base, initializer_range=0.03)
    with pytest.raises(ModelError, match=r"model\.name: .*the base weight is not the one that the connections"):
        train(recipe)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"density": 1.5}, r"adapter\.density: 1\.5 is outside"),
        ({"k": 3}, r"adapter\.k: 3 and density: 0\.25 say the same thing twice"),
        ({"selection_batches": 0}, "selection_batches: 0 is below 1"),
        ({"refresh_every": 0}, "refresh_every: 0 is below 1"),
        ({"refresh_every": 5, "criterion": "random"}, "would choose the same connections again"),
        ({"criterion": "best"}, "'best' is not one of"),
        ({"targets": []}, "targets: the list is empty"),
        ({"rank": "four"}, r"adapter\.rank"),
        ({"dropout": 0.1}, r"adapter\.dropout: unknown key"),
    ],
    ids=str,
)
def test_bad_options_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe({"adapter": {**MORAM, **section}})


def test_a_peft_that_it_cannot_extend_is_an_error_of_the_recipe_and_breaks_nothing_else(
    llama: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raymem.methods import moram

    monkeypatch.setitem(sys.modules, "raymem.methods.moram.tuner", None)
    moram.register()
    recipe = make_recipe(run_fragment(examples, tmp_path), {"adapter": {"kind": "moram"}}, model=llama)
    with pytest.raises(RecipeError, match=r"adapter\.kind: .*raymem\.methods\.moram\.tuner"):
        build_model(recipe, meta=True)
    plain = make_recipe(run_fragment(examples, tmp_path), model=llama)
    assert build_model(plain, meta=True) is not None


def test_more_connections_than_inputs_name_the_layer(llama: Path) -> None:
    section = {"kind": "moram", "k": 40, "targets": ["q_proj"]}
    with pytest.raises(RecipeError, match=r"adapter\.k: 40 is more than the 32 inputs of model\.layers\.0"):
        build_model(make_recipe({"adapter": section}, model=llama), meta=True)


def test_zero_gradients_name_the_layer(examples: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = save_model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"].zero_()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"adapter: .*layers\.1\.mlp\.down_proj: its gradient .* is zero"):
        train(moram_recipe(base, examples, tmp_path / "runs"))


def run_on_a_rank(raw: dict[str, Any], stop_after: int = 0) -> tuple[Any, list[float], dict[str, torch.Tensor]]:
    """A run on one of several ranks: its artefact, its losses, and what this rank's adapter holds afterwards."""
    import torch.distributed as dist

    import raymem.training.loop as loop

    recipe = Recipe.model_validate(raw)
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    seen: list[Any] = []

    def build(*arguments: Any) -> Any:
        seen.append(build_model(*arguments))
        return seen[-1]

    loop.build_model = build  # type: ignore[attr-defined,assignment]
    outcome, rows = train(recipe, stop_after=stop_after)
    held = {name: parameter for name, parameter in seen[0].named_parameters() if parameter.requires_grad}
    held |= stored_buffers(seen[0])
    full = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in held.items()}
    return outcome and outcome.artifact, column(rows), {name: t.detach().clone() for name, t in full.items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_select_and_train_alike_and_one_goes_on(
    llama: Path, examples: Path, tmp_path: Path, strategy: str
) -> None:
    scaling = {"scaling": {"num_workers": 2, "strategy": strategy}}
    recipe = moram_recipe(llama, examples, tmp_path / "two", scaling)
    first, second = in_processes(run_on_a_rank, 2, tmp_path, recipe.to_dict(), 5)
    assert first[0] is None  # stopped after the checkpoint of step 3
    assert first[1] == second[1]
    assert_same(first[2], second[2])

    resumed, rows = train(moram_recipe(llama, examples, tmp_path / "two"))
    alone, expected = train(moram_recipe(llama, examples, tmp_path / "one"))
    assert resumed is not None and alone is not None
    assert resumed.started_at == 3
    assert column(rows)[-3:] == pytest.approx(column(expected)[-3:], rel=1e-3)


def test_a_4bit_base_in_a_run(examples: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = save_model(tmp_path / "base", hidden_size=64, head_dim=16, intermediate_size=128)
    outcome, rows = train(moram_recipe(base, examples, tmp_path / "runs", {"base": {"quantize": "nf4"}}))
    assert outcome is not None
    assert column(rows)[-1] < column(rows)[0]


def test_conv1d_in_a_run(examples: Path, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "gpt2")
    outcome, rows = train(moram_recipe(base, examples, tmp_path / "runs"))
    assert outcome is not None
    assert column(rows)[-1] < column(rows)[0]


def test_trainable_parameters_are_the_factors_alone() -> None:
    model = with_moram(small_llama())
    assert all(".moram_A." in n or ".moram_B." in n for n, p in model.named_parameters() if p.requires_grad)
