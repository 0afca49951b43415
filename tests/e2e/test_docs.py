"""The pages say what the code does, and the README's first command works in a fresh clone."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.families import FAMILIES, SOME

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def maker_of(name: str) -> Any:
    """The module that writes a page."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    return maker


def test_recipe_reference_is_up_to_date() -> None:
    maker = maker_of("make_reference")
    assert maker.PAGE.read_text() == maker.page(), "run python docs/make_reference.py"


def test_the_table_of_models_is_up_to_date() -> None:
    """Every architecture has its row; some are made again."""
    maker = maker_of("make_models")
    rows = [line for line in maker.PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(FAMILIES)
    by_name = dict(zip(FAMILIES, rows, strict=True))
    assert {name: by_name[name] for name in SOME} == {name: maker.row(name) for name in SOME}, (
        "run python docs/make_models.py"
    )


def test_every_command_is_in_the_readme() -> None:
    from raymem.cli.main import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert names == {name for name in names if re.search(rf"`(raymem )?{name}[ `]", README)}


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        ROOT / "benchmarks/README.md",
    ]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_names_the_command_that_ci_runs() -> None:
    (command,) = re.findall(r"^.*bin/pytest$", README, flags=re.MULTILINE)
    assert command.startswith("python3.11 -m venv .venv && .venv/bin/pip install")
    assert "bin/pytest$" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_first_command_of_the_readme_in_a_fresh_clone(tmp_path: Path) -> None:
    """Installs from the registry, trains the quickstart for real, and shows what the model said before and says now."""
    (command,) = re.findall(r"```bash\n(python[^`]*raymem train jobs/recipes/quickstart.yaml[^`]*)```", README)
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "raymem")], check=True)
    began = time.monotonic()
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path / "raymem", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"{time.monotonic() - began:.0f} s\n{done.stdout}")
    assert "next: " in done.stdout
    before, after = map(float, re.findall(r"^loss ([0-9.]+), perplexity", done.stdout, flags=re.MULTILINE))
    assert after < before - 0.1
    assert done.stdout.count("--- prediction 1 ---") == 2
    run = tmp_path / "raymem" / "raymem-runs" / "quickstart"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tenth = len(rows) // 10
    first, last = (sum(row["loss"] for row in part) / tenth for part in (rows[:tenth], rows[-tenth:]))
    assert last < first - 0.1
    assert math.isfinite(rows[-1]["eval_perplexity"])
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
