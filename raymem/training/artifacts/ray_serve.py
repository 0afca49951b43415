"""Hands LoRA adapters to Ray Serve LLM: the layout in a bucket that it loads from, and the config of the application.

Ray Serve's replicas hold the base, and fetch ``LORAS/NAME`` when somebody asks for the model ``BASE:NAME``; adapters
that are added to the bucket later need no new config (``ray.serve.llm``, multi-LoRA).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from raymem.errors import ModelError, StorageError
from raymem.storage.json_files import read_object
from raymem.storage.storage import Storage
from raymem.training.artifacts.vllm import CONFIG, least_rank, served_name

_STORES = ("s3://", "gs://")
_ADAPTERS_HELD = 16
"""Adapters that a replica keeps at a time, and that vLLM runs side by side."""


def serve_config(directory: Path, loras: str) -> dict[str, Any]:
    """Return the config of a Ray Serve application that serves a base with any adapter below ``loras``.

    Args:
        loras: address of the folder of adapters, with options of raymem's storages.
        directory: a LoRA adapter that vLLM takes; later ones may have at most its rank, rounded up as vLLM does.

    Raises:
        ModelError: it names no base.
        StorageError: Ray Serve does not load from there.
    """
    _check_loras(loras)
    address = plain(loras)
    config = read_object(directory / CONFIG, ModelError, "give the adapter of a run")
    base = config.get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{directory / CONFIG}: base_model_name_or_path is empty; Ray Serve must know the base")
    engine: dict[str, Any] = {
        "enable_lora": True, "max_lora_rank": least_rank(config), "max_loras": _ADAPTERS_HELD
    }  # fmt: skip
    if config.get("revision"):
        engine["revision"] = str(config["revision"])
    served = {
        "model_loading_config": {"model_id": base_id(base), "model_source": base},
        "lora_config": {
            "dynamic_lora_loading_path": address,
            "max_num_adapters_per_replica": _ADAPTERS_HELD,
        },
        "engine_kwargs": engine,
        "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
    }
    application = {
        "name": "llm",
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [served]},
    }
    return {"applications": [application]}


def base_id(base: str) -> str:
    """Return the name by which clients ask for the base: the last part of its id or path."""
    return base.rstrip("/").rpartition("/")[2]


def upload(directory: Path, loras: str, name: str | None = None, *, origin: str | None = None) -> str:
    """Put an adapter where Ray Serve finds it; return the model that clients ask for, ``BASE:NAME``.

    Args:
        name: of the adapter; by default the run's.
        origin: where the adapter was given, for its name.

    Raises:
        StorageError: Ray Serve does not load from there, an adapter of that name is there, or it cannot be written.
    """
    _check_loras(loras)
    name = name or served_name(origin or str(directory))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise StorageError(f"--name: {name!r} holds other characters than letters, digits, '.', '_' and '-'; change it")
    storage = Storage.open(loras)
    if storage.exists(name):
        raise StorageError(
            f"{storage.join(name)} exists, and a server may have it loaded; give the adapter another --name"
        )
    storage.upload_dir(directory, name, last=CONFIG)
    base = read_object(directory / CONFIG, ModelError)["base_model_name_or_path"]
    return f"{base_id(str(base))}:{name}"


def _check_loras(loras: str) -> None:
    if not loras.startswith(_STORES):
        raise StorageError(
            f"--loras: {loras} is no {' or '.join(_STORES)} address; Ray Serve loads adapters from a bucket"
        )


def plain(loras: str) -> str:
    """Return an address without options, as others than raymem know it."""
    return loras.partition("?")[0].rstrip("/")
