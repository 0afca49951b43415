"""``raymem loram``: the stages of LoRAM, one by one or all in order. Heavy imports happen inside commands."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from raymem.cli import console
from raymem.cli.options import Fresh, Overrides, RecipeFile, Verbose
from raymem.cli.results import generate
from raymem.cli.signals import goes_on
from raymem.memory.budget import bytes_text

if TYPE_CHECKING:
    from raymem.runs.loram.models import PrunedBase
    from raymem.runs.loram.pipeline import Pipeline
    from raymem.training.data.sources.early import Split

app = typer.Typer(
    help="LoRAM: prune a model, train an adapter on what is left, recover it for the full model.", no_args_is_help=True
)

Forward = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option(
        "--forward/--no-forward", help="Also run both models in fp32; by default where they take 16 GiB at most."
    ),
]
WithLora = Annotated[
    bool, typer.Option("--with-lora", help="Also train the adapter on the full model: how much of its gain is kept?")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def prune(recipe: RecipeFile, set_: Overrides = [], verbose: Verbose = False) -> None:  # noqa: B006
    """Write the pruned model, layer by layer, and say what it saves."""
    with _pipeline(recipe, set_, verbose) as pipeline:
        _show_plan(pipeline.prune())


@app.command()
def align(recipe: RecipeFile, set_: Overrides = [], verbose: Verbose = False) -> None:  # noqa: B006
    """Train the pruned model itself, as base.align says."""
    with _pipeline(recipe, set_, verbose, splits=("train",)) as pipeline:
        if pipeline.align() is None:
            console.out.print("nothing to do: the recipe has no base.align")


@app.command()
def train(recipe: RecipeFile, set_: Overrides = [], fresh: Fresh = False, verbose: Verbose = False) -> None:  # noqa: B006
    """Train the adapter on the pruned model; `raymem train` does the same."""
    with _pipeline(recipe, set_, verbose, splits=("train", "eval")) as pipeline:
        _show_training(pipeline.train(fresh=fresh))


@app.command()
def recover(recipe: RecipeFile, set_: Overrides = [], verbose: Verbose = False) -> None:  # noqa: B006
    """Write the adapter of the full model, a plain PEFT directory."""
    with _pipeline(recipe, set_, verbose) as pipeline:
        _show_recovery(pipeline.recover(), pipeline)


@app.command()
def verify(recipe: RecipeFile, set_: Overrides = [], forward: Forward = None, verbose: Verbose = False) -> None:  # noqa: B006
    """Prove that the recovered adapter does to the full model what the trained one does to the pruned model."""
    with _pipeline(recipe, set_, verbose) as pipeline:
        _show_verification(pipeline.verify(forward=forward))


@app.command()
def evaluate(
    recipe: RecipeFile, set_: Overrides = [], with_lora: WithLora = False, as_json: AsJson = False,  # noqa: B006
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Evaluation loss of the full and the pruned model, without and with the adapter."""
    with _pipeline(recipe, set_, verbose, splits=("eval",), quiet=as_json) as pipeline:
        _show_evaluation(pipeline.evaluate(with_lora=with_lora), as_json=as_json)


@app.command()
def run(
    recipe: RecipeFile, set_: Overrides = [], with_lora: WithLora = False, forward: Forward = None,  # noqa: B006
    fresh: Fresh = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """All stages in order; what is done already is not repeated."""
    with _pipeline(recipe, set_, verbose, splits=("train", "eval"), fresh=fresh) as pipeline:
        _show_plan(pipeline.prune())
        pipeline.align()
        _show_training(pipeline.train(fresh=fresh))
        recovered = pipeline.recover()
        _show_verification(pipeline.verify(forward=forward))
        if pipeline.recipe.data.eval is not None:
            _show_evaluation(pipeline.evaluate(with_lora=with_lora), as_json=False)
        _show_recovery(recovered, pipeline)


@contextmanager
def _pipeline(
    path: Path,
    overrides: list[str],
    verbose: bool,
    *,
    splits: tuple[Split, ...] = (),
    quiet: bool = False,
    fresh: bool = False,
) -> Iterator[Pipeline]:
    from raymem.recipe.load import load_recipe
    from raymem.training.data.sources.early import check_files_are_here

    console.log_to_stderr(verbose)
    recipe = load_recipe(path, overrides)  # before the slow imports: a typo is answered at once
    check_files_are_here(recipe, splits)

    with goes_on("the same command goes on where it was"):
        from raymem.runs.loram.pipeline import Pipeline

        with console.TrainingDisplay() as display:
            listeners = [] if quiet else [display.show]
            status = (lambda text: None) if quiet else display.status
            yield Pipeline(recipe, status=status, listeners=listeners, begin=display.begin, fresh=fresh, source=path)


def _show_plan(pruned: PrunedBase) -> None:
    plan, say = pruned.plan, console.out.print
    full, small = plan.full, plan.pruned
    if not plan.saves_memory:
        say(f"{plan.options.structure}: zeros in dense weights, which save no memory (a research mode)")
    say(f"parameters: {full.parameters:,} -> {plan.theoretical_parameters:,}, {plan.paper_reduction:.2f}x fewer")
    say(f"bf16: {bytes_text(full.bf16_bytes)} -> {bytes_text(small.bf16_bytes)}, {plan.bf16_reduction:.2f}x")
    say(
        f"with quantize: nf4: {bytes_text(small.nf4_bytes)} stored, {plan.nf4_reduction:.2f}x; "
        f"{plan.paper_nf4_reduction:.2f}x by the paper's count (every parameter in 4 bits, scales free)"
    )
    say(f"pruned model: {pruned.location}")


def _show_training(outcome: dict[str, Any]) -> None:
    say = console.out.print
    if outcome["eval_loss"] is not None:
        say(f"evaluation on the pruned model: loss {outcome['eval_loss']:.4f}")
    if outcome["peak_bytes"] is not None:
        say(f"peak memory of a worker: {bytes_text(outcome['peak_bytes'])}")
    say(f"adapter of the pruned model: {outcome['artifact']}")


def _show_recovery(location: str, pipeline: Pipeline) -> None:
    say = console.out.print
    say(f"adapter of the full model: {location}", markup=False)
    say(f"serve it: raymem export {shlex.quote(location)} --for vllm", markup=False)
    say(f"next: {generate.command(location, pipeline.suggestion(), pipeline.recipe.scaling)}", markup=False)


def _show_verification(checked: Any) -> None:
    parts = [f"{checked.num_factors} tensors of the adapter are exact"]
    if checked.num_weights is None:
        parts.append("weights were trained on, so they are not the full model's")
    else:
        parts.append(f"{checked.num_weights} weights are the full model's")
    if checked.logit_difference is None:
        parts.append("the models were not run (--forward does)")
    else:
        parts.append(f"logits differ by {checked.logit_difference:.1e} of the largest")
    console.out.print(f"verified: {'; '.join(parts)}")


def _show_evaluation(rows: dict[str, dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows))
        return
    console.out.print(evaluation_text(rows), markup=False)


def evaluation_text(rows: dict[str, dict[str, Any]]) -> str:
    """Return the comparison as a table, with what each adapter gains on the full model, and LoRAM's share of that."""
    lines = [f"{'':18}{'eval loss':>11}{'perplexity':>12}{'gain':>10}"]
    gains: dict[str, float] = {}
    for name, row in rows.items():
        gain = ""
        if name in ("full + recovered", "full + lora"):
            gains[name] = rows["full"]["loss"] - row["loss"]
            gain = f"{gains[name]:.4f}"
        lines.append(f"{name:18}{row['loss']:>11.4f}{math.exp(min(row['loss'], 700.0)):>12.2f}{gain:>10}".rstrip())
    for metric in rows["full"].get("scores", ()):
        lines.append(f"{metric}: " + ", ".join(f"{name} {row['scores'][metric]:.4f}" for name, row in rows.items()))
    if "full + lora" not in gains:
        lines.append("(--with-lora also trains the adapter on the full model, and says how much of its gain is kept)")
    elif gains["full + lora"] > 0:
        kept = gains["full + recovered"] / gains["full + lora"]
        lines.append(f"LoRAM keeps {kept:.0%} of what the adapter gains when it is trained on the full model")
    else:
        lines.append("the adapter gains nothing on the full model either: there is no share to keep")
    return "\n".join(lines)
