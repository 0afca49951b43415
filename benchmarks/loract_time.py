"""Step time of LoRAct against transformers' checkpointing; the goal is at most 1.05 for ``layer`` and ``sublayer``.

Modes take turns within every round, in an order that changes from round to round, and each step is compared with the
checkpointed one of its own round, so that what else the machine does falls out. The share of the decomposition is
what compressing takes of the step.

    python benchmarks/loract_time.py [--rounds 30]
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import provenance
import torch
from loract_stack import MODES, keeping, lora_llama, tokens

from raymem.methods.loract import packer

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{mode: (mode, {}) for mode in MODES},
    "layer, no power iteration": ("layer", {"power_iterations": 0}),
    "sublayer, no power iteration": ("sublayer", {"power_iterations": 0}),
}


class Share:
    """Seconds that compressing and restoring took."""

    def __init__(self) -> None:
        self.seconds = {"compress": 0.0, "restore": 0.0}
        packer.factorise = self._timed("compress", packer.factorise)
        packer.Factors.restore = self._timed("restore", packer.Factors.restore)  # type: ignore[method-assign]

    def _timed(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            result = function(*args, **kwargs)
            self.seconds[name] += time.process_time() - began
            return result

        return call


def main() -> None:
    parser = provenance.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=float, default=0.125)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, ids = lora_llama(arguments.layers, hidden=arguments.hidden), tokens(4, arguments.length)
    share, draw = Share(), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    shares: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for number in range(arguments.rounds + 1):
        order = list(VARIANTS)
        draw.shuffle(order)
        for name in order:
            mode, options = VARIANTS[name]
            with keeping(model, mode, arguments.rank, **options):
                share.seconds = dict.fromkeys(share.seconds, 0.0)
                began = time.process_time()
                model(input_ids=ids, use_cache=False).last_hidden_state.square().mean().backward()
                took = time.process_time() - began
            model.zero_grad(set_to_none=True)
            if number:  # the first round is warm-up
                seconds[name].append(took)
                shares[name].append({part: value / took for part, value in share.seconds.items()})
        print(f"round {number} of {arguments.rounds}", flush=True)
    rows = {}
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds["checkpoint"], strict=True)]
        rows[name] = {
            "median_s": statistics.median(values),
            "of_checkpointing": round(statistics.median(ratios), 4),
            "quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)] if len(ratios) > 1 else ratios,
            **{part: round(statistics.median(s[part] for s in shares[name]), 4) for part in ("compress", "restore")},
        }
    provenance.save(
        "loract_time",
        {
            "shape": {"layers": arguments.layers, "hidden": arguments.hidden, "rows": 4, "length": arguments.length},
            "rank": arguments.rank, "rounds": arguments.rounds, "clock": "process CPU time, 1 thread",
            "goal": 1.05, "goal_met": {m: rows[m]["of_checkpointing"] <= 1.05 for m in ("layer", "sublayer")},
            "modes": rows,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
