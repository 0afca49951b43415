"""A branch of the hub moves while a run goes on: one commit is meant all the same, by whatever comes of the run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raymem.errors import CheckpointError, ModelError
from raymem.methods.loram.config import LoRAMOptions
from raymem.recipe.schema import Recipe
from raymem.runs.backend import LocalBackend
from raymem.runs.evaluate import evaluate_recipe
from raymem.runs.loram.pipeline import Pipeline
from raymem.runs.train import launch
from raymem.storage.checksums import CHECKSUMS
from raymem.storage.storage import Storage
from raymem.sweeps import driver as sweep_module
from raymem.sweeps.options import SweepOptions
from raymem.training.artifacts.load import load_artifact
from raymem.training.artifacts.merge import merge
from raymem.training.model.revision import RECORD
from raymem.training.reporter import Row
from tests.helpers.hub import NAME, Hub
from tests.helpers.loram_runs import loram_recipe, run_stages
from tests.helpers.support import Stopped, make_recipe, run_fragment


@pytest.fixture
def hub(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "hub", llama, monkeypatch)


@pytest.fixture
def recipe(examples: Path, tmp_path: Path) -> Any:
    """Makes the recipe of a run on the hub's model."""

    def make(name: str, steps: int = 2, revision: str | None = None) -> Recipe:
        train = {"steps": steps, "save_every": 1, "schedule": "constant", "warmup": 0}
        sections = {"name": name, "model": {"revision": revision}, "train": train}
        return make_recipe(run_fragment(examples, tmp_path / "runs", evaluated=True), sections, model=NAME)

    return make


def adapter_of(name: str, storage: Path) -> tuple[bytes, str | None]:
    """The weights of an adapter, and the revision that it names."""
    adapter = storage / name / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == NAME
    return (adapter / "adapter_model.safetensors").read_bytes(), config["revision"]


def test_a_run_means_the_commit_that_it_began_with(hub: Hub, recipe: Any, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    (first,) = hub.commits
    launch(recipe("straight", steps=4))
    launch(recipe("run"))
    second = hub.move()

    finished = launch(recipe("run", steps=4))
    assert finished.outcome.started_at == 2
    assert finished.recipe.model.revision == first
    assert adapter_of("run", runs) == adapter_of("straight", runs) == (adapter_of("run", runs)[0], first)

    loss = finished.outcome.eval_loss
    assert loss is not None
    assert evaluate_recipe(recipe("run")).result.loss == pytest.approx(loss, abs=1e-6)
    assert evaluate_recipe(recipe("other"), str(runs / "run" / "adapter")).result.loss == pytest.approx(loss, abs=1e-6)
    before, after = evaluate_recipe(recipe("run"), "base"), evaluate_recipe(recipe("other"), "base")
    assert before.result.loss != after.result.loss, "the bare model is the run's, or the hub's"

    base = load_file(hub.snapshot(first) / "model.safetensors")
    loaded, _ = load_artifact(runs / "run" / "adapter")
    merged = load_file(merge(runs / "run" / "adapter", tmp_path / "merged") / "model.safetensors")
    embedding = base["model.embed_tokens.weight"]
    assert torch.equal(loaded.get_input_embeddings().weight, embedding)
    assert torch.equal(merged["model.embed_tokens.weight"], embedding)

    assert launch(recipe("new")).recipe.model.revision == second
    assert launch(recipe("run"), fresh=True).recipe.model.revision == second
    assert evaluate_recipe(recipe("run")).result.loss != pytest.approx(loss, abs=1e-6)


def test_a_branch_that_is_named_again_is_the_same_and_another_is_refused(hub: Hub, recipe: Any, tmp_path: Path) -> None:
    (first,) = hub.commits
    launch(recipe("run", revision="main"))
    second = hub.move()
    for steps, same in ((3, "main"), (4, None), (5, first)):
        assert launch(recipe("run", steps, same)).recipe.model.revision == first
    hub.name("v1", first)
    assert launch(recipe("run", 6, "v1")).recipe.model.revision == first
    hub.name("v2", second)
    for other in (second, "v2"):
        with pytest.raises(CheckpointError, match=rf"started with model\.revision={first} but .* says {second}"):
            launch(recipe("run", 7, other))
        with pytest.raises(ModelError, match=rf"^model\.revision: {other} is commit {second} .* trained on {first}"):
            evaluate_recipe(recipe("run", revision=other))
    assert evaluate_recipe(recipe("run", revision="main")).result.num_targets
    with pytest.raises(ModelError, match="cannot be had"):
        launch(recipe("run", 7, "nowhere"))
    assert launch(recipe("run", 7)).outcome.started_at == 6


def test_a_run_without_a_checkpoint_goes_on_too(hub: Hub, recipe: Any) -> None:
    def stop(rows: Sequence[Row]) -> None:
        raise Stopped

    (first,) = hub.commits
    with pytest.raises(Stopped):
        launch(recipe("run"), listeners=[stop])
    second = hub.move()
    assert launch(recipe("run", revision="main")).recipe.model.revision == second, "nothing was trained on the first"
    with pytest.raises(Stopped):
        launch(recipe("again"), listeners=[stop])
    hub.move()
    assert launch(recipe("again")).recipe.model.revision == second
    assert first != second


def test_runs_of_earlier_versions_go_on(hub: Hub, recipe: Any, tmp_path: Path) -> None:
    """They have no record; their checkpoints name the commit."""
    (first,) = hub.commits
    launch(recipe("run"))
    (tmp_path / "runs" / "run" / RECORD).unlink()
    hub.move()
    assert launch(recipe("run", steps=4)).recipe.model.revision == first
    assert not (tmp_path / "runs" / "run" / RECORD).exists()


def test_an_adapter_of_others_may_name_a_branch(hub: Hub, recipe: Any, tmp_path: Path) -> None:
    launch(recipe("run"))
    adapter = tmp_path / "runs" / "run" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "revision": "main"}))
    for name in ("raymem.json", CHECKSUMS):
        (adapter / name).unlink()
    hub.name("v1", hub.commits[0])
    losses = {evaluate_recipe(recipe("run", revision=same), str(adapter)).result.loss for same in (None, "main", "v1")}
    assert len(losses) == 1
    hub.move()
    assert evaluate_recipe(recipe("other"), str(adapter)).result.loss not in losses
    with pytest.raises(ModelError, match=r"^model\.revision: v1 is commit .* trained on main"):
        evaluate_recipe(recipe("other", revision="v1"), str(adapter))


def test_on_an_object_store_too(
    hub: Hub, recipe: Any, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    remote = Storage.open(s3_uri).child(tmp_path.name)

    def there(steps: int) -> Recipe:
        return make_recipe(recipe("run", steps).to_dict(), {"storage": {"path": remote.path}}, model=NAME)

    (first,) = hub.commits
    launch(there(2))
    hub.move()
    finished = launch(there(4))
    assert (finished.outcome.started_at, finished.recipe.model.revision) == (2, first)
    assert evaluate_recipe(there(4)).result.loss == pytest.approx(finished.outcome.eval_loss, abs=1e-6)


def test_a_sweep_means_one_commit(hub: Hub, recipe: Any, tmp_path: Path) -> None:
    asks, storage = recipe("sweep", revision="main"), Storage.open(str(tmp_path / "runs"))
    options, folder = SweepOptions(1 << 30), storage.child("sweep")

    def settled(wanted: Recipe) -> str | None:
        _, facts = sweep_module._same_sweep(folder, wanted, {}, options)
        revision = sweep_module._prepare(wanted, facts, storage, LocalBackend(), print).model.revision
        folder.write_record(sweep_module._FACTS, {**facts, "revision": revision})
        return revision

    (first,) = hub.commits
    assert settled(asks) == first
    hub.move()
    assert {settled(asks), settled(recipe("sweep")), settled(recipe("sweep", revision=first))} == {first}


def test_a_pruned_model_that_the_recipe_names_knows_its_commit(hub: Hub, examples: Path, tmp_path: Path) -> None:
    found = loram_recipe(Path(NAME), examples, tmp_path / "runs", align=False)
    (first,) = hub.commits
    artifact = Pipeline(found.model_copy(update={"name": "first"})).prune().directory
    hub.move()
    named = found.model_copy(update={"base": LoRAMOptions(artifact=str(artifact))})
    run_stages(Pipeline(named), ("train", "recover", "evaluate"))
    recovered = tmp_path / "runs" / "small" / "recovered"
    assert json.loads((recovered / "adapter_config.json").read_text())["revision"] == first
    rows = json.loads((tmp_path / "runs" / "small" / "loram" / "evaluate.json").read_text())
    for recipe in (named, found):
        again = evaluate_recipe(recipe, str(recovered)).result.loss
        assert again == pytest.approx(rows["full + recovered"]["loss"], abs=1e-6)
    hub.move()
    assert launch(named).outcome.started_at == 4, "nothing is left to do"


def test_the_stages_of_loram_mean_one_commit(hub: Hub, examples: Path, tmp_path: Path) -> None:
    recipe = loram_recipe(Path(NAME), examples, tmp_path / "runs", align=False)
    named = recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": "main"})})
    (first,) = hub.commits
    pruned = Pipeline(named).prune()
    second = hub.move()
    for stage in ("train", "recover", "evaluate"):  # each as a process of its own would do it
        run_stages(Pipeline(recipe), (stage,))
    assert Pipeline(named).ready().directory == pruned.directory
    recovered = tmp_path / "runs" / "small" / "recovered"
    assert json.loads((recovered / "adapter_config.json").read_text())["revision"] == first
    rows = json.loads((tmp_path / "runs" / "small" / "loram" / "evaluate.json").read_text())
    again = evaluate_recipe(recipe, str(recovered)).result
    assert again.loss == pytest.approx(rows["full + recovered"]["loss"], abs=1e-6)

    fresh = Pipeline(named, fresh=True)
    assert fresh.prune().run.recipe.model.revision == second
    fresh.train(fresh=True)
    hub.move()
    assert Pipeline(named).ready().run.recipe.model.revision == second
    assert Pipeline(recipe).recover() == str(recovered)
    assert json.loads((recovered / "adapter_config.json").read_text())["revision"] == second
