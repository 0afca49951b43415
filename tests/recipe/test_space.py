"""Search spaces: conditions, grids, what a point does to a recipe, and what is wrong with a space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymem.errors import RecipeError
from raymem.recipe.schema import Recipe
from raymem.recipe.space import Space, apply, grid, sample
from raymem.recipe.space_load import load_space, recipe_at, shipped
from tests.helpers.support import make_recipe

KIND: dict[str, Any] = {"adapter.kind": {"type": "choice", "choices": ["lora", "moram", "none"]}}
RANK: dict[str, Any] = {
    "adapter.rank": {"type": "int", "low": 2, "high": 8, "log": True, "when": {"adapter.kind": ["lora", "moram"]}}
}
DENSITY: dict[str, Any] = {
    "adapter.density": {"type": "float", "low": 0.1, "high": 0.5, "when": {"adapter.kind": ["moram"]}}
}
MLORC: dict[str, Any] = {
    "optimizer.kind": {"type": "choice", "choices": ["adamw", "mlorc_adamw"], "when": {"adapter.kind": ["none"]}},
    "optimizer.rank": {"type": "choice", "choices": [4, 8], "when": {"optimizer.kind": ["mlorc_adamw"]}},
}


def recipe(space: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    return make_recipe({"space": space} if space else {}, sections)


def space_of(*parts: dict[str, Any]) -> Space:
    merged = {path: dimension for part in parts for path, dimension in part.items()}
    return load_space(None, recipe(merged))


def test_a_dimension_exists_only_where_its_condition_holds() -> None:
    space, raw = space_of(KIND, RANK, DENSITY, MLORC), recipe().to_dict()

    def point(kind: str) -> list[str]:
        drawn = {"adapter.kind": kind, "optimizer.kind": "mlorc_adamw"}
        return list(sample(space, raw, lambda path, dimension: drawn.get(path, dimension.grid()[0])))

    assert point("lora") == ["adapter.kind", "adapter.rank"]
    assert point("moram") == ["adapter.kind", "adapter.rank", "adapter.density"]
    assert point("none") == ["adapter.kind", "optimizer.kind", "optimizer.rank"]


def test_a_condition_may_ask_about_the_recipe_itself() -> None:
    moram = {"adapter": {"kind": "moram"}}
    found = load_space(None, make_recipe(moram, {"space": DENSITY}))
    assert list(found) == ["adapter.density"]
    with pytest.raises(RecipeError, match=r"space: adapter.density: its `when` is never true with this recipe"):
        load_space(None, recipe(DENSITY))


def test_a_grid_has_every_point_once() -> None:
    space, raw = space_of(KIND, RANK, DENSITY, MLORC), recipe().to_dict()
    points = [tuple(point.items()) for point in grid(space, raw)]
    # lora: 3 ranks; moram: 3 ranks x 3 densities; none: adamw, and mlorc with 2 ranks
    assert len(points) == len(set(points)) == 3 + 9 + 3
    assert {dict(point).get("adapter.rank") for point in points} == {None, 2, 4, 8}


def test_another_kind_starts_from_its_own_defaults() -> None:
    base = recipe(adapter={"kind": "lora", "rank": 3, "dropout": 0.5})
    same = recipe_at(base, {"adapter.kind": "lora", "adapter.rank": 5}, "point")
    assert (same.adapter.rank, same.adapter.dropout) == (5, 0.5)
    other = recipe_at(base, {"adapter.kind": "moram"}, "point")
    assert other.adapter.kind == "moram" and other.adapter.rank != 3
    assert base.to_dict() == recipe(adapter={"kind": "lora", "rank": 3, "dropout": 0.5}).to_dict(), "not changed"
    first = recipe_at(base, {"adapter.rank": 7, "adapter.kind": "moram"}, "point")
    assert (first.adapter.kind, first.adapter.rank) == ("moram", 7), "in whatever order they come"
    assert apply({"train": {"steps": 3}}, {"train.steps": 4}) == {"train": {"steps": 4}}


def test_what_does_not_go_together_is_the_points_own_error() -> None:
    with pytest.raises(RecipeError, match="point 3: optimizer: mlorc_adamw or mlorc_lion with an adapter is refused"):
        recipe_at(recipe(), {"optimizer.kind": "mlorc_adamw"}, "point 3")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"adapter.rnk": {"type": "int", "low": 1, "high": 2}}, "adapter.rnk: unknown key; did you mean 'rank'?"),
        ({"adptr.rank": {"type": "int", "low": 1, "high": 2}}, "space: adptr: unknown key; did you mean 'adapter'?"),
        ({"adapter.rank": {"type": "int", "low": -1, "high": 2}}, "space: adapter.rank: -1: input should be greater"),
        ({"adapter.kind": {"type": "choice", "choices": ["lorra"]}}, "'lorra' is not one of none, lora, moram"),
        ({**KIND, "optimizer.rank": {**MLORC["optimizer.rank"]}}, "optimizer.rank: its `when` is never true"),
        (
            {"adapter.kind": {"type": "choice", "choices": ["lora"]}, **DENSITY},
            "when adapter.kind is ['moram'], but the space never puts that there",
        ),
        (
            {"adapter.density": {**DENSITY["adapter.density"]}, **KIND},
            "adapter.density: its `when` asks about adapter.kind, which has no value there yet; put adapter.kind",
        ),
        (
            {"adapter.rank": {**RANK["adapter.rank"], "when": {"adapter.rank": [2]}}},
            "space: adapter.rank: its `when` asks about adapter.rank, which has no value there yet",
        ),
    ],
)  # fmt: skip
def test_a_space_that_is_none_of_the_recipe_is_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_space(None, recipe(space))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        ({"type": "flot", "low": 1, "high": 2}, "space.a.type: 'flot' is not one of float, int, choice; did you mean"),
        ({"type": "int", "low": 2, "high": 2}, "space.a.low: 2 is not below high: 2"),
        ({"type": "float", "low": 0, "high": 2, "log": True}, "space.a.low: 0.0 has no logarithm"),
        ({"type": "choice", "choices": []}, "space.a.choices: []: list should have at least 1 item"),
        ({"type": "choice", "choics": [1]}, "space.a.choics: unknown key; did you mean 'choices'?"),
        ({"choices": [1]}, "space.a.type: is missing"),
    ],
)  # fmt: skip
def test_a_malformed_dimension_is_named(dimension: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe({"a": dimension})
    assert message in str(refused.value)


def test_spaces_come_from_files_and_by_name(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(f"SPACE = {RANK!r}")
    (tmp_path / "own.yaml").write_text("adapter.rank: {type: choice, choices: [2, 4]}\n")
    (tmp_path / "section.yaml").write_text("space:\n  adapter.rank: {type: choice, choices: [2, 4]}\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "bad.py").write_text("1 / 0")
    for file in ("own.py", "own.yaml", "section.yaml"):
        assert list(load_space(str(tmp_path / file), recipe())) == ["adapter.rank"]
    assert shipped() == ["joint", "loract", "loram", "mlorc", "moram"]
    assert "optimizer.rank" in load_space("joint", recipe())
    for source, message in {
        "jiont": "no space of that name ships with raymem; did you mean 'joint'?",
        str(tmp_path / "none.py"): "no such file",
        str(tmp_path / "empty.py"): "has no SPACE",
        str(tmp_path / "bad.py"): "cannot be run: ZeroDivisionError",
    }.items():
        with pytest.raises(RecipeError) as refused:
            load_space(source, recipe())
        assert message in str(refused.value)
    with pytest.raises(RecipeError, match="there is no search space: give --space"):
        load_space(None, recipe())
    with pytest.raises(RecipeError, match=r"space: \{\}: dictionary should have at least 1 item"):
        make_recipe({"space": {}})
