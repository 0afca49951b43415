"""Makes the checks of ``raymem doctor`` on this machine, without Ray."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from raymem.errors import ModelError, RaymemError, StorageError
from raymem.recipe.axes import AXES, problems
from raymem.recipe.load import MODELS, SMOLLM2
from raymem.recipe.schema import Recipe
from raymem.storage.storage import Storage
from raymem.versions import WINDOWS

_GIB = 1 << 30
_LITTLE_DISK_BYTES = 10 * _GIB


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool | None
    """The result: True, False (training will fail), or None (it works, but look at this)."""
    detail: str
    cure: str = ""
    """The remedy; empty if all is well."""


def check_versions() -> list[Check]:
    """Check installed against required versions, by the very metadata that pip used."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        meta = importlib.metadata.metadata("raymem")
    except importlib.metadata.PackageNotFoundError:
        return [Check("raymem", False, "is imported from a folder, not installed", "pip install -e . in that folder")]
    python = platform.python_version()
    supported = SpecifierSet(meta["Requires-Python"])
    checks = [_version("Python", python, supported.contains(python), str(supported), f"use Python {supported}")]
    required = {r.name: r for r in map(Requirement, meta.get_all("Requires-Dist") or []) if not r.marker}
    for name, window in WINDOWS.items():
        requirement = required[name]
        cure = f"pip install '{name}{requirement.specifier}'"
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, False, f"not installed (raymem needs {requirement.specifier})", cure))
            continue
        fits = requirement.specifier.contains(installed.split("+")[0], prereleases=True)
        if fits and window.is_newer(installed):
            cure = f"pip install '{name}=={window.newest}.*' if something fails"
            checks.append(Check(name, None, f"{installed} is newer than what raymem is tested with ({window})", cure))
        else:
            detail = f"{installed} (tested: {window})" if fits else installed
            checks.append(_version(name, detail, fits, str(requirement.specifier), cure))
    return checks


def _version(name: str, installed: str, fits: bool, required: str, cure: str) -> Check:
    return Check(name, True, installed) if fits else Check(name, False, f"{installed} is outside of {required}", cure)


def check_kinds() -> list[Check]:
    """Return kinds from outside: those that can be used, and a line for each that cannot."""
    usable = [
        f"{name}: {', '.join(others)}"
        for name, axis in AXES.items()
        if (others := [kind.name for kind in axis.kinds() if kind.name not in axis.builtin])
    ]
    checks = [Check("kinds", True, f"from outside: {'; '.join(usable)}")] if usable else []
    unconcerned = "recipes that do not name it are not concerned"
    return [*checks, *(Check("kinds", None, problem, unconcerned) for problem in problems())]


def check_model(recipe: Recipe) -> list[Check]:
    """Check the recipe's model: its config, and the tensors of a directory here; demo models are made on the spot."""
    from raymem.planner.shapes import located
    from raymem.training.model.check import check_model as described

    if recipe.model.name in {*MODELS, SMOLLM2}:
        return []
    try:
        here, stand_in = located(recipe)
    except ModelError as error:
        return [_model_failed(error, ok=None)]  # another machine may reach it
    try:
        return [Check("model", True, described(here)) if stand_in is None else Check("model", None, stand_in)]
    except RaymemError as error:
        return [_model_failed(error, ok=False)]


def _model_failed(error: RaymemError, *, ok: bool | None) -> Check:
    detail, _, cure = str(error).rpartition("; ")
    return Check("model", ok, detail or cure, cure if detail else "")


def check_devices(use_gpu: bool) -> list[Check]:
    """Check CPU cores, memory, bf16 arithmetic by trying it, and each GPU."""
    import torch

    cores, memory = len(os.sched_getaffinity(0)), usable_memory_bytes()
    checks = [Check("CPU", True, f"{cores} cores, {memory / _GIB:.1f} GiB memory, bf16 {_bf16('cpu')}")]
    count = torch.cuda.device_count()
    for index in range(count):
        with torch.cuda.device(index):
            free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name(index)
        detail = f"{name}, {total / _GIB:.1f} GiB, {free / _GIB:.1f} GiB free, bf16 {_bf16(f'cuda:{index}')}"
        busy = free < total * 3 // 4
        cure = "other processes hold its memory: end them (nvidia-smi lists them)" if busy else ""
        checks.append(Check(f"GPU {index}", None if busy else True, detail, cure))
    if count == 0 and use_gpu:
        checks.append(
            Check(
                "GPU",
                None,
                "none on this machine, but scaling.use_gpu is true",
                "fine if the workers' nodes have them; else set scaling.use_gpu: false",
            )
        )
    return checks


def _bf16(device: str) -> str:
    import torch

    try:
        ones = torch.ones(8, 8, device=device, dtype=torch.bfloat16)
        works = bool((ones @ ones == 8).all())
    except RuntimeError:
        works = False
    return "works" if works else "does not work (use train.precision: fp32)"


def usable_memory_bytes() -> int:
    """Return the memory of this machine, or of this container if that is less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            physical = min(physical, int(text))
    return physical


def check_home() -> Check:
    """Check HOME, in which Ray, Hugging Face and torch keep tokens and caches."""
    home = Path.home()
    try:
        with tempfile.TemporaryFile(dir=home):
            return Check("HOME", True, f"{home} is writable")
    except OSError as error:
        return Check("HOME", False, f"{home}: {error.strerror}", "set HOME to a directory that this user may write to")


def check_storage_here(path: str) -> list[Check]:
    """Check whether this machine may write to the storage path, and how much room it has."""
    try:
        storage = Storage.open(path, retry_for_s=0)
        storage.check_writable()
    except StorageError as error:
        problem, _, cure = str(error).rpartition("; ")
        return [Check("storage", False, problem.removeprefix("storage: "), cure)]
    checks = [Check("storage", True, f"{path} is writable")]
    if storage.is_local:
        free = shutil.disk_usage(storage.root).free
        little = free < _LITTLE_DISK_BYTES
        cure = "each checkpoint needs room for weights and optimizer state: free some, or use a larger disk"
        checks.append(Check("disk", None if little else True, f"{free / _GIB:.1f} GiB free", cure if little else ""))
    return checks


def check_auth(address: str | None) -> list[Check]:
    """Check Ray's token authentication: its mode, and the token with its permission bits."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    default = Path.home() / ".ray" / "auth_token"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    token = Path(named) if named else default
    if mode == "disabled":
        if address is None:
            return [Check("Ray auth", True, "disabled, on this machine only")]
        return [
            Check(
                "Ray auth",
                None,
                f"disabled, with a cluster at {address}: whoever reaches its ports can run code there",
                "start it with RAY_AUTH_MODE=token, and export that here too",
            )
        ]
    if os.environ.get("RAY_AUTH_TOKEN"):
        check = Check("Ray auth", True, "token from RAY_AUTH_TOKEN")
    elif token.is_file():
        bits = stat.S_IMODE(token.stat().st_mode)
        shared = bool(bits & 0o077)
        detail = f"token in {token}, mode {bits:04o}"
        check = Check("Ray auth", None if shared else True, detail, f"chmod 600 {token}" if shared else "")
    elif address is None and not named:
        return [Check("Ray auth", True, "a local Ray gets a token of its own")]
    else:
        needed = mode == "token" or named is not None
        detail = f"no token: {token} does not exist"
        cure = "put the cluster's token there (mode 0600) and export RAY_AUTH_MODE=token"
        return [Check("Ray auth", False if needed else None, detail, cure)]
    if address is not None and mode != "token":
        # Ray's client ignores the token then, and a cluster that wants one refuses it after 20 s of retries.
        return [check, Check("Ray auth mode", None, "a token is there, but RAY_AUTH_MODE is not set",
                             "export RAY_AUTH_MODE=token if the cluster wants one")]  # fmt: skip
    return [check]
