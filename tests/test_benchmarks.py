"""The suite of benchmarks: the tables of the pages are those of the results, and what was killed goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import os, sys
sys.path.insert(0, {benchmarks!r})
import provenance

def row(number):
    print("made", number, flush=True)
    if number == 2 and not os.path.exists({flag!r}):
        open({flag!r}, "w").close()
        os.kill(os.getpid(), 9)
    return {{"number": number}}

rows = [provenance.kept(f"row-{{number}}", lambda number=number: row(number)) for number in range(4)]
provenance.save("rows", {{"rows": rows}})
"""


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_tables_are_those_of_the_results() -> None:
    done = benchmarks("table", "--check")
    assert done.returncode == 0, f"{done.stdout}{done.stderr}run: python -m benchmarks table"


def test_every_script_is_listed_and_each_that_is_listed_is_there() -> None:
    listed = benchmarks("list").stdout
    shared = {
        "__main__",
        "figures",
        "gsm8k",
        "make_base",
        "moram_demo",
        "loract_stack",
        "peers",
        "provenance",
        "suite",
        "tables",
        "turns",
    }
    for script in {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - shared:
        assert f"{script} " in listed
    for line in listed.splitlines():
        assert (ROOT / "benchmarks" / f"{line.split()[0]}.py").is_file()


@pytest.mark.parametrize("arguments", [("run", "--suite", "tpu"), ("run", "--suite", "cpu", "--only", "nothing"), ()])
def test_what_there_is_not_is_refused(arguments: tuple[str, ...]) -> None:
    done = benchmarks(*arguments)
    assert done.returncode == 2 and "usage:" in done.stderr


def test_a_table_without_its_result_is_refused(tmp_path: Path) -> None:
    done = benchmarks("table", "--check", "--out", str(tmp_path))
    assert done.returncode == 1 and "run it with: python -m benchmarks run" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_benchmark_that_was_killed_goes_on_with_the_row_that_it_was_at(tmp_path: Path) -> None:
    results = tmp_path / "results"
    program = SCRIPT.format(benchmarks=str(ROOT / "benchmarks"), flag=str(tmp_path / "killed"))
    environment = {**os.environ, "RAYMEM_BENCHMARK_RESULTS": str(results)}
    runs = [
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert [run.returncode for run in runs] == [-9, 0], runs[1].stderr
    made = [[line for line in run.stdout.splitlines() if line.startswith("made")] for run in runs]
    assert made == [["made 0", "made 1", "made 2"], ["made 2", "made 3"]]
    result = json.loads((results / "rows.json").read_text())
    assert [row["number"] for row in result["rows"]] == [0, 1, 2, 3]
    assert {"commit", "versions", "device", "date"} <= set(result["provenance"])
