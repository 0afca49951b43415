"""Shared by tests of training: tiny models of many families, recipes and whole runs, with what raymem.testing has."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from raymem.recipe.load import parse_recipe
from raymem.recipe.schema import Recipe
from raymem.testing.processes import in_processes, start_server
from raymem.testing.suite import Stopped, merged, prepare_split, run_storage
from raymem.testing.tensors import assert_same, frozen, snapshot
from raymem.testing.tiny import (
    VOCABULARY,
    num_targets,
    random_batch,
    save_tiny_model,
    save_tokenizer,
    write_examples,
)
from raymem.training.dist_env import DistEnv
from raymem.training.loop import Outcome, run
from raymem.training.reporter import LocalReporter, Row
from tests.helpers import families

__all__ = [
    "FAMILIES", "VOCABULARY", "PlansHere", "Stopped", "assert_same", "column", "frozen", "in_processes",
    "let_anyone_in", "make_recipe", "merged", "num_targets", "prepare_split", "random_batch", "realigned",
    "run_fragment", "run_storage", "save_model", "save_tokenizer", "snapshot", "start_server", "train",
    "write_examples",
]  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    name: families.options_of(name)
    for name in ("llama", "llama_tied", "qwen3", "gemma3_text", "gpt_neox", "gpt2", "opt", "phi3", "qwen3_moe")
}
"""A handful of tests.helpers.families, with which whole runs are tried."""


def save_model(directory: Path, family: str = "llama", *, max_shard_size: str = "5GB", **changes: Any) -> Path:
    """A model directory with random weights and a tokenizer, as ``save_pretrained`` writes it."""
    return save_tiny_model(directory, {**FAMILIES[family], **changes}, max_shard_size=max_shard_size)


def let_anyone_in(directory: Path) -> None:
    """Open the way to a folder of pytest's for other users; pytest makes each of its folders 0700, however deep."""
    for folder in (directory, *directory.parents):
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(0o755)


PLAIN: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "set by the test"},
    "data": {"train": "train.jsonl", "sequence_length": 32},
    "adapter": {"kind": "lora", "rank": 4, "alpha": 8.0},
    "optimizer": {"lr": 1e-2},
    "train": {"steps": 4, "global_batch": 4, "micro_batch": 2},
    "scaling": {"num_workers": 0},
    "storage": {"path": "/nowhere"},
    "tracking": "none",
}


def make_recipe(*fragments: dict[str, Any], model: Path | str = "tiny-model") -> Recipe:
    """The plain recipe with fragments laid over it."""
    return parse_recipe(merged(PLAIN, {"model": {"name": str(model)}}, *fragments))


def run_fragment(examples: Path, storage: Path, *, evaluated: bool = False) -> dict[str, Any]:
    """The part of a recipe that says where data and results lie."""
    data = {"train": str(examples / "train.jsonl"), "eval": str(examples / "eval.jsonl") if evaluated else None}
    return {"data": data, "storage": {"path": str(storage)}}


def train(
    recipe: Recipe, dist_env: DistEnv | None = None, *, stop_after: int = 0, metered_steps: Collection[int] = ()
) -> tuple[Outcome | None, list[Row]]:
    """Run a recipe in this process (one of several, if there is a process group).

    Args:
        stop_after: end abruptly once the row of this step was reported, before its checkpoint.
        metered_steps: measuring a step takes longer than taking it.

    Returns:
        The outcome, None of a stopped run, and every row that was reported.
    """
    rows: list[Row] = []

    def stop(new: Sequence[Row]) -> None:
        if new[-1]["step"] == stop_after:
            raise Stopped

    train_data = prepare_split(recipe, "train")
    eval_data = prepare_split(recipe, "eval") if recipe.data.eval else None
    dist_env, reporter = dist_env or DistEnv.current(recipe), LocalReporter(rows.extend, stop)
    try:
        storage = run_storage(recipe)
        return run(recipe, dist_env, storage, train_data, eval_data, reporter, metered_steps=metered_steps), rows
    except Stopped:
        return None, rows


def column(rows: Sequence[Row], name: str = "loss") -> list[float]:
    """One metric of every step, in the order of steps; of a step that was reported twice the later row counts."""
    by_step = {row["step"]: row[name] for row in rows if name in row}
    return [by_step[step] for step in sorted(by_step)]


def realigned(model: Any) -> Any:
    """The model, its weights moved to memory that torch allocates, so that equal ones compute equal bits.

    One read from a file lies where the file has it, and kernels may round by how memory is aligned.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model


class PlansHere:
    """Stands for the planner's process, which takes longer to start than a tiny plan; it has a test of its own."""

    def ask(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        from raymem.planner.subprocess_main import answer

        with warnings.catch_warnings(action="ignore"):
            return answer(job)

    def close(self) -> int:
        return 0
