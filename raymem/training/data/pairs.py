"""Decides whether prompts and their answers, where a source gives them as texts, become turns of a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from raymem.errors import DataError, ModelError
from raymem.recipe.data import Source, template_problem
from raymem.training.data.formats import Format, has_turns, in_our_names
from raymem.training.data.rows.tables import Row

Rendering = Literal["auto", "chat", "none"]
USUAL: dict[Format, Rendering] = {
    "messages": "chat",
    "sharegpt": "chat",
    "prompt_completion": "none",
    "alpaca": "chat",
    "text": "none",
    "tokens": "none",
}
"""How each format was read before a source could say it, which names its prepared data as they were named then."""
GLUED = (
    "in {count} examples nothing stands between the end of the prompt and the first word of the completion, as in "
    "'...does she make?She makes...': begin the completions with a space or a line break, or take a tokenizer with a "
    "chat template"
)


def resolve_template(source: Source, row_format: Format, first_row: Row, tokenizer: Any, where: str) -> Rendering:
    """Return how the texts of a source are rendered; ``auto`` only where every prompt decides for itself.

    Raises:
        DataError: ``template`` means nothing for the format.
        ModelError: ``template: chat`` and a tokenizer without one.
    """
    if problem := template_problem(source.template, row_format):
        raise DataError(f"{where}.{problem}.")
    has_template = tokenizer.chat_template is not None
    if source.template == "chat" and not has_template:
        raise ModelError(
            f"{where}.template: chat, but tokenizer {tokenizer.origin} has no chat template: set model.tokenizer to "
            f"one that has (for example that of the model's instruct version), or use template: none."
        )
    if row_format == "alpaca":
        return source.template if source.template != "auto" else "chat" if has_template else "none"
    if row_format != "prompt_completion" or source.template != "auto":
        return USUAL[row_format] if source.template == "auto" else source.template
    return "auto" if has_template and not has_turns(in_our_names(first_row, source.columns)) else "none"


def described(row_format: Format | str, template: Rendering, facts: Mapping[str, Any]) -> str:
    """Return the format of a source and what becomes of it, for people.

    Args:
        facts: of its manifest.
    """
    rendered, as_they_are = facts.get("rendered", 0), facts.get("taken_as_it_is", 0)
    if row_format in ("text", "tokens"):
        return f"format {row_format}"
    if rendered and as_they_are:
        how = f"chat (the tokenizer's) for {rendered:,} examples, none for {as_they_are:,} that hold its marks already"
    elif rendered or (template == "chat" and not as_they_are):
        how = "chat (the tokenizer's)"
    else:
        how = "none (the texts as they are)"
    return f"format {row_format}, template: {how}"
