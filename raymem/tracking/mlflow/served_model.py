"""Answers prompts with an adapter on its base. MLflow copies this file into each logged model and runs it there.

The base is the one that the adapter's own config names, with its revision; it is fetched for the first prompt.
raymem is needed only for adapters that PEFT does not know.
"""

from __future__ import annotations

import importlib
import threading
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class AdapterModel(PythonModel):  # type: ignore[misc]
    """One adapter, which is not merged.

    Prompts are wrapped in the tokenizer's chat template, if it has one, as the only turn of a user.
    """

    def load_context(self, context: Any) -> None:
        """Note where the adapter is; MLflow before 3.17 calls this when a model is written, where no base is wanted."""
        self._directory, self._loading = context.artifacts["adapter"], threading.Lock()
        self._loaded: tuple[Any, Any] | None = None

    def predict(self, context: Any, model_input: list[str], params: dict[str, Any] | None = None) -> list[str]:
        """Return an answer per prompt; with the first one, adapter, base and tokenizer are loaded.

        Args:
            params: ``max_new_tokens``, and ``temperature``, of which 0 takes the most likely token each time.
        """
        with self._loading:
            if self._loaded is None:
                self._loaded = _load(self._directory)
        model, tokenizer = self._loaded
        settings = {"max_new_tokens": 128, "temperature": 0.0, **(params or {})}
        return [self._answer(model, tokenizer, text, settings) for text in model_input]

    @staticmethod
    def _answer(model: Any, tokenizer: Any, text: str, settings: dict[str, Any]) -> str:
        import torch

        if tokenizer.chat_template:
            turns = [{"role": "user", "content": text}]
            inputs = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        else:
            inputs = tokenizer(text, return_tensors="pt")
        given = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        temperature = float(settings["temperature"])
        how = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        with torch.inference_mode():
            ids = model.generate(**given, max_new_tokens=int(settings["max_new_tokens"]), pad_token_id=padding, **how)
        return str(tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True))


def _load(directory: str) -> tuple[Any, Any]:
    """Return model and tokenizer; raymem knows every kind of adapter, PEFT alone its own, and gives the same bits."""
    import torch

    try:
        raymem = importlib.import_module("raymem")
    except ImportError:
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoTokenizer

        peft_model = AutoPeftModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=False)
        model, tokenizer = peft_model.eval(), AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    else:
        model, tokenizer = raymem.load(directory)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


set_model(AdapterModel())
