"""raymem's plugin in axolotl: its own plugin manager calls it in axolotl's order, around a Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, default_data_collator

from raymem.errors import RecipeError
from raymem.integrations.axolotl_args import RaymemArgs
from tests.helpers.support import column, train
from tests.helpers.trainers import arguments_for, losses, rows_of
from tests.integrations.test_hf import COMBINED, FULL, LORACT, recipe_with

base = pytest.importorskip("axolotl.integrations.base", reason="axolotl is not installed")

PLUGIN = "raymem.integrations.axolotl.RaymemPlugin"


@pytest.fixture
def manager() -> Iterator[Any]:
    """axolotl's manager with nothing but raymem's plugin."""
    manager = base.PluginManager.get_instance()
    before = dict(manager.plugins)
    manager.plugins.clear()
    manager.register(PLUGIN)
    yield manager
    manager.plugins.clear()
    manager.plugins.update(before)


def config(**values: Any) -> Any:
    return base.DictDefault({"plugins": [PLUGIN], **values})


def trained(manager: Any, cfg: Any, llama: Path, recipe: Any, output: Path) -> Any:
    """Do what axolotl does with its plugins to load, build a trainer and train."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    loaded = manager.load_adapter(model, cfg) if cfg.adapter else None
    model = model if loaded is None else loaded[0]
    manager.post_model_load(cfg, model)
    trainer = Trainer(
        model, arguments_for(recipe, output), train_dataset=rows_of(recipe), data_collator=default_data_collator,
        callbacks=manager.add_callbacks_pre_trainer(cfg, model),
    )  # fmt: skip
    manager.post_trainer_create(cfg, trainer)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("axes", "adapter"), [(COMBINED, "raymem"), (FULL, None)], ids=["LoRAct + MoRAM + chunked", "MLorc, full"]
)
def test_the_plugin_trains_as_raymem_does(
    axes: dict[str, Any], adapter: str | None, manager: Any, llama: Path, examples: Path, tmp_path: Path
) -> None:
    recipe = recipe_with(axes, llama, examples, tmp_path)
    _, rows = train(recipe)
    assert manager.supports_adapter("raymem") and manager.get_input_args()
    cfg = config(adapter=adapter, raymem={**axes, "budget": "1GiB"})
    assert RaymemArgs(raymem=dict(axes)).raymem == axes
    trainer = trained(manager, cfg, llama, recipe, tmp_path / "out")
    assert losses(trainer) == pytest.approx(column(rows), rel=1e-5)
    if adapter:
        trainer.save_model(str(tmp_path / "adapter"))
        ids = torch.arange(3, 15)[None]
        cfg = config(adapter="raymem", inference=True, lora_model_dir=str(tmp_path / "adapter"))
        loaded, _ = manager.load_adapter(AutoModelForCausalLM.from_pretrained(llama), cfg, inference=True)
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)


def test_axolotl_reads_the_section(manager: Any) -> None:
    config_of = pytest.importorskip("axolotl.integrations.config", reason="what axolotl reads configs with is missing")
    _, whole = config_of.merge_input_args()
    read = whole(
        base_model="tiny", adapter="raymem", raymem={**COMBINED, "budget": "1GiB"}, learning_rate=1e-4, num_epochs=1,
        datasets=[{"path": "rows", "type": "alpaca"}], micro_batch_size=1, gradient_accumulation_steps=1,
    )  # fmt: skip
    assert read.raymem == {**COMBINED, "budget": "1GiB"} and read.adapter == "raymem"


def test_what_does_not_go_together_is_refused_by_name(manager: Any, llama: Path) -> None:
    def refused(message: str, call: Any, **values: Any) -> None:
        with pytest.raises(RecipeError, match=message):
            call(config(**values))

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(llama)

    def attach(cfg: Any) -> Any:
        return manager.load_adapter(model(), cfg)

    def load(cfg: Any) -> Any:
        return manager.post_model_load(cfg, model())

    refused("set adapter: raymem beside it", load, raymem={"adapter": "lora"})
    refused("its section asks for no adapter", attach, adapter="raymem", raymem={"activations": LORACT})
    refused("its section is not", load)
    refused(r"set raymem\.adapter\.init_from", attach, adapter="raymem", raymem=COMBINED, lora_model_dir="x")
    assert manager.load_adapter(model(), config(adapter="lora", raymem={"activations": LORACT})) is None
