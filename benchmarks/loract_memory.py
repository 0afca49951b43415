"""Measures what a forward pass keeps, and the peak of the step, with LoRAct at rank 1/8 against LoRA and checkpointing.

Saved bytes are the allocator's in-use delta around the forward pass of the decoder stack; they are not the peak, so the
peak of a step with head and loss (the meter) stands beside them, and the bytes of the fp32 logits that are part of it.

    python benchmarks/loract_memory.py [--long 8192]
"""

from __future__ import annotations

import gc
from typing import Any

import provenance
import torch
from loract_stack import MODES, keeping, lora_llama, tokens

from raymem.memory.meter import PeakMeter, resident_tensors, storage_bytes
from raymem.testing import heap_in_use_bytes

GOALS = {  # mode -> highest share of plain LoRA, and of checkpointing, at 4 layers and 4 x 512 tokens
    "layer": (0.04, 0.55),
    "sublayer": (0.05, 0.70),
    "layer, all compressed": (0.03, 0.40),
    "sublayer, all compressed": (0.05, 0.55),
}


def saved_bytes(num_layers: int, rows: int, length: int, rank: float, hidden: int) -> dict[str, int]:
    """Mode -> bytes that are in use after the forward pass of the stack and were not before, without its output."""
    model = lora_llama(num_layers, hidden=hidden)
    ids, found = tokens(rows, length), {}
    for mode in MODES:
        with keeping(model, mode, rank):
            for _ in range(2):  # the first pass leaves caches behind
                gc.collect()
                before = heap_in_use_bytes()
                output = model(input_ids=ids, use_cache=False).last_hidden_state
                gc.collect()
                found[mode] = heap_in_use_bytes() - before - output.numel() * output.element_size()
                del output
    return found


def step_peaks(num_layers: int, rows: int, length: int, rank: float, hidden: int) -> dict[str, int]:
    """Mode -> highest use within forward pass, loss and backward pass, above what lies there between steps."""
    model = lora_llama(num_layers, hidden=hidden, head=True)
    ids, found = tokens(rows, length), {}
    resident = storage_bytes(resident_tensors(model))
    for mode in MODES:
        with keeping(model, mode, rank):
            with PeakMeter(torch.device("cpu"), lambda: resident_tensors(model)) as meter:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            assert meter.peak is not None
            found[mode] = meter.peak.allocated_bytes - resident
        model.zero_grad(set_to_none=True)
        print(f"{length} tokens, {num_layers} layers, {mode}: peak {found[mode] / 2**20:.1f} MiB", flush=True)
    return found


def table(bytes_of: dict[str, int]) -> dict[str, dict[str, float]]:
    return {
        mode: {
            "bytes": count,
            "of_plain_lora": round(count / bytes_of["none"], 4),
            "of_checkpointing": round(count / bytes_of["checkpoint"], 4),
        }
        for mode, count in bytes_of.items()
    }


def main() -> None:
    parser = provenance.parser(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--long", type=int, default=8192, help="row length of the long-context table, one row")
    parser.add_argument("--rank", type=float, default=0.125)
    arguments = parser.parse_args()
    shape: dict[str, Any] = {"rank": arguments.rank, "hidden": arguments.hidden}
    saved = {n: table(saved_bytes(n, 4, arguments.length, **shape)) for n in arguments.layers}
    peaks = {n: table(step_peaks(n, 4, arguments.length, **shape)) for n in arguments.layers}
    first = arguments.layers[0]
    met = {
        mode: saved[first][mode]["of_plain_lora"] <= plain and saved[first][mode]["of_checkpointing"] <= checkpointing
        for mode, (plain, checkpointing) in GOALS.items()
    }
    long = {
        "rows": 1,
        "length": arguments.long,
        "saved": table(saved_bytes(first, 1, arguments.long, **shape)),
        "peak": table(step_peaks(first, 1, arguments.long, **shape)),
        "logits_bytes": arguments.long * 4096 * 4,
    }
    provenance.save(
        "loract_memory",
        {
            "shape": {"hidden": arguments.hidden, "rows": 4, "length": arguments.length, "lora_rank": 16},
            "rank": arguments.rank, "goals_met_at_first_depth": met, "saved_by_layers": saved,
            "peak_by_layers": peaks, "logits_bytes": 4 * arguments.length * 4096 * 4, "long": long,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
