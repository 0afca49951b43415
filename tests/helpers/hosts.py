"""Hosts on this machine that share no directory: each has its own HOME, TMPDIR, working directory, name and clock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.helpers.ray_processes import clean_environment

ROOT = Path(__file__).parents[2]
DURATION_S = 5.0
"""How long leases last that drivers of these hosts take."""

_PROGRAM = """
import sys, time
from types import SimpleNamespace
from raymem.storage.leases import lease, record

name, skew_s, duration_s, delay_s = sys.argv[1], *map(float, sys.argv[2:5])
record.DURATION_S, lease.RENEW_S = duration_s, duration_s / 10
record.node = lambda: name
record.platform = SimpleNamespace(node=lambda: name)
record.time = SimpleNamespace(strftime=time.strftime, gmtime=lambda: time.gmtime(time.time() + skew_s))
sys.argv = ["raymem", *sys.argv[5:]]
if delay_s:
    from raymem.training import loop

    taken = loop.train_step

    def slowly(*arguments, **options):
        time.sleep(delay_s)
        return taken(*arguments, **options)

    loop.train_step = slowly
from raymem.cli.main import main
main()
"""


class Host:
    """A host on which drivers are started.

    Args:
        environment: what its processes get besides.
        skew_s: seconds by which its clock is ahead.
    """

    def __init__(
        self, folder: Path, name: str, environment: Mapping[str, str] | None = None, *, skew_s: float = 0.0
    ) -> None:
        self.name, self.skew_s = name, skew_s
        self.folder = folder / name
        for part in ("home", "tmp", "work"):
            (self.folder / part).mkdir(parents=True)
        self._given = environment or {}
        self.drivers: list[Driver] = []

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the processes of this host."""
        return {
            **clean_environment(),
            **self._given,
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            "RAYMEM_CACHE": str(self.folder / "home" / "cache"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "COLUMNS": "400",
        }

    def start(self, arguments: Sequence[str], *, delay_s: float = 0.0) -> Driver:
        """Start ``raymem`` with arguments.

        Args:
            delay_s: seconds that each step takes longer, where the driver trains by itself.
        """
        driver = Driver(self, arguments, delay_s)
        self.drivers.append(driver)
        return driver

    def close(self) -> None:
        """End what still runs."""
        for driver in self.drivers:
            driver.process.send_signal(signal.SIGCONT)
            driver.process.kill()
            driver.process.wait()


class Driver:
    """A command that runs on a host."""

    def __init__(self, host: Host, arguments: Sequence[str], delay_s: float) -> None:
        self.log = host.folder / f"{len(host.drivers)}.log"
        facts = [host.name, str(host.skew_s), str(DURATION_S), str(delay_s)]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *facts, *arguments], env=host.environment, cwd=host.folder / "work",
                stdout=out, stderr=out,
            )  # fmt: skip

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def wait(self, timeout_s: float = 500) -> int:
        """Return its exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end:\n{self.output[-4000:]}") from None

    def until(self, condition: Callable[[], object], timeout_s: float = 500) -> None:
        """Wait for something that this driver does."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"it ended with {self.process.poll()}:\n{self.output[-4000:]}"
            assert time.monotonic() < deadline, f"too slow:\n{self.output[-4000:]}"
            time.sleep(0.1)
