"""Keeps in the directory of a run what a page about it shows: its data with the targets marked, plan and predictions.

The data may be gone by the time that somebody looks at the run, and a plan is remembered on one machine only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, Literal

from raymem.planner import Plan
from raymem.recipe.data import Source
from raymem.runs.resolved import ResolvedRun
from raymem.storage.publish import digest, read_manifest
from raymem.storage.storage import Storage
from raymem.tracking import DatasetFacts
from raymem.training.data.packed.shards import Prepared, PreparedSource
from raymem.training.data.pairs import described
from raymem.training.data.summary import Part, examples, summarise
from raymem.training.data.tokenizer import load_tokenizer
from raymem.training.job import PreparedRun

DATA = "data.json"
"""The file with the figures of the sources, and examples of the training data as they were trained."""
PLAN = "plan.json"
"""The file with the plan that the run began with, without its timeline."""
PREDICTIONS = "predictions.json"
"""The file with predictions beside their references, from the last evaluation that made some: an object with
``artifact`` and ``predictions``, a list of objects with ``prompt``, ``prediction`` and ``reference``, all text."""
SCORES = "scores.json"
"""The file with the metrics of answers, by the step that was judged; see ``train.score_every``."""

NUM_EXAMPLES = 3
MOST_CHARACTERS = 4000
"""Characters of an example that are kept."""


def note_data(run: ResolvedRun, prepared: PreparedRun) -> None:
    """Write down the figures of a run's data, and its first examples.

    Raises:
        StorageError: it cannot be written.
    """
    tokenizer = load_tokenizer(run.tokenizer)
    shown = [_cut(example) for example in islice(examples(prepared.train_data, tokenizer), NUM_EXAMPLES)]
    values: dict[str, Any] = {"train": _figures(run.recipe.data.train, prepared.train_data), "examples": shown}
    if prepared.eval_data is not None:
        values["eval"] = _figures(run.recipe.data.eval or [], prepared.eval_data)
    run.run.write_record(DATA, values)


def datasets_of(run: ResolvedRun, prepared: PreparedRun) -> list[DatasetFacts]:
    """Return what tracking systems are told of a run's data."""
    splits: list[tuple[Literal["training", "evaluation"], Sequence[Source], Prepared | None]] = [
        ("training", run.recipe.data.train, prepared.train_data),
        ("evaluation", run.recipe.data.eval or [], prepared.eval_data),
    ]
    return [
        _dataset(context, source, one)
        for context, sources, data in splits
        if data is not None
        for source, one in zip(sources, data.sources, strict=True)
    ]


def _dataset(context: Literal["training", "evaluation"], source: Source, prepared: PreparedSource) -> DatasetFacts:
    manifest = read_manifest(prepared.directory)
    assert manifest is not None, "prepared"
    facts, files = manifest["facts"], manifest["files"]
    figures = {name: facts[name] for name in ("num_read", "num_rows", "num_examples", "num_tokens", "num_targets")}
    return DatasetFacts(
        name=source.name or PurePosixPath(source.path.split("?")[0]).name,
        context=context,
        digest=digest(sorted((name, file["sha256"]) for name, file in files.items()))[:16],
        source=source.path,
        sequence_length=facts["sequence_length"],
        columns={"input_ids": "int32", "targets": "bool"},
        figures={**figures, "how": described(prepared.row_format, prepared.template, facts)},
    )


def note_plan(run: ResolvedRun, plan: Plan) -> None:
    """Write down the plan of a run. Raises StorageError."""
    run.run.write_record(PLAN, dataclasses.replace(plan, timeline=[]).to_dict())


def note_predictions(run: Storage, artifact: str, predictions: Sequence[Mapping[str, str]]) -> None:
    """Write down predictions of a run's result; those of the evaluation before are replaced.

    Args:
        predictions: each with ``prompt``, ``prediction`` and ``reference``.

    Raises:
        StorageError: they cannot be written.
    """
    run.write_record(PREDICTIONS, {"artifact": artifact, "predictions": [dict(one) for one in predictions]})


def _figures(sources: Sequence[Source], prepared: Prepared) -> list[dict[str, Any]]:
    return [dataclasses.asdict(one) for one in summarise(sources, prepared)]


def _cut(example: Sequence[Part]) -> dict[str, Any]:
    """Return an example as plain values, up to the characters that are kept, and how many are left out."""
    parts: list[dict[str, Any]] = []
    room = MOST_CHARACTERS
    for part in example:
        if room > 0:
            parts.append({"text": part.text[:room], "is_target": bool(part.is_target)})
        room -= len(part.text)
    return {"parts": parts, "left_out": max(0, -room)}
