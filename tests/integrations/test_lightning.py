"""raymem in Lightning: the same numbers as raymem's own loop, the budget, checkpoints, metrics and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from raymem.errors import BudgetExceeded, RecipeError
from raymem.memory.meter import PeakMeter, resident_tensors
from tests.helpers.support import column, train
from tests.helpers.trainers import rows_of, state_of
from tests.integrations.test_hf import COMBINED, FULL, LORACT, recipe_with

L = pytest.importorskip("lightning", reason="Lightning is not installed (pip install raymem[lightning])")

from raymem.integrations.lightning import RaymemCallback, apply  # noqa: E402


class Module(L.LightningModule):  # type: ignore[name-defined]
    """What a user writes."""

    def __init__(self, model: Any, axes: Any) -> None:
        super().__init__()
        self.run = apply(model, axes)
        self.model = self.run.model

    def training_step(self, batch: Any, index: int) -> Any:
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        if "optimizer" in self.run.settings.asked:
            return self.run.build_optimizer()
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], fused=True)


class Watch(L.Callback):  # type: ignore[name-defined]
    """Keeps every step's figures, and measures the peak of one; stands behind raymem's callback."""

    def __init__(self, metered: int = 2) -> None:
        self.rows: list[dict[str, float]] = []
        self.metered, self.peak_bytes = metered, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.metered:
            state = [*state_of(trainer.optimizers[0]), *batch.values()]
            self.meter = PeakMeter(torch.device("cpu"), lambda: resident_tensors(pl_module.model, state))
            self.meter.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.metered + 1 and not self.peak_bytes:
            self.meter.__exit__(None, None, None)
            assert self.meter.peak is not None
            self.peak_bytes = self.meter.peak.allocated_bytes
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(
    llama: Path, recipe: Any, axes: Any, folder: Path, *, callbacks: Any = (), resume: Any = None,
    rows: int | None = None, **more: Any,
) -> tuple[Any, Module]:  # fmt: skip
    """Train the axes on the rows of the recipe, or so many of them, one micro-batch a step."""
    module = Module(AutoModelForCausalLM.from_pretrained(llama), axes)
    options = {"enable_checkpointing": False, "gradient_clip_val": recipe.train.clip_norm, **more}
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", max_steps=recipe.train.steps, logger=False, devices=1,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        callbacks=[RaymemCallback(module.run), *callbacks], **options,
    )  # fmt: skip
    data: Any = rows_of(recipe)[:rows]
    trainer.fit(module, DataLoader(data, batch_size=recipe.train.rows_per_pass), ckpt_path=resume)
    return trainer, module


ONE_PASS = {"train": {"global_batch": 2}}
"""Lightning takes the mean of micro-batches, whatever number of targets each has; raymem that of all targets."""


@pytest.mark.parametrize("axes", [COMBINED, FULL], ids=["LoRAct + MoRAM + chunked", "MLorc, full"])
def test_lightning_computes_what_raymem_does_and_takes_what_is_planned(
    axes: dict[str, Any], llama: Path, examples: Path, tmp_path: Path
) -> None:
    recipe = recipe_with({**axes, **ONE_PASS}, llama, examples, tmp_path)
    _, rows = train(recipe)
    watch = Watch()
    trainer, _ = fit(llama, recipe, {**axes, "budget": "1GiB"}, tmp_path, callbacks=[watch])
    assert [row["loss"] for row in watch.rows] == pytest.approx(column(rows), rel=1e-5)
    (callback,) = [found for found in trainer.callbacks if isinstance(found, RaymemCallback)]
    assert callback.plan is not None
    allowed = 0.03  # of a model of 0.1 MB: Lightning itself holds some KB
    assert abs(callback.plan.step_peak_bytes - watch.peak_bytes) <= allowed * watch.peak_bytes
    if "activations" in axes:
        assert watch.rows[2]["activation_error"] == pytest.approx(column(rows, "activation_error")[1], rel=1e-4)


def test_a_checkpoint_is_continued_exactly(llama: Path, examples: Path, tmp_path: Path) -> None:
    axes = {**COMBINED, "activations": {"kind": "loract", "rank": "auto"}}
    recipe = recipe_with({**axes, **ONE_PASS}, llama, examples, tmp_path)
    saving = L.pytorch.callbacks.ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1
    )
    # Lightning begins an interrupted epoch with its first batch again; this checkpoint is of the end of one.
    _, whole = fit(llama, recipe, axes, tmp_path, callbacks=[saving], enable_checkpointing=True, rows=6)
    trainer, again = fit(llama, recipe, axes, tmp_path, resume=tmp_path / "step=3.ckpt", rows=6)
    assert trainer.global_step == 5
    theirs, ours = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_what_contradicts_the_settings_is_refused_by_name(llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = recipe_with({}, llama, examples, tmp_path)
    with pytest.raises(BudgetExceeded, match=r"above 10KiB"):
        fit(llama, recipe, {"activations": LORACT, "budget": "10KiB"}, tmp_path)
    with pytest.raises(RecipeError, match="precision='64-true' is not among"):
        fit(llama, recipe, {"activations": LORACT}, tmp_path, precision="64-true")
    stepping = {**FULL, "optimizer": {"kind": "mlorc_adamw", "rank": 2, "min_dim": 16, "step_in_backward": True}}
    with pytest.raises(RecipeError, match=r"train\.clip_norm"):
        fit(llama, recipe, stepping, tmp_path)
