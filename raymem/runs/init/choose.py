"""Chooses the values of a new recipe from its model, its data and the memory that there is, each with its reason."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymem.cache import cache_root
from raymem.errors import BudgetError, RecipeError
from raymem.kinds import Start
from raymem.memory.budget import bytes_text, parse_bytes
from raymem.memory.devices import GIB, gpu_named
from raymem.recipe.axes import BASES, starts
from raymem.recipe.data import Source
from raymem.recipe.load import MODELS, recipe_of
from raymem.recipe.schema import Recipe
from raymem.recipe.sentences import nearest
from raymem.recipe.yaml_text import parse
from raymem.runs.init.data import DataFacts, look_at, second_source
from raymem.runs.init.memory import Fitted, fit
from raymem.runs.init.text import text_of
from raymem.training.data.tokenizer import load_tokenizer
from raymem.training.model.build import load_config, tokenizer_path
from raymem.training.model.smollm2 import located
from raymem.training.reporter import Status

_STEP = 64
_LONGEST_TEXT_ROW = 1024
_STEPS_OF_AN_EPOCH = 20
"""Optimizer steps that an epoch of few examples should have at least; smaller batches make room for them."""
_MOST_ROWS = {True: 16, False: 4}
"""Rows of a micro-batch at most, with a GPU and without: there more do not make a step faster."""
_FEW = 5_000


@dataclass(frozen=True)
class Wishes:
    """What a person says about the recipe that is to be written."""

    model: str
    data: str
    eval: str | None = None
    method: str | None = None
    """The name of a method, by default the usual one; see :func:`raymem.recipe.axes.starts`."""
    gpu: str | None = None
    budget: str | None = None
    epochs: float | None = None


@dataclass(frozen=True)
class NewRecipe:
    """A recipe that has been written, but for its file."""

    text: str
    recipe: Recipe
    summary: str
    """What it does, in one line."""


@dataclass(frozen=True)
class _Device:
    """The memory that a worker may use."""

    num_bytes: int
    budget: str
    """The same as a recipe's ``budget``."""
    has_gpu: bool
    why: str


def _start(method: str | None) -> Start:
    known = starts()
    if method is None:
        return next(iter(known.values()))
    if method not in known:
        raise RecipeError(f"--method {method}: is no method that raymem knows{nearest(method, list(known))}")
    return known[method]


def new_recipe(wishes: Wishes, name: str, status: Status) -> NewRecipe:
    """Choose every value of a recipe that trains, and write it with its reasons.

    Args:
        name: of the run.
        status: told what takes time.

    Raises:
        RaymemError: model or data cannot be had or do not go together, or nothing fits into the memory.
    """
    start, device = _start(wishes.method), _device(wishes)
    if wishes.model in MODELS:
        raise RecipeError(f"--model {wishes.model}: the demo model has a recipe: raymem init --from demo")
    raw: dict[str, Any] = {"name": name, "model": {"name": wishes.model}, "data": {"train": {"path": wishes.data}}}
    status("looking at the model")
    bare = recipe_of({**raw, "train": {"steps": 1}})
    bare = bare.model_copy(update={"model": located(bare.model, cache_root(), status)})
    config = load_config(bare).get_text_config()
    tokenizer = load_tokenizer(tokenizer_path(bare))
    status("looking at the data")
    with tempfile.TemporaryDirectory() as cache:
        train = look_at(wishes.data, tokenizer, "--data", Path(cache))
        held_out = Source(path=wishes.eval) if wishes.eval is not None else second_source(wishes.data)
        evaluated = None
        if held_out is not None:
            evaluated = look_at(held_out.path, tokenizer, "--eval", Path(cache), held_out.split)
    comments: dict[str, str] = {"model.name": f"{type(config).__name__.removesuffix('Config')}"}
    raw["data"] = _data_section(train, evaluated, getattr(config, "max_position_embeddings", None), comments)
    _lay_over(raw, start, comments)
    raw["train"] = _train_section(train, raw["data"]["sequence_length"], device, wishes.epochs, comments)
    raw |= {"scaling": {"num_workers": 0, "use_gpu": device.has_gpu}, "budget": device.budget}
    raw["storage"] = {"path": "raymem-runs"}
    comments |= {
        "scaling.num_workers": "0: this process, without Ray; 4: four workers",
        "scaling.use_gpu": "a GPU for each worker",
        "budget": device.why,
        "storage.path": "a path that every node sees; s3:// and gs:// too",
    }
    fitted = _fitted(raw, device, wishes.gpu, status)
    _take_over(raw, fitted, device, comments)
    shown = {key: raw[key] for key in Recipe.model_fields if key in raw and key != "name"}
    if evaluated is None:
        shown["data"] = {"train": raw["data"]["train"], "eval": None, **raw["data"]}
        comments["data.eval"] = "a file of examples that are not trained on, for an evaluation loss"
    text = text_of(shown, comments, f"Written by raymem init: {start.words} on {wishes.model} with {wishes.data}")
    assert recipe_of({"name": name, **parse(text)}) == fitted.recipe, text
    return NewRecipe(text, fitted.recipe, _summary(start, train, fitted, device))


def next_commands(recipe: Recipe, path: Path) -> list[str]:
    """Return the commands that follow."""
    return [f"raymem data {path}", f"raymem {BASES.of(recipe).command} {path}"]


def _device(wishes: Wishes) -> _Device:
    if wishes.budget is not None:
        try:
            num_bytes = parse_bytes(wishes.budget)
        except ValueError as error:
            raise BudgetError(f"--budget: {error}") from None
        if wishes.gpu is not None and num_bytes > gpu_named(wishes.gpu).capacity_bytes:
            raise BudgetError(
                f"--budget {wishes.budget} is more than a {wishes.gpu} has, "
                f"{bytes_text(gpu_named(wishes.gpu).capacity_bytes)}: lower it, or leave one of the two out"
            )
        return _Device(num_bytes, wishes.budget, wishes.gpu is not None or _cuda_bytes() > 0, "as given by --budget")
    if wishes.gpu is not None:
        num_bytes = gpu_named(wishes.gpu).capacity_bytes
        return _Device(num_bytes, _gib(num_bytes), True, f"what a {wishes.gpu} has")
    if num_bytes := _cuda_bytes():
        return _Device(num_bytes, _gib(num_bytes), True, "what the GPU of this machine has")
    from raymem.cluster.doctor.local import usable_memory_bytes

    num_bytes = usable_memory_bytes() // 2
    return _Device(num_bytes, _gib(num_bytes), False, "half of this machine's memory; --gpu or --budget say otherwise")


def _cuda_bytes() -> int:
    """Return the memory of this machine's first GPU; 0 without one."""
    import torch

    return int(torch.cuda.mem_get_info(0)[1]) if torch.cuda.is_available() else 0


def _gib(num_bytes: int) -> str:
    return f"{math.floor(num_bytes / GIB * 100) / 100:g}GiB"


def _data_section(
    train: DataFacts, evaluated: DataFacts | None, context: int | None, comments: dict[str, str]
) -> dict[str, Any]:
    section: dict[str, Any] = {"train": _source(train, "data.train", comments)}
    if evaluated is not None:
        section["eval"] = _source(evaluated, "data.eval", comments)
    half, most, longest = (train.lengths[percent] for percent in ("50", "95", "100"))
    row = max(_STEP, -(-(longest if longest <= most * 5 // 4 else most) // _STEP) * _STEP)
    why = f"95% of the examples have up to {most} tokens, half up to {half}, the longest {longest}"
    if train.row_format == "text":
        row = min(row, _LONGEST_TEXT_ROW)
        why = f"{why}; longer texts go on in the next row"
    if context is not None and row >= context:
        row, why = context, f"{why}; the model takes no more"
    section["sequence_length"] = row
    comments["data.sequence_length"] = why
    return section


def _source(facts: DataFacts, at: str, comments: dict[str, str]) -> dict[str, Any]:
    source = facts.source
    values: dict[str, Any] = {"path": source.path}
    comments[f"{at}.path"] = f"{facts.num_rows:,} examples"
    if source.split is not None:
        values["split"] = source.split
    values["format"] = source.format
    comments[f"{at}.format"] = f"columns: {', '.join(facts.columns)}"
    if source.columns:
        values["columns"] = source.columns
        comments[f"{at}.columns"] = "our name: the name in the data"
    if source.format in ("prompt_completion", "alpaca"):
        values["template"] = facts.template
        comments[f"{at}.template"] = {
            "chat": "the tokenizer's chat template makes turns of them; none: the texts as they are",
            "none": "the texts as they are; chat takes a tokenizer with a chat template",
            "auto": "chat, but not for prompts that hold the template's marks already",
        }[facts.template]
    return values


def _lay_over(raw: dict[str, Any], start: Start, comments: dict[str, str]) -> None:
    for path, (value, why) in start.values.items():
        section, _, key = path.partition(".")
        raw.setdefault(section, {})[key] = value
        comments[path] = why


def _train_section(
    train: DataFacts, row: int, device: _Device, epochs: float | None, comments: dict[str, str]
) -> dict[str, Any]:
    tokens = train.num_rows * min(train.mean_length, row if train.row_format != "text" else math.inf)
    rows = max(1, math.ceil(tokens / row))
    batch = next((b for b in (16, 8) if rows // b >= _STEPS_OF_AN_EPOCH), 4)
    batch = batch if batch <= rows else 1 << rows.bit_length() - 1
    epochs = epochs if epochs is not None else 3 if train.num_rows <= _FEW else 1
    steps = math.ceil(rows * epochs / batch)
    comments |= {
        "train.epochs": f"times that every example is seen; about {steps:,} steps",
        "train.global_batch": f"rows of a step; packing makes about {rows:,} rows of the data",
        "train.precision": "weights and arithmetic; small updates are kept in fp32"
        if device.has_gpu
        else "bf16 takes half the memory, but is slow on many CPUs",
        "train.warmup": "share of the steps in which the learning rate rises",
    }
    precision = "bf16" if device.has_gpu else "fp32"
    whole = int(epochs) if float(epochs).is_integer() else epochs
    return {"epochs": whole, "global_batch": batch, "micro_batch": 1, "precision": precision, "warmup": 0.03}


def _fitted(raw: dict[str, Any], device: _Device, gpu: str | None, status: Status) -> Fitted:
    recipe = recipe_of(raw)
    most = min(_MOST_ROWS[device.has_gpu], recipe.train.global_batch)
    return fit(recipe, device.num_bytes, gpu, most, status)


def _take_over(raw: dict[str, Any], fitted: Fitted, device: _Device, comments: dict[str, str]) -> None:
    """Write what had to be changed, and the micro-batch, into the recipe."""
    for override in fitted.overrides:
        path, _, value = override.partition("=")
        section, _, key = path.partition(".")
        raw.setdefault(section, {})[key or "kind"] = value
        comments[f"{section}.{key or 'kind'}"] = f"without it not even one row fits into {device.budget}"
    raw["train"]["micro_batch"] = fitted.recipe.train.micro_batch
    comments["train.micro_batch"] = (
        f"rows of a forward pass; {bytes_text(fitted.plan.capacity_bytes)} predicted of {bytes_text(device.num_bytes)}"
    )


def _summary(start: Start, train: DataFacts, fitted: Fitted, device: _Device) -> str:
    recipe, rendered = fitted.recipe, {"chat": ", chat template", "auto": ", chat template", "none": ""}
    return (
        f"{start.words}, {train.num_rows:,} examples ({train.row_format}{rendered[train.template]}), rows of "
        f"{recipe.data.sequence_length} tokens, {recipe.train.micro_batch} at a time: "
        f"{bytes_text(fitted.plan.capacity_bytes)} predicted of {bytes_text(device.num_bytes)}"
    )
