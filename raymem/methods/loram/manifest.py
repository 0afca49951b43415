"""``loram_manifest.json``: what a pruned model is, beside it and beside every adapter that was trained on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymem.errors import ModelError
from raymem.methods.loram.coupling import Coupling
from raymem.methods.loram.index_map import Kept
from raymem.methods.loram.nonuniform import counts_of, read_config
from raymem.methods.loram.source import Source, open_source
from raymem.storage.checksums import add_checksum, check_files
from raymem.storage.json_files import as_object, read_object
from raymem.storage.safetensors_io import digest, write_json
from raymem.text import cut, shown

MANIFEST = "loram_manifest.json"
_FORMAT = 1
_FIELDS: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "key": (str,),
    "options": (dict,),
    "model_type": (str,),
    "source": (dict,),
    "calibration": (str, type(None)),
    "kept": (dict,),
    "files": (dict,),
    "aligned": (dict, type(None)),
}
_FIELDS_OF_SOURCE = {"name": (str,), "revision": (str, type(None)), "identity": (dict,)}


@dataclass(frozen=True)
class Manifest:
    """A pruned model: from what, how, and which units are left."""

    key: str
    """Digest of source, options and calibration: two prunings with equal keys are the same work."""
    options: Mapping[str, Any]
    model_type: str
    source: Mapping[str, Any]
    """``name`` and ``revision`` of the full model, and its ``identity``."""
    calibration: str | None
    """SHA-256 of the calibration tokens."""
    kept: Kept
    """Layer -> group -> kept units of the full model; empty where only zeros were written."""
    files: Mapping[str, int]
    """Weight file -> bytes."""
    aligned: Mapping[str, Any] | None = None
    """Facts of the training that changed the pruned weights, if any did."""

    @property
    def digest(self) -> str:
        """Equal for manifests of the same pruned weights, wherever they lie: an adapter belongs to one digest."""
        return digest([self.key, _kept_json(self.kept), self.aligned])

    def write(self, directory: Path) -> None:
        """Write the manifest into a directory, whole or not at all.

        Raises:
            StorageError: it cannot be written.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        write_json(directory / MANIFEST, {"format": _FORMAT, **values, "kept": _kept_json(self.kept)})


def read_manifest(directory: str | Path, *, with_weights: bool = True) -> Manifest:
    """Return the manifest of a pruned model, or (``with_weights=False``) of an adapter.

    Raises:
        ModelError: there is none, it is unreadable, of another format, or not as it was written; weight files are
            missing or cut short.
    """
    path = Path(directory) / MANIFEST
    if not path.exists():
        raise ModelError(f"{path} does not exist: {directory} is not of LoRAM; give what was pruned with it")
    check_files(directory, ModelError, weights=False)
    values = read_object(path, ModelError, "prune again", _FIELDS)
    as_object(values["source"], f"{path}: source", ModelError, "prune again", _FIELDS_OF_SOURCE)
    try:
        if values.pop("format") != _FORMAT:
            raise ValueError(f"it is not of format {_FORMAT}")
        kept = {int(layer): _units(groups) for layer, groups in values.pop("kept").items()}
        if not all(type(size) is int for size in values["files"].values()):
            raise ValueError("files has sizes that are no whole numbers")
        manifest = Manifest(**{"calibration": None, **values}, kept=kept)
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a manifest of LoRAM ({cut(str(error), 200)}); prune again") from None
    if with_weights:
        for file, size in manifest.files.items():
            weights_file = Path(directory) / file
            if not weights_file.is_file() or weights_file.stat().st_size != size:
                raise ModelError(
                    f"{weights_file} is missing or not of {size} bytes, as {MANIFEST} says; copy or prune again"
                )
    return manifest


def _units(groups: Any) -> dict[str, list[int]]:
    for name, units in groups.items():
        if not isinstance(units, list) or not all(type(unit) is int and unit >= 0 for unit in units):
            raise ValueError(f"the units of {shown(name)} are no list of whole numbers")
    return dict(groups)


def mark_aligned(
    aligned: str | Path, pruned: str | Path, facts: Mapping[str, Any], *, weights: str | None = None
) -> Manifest:
    """Give a pruned model whose weights were trained further (LoRAM's alignment) its manifest.

    Args:
        aligned: what was saved after the training of ``pruned``.
        facts: about the training, plain JSON values that tell it from others (a key of it, steps, data).
        weights: where the weights of ``aligned`` lie, if not in that directory.

    Raises:
        ModelError: ``aligned`` has other sizes than ``pruned``, or is no complete model.
        StorageError: the manifest cannot be written.
    """
    directory, manifest = Path(aligned), read_manifest(pruned, with_weights=weights is None)
    if counts_of(read_config(directory)) != counts_of(read_config(pruned)):
        raise ModelError(f"{aligned} is not of the sizes of {pruned}; give what was trained from it")
    described = open_source(directory, weights=weights).identity["files"]
    files = {file: facts_of["bytes"] for file, facts_of in described.items()}
    manifest = dataclasses.replace(manifest, files=files, aligned=dict(facts))
    manifest.write(directory)
    add_checksum(directory, MANIFEST)
    return manifest


def check_base(manifest: Manifest, full: Source) -> None:
    """Refuse a full model other than the one that was pruned.

    Raises:
        ModelError: names the first file that differs.
    """
    expected, actual = manifest.source["identity"], full.identity
    if expected == actual:
        return
    differing = [file for file, value in expected["files"].items() if actual["files"].get(file) != value]
    changed_file = differing[0] if differing else "config.json"
    raise ModelError(
        f"model.name: {full.directory} is not the base that was pruned ({changed_file} differs from the manifest's "
        f"fingerprint); give {manifest.source['name']} at revision {manifest.source['revision']}"
    )


def check_kept(manifest: Manifest, coupling: Coupling) -> None:
    """Refuse a manifest whose units do not exist in a model of this coupling.

    Raises:
        ModelError: another architecture, depth or size.
    """
    sizes = {group.name: group.num_units for group in coupling.groups}
    fits = manifest.model_type == coupling.model_type
    for layer, groups in manifest.kept.items():
        fits = fits and layer < coupling.num_layers and groups.keys() == sizes.keys()
        fits = fits and all(units and units[-1] < sizes[group] for group, units in groups.items())
    if not fits:
        raise ModelError(f"{MANIFEST}: its units do not exist in a {coupling.model_type} of this size; prune again")


def _kept_json(kept: Kept) -> dict[str, dict[str, list[int]]]:
    return {str(layer): {group: list(units) for group, units in groups.items()} for layer, groups in kept.items()}
