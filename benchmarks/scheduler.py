"""The scheduler of pruning's steps, and of data preparation's, on Ray: thousands of steps that do nothing.

    python benchmarks/scheduler.py

Every other step waits for the one two before it. Reported are the steps a second, the driver's CPU time and the rise of
its memory while the list of steps grows.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import provenance

STEPS = (1000, 4000, 16000)


@dataclass(frozen=True)
class Nothing:
    """A step that does nothing, as deep in a chain as LoRAM's passes are."""

    number: int
    after: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"step-{self.number}"


class Steps:
    """A job of such steps: every other one waits for the one two before, as layers of a pass do."""

    what = "doing nothing"

    def __init__(self, count: int) -> None:
        self.count = count

    def is_committed(self) -> bool:
        return False

    def steps(self) -> list[Nothing]:
        chained = ((f"step-{n - 2}",) if n % 2 and n > 2 else () for n in range(self.count))
        return [Nothing(n, after) for n, after in enumerate(chained)]

    def is_done(self, step: Nothing) -> bool:
        return False

    def memory_bytes(self, step: Nothing) -> int:
        return 0

    def run(self, step: Nothing) -> None:
        pass

    def commit(self) -> None:
        pass


def main() -> None:
    import ray

    from raymem.cluster import connection
    from raymem.cluster.step_jobs import run_by_tasks
    from raymem.recipe.schema import ScalingSection

    provenance.parser(__doc__).parse_args()
    connection.connect(ScalingSection(num_workers=1))
    run_by_tasks(Steps(200), lambda done, total: None)  # starts the workers
    rows = []
    for count in STEPS:
        cpu, began = time.process_time(), time.perf_counter()
        before, peak = _rss_bytes(), 0

        def progress(done: int, total: int) -> None:
            nonlocal peak
            if done % 100 == 0:
                peak = max(peak, _rss_bytes())

        run_by_tasks(Steps(count), progress)
        seconds = time.perf_counter() - began
        rows.append({
            "steps": count,
            "seconds": seconds,
            "steps_per_s": count / seconds,
            "driver_cpu_s": time.process_time() - cpu,
            "driver_rise_bytes": max(0, peak - before),
            "driver_bytes": peak,
        })  # fmt: skip
        print(rows[-1], file=sys.stderr)
    ray.shutdown()
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    provenance.save("scheduler", {"rows": rows, "driver_highest_bytes": highest})


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
