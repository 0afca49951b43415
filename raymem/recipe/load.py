"""Reading a recipe: YAML file + ``--set`` overrides -> :class:`Recipe`, or one :class:`RecipeError`."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raymem.errors import RecipeError
from raymem.recipe import compat
from raymem.recipe.axes import AXES, BASES
from raymem.recipe.axis_field import adapter_of
from raymem.recipe.data import Source
from raymem.recipe.paths import absolute, is_local
from raymem.recipe.schema import Recipe
from raymem.recipe.sentences import nearest, problems
from raymem.recipe.yaml_text import MAX_CHARACTERS, MAX_DEPTH, YamlTextError, parse
from raymem.storage.uris import CURE, secret_in
from raymem.text import MESSAGE, cut, joined, shown

DEMO_PREFIX = "demo"
MODELS = {"demo": "pretrain", "demo-long": "pretrain-long"}
"""Maps the name of a demo model in a recipe to the packaged recipe that pre-trains it."""
SMOLLM2 = "smollm2"
"""Names in a recipe a small model that talks, from the Hugging Face hub or else from the package index."""
SMOLLM2_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, resolve: bool = True) -> Recipe:
    """Read, override, validate and resolve a recipe file.

    Args:
        path: YAML file.
        overrides: ``a.b=value`` strings, the value in YAML syntax.
        resolve: make relative paths absolute; else they stay as they are written.

    Raises:
        RecipeError: missing or malformed file, unknown key, bad value, or parts that do not go together.
    """
    path = Path(path)
    return recipe_of({"name": path.stem, **read_yaml(path)}, overrides, where=str(path), resolve=resolve)


def recipe_of(
    raw: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "recipe", *, resolve: bool = True
) -> Recipe:
    """Make a recipe of a plain dict, as :func:`load_recipe` does of a file; the dict is left as it is.

    Raises:
        RecipeError: as there.
    """
    changed = copy.deepcopy(dict(raw))
    for override in overrides:
        _apply_override(changed, override)
    return parse_recipe(changed, where=where, base_dir=Path.cwd() if resolve else None)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file; it is not validated yet.

    Raises:
        RecipeError: missing file, not YAML, or no mapping.
    """
    try:
        with path.open("rb") as file:  # not the whole of an endless or very large one
            content = file.read(4 * MAX_CHARACTERS + 1)
        text = content.decode("utf-8") if len(content) <= 4 * MAX_CHARACTERS else " " * len(content)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file; `raymem init` writes one to start from") from None
    except (OSError, ValueError) as error:  # not UTF-8, or a NUL in the path
        raise RecipeError(f"{path}: cannot be read as text: {error}") from None
    try:
        raw = parse(text)
    except YamlTextError as error:
        line = f":{error.line}" if error.line else ""
        raise RecipeError(f"{path}{line}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a YAML mapping (model:, data:, train:, ...), got {type(raw).__name__}")
    return raw


def parse_recipe(raw: dict[str, Any], where: str = "recipe", base_dir: Path | None = None) -> Recipe:
    """Validate a plain dict; with ``base_dir`` relative paths are made absolute, since workers have another directory.

    Raises:
        RecipeError: one line per problem, each naming the YAML path, the value, the rule and the nearest valid name.
    """
    recipe = validated(raw, where)
    try:
        if base_dir is not None:
            recipe = _absolute(recipe, base_dir)
        compat.check(recipe, where)
        return _with_alignment(recipe, where, base_dir)
    except RecipeError as error:  # names of any length may be in it
        raise RecipeError(cut(str(error), MESSAGE)) from None


def validated(raw: dict[str, Any], where: str) -> Recipe:
    """Validate the parts of a plain dict, but not whether they go together.

    Raises:
        RecipeError: as :func:`parse_recipe`.
    """
    refuse_secrets(raw, where)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(joined([f"{where}: {problem}" for problem in problems(error, Recipe)])) from None


def refuse_secrets(raw: Any, where: str, path: str = "") -> None:
    """Go through a plain dict before anything of it is shown or stored.

    Raises:
        RecipeError: an address in it holds a password, user or token, which is not repeated.
    """
    if isinstance(raw, str) and (found := secret_in(raw)):
        raise RecipeError(f"{where}: {path}: {found} would be stored with every checkpoint and run; {CURE}")
    if isinstance(raw, Mapping):
        for key, value in raw.items():
            if isinstance(key, str):
                refuse_secrets(key, where, f"a key in {path or 'it'}")
            refuse_secrets(value, where, cut(f"{path}.{key}" if path else str(key), 200))
    elif isinstance(raw, list | tuple):
        for index, value in enumerate(raw):
            refuse_secrets(value, where, f"{path}[{index}]")


def alignment(recipe: Recipe, **changes: Any) -> Recipe | None:
    """Return the recipe that trains the pruned model before its adapter; None if ``base.align`` does not ask for it.

    Args:
        changes: what the caller knows better, such as ``model`` and ``storage``.

    Raises:
        RecipeError: its sections are no recipe.
    """
    sections = BASES.of(recipe).alignment(recipe.base)
    if sections is None:
        return None
    plain = {"base": "full", "adapter": {"kind": "none", "freeze": ["lm_head"]}, "tracking": "none"}
    return parse_recipe({**recipe.to_dict(), **plain, **sections, **changes}, "base.align")


def _with_alignment(recipe: Recipe, where: str, base_dir: Path | None) -> Recipe:
    """Return the recipe with ``base.align`` validated and completed, and its paths made absolute."""
    kind = BASES.of(recipe)
    sections = kind.alignment(recipe.base)
    if sections is None:
        return recipe
    if odd := sorted(set(sections) - set(ALIGNED)):
        raise RecipeError(f"{where}: base.align.{odd[0]}: not a section of it; known here: {', '.join(ALIGNED)}")
    aligned = alignment(recipe)
    assert aligned is not None
    values = (_absolute(aligned, base_dir) if base_dir else aligned).to_dict()
    base = kind.with_alignment(recipe.base, {name: values[name] for name in sections})
    return recipe.model_copy(update={"base": base})


ALIGNED = ("data", "activations", "loss", "optimizer", "train", "scaling", "seed", "tracking")
"""The sections that ``base.align`` may hold."""


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file as a person writes it: with the shorthands, and the name optional."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    for name, axis in AXES.items():
        title = name.capitalize()
        refs = []
        for kind in axis.kinds():
            section = adapter_of(kind.options).json_schema(ref_template="#/$defs/{model}")
            definitions |= section.pop("$defs", {})
            if kind.name != axis.default:  # options without a kind are the default kind's
                section.setdefault("required", []).append("kind")
            key = kind.options.__name__
            if key in definitions:  # others may call their class as raymem calls one of its own
                key = f"{title}-{kind.name}"
            definitions[key] = section
            refs.append({"$ref": f"#/$defs/{key}"})
        one: dict[str, Any] = {"anyOf": [*refs, {"enum": [kind.name for kind in axis.kinds()]}]}
        definitions[title] = one
        if axis.several is not None:
            definitions[title] = {"anyOf": [*one["anyOf"], {"type": "array", "items": one, "minItems": 1}]}
        described = schema["properties"][name].get("description", "")
        default = {"kind": axis.initial}
        schema["properties"][name] = {"$ref": f"#/$defs/{title}", "default": default, "description": described}
    for split in ("train", "eval"):
        sources = definitions["DataSection"]["properties"][split]
        one = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Source"}]}
        some = {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}
        no_source = {"not": {"enum": sorted(Source.model_fields)}}
        mapping = {"type": "object", "propertyNames": no_source, "additionalProperties": some, "minProperties": 1}
        definitions["DataSection"]["properties"][split] = {
            "description": sources.get("description", ""),
            "anyOf": [*some["anyOf"], *([mapping, {"type": "null"}] if split == "eval" else ())],
        }
    schema["required"].remove("name")
    return schema


def packaged_recipe(name: str) -> Path:
    """Return the file of a recipe that ships with raymem, for example ``quickstart``.

    Raises:
        RecipeError: no such recipe.
    """
    installed = Path(str(resources.files("raymem"))) / "recipes"
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "jobs" / "recipes"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in folder.glob("*.yaml"))
        raise RecipeError(f"no recipe named {name!r} ships with raymem{nearest(name, names)}")
    return path


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if found := secret_in(override):
        name = "" if secret_in(key) else f" {cut(key)}"
        raise RecipeError(f"--set{name}: {found} would be stored with every checkpoint and run; {CURE}")
    if not separator or not key:
        raise RecipeError(f"--set {cut(override)}: write it as path=value, for example --set train.steps=100")
    try:
        value = parse(text)
    except YamlTextError as error:
        raise RecipeError(f"--set {cut(override)}: the value is not valid YAML: {error}") from None
    *parents, last = key.split(".")
    if len(parents) > MAX_DEPTH:
        raise RecipeError(f"--set {cut(key)}: names {len(parents)} sections; a recipe has at most {MAX_DEPTH}")
    node: Any = raw
    for depth, part in enumerate(parents):
        child = _child(node, part, override)
        if child is None:
            child = {}
            _assign(node, part, child)
        elif isinstance(child, str) and (depth == 0 or (depth == 1 and isinstance(node, list))):
            child = {"kind": child}  # `adapter: lora` and `--set adapter.rank=8` belong together
            _assign(node, part, child)
        node = child
    _child(node, last, override)
    _assign(node, last, value)


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, dict):
        return node.get(part)
    if isinstance(node, list) and re.fullmatch("[0-9]{1,9}", part) and int(part) < len(node):
        return node[int(part)]
    raise RecipeError(
        f"--set {cut(override)}: {shown(part)} cannot be looked up in {type(node).__name__} {shown(node)}"
    )


def _assign(node: Any, part: str, value: Any) -> None:
    node[int(part) if isinstance(node, list) else part] = value


def _absolute(recipe: Recipe, base_dir: Path) -> Recipe:
    """Make every local path absolute; ids of the Hugging Face hub and URIs stay as they are."""

    def local(value: str | None) -> str | None:
        if value is None or value.startswith(f"{DEMO_PREFIX}:") or not is_local(value, base_dir):
            return value
        return absolute(value, base_dir)

    def sources(items: Any) -> Any:
        return items and [{**item, "path": local(item["path"])} for item in items]

    raw = recipe.to_dict()
    raw["model"].update({key: local(raw["model"][key]) for key in ("name", "tokenizer")})
    raw["data"].update({key: sources(raw["data"][key]) for key in ("train", "eval")})

    def axis_paths(axis: Any, options: dict[str, Any]) -> None:
        kind = axis[options["kind"]]
        options |= {key: absolute(options[key], base_dir) for key in kind.paths if options.get(key)}
        options |= {key: local(options[key]) for key in kind.paths_or_ids if options.get(key)}
        for inner in (inner for key in kind.nested for inner in options[key]):
            axis_paths(axis, inner)

    for name, axis in AXES.items():
        axis_paths(axis, raw[name])
    raw["storage"]["path"] = absolute(raw["storage"]["path"], base_dir)
    return Recipe.model_validate(raw)
