"""Use in other people's loops: three lines, undone cleanly, the same again after a resume, and errors that help."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raymem.errors import ModelError
from raymem.methods.layers.checkpointing import checkpoint_layers
from raymem.methods.loract import compress_activations
from raymem.methods.loract.config import LoRActOptions
from tests.helpers.loract_families import WIDTH, batch, build, gradients


def patched(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__ or module._forward_pre_hooks]


def test_a_bare_loop() -> None:
    model, inputs = build("llama"), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    handle = compress_activations(model, rank=0.25)
    losses = []
    for _ in range(8):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    handle.remove()
    assert losses[-1] < 0.9 * losses[0]
    assert handle.report.compressed == 2


@pytest.mark.parametrize("scope", ["layer", "sublayer", "linear"])
def test_hugging_face_trainer(scope: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model: Any = build("llama")
    rows = [{name: value[row] for name, value in batch().items()} for row in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=3e-3, report_to=[], use_cpu=True,
        gradient_checkpointing=scope != "linear", save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    with compress_activations(model, rank=0.25, scope=scope) as handle:
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert handle.report.compressed == {"layer": 2, "sublayer": 5, "linear": 14}[scope]


@pytest.mark.parametrize("scope", ["layer", "sublayer", "linear"])
def test_removal_leaves_no_trace_and_a_started_backward_pass_works(scope: str) -> None:
    model, inputs = build("llama", attention_dropout=0.0), batch()
    _, exact = gradients(model, inputs)
    with compress_activations(model, rank=WIDTH, scope=scope) as handle:
        assert patched(model)
        loss = model(**inputs).loss
    assert patched(model) == []
    handle.remove()
    model.zero_grad()
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, exact[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scope", ["layer", "sublayer", "linear"])
def test_without_gradients_and_in_evaluation_nothing_happens(scope: str) -> None:
    model, inputs = build("llama"), batch()
    with compress_activations(model, rank=4, scope=scope) as handle:
        with torch.no_grad():
            model(**inputs)
        model.eval()
        expected = model(**inputs)
        assert expected.past_key_values is not None, "generation keeps its cache"
        expected.loss.backward()
    assert handle.report.compressed == 0
    assert handle.report.held_bytes == 0


def test_a_patch_of_somebody_else_on_top_survives_removal() -> None:
    model, inputs = build("llama"), batch()
    handle = compress_activations(model, rank=4)
    layer: Any = model.model.layers[1]  # type: ignore[union-attr,index]
    inner, seen = layer.forward, []

    def on_top(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return inner(*args, **kwargs)

    layer.forward = on_top
    handle.remove()
    model(**inputs).loss.backward()
    assert seen == [1]
    assert handle.report.compressed == 0


def test_steps_seed_the_sketches_whatever_came_before() -> None:
    model, inputs = build("llama", attention_dropout=0.0), batch()

    def at(step: int | None, *, before: int = 0) -> torch.Tensor:
        with compress_activations(model, rank=4, first_input="compressed", seed=3) as handle:
            for _ in range(before):
                gradients(model, inputs)
            if step is not None:
                handle.begin_step(step)
            return gradients(model, inputs)[1]["model.embed_tokens.weight"]

    assert torch.equal(at(7), at(7, before=2)), "a resumed run draws what the uninterrupted one drew"
    assert not torch.equal(at(7), at(8))
    assert torch.equal(at(None, before=1), at(1)), "unnamed steps are counted from 0"


MODEL_ERRORS: dict[str, tuple[Any, dict[str, Any]]] = {
    r"rank: 33 is more than the hidden size 32": (None, {"rank": 33}),
    r"max_rank: 40 is more than the hidden size 32": (None, {"rank": "auto", "max_rank": 40}),
    r"layers: no transformer layers were found in Sequential.* name them with layers=": (
        nn.Sequential(nn.Linear(8, 8)), {}),
    r"layers: 'blocks\\\\.\\\\d' matches no module of LlamaForCausalLM": (None, {"layers": r"blocks\.\d"}),
    r"0: Linear has no sub-layers to compress; use scope: layer": (
        nn.Sequential(nn.Linear(8, 8)), {"layers": "0", "scope": "sublayer"}),
    r"layers: 0 \(ReLU\) holds no linear layer": (nn.Sequential(nn.ReLU()), {"layers": "0"}),
    r"layers: the list holds no layer": (None, {"layers": nn.ModuleList()}),
    r"layers: the list holds a Linear that is no part": (None, {"layers": nn.ModuleList([nn.Linear(8, 8)])}),
    r"side_stream: true needs a CUDA device": (None, {"side_stream": True}),
}  # fmt: skip


@pytest.mark.parametrize("message", list(MODEL_ERRORS))
def test_what_does_not_fit_the_model_is_an_error(message: str) -> None:
    model, options = MODEL_ERRORS[message]
    model = model or build("llama")
    with pytest.raises(ModelError, match=message):
        compress_activations(model, **options)
    assert patched(model) == [], "nothing was installed"


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("rank: 0 must be at least 1", {"rank": 0}),
        ("rank: -3 must be at least 1", {"rank": -3}),
        ("rank: 0.0 must lie above 0", {"rank": 0.0}),
        ("rank: 1.5 must lie above 0 and be at most 1", {"rank": 1.5}),
        ("rank: True must be a whole number", {"rank": True}),
        ("rank: 'many' must be a whole number, a fraction of the hidden size, or auto", {"rank": "many"}),
        ("scope: 'block' is not one of layer, sublayer, linear", {"scope": "block"}),
        ("first_input: 'exact' is not one of raw, compressed", {"first_input": "exact"}),
        ("tolerance: 0.0 must lie between 0 and 1", {"tolerance": 0.0}),
        ("power_iterations: -1 must not be negative", {"power_iterations": -1}),
        ("report_every: -1 must not be negative", {"report_every": -1}),
        ("max_rank: 0 must be at least 1", {"max_rank": 0}),
        ("options: give them whole or field by field (rank)", {"options": LoRActOptions(), "rank": 4}),
        ("layers: '(' is not a regular expression", {"layers": "("}),
    ],
)
def test_options_out_of_range_are_errors(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        compress_activations(build("llama"), **options)


def test_nested_use_is_an_error() -> None:
    model = build("llama")
    with compress_activations(model), pytest.raises(ModelError, match=r"layers\.0: .* compressed already"):
        compress_activations(model, scope="linear")
    compress_activations(model).remove()


def test_sites_that_are_not_on_the_path_are_an_error() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.inner.weight

    model = nn.Sequential(Odd(), Odd())
    with (
        compress_activations(model, layers=r"\d", scope="sublayer"),
        pytest.raises(ModelError, match="none of the sites inside this Odd was on its path"),
    ):
        model(torch.randn(64, WIDTH))


def test_a_layer_without_a_tensor_is_an_error() -> None:
    class Pair(nn.Linear):
        def forward(self, pair: tuple[torch.Tensor, ...]) -> torch.Tensor:  # type: ignore[override]
            return super().forward(pair[0])

    model = nn.Sequential(Pair(WIDTH, WIDTH))
    with compress_activations(model, layers="0"), pytest.raises(ModelError, match="without a tensor as its first"):
        model((torch.randn(4, WIDTH),))


def test_linear_scope_and_checkpointing_contradict_each_other() -> None:
    model: Any = build("llama")
    with compress_activations(model, scope="linear"):
        checkpoint_layers(model)
        with pytest.raises(ModelError, match="turn activation checkpointing off"):
            model(**batch())


def test_ranks_of_other_sites_are_refused() -> None:
    handle = compress_activations(build("llama"), rank="auto")
    with pytest.raises(ModelError, match=r"model\.layers\.0: the ranks belong to other sites"):
        handle.set_ranks({})
