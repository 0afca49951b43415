"""The command as a person meets it: what it prints, its exit status, and what bad input leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.cli.main import run_app
from tests.helpers.commands import run_command
from tests.helpers.run_files import write_recipe
from tests.helpers.small_disk import mount_small_disk
from tests.helpers.support import FAMILIES, in_processes

LOADED_BY_HELP = (
    "import sys; from raymem.cli.main import run_app; run_app('--help'); print(sorted(sys.modules), file=sys.stderr)"
)


@pytest.fixture
def recipe(tmp_path: Path, llama: Path, examples: Path) -> Path:
    """A recipe file of a few steps in this process, tracked in sqlite."""
    return write_recipe(tmp_path / "tiny.yaml", tmp_path, llama, examples)


def test_help_needs_no_heavy_library() -> None:
    found = subprocess.run([sys.executable, "-c", LOADED_BY_HELP], capture_output=True, text=True, check=True)
    assert "train" in found.stdout
    loaded = found.stderr
    assert not [name for name in ("torch", "ray", "mlflow", "transformers", "pydantic") if f"'{name}'" in loaded]


def test_train_evaluate_generate_merge(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], examples: Path
) -> None:
    assert run_app("train", recipe) == 0
    shown = capsys.readouterr().out
    adapter = tmp_path / "runs" / "tiny" / "adapter"
    assert "step 4/4" in shown
    assert "perplexity" in shown
    assert "next:" in shown
    assert str(adapter) in shown

    assert run_app("evaluate", recipe, "--json") == 0
    tuned = json.loads(capsys.readouterr().out)
    assert run_app("evaluate", recipe, "--json", "--artifact", "base") == 0
    base = json.loads(capsys.readouterr().out)
    facts = json.loads((adapter / "raymem.json").read_text())
    assert tuned["eval_loss"] == pytest.approx(facts["eval_loss"], abs=1e-6)
    assert tuned["eval_loss"] < base["eval_loss"]

    assert run_app("generate", adapter, "--prompt", "w1 w3", "--max-new-tokens", "3") == 0
    assert len(capsys.readouterr().out.split()) == 3

    assert run_app("merge", adapter, "-o", tmp_path / "merged") == 0
    assert_same_logits(adapter, tmp_path / "merged")
    assert run_app("merge", adapter, "-o", tmp_path / "merged") == 1
    assert "already exists" in capsys.readouterr().err


def assert_same_logits(adapter: Path, merged: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    ids = torch.arange(16).view(1, 16)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(merged)(input_ids=ids).logits
        theirs = AutoPeftModelForCausalLM.from_pretrained(adapter)(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_second_train_says_that_all_is_done_and_fresh_starts_over(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app("train", recipe) == 0
    before = (tmp_path / "runs" / "tiny" / "adapter" / "adapter_model.safetensors").read_bytes()
    capsys.readouterr()
    assert run_app("train", recipe) == 0
    assert "already complete" in capsys.readouterr().out
    assert run_app("train", recipe, "--fresh") == 0
    assert "already complete" not in capsys.readouterr().out
    assert (tmp_path / "runs" / "tiny" / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert (tmp_path / "runs" / "tiny.old-1" / "adapter").is_dir()


def test_fresh_leaves_the_earlier_run_alone_when_the_recipe_is_refused(recipe: Path, tmp_path: Path) -> None:
    assert run_app("train", recipe) == 0
    assert run_app("train", recipe, "--fresh", "-s", "adapter.targets=[nothing]") == 1
    assert (tmp_path / "runs" / "tiny" / "adapter").is_dir()


def test_an_adapter_is_evaluated_with_its_own_scale(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app("train", recipe) == 0
    capsys.readouterr()
    found = []
    for options in (
        [],
        ["-s", "adapter.alpha=999", "-s", "adapter.rank=2", "--artifact", f"{tmp_path}/runs/tiny/adapter"],
    ):
        assert run_app("evaluate", recipe, "--json", *options) == 0
        found.append(json.loads(capsys.readouterr().out)["eval_loss"])
    assert found[0] == found[1]


def test_evaluation_by_name(tmp_path: Path, llama: Path, examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = {"held-out": str(examples / "eval.jsonl"), "seen": {"path": str(examples / "train.jsonl")}}
    data = {"train": str(examples / "train.jsonl"), "eval": both, "sequence_length": 32}
    recipe = write_recipe(tmp_path / "named.yaml", tmp_path, llama, examples, data=data, tracking="mlflow")
    assert run_app("train", recipe) == 0
    capsys.readouterr()
    assert run_app("evaluate", recipe, "--json") == 0
    losses = json.loads(capsys.readouterr().out)
    metrics = [json.loads(line) for line in (tmp_path / "runs" / "named" / "metrics.jsonl").read_text().splitlines()]
    names = ("eval_loss", "eval_loss/held-out", "eval_loss/seen")
    assert [losses[name] for name in names] == pytest.approx([metrics[-1][name] for name in names], abs=1e-6)
    assert run_app("evaluate", recipe) == 0
    shown = capsys.readouterr().out
    assert f"held-out: loss {losses['eval_loss/held-out']:.4f}" in shown
    assert f"seen: loss {losses['eval_loss/seen']:.4f}" in shown

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("raymem").experiment_id])
    points = client.get_metric_history(run.info.run_id, "eval_loss/seen")
    evaluated = [row["eval_loss/seen"] for row in metrics if "eval_loss" in row]
    assert [point.value for point in points] == evaluated


def test_out_of_memory_says_what_to_lower(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr("raymem.training.loop.train_step", full)
    assert run_app("train", recipe) == 1
    assert "lower train.micro_batch" in capsys.readouterr().err


def broken(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


BAD_INPUT: dict[str, tuple[Any, list[str]]] = {
    "unknown key": (lambda d: ["-s", "adapter.rnak=3"], ["adapter.rnak", "did you mean 'rank'"]),
    "negative rank": (lambda d: ["-s", "adapter.rank=-1"], ["adapter.rank", "-1"]),
    "missing file": (lambda d: ["-s", f"data.train={d}/gone.jsonl"], ["gone.jsonl"]),
    "empty data set": (lambda d: ["-s", f"data.train={broken(d / 'empty.jsonl', '')}"], ["empty.jsonl"]),
    "malformed line": (
        lambda d: ["-s", "data.train=" + broken(d / "odd.jsonl", '{"text": "w1"}\n{"text": \n{"text": "w2"}\n')],
        ["odd.jsonl:2"],
    ),
    "no targets": (  # the prompt alone fills the row
        lambda d: [
            "-s",
            "data.train=" + broken(d / "long.jsonl", json.dumps({"prompt": "w1 " * 60, "completion": "w2"})),
        ],
        ["data.train[0]"],
    ),
    "model without config": (lambda d: ["-s", f"model.name={d}"], ["model.name", "config.json"]),
    "unmatched target": (lambda d: ["-s", "adapter.targets=[q_prj]"], ["adapter.targets", "q_prj", "q_proj"]),
    "reserved name": (lambda d: ["-s", "name=cache"], ["name", "cache"]),
    "yes for a number": (lambda d: ["-s", "train.micro_batch=true"], ["train.micro_batch", "True"]),
    "more tokens than positions": (lambda d: ["-s", "data.sequence_length=128"], ["data.sequence_length", "64"]),
    "relative uri": (lambda d: ["-s", "storage.path=ftp://x/y"], ["storage.path", "ftp"]),
    "too many failures to list": (lambda d: ["-s", "train.steps=0", "-s", "seed=-1"], ["train.steps", "seed"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line(
    case: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = BAD_INPUT[case]
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    assert run_app("train", recipe, *arguments(inputs)) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = captured.err.strip().splitlines()
    assert all(line.startswith("error: ") for line in lines)
    for words in expected:
        assert words in captured.err
    assert not (tmp_path / "runs" / "tiny" / "checkpoints").exists()


def test_checkpoint_of_another_recipe_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app("train", recipe) == 0
    kept = sorted(path.name for path in (tmp_path / "runs" / "tiny" / "checkpoints").iterdir())
    assert run_app("train", recipe, "-s", "adapter.rank=8") == 1
    message = capsys.readouterr().err
    assert "adapter" in message
    assert "--fresh" in message
    assert sorted(path.name for path in (tmp_path / "runs" / "tiny" / "checkpoints").iterdir()) == kept


def test_nan_loss_stops_with_the_step_and_keeps_the_last_checkpoint(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diverging = ["-s", "optimizer.lr=1e30", "-s", "train.clip_norm=null", "-s", "train.warmup=0"]
    assert run_app("train", recipe, *diverging, "-s", "train.save_every=1", "-s", "train.steps=9") == 1
    message = capsys.readouterr().err
    assert "at step" in message
    checkpoints = sorted((tmp_path / "runs" / "tiny" / "checkpoints").iterdir())
    assert f"checkpoint of step {int(checkpoints[-1].name[5:])} is kept" in message


def as_nobody(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command without root's power over permissions."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv to act as another user")
    return subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command],
        capture_output=True, text=True, env={**os.environ, **environment}, cwd="/",
    )  # fmt: skip


def command_of_nobody(command: list[str]) -> subprocess.CompletedProcess[str]:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    return run_command(*command)


def test_unreadable_storage_is_an_error_and_a_read_only_home_is_none(
    tmp_path: Path, llama: Path, examples: Path
) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own folders are closed to other users
        root = Path(folder)
        root.chmod(0o755)
        shutil.copytree(llama, root / "llama")
        shutil.copytree(examples, root / "examples", ignore=shutil.ignore_patterns("cache"))
        home, storage = root / "home", root / "storage"
        home.mkdir(mode=0o555)
        storage.mkdir()
        storage.chmod(0o777)
        for path in (*root.rglob("*"), root):
            path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
        recipe = write_recipe(root / "tiny.yaml", storage, root / "llama", root / "examples", tracking="mlflow")
        recipe.chmod(0o644)
        train = [sys.executable, "-m", "raymem", "train", str(recipe)]
        done = as_nobody(*train, HOME=str(home))
        if "Permission" in done.stderr and "site-packages" in done.stderr:
            pytest.skip("this Python is not readable for other users")
        assert done.returncode == 0, done.stderr
        storage.chmod(0o555)
        (refused,) = in_processes(command_of_nobody, 0, tmp_path, [*train[3:], "-s", f"storage.path={storage}/other"])
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert str(storage) in refused.stderr


def test_full_disk_at_a_checkpoint_keeps_the_one_before(tmp_path: Path, llama: Path, examples: Path) -> None:
    """A tmpfs with room for the run's start, the data and a few checkpoints of a model of 400 kB."""
    recipe = write_recipe(
        tmp_path / "tiny.yaml", tmp_path, llama, examples,
        adapter="none", train={"steps": 30, "global_batch": 4, "micro_batch": 2, "save_every": 1},
    )  # fmt: skip
    runs = tmp_path / "runs"
    runs.mkdir()
    command = ["train", str(recipe), "-s", "storage.num_to_keep=1000"]
    ((done, left),) = in_processes(command_on_small_disk, 0, tmp_path, command, runs)
    if done is None:
        pytest.skip("no private mount here")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "space" in done.stderr
    assert runs / "tiny" / "checkpoints" / "step_00000001" / "manifest.json" in left
    assert not [path for path in left if ".part" in path.name]


def command_on_small_disk(command: list[str], runs: Path) -> tuple[subprocess.CompletedProcess[str] | None, list[Path]]:
    """With what is there in the end, when the mount still exists."""
    if not mount_small_disk(runs, "2m"):
        return None, []
    return run_command(*command), list(runs.rglob("*"))


def test_init_writes_a_recipe_that_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from raymem.recipe.load import load_recipe

    assert run_app("init", tmp_path / "mine.yaml", "--from", "quickstart") == 0
    assert load_recipe(tmp_path / "mine.yaml").name == "mine"
    assert run_app("init", tmp_path / "mine.yaml") == 1
    assert "already exists" in capsys.readouterr().err
    assert run_app("init", tmp_path / "other.yaml", "--from", "quikstart") == 1
    assert "quickstart" in capsys.readouterr().err


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app("schema") == 0
    assert json.loads(capsys.readouterr().out)["properties"]["adapter"]


def test_doctor_without_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app("doctor") in (0, 1)
    shown = capsys.readouterr().out
    assert "torch" in shown


def test_scratch_model_from_a_config(tmp_path: Path, llama: Path, examples: Path) -> None:
    """Pre-training: random weights from the recipe's own config, all of them trained."""
    recipe = write_recipe(
        tmp_path / "scratch.yaml", tmp_path, llama, examples,
        model={"config": FAMILIES["llama_tied"], "tokenizer": str(llama)}, adapter="none",
    )  # fmt: skip
    assert run_app("train", recipe) == 0
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "scratch" / "model")
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
