"""Generates text with an artefact in this process, or on FSDP2 workers if one device cannot hold its model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from raymem.errors import ModelError
from raymem.recipe.paths import absolute, is_local
from raymem.recipe.schema import ScalingSection
from raymem.runs.artifacts import local_or_downloaded
from raymem.runs.backend import LocalBackend, backend_of
from raymem.runs.inference.sharing import Sizes, gpu_bytes, more_workers, named_memory, shared
from raymem.storage.json_files import read_object
from raymem.training.artifacts.facts import FACTS
from raymem.training.artifacts.generate import Generated
from raymem.training.artifacts.generate import generate as generate_here
from raymem.training.artifacts.load import WHOLE, bare_model
from raymem.training.dist_env import DistEnv
from raymem.training.job import Doing
from raymem.training.reporter import Status


def generate(
    location: str, prompt: str, *, max_new_tokens: int, temperature: float, seed: int, raw: bool = False,
    system: str | None = None, workers: int | None = None, status: Status,
) -> Generated:  # fmt: skip
    """Answer a prompt with the model at ``location``: a directory, a URI of one, or a Hugging Face id.

    Args:
        max_new_tokens, temperature, seed, raw, system: see :func:`raymem.training.artifacts.generate.generate`.
        workers: FSDP2 workers on Ray that share the model; 1 loads it into this process. By default 1, or as many as
            it takes where one GPU of this machine cannot hold it.
        status: told of a model that workers share, and what these do.

    Raises:
        ModelError, DataError: see :func:`raymem.training.artifacts.generate.generate`.
        BudgetExceeded: this machine's GPUs cannot hold it together.
        OutOfMemory: there was not enough for it; says what helps.
    """
    config: dict[str, Any] = {
        "location": absolute(location) if is_local(location) else location,
        "prompt": prompt, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "raw": raw,
        "system": system,
    }  # fmt: skip
    scaling = _scaling(config["location"], workers, status)
    backend = backend_of(scaling) if scaling.shares_model else LocalBackend(scaling)
    backend.connect(None, status)
    return backend.group(generation_task, config, status)


def generation_task(config: dict[str, Any], dist_env: DistEnv, doing: Doing) -> Generated:
    """Generate in one process, or as one of the ranks that share the model; all of them return the same."""
    options = dict(config)
    doing("loading the weights, and answering", brief=False, told=True)
    directory = local_or_downloaded(options.pop("location"))
    with named_memory(dist_env, more_workers("give --workers", dist_env)):
        return generate_here(directory, **options, dist_env=dist_env)


def _scaling(location: str, workers: int | None, status: Status) -> ScalingSection:
    """Return where it is generated: in this process, or on how many workers."""
    if workers is not None and workers > 1:
        each = _recorded(location) if os.environ.get("RAY_ADDRESS") else None
        each = each or ScalingSection(use_gpu=torch.cuda.is_available())
        return each.model_copy(update={"num_workers": workers, "strategy": "fsdp2"})
    here, device_bytes = ScalingSection(num_workers=0, use_gpu=torch.cuda.is_available()), gpu_bytes()
    if workers == 1 or device_bytes is None:
        return here
    sizes = Sizes.of(bare_model(local_or_downloaded(location)))
    return shared(here, sizes, device_bytes, status)


def _recorded(directory: str) -> ScalingSection | None:
    """Return what each worker of the training of a local artefact got: the driver of a cluster may have no GPU."""
    if not (Path(directory) / FACTS).is_file():
        return None
    facts = read_object(Path(directory) / FACTS, ModelError, WHOLE)
    try:
        scaling = ScalingSection.model_validate(facts["recipe"]["scaling"])
    except (KeyError, TypeError, ValueError):  # of a version that wrote other facts
        return None
    return ScalingSection(use_gpu=scaling.use_gpu, resources_per_worker=scaling.resources_per_worker)
