"""Guesses what the columns of a data set are, where they are not called as a format wants them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_PROMPTS = ("prompt", "question", "query", "problem", "instruction", "user", "input")
_ANSWERS = ("completion", "answer", "response", "output", "solution", "assistant", "target", "reply")
_INSTRUCTIONS = ("instruction", "instructions", "task")
_INPUTS = ("input", "context")
_TEXTS = ("text", "content", "body", "document", "article", "passage", "code", "story")


def guess(row: dict[str, Any]) -> tuple[str, dict[str, str]] | None:
    """Return a format and the ``columns`` that fit a row to it; None where no name says what it is.

    Turns come first, then an instruction with its input, a prompt and its answer, and a text.
    """
    for name, value in row.items():
        turn = value[0] if isinstance(value, list) and value else None
        if isinstance(turn, dict) and "role" in turn:
            return "messages", _renamed({"messages": name})
        if isinstance(turn, dict) and "from" in turn:
            return "sharegpt", _renamed({"conversations": name})
    texts = {name.lower(): name for name, value in row.items() if isinstance(value, str)}
    answer = _first(_ANSWERS, texts)
    instruction, extra = _first(_INSTRUCTIONS, texts), _first(_INPUTS, texts)
    if answer and instruction and extra:
        return "alpaca", _renamed({"instruction": instruction, "input": extra, "output": answer})
    prompt = _first(_PROMPTS, {name: own for name, own in texts.items() if own != answer})
    if answer and prompt:
        return "prompt_completion", _renamed({"prompt": prompt, "completion": answer})
    text = _first(_TEXTS, texts) or (next(iter(texts.values())) if len(texts) == len(row) == 1 else None)
    return ("text", _renamed({"text": text})) if text else None


def _first(names: Iterable[str], texts: dict[str, str]) -> str | None:
    return next((texts[name] for name in names if name in texts), None)


def _renamed(columns: dict[str, str]) -> dict[str, str]:
    return {ours: theirs for ours, theirs in columns.items() if ours != theirs}
