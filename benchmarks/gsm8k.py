"""GSM8K on SmolLM2-135M-Instruct: the rows, the loop and the figures that all benchmarks of quality share.

Every method sees the same rows in the same order, the same summed cross-entropy of the answers (in chunks), the same
schedule (a tenth of warmup, then cosine) and gradients clipped at norm 1. fp32, 4 rows of 256 tokens a step.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raymem.recipe.axes import LOSSES
from raymem.recipe.load import recipe_of
from raymem.recipe.schema import Recipe
from raymem.runs.data import prepare_here
from raymem.runs.resolve import resolve
from raymem.training import loss
from raymem.training.data.batches import Batch, global_targets, rank_batches
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.tokenizer import load_tokenizer
from raymem.training.dist_env import DistEnv
from raymem.training.evaluate import evaluate, evaluation_rows
from raymem.training.hooks import hooks_of, view_of
from raymem.training.loop import sampler_of
from raymem.training.model.build import build_model
from raymem.training.optim import build_updater, lr_factor
from raymem.training.step import train_step

TRAIN, TUNING, ANSWERS = 1500, 60, 100
"""Problems to train on, to choose learning rates by, and to report on (these from the test split)."""
ROWS, MICRO, TOKENS = 4, 2, 256
STORAGE = Path(tempfile.gettempdir()) / "raymem-benchmark-gsm8k"

Step = Callable[[list[Batch], int, int, float], float]
"""Takes micro-batches, their targets, the number of the step from 0 and its learning rate; returns the mean loss."""


def raw_recipe(gsm8k: Path, fragment: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return the recipe of a method.

    Args:
        gsm8k: its train.jsonl; test.jsonl lies beside it.
    """
    files = _split(gsm8k)
    columns = {"prompt": "question", "completion": "answer"}
    return {
        "name": "quality",
        "model": {"name": "smollm2"},
        "seed": seed,
        "data": {
            "train": {"path": str(files["train"]), "columns": columns},
            "eval": [
                {"path": str(files["tuning"]), "columns": columns, "name": "tuning"},
                {"path": str(files["answers"]), "columns": columns, "name": "answers"},
                {"path": "demo:text", "max_rows": 12, "name": "text"},
            ],
            "sequence_length": TOKENS,
        },
        "train": {"steps": 1, "global_batch": ROWS, "micro_batch": MICRO},
        "scaling": {"num_workers": 0},
        "storage": {"path": str(STORAGE)},
        "tracking": "none",
        **fragment,
    }


def _split(gsm8k: Path) -> dict[str, Path]:
    train = gsm8k.read_text().splitlines(keepends=True)
    test = gsm8k.with_name("test.jsonl").read_text().splitlines(keepends=True)
    parts = {"train": train[:TRAIN], "tuning": train[TRAIN : TRAIN + TUNING], "answers": test[:ANSWERS]}
    STORAGE.mkdir(parents=True, exist_ok=True)
    for name, lines in parts.items():
        path = STORAGE / f"{name}.jsonl"
        if not path.exists() or path.read_text() != "".join(lines):
            path.write_text("".join(lines))
    return {name: STORAGE / f"{name}.jsonl" for name in parts}


@dataclass(frozen=True)
class Task:
    """The prepared rows, for a model that any recipe of the task builds."""

    recipe: Recipe
    tokenizer: str
    train: PackedRows
    evaluated: Mapping[str, PackedRows]

    @staticmethod
    def of(raw: dict[str, Any]) -> Task:
        recipe = resolve(recipe_of(raw)).recipe
        tokenizer, train = prepare_here(recipe, "train")
        _, held_out = prepare_here(recipe, "eval")
        evaluated = evaluation_rows(held_out)
        assert isinstance(evaluated, Mapping)
        return Task(recipe, tokenizer, PackedRows(train.directories), evaluated)

    def losses(self, model: Any, *names: str) -> dict[str, float]:
        """Return the mean loss of the targets of each held-out set."""
        sets = {name: self.evaluated[name] for name in names}
        found = evaluate(model, sets, DistEnv.current(self.recipe), micro_batch=MICRO, mixed=False)
        return {name: round(part.loss, 5) for name, part in found.by_name.items()}

    def fit(self, model: Any, step: Step, steps: int, lr: float) -> dict[str, Any]:
        """Train; return the loss of every step and the seconds of CPU time after it."""
        sampler = sampler_of(self.recipe, self.train)
        losses, seconds = [], [0.0]
        model.train()
        for number in range(steps):
            ids = sampler.ids(number)
            batches = rank_batches(self.train, ids, 0, 1, MICRO)
            began = time.process_time()
            loss = step(batches, global_targets(self.train, ids), number, lr * lr_factor(number, steps, "cosine", 0.1))
            seconds.append(round(seconds[-1] + time.process_time() - began, 2))
            losses.append(round(loss, 5))
        return {"train_losses": losses, "cpu_s": seconds[1:]}

    def exact_match(self, model: Any, count: int, most_tokens: int = 160) -> float:
        """Return the share of the first held-out problems whose greedy answer ends in the right number."""
        tokenizer = load_tokenizer(self.tokenizer)
        problems = [json.loads(line) for line in (STORAGE / "answers.jsonl").read_text().splitlines()[:count]]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": one["question"]}], add_generation_prompt=True, return_dict=False
            )
            for one in problems
        ]
        width = max(map(len, prompts))
        ids = torch.tensor([[tokenizer.eos_token_id] * (width - len(one)) + one for one in prompts])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
        model.eval()
        with torch.no_grad():
            new = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=most_tokens, do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )[:, width:]  # fmt: skip
        answers = tokenizer.batch_decode(new, skip_special_tokens=True)
        right = [_number(said) == _number(one["answer"]) for said, one in zip(answers, problems, strict=True)]
        return round(float(np.mean(right)), 4)


def _number(answer: str) -> str | None:
    """Return the number behind ####, or else the last one."""
    marked = re.findall(r"####\s*(-?[\d,.]+)", answer)
    found = marked or re.findall(r"-?\d[\d,]*\.?\d*", answer)
    return found[-1].replace(",", "").rstrip(".") if found else None


def ours(task: Task) -> tuple[Any, Step]:
    """Return the model of the task's recipe and its step, as raymem trains it."""
    recipe = task.recipe
    model: Any = build_model(recipe)
    updater = build_updater(model, recipe)
    hooks = hooks_of(recipe, model)

    sampler = sampler_of(recipe, task.train)

    def ahead(number: int) -> list[tuple[Batch, int]]:
        ids = sampler.ids(number)
        return [(batch, global_targets(task.train, ids)) for batch in rank_batches(task.train, ids, 0, 1, MICRO)]

    view = view_of(model, ahead, mixed=False)

    def step(batches: list[Batch], targets: int, number: int, lr: float) -> float:
        for hook in hooks:
            hook.before_step(number, view)
        return float(train_step(model, batches, targets, updater, number, lr, clip_norm=1.0).loss)

    return model, step


def theirs(task: Task, build: Callable[[Any], Any]) -> tuple[Any, Step]:
    """Return a peer's model (peers.py) and a plain step of it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(task.recipe.seed)
    model = AutoModelForCausalLM.from_pretrained(task.recipe.model.name, dtype=torch.float32)
    peer = build(model)
    loss.prepare(peer.model, LOSSES.of(task.recipe), task.recipe.loss)
    trained = [parameter for parameter in peer.model.parameters() if parameter.requires_grad]

    def step(batches: list[Batch], targets: int, number: int, lr: float) -> float:
        for group in peer.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        total = 0.0
        for batch in batches:
            share = loss.forward_loss_sum(peer.model, batch, mixed=False) / targets
            share.backward()
            total += float(share.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        peer.optimizer.step()
        peer.optimizer.zero_grad()
        return total

    return peer.model, step
