"""Runs the core of the tests in environments of the lowest, the pinned and the newest versions.

    python -m tests.compat --work DIR [--environments lowest pinned newest] [--parts NAME ...] [--out FILE]

Environments are made in DIR, 6 GB each, once. A part that has been run on this commit is not repeated by the same
command, which so goes on where it was stopped; failures are in DIR/<environment>-<part>.log. FILE gets the results;
``python -m benchmarks table`` writes those of benchmarks/results/compat.json into docs/versions.md. It takes hours: run
it in the background.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from tests.compat.environments import LEFT_OUT, NAMES, ROOT, installed, make

PARTS: dict[str, tuple[str, ...]] = {
    "methods": ("tests/linalg", "tests/memory", "tests/methods"),
    "conformance": ("tests/conformance",),
    "plan": ("tests/planner",),
    "train": ("tests/training", "tests/recipe"),
    "resume and runs": ("tests/runs",),
    "tracking": ("tests/tracking",),
    "sweeps": ("tests/sweeps",),
    "trainers": ("tests/integrations",),
    "Ray": ("tests/cluster", "tests/e2e/test_cli.py", "tests/e2e/test_tracked_run.py", "tests/e2e/test_preempted.py"),
}
"""What counts as the core: all that another release of a library could break."""
MARKS = "not slow"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory of environments, logs and results")
    parser.add_argument("--environments", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "compat.json")
    asked = parser.parse_args()
    work = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    failed = False
    for environment in asked.environments:
        python = make(environment, work)
        for part in asked.parts:
            result = run(environment, part, python, work)
            failed = failed or bool(result["failed"])
            print(f"{environment}, {part}: {summary(result)}", flush=True)
        write(work, asked.out)
    return int(failed)


def run(environment: str, part: str, python: Path, work: Path) -> dict[str, Any]:
    """Run a part, unless it has been on this commit and in these versions; return its counts and failures."""
    stem = work / f"{environment}-{part.replace(' ', '-')}"
    kept, versions = Path(f"{stem}.json"), installed(python)
    if kept.is_file():
        result: dict[str, Any] = json.loads(kept.read_text())
        if (result["commit"], result["versions"]) == (commit(), versions):
            return result
    xml = Path(f"{stem}.xml")
    xml.unlink(missing_ok=True)
    options = ["-q", "-p", "no:cacheprovider", "-m", MARKS, f"--junitxml={xml}", *LEFT_OUT.get(environment, ())]
    command = [python, "-m", "pytest", *options, *PARTS[part]]
    began = time.monotonic()
    with Path(f"{stem}.log").open("w") as log:
        done = subprocess.run(
            command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )  # fmt: skip
    if not xml.is_file():
        raise SystemExit(f"{environment}, {part}: pytest ended with status {done.returncode}; see {log.name}")
    result = {
        **counts(xml),
        "environment": environment,
        "part": part,
        "seconds": round(time.monotonic() - began),
        "commit": commit(),
        "versions": versions,
    }
    kept.write_text(json.dumps(result, indent=1))
    return result


def counts(xml: Path) -> dict[str, Any]:
    """Read what pytest reports: how many tests passed, which failed, and why others were skipped."""
    failed, skipped, total = [], {}, 0
    for case in ET.parse(xml).getroot().iter("testcase"):
        total += 1
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif (skip := case.find("skipped")) is not None:
            skipped[name] = skip.get("message", "")
    return {"passed": total - len(failed) - len(skipped), "failed": failed, "skipped": skipped}


def summary(result: dict[str, Any]) -> str:
    """Return a line about a part."""
    words = [f"{result['passed']} passed"]
    words += [f"{len(result[what])} {what}" for what in ("failed", "skipped") if result[what]]
    return f"{', '.join(words)} in {result['seconds']} s"


def write(work: Path, out: Path) -> None:
    """Gather the parts that were run into one file."""
    parts = [json.loads(path.read_text()) for path in sorted(work.glob("*-*.json"))]
    out.write_text(json.dumps(parts, indent=1) + "\n")


def commit() -> str:
    """Return the commit of the working tree, marked if raymem or its tests differ from it."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "raymem", "tests"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


if __name__ == "__main__":
    sys.exit(main())
