"""``raymem init``: a recipe for one's own model and data, or one of those that ship with raymem."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from raymem.cli import console
from raymem.errors import RecipeError

Text = Optional[str]  # noqa: UP045 - typer reads it


def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("recipe.yaml"),
    model: Annotated[Text, typer.Option("--model", "-m", help="Hugging Face id or local directory.")] = None,
    data: Annotated[Text, typer.Option("--data", "-d", help="File, directory or Hugging Face id to train on.")] = None,
    eval_: Annotated[Text, typer.Option("--eval", help="The same to evaluate on; by default a file beside.")] = None,
    method: Annotated[Text, typer.Option(help="lora (default), full, moram, ...; a wrong name lists all.")] = None,
    gpu: Annotated[Text, typer.Option(help="Kind of GPU that it is for, e.g. H100-80GB.")] = None,
    budget: Annotated[Text, typer.Option(help="Memory of one worker's device, e.g. 24GiB.")] = None,
    epochs: Annotated[Optional[float], typer.Option(min=0.01, help="Passes over the data.")] = None,  # noqa: UP045
    template: Annotated[Text, typer.Option("--from", help="Copy a recipe that ships with raymem instead.")] = None,
) -> None:
    """Write a commented recipe that fits a model, its data and the memory that there is.

    On a terminal it asks for what is not given. `raymem init my.yaml --from quickstart` copies a packaged recipe.
    """
    console.log_to_stderr(False)
    if path.exists():
        raise RecipeError(f"{path} already exists; choose another name or remove it")
    if not path.parent.is_dir():
        raise RecipeError(f"{path}: there is no directory {path.parent}; make it, or choose another one")
    if template is not None:
        _copy(template, path, [model, data, eval_, method, gpu, budget, epochs])
        return
    may_ask = sys.stdin.isatty() and sys.stdout.isatty()
    if not may_ask and (model is None or data is None):
        missing = " and ".join(flag for flag, value in (("--model", model), ("--data", data)) if value is None)
        raise RecipeError(
            f"raymem init: {missing}: not given, and this is no terminal to ask on; give it (and --gpu or --budget, "
            "--method, --eval if need be), or copy a recipe with --from quickstart"
        )
    asks_memory = may_ask and gpu is budget is None and (model is None or data is None)
    asks_method = may_ask and method is None and (model is None or data is None)
    model = model or typer.prompt("model (Hugging Face id or directory)")
    data = data or typer.prompt("training data (file, directory or Hugging Face id)")
    if asks_memory:
        gpu, budget = _memory(typer.prompt("GPU (4090, H100, ...) or memory (24GiB); empty: this machine", default=""))
    if asks_method:
        from raymem.recipe.axes import starts

        usual, *others = starts()
        method = typer.prompt(f"method ({', '.join([usual, *others])})", default=usual)
    for flag, there in (("--data", data), ("--eval", eval_)):  # before the slow imports
        _check_is_here(flag, there)
    _write(path, model, data, eval_, method, gpu, budget, epochs)


def _check_is_here(flag: str, data: str | None) -> None:
    from raymem.recipe.data import Source
    from raymem.recipe.paths import is_local
    from raymem.training.data.sources.opened import files_of

    if data is not None and is_local(data):
        files_of(Source(path=data), flag, Path())


def _write(
    path: Path, model: str, data: str, eval_: str | None, method: str | None, gpu: str | None, budget: str | None,
    epochs: float | None,
) -> None:  # fmt: skip
    from raymem.runs.init import Wishes, new_recipe
    from raymem.runs.init.choose import next_commands

    def status(text: str) -> None:
        console.err.print(f"{text} ...", markup=False)

    wishes = Wishes(model, data, eval_, method, gpu, budget, epochs)
    made = new_recipe(wishes, path.stem, status)
    _save(path, made.text)
    console.out.print(f"wrote {path}: {made.summary}", markup=False)
    console.out.print(f"next: {'   then   '.join(next_commands(made.recipe, path))}", markup=False)


def _copy(name: str, path: Path, others: list[object]) -> None:
    from raymem.recipe.load import packaged_recipe

    source = packaged_recipe(name)
    if any(value is not None for value in others):
        raise RecipeError("--from copies a recipe as it is; leave the other options out, or leave --from out")
    _save(path, source.read_text())
    console.out.print(f"wrote {path}\nnext: edit model and data, then  raymem train {path}", markup=False)


def _save(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written: {error.strerror}") from None


def _memory(answer: str) -> tuple[str | None, str | None]:
    """Return the GPU and the budget that an answer means."""
    from raymem.memory.budget import parse_bytes

    answer = answer.strip()
    if not answer:
        return None, None
    try:
        parse_bytes(answer)
    except ValueError:
        return answer, None
    return (answer, None) if answer.isdigit() else (None, answer)  # 4090 is no number of bytes


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(init)
