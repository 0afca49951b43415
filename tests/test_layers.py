"""The architecture of the package: who may import whom, what importing costs, and how files look."""

from __future__ import annotations

import ast
import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import raymem
from raymem import errors

PACKAGE = Path(raymem.__file__).parent
ROOT = PACKAGE.parent

# The longest prefix counts. A module may import its own layer and lower ones.
LAYERS = {
    "raymem": 0,
    "raymem.errors": 0,
    "raymem.cache": 0,
    "raymem.kinds": 0,
    "raymem.hooks": 0,
    "raymem.linalg": 0,
    "raymem.memory": 0,
    "raymem.storage": 0,
    "raymem.text": 0,
    "raymem.private_apis": 0,
    "raymem.versions": 0,
    "raymem.metrics": 0,
    "raymem.methods": 1,
    "raymem.recipe": 1.5,
    "raymem.training": 2,
    "raymem.tracking": 3,
    "raymem.planner": 3,
    "raymem.testing": 3.5,
    "raymem.cluster": 4,
    "raymem.runs": 5,
    "raymem.sweeps": 5,
    "raymem.k8s": 5,
    "raymem.report": 5,
    "raymem.integrations": 5,
    "raymem.api": 6,
    "raymem.ray": 6,
    "raymem.cli": 6,
    "raymem.__main__": 6,
    "jobs": 6,
    "tune_spaces": 6,
}
ONLY_ROOMS = {"ray": ("raymem.cluster", "raymem.sweeps"), "mlflow": ("raymem.tracking",)}

FOLDERS = [folder for folder in (PACKAGE, ROOT / "jobs", ROOT / "tune_spaces") if folder.is_dir()]
FILES = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def layer(name: str) -> float:
    owners = [prefix for prefix in LAYERS if is_below(name, prefix)]
    if owners == ["raymem"] and name != "raymem" and (PACKAGE / Path(*name.split(".")[1:2])).exists():
        raise AssertionError(f"{name} is in no layer: add its room to LAYERS")
    return LAYERS[max(owners, key=len)]


def imports(source: str, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands; ``from a import b`` gives ``a.b``, b may be a module."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{found}.{alias.name}") for alias in node.names)


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    found = []
    for line, name in imports(source, module, is_package=is_package):
        top = name.partition(".")[0]
        if top in ("raymem", "jobs", "tune_spaces") and layer(name) > layer(module):
            found.append(f"{module}:{line} (layer {layer(module)}) imports {name} (layer {layer(name)})")
        rooms = ONLY_ROOMS.get(top)
        if rooms is not None and not any(is_below(module, room) for room in rooms):
            found.append(f"{module}:{line} imports {top}; only {' and '.join(rooms)} may")
    return found


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_imports_its_own_layer_or_lower_ones(path: Path) -> None:
    found = violations(path.read_text(), module_name(path), is_package=path.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("raymem.memory.meter", "from raymem.training import loop"),
        ("raymem.linalg.qr", "def f():\n    import raymem.training.step"),
        ("raymem.methods.loract.op", "if TYPE_CHECKING:\n    from raymem.recipe.schema import Recipe"),
        ("raymem.training.loop", "from ..cluster import trainer"),
        ("raymem.training.loop", "from raymem import planner"),
        ("raymem.training.loop", "import ray.train"),
        ("raymem.runs.train", "def f():\n    from mlflow import log_metric"),
        ("raymem.tracking.sink", "import ray"),
        ("raymem.runs.train", "from raymem.cli.console import out"),
    ],
)
def test_the_rule_sees_every_kind_of_import(module: str, source: str) -> None:
    assert violations(source, module)


def test_the_rule_lets_lower_layers_through() -> None:
    source = "import torch\nfrom raymem import __version__\nfrom raymem.errors import DataError\nfrom . import step"
    assert violations(source, "raymem.training.loop") == []
    assert violations("import ray\nfrom raymem.training.loop import run", "raymem.cluster.train.worker") == []


def loaded_after(code: str, names: set[str]) -> set[str]:
    """Which of ``names`` a fresh interpreter has loaded after ``code``."""
    quickly = "import gc, sys; gc.disable(); sys.modules['bitsandbytes'] = None"  # PEFT would load the whole compiler
    program = f"{quickly}\n{code}\nprint(*sorted({names!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_methods_load_neither_ray_nor_mlflow_nor_pydantic() -> None:
    walk = (
        "import importlib, pkgutil, raymem.methods as m\n"
        "for found in pkgutil.walk_packages(m.__path__, 'raymem.methods.'): importlib.import_module(found.name)"
    )
    assert loaded_after(walk, {"ray", "mlflow", "pydantic"}) == set()


def test_the_command_line_answers_without_the_heavy_libraries() -> None:
    heavy = {"torch", "transformers", "ray", "mlflow"}
    assert loaded_after("import raymem.cli.main", heavy) == set()
    assert loaded_after("import decimal", {"decimal"}) == {"decimal"}, "the check itself works"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_is_short_and_ascii(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    assert len(text.splitlines()) <= 400


ERRORS = [found for _, found in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling(kind: type[Exception]) -> None:
    assert issubclass(kind, errors.RaymemError)
    back = pickle.loads(pickle.dumps(kind("train.steps: 0 is too few")))
    assert type(back) is kind
    assert str(back) == "train.steps: 0 is too few"
