"""Writes the artefact of a run: a PEFT or a model directory, in the form that the Hugging Face tools write and read."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from raymem import __version__
from raymem.errors import StorageError
from raymem.recipe.axes import ADAPTERS, BASES
from raymem.recipe.schema import Recipe
from raymem.storage.checksums import write_checksums
from raymem.storage.errors import writing
from raymem.storage.folders import make_directory
from raymem.storage.json_files import read_object
from raymem.storage.storage import Storage
from raymem.storage.unfinished import temporary
from raymem.training.artifacts.card import write_card
from raymem.training.artifacts.facts import FACTS
from raymem.training.data.tokenizer import load_tokenizer
from raymem.training.dist_env import DistEnv
from raymem.training.model.base_name import base_name
from raymem.training.model.build import fetch, tokenizer_path
from raymem.training.model.companions import copy_companions
from raymem.training.model.weights import slots

COPIES = "scoring"


def artifact_name(recipe: Recipe) -> str:
    """Return the directory of the final artefact inside the run: ``adapter`` or ``model``."""
    return "adapter" if recipe.trains_adapter else "model"


def copy_name(step: int) -> str:
    """Return the directory inside the run of the copy that is made after a step, for its answers to be judged."""
    return f"{COPIES}/step_{step:08d}"


def export_final(model: nn.Module, recipe: Recipe, dist_env: DistEnv, run: Storage, facts: dict[str, Any]) -> str:
    """Write the trained adapter, or the whole model, with its tokenizer. Collective.

    Args:
        facts: what raymem knows about it (step, losses, peak), stored in ``raymem.json``.

    Returns:
        Path or URI of the directory.

    Raises:
        StorageError: it cannot be written; an earlier export stays.
    """
    names = _trainable(model) | set(ADAPTERS.of(recipe).buffers(model)) if recipe.trains_adapter else None
    state = _gather(model, dist_env, names)
    return dist_env.on_main(lambda: _write(model, state, recipe, run, facts))


def _trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _gather(model: nn.Module, dist_env: DistEnv, only: set[str] | None) -> dict[str, torch.Tensor]:
    """Gather full tensors (persistent buffers too) on the host of rank 0, one at a time; other ranks only take part."""
    state: dict[str, torch.Tensor] = {}
    for name, (module, attribute) in slots(model).items():
        if only is not None and name not in only:
            continue
        value = getattr(module, attribute).detach()
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if dist_env.is_main:
            state[name] = value.cpu()
    return state


def _write(model: Any, state: dict[str, torch.Tensor], recipe: Recipe, run: Storage, facts: dict[str, Any]) -> str:
    name = artifact_name(recipe)
    again = "run the same command again: it only repeats this last part"
    with writing(run.join(name), then=again), _staging(run) as staging:
        ADAPTERS.of(recipe).save(model, staging, state, recipe.adapter)
        load_tokenizer(tokenizer_path(recipe)).save_pretrained(staging)
        if not recipe.trains_adapter:
            _complete(staging, recipe)
        if (weights := BASES.of(recipe).directory(recipe.base)) is not None:
            BASES.of(recipe).stamp(staging, fetch(weights, None, DistEnv(), weights_too=False))
        contents = {"raymem": __version__, "recipe": recipe.to_dict(), **facts}
        (staging / FACTS).write_text(json.dumps(contents, indent=1) + "\n")
        write_card(staging)
        write_checksums(staging)
        if run.is_local:
            run.delete_dir(name, last=FACTS)
            staging.rename(run.join(name))
        else:
            run.upload_dir(staging, name, last=FACTS)
    return run.join(name)


def _complete(directory: Path, recipe: Recipe) -> None:
    """Copy the files beside the weights of the base to a trained model."""
    name, revision = base_name(recipe)
    if name is not None:
        base = fetch(name, revision, DistEnv(), weights_too=False)
        copy_companions(base, directory, same_tokenizer=recipe.model.tokenizer is None)
    path = directory / "config.json"
    config = read_object(path, StorageError, "run the same command again")
    if config.pop("quantization_config", config) is not config:  # it is of full value, whatever a null said before
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def _staging(run: Storage) -> Iterator[Path]:
    """Yield a directory to write in, which is deleted afterwards unless it was moved."""
    if not run.is_local:
        with temporary("export") as folder:
            yield Path(folder)
        return
    # Beside its place and always of the same name: what a killed run left there does not stay.
    staging = Path(run.join(".export"))
    shutil.rmtree(staging, ignore_errors=True)
    make_directory(staging)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
