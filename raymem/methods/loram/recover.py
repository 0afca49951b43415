"""Recovers the adapter of the full model from that of a pruned one: a scatter into zeros, on the adapter's file alone.

``delta = B A`` of the pruned layer lies in the rows and columns of the full layer that were kept, and is zero elsewhere
(LoRAM, arXiv 2502.13533: the recovery R(.) of section 3). In PEFT's terms ``lora_B`` [out, r] gets its rows and
``lora_A`` [r, in] its columns; dtypes and values stay bit for bit. Where only zeros were written nothing moves.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch

from raymem.errors import ModelError, RecoveryMismatch
from raymem.methods.loram.coupling import Coupling, couple
from raymem.methods.loram.index_map import Axis, place
from raymem.methods.loram.manifest import MANIFEST, Manifest, check_base, check_kept, read_manifest
from raymem.methods.loram.nonuniform import meta_model
from raymem.methods.loram.recover_moram import recover_moram
from raymem.methods.loram.source import Source, open_source
from raymem.storage.checksums import CHECKSUMS, add_checksum, check_files, difference, write_checksums
from raymem.storage.errors import writing
from raymem.storage.inside import leads_out
from raymem.storage.json_files import read_object
from raymem.storage.safetensors_io import Entry, read_header, read_tensor, save_tensors, write_json

WEIGHTS, CONFIG, FACTS = "adapter_model.safetensors", "adapter_config.json", "raymem.json"

FACTOR_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.(?P<parameter>weight|bias)")
"""Name of a tensor in a PEFT LoRA's file; the bias is ``lora_B``'s."""
_COPY = re.compile(r"base_model\.model\.(?P<module>.+?)(?:\.base_layer)?\.weight")

_FREE_OPTIONS = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "lora_bias",
        "eva_config",
    ]
)
"""Options of a PEFT LoRA that leave what its tensors mean to the scatter. Any other must be at its default."""
_FREE_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base weights as they are."""
_REASONS = {
    "use_dora": "DoRA's magnitudes are row norms of the pruned weights, which the full ones do not share",
    "bias": "trained biases of pruned layers have no place in the full model's",
    "modules_to_save": "whole trained modules replace those of the full model",
    "init_lora_weights": "this start changes the base weights, and the full model's never were changed",
    "layer_replication": "it changes which layers there are",
}


def stamp_adapter(adapter: str | Path, pruned: str | Path) -> None:
    """Put the manifest of a pruned model beside an adapter that was trained on it, which proves where it belongs.

    Raises:
        ModelError: ``pruned`` is no pruned model.
        StorageError: the adapter's directory cannot be written.
    """
    read_manifest(pruned, with_weights=False).write(Path(adapter))
    add_checksum(Path(adapter), MANIFEST)


def recover_adapter(
    adapter: str | Path, pruned: str | Path, out: str | Path, full: str | Path | Source | None = None
) -> Path:  # fmt: skip
    """Write the adapter of the full model: a plain PEFT directory that names the full base and its revision.

    Neither model is loaded; memory is the adapter's.

    Args:
        adapter: PEFT LoRA or MoRAM trained on ``pruned``: it carries the manifest (:func:`stamp_adapter`), or its
            configuration names the directory of the pruned model as its base.
        pruned: what :func:`raymem.methods.loram.prune_model` wrote (or its aligned successor).
        out: directory to be made; one that holds this very recovery is fine.
        full: the full model (a directory, or opened), by default where the manifest says. Only MoRAM looks at it: its
            adapters carry fingerprints of the weights that they are for.

    Returns:
        ``out``.

    Raises:
        RecoveryMismatch: the adapter belongs to another pruned model, or is of a kind that cannot be recovered exactly.
        ModelError: something cannot be read.
        StorageError: the result cannot be written.
    """
    adapter, pruned, out = Path(adapter), Path(pruned), Path(out)
    check_files(adapter, ModelError)
    check_files(pruned, ModelError)
    manifest, source = read_manifest(pruned), open_source(pruned)
    coupling = couple(source.config())
    check_kept(manifest, coupling)
    config = read_adapter_config(adapter)
    check_belongs(adapter, config, pruned, manifest)
    check_recoverable(config, adapter)
    if not (adapter / WEIGHTS).is_file():
        raise ModelError(f"{adapter} holds no {WEIGHTS}; give the directory of a PEFT adapter")
    facts = _facts(adapter, manifest)
    if out.exists():
        if _loram_facts(out) == facts:
            check_files(out, ModelError)
            return out
        raise ModelError(f"{out} exists and is not the recovery of {adapter}; give another directory or remove it")
    if config["peft_type"] == "MORAM":
        shapes = {name: list(weight.shape) for name, weight in meta_model(source.config()).state_dict().items()}
        whole = full if isinstance(full, Source) else open_source(full or manifest.source["name"])
        check_base(manifest, whole)
        recovered = recover_moram(adapter / WEIGHTS, config, shapes, coupling, manifest, whole)
    else:
        recovered = _recovered(adapter, read_header(adapter, WEIGHTS)[1], source, coupling, manifest)
    config = {
        **config,
        "base_model_name_or_path": manifest.source["name"],
        "revision": manifest.source["revision"],
        "inference_mode": True,
    }
    _publish(adapter, out, recovered, config, facts, manifest)
    return out


def recover_factor(tensor: torch.Tensor, factor: str, axis: Axis | None) -> torch.Tensor:
    """Return one LoRA factor in full size.

    Args:
        tensor: ``lora_A`` [r, in], ``lora_B`` [out, r] or the bias [out] of ``lora_B``, of the pruned layer.
        factor: "A" or "B".
        axis: what is kept of the layer's inputs (A) or outputs (B); None if all is.

    Returns:
        [r, full in], [full out, r] or [full out], zero where pruned, in the dtype of ``tensor``.
    """
    return tensor if axis is None else axis.put(tensor, 1 if factor == "A" else 0)


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """Return ``adapter_config.json`` of a PEFT LoRA or MoRAM.

    Raises:
        ModelError: there is none.
        RecoveryMismatch: it is another kind of adapter.
    """
    path = adapter / CONFIG
    config = read_object(path, ModelError, "give the directory of a PEFT adapter")
    kind = config.get("peft_type")
    if kind not in ("LORA", "MORAM"):
        raise RecoveryMismatch(f"{path}: an adapter of kind {kind} cannot be recovered; train LoRA or MoRAM")
    return config


def check_belongs(adapter: Path, config: dict[str, Any], pruned: Path, manifest: Manifest) -> None:
    """Refuse an adapter of another pruned model; shapes alone would not tell two seeds apart.

    Raises:
        RecoveryMismatch: another manifest, or nothing that says which.
    """
    if (adapter / MANIFEST).is_file():
        theirs = read_manifest(adapter, with_weights=False)
        if theirs.digest != manifest.digest:
            raise RecoveryMismatch(
                f"{adapter} was trained on another pruned model ({dict(theirs.options)} of {theirs.source['name']}, "
                f"manifest {theirs.digest[:12]}) than {pruned} (manifest {manifest.digest[:12]}); "
                "recover it with the model that it was trained on"
            )
        return
    base = config.get("base_model_name_or_path")
    if not base or Path(base).resolve() != pruned.resolve():
        raise RecoveryMismatch(
            f"{adapter} holds no {MANIFEST} and names {base!r} as its base, not {pruned}: it cannot be known which "
            "units it was trained on; if you are sure, call stamp_adapter(adapter, pruned) first"
        )


def check_recoverable(config: dict[str, Any], adapter: Path) -> None:
    """Refuse every option of PEFT under which the scatter would not be exact.

    Raises:
        RecoveryMismatch: names the option, its value and the reason.
    """
    if config["peft_type"] == "MORAM":
        if config.get("modules_to_save"):
            raise RecoveryMismatch(
                f"{adapter / CONFIG}: modules_to_save={config['modules_to_save']!r} cannot be recovered exactly: "
                f"{_REASONS['modules_to_save']}; train with modules_to_save=None"
            )
        return
    from peft import LoraConfig

    plain = LoraConfig().to_dict()
    for option, value in config.items():
        start_is_free = option == "init_lora_weights" and value in _FREE_STARTS
        if option in _FREE_OPTIONS or start_is_free or not value or value == plain.get(option):
            continue
        reason = _REASONS.get(option, "it is unknown what this option does to the tensors")
        raise RecoveryMismatch(
            f"{adapter / CONFIG}: {option}={value!r} cannot be recovered exactly: {reason}; "
            f"train with {option}={plain.get(option)!r}"
        )


def _recovered(
    adapter: Path, entries: dict[str, Entry], source: Source, coupling: Coupling, manifest: Manifest
) -> dict[str, torch.Tensor]:
    tensors = {}
    model = meta_model(source.config())
    shapes = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    for key, entry in sorted(entries.items()):
        tensor = read_tensor(adapter, entry)
        match = FACTOR_KEY.fullmatch(key)
        if match is None:
            _check_is_copy(key, tensor, source, model, adapter)
            continue
        shape = shapes.get(f"{match['module']}.weight")
        of_inputs = match["factor"] == "A" and match["parameter"] == "weight"
        if shape is None or tensor.shape[of_inputs] != shape[of_inputs]:
            raise RecoveryMismatch(
                f"{adapter / WEIGHTS}: {key} has shape {list(tensor.shape)} but the pruned layer "
                f"{'does not exist' if shape is None else f'is {shape}'}; it belongs to another model"
            )
        placement = place(coupling, manifest.kept, match["module"])
        tensors[key] = recover_factor(tensor, match["factor"], placement.columns if of_inputs else placement.rows)
    if not tensors:
        raise RecoveryMismatch(f"{adapter / WEIGHTS} holds no LoRA tensor; give the adapter that was trained")
    return tensors


def _check_is_copy(key: str, tensor: torch.Tensor, source: Source, model: Any, adapter: Path) -> None:
    """PEFT saves the base weights of a head that is a target. They may go only if they are what the base has anyway.

    Raises:
        RecoveryMismatch: trained weights of another kind than LoRA's.
    """
    match = _COPY.fullmatch(key)
    name = source.stored_name(model, f"{match['module']}.weight") if match else None
    if name is not None:
        original = source.read(name)
        if original.dtype == tensor.dtype and torch.equal(original.view(torch.uint8), tensor.view(torch.uint8)):
            return
    what = "embedding LoRA" if "lora_embedding" in key else "DoRA" if "magnitude" in key else "a whole weight"
    raise RecoveryMismatch(
        f"{adapter / WEIGHTS}: {key} is no LoRA factor of a linear layer but {what}, which would overwrite the full "
        "model's; train LoRA on linear layers only and save with save_embedding_layers=False"
    )


def _facts(adapter: Path, manifest: Manifest) -> dict[str, Any]:
    return {
        "manifest": manifest.digest,
        "adapter_sha256": hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest(),
        **{name: manifest.options[name] for name in ("structure", "criterion", "ratio", "layer_ratios", "seed")},
    }


def is_recovery_of(directory: str | Path, adapter: str | Path, manifest: Manifest) -> bool:
    """Say whether a directory holds the recovery of this adapter by :func:`recover_adapter`, as it was written."""
    same = bool(_loram_facts(Path(directory)) == _facts(Path(adapter), manifest))
    return same and difference(directory) is None


def is_recovered(directory: str | Path) -> bool:
    """Say whether an adapter is of the full model, made by :func:`recover_adapter`."""
    return _loram_facts(Path(directory)) is not None


def _loram_facts(directory: Path) -> Any:
    try:
        return read_object(directory / FACTS, ModelError).get("loram")
    except ModelError:
        return None


def _publish(
    adapter: Path,
    out: Path,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    facts: dict[str, Any],
    manifest: Manifest,
) -> None:
    """Write the directory beside its place and rename it; tokenizer and facts of the adapter come along."""
    staging = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with writing(out):
            staging.mkdir(parents=True)
            for path in sorted(adapter.iterdir()):
                ours = path.name in (WEIGHTS, CONFIG, FACTS, MANIFEST, CHECKSUMS, "README.md")
                if path.is_file() and not ours and not leads_out(path, adapter):
                    shutil.copyfile(path, staging / path.name)
            save_tensors(staging / WEIGHTS, tensors)
            write_json(staging / CONFIG, config)
            manifest.write(staging)
            known = (
                read_object(adapter / FACTS, ModelError, "take a whole copy of it")
                if (adapter / FACTS).is_file()
                else {}
            )
            write_json(staging / FACTS, {**known, "loram": facts})
            write_checksums(staging)
            staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
