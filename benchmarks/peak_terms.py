"""Shows the terms of the peak of four fine-tunings on one GPU, logits whole and in chunks: a table and a plot.

Nothing is downloaded: only the models' configs are needed, and they stand here. Llama-3.1-8B in 4 bits with LoRA
(rank 16) on 2 rows of 4096 tokens, checkpointed, with LoRAct, and pruned to 35 % as well; and the 70B recipe of
jobs/recipes/.

    python benchmarks/peak_terms.py [--gpu RTX4090] [--losses full chunked]
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import provenance

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "llama-3.1-70b": {
        **LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
}  # fmt: skip
"""As their config.json has them, but for what tells nothing about memory."""

EIGHT: dict[str, Any] = {
    "data": {"train": "demo", "sequence_length": 4096},
    "base": {"quantize": "nf4"},
    "adapter": {"kind": "lora", "rank": 16},
    "train": {"steps": 1, "global_batch": 2, "micro_batch": 2, "precision": "bf16"},
    "scaling": {"num_workers": 1, "use_gpu": True},
}
SEVENTY = Path(__file__).parents[1] / "jobs" / "recipes" / "loram-llama-3.1-70b.yaml"
CASES: dict[str, tuple[str, list[str]]] = {
    "8B, nf4, checkpoint": ("llama-3.1-8b", ["activations=checkpoint"]),
    "8B, nf4, loract": ("llama-3.1-8b", ["activations=loract"]),
    "8B, loram 0.65, nf4, loract": (
        "llama-3.1-8b",
        ["base={kind: loram, ratio: 0.65, quantize: nf4}", "activations=loract"],
    ),
    "70B, loram 0.85, nf4, checkpoint": ("llama-3.1-70b", []),
}
"""Name -> model, and what is laid over its recipe."""

GIB = 1 << 30


def main() -> None:
    parser = provenance.parser(__doc__)
    parser.add_argument("--gpu", default="RTX4090", help="kind of GPU; default: %(default)s")
    parser.add_argument("--losses", nargs="+", default=["full", "chunked"], help="default: %(default)s")
    arguments = parser.parse_args()
    from raymem.planner import plan_many

    chosen = [(case, loss) for case in CASES for loss in arguments.losses]
    with tempfile.TemporaryDirectory() as folder:
        recipes = [recipe_of(case, loss, Path(folder)) for case, loss in chosen]
        plans = plan_many(recipes, gpu=arguments.gpu, timeout_s=7200)
    rows = []
    for (case, loss), recipe, plan in zip(chosen, recipes, plans, strict=True):
        if isinstance(plan, Exception):
            raise plan
        assert plan.traced, plan.note
        rows.append(row_of(case, loss, recipe, plan))
    print(table(rows))
    provenance.save("peak_terms", {"gpu": arguments.gpu, "rows": rows})
    draw(rows, arguments.gpu, provenance.RESULTS / "peak_terms.png")


def recipe_of(case: str, loss: str, folder: Path) -> Any:
    """The recipe of one case; its model is a directory with a config and nothing else."""
    from raymem.recipe.load import load_recipe

    model, overrides = CASES[case]
    directory = folder / model
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(MODELS[model]))
    path = SEVENTY
    if model == "llama-3.1-8b":
        path = folder / "recipe.yaml"
        path.write_text(json.dumps({"name": "peak-terms", "model": {"name": str(directory)}, **EIGHT}))  # is YAML too
    return load_recipe(path, [f"model.name={directory}", f"loss={loss}", *overrides])


def row_of(case: str, loss: str, recipe: Any, plan: Any) -> dict[str, Any]:
    """Return the part of a plan that is kept."""
    return {
        "case": case,
        "loss": loss,
        "tokens": [recipe.train.micro_batch, recipe.data.sequence_length],
        "peak_bytes": plan.peak_bytes,
        "peak_phase": max(plan.phases, key=lambda phase: plan.phases[phase]["peak_bytes"]),
        "capacity_bytes": plan.capacity_bytes,
        "terms": dict(plan.terms),
        "phase_peaks": {phase: found["peak_bytes"] for phase, found in plan.phases.items()},
        "top": plan.top[:8],
        "planning_s": plan.seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """In GiB, for a README."""
    terms = list(rows[0]["terms"])
    lines = ["| recipe | loss | peak | least GPU memory | " + " | ".join(terms) + " |", "|---" * (4 + len(terms)) + "|"]
    for row in rows:
        figures = [row["peak_bytes"], row["capacity_bytes"], *(row["terms"][term] for term in terms)]
        cells = " | ".join(f"{figure / GIB:.2f}" for figure in figures)
        lines.append(f"| {row['case']} | {row['loss']} | {cells} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], gpu: str, path: Path) -> None:
    """Write the picture: one stacked bar per recipe and loss."""
    import matplotlib

    from raymem.planner.plot import COLOURS

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from raymem.memory.devices import gpu_named

    figure, axes = pyplot.subplots(figsize=(11, 5.5), constrained_layout=True)
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    width = 0.8 / len(losses)
    places = [cases.index(row["case"]) + (losses.index(row["loss"]) - (len(losses) - 1) / 2) * width for row in rows]
    bottoms = [0.0] * len(rows)
    for term in rows[0]["terms"]:
        heights = [row["terms"][term] / GIB for row in rows]
        axes.bar(places, heights, 0.92 * width, bottom=bottoms, label=term, color=COLOURS.get(term, "#333333"))
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for place, row, top in zip(places, rows, bottoms, strict=True):
        axes.annotate(f"{row['loss']}\n{top:.1f}", (place, top), textcoords="offset points", xytext=(0, 3), ha="center")
    limit = gpu_named(gpu).capacity_bytes / GIB
    axes.axhline(limit, color="black", linestyle="--", linewidth=1, label=gpu)
    axes.set_xticks(range(len(cases)), [case.replace(", ", "\n", 1) for case in cases])
    axes.set(ylabel="GiB allocated at the peak", title=f"Predicted peak of one training step, {gpu}", xlim=(-0.6, None))
    axes.set_ylim(0, 1.15 * max(limit, *bottoms))
    axes.legend(loc="upper left", ncols=4)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
