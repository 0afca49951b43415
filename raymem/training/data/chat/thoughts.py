"""Handles reasoning that precedes an answer, where the generation prompt has already opened or closed it.

Some templates end their generation prompt with an opening tag (``<think>``), some with an empty closed block, and write
a finished turn without. What the model is to say goes on behind the prompt: the reasoning, the closing tag, the answer.
"""

from __future__ import annotations

import re
from typing import Any

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a turn that hold its reasoning."""

_TAG = re.compile(r"([<\[]\|?)(/?)([^\s<>\[\]/|]+)(\|?[>\]])\s*\Z")
_LONGEST_TAG = 80
_BLOCK = re.compile(
    r"\s*[<\[]\|?(\w*think\w*|\w*reason\w*|thought)\|?[>\]](.*?)[<\[]\|?/\1\|?[>\]]", re.DOTALL | re.IGNORECASE
)


def _last_tag(prompt: str) -> re.Match[str] | None:
    return _TAG.search(prompt, max(len(prompt) - _LONGEST_TAG, 0))


def reasoning_of(message: dict[str, Any]) -> str:
    """Return the reasoning that a turn has in a key of its own, or ""."""
    return next((message[key] for key in REASONING if isinstance(message.get(key), str)), "")


def under_known_keys(message: dict[str, Any]) -> dict[str, Any]:
    """Return a turn with its reasoning under each key that templates read, as newer releases of transformers do.

    Older ones hand on the key that is there, so that a template that reads another one leaves the reasoning out.
    """
    reasoning = reasoning_of(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning} if reasoning else message


def written_thought(message: dict[str, Any]) -> str:
    """Return the reasoning in a block at the beginning of a turn's text, or ""."""
    content = message["content"]
    block = _BLOCK.match(content) if isinstance(content, str) else None
    return block[2].strip() if block else ""


def opens_thought(prompt: str, template: str) -> bool:
    """Say whether a generation prompt ends with an opening tag that a template knows how to close."""
    tag = _last_tag(prompt)
    return tag is not None and not tag[2] and f"{tag[1]}/{tag[3]}{tag[4]}" in template


def follow(prompt: str, turn: str, message: dict[str, Any], template: str) -> str | None:
    """Return the text behind ``prompt`` where the finished turn is rendered as ``turn``; None if that is unclear.

    Args:
        message: the turn.
        template: the template's source, in which a closing tag is looked for.
    """
    if turn.startswith(prompt):
        return turn[len(prompt) :]
    stem = prompt.rstrip()
    if turn.startswith(stem):  # they differ in white space only, and the prompt's is there
        return turn[len(stem) :].lstrip()
    tag = _last_tag(prompt)
    if tag is None:
        return None
    opening, closing = tag[1] + tag[3] + tag[4], f"{tag[1]}/{tag[3]}{tag[4]}"
    head = prompt[: tag.start()]
    content = message["content"] if isinstance(message["content"], str) else ""
    if tag[2]:  # the prompt has closed the block: only the answer is left to say
        head = head[: head.rfind(opening)] if opening in head[-len(opening) - 40 :] else head
        if not turn.startswith(head):
            return None
        return turn[len(head) :].rpartition(closing)[2].lstrip()
    if not turn.startswith(head) or not (closing in template or closing in content):
        return None
    answer = turn[len(head) :]
    if closing in answer:  # the template writes the block in its own way, perhaps without the opening
        thought = answer.lstrip()
        return thought.removeprefix(opening).removeprefix(prompt[len(stem) :]) if opening in thought else thought
    if closing in content and not reasoning_of(message):
        before, _, after = content.partition(closing)
        thought = before.partition(opening)[2] if opening in before else before
        gap = after[: len(after) - len(after.lstrip())]
        return f"{thought.removeprefix(prompt[len(stem) :])}{closing}{gap}{answer.lstrip()}"
    return f"{reasoning_of(message).strip()}\n{closing}\n\n{answer.lstrip()}"


def is_doubled(prompt: str, turn: str, message: dict[str, Any]) -> bool:
    """Say whether a turn whose text has its own block is rendered with a second one besides the open one."""
    tag, content, stem = _last_tag(prompt), message["content"], prompt.rstrip()
    if tag is None or tag[2] or not isinstance(content, str) or not turn.startswith(stem):
        return False
    opening, closing = tag[1] + tag[3] + tag[4], f"{tag[1]}/{tag[3]}{tag[4]}"
    return closing in content and (
        opening in turn[len(stem) :] or turn.count(closing, len(stem)) > content.count(closing)
    )


def split_off(prompt: str, message: dict[str, Any]) -> dict[str, Any]:
    """Move the thought at the beginning of a turn's text to ``reasoning_content``."""
    tag = _last_tag(prompt)
    assert tag is not None
    opening, closing = tag[1] + tag[3] + tag[4], f"{tag[1]}/{tag[3]}{tag[4]}"
    thought, _, answer = message["content"].lstrip().removeprefix(opening).partition(closing)
    return message | {"reasoning_content": thought.strip(), "content": answer.lstrip()}
