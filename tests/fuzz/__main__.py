"""Tries many random inputs: ``python -m tests.fuzz --recipes 50000 --data-files 10000 --artefacts 2000 --out fuzz``.

The cases of a target are made in parts, each from a seed of its own, by as many processes as asked for. A case that
computes for ten seconds is a find; a process that computes or waits for a minute on one, or takes more memory than
allowed, is ended. Parts that are done lie in the
output folder and are not repeated by the same command; ``report.md`` and ``report.json`` sum them up.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fuzz.cases import MEMORY_BYTES, SECONDS, Target, check

PART = 100
GROUPS = {
    "recipes": {"recipes": 0.4, "recipe texts": 0.2, "overrides": 0.2, "spaces": 0.1, "space texts": 0.1},
    "data-files": {"data files": 0.7, "conversations": 0.3},
    "artefacts": {"artefacts": 1.0},
}
_LAST = "case.txt"
_ALONE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""One thread for each process, and no look-ups of what a damaged directory lacks."""


class _TooSlow(BaseException):
    """A case took longer than it may."""


def targets(group: str) -> dict[str, Target]:
    """The targets of a group; what they need is imported only here."""
    module = importlib.import_module(f"tests.fuzz.{'data' if group == 'data-files' else group}")
    return dict(module.TARGETS)


def generate(target: Target, count: int, seed: int) -> Iterator[Any]:
    """Yield ``count`` cases."""
    import hypothesis

    made: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(target.cases)
    def collect(case: Any) -> None:
        made.append(case)

    collect()
    yield from made


def run_part(target: Target, count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Try the cases of one part; a find is what is neither a value nor one short sentence."""

    def too_slow(*_: Any) -> None:
        raise _TooSlow(f"more than {SECONDS} seconds")

    signal.signal(signal.SIGPROF, too_slow)
    sums: collections.Counter[str] = collections.Counter()
    finds: list[dict[str, str]] = []
    slowest = 0.0
    for number, case in enumerate(generate(target, count, seed)):
        if number == 0:
            with contextlib.suppress(Exception):  # imports, and what is made once per process, are nobody's time
                target.use(case)
        (folder / _LAST).write_text(repr(case)[:20_000], errors="backslashreplace")
        begin = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of this process: the machine may have others

        try:
            sums["sentences" if check(target, case) else "values"] += 1
        except (Exception, _TooSlow) as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "/raymem/" in frame.filename] or list(frames)
            place = f"{ours[-1].filename.rpartition('/raymem/')[2]}:{ours[-1].lineno}"
            said = f"{type(error).__name__}: {str(error)[:300]}"
            finds.append({"place": place, "error": said, "case": repr(case)[:5000]})
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - begin)
    return {**sums, "cases": sum(sums.values()) + len(finds), "finds": finds, "slowest_s": round(slowest, 2)}


def work(group: str, name: str, count: int, seed: int, folder: Path) -> None:
    """Do one part in this process and write what came of it."""
    result = run_part(targets(group)[name], count, seed, folder)
    status = Path("/proc/self/status").read_text()
    (peak,) = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")]
    text = json.dumps({"target": name, "seed": seed, **result, "peak_bytes": peak}).encode(errors="backslashreplace")
    (folder / "part.json").write_bytes(text)


def watch(process: subprocess.Popen[bytes], folder: Path) -> str | None:
    """Wait for a part; returns why it was ended, if it was.

    A process that waits for the processor on a busy machine is not stuck: what it has computed goes up now and then.
    """
    computed = changed = at_case = 0.0
    case = 0
    while process.poll() is None:
        time.sleep(0.2)
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) * 1024
            ticks = sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
            last = (folder / _LAST).stat().st_mtime_ns
        except (OSError, StopIteration, ValueError):  # it has ended, or has no case yet
            continue
        if (now := ticks / os.sysconf("SC_CLK_TCK")) != computed:
            computed, changed = now, time.monotonic()
        if last != case:
            case, at_case = last, now
        why = f"more than {MEMORY_BYTES >> 20} MiB" if resident > MEMORY_BYTES else None
        if now - at_case > 6 * SECONDS:
            why = f"computed for {6 * SECONDS} seconds, without an answer to the alarm"
        elif time.monotonic() - changed > 6 * SECONDS:
            why = f"waited for {6 * SECONDS} seconds"
        if why:
            process.kill()
            process.wait()
            return why
    return None if process.returncode == 0 else f"exit status {process.returncode}"


def do_part(group: str, name: str, count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Do one part in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "tests.fuzz",
        "--part",
        json.dumps([group, name, count, seed]),
        "--out",
        str(folder),
    ]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**_ALONE, **os.environ})
        why = watch(process, folder)
    if why is None:
        return dict(json.loads((folder / "part.json").read_text()))
    last = (folder / _LAST).read_text() if (folder / _LAST).exists() else ""
    log_end = (folder / "log.txt").read_text(errors="replace")[-2000:]
    return {"target": name, "seed": seed, "cases": 0, "finds": [{"place": log_end, "error": why, "case": last}]}


def parts(counts: dict[str, int], seed: int) -> list[tuple[str, str, int, int]]:
    """Group, target, number of cases and seed of each part."""
    made = []
    for group, total in counts.items():
        for name, share in GROUPS[group].items():
            left, number = round(total * share), 0
            while left > 0:
                made.append((group, name, min(PART, left), seed * 100_000 + number))
                left, number = left - PART, number + 1
    return made


def report(results: list[dict[str, Any]], out: Path) -> str:
    """Write the sums of all parts as JSON and as a table."""
    sums: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    finds: dict[str, dict[str, Any]] = {}
    for result in results:
        of_target = sums[result["target"]]
        for key in ("cases", "values", "sentences"):
            of_target[key] += result.get(key, 0)
        of_target["finds"] += len(result["finds"])
        of_target["slowest_ms"] = max(of_target["slowest_ms"], round(1000 * result.get("slowest_s", 0)))
        of_target["peak_mib"] = max(of_target["peak_mib"], result.get("peak_bytes", 0) >> 20)
        for find in result["finds"]:
            kind = f"{find['place']} {find['error'].partition(':')[0]}"
            finds.setdefault(kind, {**find, "target": result["target"], "times": 0})["times"] += 1
    (out / "report.json").write_text(json.dumps({"targets": sums, "finds": finds}, indent=1))
    columns = ("cases", "values", "sentences", "finds", "slowest_ms", "peak_mib")
    lines = [f"| target | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | {' | '.join(str(row[column]) for column in columns)} |" for name, row in sorted(sums.items())
    ]
    lines += ["", *(f"* {kind} ({find['times']} times): {find['error'][:200]!a}" for kind, find in finds.items())]
    text = "\n".join(lines) + "\n"
    (out / "report.md").write_text(text)
    return text


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n")[0])
    for group in GROUPS:
        parser.add_argument(f"--{group}", type=int, default=0, metavar="N", help="how many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--out", type=Path, default=Path("fuzz-report"), help="folder of the report; a run goes on there"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        group, name, count, seed = json.loads(options.part)
        work(group, name, count, seed, options.out)
        return 0
    from concurrent.futures import ThreadPoolExecutor, as_completed

    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "parts.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {(result["target"], result["seed"]) for result in done}
    counts = {group: getattr(options, group.replace("-", "_")) for group in GROUPS}
    todo = [part for part in parts(counts, options.seed) if (part[1], part[3]) not in known]
    with ThreadPoolExecutor(options.processes) as pool:
        futures = [pool.submit(do_part, *part, options.out / f"{part[1].replace(' ', '-')}-{part[3]}") for part in todo]
        for number, future in enumerate(as_completed(futures), start=1):
            result = future.result()
            done.append(result)
            with file.open("a") as out:
                out.write(json.dumps(result) + "\n")
            print(
                f"{number}/{len(todo)} {result['target']}: {result['cases']} cases, {len(result['finds'])} finds",
                flush=True,
            )
    print(report(done, options.out))
    return 1 if any(result["finds"] for result in done) else 0


if __name__ == "__main__":
    sys.exit(main())
