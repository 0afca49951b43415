"""Run the benchmarks of a suite, or write their tables into the docs.

    python -m benchmarks list
    python -m benchmarks run --suite cpu|gpu [--only NAME ...] [--out DIR] [--gsm8k FILE] [--again]
    python -m benchmarks table [--out DIR] [--check]

``run`` leaves out what DIR holds already of this commit; a run that was killed goes on with the row that it was at.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the scripts import each other by their names, wherever they are started

import provenance  # noqa: E402
from suite import BENCHMARKS, Benchmark  # noqa: E402
from tables import PAGES, written  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names, suites and times")
    run_parser = commands.add_parser("run", help="run a suite")
    run_parser.add_argument("--suite", choices=("cpu", "gpu"), required=True)
    run_parser.add_argument("--only", nargs="+", choices=[one.name for one in BENCHMARKS], metavar="NAME")
    run_parser.add_argument("--gsm8k", type=Path, help="train.jsonl of GSM8K, for those that train on it")
    run_parser.add_argument("--again", action="store_true", help="also what is there already")
    table_parser = commands.add_parser("table", help="write the tables")
    table_parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    for one in (run_parser, table_parser):
        one.add_argument("--out", type=Path, default=provenance.RESULTS, help="results; default: %(default)s")
    asked = parser.parse_args()
    if asked.command == "list":
        for one in BENCHMARKS:
            print(f"{one.name:24} {'+'.join(one.suites):8} {one.takes:20} {one.claim}")
        return 0
    if asked.command == "table":
        return table(asked.out, check=asked.check)
    chosen = [one for one in BENCHMARKS if asked.suite in one.suites and one.name in (asked.only or [one.name])]
    failed = [one.name for one in chosen if not run(one, asked.out, asked.gsm8k, again=asked.again)]
    if failed:
        print(f"failed: {', '.join(failed)}; the same command goes on", file=sys.stderr)
    return 1 if failed else 0


def run(one: Benchmark, out: Path, gsm8k: Path | None, *, again: bool) -> bool:
    """Run one benchmark unless its result is there; says whether it is in the end."""
    file = out / f"{one.name}.json"
    if not again and file.exists() and json.loads(file.read_text())["provenance"]["commit"] == provenance.commit():
        print(f"{one.name}: done")
        return True
    if one.needs_gsm8k and gsm8k is None:
        print(f"{one.name}: left out; it trains on GSM8K: give --gsm8k FILE")
        return True
    print(f"{one.name}: {one.takes}", flush=True)
    arguments = [str(HERE / one.script), *one.arguments, *(["--data", str(gsm8k)] if one.needs_gsm8k else [])]
    began = time.monotonic()
    environment = {**os.environ, provenance.OUT: str(out.resolve())}
    if again:
        environment[provenance.SINCE] = str(time.time())
    status = subprocess.run([sys.executable, *arguments], env=environment).returncode
    print(f"{one.name}: {'done' if status == 0 else f'status {status}'} after {time.monotonic() - began:.0f} s")
    return status == 0


def table(out: Path, *, check: bool) -> int:
    """Write the tables of all pages; with ``check`` only say which differ."""
    different = []
    for page in PAGES:
        old = page.read_text()
        new = written(old, out)
        if new != old:
            different.append(page.name)
            if not check:
                page.write_text(new)
    print(f"{'differ' if check else 'written'}: {', '.join(different) or 'none'}")
    return 1 if check and different else 0


if __name__ == "__main__":
    sys.exit(main())
