"""Write docs/recipe.md from the recipe's own classes and rules: ``python docs/make_reference.py``.

A test asserts that the committed page is what this prints.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from pydantic import TypeAdapter

from raymem.recipe import compat, data, space
from raymem.recipe import schema as r
from raymem.recipe.axes import AXES, MEMORY_AXES, TRACKERS
from raymem.recipe.base import kind_of

PAGE = Path(__file__).with_name("recipe.md")
HEAD = """# Recipe reference

Made by `python docs/make_reference.py` from `raymem/recipe/`; do not edit by hand.

A recipe is one YAML file. Unknown keys are errors. `--set path=value` overrides any key (`--set adapter.rank=8`). Where
a kind needs no options its bare name will do (`adapter: none`), and options without a kind belong to the default kind.
Relative paths count from where the command is started. A run is identified by `name` on `storage.path`: the same two
resume it. Worker count, micro-batch, schedule, length and reporting may change between sessions of a run; model, data,
seed, global batch, adapter, optimizer kind and precision may not.
"""
SECTIONS: dict[str, list[type]] = {
    "(top level)": [r.Recipe],
    "model": [r.ModelSection],
    "data": [data.DataSection],
    "data.train[], data.eval[]": [data.Source],
    "data.mix": [data.Mix],
    **{name: [kind.options for kind in axis.kinds()] for name, axis in MEMORY_AXES.items()},
    "train": [r.TrainSection],
    "scaling": [r.ScalingSection],
    "storage": [r.StorageSection],
    "export": [r.ExportSection],
    "tracking": [kind.options for kind in TRACKERS.kinds()],
    "space.<path>": [space.FloatDimension, space.IntDimension, space.ChoiceDimension],
}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, models in SECTIONS.items():
        parts.append(f"## {title}\n")
        for model in models:
            parts.append(_table(model))
    parts.append("## What goes with what\n")
    parts.append(compat.table())
    return "\n".join(parts).replace("``", "`")


def _table(model: type) -> str:
    schema = TypeAdapter(model).json_schema()
    properties, required = schema["properties"], set(schema.get("required", ()))
    kind = kind_of(model)
    text = f"`kind: {kind}`: {_sentence(model)}\n\n" if kind is not None else f"{_sentence(model)}\n\n"
    rows = []
    for name, facts in properties.items():
        if name == "kind":
            continue
        facts = _inherited(model, name) | facts
        default = "required" if name in required else f"`{json.dumps(facts.get('default', _made(model, name)))}`"
        if name in AXES and model is r.Recipe:
            facts, default = {**facts, "$ref": name}, "see below"
        if "$ref" in facts or (isinstance(facts.get("default"), dict) and facts["default"]):
            default = "see below" if name not in required else "required"
        rows.append(f"| `{name}` | {_type(facts)} | {default} | {facts.get('description', '')} |".replace("\n", " "))
    if not rows:
        return text
    return text + "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def _made(model: type, name: str) -> object:
    """Default of a dataclass field that is made anew each time, which pydantic's schema leaves out."""
    factory = getattr(model, "__dataclass_fields__", {}).get(name)
    return None if factory is None or factory.default_factory is dataclasses.MISSING else factory.default_factory()


def _inherited(model: type, name: str) -> dict[str, object]:
    """The description of a field that stands in the class that a dataclass extends; pydantic reads its own only."""
    for parent in model.__mro__[1:]:
        if dataclasses.is_dataclass(parent) and name in parent.__dataclass_fields__:
            facts = TypeAdapter(parent).json_schema()["properties"][name]
            if "description" in facts:
                return {"description": facts["description"]}
    return {}


def _sentence(model: type) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


def _type(facts: dict[str, object]) -> str:
    if "enum" in facts:
        return ", ".join(f"`{value}`" for value in facts["enum"])  # type: ignore[attr-defined]
    if "anyOf" in facts:
        return " or ".join(dict.fromkeys(_type(option) for option in facts["anyOf"]))  # type: ignore[attr-defined]
    if "$ref" in facts:
        return "section"
    limits = [
        f"{sign} {facts[key]}"
        for key, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
        if key in facts
    ]
    names = {"object": "mapping", "array": "list", "integer": "integer", "number": "number", "null": "null"}
    return " ".join([names.get(str(facts.get("type")), str(facts.get("type", "value"))), *limits])


if __name__ == "__main__":
    PAGE.write_text(page())
