"""The runs that faults are injected into: every method, by number of workers and kind of storage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymem.testing.suite import merged
from tests.helpers.loram_runs import ALIGN, BASE

STEPS = 12
SAVE_EVERY = 2
NAME = "run"
"""Name of every run; each has a storage of its own."""

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"dropout": 0.1}},  # so that random streams matter
    "moram": {"adapter": {"kind": "moram", "rank": 4, "density": 0.25}},
    "loract": {"activations": {"kind": "loract", "rank": 8}},
    "mlorc_adamw": {"adapter": "none", "optimizer": {"kind": "mlorc_adamw", "rank": 4, "min_dim": 16}},
    "mlorc_lion": {"adapter": "none", "optimizer": {"kind": "mlorc_lion", "rank": 4, "min_dim": 16, "lr": 1e-3}},
    "loram": {"base": {**BASE, "align": ALIGN}},
    "keep_best": {"storage": {"keep": "best"}},
    "bf16": {"adapter": "none", "train": {"precision": "bf16", "master": "stochastic_rounding"}},
}
PLAIN: dict[str, Any] = {
    "name": NAME,
    "adapter": {"rank": 4, "alpha": 8.0},
    "optimizer": {"lr": 1e-2},
    "train": {
        "steps": STEPS, "global_batch": 4, "micro_batch": 2, "save_every": SAVE_EVERY, "eval_every": 4, "warmup": 0,
    },
    "tracking": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A run."""

    method: str
    workers: int
    """0 is one process without Ray."""
    strategy: str = "ddp"
    remote: bool = False
    """Whether the storage is an object store."""

    @property
    def key(self) -> str:
        """A name for what the run computes, which where its storage lies has no part in."""
        return f"{self.method}-{max(1, self.workers)}-{self.strategy}"

    @property
    def title(self) -> str:
        return f"{self.method}, {self.workers} workers, {self.strategy}, {'S3' if self.remote else 'disk'}"

    @property
    def is_staged(self) -> bool:
        """Whether the run consists of LoRAM's stages."""
        return self.method == "loram"

    @property
    def command(self) -> tuple[str, ...]:
        return ("loram", "run") if self.is_staged else ("train",)

    def recipe(self, model: Path, examples: Path, storage: str, *sections: dict[str, Any]) -> dict[str, Any]:
        """The recipe, with ``sections`` laid over it."""
        scaling: dict[str, Any] = {"num_workers": self.workers, "strategy": self.strategy}
        if self.workers:
            scaling["resources_per_worker"] = {"CPU": 1, "slot": 1}
        data = {"train": str(examples / "train.jsonl"), "eval": str(examples / "eval.jsonl"), "sequence_length": 32}
        places = {"model": {"name": str(model)}, "data": data, "storage": {"path": storage}, "scaling": scaling}
        method = METHODS[self.method]
        # Another kind has other options: what is written for the plain one would be refused.
        plain = {key: value for key, value in PLAIN.items() if not _replaces(method, key)}
        optimizer = {"optimizer": {"lr": 1e-2}} if "optimizer" in method else {}
        return merged(plain, places, optimizer, method, *sections)


def _replaces(method: dict[str, Any], key: str) -> bool:
    options = method.get(key)
    return options == "none" or (isinstance(options, dict) and "kind" in options)


ALL = tuple(
    Case(method, workers, strategy, remote)
    for method in METHODS
    for workers, strategy in ((0, "ddp"), (1, "ddp"), (2, "ddp"), (2, "fsdp2"))
    for remote in (False, True)
    if not (method == "loram" and (remote or workers == 2))  # its stages need plain files
)
