"""docs/tutorial.md is what happens: its commands run in a fresh clone, with a real model."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def walker() -> Any:
    spec = importlib.util.spec_from_file_location("walk_tutorial", ROOT / "docs" / "walk_tutorial.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_becomes_one_script() -> None:
    made = walker()
    script = made.script(made.PAGE.read_text(), "12345")
    assert subprocess.run(["bash", "-n", "-c", script], capture_output=True, check=False).returncode == 0
    assert "localhost:12345" in script and "--port 12345" in script
    assert "-m venv" in script and script.count("raymem train") >= 4, "shown and run"


def test_the_transcript_is_of_this_page() -> None:
    made = walker()
    commands = [
        command.strip()
        for language, text in made.blocks(made.PAGE.read_text())
        for command in (text.replace("\\\n", " ").strip().splitlines() if language == "bash" else [])
    ]
    shown = [line[2:] for line in made.TRANSCRIPT.read_text().splitlines() if line.startswith("$ ")]
    assert shown == commands, "run: python docs/walk_tutorial.py --write"


def test_options_of_the_page_are_there() -> None:
    """Each command of raymem in it parses; what it does is for the slow test."""
    from typer.main import get_command

    from raymem.cli.main import app

    made, tried = walker(), set()
    for language, text in made.blocks(made.PAGE.read_text()):
        for line in text.splitlines() if language == "bash" else []:
            words = shlex.split(line)
            if words[:1] != ["raymem"]:
                continue
            command: Any = get_command(app)
            rest = words[1:]
            while hasattr(command, "commands"):
                tried.add(rest[0])
                command = command.commands[rest.pop(0)]
            command.make_context("raymem", rest)
    assert {"init", "data", "plan", "train", "generate", "evaluate", "loram", "sweep", "report", "merge"} <= tried


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_the_tutorial_in_a_fresh_clone() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "walk_tutorial.py")], capture_output=True, text=True)
    if "can be had neither from the Hugging Face hub nor" in done.stdout:
        pytest.skip("neither the hub nor the package that holds the model can be reached")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"item": "honey", "count": 12')]
    assert len(answers) >= 2, "both adapters have learned the task"
    assert '\\"count\\": 12' in done.stdout.rsplit("chat/completions", 1)[1], "and so has what is served"
