"""Writes figures of the results into pages, between ``<!-- table: NAME -->`` and ``<!-- end -->``."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from provenance import entries
from suite import BENCHMARKS

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "docs" / "planner.md",
    ROOT / "docs" / "choosing.md",
    ROOT / "docs" / "benchmarks.md",
    ROOT / "docs" / "scaling.md",
    ROOT / "docs" / "versions.md",
)
_MIB, _GIB = 2**20, 2**30


def written(page: str, results: Path) -> str:
    """Return a page with its tables made anew.

    Raises:
        SystemExit: a result that one of them needs is not there.
    """

    def fill(marked: re.Match[str]) -> str:
        return f"{marked[1]}\n{TABLES[marked[2]](results)}\n{marked[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", fill, page, flags=re.DOTALL)


def markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read(results: Path, name: str) -> Any:
    """Return a result."""
    return json.loads(_there(results / f"{name}.json").read_text())


def _rows(results: Path, name: str) -> list[dict[str, Any]]:
    return entries(_there(results / f"{name}.jsonl"))


def _there(path: Path) -> Path:
    if not path.is_file():
        raise SystemExit(f"{path} is not there; run it with: python -m benchmarks run --suite cpu --only {path.stem}")
    return path


def listed(results: Path) -> str:
    rows = ([f"`{one.script}`", one.claim, one.takes] for one in BENCHMARKS)
    return markdown(["script", "claim", "takes on 2 cores"], rows)


def methods(results: Path) -> str:
    rows = []
    for row in _rows(results, "methods"):
        predicted = row.get("predicted_bytes")
        error = "" if predicted is None else f"{100 * (predicted / row['measured_bytes'] - 1):+.2f} %"
        time = row["time_over_lora"]
        rows.append([
            f"{row['key']} (peer)" if row["peer"] else row["key"],
            f"{row['measured_bytes'] / _MIB:,.0f}",
            error,
            f"{row['trained_parameters'] / 1e6:.2f}",
            f"{row['artifact_bytes'] / _MIB:,.1f}",
            f"{row['tokens_per_s']['median']:.0f}",
            f"{time['median']:.2f} ({time['min']:.2f} to {time['max']:.2f})",
        ])  # fmt: skip
    head = ["method", "peak, MiB", "plan", "trained, millions", "artefact, MiB", "tokens/CPU s", "step time over LoRA"]
    return markdown(head, rows)


def planner(results: Path) -> str:
    found: dict[tuple[str, int], list[float]] = {}
    for row in read(results, "planner_smollm2")["rows"]:
        found.setdefault((row["method"], row["micro_batch"]), []).append(row["error_percent"])
    rows = (
        [method, micro_batch, len(errors), f"{round(min(errors), 2) + 0:.2f} %", f"{round(max(errors), 2) + 0:.2f} %"]
        for (method, micro_batch), errors in found.items()
    )
    return markdown(["method", "micro-batch", "cases", "lowest error", "highest error"], rows)


def needs(results: Path) -> str:
    """What every way takes of every model."""
    found = read(results, "choosing")
    sizes = {(row["way"], row["model"]): row.get("capacity_bytes") for row in found["rows"]}
    models = list(dict.fromkeys(row["model"] for row in found["rows"]))
    ways = list(dict.fromkeys(row["way"] for row in found["rows"]))

    def size(way: str, model: str) -> str:
        capacity = sizes[way, model]
        return "-" if capacity is None else f"{capacity / _GIB:.1f}"

    return markdown(["GiB", *map(_short, models)], ([way, *(size(way, model) for model in models)] for way in ways))


def fits(results: Path) -> str:
    """Of every GPU and model the first way that fits."""
    found = read(results, "choosing")
    models = list(dict.fromkeys(row["model"] for row in found["rows"]))

    def first(capacity: int, model: str) -> str:
        mine = (row for row in found["rows"] if row["model"] == model)
        return next((row["way"] for row in mine if row.get("capacity_bytes", capacity + 1) <= capacity), "none")

    rows = (
        [f"{gpu}, {size / _GIB:.0f}", *(first(size, model) for model in models)] for gpu, size in found["gpus"].items()
    )
    return markdown(["GPU, GiB", *map(_short, models)], rows)


def _short(model: str) -> str:
    return model.rsplit("/", 1)[-1]


def judged(results: Path) -> dict[str, list[dict[str, Any]]]:
    """Return for each line of quality.py its trained rows, those at the learning rate that its tuning chose."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(results, "quality"):
        lines.setdefault(row["key"].split(" | ")[0], []).append(row)
    found = {}
    for name, mine in lines.items():
        tuned = {row["losses"]["tuning"]: row["lr"] for row in mine if "tuning" in row["losses"]}
        seeds = [row for row in mine if "answers" in row["losses"] and (not tuned or row["lr"] == tuned[min(tuned)])]
        if seeds:
            found[name] = seeds
    return found


IN_MEMORY = {"LoRAct, n/8": "LoRAct, sublayers", "LoRAct, n/8, linear layers": "LoRAct, linear layers"}
"""Maps lines of quality.py to rows of methods.py, where the names differ."""


def headline(results: Path) -> str:
    """Peak, time and loss of every method that was both measured and judged."""
    measured = {row["key"]: row for row in _rows(results, "methods")}
    rows = []
    for name, seeds in judged(results).items():
        row = measured.get(IN_MEMORY.get(name, name))
        if row is None:
            continue
        rows.append([
            f"{name} (peer)" if row["peer"] else name,
            f"{row['measured_bytes'] / _MIB:,.0f}",
            f"{row['artifact_bytes'] / _MIB:,.0f}",
            f"{row['time_over_lora']['median']:.2f}",
            _over((row["losses"]["answers"] for row in seeds), ".3f"),
        ])  # fmt: skip
    return markdown(["method", "peak, MiB", "artefact, MiB", "step time over LoRA", "loss of held-out answers"], rows)


def budgets(results: Path) -> str:
    rows = []
    for row in _rows(results, "budgets"):
        budget, name, _ = row["key"].split(" | ")
        best = ", ".join(f"{key} {value:.2g}" if isinstance(value, float) else f"{key} {value}"
                         for key, value in row["point"].items())  # fmt: skip
        rows.append([
            budget,
            name,
            f"{row['loss']:.3f}",
            f"{row['peak_bytes'] / _MIB:.0f}",
            f"{100 * (row['predicted_bytes'] / row['peak_bytes'] - 1) + 0:+.2f} %",
            f"{row['started']}, {row['refused']}, {row['above_budget']}",
            best,
        ])  # fmt: skip
    head = ["budget", "searched", "loss of answers", "peak, MiB", "plan", "started, refused, above", "best"]
    return markdown(head, rows)


def quality(results: Path) -> str:
    rows = []
    for name, seeds in judged(results).items():
        first = seeds[0]
        rows.append([
            name,
            f"{first['lr']:g}" if "lr" in first else "",
            f"{first['trained_parameters'] / 1e6:.2f}" if "lr" in first else "",
            _over((row["losses"]["answers"] for row in seeds), ".3f"),
            _over((row["losses"]["text"] for row in seeds), ".3f"),
            _over((100 * row["exact_match"] for row in seeds), ".0f"),
            f"{first['cpu_s'][-1] / len(first['cpu_s']):.1f}" if "cpu_s" in first else "",
        ])  # fmt: skip
    head = [
        "method",
        "lr",
        "trained, millions",
        "loss of answers",
        "loss of other text",
        "exact match, %",
        "CPU s/step",
    ]
    return markdown(head, rows)


def loram(results: Path) -> str:
    """Of each way of pruning the losses, and the share of LoRA's gain that arrives at the full model."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in _rows(results, "loram_smollm2"):
        name, _, seed = row["key"].partition(" | ")
        found.setdefault(name, {})[seed] = row
    rows = []
    for name, seeds in found.items():
        if name == "full" or name.startswith("cut "):
            continue
        runs = {seed: row for seed, row in seeds.items() if seed in found["full"]}
        cut = found.get(f"cut {name.split()[1].rstrip(',')}", {})
        rows.append([
            name,
            *(_over((row[column] for row in runs.values()), ".3f") for column in _LORAM_COLUMNS),
            _over((_share(row, found["full"][seed]) for seed, row in runs.items()), ".2f"),
            _over((row["cut + LoRA"] for row in cut.values()), ".3f") if cut else "",
        ])  # fmt: skip
    full = found["full"].values()
    alone, with_lora = (_over((row[column] for row in full), ".3f") for column in ("full", "full + LoRA"))
    line = f"The full model: {alone}, with LoRA of its own {with_lora}."
    return f"{line}\n\n" + markdown(
        ["way, ratio", *_LORAM_COLUMNS, "share of the gain", "cut to equal bytes + LoRA"], rows
    )


_LORAM_COLUMNS = ("pruned", "pruned + adapter", "full + recovered", "full + wrong units")


def _share(row: dict[str, Any], full: dict[str, Any]) -> float:
    return float((full["full"] - row["full + recovered"]) / (full["full"] - full["full + LoRA"]))


def _over(values: Iterable[float], form: str) -> str:
    """Return the median of seeds, with the range where there are several."""
    values = list(values)
    middle = f"{statistics.median(values):{form}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def slow_bucket(results: Path) -> str:
    rows = [
        [
            {"none": "none", "disk": "local disk", "bucket": "bucket", "bucket, waiting": "bucket, training waits"}[
                row["kind"]
            ],
            _spread(row["thread_cpu_over_none"], ".3f"),
            _spread(row["cpu_over_none"], ".3f"),
            _spread(row["wall_over_none"], ".2f"),
            f"{row['blocked_s']:.2f}",
            f"{row['upload_s']:.1f}" if row["upload_s"] else "",
            f"{row['server_cpu_s']:.1f}" if row["upload_s"] else "",
        ]
        for row in read(results, "slow_bucket")["rows"]
    ]
    head = [
        "checkpoints",
        "CPU time of the training thread over none",
        "of the process",
        "clock over none",
        "training stands still, s a checkpoint",
        "upload, s",
        "CPU s of the bucket",
    ]
    return markdown(head, rows)


def scheduler(results: Path) -> str:
    found = read(results, "scheduler")
    rows = [
        [
            f"{row['steps']:,}",
            f"{row['seconds']:.1f}",
            f"{row['steps_per_s']:.0f}",
            f"{1000 * row['driver_cpu_s'] / row['steps']:.2f}",
            f"{row['driver_rise_bytes'] / _MIB:.0f}",
        ]
        for row in found["rows"]
    ]
    return markdown(["steps", "s", "steps/s", "the driver's CPU ms a step", "rise of its memory, MiB"], rows)


_STAGES = ("prune, random", "prune, taylor", "recover", "merge")


def scaling_stages(results: Path) -> str:
    rows = []
    for row in read(results, "scaling")["rows"]:
        for name, stage in sorted(row["stages"].items(), key=lambda item: _STAGES.index(item[0])):
            times = [_duration(stage["seconds"][nodes]) for nodes in ("1", "8", "64")]
            amounts = [f"{stage[key] / 1e9:,.1f}" for key in ("read", "write")]
            rows.append([
                _short(row["model"]), name, f"{stage['tasks']:,}", *amounts, f"{stage['peak'] / _GIB:.1f}", *times
            ])  # fmt: skip
    head = [
        "model",
        "stage",
        "tasks",
        "read, GB",
        "written, GB",
        "peak of a task, GiB",
        "1 node",
        "8 nodes",
        "64 nodes",
    ]
    return markdown(head, rows)


def scaling_train(results: Path) -> str:
    rows = []
    for row in read(results, "scaling")["rows"]:
        plan, pruned = row["train"], row.get("pruned_bytes")
        held = "pruned" if pruned else "full"
        worker = f"{plan['capacity_bytes'] / _GIB:.1f}" if "capacity_bytes" in plan else "no plan"
        parameters = (pruned or row["full_bytes"]) / 2
        rows.append([
            _short(row["model"]), held, f"{2 * parameters / 1e9:,.1f}", worker, f"{6 * 1000 * parameters / 1e15:.2f}"
        ])  # fmt: skip
    head = [
        "model",
        "trained on",
        "each node fetches, GB",
        "one worker alone needs, GiB",
        "PFLOP per 1,000 tokens, at most",
    ]
    return markdown(head, rows)


def scaling_rates(results: Path) -> str:
    found = read(results, "scaling")
    measured = [
        [
            name,
            _rate(rate),
            f"[{rate['from'].partition(',')[0]}](../benchmarks/results/{rate['from'].partition(',')[0]})",
        ]
        for name, rate in found["rates"].items()
    ]
    cluster = found["cluster"]
    given = [
        ["network of a node", f"{cluster['node_gbit']:g} Gbit/s", "`--node-gbit`"],
        ["throughput of the bucket", f"{cluster['bucket_gbit']:g} Gbit/s", "`--bucket-gbit`"],
        ["cores of a node", f"{cluster['cores']}", "`--cores`"],
    ]
    return markdown(["rate", "value", "measured in, or given by"], [*measured, *given])


def _rate(rate: dict[str, Any]) -> str:
    if "steps_per_s" in rate:
        return f"{rate['steps_per_s']:.0f} tasks/s"
    return f"{rate['bytes_per_core_s'] / 1e6:,.0f} MB of the model per core and second"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not measured"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def compat(results: Path) -> str:
    """Versions of each environment of the compatibility suite, and what its parts gave."""
    parts: dict[str, dict[str, dict[str, Any]]] = {}
    for one in read(results, "compat"):
        parts.setdefault(one["part"], {})[one["environment"]] = one
    environments = ("lowest", "pinned", "newest")
    versions = {one["environment"]: one["versions"] for row in parts.values() for one in row.values()}
    rows: list[list[object]] = [
        [library, *(versions[name][library] if name in versions else "" for name in environments)]
        for library in next(iter(versions.values()))
    ]

    def cell(row: dict[str, dict[str, Any]], name: str) -> str:
        if name not in row:
            return "not run"
        one = row[name]
        counted = [f"{one['passed']} passed", *(f"{len(one[w])} {w}" for w in ("failed", "skipped") if one[w])]
        return ", ".join(counted)

    rows += [[f"tests: {part}", *(cell(row, name) for name in environments)] for part, row in parts.items()]
    return markdown(["", *environments], rows)


def _spread(figures: dict[str, float], form: str) -> str:
    return f"{figures['median']:{form}} ({figures['min']:{form}} to {figures['max']:{form}})"


TABLES: dict[str, Callable[[Path], str]] = {
    "compat": compat,
    "listed": listed,
    "methods": methods,
    "headline": headline,
    "budgets": budgets,
    "planner": planner,
    "needs": needs,
    "fits": fits,
    "quality": quality,
    "loram": loram,
    "slow_bucket": slow_bucket,
    "scheduler": scheduler,
    "scaling_rates": scaling_rates,
    "scaling_stages": scaling_stages,
    "scaling_train": scaling_train,
}
