"""``raymem chat``: a conversation with what a run left, in the terminal or from a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from raymem.cli import console
from raymem.cli.results.generate import Artifact, Seed, System, Temperature
from raymem.cli.threads import spin_on_quiet_cores
from raymem.errors import RaymemError
from raymem.text import printable

if TYPE_CHECKING:
    from raymem.training.artifacts.chat import Conversation

_HELP = """\
/system TEXT   set the system text (without TEXT: take it back); what was said so far stays
/reset         forget what was said so far
/help          show this
/exit          leave; so does Ctrl-D, and Ctrl-C twice. Ctrl-C ends an answer that is being written
A line that begins with a space is never a command."""


def chat(
    artifact: Artifact,
    system: System = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut.")] = 512,
    temperature: Temperature = 0.7,
    seed: Seed = 0,
) -> None:
    """Talk to what a run left; answers appear as they are written. /help lists the commands inside.

    Standard input may be a pipe: each line is a turn, and only the answers go to standard output.
    """
    console.log_to_stderr(False)
    import torch

    spin_on_quiet_cores()
    from raymem.runs.artifacts import local_or_downloaded
    from raymem.training.artifacts.chat import Conversation
    from raymem.training.artifacts.generate import Responder

    responder = Responder(local_or_downloaded(artifact))
    responder.require_template()
    conversation = Conversation(responder, system)
    torch.manual_seed(seed)
    if sys.stdin.isatty():
        _note(f"talking to {artifact}; /help lists commands, Ctrl-D leaves")
    for line in _lines():
        if line.startswith("/"):
            if not _obey(conversation, line):
                return
        elif line.strip():
            _answer(conversation, line.strip(), max_new_tokens, temperature)


def _lines() -> Iterator[str]:
    """Yield what is typed or piped; Ctrl-D ends it, and Ctrl-C twice with nothing between."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and earlier lines for input)
    interrupted = False
    while True:
        try:
            line = input("> ")
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo()
            if interrupted:
                return
            interrupted = True
            _note("Ctrl-C again, or /exit, leaves")
            continue
        interrupted = False
        yield line


def _obey(conversation: Conversation, line: str) -> bool:
    """Do what a command says; returns whether the conversation goes on."""
    name, _, text = line.partition(" ")
    if name == "/exit":
        return False
    if name == "/reset":
        conversation.turns = []
        _note("forgotten; " + ("the system text stays" if conversation.system else "the next turn is the first"))
    elif name == "/system":
        conversation.system = text.strip() or None
        _note("the system text is set" if conversation.system else "no system text of yours")
    elif name == "/help":
        _note(_HELP)
    else:
        _note(f"{name} is no command; these are:\n{_HELP}")
    return True


def _answer(conversation: Conversation, text: str, max_new_tokens: int, temperature: float) -> None:
    """Print the answer to a turn as it comes."""

    def show(piece: str) -> None:
        sys.stdout.write(printable(piece))
        sys.stdout.flush()

    try:
        answer, left_out = conversation.say(text, max_new_tokens=max_new_tokens, temperature=temperature, on_text=show)
    except RaymemError as error:
        _note(f"error: {error}")
        return
    typer.echo()
    if answer is None:
        _note("(ended by Ctrl-C)")
    elif not answer.text.strip():
        _note("(the model ended its turn at once: the answer is empty)")
    elif not answer.is_whole:
        _note(f"(cut after {max_new_tokens} tokens, or at the end of the context)")
    if left_out:
        _note(f"(the context is full: the first {left_out} turns were left out, and are forgotten)")


def _note(text: str) -> None:
    console.err.print(printable(text), markup=False, style="dim" if console.err.is_terminal else None)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(chat)
