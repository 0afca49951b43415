"""The methods as a package, and their defaults: recipes and bare loops get the same."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

from raymem import methods
from raymem.methods.mlorc import MLorcAdamW, MLorcLion
from raymem.methods.mlorc.config import MLorcAdamWOptions, MLorcLionOptions
from raymem.methods.moram import MoRAMConfig
from raymem.methods.moram.config import MoRAMOptions


def test_the_package_exports_what_is_public_of_each_method() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    for name in methods.__all__:
        assert callable(getattr(methods, name))
        assert f"`{name}`" in page
    with pytest.raises(AttributeError, match="MLorcSGD"):
        methods.MLorcSGD  # noqa: B018


@pytest.mark.parametrize(
    ("optimizer", "options"), [(MLorcAdamW, MLorcAdamWOptions), (MLorcLion, MLorcLionOptions)], ids=["adamw", "lion"]
)
def test_the_optimizers_of_mlorc(optimizer: type, options: type) -> None:
    taken = inspect.signature(optimizer).parameters
    only_of_the_recipe = {"kind", "compress_embeddings", "step_in_backward"}
    for field in dataclasses.fields(options):
        if field.name not in only_of_the_recipe:
            assert taken[field.name].default == field.default, field.name


def test_the_peft_config_of_moram() -> None:
    by_recipe, by_peft = MoRAMOptions(), MoRAMConfig()
    for ours, theirs in {"rank": "r", "k": "k", "density": "density", "alpha": "alpha"}.items():
        assert getattr(by_recipe, ours) == getattr(by_peft, theirs), ours
    assert by_recipe.formulation == by_peft.formulation
