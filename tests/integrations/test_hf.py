"""raymem in Hugging Face's Trainer: the same numbers as raymem's own loop, the budget, checkpoints, and refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, default_data_collator

import raymem
from raymem.errors import BudgetExceeded, PlanError, RaymemError, RecipeError
from raymem.integrations.hf import RaymemCallback, apply
from raymem.recipe.schema import Recipe
from tests.helpers.support import column, in_processes, make_recipe, run_fragment, save_model, train
from tests.helpers.trainers import Meter, Row, arguments_for, losses, rows_of, train_as_rank

LORACT = {"kind": "loract", "rank": 0.25}
MORAM = {"kind": "moram", "rank": 4, "alpha": 8.0, "density": 0.25, "selection_batches": 2}
COMBINED: dict[str, Any] = {"adapter": MORAM, "activations": {**LORACT, "report_every": 2}, "loss": "chunked",
                            "optimizer": {"kind": "adamw", "lr": 1e-2}}  # fmt: skip
FULL: dict[str, Any] = {"adapter": "none", "optimizer": {"kind": "mlorc_adamw", "rank": 2, "min_dim": 16, "lr": 3e-3}}
STEADY = {"data": {"packing": "none"}, "train": {"schedule": "constant", "warmup": 0, "steps": 5}}


def recipe_with(axes: dict[str, Any], llama: Path, examples: Path, tmp_path: Path) -> Recipe:
    return make_recipe(run_fragment(examples, tmp_path / "runs"), STEADY, axes, model=llama)


def trainer_of(
    llama: Path, recipe: Recipe, axes: Any, output: Path, *, callbacks: Any = (), rows: list[Row] | None = None,
    parts: dict[str, Any] | None = None, **more: Any,
) -> Trainer:  # fmt: skip
    """A Trainer with the axes, on the rows of the recipe; ``more`` are arguments of training."""
    run = apply(AutoModelForCausalLM.from_pretrained(llama), axes)
    optimizer = {"optimizer_cls_and_kwargs": run.optimizer_cls_and_kwargs} if "optimizer" in run.settings.asked else {}
    return Trainer(
        run.model, arguments_for(recipe, output, **more), train_dataset=rows_of(recipe) if rows is None else rows,
        data_collator=default_data_collator, callbacks=[RaymemCallback(run), *callbacks], **optimizer, **(parts or {}),
    )  # fmt: skip


def callback_of(trainer: Any) -> RaymemCallback:
    (callback,) = [found for found in trainer.callback_handler.callbacks if isinstance(found, RaymemCallback)]
    return callback


@pytest.mark.parametrize(
    ("axes", "precision"),
    [(COMBINED, "fp32"), (FULL, "fp32"), (COMBINED, "bf16_mixed")],
    ids=["LoRAct + MoRAM + chunked", "MLorc, full", "mixed precision"],
)
def test_a_trainer_computes_what_raymem_does_and_takes_what_is_planned(
    axes: dict[str, Any], precision: str, llama: Path, examples: Path, tmp_path: Path
) -> None:
    recipe = recipe_with({**axes, "train": {"precision": precision}}, llama, examples, tmp_path)
    _, rows = train(recipe)
    meter = Meter()
    trainer = trainer_of(llama, recipe, {**axes, "budget": "1GiB"}, tmp_path / "out", callbacks=[meter])
    trainer.train()
    assert losses(trainer) == pytest.approx(column(rows), rel=1e-5 if precision == "fp32" else 1e-3)
    plan = callback_of(trainer).plan
    assert plan is not None
    allowed = 0.02 if precision == "fp32" else 0.04  # of a model of 0.1 MB: what autocast keeps of it is 10 KB
    assert abs(plan.step_peak_bytes - meter.peak_bytes) <= allowed * meter.peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [{"adapter": MORAM, "activations": LORACT, "loss": "chunked"},
     {"adapter": {"kind": "lora", "rank": 4}, "activations": {**LORACT, "scope": "linear"}}],
    ids=["MoRAM + LoRAct + chunked", "LoRA + LoRAct of linear layers"],
)  # fmt: skip
def test_four_bits_of_transformers_are_planned(axes: dict[str, Any], examples: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install raymem[quant])")
    wide = save_model(tmp_path / "wide", hidden_size=128, intermediate_size=256, head_dim=32)
    recipe = recipe_with({"train": {"steps": 3}}, wide, examples, tmp_path)

    def trainer(*, double: bool) -> tuple[Trainer, RaymemCallback, Meter]:
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(wide, quantization_config=four_bits, device_map={"": "cpu"})
        run = apply(model, {**axes, "budget": "1GiB"})
        callback, meter, args = RaymemCallback(run), Meter(), arguments_for(recipe, tmp_path / "out")
        rows: Any = rows_of(recipe)
        parts = {"data_collator": default_data_collator, "callbacks": [callback, meter]}
        return Trainer(run.model, args, train_dataset=rows, **parts), callback, meter

    four, callback, meter = trainer(double=True)
    four.train()
    assert callback.plan is not None
    assert abs(callback.plan.step_peak_bytes - meter.peak_bytes) <= 0.02 * meter.peak_bytes
    with pytest.raises(PlanError, match="bnb_4bit_use_double_quant=True, or leave budget out"):
        trainer(double=False)[0].train()


def test_metrics_of_methods_stand_beside_the_trainers(llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = recipe_with(COMBINED, llama, examples, tmp_path)
    _, rows = train(recipe)
    trainer = trainer_of(llama, recipe, COMBINED, tmp_path / "out")
    trainer.train()
    logged: list[float] = [row["activation_error"] for row in trainer.state.log_history if "activation_error" in row]
    assert logged == pytest.approx(column(rows, "activation_error"), rel=1e-4)


@pytest.mark.parametrize(
    "axes", [{**COMBINED, "activations": {"kind": "loract", "rank": "auto"}}, FULL], ids=["LoRAct + MoRAM", "MLorc"]
)
def test_a_checkpoint_is_continued_exactly(axes: Any, llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = recipe_with(axes, llama, examples, tmp_path)
    whole = trainer_of(llama, recipe, axes, tmp_path / "out", save_strategy="steps", save_steps=3)
    whole.train()
    again = trainer_of(llama, recipe, axes, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert losses(again)[-2:] == losses(whole)[-2:]
    theirs, ours = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    if "activations" in axes:
        assert callback_of(again)._hooks[-1].state_dict() == callback_of(whole)._hooks[-1].state_dict() != {}


def test_a_saved_adapter_loads_in_plain_peft(llama: Path, examples: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    recipe = recipe_with(COMBINED, llama, examples, tmp_path)
    trainer = trainer_of(
        llama, recipe, COMBINED, tmp_path / "out", parts={"processing_class": AutoTokenizer.from_pretrained(llama)}
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    inputs = {"input_ids": rows_of(recipe)[0]["input_ids"][None]}
    loaded: Any = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ours, _ = raymem.load(tmp_path / "adapter")
    trained: Any = trainer.model.eval()
    with torch.no_grad():
        expected = trained(**inputs).logits
        torch.testing.assert_close(loaded.eval()(**inputs).logits, expected)
        torch.testing.assert_close(ours(**inputs).logits, expected)


def test_a_step_above_the_budget_is_refused_before_it(llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = recipe_with({}, llama, examples, tmp_path)
    trainer = trainer_of(llama, recipe, {"budget": "100KiB"}, tmp_path / "out")
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(
        BudgetExceeded, match=r"budget: a step of 2 rows .* above 100KiB; most of it is .* lower it: .*"
    ):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    assert trainer.state.global_step == 0 and not losses(trainer)


def test_a_file_and_a_recipe_are_taken_as_a_mapping_is(llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = recipe_with(COMBINED, llama, examples, tmp_path)
    (tmp_path / "axes.yaml").write_text("adapter: {kind: lora, rank: 4}\nloss: chunked\nbudget: 1GiB\n")
    model = AutoModelForCausalLM.from_pretrained(llama)
    run = apply(model, tmp_path / "axes.yaml")
    assert run.settings.asked == {"adapter", "loss"} and run.settings.budget_bytes == 1 << 30
    assert run.base is model and run.model is not model
    whole = apply(AutoModelForCausalLM.from_pretrained(llama), recipe)
    assert whole.settings.recipe.adapter == recipe.adapter and whole.settings.has_lr
    raw = {name: value for name, value in recipe.to_dict().items() if name in ("model", "data", "train")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    usual = apply(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "recipe.yaml")
    assert usual.settings.asked == {"adapter", "activations", "loss", "optimizer"}, "a recipe's defaults count"
    assert usual.model.peft_config["default"].r == 16


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "nothing is asked for"),
    ({"adaptor": "lora"}, "adaptor: unknown key; did you mean 'adapter'"),
    ({"adapter": {"kind": "lora", "rnk": 4}}, r"adapter\.rnk: unknown key"),
    ({"loss": "chunked", "train": {"steps": 3}}, "train: the trainer has that of its own"),
    ({"base": {"quantize": "nf4"}, "adapter": "lora"}, "base: the trainer's model is built"),
    ({"adapter": "lora", "optimizer": "mlorc_adamw"}, "an adapter is refused"),
    ({"budget": "lots"}, "budget: 'lots' is no amount of memory"),
]


@pytest.mark.parametrize(("axes", "message"), REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_settings_that_make_no_sense_are_refused_by_name(axes: dict[str, Any], message: str, llama: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        apply(AutoModelForCausalLM.from_pretrained(llama), axes)


ARGUMENTS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"activations": LORACT}, {"gradient_checkpointing": True}, "set gradient_checkpointing=False"),
    ({"loss": "chunked"}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ({"loss": "chunked"}, {"torch_compile": True}, "torch_compile=True is not tried"),
    ({"optimizer": {"lr": 1e-3}}, {"learning_rate": 3e-4}, r"learning_rate=0\.0003 and optimizer\.lr: 0\.001 differ"),
    ({"optimizer": "adamw"}, {"weight_decay": 0.1}, r"set optimizer\.weight_decay"),
    ({**FULL, "optimizer": {"kind": "mlorc_adamw", "step_in_backward": True}}, {}, r"here .*max_grad_norm"),
]


@pytest.mark.parametrize(("axes", "more", "message"), ARGUMENTS, ids=[message[:30] for *_, message in ARGUMENTS])
def test_arguments_that_contradict_the_settings_are_refused(
    axes: dict[str, Any], more: dict[str, Any], message: str, llama: Path, examples: Path, tmp_path: Path
) -> None:
    recipe = recipe_with({}, llama, examples, tmp_path)
    with pytest.raises(RaymemError, match=message):
        trainer_of(llama, recipe, axes, tmp_path / "out", rows=[], **more)


def test_a_trainer_that_does_not_use_what_was_applied_is_refused(llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = recipe_with({}, llama, examples, tmp_path)
    rows, model = rows_of(recipe), AutoModelForCausalLM.from_pretrained(llama)
    run = apply(model, {"adapter": {"kind": "lora", "rank": 4}, "optimizer": {"lr": 1e-3}})

    def refused(arguments: dict[str, Any], message: str) -> None:
        args = arguments_for(recipe, tmp_path / "out")
        with pytest.raises(RecipeError, match=message):
            Trainer(**{"model": run.model, "args": args, "train_dataset": rows, "callbacks": [RaymemCallback(run)],
                       **arguments}).train()  # fmt: skip

    refused({}, "give it optimizer_cls_and_kwargs")
    refused({"model": AutoModelForCausalLM.from_pretrained(llama)}, "give it run.model")
    lossy = apply(AutoModelForCausalLM.from_pretrained(llama), {"loss": "chunked"})
    refused(
        {"model": lossy.model, "callbacks": [RaymemCallback(lossy)],
         "compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.mean()},
        "without asking the model for it",
    )  # fmt: skip


def test_the_learning_rate_is_the_trainers_where_none_is_named(llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = recipe_with({}, llama, examples, tmp_path)
    trainer = trainer_of(llama, recipe, {"optimizer": "mlorc_lion"}, tmp_path / "out", rows=[], learning_rate=3e-4)
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {3e-4}
    named = trainer_of(llama, recipe, {"optimizer": {"lr": 1e-3}}, tmp_path / "out", rows=[])
    assert {group["lr"] for group in named.create_optimizer().param_groups} == {1e-3}
    factory, options = callback_of(named).run.optimizer_cls_and_kwargs
    by_older_transformers = factory([{"params": []}], **options)
    assert sum(len(group["params"]) for group in by_older_transformers.param_groups) == len(
        list(named.model.parameters())
    )


@pytest.mark.slow
def test_two_ranks_choose_and_compute_what_one_does(llama: Path, examples: Path, tmp_path: Path) -> None:
    axes = {name: COMBINED[name] for name in ("adapter", "loss", "optimizer")} | {"budget": "1GiB"}
    recipe = recipe_with({**axes, "train": {"steps": 4}}, llama, examples, tmp_path)
    shared = recipe.model_copy(update={"train": recipe.train.model_copy(update={"global_batch": 2})})
    rows = rows_of(recipe)
    ranks = in_processes(train_as_rank, 2, tmp_path / "meet", shared, axes, llama, tmp_path / "out", rows)
    (theirs, one), (_, other) = ranks
    assert all(torch.equal(one[name], other[name]) for name in one)
    trainer = trainer_of(llama, recipe, axes, tmp_path / "alone")
    trainer.train()
    assert theirs == pytest.approx(losses(trainer), rel=1e-5)
    alone = trainer.model.state_dict()
    chosen = [(one[name], alone[name]) for name in one if "moram_index" in name]
    assert chosen and all((ours == theirs).float().mean() > 0.99 for ours, theirs in chosen), "but for rounding"


def test_a_step_in_backward_is_taken_with_no_clipping(llama: Path, examples: Path, tmp_path: Path) -> None:
    axes = {**FULL, "optimizer": {**FULL["optimizer"], "step_in_backward": True}}
    one_pass = {"train": {"global_batch": 2, "clip_norm": None, "steps": 3}}
    recipe = recipe_with({**axes, **one_pass}, llama, examples, tmp_path)
    _, rows = train(recipe)
    trainer = trainer_of(llama, recipe, axes, tmp_path / "out")
    trainer.train()
    assert losses(trainer) == pytest.approx(column(rows), rel=1e-5)


def test_a_loss_that_is_none_of_the_next_token_is_refused(llama: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    with pytest.raises(RecipeError, match="LlamaForSequenceClassification is no causal language model"):
        apply(AutoModelForSequenceClassification.from_pretrained(llama), {"loss": "auto"})


def test_generate_and_logits_stay_as_they_were(llama: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(llama).eval()
    run = apply(AutoModelForCausalLM.from_pretrained(llama), {"loss": "chunked"})
    ids = torch.arange(3, 15)[None]
    assert torch.equal(run.model.eval()(ids).logits, plain(ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(run.model.generate(ids, **options), plain.generate(ids, **options))
    ours, theirs = run.model(ids, labels=ids), plain(ids, labels=ids)
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, theirs.loss)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    summed = run.model(input_ids=ids, shift_labels=shifted, num_items_in_batch=1, return_dict=False)[0]
    torch.testing.assert_close(summed, 11 * theirs.loss)
