"""raymem in TRL's SFTTrainer: LoRAct, MoRAM, the loss in chunks and the budget together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from raymem.errors import RecipeError
from raymem.integrations.hf import RaymemCallback, apply
from tests.helpers.support import column, train
from tests.helpers.trainers import Meter, arguments_for, losses, rows_of
from tests.integrations.test_hf import COMBINED, LORACT, recipe_with

trl = pytest.importorskip("trl", reason="TRL is not installed (pip install raymem[trl])")


def sft(llama: Path, recipe: Any, axes: dict[str, Any], output: Path, callbacks: Any = (), **more: Any) -> Any:
    """An SFTTrainer with the axes, on the rows of the recipe."""
    from datasets import Dataset

    run = apply(AutoModelForCausalLM.from_pretrained(llama), axes)
    rows = [
        {"input_ids": row["input_ids"][mask].tolist(), "labels": row["labels"][mask].tolist()}
        for row in rows_of(recipe)
        for mask in [row["attention_mask"].bool()]
    ]
    optimizer = {"optimizer_cls_and_kwargs": run.optimizer_cls_and_kwargs} if "optimizer" in run.settings.asked else {}
    padding = recipe.data.sequence_length  # as raymem pads: LoRAct compresses what it is given
    options = {
        "gradient_checkpointing": False,
        "pad_to_multiple_of": padding,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        **more,
    }
    return trl.SFTTrainer(
        run.model, arguments_for(recipe, output, trl.SFTConfig, **options), train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(llama), callbacks=[RaymemCallback(run), *callbacks], **optimizer,
    )  # fmt: skip


@pytest.mark.slow
def test_sft_computes_what_raymem_does_and_takes_what_is_planned(llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = recipe_with(COMBINED, llama, examples, tmp_path)
    _, rows = train(recipe)
    meter = Meter()
    trainer = sft(llama, recipe, {**COMBINED, "budget": "1GiB"}, tmp_path / "out", [meter])
    trainer.train()
    assert losses(trainer) == pytest.approx(column(rows), rel=1e-5)
    assert {"activation_error", "mean_token_accuracy"} <= set(trainer.state.log_history[0])
    (callback,) = [found for found in trainer.callback_handler.callbacks if isinstance(found, RaymemCallback)]
    assert callback.plan is not None
    assert abs(callback.plan.step_peak_bytes - meter.peak_bytes) <= 0.02 * meter.peak_bytes
    (tmp_path / "adapter").mkdir()
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_what_sft_does_by_itself_is_named(llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = recipe_with({}, llama, examples, tmp_path)
    with pytest.raises(RecipeError, match=r"SFTConfig turns it on by itself"):
        sft(llama, recipe, {"activations": LORACT}, tmp_path / "out", gradient_checkpointing=True)
    trainer = sft(llama, recipe, {"loss": "full"}, tmp_path / "out")
    with pytest.raises(RecipeError, match="this trainer computes the loss itself"):
        trainer.train()
