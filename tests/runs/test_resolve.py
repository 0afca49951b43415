"""What a recipe leaves open is decided in one file, and by one order of steps."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import raymem
from raymem.errors import ModelError, RecipeError
from raymem.recipe.axes import full_base
from raymem.runs.backend import LocalBackend
from raymem.runs.loram.models import PlannedModel, PrunedModel
from raymem.runs.loram.pipeline import Pipeline
from raymem.runs.prepare import prepare
from raymem.runs.resolve import locate_again, on_full_model, resolve
from raymem.runs.resolved import FullModel
from tests.helpers.loram_runs import loram_recipe
from tests.helpers.support import make_recipe, run_fragment

PACKAGE = Path(raymem.__file__).parent
RESOLVER = "runs/resolve.py"
STEPS = {
    "resolve_revision": "training/model/revision.py",
    "began_with": "training/model/revision.py",
    "at_revision": "training/model/revision.py",
    "record": "training/model/revision.py",
    "choose_micro_batch": "planner/micro_batch.py",
    "resolve_demo": "runs/demo.py",
    "find_site": "runs/loram/base.py",
    "named_model": "runs/loram/base.py",
    "ResolvedRun": "runs/resolved.py",
}
"""Step of a resolution -> the file that holds its mechanics."""


def calls(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of what is called, whether by its name or as an attribute of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node.lineno, node.func.id
            elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                yield node.lineno, f"{node.func.value.id}.{node.func.attr}"


def resolving(source: str, file: str) -> list[str]:
    """The calls in a file that belong into the resolver."""
    modules = {Path(home).stem for home in STEPS.values()}
    found = []
    for line, name in calls(source):
        module, _, step = name.rpartition(".")
        if step in STEPS and module in ("", *modules) and file not in (RESOLVER, STEPS[step]):
            found.append(f"{file}:{line} calls {name}")
    return found


def test_nobody_else_resolves() -> None:
    found = [
        call
        for path in PACKAGE.rglob("*.py")
        for call in resolving(path.read_text(), path.relative_to(PACKAGE).as_posix())
    ]
    assert not found, "\n".join(found)


def test_the_rule_sees_both_kinds_of_call() -> None:
    assert resolving("resolve_demo(recipe, storage)", "runs/train.py")
    assert resolving("from raymem.training.model import revision\nrevision.record(run)", "sweeps/driver.py")
    assert resolving("run = ResolvedRun(recipe)", "api.py")
    assert not resolving("prediction_error.record(recipe, 1, 2)", "runs/train.py")
    assert not resolving("resolve_demo(recipe, storage)", RESOLVER)


def test_nothing_is_left_open(llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = make_recipe(run_fragment(examples, tmp_path / "runs", evaluated=True), {"name": "plain"}, model=llama)
    run = resolve(recipe)
    assert run.recipe == run.asked == recipe
    assert isinstance(run.base, FullModel) and isinstance(run.backend, LocalBackend)
    assert Path(run.tokenizer).is_relative_to(tmp_path / "runs" / "cache")
    assert run.run.path == str(tmp_path / "runs" / "plain")
    prepared = prepare(run, status=print)
    assert prepared.eval_data is not None and prepared.recipe == recipe
    assert not (tmp_path / "runs" / "plain").exists(), "nothing of the run itself is written"


def test_what_cannot_be_decided_is_said(llama: Path, examples: Path, tmp_path: Path) -> None:
    fragment = run_fragment(examples, tmp_path / "runs")
    with pytest.raises(RecipeError, match=r"train\.micro_batch: auto needs to know how much there is"):
        resolve(make_recipe(fragment, {"train": {"micro_batch": "auto"}}, model=llama))
    with pytest.raises(ModelError, match=r"^model\.name: .* has no config\.json"):
        resolve(make_recipe(fragment, model=examples))


def test_a_base_is_planned_then_pruned(llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = loram_recipe(llama, examples, tmp_path)
    planned = resolve(recipe)
    assert isinstance(planned.base, PlannedModel) and planned.recipe.base == recipe.base
    with pytest.raises(ModelError, match="run: raymem loram prune RECIPE"):
        prepare(planned, status=print)

    pipeline = Pipeline(recipe)
    directory = pipeline.prune().directory
    pruned = locate_again(planned)
    assert isinstance(pruned.base, PlannedModel) and pruned.base.site.source is planned.base.site.source
    with pytest.raises(ModelError, match="run: raymem loram align RECIPE"):
        pruned.require_base()

    pipeline.align()
    aligned = locate_again(pruned)
    assert isinstance(aligned.base, PrunedModel) and aligned.base.directory != directory
    assert aligned.recipe.to_dict()["base"]["artifact"] == str(aligned.base.directory)
    assert resolve(recipe).recipe == aligned.recipe, "as one that was resolved from the beginning"
    assert prepare(aligned, status=print).recipe == aligned.recipe
    full = on_full_model(aligned, "small-full")
    assert (full.recipe.base, full.recipe.name, full.run.path) == (
        full_base(),
        "small-full",
        str(tmp_path / "small-full"),
    )
