"""The environments of the compatibility suite, and how they are made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import raymem
from raymem.versions import WINDOWS

ROOT = Path(raymem.__file__).parent.parent
NAMES = ("lowest", "pinned", "newest")
_ABSENT = (
    *("moram", "MoRAM", "needs_no_bitsandbytes", "before_a_step_are_phases", "selection", "axolotl_is_what"),
    *("minicpm3", "ctrl", "what_is_in_4_bits", "a_path_is_a_path"),
    *("wrong_token", "what_is_uploaded_is_what_ray_packs", "a_read_only_home_is_none"),
    *("first_use_of_a_fresh_storage", "uri_would_read_otherwise"),
    *("moe", "experts", "mixtral", "jamba", "minimax", "nemotron_h", "deepseek_v3", "qwen3_next", "longcat_flash"),
)
"""Words of tests: MoRAM needs PEFT 0.21, PEFT 0.19 does not adapt fused experts, transformers 5.12 has no MiniCPM3, odd
paths of a database need SQLAlchemy 2.1, Ray 2.51 knows no tokens and packs by a function of other arguments, and MLflow
3.7 tells of its tables and makes a directory where it is started."""
LEFT_OUT: dict[str, list[str]] = {
    "lowest": [
        "-ptests.compat.refusals",
        "--ignore-glob=*moram*",
        "--ignore=tests/methods/test_methods.py",
        "--ignore=tests/training/model/test_experts.py",
        f"-k={' and '.join(f'not {word}' for word in _ABSENT)}",
    ]
}
"""Options of pytest for what docs/versions.md says that an environment has not."""
_EXTRAS = ("[default,train,tune]", "ray")
_MARK = "made.json"


def requirements(name: str) -> list[str]:
    """Return what pip is asked for, beside raymem itself.

    Raises:
        KeyError: there is no such environment.
    """
    if name == "pinned":
        return ["-c", str(ROOT / "constraints.txt")]
    of = {"lowest": lambda window: f"=={window.lowest}.*", "newest": lambda window: f"=={window.newest}.*"}[name]
    extras, library = _EXTRAS
    beside = ["sqlalchemy<2.1"] if name == "lowest" else []  # which the SQL store of MLflow 3.7 needs
    return [*beside, *(f"{one}{extras if one == library else ''}{of(window)}" for one, window in WINDOWS.items())]


def make(name: str, work: Path) -> Path:
    """Make an environment, unless it is there; return its interpreter. It takes gigabytes: CUDA builds of torch.

    Raises:
        SystemExit: pip fails; the environment is made anew next time.
    """
    directory, asked = work / name, requirements(name)
    python, mark = directory / "bin" / "python", directory / _MARK
    if mark.is_file() and json.loads(mark.read_text()) == asked:
        return python
    print(f"{name}: installing {' '.join(asked)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
    # A file of constraints that the machine's pip has for everybody is not meant for this.
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    command = [str(python), "-m", "pip", "install", "--quiet", *asked, "-e", f"{ROOT}[dev,quant]"]
    if (status := subprocess.run(command, env=environment).returncode) != 0:
        raise SystemExit(f"{name}: pip ended with status {status}: {' '.join(command)}")
    mark.write_text(json.dumps(asked))
    return python


def installed(python: Path) -> dict[str, str]:
    """Return the versions in an environment of what has a window, and of Python."""
    code = (
        "import importlib.metadata, json, platform, sys; print(json.dumps({'Python': platform.python_version(), "
        "**{name: importlib.metadata.version(name) for name in sys.argv[1:]}}))"
    )
    answer = subprocess.run([python, "-c", code, *WINDOWS], check=True, stdout=subprocess.PIPE, text=True)
    versions: dict[str, str] = json.loads(answer.stdout)
    return versions
