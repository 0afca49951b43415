"""Pruning from shard to shard: memory of one worker above its baseline, and speed against a plain copy of the shards.

    python benchmarks/loram_prune.py --directory /path/on/a/disk          # 24 layers, 4.9 GB, needs twice that free
    python benchmarks/loram_prune.py --directory /tmp/x --hidden 512 --trial

Every measurement is a process of its own with one thread. Source pages are dropped from the page cache before each, all
that is written is fsynced, and start-up (imports, opening and validating the job) is reported apart.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LAYERS, LAYERS_PER_SHARD, VOCABULARY, HEAD_DIM = 24, 4, 32000, 64
CRITERIA = ("random", "magnitude", "wanda", "taylor")
TEXTS, LENGTH = 10, 64
RATIO, FIRST, LAST = 0.5, 4, 2


def make_model(directory: Path, hidden: int) -> None:
    """A Llama with random bf16 weights, written layer by layer."""
    import torch
    from transformers import LlamaConfig

    from raymem.methods.loram.nonuniform import meta_model
    from raymem.storage.safetensors_io import Spec, write_json, write_tensors

    directory.mkdir(parents=True)
    heads = hidden // HEAD_DIM
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        dtype="bfloat16",
        tie_word_embeddings=False,
    )
    config.save_pretrained(directory)
    shards: dict[str, dict[str, Spec]] = {}
    for name, weight in meta_model(config).state_dict().items():
        number = int(name.split(".")[2]) // LAYERS_PER_SHARD if ".layers." in name else LAYERS // LAYERS_PER_SHARD
        spec = Spec(tuple(weight.shape), torch.bfloat16)
        shards.setdefault(f"model-{number:05d}.safetensors", {})[name] = spec
    source = torch.Generator().manual_seed(0)

    def make(specs: dict[str, Spec], name: str) -> torch.Tensor:
        shape = specs[name].shape
        return torch.randn(shape, generator=source).mul_(shape[-1] ** -0.5).bfloat16()

    for file, specs in shards.items():
        write_tensors(directory / file, specs, lambda name, specs=specs: make(specs, name), {})  # type: ignore[misc]
    weight_map = {name: file for file, specs in shards.items() for name in specs}
    write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})


def drop_from_cache(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def copy(source: Path, out: Path) -> dict[str, Any]:
    """The plain copy: file by file, each fsynced."""
    out.mkdir()
    started = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        shutil.copyfile(path, out / path.name)
        with (out / path.name).open("rb") as stream:
            os.fsync(stream.fileno())
    return {"seconds": time.perf_counter() - started}


def prune(source: Path, out: Path, criterion: str) -> dict[str, Any]:
    started = time.perf_counter()
    import torch

    from raymem.methods.loram import PruneOptions, prune_model
    from raymem.methods.loram.pruning.job import commit, open_job
    from raymem.methods.loram.pruning.steps import layerwise_model, run_step, steps

    torch.set_num_threads(1)
    options = PruneOptions(criterion=criterion, ratio=RATIO, keep_first=FIRST, keep_last=LAST)  # type: ignore[arg-type]
    ids = torch.randint(VOCABULARY, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(0))
    job = open_job(source, out, options, ids if options.needs_calibration else None)
    layer_bytes = sum(entry.num_bytes for entry in job.source.layer(job.coupling, FIRST).values())
    model = layerwise_model(job) if options.needs_calibration else None
    with tempfile.TemporaryDirectory() as folder:  # the code pages of torch's kernels are no memory of the method
        make_model(Path(folder) / "full", 4 * HEAD_DIM)
        prune_model(Path(folder) / "full", Path(folder) / "out", options, ids if options.needs_calibration else None)
    ctypes.CDLL(None).malloc_trim(0)
    drop_from_cache(source)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    baseline, ready = memory_bytes("VmRSS"), time.perf_counter()
    peak_of_layers = baseline
    for step in steps(job):
        if step.kind in ("rest", "embed", "loss"):
            Path("/proc/self/clear_refs").write_text("5")
        run_step(job, step, model)
        if step.kind in ("rest", "embed", "loss"):
            Path("/proc/self/clear_refs").write_text("5")
        else:
            peak_of_layers = max(peak_of_layers, memory_bytes("VmHWM"))
    commit(job)
    return {
        "seconds": time.perf_counter() - ready,
        "startup_seconds": ready - started,
        "layer_bytes": layer_bytes,
        "peak_above_baseline_bytes": peak_of_layers - baseline,
        "layers_in_memory": round((peak_of_layers - baseline) / layer_bytes, 2),
    }


def measure(source: Path, out: Path, what: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    drop_from_cache(source)
    command = [sys.executable, __file__, "--worker", what, "--directory", str(source), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(out)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(what, found, file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--repeats", type=int, default=3, help="of copy and of pruning by magnitude")
    parser.add_argument("--trial", action="store_true", help="write no result file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work = copy if options.worker == "copy" else prune
        arguments = [] if options.worker == "copy" else [options.worker]
        print(json.dumps(work(options.directory, options.out, *arguments)))
        return
    source, out = options.directory / "full", options.directory / "out"
    if not (source / "model.safetensors.index.json").is_file():
        make_model(source, options.hidden)
    total_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    copies, prunings = [], []
    for _ in range(options.repeats):  # in turns, so that both see the same disk
        copies.append(measure(source, out, "copy")["seconds"])
        prunings.append(measure(source, out, "magnitude")["seconds"])
    figures = {
        "checkpoint_bytes": total_bytes,
        "layers": LAYERS,
        "ratio": RATIO,
        "kept_layers": [FIRST, LAST],
        "calibration": [TEXTS, LENGTH],
        "copy_seconds": copies,
        "magnitude_seconds": prunings,
        "speed_against_copy": round(min(copies) / min(prunings), 2),
        "criteria": {criterion: measure(source, out, criterion) for criterion in CRITERIA},
    }
    if options.trial:
        print(json.dumps(figures, indent=1))
        return
    from provenance import save

    save("loram_prune", figures)


if __name__ == "__main__":
    main()
