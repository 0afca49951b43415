"""Describes a checkpoint: the manifest that is stored with it, and how one is read back and known to be good."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raymem import __version__
from raymem.errors import CheckpointError
from raymem.storage import json_files
from raymem.storage.publish import seal
from raymem.text import shown
from raymem.training.reporter import Row

MANIFEST = "manifest.json"
SCHEMA_VERSION = 3
"""Version of the manifest. Version 1 had the state of a single hook, under a key of its own; up to version 2 only the
sizes of files were written down. From 3 on each file has its SHA-256, and so has the manifest itself."""
_KINDS: dict[str, tuple[type, ...]] = {
    "identity": (dict,),
    "recipe": (dict,),
    "eval_loss": (float, int, type(None)),
    "rows": (list,),
    "peak_bytes": (int, type(None)),
    "elapsed_s": (float, int),
}


@dataclass(frozen=True)
class Manifest:
    """The description of a checkpoint that is stored with it."""

    step: int
    """Optimizer steps done. Sampler, schedule and every random stream are functions of (seed, step): with the recipe
    this is their whole state."""
    identity: dict[str, Any]
    """Settings that the state depends on (:func:`raymem.training.resume_rules.identity_of`)."""
    recipe: dict[str, Any]
    """The resolved recipe."""
    eval_loss: float | None
    """The evaluation loss at this step, if there are evaluation data."""
    rows: list[Row] = field(default_factory=list)
    """Rows of metrics since the checkpoint before: a crash may lose a report, which a resumed run sends again."""
    hooks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The state of each hook that has one, by name (:mod:`raymem.hooks`)."""
    peak_bytes: int | None = None
    """The highest peak that was measured so far; a session that is resumed near its end measures none."""
    elapsed_s: float = 0.0
    """Seconds of all sessions so far."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Bytes and SHA-256 of each file; set when the checkpoint is written."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA_VERSION,
            "raymem": __version__,
            "step": self.step,
            "identity": self.identity,
            "recipe": self.recipe,
            "eval_loss": self.eval_loss,
            "rows": self.rows,
            "hooks": self.hooks,
            "peak_bytes": self.peak_bytes,
            "elapsed_s": self.elapsed_s,
            "files": self.files,
        }


class Damaged(Exception):
    """A checkpoint that is not as it was written: the file and what is wrong with it."""


def parse(data: bytes, step: int, where: str) -> Manifest:
    """Read a manifest.

    Args:
        data: bytes of its file.
        step: the step that the checkpoint's name says.
        where: the checkpoint, for errors.

    Raises:
        Damaged: it is not as it was written.
        CheckpointError: it was written by a newer schema.
    """
    raw = json_files.as_object(json_files.parse(data, MANIFEST, Damaged), MANIFEST, Damaged)
    if "sha256" in raw and seal(raw)["sha256"] != raw["sha256"]:
        raise Damaged(f"{MANIFEST} has other values than its SHA-256 was made of")
    schema = raw.get("schema")
    if type(schema) is not int or schema < 1:
        raise Damaged(f"{MANIFEST} names no schema")
    if schema > SCHEMA_VERSION:
        raise CheckpointError(
            f"{where}: written with checkpoint schema {schema} by raymem {raw.get('raymem')}, "
            f"this is raymem {__version__} with schema {SCHEMA_VERSION}; use that version, or start over with --fresh"
        )
    if schema >= 3 and "sha256" not in raw:
        raise Damaged(f"{MANIFEST} lacks its SHA-256")
    try:
        manifest = Manifest(
            raw["step"], raw["identity"], raw["recipe"], raw["eval_loss"], raw["rows"], _hook_states(raw),
            raw.get("peak_bytes"), raw.get("elapsed_s", 0.0), _files(raw),
        )  # fmt: skip
    except KeyError as error:
        raise Damaged(f"{MANIFEST} lacks {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"{MANIFEST} is malformed ({error})") from None
    if manifest.step != step:
        raise Damaged(f"{MANIFEST} says step {shown(manifest.step)}")
    for name, kinds in _KINDS.items():
        if not isinstance(value := getattr(manifest, name), kinds):
            raise Damaged(f"{MANIFEST} has {name} {shown(value)}")
    return manifest


def _files(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    keys = ("bytes", "sha256") if raw["schema"] >= 3 else ("bytes",)
    files = {str(name): {key: facts[key] for key in keys} for name, facts in raw["files"].items()}
    if not files:
        raise ValueError("it lists no files")
    return files


def _hook_states(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if raw["schema"] == 1:
        return {"loract": {"ranks": raw["ranks"]}} if raw["ranks"] else {}
    return dict(raw["hooks"])
