"""``raymem generate``: one answer, or the continuation of a text, by what a run left."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from raymem.cli import console
from raymem.cli.threads import spin_on_quiet_cores
from raymem.text import printable

if TYPE_CHECKING:
    from raymem.recipe.schema import ScalingSection
    from raymem.runs.suggest import Suggestion

_WHOLE, _LINES = 120, 3
"""Characters and lines up to which a suggested prompt is the whole one."""
_SYSTEM = 80

Artifact = Annotated[
    str, typer.Argument(metavar="DIR", help="Adapter or model directory, a URI of one, or a Hugging Face id.")
]
System = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--system", help="System text that the conversation begins with.", show_default=False),
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")]
Seed = Annotated[int, typer.Option(min=0, help="Decides what is drawn where the temperature is above 0.")]


def generate(
    artifact: Artifact,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Question, or text to continue; - reads standard input.")
    ],
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    system: System = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where the answer is cut.")] = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1,
            show_default=False,
            help="FSDP2 workers on Ray that share the model; by default none, or as many as hold what one GPU cannot.",
        ),
    ] = None,
) -> None:
    """Answer a prompt with what a run left: in the chat template, or as a plain text where there is none."""
    console.log_to_stderr(False)
    if workers in (None, 1):
        spin_on_quiet_cores()
    from raymem.runs.inference.generate import generate as answer

    text = sys.stdin.read() if prompt == "-" else prompt
    found = answer(
        artifact, text, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, raw=raw, system=system,
        workers=workers, status=console.note,
    )  # fmt: skip
    if found.text.strip():
        typer.echo(printable(found.text))
        return
    cure = "give another prompt" if raw else "give another prompt, or try --raw"
    why = "the model ends its turn at once" if found.is_whole else f"nothing to see in {max_new_tokens} tokens"
    console.err.print(f"the answer is empty ({why}); {cure}", markup=False)


def command(artifact: str, suggestion: Suggestion | None, scaling: ScalingSection | None = None) -> str:
    """Return the command line, for a shell, that tries an artefact with a prompt; of a long one with its beginning.

    Args:
        scaling: of the run, whose workers may have shared the model.
    """
    words = ["raymem", "generate", artifact]
    if scaling is not None and scaling.shares_model:
        words += ["--workers", str(max(2, scaling.least_workers))]
    if suggestion is None:
        return shlex.join([*words, "--prompt", "Hello"])
    if suggestion.system is not None and len(suggestion.system) <= _SYSTEM and suggestion.system.isprintable():
        words += ["--system", suggestion.system]
    return shlex.join([*words, *(["--raw"] if suggestion.raw else []), "--prompt", _shortened(suggestion.prompt)])


def _shortened(prompt: str) -> str:
    """Return a prompt as it is, where it is short; else its first words. A shell gets no control characters of it."""
    lines = prompt.rstrip("\n").split("\n")
    if len(prompt) <= _WHOLE and len(lines) <= _LINES and all(map(str.isprintable, lines)):
        return prompt
    words = "".join(c if c.isprintable() else " " for c in prompt[: 4 * _WHOLE]).split()
    shown = words[0][:_WHOLE] if words else "Hello"
    for word in words[1:]:
        if len(shown) + len(word) >= _WHOLE:
            break
        shown += f" {word}"
    return shown


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(generate)
