"""Time and memory of ``raymem merge``, against copying the files of the base.

    python benchmarks/merge_time.py --gigabytes 5

Writes a Llama with layers as wide as those of Llama-3.1-8B, in bf16 and files of a gigabyte, and a LoRA adapter of
rank 16 on all of its linear layers. Merging and copying take turns; both end when their files are on the disk. Memory
is how far the resident memory of a process rises at most while it merges, once it has merged a small model.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import provenance
import torch

from raymem.storage.safetensors_io import INDEX, Spec, write_json, write_tensors
from raymem.training.data.demo import train_tokenizer

RANK = 16
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
WORDS = 32_000
FILE_BYTES = 10**9
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_model(directory: Path, sizes: dict[str, int], layers: int, tokenizer: Path) -> None:
    """Write a Llama of random weights, no more than a matrix in memory."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=WORDS, dtype="bfloat16")
    config.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).state_dict().items()}
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    files: list[dict[str, Spec]] = [{}]
    held = 0
    for name, shape in shapes.items():
        held += 2 * torch.Size(shape).numel()
        if held > FILE_BYTES:
            files.append({})
            held = 2 * torch.Size(shape).numel()
        files[-1][name] = Spec(shape, torch.bfloat16)
    weight_map = {}
    for number, specs in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        weight_map |= dict.fromkeys(specs, file)

        def make(name: str, specs: dict[str, Spec] = specs) -> torch.Tensor:
            numbers = torch.Size(specs[name].shape).numel()
            return noise.repeat(-(-numbers // len(noise)))[:numbers].view(specs[name].shape)

        write_tensors(directory / file, specs, make, {})
    write_json(directory / INDEX, {"metadata": {}, "weight_map": weight_map})


def write_adapter(directory: Path, base: Path, sizes: dict[str, int], layers: int, tokenizer: Path) -> None:
    from peft import LoraConfig
    from transformers import AutoTokenizer

    LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=list(TARGETS),
        base_model_name_or_path=str(base),
        task_type="CAUSAL_LM",
    ).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    of_keys = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    outputs = dict(zip(TARGETS, (hidden, of_keys, of_keys, hidden, inner, inner, hidden), strict=True))
    specs: dict[str, Spec] = {}
    for layer in range(layers):
        for target in TARGETS:
            part = "self_attn" if target[0] in "qkvo" else "mlp"
            place = f"base_model.model.model.layers.{layer}.{part}.{target}"
            inputs = inner if target == "down_proj" else hidden
            specs[f"{place}.lora_A.weight"] = Spec((RANK, inputs), torch.float32)
            specs[f"{place}.lora_B.weight"] = Spec((outputs[target], RANK), torch.float32)
    generator = torch.Generator().manual_seed(1)
    write_tensors(
        directory / "adapter_model.safetensors", specs,
        lambda key: 0.02 * torch.randn(specs[key].shape, generator=generator), {},
    )  # fmt: skip


def status_bytes(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def merge_here(small: str, adapter: str, output: str) -> None:
    """Merge in this process, and print what it took."""
    from raymem.training.artifacts.merge import merge

    merge(small, f"{output}-small")
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, began, cpu = status_bytes("VmRSS"), time.perf_counter(), time.process_time()
    merge(adapter, output)
    os.sync()
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "rise_bytes": status_bytes("VmHWM") - before}))


def copy(base: Path, output: Path) -> float:
    """Return the seconds in which the files of a directory are copied to the disk."""
    output.mkdir()
    began = time.perf_counter()
    for path in base.iterdir():
        with path.open("rb") as source, (output / path.name).open("wb") as target:
            while chunk := source.read(1 << 24):
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
    os.sync()
    return time.perf_counter() - began


def main() -> None:
    parser = provenance.parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=5.0, help="of the base; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--merge", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.merge:
        merge_here(*options.merge)
        return
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sample = folder / "sample.jsonl"
        sample.write_text("".join(json.dumps({"text": f"some words and {n}"}) + "\n" for n in range(2000)))
        train_tokenizer([sample], folder / "tokenizer")
        layers = max(1, round((options.gigabytes * 1e9 - 4 * WORDS * 4096) / 436e6))
        for name, sizes, depth in (("small", SMALL, 1), ("large", LARGE, layers)):
            write_model(folder / name, sizes, depth, folder / "tokenizer")
            write_adapter(folder / f"{name}-adapter", folder / name, sizes, depth, folder / "tokenizer")
        size = sum(path.stat().st_size for path in (folder / "large").glob("*.safetensors"))
        os.sync()
        for number in range(options.rounds):
            copied = copy(folder / "large", folder / f"copy-{number}")
            arguments = [str(folder / name) for name in ("small-adapter", "large-adapter", f"merged-{number}")]
            merged = subprocess.run(
                [sys.executable, __file__, "--merge", *arguments], check=True, stdout=subprocess.PIPE, text=True
            )
            figures = json.loads(merged.stdout.splitlines()[-1])
            rounds.append({**figures, "copy_seconds": copied, "over_copy": figures["seconds"] / copied})
            for name in (f"copy-{number}", f"merged-{number}", f"merged-{number}-small"):
                for path in (folder / name).iterdir():
                    path.unlink()
    figures = {
        "file_bytes": size,
        "rounds": rounds,
        "over_copy": statistics.median(one["over_copy"] for one in rounds),
        "rise_bytes": max(one["rise_bytes"] for one in rounds),
    }
    provenance.save("merge_time", figures)


if __name__ == "__main__":
    main()
