"""Installed packages bring kinds; one that is broken concerns only the recipes that name its kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raymem.cli.main import run_app
from raymem.cluster.doctor.local import check_kinds
from raymem.errors import RecipeError
from raymem.kinds import OptimizerKind
from raymem.planner import plan_recipe
from raymem.recipe.axes import OPTIMIZERS, TRACKERS, Axis, outside_code
from raymem.recipe.load import recipe_schema
from tests.helpers import toy_kinds
from tests.helpers.support import make_recipe

TOYS = "tests.helpers.toy_kinds"
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Leaves in a folder of the search path what installing a package with entry points leaves there."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(package: str, **points: str) -> None:
        facts = tmp_path / f"{package}-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        (facts / "entry_points.txt").write_text("\n".join(["[raymem.optimizers]", *lines]))

    return put


def fresh_axis() -> Axis[Any]:
    """The optimizers as a new process sees them."""
    return Axis(
        "optimizer", "raymem.optimizers", OptimizerKind, default="adamw", initial="adamw", builtin=OPTIMIZERS.builtin
    )


def test_broken_packages_do_not_concern_others(install: Install, tmp_path: Path) -> None:
    (tmp_path / "raises_on_import.py").write_text("raise RuntimeError('boom')")
    install(
        "broken",
        gone="nowhere_at_all:Kind",
        raising="raises_on_import:Kind",
        adapter=f"{TOYS}:ScaleKind",
        misnamed=f"{TOYS}:SignKind",
        adamw=f"{TOYS}:SignKind",
    )
    install("one", toy_sign=f"{TOYS}:SignKind", twice=f"{TOYS}:SignKind")
    install("other", toy_sign=f"{TOYS}:SignKind", twice=f"{TOYS}:KnownSignKind")
    axis = fresh_axis()
    assert [kind.name for kind in axis.kinds()] == [*OPTIMIZERS.builtin, "toy_sign"]
    assert type(axis["adamw"]).__name__ == "AdamWKind"
    expected = {
        "gone": "the kind nowhere_at_all:Kind cannot be imported: ModuleNotFoundError",
        "raising": "the kind raises_on_import:Kind cannot be imported: RuntimeError: boom",
        "adapter": r"ScaleKind is no OptimizerKind; extend raymem\.kinds\.OptimizerKind",
        "misnamed": "SignKind is registered as 'misnamed', but its options call it 'toy_sign'",
        "twice": "(one and other|other and one) both bring a kind named 'twice'; uninstall one",
    }
    for name, message in expected.items():
        with pytest.raises(RecipeError, match=message):
            axis[name]
    assert len(axis.problems()) == len(expected) + 1
    assert any("adamw = tests.helpers.toy_kinds:SignKind of broken has the name" in line for line in axis.problems())


def test_another_process_imports_only_what_a_recipe_names() -> None:
    axis = fresh_axis()
    axis.take_over({"far": "nowhere_at_all:Kind", "toy_sign": f"{TOYS}:SignKind"})
    assert isinstance(axis["toy_sign"], toy_kinds.SignKind)
    with pytest.raises(RecipeError, match="nowhere_at_all:Kind cannot be imported"):
        axis["far"]


@pytest.fixture
def broken() -> Iterator[None]:
    """An optimizer that cannot be imported."""
    OPTIMIZERS.take_over({"far": "nowhere_at_all:Kind"})
    yield
    OPTIMIZERS.unregister("far")


@pytest.mark.usefixtures("broken")
def test_what_lists_kinds_leaves_out_a_broken_one_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert "far" not in recipe_schema()["$defs"]["Optimizer"]["anyOf"][-1]["enum"]
    assert run_app("schema") == 0
    assert "left out: optimizer: the kind nowhere_at_all:Kind cannot be imported" in capsys.readouterr().err
    [check] = [check for check in check_kinds() if check.ok is not True]
    assert check.name == "kinds" and "nowhere_at_all:Kind cannot be imported" in check.detail
    with pytest.raises(RecipeError, match=r"optimizer\.kind: the kind nowhere_at_all:Kind cannot be imported"):
        make_recipe({"optimizer": "far"})


NO_DEFAULT = "lr: float\n    kind: Literal['mine'] = 'mine'"
STRANGE = "kind: Literal['mine'] = 'mine'\n    thing: Thing = Thing()"
UNKNOWN = "kind: 'Literals' = 'mine'"


@pytest.mark.parametrize(
    ("frozen", "body", "message"),
    [
        (True, NO_DEFAULT, "a default for every field.*; lr has no default"),
        (False, "kind: Literal['mine'] = 'mine'", "it is not frozen"),
        (True, STRANGE, "a type that no recipe can hold: .*Thing"),
        (True, UNKNOWN, "annotations of its options cannot be read: name 'Literals'"),
    ],
    ids=["no default", "not frozen", "strange type", "unknown annotation"],
)
def test_unfit_options_are_said(
    frozen: bool, body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    module = f"unfit_{request.node.callspec.id.replace(' ', '_')}"
    (tmp_path / f"{module}.py").write_text(
        "from dataclasses import dataclass\nfrom typing import Literal\nfrom raymem.kinds import OptimizerKind\n\n"
        "class Thing: pass\n\n"
        f"@dataclass(frozen={frozen})\nclass Options:\n    {body}\n\n"
        "class Mine(OptimizerKind):\n    options = Options\n    def build(self, *given): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=message):
        fresh_axis().register(f"{module}:Mine")


def test_a_plan_is_made_anew_when_a_module_beside_the_kind_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "kinds_in_a_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "maths.py").write_text("FACTOR = 1\n")
    (package / "kind.py").write_text(f"from {TOYS} import SignKind\n\nclass Mine(SignKind):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    OPTIMIZERS.register("kinds_in_a_package.kind:Mine")
    try:
        recipe = make_recipe({"optimizer": "toy_sign"})
        before = outside_code(recipe)
        (package / "maths.py").write_text("FACTOR = 2\n")
        assert before is not None and outside_code(recipe) != before
    finally:
        OPTIMIZERS.unregister("toy_sign")


def test_the_planner_knows_a_registered_tracker(llama: Path, tmp_path: Path) -> None:
    TRACKERS.register(toy_kinds.LinesKind)
    try:
        tracking = {"kind": "toy_lines", "file": str(tmp_path / "lines.jsonl")}
        recipe = make_recipe({"tracking": tracking, "data": {"sequence_length": 48}}, model=llama)
        assert plan_recipe(recipe).traced
    finally:
        TRACKERS.unregister("toy_lines")
