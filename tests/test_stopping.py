"""A run that is asked to end saves the step that it is at, and goes on from there as if nothing had been."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from raymem import stopping
from raymem.recipe.schema import Recipe
from raymem.training.dist_env import DistEnv
from raymem.training.loop import run
from raymem.training.reporter import LocalReporter, Row
from tests.helpers.support import column, make_recipe, prepare_split, run_fragment, run_storage, train


def test_nothing_is_heard_outside_of_a_run() -> None:
    assert not stopping.ask() and not stopping.asked()
    with stopping.heard():
        with stopping.heard():
            assert stopping.ask() and stopping.asked()
            assert not stopping.ask(), "whoever asks twice does not want to wait"
        assert stopping.asked()
    assert not stopping.asked()


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_run_that_is_asked_saves_its_step_and_goes_on_bit_for_bit(
    keep: str, llama: Path, examples: Path, tmp_path: Path
) -> None:
    def recipe(name: str) -> Recipe:
        steps = {"steps": 6, "save_every": 4, "eval_every": 2}
        changes = {"name": name, "train": steps, "storage": {"keep": keep}, "adapter": {"dropout": 0.1}}
        return make_recipe(run_fragment(examples, tmp_path, evaluated=True), changes, model=llama)

    def ask(rows: Sequence[Row]) -> None:
        if rows[-1]["step"] == 3:
            assert stopping.ask()

    asked = recipe("asked")
    with pytest.raises(stopping.Stopped) as stopped:
        run(
            asked, DistEnv.current(asked), run_storage(asked), prepare_split(asked, "train"),
            prepare_split(asked, "eval"), LocalReporter(ask), metered_steps=(),
        )  # fmt: skip
    assert (stopped.value.step, stopped.value.code) == (3, 143)
    assert not stopping.asked()
    outcome, rows = train(asked)
    straight, expected = train(recipe("straight"))
    assert outcome is not None and straight is not None
    assert outcome.started_at == 3 and column(rows) == column(expected)
    assert outcome.eval_loss == straight.eval_loss
    files = [Path(one.artifact) / "adapter_model.safetensors" for one in (outcome, straight)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_that_is_asked_at_its_last_step_is_done(llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = make_recipe(run_fragment(examples, tmp_path), {"train": {"steps": 2}}, model=llama)

    def ask(rows: Sequence[Row]) -> None:
        if rows[-1]["step"] == 2:
            stopping.ask()

    data = prepare_split(recipe, "train")
    outcome = run(
        recipe, DistEnv.current(recipe), run_storage(recipe), data, None, LocalReporter(ask), metered_steps=()
    )
    assert outcome.steps == 2 and Path(outcome.artifact).is_dir()
