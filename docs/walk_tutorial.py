"""Run every command of docs/tutorial.md in a fresh clone: ``python docs/walk_tutorial.py [--write]``.

Exits with the status of the first command that fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
TRANSCRIPT = ROOT / "docs" / "tutorial-transcript.md"
PORT = "8000"
"""The server's in the page; here it is a free one."""


def blocks(page: str) -> list[tuple[str, str]]:
    """Return (language, text) of the page's blocks of code, in their order."""
    return re.findall(r"^```(bash|python)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


def script(page: str, port: str) -> str:
    """Return one shell script that writes the page's files and runs its commands, each after a line with it."""
    lines = ["set -euo pipefail"]
    for language, text in blocks(page):
        if language == "python":
            name = text.split("\n", 1)[0].removeprefix("# ")
            lines += [f"cat > {name} <<'END OF FILE'", text.rstrip("\n"), "END OF FILE"]
            continue
        for command in text.replace("\\\n", " ").strip().splitlines():
            run = command.replace(f"localhost:{PORT}", f"localhost:{port}").replace(f"--port {PORT}", f"--port {port}")
            lines += [f"printf '\\n%s\\n' {shlex.quote('$ ' + command)}", "began=$SECONDS", run]
            lines += ["printf '[%s s]\\n' $((SECONDS - began))"]
    return "\n".join(lines) + "\n"


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def walk(folder: Path) -> tuple[int, str]:
    """Run the page in a clone below ``folder``; returns the exit status and what it printed."""
    clone = folder / "raymem"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    kept = {
        key: value for key, value in os.environ.items() if not re.match(r"RAYMEM_|MLFLOW_|RAY_|PYTHON|VIRTUAL", key)
    }
    environment = {
        **kept, "COLUMNS": "80", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"),
        "RAYMEM_CACHE": str(folder / "cache"), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_QUIET": "1",
    }  # fmt: skip
    program = script(PAGE.read_text(), free_port())
    printed = []
    process = subprocess.Popen(
        ["bash", "-c", program], cwd=clone, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        printed.append(line)
    return process.wait(), "".join(printed).replace(str(folder), "~")


def transcript(printed: str, seconds: float) -> str:
    """Return the page of what was printed."""
    head = (
        "# Transcript of the tutorial\n\nWhat `python docs/walk_tutorial.py --write` printed: the commands of "
        f"[tutorial.md](tutorial.md), on {os.cpu_count()} CPU cores in {seconds / 60:.0f} minutes, installation "
        "included. In brackets: seconds.\n\n```text\n"
    )
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed).replace("```", "'''")
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in plain.strip().replace("\r\n", "\n").split("\n")]
    return head + "\n".join(lines) + "\n```\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {TRANSCRIPT.name}")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raymem-tutorial-") as folder:
        began = time.monotonic()
        status, printed = walk(Path(folder))
        seconds = time.monotonic() - began
    print(f"exit status {status} after {seconds:.0f} s")
    if asked.write and status == 0:
        TRANSCRIPT.write_text(transcript(printed, seconds))
    return status


if __name__ == "__main__":
    sys.exit(main())
