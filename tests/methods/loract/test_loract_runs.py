"""LoRAct in runs of a recipe: resuming, other numbers of workers, ranks that a run chooses for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.errors import RecipeError
from raymem.recipe.schema import Recipe
from raymem.training.checkpoint import latest_manifest
from raymem.training.model.build import build_model
from tests.helpers.support import column, in_processes, make_recipe, run_fragment, run_storage, train

LOSSY: dict[str, Any] = {"kind": "loract", "rank": 4, "first_input": "compressed"}
AUTO: dict[str, Any] = {"kind": "loract", "rank": "auto", "max_rank": 16, "tolerance": 0.3, "report_every": 2}


@pytest.fixture
def recipe_of(examples: Path, llama: Path, tmp_path: Path) -> Any:
    def make(
        name: str, activations: dict[str, Any], world: int = 0, strategy: str = "ddp", **axes: dict[str, Any]
    ) -> Recipe:
        return make_recipe(
            run_fragment(examples, tmp_path),
            {"name": name, "activations": activations, "scaling": {"num_workers": world, "strategy": strategy}},
            # One row per micro-batch: what is compressed together is then the same whoever computes it.
            {"adapter": {"dropout": 0.1 if not world else 0.0}, "train": {"micro_batch": 1, "save_every": 2}},
            axes,
            model=llama,
        )

    return make


def losses_of(raw: dict[str, Any]) -> list[float]:
    return column(train(Recipe.model_validate(raw))[1])


@pytest.mark.parametrize("activations", [LOSSY, AUTO], ids=["fixed", "auto"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(recipe_of: Any, activations: dict[str, Any]) -> None:
    _, straight = train(recipe_of("straight", activations))
    cut = recipe_of("cut", activations)
    _, first = train(cut, stop_after=3)
    _, second = train(cut)
    assert column(first + second) == column(straight)
    assert column(straight) != column(train(recipe_of("exact", {"kind": "none"}))[1])


def test_connections_are_selected_before_ranks_are_chosen(recipe_of: Any) -> None:
    recipe = recipe_of("both", AUTO, adapter={"kind": "moram", "rank": 2})
    _, straight = train(recipe)
    again = recipe_of("both-again", AUTO, adapter={"kind": "moram", "rank": 2})
    _, first = train(again, stop_after=3)
    assert column(first + train(again)[1]) == column(straight)


def test_automatic_ranks_are_kept_with_the_checkpoints(recipe_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("auto", AUTO)
    _, rows = train(recipe, stop_after=3)
    manifest = latest_manifest(run_storage(recipe))
    assert manifest is not None
    ranks = manifest.hooks["loract"]["ranks"]
    assert set(ranks) == {"base_model.model.model.layers.0", "base_model.model.model.layers.1"}
    assert all(isinstance(rank, int) and 1 <= rank <= 16 for rank in ranks.values())
    assert [row["step"] for row in rows if "activation_error" in row] == [1, 3]
    assert all(0 < row["activation_error"] <= 0.4 for row in rows if "activation_error" in row)

    def refuse(self: Any) -> None:
        raise AssertionError("a resumed run must not choose again")

    monkeypatch.setattr("raymem.methods.loract.compression.Compression.calibration", refuse)
    path = "checkpoints/step_00000002/manifest.json"
    raw = {key: value for key, value in run_storage(recipe).read_json(path).items() if key != "sha256"}
    run_storage(recipe).write_json(path, {**raw, "schema": 1, "hooks": None, "ranks": ranks})  # as it once was
    train(recipe)
    again = latest_manifest(run_storage(recipe))
    assert again is not None and (again.step, again.hooks) == (4, manifest.hooks)


@pytest.mark.parametrize(
    ("activations", "axes", "strategy"),
    [
        (LOSSY, {}, "ddp"),
        (AUTO, {}, "fsdp2"),
        pytest.param({**LOSSY, "scope": "sublayer"}, {"adapter": {"kind": "none"}}, "fsdp2", marks=pytest.mark.slow),
        pytest.param({**LOSSY, "scope": "linear"}, {"adapter": {"kind": "none"}}, "fsdp2", marks=pytest.mark.slow),
        pytest.param({**LOSSY, "scope": "sublayer"}, {"adapter": {"kind": "none"}}, "ddp", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_workers_computes_the_same(
    recipe_of: Any, tmp_path: Path, activations: dict[str, Any], axes: dict[str, Any], strategy: str
) -> None:
    alone = losses_of(recipe_of("alone", activations, 1, **axes).to_dict())
    raw = recipe_of("together", activations, 2, strategy, **axes).to_dict()
    first, second = in_processes(losses_of, 2, tmp_path / "group", raw)
    assert first == second
    assert first == pytest.approx(alone, rel=2e-5)


def test_options_that_do_not_fit_the_model_name_their_place(recipe_of: Any) -> None:
    for activations, message in (
        ({"kind": "loract", "rank": 33}, r"activations\.rank: 33 is more than the hidden size 32"),
        ({"kind": "loract", "layers": "block"}, r"activations\.layers: 'block' matches no module"),
    ):
        with pytest.raises(RecipeError, match=message):
            build_model(recipe_of("odd", activations), meta=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"activations\.rank: 0 must be at least 1"),
        ({"rank": 1.5}, r"activations\.rank: 1\.5 must lie above 0"),
        ({"scope": "blok"}, r"activations\.scope: 'blok' is not one of layer, sublayer, linear"),
        ({"rnak": 3}, r"activations\.rnak: unknown key; did you mean 'rank'\?"),
    ],
)
def test_bad_options_are_errors_of_the_recipe(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe({"activations": {"kind": "loract", **options}})


def test_what_is_exported_bears_no_trace(recipe_of: Any) -> None:
    outcome, _ = train(recipe_of("export", LOSSY))
    assert outcome is not None
    from safetensors import safe_open

    with safe_open(f"{outcome.artifact}/adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        assert all(torch.isfinite(file.get_tensor(name)).all() for name in names)
    assert all(".lora_A." in name or ".lora_B." in name for name in names)


def test_a_run_may_go_on_with_another_rank_or_other_sites(recipe_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    train(recipe_of("changed", AUTO), stop_after=3)
    train(recipe_of("changed", {**AUTO, "scope": "sublayer"}), stop_after=4)
    assert "the checkpoint holds ranks of other sites; they are chosen anew" in caplog.text
    train(recipe_of("changed", LOSSY), stop_after=4)
    assert "activations.rank: 4 takes the place of the ranks in the checkpoint" in caplog.text
    outcome, _ = train(recipe_of("changed", {"kind": "none"}))
    assert outcome is not None and outcome.started_at == 2
    assert "holds state of loract, which this recipe does not use; it is dropped" in caplog.text
