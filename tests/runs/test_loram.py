"""LoRAM from end to end: what the stages leave, deaths at any moment, and what is refused in one line."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
import yaml
from safetensors.torch import load_file, save_file

from raymem.cli.main import run_app
from raymem.cluster.tasks import ray_map
from raymem.errors import ModelError
from raymem.methods.loram import read_manifest
from raymem.methods.loram.manifest import MANIFEST
from raymem.methods.loram.pruning.steps import Step
from raymem.methods.loram.recover import is_recovered
from raymem.recipe.schema import Recipe
from raymem.runs.loram.pipeline import Pipeline
from raymem.runs.train import launch
from raymem.training.data.packed import shards
from tests.helpers.loram_runs import STAGES, dying_run, files_of, identities, loram_recipe, run_stages
from tests.helpers.ray_processes import RayHead
from tests.helpers.support import in_processes, make_recipe, run_fragment, save_model

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def untouched(llama: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Storage of a pipeline that nobody disturbed, and how often a file took its final name in each stage."""
    storage = tmp_path_factory.mktemp("untouched")
    (counts,) = in_processes(dying_run, 0, storage / "meet", loram_recipe(llama, examples, storage), "", 0)
    return storage, counts


def pruned_files(storage: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(storage).items() if name.startswith("cache/loram/")}


# ---- what it leaves


def test_the_result_is_an_adapter_of_the_full_model(
    untouched: tuple[Path, dict[str, int]],
    llama: Path,
    examples: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recovered = untouched[0] / "small" / "recovered"
    config = json.loads((recovered / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llama)
    facts = json.loads((recovered / "raymem.json").read_text())
    assert facts["peak_bytes"] > 0
    assert (facts["loram"]["criterion"], facts["loram"]["layer_ratios"]) == ("taylor", [0.5, 0.75])
    adapter = untouched[0] / "small" / "adapter"
    assert facts["loram"]["manifest"] == read_manifest(adapter, with_weights=False).digest
    assert read_manifest(adapter, with_weights=False).aligned is not None
    rows = json.loads((untouched[0] / "small" / "loram" / "evaluate.json").read_text())
    assert set(rows) - {"sha256"} == {"full", "pruned", "pruned + adapter", "full + recovered"}
    assert rows["pruned + adapter"]["loss"] < rows["pruned"]["loss"]

    assert run_app("export", recovered, "-o", tmp_path / "copy") == 0
    shown = capsys.readouterr().out
    assert f"vllm serve {llama} --enable-lora --max-lora-rank 8 --lora-modules copy={tmp_path / 'copy'}" in shown
    assert run_app("generate", adapter, "--prompt", "w1 w3", "--max-new-tokens", "2") == 0, "on the pruned model"
    assert run_app("export", adapter) == 1
    assert "raymem loram recover" in capsys.readouterr().err
    assert run_app("merge", adapter, "-o", tmp_path / "no") == 1
    assert run_app("merge", recovered, "-o", tmp_path / "merged") == 0
    before, after = load_file(llama / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_what_is_done_is_not_repeated(
    untouched: tuple[Path, dict[str, int]], llama: Path, examples: Path
) -> None:  # fmt: skip
    before = identities(untouched[0])
    told: list[str] = []
    pipeline = Pipeline(loram_recipe(llama, examples, untouched[0]), status=told.append)
    run_stages(pipeline)
    assert identities(untouched[0]) == before
    assert not [text for text in told if text.startswith(("pruning", "aligning", "checking", "evaluating"))]
    checked = pipeline.verify()
    assert checked.num_weights is None, "alignment moved them"
    assert pipeline.verify() == checked


def test_train_uses_what_was_pruned_and_says_what_is_missing(llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = loram_recipe(llama, examples, tmp_path)
    with pytest.raises(ModelError, match=r"not pruned with these options yet in .*; run: raymem loram prune RECIPE"):
        launch(recipe)
    pipeline = Pipeline(recipe)
    pipeline.prune()
    with pytest.raises(ModelError, match="is not aligned yet; run: raymem loram align RECIPE"):
        launch(recipe)
    with pytest.raises(ModelError, match=r"run: raymem loram recover RECIPE|run: raymem loram align RECIPE"):
        pipeline.verify()
    pipeline.align()
    finished = launch(recipe)
    assert not is_recovered(finished.outcome.artifact)
    named = json.loads((Path(finished.outcome.artifact) / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named).parent.name.startswith("loram-aligned-")
    assert is_recovered(pipeline.recover())
    longer = loram_recipe(llama, examples, tmp_path, train={"steps": 6})
    Pipeline(longer).train()
    Pipeline(longer).recover()
    assert (tmp_path / "small" / "recovered.old-1").is_dir()


def test_moram_recovers_too(llama: Path, examples: Path, tmp_path: Path) -> None:
    adapter = {"kind": "moram", "rank": 4, "density": 0.25, "selection_batches": 1}
    pipeline = Pipeline(loram_recipe(llama, examples, tmp_path, align=False, adapter=adapter))
    run_stages(pipeline)
    checked = pipeline.verify()
    assert checked.num_weights and checked.logit_difference is not None
    rows = pipeline.evaluate()
    assert rows["full + recovered"]["loss"] != rows["full"]["loss"]


# ---- deaths


def test_the_driver_dies_once_in_every_stage(
    untouched: tuple[Path, dict[str, int]], llama: Path, examples: Path, tmp_path: Path
) -> None:
    """At a seeded moment of each stage; the next start goes on, and the end is bit for bit that of a quiet run."""
    recipe, draw = loram_recipe(llama, examples, tmp_path), random.Random(0)
    for stage in STAGES:
        check_death(recipe, tmp_path, stage, draw.randint(1, untouched[1][stage]))
    in_processes(dying_run, 0, tmp_path / "meet", recipe, "", 0)
    assert files_of(tmp_path) == files_of(untouched[0])
    assert not list((tmp_path / "cache" / "loram").glob(".*"))


@SLOW
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", STAGES)
def test_the_driver_dies_at_every_moment_of_a_stage(
    stage: str, untouched: tuple[Path, dict[str, int]], llama: Path, examples: Path, tmp_path: Path
) -> None:
    for rename in range(1, untouched[1][stage] + 1):
        storage = tmp_path / str(rename)
        recipe = loram_recipe(llama, examples, storage)
        check_death(recipe, storage, stage, rename)
        in_processes(dying_run, 0, storage / "meet", recipe, "", 0)
        assert files_of(storage) == files_of(untouched[0])
        shutil.rmtree(storage)


def check_death(recipe: Recipe, storage: Path, stage: str, rename: int) -> None:
    storage.mkdir(exist_ok=True)
    before = identities(storage)
    with pytest.raises(AssertionError, match="a process died"):
        in_processes(dying_run, 0, storage / "meet", recipe, stage, rename)
    assert_nothing_is_half_written(storage)
    after = identities(storage)
    done = {name for name in before if not name.startswith(".") and "/." not in name and "evaluate" not in name}
    assert {name: after[name] for name in done if name in after} == {
        name: before[name] for name in done if name in after
    }


def assert_nothing_is_half_written(storage: Path) -> None:
    """A directory that has its final name is whole."""
    for pruned in (storage / "cache" / "loram").glob("[!.]*"):
        read_manifest(pruned)
    for folder in ("adapter", "recovered"):
        if (storage / "small" / folder).exists():
            load_file(storage / "small" / folder / "adapter_model.safetensors")
            assert (storage / "small" / folder / "raymem.json").is_file()


def on_ray(llama: Path, examples: Path, storage: Path) -> Recipe:
    scaling = {"num_workers": 1, "resources_per_worker": {"CPU": 1}}
    return loram_recipe(llama, examples, storage, align=False, scaling=scaling)


def test_sigkill_of_a_task_changes_nothing(
    cluster: RayHead, untouched: tuple[Path, dict[str, int]], llama: Path, examples: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Between writing a file and naming it, in a seeded step of pruning; Ray runs the task again."""
    victim = random.Random(1).choice(["rest", "embed", "forward-0", "loss", "backward-1", "layer-0", "layer-1"])
    marker = tmp_path / "died"

    def dying_task(job: Any, step: Step) -> None:
        if step.name == victim and not marker.exists():

            def replace(*arguments: Any) -> None:
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)

            os.replace = replace  # type: ignore[assignment]
        job.run(step)

    monkeypatch.setattr("raymem.cluster.step_jobs.run_task", dying_task)
    pipeline = Pipeline(on_ray(llama, examples, tmp_path))
    pipeline.prune()
    assert marker.exists()
    assert pruned_files(tmp_path) == pruned_files(untouched[0])


def test_data_of_several_blocks_is_prepared_by_tasks(
    cluster: RayHead, llama: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here, where the workers of the test above still wait, with what they have imported."""
    monkeypatch.setattr(shards, "BLOCK_ROWS", 25)
    section = make_recipe(run_fragment(examples, tmp_path)).data
    here = shards.prepare(section, "train", str(llama), tmp_path / "here")
    driver = os.getpid()

    def elsewhere(function: Any, task: Any, kinds: Any) -> Any:
        assert os.getpid() != driver
        return function(task)

    monkeypatch.setattr("raymem.cluster.tasks.function_of", elsewhere)
    there = shards.prepare(section, "train", str(llama), tmp_path / "there", ray_map)
    assert there.key == here.key
    ((mine, _),), ((theirs, _),) = here.directories, there.directories
    names = sorted(path.name for path in mine.iterdir())
    assert len(names) == 3, "two shards and a manifest"
    assert [(theirs / name).read_bytes() for name in names] == [(mine / name).read_bytes() for name in names]


@SLOW
def test_sigkill_of_the_driver_while_tasks_run(
    cluster: RayHead, untouched: tuple[Path, dict[str, int]], llama: Path, examples: Path, tmp_path: Path
) -> None:
    recipe = on_ray(llama, examples, tmp_path)
    environment = {name: os.environ[name] for name in cluster.client_env() if name.startswith("RAY_") or name == "HOME"}
    with pytest.raises(AssertionError, match="a process died"):
        in_processes(driver_that_dies, 0, tmp_path / "meet", recipe, environment)
    assert not pruned_files(tmp_path) or not list((tmp_path / "cache" / "loram").glob(f"[!.]*/{MANIFEST}"))
    shards = {path.name: path.stat().st_ino for path in (tmp_path / "cache" / "loram").glob(".*/model-*.safetensors")}
    Pipeline(recipe).prune()
    assert pruned_files(tmp_path) == pruned_files(untouched[0])
    found = {path.name: path.stat().st_ino for path in (tmp_path / "cache" / "loram").glob("*/model-*.safetensors")}
    assert shards.items() <= found.items(), "what was written before is not written again"


def driver_that_dies(recipe: Recipe, environment: dict[str, str]) -> None:
    from tests.helpers.ray_fixtures import read_authentication_again

    os.environ.update(environment)
    read_authentication_again()  # Ray read its environment when it was imported
    pipeline = Pipeline(recipe)

    def die(done: int, total: int) -> None:
        if done == total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    pipeline._progress = die  # type: ignore[method-assign]
    pipeline.prune()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Any]:
    """A cluster of a head without cores and one node, as processes of this test."""
    from ray.cluster_utils import Cluster

    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_enable_metrics_collection", "0")  # a node waits 15 s for its collector, then gives up
        size = {"object_store_memory": 100 << 20, "memory": 4 << 30}
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **size})
        patch.setenv("RAY_ADDRESS", made.address)
        made.size = size
        yield made
        ray.shutdown()
        made.shutdown()


@SLOW
@pytest.mark.ray
def test_a_node_dies(
    nodes: Any, untouched: tuple[Path, dict[str, int]], llama: Path, examples: Path, tmp_path: Path
) -> None:
    first = nodes.add_node(num_cpus=1, **nodes.size)
    pipeline = Pipeline(on_ray(llama, examples, tmp_path))
    worker = threading.Thread(target=pipeline.prune)
    worker.start()
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cache").glob("loram/.*/work/done-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    nodes.remove_node(first, allow_graceful=False)
    nodes.add_node(num_cpus=1, **nodes.size)
    worker.join(180)
    assert not worker.is_alive()
    assert pruned_files(tmp_path) == pruned_files(untouched[0])


# ---- what is refused


@pytest.fixture
def recipe_file(llama: Path, examples: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    values = loram_recipe(llama, examples, tmp_path / "runs", align=False).to_dict()
    values["base"] |= {"criterion": "random", "layer_ratios": None, "keep_first": 0, "keep_last": 1}
    path.write_text(yaml.safe_dump(values))
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    assert run_app("loram", *arguments) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def broken_copy(model: Path, target: Path) -> Path:
    return Path(shutil.copytree(model, target))


def test_bad_options_and_models(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ratio in ("1.0", "-0.1"):
        assert f"base.ratio: {ratio} is outside [0, 1)" in refused(
            capsys, "prune", recipe_file, "-s", f"base.ratio={ratio}"
        )
    assert "ratio: 0.99 leaves none of the" in refused(capsys, "prune", recipe_file, "-s", "base.ratio=0.99")
    gpt2 = save_model(tmp_path / "gpt2", "gpt2")
    line = refused(capsys, "prune", recipe_file, "-s", f"model.name={gpt2}")
    assert "does not know how the layers of model_type 'gpt2' are coupled" in line
    assert "base.kind: full is not pruned" in refused(capsys, "run", recipe_file, "-s", "base={kind: full}")
    assert "base.align.model: not a section" in refused(capsys, "run", recipe_file, "-s", "base.align.model={name: x}")
    job: list[Any] = [sys.executable, ROOT / "jobs" / "loram.py", recipe_file, "-s", "base.ratio=2"]
    done = subprocess.run(job, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def test_damaged_models(recipe_file: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = broken_copy(llama, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", (cut / "model.safetensors").stat().st_size - 100)
    assert "not a complete safetensors file" in refused(capsys, "prune", recipe_file, "-s", f"model.name={cut}")
    lacking = broken_copy(llama, tmp_path / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    assert "lacks tensor model.layers.1.mlp.up_proj.weight" in refused(
        capsys, "prune", recipe_file, "-s", f"model.name={lacking}"
    )
    assert not list((tmp_path / "runs").rglob("model-*.safetensors"))


def test_a_full_disk(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        others = {name: getattr(os, name) for name in ("open", "close", "O_RDONLY")}
        patch.setattr("raymem.storage.safetensors_io.os", SimpleNamespace(fsync=full, **others))
        line = refused(capsys, "prune", recipe_file)
    assert "no space left on the device" in line and "free some" in line
    assert not list((tmp_path / "runs" / "cache" / "loram").glob("[!.]*"))
    assert run_app("loram", "prune", recipe_file) == 0


def test_what_does_not_belong_together(
    recipe_file: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app("loram", "run", recipe_file) == 0
    shown = capsys.readouterr().out
    assert "x by the paper's count" in shown and "stored" in shown
    assert "verified: " in shown and "weights are the full model's" in shown
    assert "full + recovered" in shown

    assert run_app("loram", "prune", recipe_file, "-s", "base.seed=1") == 0
    line = refused(capsys, "recover", recipe_file, "-s", "base.seed=1")
    assert "was trained on another pruned model" in line

    other = broken_copy(llama, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    (pruned, *_) = (tmp_path / "runs" / "cache" / "loram").glob("[!.]*")
    line = refused(
        capsys, "train", recipe_file, "-s", f"model.name={other}", "-s", f"base={{kind: loram, artifact: {pruned}}}"
    )
    assert "is not the base that was pruned (model.safetensors differs from the manifest's fingerprint)" in line
