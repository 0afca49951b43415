"""Frozen layers on the host: the same bits, whatever the speed of copies; two layers' on the device, and planned."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raymem.errors import RecipeError
from raymem.memory import host
from raymem.memory.host import lives_on_host
from raymem.methods.streaming import stream
from raymem.planner.analytic import closed_form
from raymem.planner.plan import make_plan
from raymem.planner.tracing.step_trace import planned_model, trace_step
from raymem.planner.types import Plan, Target
from raymem.recipe.axes import BASES
from raymem.recipe.schema import Recipe
from raymem.testing import measure_step
from raymem.training.dist_env import DistEnv, replicate
from raymem.training.model.build import build_model
from tests.helpers.delayed_lane import DelayedLane, delay_copies
from tests.helpers.offloading import GPU, HiddenHost, assert_same_bits, gradients, tiny
from tests.helpers.planner_cases import case
from tests.helpers.support import in_processes, make_recipe

STREAMED: dict[str, Any] = {"base": {"offload": True}}
ACTIVATIONS: list[Any] = ["none", "checkpoint", "offload", {"kind": "offload", "checkpoint": True}, "loract"]


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> list[DelayedLane]:
    return delay_copies(monkeypatch, stream)


def streamed_layers(model: nn.Module) -> list[Any]:
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    [of_model] = {id(hook._stream): hook._stream for hook in hooks if isinstance(hook, stream._Before)}.values()
    return of_model._layers


@pytest.mark.parametrize(
    ("family", "activations"),
    [
        ("llama", "none"),
        *(pytest.param("llama", kind, marks=pytest.mark.slow) for kind in ACTIVATIONS[1:]),
        *(pytest.param("gpt2", kind, marks=pytest.mark.slow) for kind in ACTIVATIONS[:3]),
        pytest.param("qwen3_moe", "none", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_the_same_bit_for_bit_however_late_copies_are(
    family: str, activations: Any, delayed: list[DelayedLane]
) -> None:
    fragment = {"activations": activations}
    expected = gradients(build_model(tiny(family, fragment)))
    model = build_model(tiny(family, fragment, STREAMED))
    assert_same_bits(gradients(model), expected)
    assert len(delayed) == 1 and delayed[0].taken > 0
    assert not any(layer.is_on_device for layer in streamed_layers(model)), "all are gone when backward ends"


def test_a_lane_that_does_not_wait_would_be_seen(delayed: list[DelayedLane], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DelayedLane, "wait", lambda lane, mark: None)
    results = gradients(build_model(tiny("llama", STREAMED)), passes=1)
    assert not any(torch.isfinite(result).all() for result in results)


def test_an_evaluation_and_a_backward_pass_that_fails(delayed: list[DelayedLane]) -> None:
    plain, model = build_model(tiny("llama")), build_model(tiny("llama", STREAMED))
    ids = torch.randint(64, (2, 24))

    def fail(gradient: torch.Tensor) -> None:
        raise ValueError("stop")

    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    middle = streamed_layers(model)[1]._layer
    trained = next(p for p in middle.parameters() if p.requires_grad)
    handle = trained.register_hook(fail)
    with pytest.raises(ValueError, match="stop"):
        loss.backward()
    handle.remove()
    model.zero_grad()
    with torch.no_grad():
        evaluated = [m(input_ids=ids, labels=ids, use_cache=False).loss for m in (model, plain)]
    assert torch.equal(*evaluated)
    assert not any(layer.is_on_device for layer in streamed_layers(model))
    assert_same_bits(gradients(model), gradients(plain))


def test_weights_are_found_on_the_host_and_copied_with_the_model() -> None:
    plain, model = build_model(tiny("llama")), build_model(tiny("llama", STREAMED))
    expected = gradients(plain)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert_same_bits(gradients(again), expected)
    gradients(model)
    for (name, parameter), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(parameter, theirs), name
        frozen_in_layer = ".layers." in name and not theirs.requires_grad
        assert lives_on_host(parameter) == frozen_in_layer and parameter.requires_grad == theirs.requires_grad


@pytest.mark.slow
def test_a_saved_adapter_is_loaded_onto_streamed_layers(tmp_path: Path) -> None:
    trained: Any = build_model(tiny("llama"))
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    trained.save_pretrained(tmp_path)
    ids = torch.arange(24)[None]
    plain, streamed = (
        build_model(tiny("llama", fragment), adapter_at=tmp_path)(input_ids=ids, use_cache=False).logits
        for fragment in ({}, STREAMED)
    )
    assert torch.equal(plain, streamed)
    assert not torch.equal(plain, build_model(tiny("llama"))(input_ids=ids, use_cache=False).logits)


def test_a_model_without_layers_is_refused() -> None:
    recipe = tiny("llama", STREAMED)
    with pytest.raises(RecipeError, match=r"base\.offload: no transformer layers were found in Linear"):
        BASES.of(recipe).prepare(nn.Linear(2, 2), recipe.base)


# ---- memory


def planned(recipe: Recipe) -> Plan:
    return make_plan(trace_step(recipe, Target.of(recipe)), GPU, None)


def check_device_and_host(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(recipe)
    hidden = HiddenHost()
    monkeypatch.setattr(host, "host_empty", hidden.empty)
    measured = measure_step(recipe).allocated_bytes
    in_layers = plan.host_terms["weights"]
    # The meter begins with all tensors of the model; those of the host are no part of what it then sees.
    assert plan.step_peak_bytes == pytest.approx(measured - in_layers, rel=0.01)
    assert plan.host_bytes == hidden.most


@pytest.mark.slow
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_the_peaks_of_device_and_host_are_planned(activations: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(case("lora", layers=4).to_dict(), STREAMED, {"activations": activations})
    check_device_and_host(recipe, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("base", ["lora bf16 checkpoint", "lora accumulation", "lora padded"])
def test_the_peaks_of_device_and_host_are_planned_everywhere(
    base: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_device_and_host(make_recipe(case(base, family, layers=4).to_dict(), STREAMED), monkeypatch)


@pytest.mark.slow
def test_what_the_device_holds_does_not_grow_with_layers() -> None:
    def weights(layers: int) -> tuple[int, int]:
        plan = planned(make_recipe(case("lora", layers=layers).to_dict(), STREAMED))
        return plan.term_peaks["weights"], plan.host_terms["weights"]

    (four, four_host), (six, six_host) = weights(4), weights(6)
    assert four == six and six_host == 1.5 * four_host


def test_on_a_gpu_the_closed_form_leaves_out_what_lies_on_the_host() -> None:
    recipe = make_recipe(case("lora").to_dict(), STREAMED, {"scaling": {"use_gpu": True}})
    target = Target.of(recipe)
    session, model = trace_step(recipe, target), planned_model(recipe)
    assert closed_form(recipe, target, model) == session.state
    whole = closed_form(recipe, Target("cpu", 1), model)["weights"]
    in_layers = [p for p in model.parameters() if lives_on_host(p)]
    assert whole - session.state["weights"] == sum(p.numel() * p.element_size() for p in in_layers) > 0
    plan = make_plan(session, target, None)
    assert plan.host_terms["weights"] == sum(host.pinned_bytes(p.numel() * p.element_size()) for p in in_layers)


# ---- several workers


def gradients_of_a_rank(raw: dict[str, Any]) -> list[torch.Tensor]:
    recipe = Recipe.model_validate(raw)
    dist_env = DistEnv.current(recipe)
    model: Any = build_model(recipe, dist_env)
    replica: Any = replicate(model, dist_env)
    ignored = set(replica.parameters_to_ignore)
    assert bool(ignored) == recipe.base.offload and not any("lora" in name for name in ignored)
    return [tensor.contiguous() for tensor in gradients(replica)]


@pytest.mark.slow
def test_replicas_train_as_without_it(tmp_path: Path) -> None:
    two = {"scaling": {"num_workers": 2}}
    raws = [tiny("llama", two, fragment).to_dict() for fragment in ({}, STREAMED)]
    plain, streamed = (
        in_processes(gradients_of_a_rank, 2, tmp_path / str(number), raw) for number, raw in enumerate(raws)
    )
    for expected, result in zip(plain, streamed, strict=True):
        assert_same_bits(result, expected)
