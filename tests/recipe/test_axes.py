"""Kinds that come from outside are used as raymem's own are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.errors import RecipeError
from raymem.planner import plan_recipe
from raymem.recipe.axes import ACTIVATIONS, ADAPTERS, AXES, LOSSES, OPTIMIZERS, Axis, register_again, registered
from raymem.recipe.load import recipe_of, recipe_schema
from raymem.recipe.space_load import load_space, shipped
from raymem.testing.measure import measure_step
from raymem.training.model.build import build_model
from tests.helpers import toy_kinds
from tests.helpers.support import make_recipe

KINDS: dict[str, tuple[Axis[Any], Any]] = {
    "optimizer": (OPTIMIZERS, toy_kinds.SignKind),
    "adapter": (ADAPTERS, toy_kinds.ScaleKind),
    "activations": (ACTIVATIONS, toy_kinds.HalfKind),
    "loss": (LOSSES, toy_kinds.SmoothKind),
}


@pytest.fixture
def toys() -> Iterator[None]:
    """One toy on every axis."""
    for axis, kind in KINDS.values():
        axis.register(kind)
    yield
    for axis, kind in KINDS.values():
        axis.unregister(kind().name)


TOY_RECIPE: dict[str, Any] = {
    "optimizer": {"kind": "toy_sign", "momentum": 0.5},
    "adapter": {"kind": "toy_scale", "layers": "v_proj"},
    "activations": "toy_half",
    "loss": {"kind": "toy_smooth", "smoothing": 0.2},
}


@pytest.mark.usefixtures("toys")
def test_a_recipe_names_them_and_comes_back_the_same() -> None:
    recipe = make_recipe(TOY_RECIPE)
    assert recipe.optimizer == toy_kinds.SignOptions(momentum=0.5)
    assert recipe.trains_adapter
    assert type(recipe).model_validate(recipe.to_dict()) == recipe
    assert recipe.to_dict()["loss"] == {"kind": "toy_smooth", "smoothing": 0.2}


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"kind": "toy_sing"}}, r"optimizer\.kind: 'toy_sing' is not one of .*did you mean 'toy_sign'"),
        (
            {"optimizer": {"kind": "toy_sign", "momentun": 1}},
            r"optimizer\.momentun: unknown key; did you mean 'momentum'",
        ),
        ({"optimizer": {"kind": "toy_sign", "momentum": 2.0}}, r"optimizer\.momentum: 2\.0 is outside \[0, 1\)"),
        ({"optimizer": {"kind": "toy_sign", "lr": "x"}}, r"optimizer\.lr: 'x': input should be a valid number"),
        ({"adapter": "toy_scale", "base": {"quantize": "nf4"}}, "a toy is not for bits; use adapter: lora"),
    ],
    ids=str,
)
def test_their_errors_are_sentences_with_a_place(changes: dict[str, Any], message: str) -> None:
    raw = {"name": "r", "model": {"name": "demo"}, "data": {"train": "demo:text"}, "train": {"steps": 1}}
    with pytest.raises(RecipeError, match=message):
        recipe_of({**raw, **changes})


@pytest.mark.usefixtures("toys")
def test_their_search_space_is_known_by_their_name() -> None:
    assert "toy_sign" in shipped()
    space = load_space("toy_sign", make_recipe(TOY_RECIPE))
    assert list(space) == ["optimizer.momentum"]
    with pytest.raises(RecipeError, match=r"the search space of toy_sign: optimizer\.momentum: unknown key"):
        load_space("toy_sign", make_recipe())


@pytest.mark.usefixtures("toys")
def test_the_json_schema_lists_them() -> None:
    definitions = recipe_schema()["$defs"]
    assert "toy_sign" in definitions["Optimizer"]["anyOf"][-1]["enum"]
    assert "momentum" in definitions["SignOptions"]["properties"]


@pytest.mark.usefixtures("toys")
def test_they_train_and_their_plan_is_what_is_measured(llama: Path) -> None:
    recipe = make_recipe(TOY_RECIPE, {"data": {"sequence_length": 64}}, model=llama)
    assert plan_recipe(recipe).step_peak_bytes == pytest.approx(measure_step(recipe).allocated_bytes, rel=0.01)
    model = build_model(recipe)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.endswith("v_proj.scale") for name in trained)


@pytest.mark.usefixtures("toys")
def test_another_process_can_be_told_of_them() -> None:
    sent = registered()
    assert sent["optimizer"] == {"toy_sign": "tests.helpers.toy_kinds:SignKind"}
    OPTIMIZERS.unregister("toy_sign")
    register_again(sent)
    assert isinstance(OPTIMIZERS["toy_sign"], toy_kinds.SignKind)


@pytest.mark.parametrize(
    ("axis", "kind", "message"),
    [
        (OPTIMIZERS, "nowhere.at.all:Kind", r"nowhere\.at\.all:Kind cannot be imported: ModuleNotFoundError"),
        (OPTIMIZERS, "tests.helpers.toy_kinds:Missing", "cannot be imported: AttributeError"),
        (OPTIMIZERS, "tests.helpers.toy_kinds:ScaleKind", "is no OptimizerKind; extend raymem.kinds.OptimizerKind"),
    ],
    ids=["no module", "no class", "another axis"],
)
def test_what_cannot_be_registered_is_said(axis: Axis[Any], kind: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        axis.register(kind)


def test_a_kind_of_a_test_function_cannot_be_imported_by_workers() -> None:
    class Local(toy_kinds.SignKind):
        pass

    with pytest.raises(RecipeError, match="put it at the top of a module"):
        OPTIMIZERS.register(Local)


def test_every_kind_of_raymem_is_what_its_registry_says() -> None:
    for axis in AXES.values():
        for name in axis:
            kind = axis[name]
            assert kind.name == name
            assert type(kind.options()).__doc__
        assert axis.default in axis and axis.initial in axis
    assert torch.is_grad_enabled()
