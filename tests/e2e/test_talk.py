"""``raymem generate`` and ``raymem chat`` as a person or a script meets them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from raymem.cli.main import run_app
from raymem.cli.results import chat
from raymem.text import printable
from tests.helpers.speaking import save_speaker


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaker(tmp_path_factory.mktemp("models") / "speaker", "blue\x1b sky")


def test_generate_prints_the_answer_alone(speaker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app("generate", speaker, "-p", "What is one?", "--system", "two") == 0
    assert capsys.readouterr().out == "blue\\x1b sky\n"


def test_an_empty_answer_says_so(speaker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app("generate", speaker, "-p", "one", "--raw") == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "the answer is empty (the model ends its turn at once)" in shown.err


def test_chat_in_a_pipe(speaker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["one", "", "/system two", "three", "/reset", "/what", "/help", " /reset", "/exit", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert run_app("chat", speaker, "--temperature", "0") == 0
    shown = capsys.readouterr()
    assert shown.out == "blue\\x1b sky\n" * 3
    for words in ("the system text is set", "forgotten", "/what is no command", "/system TEXT"):
        assert words in shown.err


def test_chat_needs_a_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = save_speaker(tmp_path / "bare", " blue", template=None)
    assert run_app("chat", bare) == 1
    assert "has no chat template, so that its model cannot be talked to; continue texts with it: raymem generate " in (
        capsys.readouterr().err
    )


def test_a_turn_that_cannot_be_answered_does_not_end_the_conversation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = save_speaker(tmp_path / "m", " blue sky", context=48)
    monkeypatch.setattr("sys.stdin", io.StringIO("one two three " * 30 + "\n" + "one two\n" * 6))
    assert run_app("chat", small, "--temperature", "0") == 0
    shown = capsys.readouterr()
    assert shown.out == " blue sky\n" * 6
    assert "error: the prompt is" in shown.err
    assert "the context is full" in shown.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (["a", KeyboardInterrupt, "b", EOFError], ["a", "b"]),
        (["a", KeyboardInterrupt, KeyboardInterrupt, "b"], ["a"]),
    ],
)
def test_ctrl_c_twice_leaves(
    monkeypatch: pytest.MonkeyPatch, typed: list[str | type[BaseException]], read: list[str]
) -> None:
    waiting = iter(typed)

    def type_it(prompt: str) -> str:
        what = next(waiting)
        if isinstance(what, str):
            return what
        raise what

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", type_it)
    assert list(chat._lines()) == read


def test_a_terminal_obeys_nothing() -> None:
    assert printable("a\tb\nc \u00e9") == "a\tb\nc \u00e9"
    for odd in ("\x1b[2J", "\r", "\x00", "\x7f", "\x9b", "\u202e", "\ud800"):
        assert printable(odd).isascii() and "\\" in printable(odd)
