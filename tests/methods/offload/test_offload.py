"""Activations on the host: the same bits whatever the speed of copies, two layers on the device, and planned."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raymem.errors import ModelError
from raymem.memory import host
from raymem.methods.offload import install, offload_activations
from raymem.planner.plan import make_plan
from raymem.planner.tracing.step_trace import StepTrace, trace_step
from raymem.planner.types import Target
from raymem.recipe.schema import Recipe
from raymem.testing import measure_step
from raymem.training.model.build import build_model
from tests.helpers.delayed_lane import DelayedLane, delay_copies
from tests.helpers.offloading import GPU, HiddenHost, assert_same_bits, gradients, tiny
from tests.helpers.planner_cases import case
from tests.helpers.support import in_processes, make_recipe

OFFLOAD: dict[str, Any] = {"activations": "offload"}
WITH_CHECKPOINT: dict[str, Any] = {"activations": {"kind": "offload", "checkpoint": True}}
MORAM: dict[str, Any] = {"kind": "moram", "rank": 4, "density": 0.25, "criterion": "random"}
PLAIN_OF: dict[bool, dict[str, Any]] = {False: {"activations": "none"}, True: {"activations": "checkpoint"}}


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> list[DelayedLane]:
    return delay_copies(monkeypatch, install)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["alone", "checkpoint"])
@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("llama", {"kind": "lora", "rank": 4, "dropout": 0.1}),
        *(pytest.param(family, "none", marks=pytest.mark.slow) for family in ("gpt2", "phi3", "qwen3_moe")),
        *(pytest.param("llama", {**MORAM, "formulation": f}, marks=pytest.mark.slow) for f in ("fast", "frugal")),
    ],
)
def test_gradients_are_the_same_bit_for_bit_however_late_copies_are(
    family: str, adapter: Any, checkpoint: bool, delayed: list[DelayedLane]
) -> None:
    recipe = tiny(family, {"adapter": adapter}, PLAIN_OF[checkpoint])
    expected = gradients(build_model(recipe))
    offloaded = tiny(family, {"adapter": adapter}, WITH_CHECKPOINT if checkpoint else OFFLOAD)
    assert_same_bits(gradients(build_model(offloaded)), expected)
    out, back = 2 * 4, 2 * 2  # inputs alone, in two passes of four layers; what the last two hold is still there
    assert len(delayed) == 1 and (delayed[0].taken == out + back if checkpoint else delayed[0].taken > out + back)


def test_one_backward_for_two_forward_passes_and_one_that_is_given_up(delayed: list[DelayedLane]) -> None:
    def two(model: nn.Module) -> list[torch.Tensor]:
        ids = torch.randint(64, (2, 2, 24), generator=torch.Generator().manual_seed(0))
        losses = [model(input_ids=rows, labels=rows, use_cache=False).loss for rows in ids]
        torch.autograd.backward(losses[0] - 2 * losses[1])
        return [*(loss.detach() for loss in losses), *(p.grad for p in model.parameters() if p.grad is not None)]

    def given_up(model: nn.Module) -> None:
        ids = torch.randint(64, (2, 24))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        layers = [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
        last = list(layers[-1].parameters())
        torch.autograd.grad(loss, [p for p in last if p.requires_grad])  # no layer before that

    model = build_model(tiny("llama", OFFLOAD))
    given_up(model)
    assert_same_bits(two(model), two(build_model(tiny("llama"))))


def test_a_lane_that_does_not_wait_would_be_seen(delayed: list[DelayedLane], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymem.methods.offload.saved.Group.arrive", lambda group: group.coming.clear())
    results = gradients(build_model(tiny("llama", OFFLOAD)), passes=1)
    assert not all(torch.isfinite(result).all() for result in results)


class InPlace(nn.TransformerEncoderLayer):
    """Writes to what it has saved."""

    def forward(self, src: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = src * 2
        squared = hidden.square()
        hidden.add_(1)
        return squared


def test_a_saved_tensor_that_is_changed_in_place_is_an_error() -> None:
    model = nn.Sequential(*(InPlace(32, 2) for _ in range(3)))
    for prepare in (lambda: None, lambda: offload_activations(model)):
        prepare()
        with pytest.raises(RuntimeError, match=r"in.?place"):
            model(torch.randn(2, 16, 32, requires_grad=True)).sum().backward()


def test_it_is_undone_copied_and_pickled() -> None:
    model = build_model(tiny("llama"))
    forward = [module.__dict__.get("forward") for module in model.modules()]
    with offload_activations(model) as handle:
        with pytest.raises(ModelError, match="offloaded already"):
            offload_activations(model)
        expected = gradients(copy.deepcopy(model))
        again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert_same_bits(gradients(again), expected)
    assert [module.__dict__.get("forward") for module in model.modules()] == forward
    handle.remove()
    with pytest.raises(ModelError, match=r"no transformer layers were found in Linear.*use activations: none"):
        offload_activations(nn.Linear(2, 2))


# ---- memory


def traced(recipe: Recipe) -> StepTrace:
    return trace_step(recipe, Target.of(recipe))


CASES = {"alone": OFFLOAD, "checkpoint": WITH_CHECKPOINT}


def check_device_and_host(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(traced(recipe), GPU, None)
    hidden = HiddenHost()
    monkeypatch.setattr(host, "host_empty", hidden.empty)
    measured = measure_step(recipe).allocated_bytes
    assert plan.step_peak_bytes == pytest.approx(measured, rel=0.01)
    assert plan.host_bytes == plan.host_terms["activations"] == hidden.most > hidden.alive == 0


@pytest.mark.parametrize("name", ["alone", pytest.param("checkpoint", marks=pytest.mark.slow)])
def test_the_peaks_of_device_and_host_are_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_device_and_host(make_recipe(case("lora", layers=3).to_dict(), CASES[name]), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("base", ["lora", "lora accumulation", "lora padded", "full", "moram fast", "lora bf16_mixed"])
def test_the_peaks_of_device_and_host_are_planned_everywhere(
    base: str, family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_device_and_host(make_recipe(case(base, family, layers=4).to_dict(), CASES[name]), monkeypatch)


@pytest.mark.slow
def test_what_the_device_holds_does_not_grow_with_layers() -> None:
    def activations(layers: int, fragment: dict[str, Any]) -> tuple[int, int]:
        plan = make_plan(traced(make_recipe(case("lora", layers=layers).to_dict(), fragment)), GPU, None)
        return plan.term_peaks["activations"], plan.host_bytes

    inputs = 2 * 256 * 128 * 4  # rows, tokens, hidden size
    (four, four_host), (six, six_host) = (activations(layers, OFFLOAD) for layers in (4, 6))
    assert four == six
    assert four_host + inputs == 2 * (six_host - four_host), "the first layer's input has no gradient to work out"
    (four, four_host), (six, six_host) = (activations(layers, WITH_CHECKPOINT) for layers in (4, 6))
    assert four == six
    assert (four_host, six_host) == (4 * inputs, 6 * inputs)


@pytest.mark.slow
def test_page_locked_memory_is_planned_as_pytorch_rounds_it() -> None:
    recipe = make_recipe(case("lora").to_dict(), WITH_CHECKPOINT, {"data": {"sequence_length": 200}})
    on_gpu = make_recipe(recipe.to_dict(), {"scaling": {"use_gpu": True}})
    inputs = 2 * 200 * 128 * 4
    assert make_plan(traced(recipe), GPU, None).host_bytes == 2 * inputs
    assert make_plan(traced(on_gpu), GPU, None).host_bytes == 2 * host.pinned_bytes(inputs)


# ---- shards


def gradients_of_a_rank(raw: dict[str, Any]) -> list[torch.Tensor]:
    from torch.distributed.tensor import DTensor

    from raymem.training.dist_env import DistEnv

    recipe = Recipe.model_validate(raw)
    results = gradients(build_model(recipe, DistEnv.current(recipe)))
    return [(t.full_tensor() if isinstance(t, DTensor) else t).contiguous() for t in results]


@pytest.mark.slow
def test_shards_give_the_same_gradients_and_weights_do_not_travel(tmp_path: Path) -> None:
    fsdp2 = {"adapter": "none", "scaling": {"strategy": "fsdp2", "num_workers": 2}}
    results = []
    for number, fragment in enumerate([*PLAIN_OF.values(), OFFLOAD, WITH_CHECKPOINT]):
        raw = tiny("llama", fsdp2, fragment).to_dict()
        results.append(in_processes(gradients_of_a_rank, 2, tmp_path / str(number), raw)[0])
    plain, checkpointed, offloaded, both = results
    assert_same_bits(offloaded, plain)
    assert_same_bits(both, checkpointed)
