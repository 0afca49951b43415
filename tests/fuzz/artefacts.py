"""What runs leave behind, after somebody has changed it: each file of each kind of directory, and each way in."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from raymem.errors import RaymemError
from raymem.methods.loram import (
    PruneOptions,
    load_pruned,
    prune_model,
    read_manifest,
    recover_adapter,
    stamp_adapter,
    verify_recovery,
)
from raymem.methods.loram.source import open_source
from raymem.recipe.data import DataSection
from raymem.runs.loram.results import record_of
from raymem.storage.storage import Storage
from raymem.sweeps.driver import _same_sweep
from raymem.sweeps.options import SweepOptions
from raymem.sweeps.trial import earlier_result
from raymem.training.artifacts.load import load_artifact
from raymem.training.artifacts.merge import merge
from raymem.training.artifacts.vllm import lint_vllm
from raymem.training.checkpoint import Checkpoints, latest_manifest, latest_recipe
from raymem.training.data.packed.shards import prepare
from raymem.training.dist_env import DistEnv
from raymem.training.model.adapter import continuing
from raymem.training.model.revision import began_with, trained_from
from tests.fuzz.cases import DEEP, ODD, VALUES, Target
from tests.fuzz.data import CHANGES, damaged
from tests.fuzz.recipes import paths, with_value
from tests.helpers.support import make_recipe, run_fragment, save_model, train, write_examples


@functools.cache
def stock() -> Path:
    """A folder with one of everything, made once per process."""
    place = Path(tempfile.mkdtemp(prefix="raymem-fuzz-stock-"))
    model = save_model(place / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 2], "do_sample": false}')
    examples = place / "examples" / "train.jsonl"
    examples.parent.mkdir()
    write_examples(examples, 40, 0)
    recipe = make_recipe(
        run_fragment(examples.parent, place / "runs"), {"train": {"steps": 2, "save_every": 1}}, model=model
    )
    outcome, _ = train(recipe)
    assert outcome is not None
    shutil.copytree(outcome.artifact, place / "adapter")
    shutil.copytree(Path(outcome.artifact).parent, place / "run")
    prune_model(model, place / "pruned", PruneOptions(ratio=0.5, keep_first=0, keep_last=0))
    _train_on_pruned(place)
    recover_adapter(place / "small", place / "pruned", place / "recovered", full=model)
    section = DataSection.model_validate({"train": str(examples), "sequence_length": 32})
    prepare(section, "train", str(model), place / "data" / "cache")
    (place / "records" / "loram").mkdir(parents=True)
    for name, value in RECORDS.items():
        (place / "records" / name).write_text(json.dumps(value))
    return place


RECORDS: dict[str, Any] = {
    "sweep.json": {"model": {"name": "m", "revision": None}, "key": "abcd", "revision": None, "space": {}},
    "loram/verify.json": {"key": "x", "verification": {"num_factors": 3, "logit_difference": 1e-7}},
    "loram/train.json": {"key": "y", "outcome": {"steps": 3}},
    "trial.json": {"status": "done", "metrics": {"eval_loss": 1.0}},
    "revision.json": {"name": "m", "commit": None, "asked": None},
}


def _train_on_pruned(place: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(load_pruned(place / "pruned"), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01
    model.save_pretrained(place / "small")
    stamp_adapter(place / "small", place / "pruned")


def _checkpoints(run: Path) -> Any:
    storage = Storage.open(str(run))
    found = Checkpoints(storage, DistEnv()).latest()
    return found, latest_manifest(storage), latest_recipe(storage)


def _loaded_checkpoint(run: Path) -> Any:
    checkpoints = Checkpoints(Storage.open(str(run)), DistEnv())
    manifest = checkpoints.latest()
    if manifest is not None:
        checkpoints.load(manifest, {})


def _recovered(folder: Path) -> Any:
    recover_adapter(folder / "small", folder / "pruned", folder / "out", full=folder / "model")
    return verify_recovery(folder / "small", folder / "pruned", folder / "out", forward=False)


def _prepared(folder: Path) -> Any:
    section = DataSection.model_validate({"train": str(stock() / "examples" / "train.jsonl"), "sequence_length": 32})
    return prepare(section, "train", str(stock() / "model"), folder / "cache")


def _records(folder: Path) -> Any:
    storage = Storage.open(str(folder))
    options = SweepOptions(budget_bytes=1 << 30, samples=1)
    for ask in (
        lambda: _same_sweep(storage, make_recipe(), {}, options),
        lambda: [record_of(storage, stage) for stage in ("prune", "train", "verify", "evaluate")],
        lambda: earlier_result(storage),
        lambda: began_with(storage),
    ):
        try:
            ask()
        except RaymemError as error:
            last = error
    raise last


WAYS_IN: dict[str, tuple[tuple[str, ...], Callable[[Path], Any]]] = {
    "load an adapter": (("adapter",), lambda folder: load_artifact(folder / "adapter")),
    "merge an adapter": (("adapter",), lambda folder: merge(folder / "adapter", folder / "merged")),
    "lint an adapter": (("adapter",), lambda folder: lint_vllm(folder / "adapter")),
    "continue an adapter": (("adapter",), lambda folder: continuing(folder / "adapter")),
    "ask what it was trained from": (("adapter",), lambda folder: trained_from(str(folder / "adapter"), "any")),
    "load a model": (("model",), lambda folder: load_artifact(folder / "model")),
    "open a model": (("model",), lambda folder: open_source(folder / "model")),
    "read checkpoints": (("run",), lambda folder: _checkpoints(folder / "run")),
    "load a checkpoint": (("run",), lambda folder: _loaded_checkpoint(folder / "run")),
    "read a pruned model": (
        ("pruned",),
        lambda folder: (read_manifest(folder / "pruned"), open_source(folder / "pruned")),
    ),
    "load a pruned model": (("pruned",), lambda folder: load_artifact(folder / "pruned")),
    "recover": (("small", "pruned"), _recovered),
    "verify": (
        ("recovered",),
        lambda f: verify_recovery(stock() / "small", stock() / "pruned", f / "recovered", forward=False),
    ),
    "prepare data": (("data",), lambda folder: _prepared(folder / "data")),
    "read records": (("records",), lambda folder: _records(folder / "records")),
}


def use(case: dict[str, Any]) -> Any:
    """Change a file of a copy and go in."""
    names, way_in = WAYS_IN[case["way_in"]]
    with tempfile.TemporaryDirectory(prefix="raymem-fuzz-") as name:
        folder = Path(name)
        for part in names:
            shutil.copytree(stock() / part, folder / part)
        if "model" not in names and case["way_in"] == "recover":
            (folder / "model").symlink_to(stock() / "model")
        files = sorted(path for part in names for path in (folder / part).rglob("*") if path.is_file())
        small = [path for path in files if path.suffix in (".json", ".jsonl", ".txt", ".jinja")]
        file = (small if case["small"] and small else files)[
            case["file"] % len(small if case["small"] and small else files)
        ]
        CHANGERS[case["change"]](file, case)
        return way_in(folder)


def _other_value(file: Path, case: dict[str, Any]) -> None:
    try:
        raw = json.loads(file.read_bytes())
        places = [(), *paths(raw)]
    except ValueError:
        return _other_bytes(file, case)
    path = places[case["place"] % len(places)]
    changed = with_value(raw, path, case["value"]) if path else case["value"]
    file.write_text(json.dumps(changed), encoding="utf-8", errors="surrogatepass")


def _other_bytes(file: Path, case: dict[str, Any]) -> None:
    file.write_bytes(damaged(file.read_bytes(), case["bytes"]))


def _not_a_number(file: Path, case: dict[str, Any]) -> None:
    from safetensors.torch import load_file, save_file

    if file.suffix != ".safetensors":
        return _other_value(file, case)
    tensors = load_file(file)
    key = sorted(tensors)[case["place"] % len(tensors)]
    tensors[key] = torch.full_like(tensors[key], float("nan")) if tensors[key].is_floating_point() else tensors[key] + 1
    save_file(tensors, file, {"format": "pt"})


def _instead(make: Callable[[Path], Any]) -> Callable[[Path, dict[str, Any]], None]:
    def change(file: Path, case: dict[str, Any]) -> None:
        file.unlink()
        make(file)

    return change


CHANGERS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "value": _other_value,
    "bytes": _other_bytes,
    "nan": _not_a_number,
    "text": lambda file, case: (file.write_text(case["text"], encoding="utf-8", errors="surrogatepass"), None)[1],
    "gone": _instead(lambda file: None),
    "folder": _instead(lambda file: file.mkdir()),
    "link to itself": _instead(lambda file: file.symlink_to(file)),
    "device": _instead(lambda file: file.symlink_to("/dev/zero")),
    "pipe": _instead(os.mkfifo),
}
CASES = st.fixed_dictionaries(
    {
        "way_in": st.sampled_from(sorted(WAYS_IN)),
        "change": st.sampled_from([*["value"] * 12, *["bytes"] * 4, "nan", *CHANGERS]),
        "file": st.integers(0, 40),
        "small": st.integers(0, 3).map(bool),
        "place": st.integers(0, 400),
        "value": VALUES,
        "bytes": CHANGES,
        "text": ODD | st.sampled_from(DEEP),
    }
)
TARGETS = {"artefacts": Target(CASES, use)}
