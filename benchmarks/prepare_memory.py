"""Memory of preparing a large file of JSON lines: every process that takes part, over the whole preparation.

    python benchmarks/prepare_memory.py --gigabytes 2

Writes a file of that size (or takes ``--file``), prepares it as a run would, with a small tokenizer of its own (or
``--tokenizer``), in this process or with ``--workers N`` in N processes, and keeps the highest resident memory of each.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import provenance

from raymem.recipe.data import DataSection
from raymem.training.data.demo import train_tokenizer
from raymem.training.data.packed.shards import Counts, Task, prepare, serial

WORDS = [
    f"{a}{b}" for a in ("ser", "vo", "lam", "ti", "gra", "pen", "du", "ok") for b in ("na", "rel", "to", "mis", "u")
]


def write_lines(path: Path, size_bytes: int) -> None:
    """Rows of 20 to 4000 words, so that blocks end by rows and by bytes."""
    draw = random.Random(0)
    rows = [
        json.dumps({"prompt": " ".join(draw.choices(WORDS, k=10)), "completion": " ".join(draw.choices(WORDS, k=k))})
        for k in (20, 50, 100, 200, 400, 4000)
        for _ in range(20)
    ]
    written = 0
    with path.open("w") as file:
        while written < size_bytes:
            written += file.write(f"{draw.choice(rows)}\n")


def resident_bytes() -> int:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(function: Callable[[Task], Counts], task: Task) -> tuple[Counts, int]:
    """A task's result and its process's highest memory so far."""
    return function(task), resident_bytes()


def main() -> None:
    parser = provenance.parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of text; default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: all in this one; default: %(default)s")
    parser.add_argument("--file", type=Path, help="an existing file of JSON lines")
    parser.add_argument("--tokenizer", help="directory or Hugging Face id")
    options: argparse.Namespace = parser.parse_args()
    workers: list[int] = []

    def pooled(function: Callable[[Task], Counts], tasks: Sequence[Task]) -> list[Counts]:
        with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
            found = pool.map(functools.partial(measured, function), tasks, chunksize=1)
        workers.append(max(peak for _, peak in found))
        return [counts for counts, _ in found]

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = options.file or folder / "large.jsonl"
        if options.file is None:
            write_lines(path, int(options.gigabytes * 1e9))
        if (tokenizer := options.tokenizer) is None:
            sample = folder / "sample.jsonl"
            sample.write_text(
                "".join(json.dumps({"text": f"{a} {b}\n    {a}({b})\n"}) + "\n" for a in WORDS for b in WORDS)
            )
            train_tokenizer([sample], folder / "tokenizer")
            tokenizer = str(folder / "tokenizer")
        before, began = resident_bytes(), time.perf_counter()
        section = DataSection.model_validate({"train": str(path), "sequence_length": 1024})
        mapping = pooled if options.workers else serial
        (source,) = prepare(section, "train", tokenizer, folder / "cache", mapping).sources
        figures = {
            "file_bytes": path.stat().st_size,
            "examples": source.num_examples,
            "tokens": source.num_tokens,
            "rows": source.num_rows,
            "shards": len(list(source.directory.glob("*.arrow"))),
            "workers": options.workers,
            "resident_before_bytes": before,
            "resident_peak_bytes": resident_bytes(),
            "resident_peak_of_a_worker_bytes": max(workers, default=None),
            "seconds": round(time.perf_counter() - began, 1),
        }
    provenance.save("prepare_memory", figures)


if __name__ == "__main__":
    main()
