"""What MLflow holds after a run, and a driver that is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

import raymem
from raymem.cli import console
from raymem.cli.main import run_app
from raymem.cli.signals import unwind_on_signals
from tests.helpers.commands import kill_command
from tests.helpers.run_files import losses, write_recipe
from tests.helpers.support import in_processes
from tests.helpers.tracking import written


def test_run_holds_params_metrics_and_an_adapter_that_plain_peft_loads(
    tmp_path: Path, llama: Path, examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import AutoPeftModelForCausalLM

    from raymem.recipe.load import load_recipe
    from raymem.training.model.build import build_model

    recipe = write_recipe(tmp_path / "tracked.yaml", tmp_path, llama, examples, tracking={"register_as": "tiny-lora"})
    # What MLflow lacks of the first steps, as after a driver that was killed between two reports, it gets later.
    assert run_app("train", recipe, "--set", "train.steps=2", "--set", "tracking=none") == 0
    assert run_app("train", recipe) == 0

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("raymem").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["adapter.rank"] == "4"
    assert run.data.params["optimizer.lr"] == "0.01"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in history] == [1, 2, 3, 4]
    assert [point.value for point in history] == losses(tmp_path / "runs" / "tracked")
    assert run.data.metrics["eval_perplexity"] > 1
    assert run.data.metrics["peak_bytes"] > 0

    downloaded = client.download_artifacts(run.info.run_id, "adapter", str(tmp_path))
    registered = client.get_model_version_by_alias("tiny-lora", "candidate")
    assert registered.run_id == run.info.run_id
    check_datasets(run, examples)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)  # mlflow sets it too, and would leave it
    answers = check_logged_model(client, run, registered)
    assert answers == [raymem_answer(tmp_path / "runs" / "tracked" / "adapter", "to be or")]

    ids = torch.arange(24).view(1, 24)
    continued = load_recipe(recipe, [f"adapter.init_from={tmp_path}/runs/tracked/adapter"])
    with torch.no_grad():
        plain = AutoPeftModelForCausalLM.from_pretrained(downloaded).eval()(input_ids=ids).logits
        trained = build_model(continued).eval()(input_ids=ids).logits
    assert torch.equal(plain, trained)


def check_datasets(run: Any, examples: Path) -> None:
    """The run names what it was trained and evaluated on."""
    inputs = {entry.tags[0].value: entry.dataset for entry in run.inputs.dataset_inputs}
    assert {name: data.name for name, data in inputs.items()} == {
        "training": "train.jsonl", "evaluation": "eval.jsonl",
    }  # fmt: skip
    assert json.loads(inputs["training"].source) == {"uri": str(examples / "train.jsonl")}
    assert json.loads(inputs["training"].profile)["num_read"] == 40
    features = json.loads(inputs["training"].schema)["mlflow_tensorspec"]["features"]
    assert features[0] == {
        "name": "input_ids", "type": "tensor", "tensor-spec": {"dtype": "int32", "shape": [-1, 32]},
    }  # fmt: skip
    assert inputs["training"].digest != inputs["evaluation"].digest


def check_logged_model(client: mlflow.MlflowClient, run: Any, version: Any) -> list[str]:
    """The adapter is a model of the run with its metrics, without the base and without a pickle, that answers."""
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert version.source in (f"models:/{model.model_id}", model.artifact_location)
    assert model.source_run_id == run.info.run_id
    linked = {metric.key: metric for metric in model.metrics}
    assert linked["loss"].value == run.data.metrics["loss"]
    assert (linked["loss"].dataset_name, linked["eval_loss"].dataset_name) == ("train.jsonl", "eval.jsonl")
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "tiny-lora", "version": 1}]
    files = [path for path in Path(model.artifact_location.removeprefix("file://")).rglob("*") if path.is_file()]
    assert [path.name for path in files if path.suffix == ".safetensors"] == ["adapter_model.safetensors"]
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".bin", ".pt")]
    mlflow.set_tracking_uri(client.tracking_uri)
    loaded = mlflow.pyfunc.load_model("models:/tiny-lora@candidate")
    mlflow.set_tracking_uri(None)  # as before
    answers: list[str] = loaded.predict(["to be or"], params={"max_new_tokens": 5})
    return answers


def raymem_answer(adapter: Path, prompt: str) -> str:
    """What the adapter answers without MLflow, by the most likely tokens."""
    model, tokenizer = raymem.load(adapter)
    given = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**given, max_new_tokens=5, do_sample=False)
    return str(tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True))


def test_a_run_in_several_systems_goes_on_in_all_of_them(tmp_path: Path, llama: Path, examples: Path) -> None:
    recipe = write_recipe(tmp_path / "both.yaml", tmp_path, llama, examples, tracking=["mlflow", "tensorboard"])
    assert run_app("train", recipe, "--set", "train.steps=2") == 0
    assert run_app("train", recipe) == 0
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("raymem").experiment_id])
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4]
    assert [step for step, _ in written(tmp_path / "runs" / "tensorboard" / "both")] == [1, 2, 3, 4]


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_sigkill_of_the_command_changes_nothing(adapter: str, tmp_path: Path, llama: Path, examples: Path) -> None:
    train = {"steps": 24, "global_batch": 4, "micro_batch": 2, "save_every": 4}
    for name in ("killed", "straight"):
        write_recipe(tmp_path / f"{name}.yaml", tmp_path, llama, examples, adapter=adapter, train=train)
    checkpoints = tmp_path / "runs" / "killed" / "checkpoints"
    kill_command("train", tmp_path / "killed.yaml", checkpoints=checkpoints, folder=tmp_path / "first")
    assert run_app("train", tmp_path / "killed.yaml") == 0
    assert run_app("train", tmp_path / "straight.yaml") == 0
    assert losses(tmp_path / "runs" / "killed") == losses(tmp_path / "runs" / "straight")
    artifact = "adapter/adapter_model.safetensors" if adapter == "lora" else "model/model.safetensors"
    killed, straight = ((tmp_path / "runs" / name / artifact).read_bytes() for name in ("killed", "straight"))
    assert killed == straight


@pytest.mark.parametrize("name", ["SIGTERM", *(pytest.param(n, marks=pytest.mark.slow) for n in ("SIGINT", "SIGHUP"))])
def test_a_signal_ends_the_tracked_run_and_says_how_to_go_on(
    name: str, tmp_path: Path, llama: Path, examples: Path, storage: Path
) -> None:
    train = {"steps": 5000, "global_batch": 4, "micro_batch": 2, "save_every": 2}
    write_recipe(storage / f"{name}.yaml", storage, llama, examples, tracking="mlflow", train=train)
    ((status, out),) = in_processes(be_signalled, 0, tmp_path, storage / f"{name}.yaml", name)
    word = "interrupted" if name == "SIGINT" else f"stopped by {name}"
    if name == "SIGTERM":  # as from Kubernetes or a batch system, which leave some time
        newest = max((storage / "runs" / name / "checkpoints").glob("step_*/manifest.json"))
        word += f" once step {json.loads(newest.read_text())['step']} was saved"
    assert (status, out) == (128 + signal.Signals[name], f"{word}; the same command resumes from the last checkpoint\n")
    client = mlflow.MlflowClient(f"sqlite:///{storage}/runs/mlflow.db")
    (run,) = client.search_runs(
        [client.get_experiment_by_name("raymem").experiment_id], f"attributes.run_name = '{name}'"
    )
    assert run.info.status == "KILLED"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("signals")


def be_signalled(recipe: Path, name: str) -> tuple[int, str]:
    """Exit status and last words of a command that gets a signal after its first checkpoint."""
    checkpoints = recipe.parent / "runs" / recipe.stem / "checkpoints"

    def send() -> None:
        while not list(checkpoints.glob("step_*/manifest.json")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.Signals[name])

    signal.signal(signal.Signals[name], signal.SIG_DFL)  # tests that run in the background may ignore it
    unwind_on_signals()
    threading.Thread(target=send, daemon=True).start()
    with console.err.capture() as words:
        status = run_app("train", recipe)
    return status, words.get()
