"""Writes the model card of a result: what was trained on what, how it went, and how it is used.

It is made from the facts that lie beside it, so that the same run gives the same card. Of paths and addresses it shows
the last part only: a card is made to be shared.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
import shlex
from pathlib import Path
from typing import Any

from raymem.errors import ModelError
from raymem.memory.budget import bytes_text
from raymem.recipe.axes import ACTIVATIONS, ADAPTERS, BASES, MEMORY_AXES, OPTIMIZERS
from raymem.recipe.schema import Recipe
from raymem.recipe.yaml_text import write
from raymem.storage.json_files import read_object
from raymem.text import cut, printable
from raymem.training.artifacts.facts import FACTS
from raymem.training.artifacts.vllm import lint_vllm
from raymem.training.data.sources.opened import is_hub
from raymem.training.model.revision import on_hub

CARD = "README.md"
_PRIVATE = ("storage", "export", "tracking", "scaling", "budget", "space", "name")
"""Sections of a recipe that say nothing about the result."""
_PATH = re.compile(r"(?:/|~|\.{1,2}/|[A-Za-z][\w+.-]*://)")
_PUBLIC = "hf://"
_VERSIONS = ("raymem", "torch", "transformers", "peft")


def write_card(directory: Path) -> None:
    """Write ``README.md`` into a whole directory with ``raymem.json``; of a directory without a recipe nothing is said.

    Raises:
        ModelError: ``raymem.json`` cannot be read.
        OSError: the card cannot be written.
    """
    facts = read_object(directory / FACTS, ModelError, "take a whole copy of the directory")
    if "recipe" not in facts:
        return
    from huggingface_hub import ModelCard, ModelCardData

    recipe = Recipe.model_validate(facts["recipe"])
    is_adapter = (directory / "adapter_config.json").is_file()
    is_of_model = not is_adapter or BASES.of(recipe).is_of_model(str(directory))
    hub = recipe.model.name if on_hub(recipe.model) and is_of_model else None
    kind = recipe.adapter.kind
    relation = "adapter" if is_adapter else "finetune"
    data = ModelCardData(
        base_model=hub,
        library_name="peft" if is_adapter else "transformers",
        license="unknown",
        pipeline_tag="text-generation",
        datasets=sorted({source.path for source in recipe.data.train if is_hub(source)}) or None,
        tags=[
            *([f"base_model:{relation}:{hub}"] if hub else []),
            *([kind] if recipe.trains_adapter else []),
            *_unusual(recipe),
            "transformers",
            "raymem",
        ],
    )
    text = "\n".join(_body(directory, facts, recipe, is_adapter, is_of_model))
    (directory / CARD).write_text(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")), encoding="utf-8")


def _unusual(recipe: Recipe) -> list[str]:
    """Return the kinds of the other axes that are not the ones that a recipe has without naming them."""
    axes = ((BASES, recipe.base), (ACTIVATIONS, recipe.activations), (OPTIMIZERS, recipe.optimizer))
    return [options.kind for registry, options in axes if options.kind != registry.initial_options().kind]


def _body(directory: Path, facts: dict[str, Any], recipe: Recipe, is_adapter: bool, is_of_model: bool) -> list[str]:
    shared = _shared(recipe, directory)
    name = "random weights" if recipe.model.name is None else public(recipe.model.name)
    of = code(name) if is_of_model else f"a pruned {code(name)}"
    what = f"An adapter of {of}" if is_adapter else f"A model trained from {of}"
    merged = ", with its adapter folded in" if "merged_from" in facts else ""
    recovered = ", recovered from one of a pruned model" if is_adapter and "loram" in facts else ""
    return [
        f"# {recipe.name}",
        "",
        f"{what}{recovered}{merged}; trained with raymem.",
        "",
        *_table(_facts(facts, shared, recipe, name)),
        "",
        "## Use",
        "",
        *_usage(directory, recipe, is_adapter, is_of_model),
        "## Recipe",
        "",
        "```yaml",
        write(shared, allow_unicode=True).rstrip(),
        "```",
        "",
        "Versions: " + ", ".join(f"{package} {importlib.metadata.version(package)}" for package in _VERSIONS) + ".",
    ]


def _facts(facts: dict[str, Any], shared: dict[str, Any], recipe: Recipe, base: str) -> list[tuple[str, str]]:
    revision = f" at revision {code(recipe.model.revision)}" if recipe.model.revision else ""
    rows = [("base model", code(base) + revision)]
    for axis in MEMORY_AXES:
        options = {key: value for key, value in shared[axis].items() if key != "kind" and _is_plain(value)}
        kind, shown = shared[axis]["kind"], ", ".join(f"{key} {value}" for key, value in options.items())
        rows.append((axis, code(kind) + (f" ({cell(shown)})" if shown else "")))
    sources = [("training data", recipe.data.train), ("evaluation data", recipe.data.eval or [])]
    rows += [(what, ", ".join(code(public(one.path)) for one in given)) for what, given in sources if given]
    rows.append(("rows", f"{recipe.data.sequence_length} tokens, {recipe.train.global_batch} in a batch"))
    rows.append(("steps", str(facts.get("step", "unknown"))))
    of = " of the pruned model" if BASES.of(recipe).replaces_model else ""
    if (loss := facts.get("loss")) is not None:
        rows.append((f"training loss{of}", f"{loss:.4f}"))
    if (loss := facts.get("eval_loss")) is not None:
        rows.append((f"evaluation loss{of}", f"{loss:.4f} (perplexity {math.exp(min(loss, 700.0)):.2f})"))
    if (peak := facts.get("peak_bytes")) is not None:
        predicted = facts.get("predicted_peak_bytes")
        beside = "" if predicted is None else f" (predicted: {bytes_text(predicted)})"
        rows.append(("peak memory of a worker", bytes_text(peak) + beside))
    return rows


def _usage(directory: Path, recipe: Recipe, is_adapter: bool, is_of_model: bool) -> list[str]:
    lines = ["DIR is the directory of this file.", ""]
    kind = ADAPTERS.of(recipe) if is_adapter else next(kind for kind in ADAPTERS.kinds() if kind.trains_base)
    program = kind.usage
    lines += ["```python", program or RAYMEM_USAGE, "```", ""]
    lines += [
        "```bash",
        "raymem generate DIR --prompt 'What can you do?'",
        *_serving(directory, recipe.name, is_adapter),
        "```",
        "",
    ]
    if not is_of_model:
        lines += ["It goes with the pruned model; `raymem loram recover` writes the adapter of the full one.", ""]
    return lines


RAYMEM_USAGE = """\
import raymem

model, tokenizer = raymem.load("DIR")"""


def _serving(directory: Path, name: str, is_adapter: bool) -> list[str]:
    """Return the command that serves it with vLLM, if that takes it."""
    if not is_adapter:
        return ["vllm serve DIR"]
    try:
        linted = lint_vllm(directory, served_as="DIR")
    except ModelError:  # a format of its own
        return []
    words = [public(word) if word.startswith("/") else word for word in shlex.split(linted.command)]
    return [] if linted.problems else [shlex.join([*words[:-1], f"{name}=DIR"])]


def public(value: Any) -> str:
    """Return a value as text; of a path or an address its last part, without options."""
    text = printable(str(value)).replace("\n", " ")
    if _PATH.match(text) and not text.startswith(_PUBLIC):
        text = text.partition("?")[0].rstrip("/").rpartition("/")[2]
    return cut(text, 200)


def _shared(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Return what of a recipe decides its result, without empty values, and of paths the last part."""

    def shared(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shared(one) for key, one in value.items() if one not in (None, {})}
        if isinstance(value, list):
            return [shared(one) for one in value]
        return public(value) if isinstance(value, str) else value

    sections = {key: value for key, value in recipe.to_dict().items() if key not in _PRIVATE}
    sections["base"] = BASES.of(recipe).described(recipe.base, directory)
    whole: dict[str, Any] = shared(sections)
    return whole


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def code(text: str) -> str:
    """Return a text as code in a cell of a table of Markdown."""
    return f"`{cell(text).replace('`', chr(39))}`"


def cell(text: str) -> str:
    """Return a text that does not end a cell of a table of Markdown."""
    return text.replace("|", "\\|")


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
