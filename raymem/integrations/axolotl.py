"""raymem in axolotl, as a plugin.

::

    plugins: [raymem.integrations.axolotl.RaymemPlugin]
    adapter: raymem
    raymem: {adapter: moram, activations: loract, loss: chunked, budget: 24GiB}

``adapter: raymem`` hands the model to the plugin where ``raymem`` asks for an adapter; without one the plugin works on
the model that axolotl has loaded, with axolotl's own adapter or none.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin

from raymem.errors import RecipeError
from raymem.integrations.applied import Applied, apply
from raymem.integrations.axolotl_args import RaymemArgs
from raymem.integrations.hf import RaymemCallback
from raymem.recipe.axes import ADAPTERS

__all__ = ["RaymemArgs", "RaymemPlugin"]

_NAME = "raymem"


class RaymemPlugin(BasePlugin):  # type: ignore[misc]
    """Brings the axes of the section ``raymem`` to the model that axolotl trains."""

    def __init__(self) -> None:
        super().__init__()
        self.run: Applied | None = None
        """The model with what was asked for, once it is loaded for training."""

    def get_input_args(self) -> str:
        """Name the model of the plugin's section."""
        return "raymem.integrations.axolotl_args.RaymemArgs"

    def get_adapter_capabilities(self) -> list[Any]:
        """Let ``adapter: raymem`` through."""
        return [AdapterCapabilities(name=_NAME)]

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """Attach the adapter of ``adapter: raymem`` with all else that is asked for, or load a trained one.

        Raises:
            RaymemError: the section asks for no adapter, or for what does not go with the model.
        """
        if cfg.adapter != _NAME:
            return None
        if config_only:
            raise RecipeError(
                f"raymem: adapter: rl: {cfg.rl} attaches its adapter itself; use one of axolotl's there, and "
                "leave adapter out of raymem"
            )
        if inference or cfg.inference or cfg.merge_lora:
            return _loaded(model, cfg.lora_model_dir or cfg.output_dir)
        if cfg.lora_model_dir:
            raise RecipeError("raymem: adapter: lora_model_dir is axolotl's own; set raymem.adapter.init_from")
        run = self._apply(cfg, model)
        if "adapter" not in run.settings.asked or not hasattr(run.model, "peft_config"):
            raise RecipeError("raymem: adapter: raymem is set, but its section asks for no adapter; name one there")
        return run.model, run.model.peft_config["default"]

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Apply what is asked for to a model that has no adapter of raymem's.

        Raises:
            RaymemError: an adapter without ``adapter: raymem``, or what does not go with the model.
        """
        if cfg.adapter == _NAME or cfg.inference or cfg.merge_lora:
            return
        self._apply(cfg, model)
        assert self.run is not None
        if self.run.model is not model:
            raise RecipeError(
                "raymem: adapter: set adapter: raymem beside it, so that axolotl leaves adapters to raymem"
            )

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Give the trainer raymem's callback."""
        return [] if self.run is None else [RaymemCallback(self.run)]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Give the trainer the optimizer, if one is asked for."""
        if self.run is not None and "optimizer" in self.run.settings.asked:
            trainer.optimizer_cls_and_kwargs = self.run.optimizer_cls_and_kwargs

    def _apply(self, cfg: Any, model: Any) -> Applied:
        if not cfg.raymem:
            raise RecipeError(
                "raymem: the plugin is there but its section is not; write raymem: {activations: loract}, or leave the "
                "plugin out"
            )
        self.run = apply(model, cfg.raymem if isinstance(cfg.raymem, str) else _plain(cfg.raymem))
        return self.run


def _plain(value: Any) -> Any:
    """Return axolotl's mapping as plain dicts: its own answers None to every key."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _loaded(model: Any, directory: str) -> Any:
    """Put a trained adapter on a model, for inference."""
    from peft import PeftModel

    for kind in ADAPTERS.kinds():
        kind.register()
    wrapped = PeftModel.from_pretrained(model, directory)
    return wrapped, wrapped.peft_config["default"]
