"""Checks LoRA directories against the rules of vLLM, before a server is started that would refuse them.

From vLLM's own checks (``vllm/lora/peft_helper.py``, ``vllm/config/lora.py``): the largest rank is one of a closed
list; trained biases, DoRA and ``modules_to_save`` are refused, and so are modules that the model's class does not list.
"""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from raymem.errors import ModelError, StorageError
from raymem.recipe.axes import why_not_of_model
from raymem.storage.checksums import check_files
from raymem.storage.errors import writing
from raymem.storage.inside import leads_out
from raymem.storage.json_files import read_object
from raymem.storage.permissions import by_umask

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that ``--max-lora-rank`` may have."""
CONFIG = "adapter_config.json"
_CURE = "give the adapter of a run"
_NONE = type(None)
_FIELDS: dict[str, tuple[type, ...]] = {
    "r": (int, _NONE),
    "rank_pattern": (dict, _NONE),
    "base_model_name_or_path": (str, _NONE),
    "revision": (str, _NONE),
}
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_PLAIN = frozenset(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
_LAYERS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "granite"), _PLAIN),
    "phi3": frozenset(["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "gpt_neox": frozenset(["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "opt": frozenset(["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
}
"""Linear layers of a decoder layer that vLLM adapts, by ``model_type``; names are not checked for other types."""


@dataclass(frozen=True)
class Linted:
    """The result of the check."""

    problems: tuple[str, ...]
    """A sentence for each thing that vLLM refuses, with the cure. Empty if the adapter can be served."""
    command: str
    """The command that starts a server with the adapter."""


def lint_vllm(adapter: str | Path, *, allow_lm_head: bool = False, served_as: str | None = None) -> Linted:
    """Check a PEFT directory against what vLLM takes.

    Args:
        allow_lm_head: the server is known to adapt the output head of this architecture.
        served_as: directory that the command names, if not this one.

    Raises:
        ModelError: no PEFT directory, or its tensors cannot be read.
    """
    directory = Path(adapter)
    check_files(directory, ModelError)
    config, shapes = _read(directory)
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(
            f"peft_type: {config.get('peft_type')} is not served; merge the adapter and serve the merged model: "
            f"raymem merge {directory} -o MERGED"
        )
    for option, allowed, cure in (
        ("modules_to_save", (None, []), "train without it"),
        ("use_dora", (None, False), "train plain LoRA"),
        ("bias", (None, "none"), "train with bias: none"),
        ("lora_bias", (None, False), "train with lora_bias: false"),
    ):
        if config.get(option) not in allowed:
            problems.append(f"{option}: {config[option]!r} is refused; {cure}, or merge the adapter")
    rank = _rank(config)
    if rank > RANKS[-1]:
        problems.append(f"r: {rank} is above {RANKS[-1]}, the largest that is served; train a lower rank or merge")
    if (why := why_not_of_model(directory)) is not None:
        problems.append(f"it does not go with the model that it names: {why}")
    problems += _odd_modules(shapes, config, allow_lm_head)
    return Linted(tuple(problems), _command(served_as or str(directory), config))


def copy_adapter(adapter: str | Path, output: Path) -> None:
    """Copy a PEFT directory; the copy appears when it is whole.

    Raises:
        StorageError: ``output`` exists or cannot be written.
    """
    if output.exists():
        raise StorageError(f"--output: {output} already exists; choose another directory or remove it")
    if odd := [path for path in sorted(Path(adapter).rglob("*")) if leads_out(path, Path(adapter))]:
        raise StorageError(
            f"{odd[0]} is a link to {odd[0].resolve()}, outside of the adapter, and would be copied along; replace it "
            "by the file itself if that is meant"
        )
    staging = output.parent / f".{output.name}.part"
    try:
        with writing(output, where="--output"):
            shutil.rmtree(staging, ignore_errors=True)
            shutil.copytree(adapter, staging)
            by_umask(staging)
            staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _odd_modules(shapes: dict[str, list[int]], config: dict[str, Any], allow_lm_head: bool) -> list[str]:
    known = _LAYERS.get(_model_type(config.get("base_model_name_or_path")) or "")
    problems: dict[str, str] = {}
    for key in sorted(shapes):
        match = _FACTOR.fullmatch(key)
        leaf = match["module"].rpartition(".")[2] if match else ""
        if match is None:
            if config.get("peft_type") == "LORA":
                problems.setdefault(
                    "other", f"{key} is no LoRA factor, which is refused; train LoRA on linear layers only"
                )
        elif leaf in ("lm_head", "embed_out", "embed_tokens", "embed_in"):
            if not (allow_lm_head and leaf in ("lm_head", "embed_out")):
                problems.setdefault(
                    leaf,
                    f"{match['module']} is adapted, which not every model class serves; train without it, merge the "
                    "adapter, or check again with --allow-lm-head if yours does",
                )
        elif known is not None and leaf not in known:
            names = ", ".join(sorted(known))
            problems.setdefault(
                leaf, f"{match['module']} is not among what is adapted of this model ({names}); train on those"
            )
    return list(problems.values())


def least_rank(config: dict[str, Any]) -> int:
    """Return the smallest largest rank that vLLM can be told for an adapter with this config."""
    return next((allowed for allowed in RANKS if allowed >= _rank(config)), RANKS[-1])


def served_name(directory: str) -> str:
    """Return the name under which an adapter is served: that of its directory, or of its run."""
    *_, above, name = ["", *directory.partition("?")[0].rstrip("/").split("/")]
    return (above if name in ("adapter", "recovered") else name) or "adapter"


def _rank(config: dict[str, Any]) -> int:
    ranks: list[int] = [config.get("r") or 1, *(config.get("rank_pattern") or {}).values()]
    return max(ranks)


def _command(directory: str, config: dict[str, Any]) -> str:
    base = config.get("base_model_name_or_path") or "BASE"
    parts = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(least_rank(config))]
    if config.get("revision"):
        parts += ["--revision", str(config["revision"])]
    return shlex.join([*parts, "--lora-modules", f"{served_name(directory)}={directory}"])


def _model_type(base: str | None) -> str | None:
    """Return the ``model_type`` of a local base; hub ids are not looked up."""
    try:
        return str(read_object(Path(base or "") / "config.json", ModelError)["model_type"])
    except (ModelError, KeyError):
        return None


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    path = directory / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{directory} is no PEFT directory ({reason}); give the adapter of a run") from None
    config = read_object(directory / "adapter_config.json", ModelError, _CURE, _FIELDS)
    if not all(type(rank) is int for rank in (config.get("rank_pattern") or {}).values()):
        raise ModelError(
            f"{directory / 'adapter_config.json'}: rank_pattern has ranks that are no whole numbers; {_CURE}"
        )
    return config, shapes
