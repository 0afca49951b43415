"""Flips single bits of everything that raymem has written, uses it, and says what became of each.

    python -m tests.faults.flips --bits 1000 --seed 0

makes finished and interrupted runs of a tiny model, prepared data, a pruned model with its adapter, recovery and
figures, a merged model, a sweep's records, and the caches. Then it flips one random bit at a time, on a fresh copy, and
runs what reads that file. A flip is *detected* (an error of raymem's), *rebuilt* (a warning, and the same result), of
*no effect* (the same result), or *wrong*: another result, or an error of no known kind. It ends with status 1 if any is
wrong.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

KINDS = ("detected", "rebuilt", "no effect", "wrong")


@dataclass(frozen=True)
class Use:
    """Something that reads files: the files, relative to the arena, and what it gives."""

    name: str
    folders: tuple[str, ...]
    run: Callable[[], Any]


@dataclass(frozen=True)
class Flip:
    """One flipped bit, and what became of it."""

    use: str
    file: str
    bit: int
    kind: str
    said: str


class Arena:
    """What raymem writes about a tiny model, below one directory.

    Args:
        root: an empty directory.
        parts: names of methods that make something and give its uses; by default all.
    """

    PARTS = ("adapter", "model", "interrupted", "loram", "sweep", "plan")

    def __init__(self, root: Path, parts: tuple[str, ...] = PARTS) -> None:
        from raymem.training import loop
        from tests.helpers.support import save_model, write_examples

        assert loop.run.__kwdefaults__ is not None
        loop.run.__kwdefaults__["metered_steps"] = ()  # measuring a step of a tiny model takes ten times longer
        self.root, self.live, self.pristine = root, root / "live", root / "pristine"
        self.store = self.live / "store"
        self.live.mkdir()
        self.base = save_model(root / "llama")
        (root / "examples").mkdir()
        write_examples(root / "examples" / "train.jsonl", 40, seed=0)
        write_examples(root / "examples" / "eval.jsonl", 8, seed=1)
        self.uses: list[Use] = [use for part in parts for use in getattr(self, part)()]
        shutil.copytree(self.live, self.pristine)
        self.right: dict[str, Any] = {}
        for use in self.uses:
            self.reset()
            self.right[use.name] = use.run()

    def reset(self) -> None:
        """Put everything back as it was, and forget what this process remembers."""
        from raymem import cache

        shutil.rmtree(self.live)
        shutil.copytree(self.pristine, self.live)
        cache._answers.clear()

    def recipe(self, name: str, model: Path | None = None, **sections: Any) -> Any:
        """A recipe of four steps with a checkpoint and an evaluation every two."""
        from tests.helpers.support import make_recipe, run_fragment

        fragment = run_fragment(self.root / "examples", self.store, evaluated=True)
        steps = {"steps": 4, "save_every": 2, "eval_every": 2}
        return make_recipe(fragment, {"name": name, "train": steps}, sections, model=model or self.base)

    def result(self, name: str, folder: str = "adapter") -> list[tuple[str, bytes]]:
        """The files of a result that decide what it computes."""
        directory = self.store / name / folder
        files = [*directory.glob("*.safetensors"), *directory.glob("*config.json"), *directory.glob("tokenizer*.json")]
        return [(path.name, path.read_bytes()) for path in sorted(files)]

    def caches(self) -> tuple[str, ...]:
        """The folders with prepared data and what else runs share so far."""
        return tuple(f"store/cache/{path.name}" for path in sorted((self.store / "cache").iterdir()))

    def again(self, recipe: Any) -> Any:
        """Train from wherever the run stands."""
        from raymem.runs.train import launch

        return launch(recipe).eval_loss, self.result(recipe.name)

    def adapter(self) -> Iterator[Use]:
        """A finished run, its adapter, and the adapter merged."""
        from raymem.runs.evaluate import evaluate_recipe
        from raymem.runs.train import launch
        from raymem.training.artifacts.generate import generate
        from raymem.training.artifacts.merge import merge
        from raymem.training.artifacts.vllm import lint_vllm

        recipe, adapter = self.recipe("done"), self.store / "done" / "adapter"
        launch(recipe)
        merge(adapter, self.store / "merged")

        def use() -> Any:
            text = generate(adapter, "w1 w3", max_new_tokens=8, temperature=0, seed=0)
            merge(adapter, self.live / "again")
            merged = (self.live / "again" / "model.safetensors").read_bytes()
            return evaluate_recipe(recipe).loss, text, lint_vllm(adapter), merged

        yield Use("adapter", ("store/done/adapter",), use)
        yield Use("merged", ("store/merged",), lambda: evaluate_recipe(recipe, str(self.store / "merged")).loss)
        yield Use("finished run", ("store/done", *self.caches()), lambda: self.again(recipe))

    def model(self) -> Iterator[Use]:
        """A model that was trained as a whole, and a run on it as its base."""
        from raymem.runs.evaluate import evaluate_recipe
        from raymem.runs.train import launch

        whole = self.recipe("whole", adapter={"kind": "none"})
        on_it = self.recipe("on", self.store / "whole" / "model")
        launch(whole)
        launch(on_it)
        yield Use("model", ("store/whole/model",), lambda: (evaluate_recipe(whole).loss, evaluate_recipe(on_it).loss))
        yield Use("base that is an artefact", ("store/whole/model",), lambda: self.again(on_it))

    def interrupted(self) -> Iterator[Use]:
        """Runs that stopped behind a checkpoint."""
        from tests.helpers.support import train

        for name, storage in (("cut", {"keep": "last"}), ("best", {"keep": "best"})):
            recipe = self.recipe(name, storage=storage)
            train(recipe, stop_after=3)
            yield Use(f"interrupted run, keep: {storage['keep']}", (f"store/{name}", *self.caches()),
                      lambda recipe=recipe: self.again(recipe))  # type: ignore[misc]  # fmt: skip

    def loram(self) -> Iterator[Use]:
        """A pruned and aligned model, an adapter of it, the recovery, and the figures."""
        from raymem.runs.loram.pipeline import Pipeline
        from tests.helpers.loram_runs import BASE, STAGES

        align = {"train": {"steps": 2, "global_batch": 4, "micro_batch": 4}}
        recipe, records = self.recipe("small", base={**BASE, "align": align}), self.store / "small" / "loram"
        pipeline = Pipeline(recipe)
        for stage in (*STAGES, "verify"):
            getattr(pipeline, stage)()

        def use(*stages: str) -> Any:
            pipeline = Pipeline(recipe)
            results = [getattr(pipeline, stage)() for stage in stages]
            return results[stages.index("verify") :], self.result("small", "recovered")

        def from_scratch() -> Any:
            shutil.rmtree(self.store / "small" / "recovered")
            for name in ("verify", "evaluate"):
                (records / f"{name}.json").unlink()
            return use("recover", "verify", "evaluate")

        pruned = tuple(f"store/cache/loram/{path.name}" for path in (self.store / "cache" / "loram").iterdir())
        aligned = tuple(f"store/{path.name}/model" for path in self.store.glob("loram-aligned-*"))
        yield Use("LoRAM: figures", ("store/small/loram",), lambda: use("train", "recover", "verify", "evaluate"))
        yield Use("LoRAM: from the adapter on", (*pruned, *aligned, "store/small/adapter"), from_scratch)
        aligned_weights = [self.live / folder / "model.safetensors" for folder in aligned]

        def align_again() -> Any:
            for folder in self.store.glob("loram-aligned-*"):
                shutil.rmtree(folder)
            Pipeline(recipe).align()
            return [path.read_bytes() for path in aligned_weights]

        yield Use("LoRAM: align", pruned, align_again)
        yield Use("LoRAM: recovered", ("store/small/recovered",), lambda: use("recover", "verify", "evaluate"))

    def sweep(self) -> Iterator[Use]:
        """The records of a sweep and of a trial."""
        from raymem.storage.storage import Storage
        from raymem.sweeps.driver import _same_sweep
        from raymem.sweeps.options import SweepOptions
        from raymem.sweeps.trial import RESULT, earlier_result

        folder = Storage.open(str(self.store / "sweep"))
        recipe, options = self.recipe("sweep"), SweepOptions(budget_bytes=1 << 30, samples=1)
        trial = folder.child("trial")
        trial.write_record(RESULT, {"status": "finished", "number": 3, "eval_loss": 2.25, "peak_bytes": 123456})
        _same_sweep(folder, recipe, {}, options)
        yield Use("sweep", ("store/sweep",), lambda: (_same_sweep(folder, recipe, {}, options), earlier_result(trial)))

    def plan(self) -> Iterator[Use]:
        """What this machine remembers of plans, probes and measured peaks."""
        from raymem.planner import prediction_error, process
        from raymem.runs.plan import plan_run
        from tests.helpers.support import PlansHere

        recipe = self.recipe("planned")

        def use() -> Any:
            with (
                mock.patch.dict(os.environ, RAYMEM_CACHE=str(self.live / "machine")),
                mock.patch.object(process, "PlannerProcess", PlansHere),
            ):
                # A lost record of measured peaks is said; it is no part of a plan.
                plan = {**plan_run(recipe)[1].to_dict(), "seconds": None}
                return plan, prediction_error.ratio(recipe) in ((1.1, 1), None)

        with mock.patch.dict(os.environ, RAYMEM_CACHE=str(self.live / "machine")):
            prediction_error.record(recipe, 1000, 1100)
        use()
        yield Use("plans and probes", ("machine",), use)


class _Words(logging.Handler):
    """Collects warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.words: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.words.append(record.getMessage())


def flip(arena: Arena, use: Use, file: str, bit: int) -> Flip:
    """Flip a bit of a file in a fresh copy, and use it."""
    from raymem.errors import RaymemError

    arena.reset()
    path, words = arena.live / file, _Words()
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    logging.getLogger("raymem").addHandler(words)
    try:
        result = use.run()
    except RaymemError as error:
        return Flip(use.name, file, bit, "detected", str(error))
    except Exception:  # an error of no kind of raymem's is what this looks for
        return Flip(use.name, file, bit, "wrong", traceback.format_exc())
    finally:
        logging.getLogger("raymem").removeHandler(words)
    if result != arena.right[use.name]:
        return Flip(use.name, file, bit, "wrong", "another result and no error")
    return Flip(use.name, file, bit, "rebuilt" if words.words else "no effect", "; ".join(words.words))


def files_of(arena: Arena, use: Use) -> list[str]:
    """The files of a use that hold anything, relative to the arena."""
    below = [path for folder in use.folders for path in (arena.pristine / folder).rglob("*")]
    found = {path.relative_to(arena.pristine).as_posix() for path in below if path.is_file() and path.stat().st_size}
    return sorted(found)


def chosen(arena: Arena, bits: int, seed: int) -> Iterator[tuple[Use, str, int]]:
    """Draw bits: every file of every use in turn, so that each gets some, at a random place."""
    draw = random.Random(seed)
    targets = [(use, file) for use in arena.uses for file in files_of(arena, use)]
    order: list[tuple[Use, str]] = []
    for _ in range(bits):
        if not order:
            order = draw.sample(targets, len(targets))
        use, file = order.pop()
        yield use, file, draw.randrange(8 * (arena.pristine / file).stat().st_size)


def table(flips: list[Flip]) -> str:
    """The report: kinds of files down, what became of their bits across."""
    counts = Counter((kind_of_file(each.file), each.kind) for each in flips)
    rows = sorted({file for file, _ in counts})
    lines = [f"| file | {' | '.join(KINDS)} |", f"|---|{'---|' * len(KINDS)}"]
    lines += [f"| {row} | {' | '.join(str(counts[row, kind]) for kind in KINDS)} |" for row in rows]
    total = Counter(each.kind for each in flips)
    return "\n".join([*lines, f"| all {len(flips)} | {' | '.join(str(total[kind]) for kind in KINDS)} |"])


def kind_of_file(file: str) -> str:
    """A name for files of the same kind: numbers, keys and runs are left out."""
    parts = Path(file).parts
    if parts[0] == "machine":
        return f"machine's cache: {parts[1]}"
    if "cache" in parts:
        return f"cache: {parts[2]}/.../{Path(file).suffix or parts[-1]}"
    if "checkpoints" in parts:
        return f"checkpoint: {Path(file).suffix}"
    return f"{'/'.join(parts[2:-1]) or parts[1]}: {parts[-1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--bits", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    flips = []
    with tempfile.TemporaryDirectory(prefix="raymem-flips-") as folder:
        os.environ["RAYMEM_CACHE"] = f"{folder}/home"
        arena = Arena(Path(folder))
        for use, file, bit in chosen(arena, options.bits, options.seed):
            flips.append(flip(arena, use, file, bit))
            last = flips[-1]
            where = f"{use.name}: {file} bit {bit}"
            print(f"{len(flips)}/{options.bits} {last.kind}: {where}: {last.said[:160]}", flush=True)
            if last.kind == "wrong":
                print(last.said, flush=True)
    print(table(flips))
    return 1 if any(each.kind == "wrong" for each in flips) else 0


if __name__ == "__main__":
    sys.exit(main())
