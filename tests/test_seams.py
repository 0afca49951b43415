"""Seams of the house: kinds are known in their own rooms only, folders stay small, and imports go in no circle.

Each rule has a list of the files that still break it, with the reason. The lists only shrink: a file that breaks a rule
and is not listed fails, and so does an entry that is no longer needed.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import raymem
from raymem.recipe.axes import MEMORY_AXES

PACKAGE = Path(raymem.__file__).parent
ROOT = PACKAGE.parent
METHODS = sorted({place.split(".")[2] for axis in MEMORY_AXES.values() for place in axis.builtin.values()})
REGISTRY = "raymem/recipe/axes.py"
MOST_FILES = 14

Places = dict[str, list[str]]
"""File -> what in it breaks the rule, each with its line."""


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, packages by their ``__init__``."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def file_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def report(places: Places, rule: str) -> str:
    return "\n".join([rule, *(f"{name}:{line}" for name, lines in sorted(places.items()) for line in lines)])


def imported(node: ast.Import | ast.ImportFrom, module: str, *, is_package: bool) -> list[str]:
    """Dotted names that an import statement names; of ``from a import b`` it is ``a.b``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    package = module.split(".") if is_package else module.split(".")[:-1]
    base = package[: len(package) - node.level + 1] if node.level else []
    source = ".".join([*base, *([node.module] if node.module else [])])
    return [f"{source}.{alias.name}" for alias in node.names]


# ---- (a) a method is imported by its own room and by the registry


@cache
def kinds() -> dict[str, frozenset[str]]:
    """Class that stands for a kind of an axis -> the names that it goes by in a recipe."""
    classes: dict[str, frozenset[str]] = {}
    for path in modules().values():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                for field in node.body:
                    if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) == "kind":
                        classes[node.name] = frozenset(_strings(field))
    return {name: values for name, values in classes.items() if values}


def _strings(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def foreign_methods(source: ast.Module, module: str, *, is_package: bool = False) -> dict[str, list[str]]:
    """Method -> ``line: name`` of every import from its room by a module outside of it."""
    parts = module.split(".")
    own = parts[2] if parts[:2] == ["raymem", "methods"] and len(parts) > 2 else None
    names = defaultdict(list)
    for node in (n for n in ast.walk(source) if isinstance(n, ast.Import | ast.ImportFrom)):
        for name in imported(node, module, is_package=is_package):
            method = name.split(".")[2] if name.startswith("raymem.methods.") else None
            if method in METHODS and method != own:
                names[method].append(f"{node.lineno}: {name}")
    return dict(names)


METHOD_IMPORTS: dict[str, tuple[set[str], str]] = {
    "raymem/methods/loram/pruning/layerwise.py": ({"chunked_loss"}, "calibrates by the loss that training takes"),
    "raymem/methods/loram/recover_moram.py": ({"moram"}, "recovers MoRAM's connections"),
    "raymem/runs/loram/": ({"loram"}, "LoRAM's stages as a run: its room on the floor of the drivers"),
}
"""File, or folder -> the methods that it imports from, and what for."""


def test_a_method_is_imported_by_its_own_room_and_the_registry() -> None:
    used: dict[str, set[str]] = defaultdict(set)
    places = {}
    for module, path in modules().items():
        name = file_name(path)
        if name == REGISTRY:
            continue
        methods = foreign_methods(tree_of(path), module, is_package=path.name == "__init__.py")
        entry = next((listed for listed in METHOD_IMPORTS if name == listed or name.startswith(listed)), None)
        allowed = METHOD_IMPORTS[entry][0] if entry is not None else set[str]()
        if entry is not None:
            used[entry] |= set(methods) & allowed
        places[name] = [line for method in set(methods) - allowed for line in methods[method]]
    assert not any(places.values()), report(places, f"only the method's own room and {REGISTRY} may import from it")
    unused = {
        listed: allowed - used[listed] for listed, (allowed, _) in METHOD_IMPORTS.items() if allowed - used[listed]
    }
    assert not unused, f"unlist {unused}: nothing imports it any more"
    assert len(METHOD_IMPORTS) <= 3


@pytest.mark.parametrize(
    "source",
    [
        "from raymem.methods.loract.config import LoRActOptions",
        "from raymem.methods import loract",
        "def f():\n    import raymem.methods.loract.packer",
        "if TYPE_CHECKING:\n    from ..methods.loract import packer",
    ],
)
def test_the_rule_sees_every_import_of_a_method(source: str) -> None:
    tree = ast.parse(source)
    assert set(foreign_methods(tree, "raymem.training.loop")) == {"loract"}


def test_the_rule_lets_a_method_use_its_own_room_and_what_all_share() -> None:
    own = ast.parse("from raymem.methods.loract import packer")
    assert not foreign_methods(own, "raymem.methods.loract.sites")
    assert foreign_methods(own, "raymem.methods.moram.layer") == {"loract": ["1: raymem.methods.loract.packer"]}
    assert not foreign_methods(ast.parse("from raymem.methods import lazy_exports, tiny_model"), "raymem.training.loop")


# ---- (b) nobody asks which kind it is


def kind_questions(source: ast.Module) -> list[str]:
    """``line: code`` of every ``isinstance`` of a kind's class, comparison of ``.kind`` with a name, and ``match``."""
    names = set[str]().union(*kinds().values())
    questions = []
    asked: set[str]
    for node in ast.walk(source):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance" and len(node.args) == 2:
            asked = _names(node.args[1]) & set(kinds())
        elif isinstance(node, ast.Compare) and any(_is_kind(side) for side in (node.left, *node.comparators)):
            asked = names & _strings(node)
        elif isinstance(node, ast.MatchClass):
            asked = _names(node.cls) & set(kinds())
        elif isinstance(node, ast.Match) and _is_kind(node.subject):
            asked = {ast.unparse(node.subject)}
        else:
            continue
        if asked:
            shown = ast.unparse(node).splitlines()[0] if isinstance(node, ast.expr) else " | ".join(sorted(asked))
            questions.append(f"{node.lineno}: {shown}")
    return questions


def _is_kind(node: ast.expr) -> bool:
    if isinstance(node, ast.Call) and len(node.args) == 1:  # str(x.kind)
        node = node.args[0]
    return isinstance(node, ast.Attribute) and node.attr == "kind"


def _names(node: ast.expr) -> set[str]:
    return {
        n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute)
    }


def test_nobody_outside_the_methods_asks_which_kind_it_is() -> None:
    places = {
        file_name(path): kind_questions(tree_of(path))
        for module, path in modules().items()
        if not module.startswith("raymem.methods.")
    }
    assert not any(places.values()), report(
        places, "the kind itself is to answer (a method of it), not its name or class"
    )


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(recipe.adapter, MoRAMOptions)",
        "isinstance(options, schema.AdamW | MLorcLionOptions)",
        "isinstance(base, (LoRAMOptions, FullBase))",
        "recipe.base.kind == 'loram'",
        "'loram' != str(recipe.base.kind)",
        "recipe.optimizer.kind in ('mlorc_adamw', 'mlorc_lion')",
        "match options:\n    case AdamW(): pass",
        "match recipe.loss.kind:\n    case 'full': pass",
    ],
)
def test_the_rule_sees_every_question(source: str) -> None:
    assert len(kind_questions(ast.parse(source))) == 1


@pytest.mark.parametrize("source", ["target.kind == 'cuda'", "isinstance(path, Path)", "one.kind == other.kind"])
def test_the_rule_lets_other_questions_through(source: str) -> None:
    assert not kind_questions(ast.parse(source))


# ---- (c) folders


def test_a_folder_holds_few_files() -> None:
    counts = Counter(file_name(path.parent) for path in modules().values() if path.name != "__init__.py")
    full = {folder: count for folder, count in counts.items() if count > MOST_FILES}
    assert not full, f"more than {MOST_FILES} files; sort them into folders"


# ---- (d) circles


def imports_at_import_time(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """(line, module of raymem) that importing this one loads; not what functions and type checkers import."""

    def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in body:
            yield node
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from statements(node.orelse)
                continue
            for part in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body)

    for node in (n for n in statements(tree_of(path).body) if isinstance(n, ast.Import | ast.ImportFrom)):
        for name in imported(node, module, is_package=path.name == "__init__.py"):
            target = name if name in modules() else name.rpartition(".")[0]
            if target in modules() and target != module:
                yield node.lineno, target


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Groups of modules each of which reaches the others."""
    reached = {name: _reached(graph, name) for name in graph}
    in_circles = {name for name, others in reached.items() if name in others}
    groups = {frozenset(n for n in reached[name] if name in reached[n]) for name in in_circles}
    return sorted(sorted(group) for group in groups)


def _reached(graph: Mapping[str, Iterable[str]], start: str) -> set[str]:
    names: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        name = ahead.pop()
        if name not in names:
            names.add(name)
            ahead.extend(graph[name])
    return names


def test_imports_go_in_no_circle() -> None:
    graph = {
        module: {to: line for line, to in imports_at_import_time(path, module)} for module, path in modules().items()
    }
    shown = []
    for group in circles(graph):
        edges = [(module, line, to) for module in group for to, line in graph[module].items() if to in group]
        shown.append("\n".join(f"{file_name(modules()[module])}:{line} imports {to}" for module, line, to in edges))
    assert not shown, "\n\n".join(shown)


def test_a_circle_is_found() -> None:
    one_way = {"a": ["b"], "b": ["c"], "c": [], "d": ["c"]}
    assert circles(one_way) == []
    assert circles({**one_way, "c": ["a"]}) == [["a", "b", "c"]]
    assert circles({**one_way, "c": ["b"], "d": ["e"], "e": ["d"]}) == [["b", "c"], ["d", "e"]]


def test_imports_in_functions_and_for_type_checkers_make_no_circle(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(
        "import raymem.seeds\n"
        "if TYPE_CHECKING:\n    import raymem.errors\nelse:\n    from raymem import cache\n"
        "try:\n    from raymem.linalg.lowrank import LowRank\nexcept ImportError:\n    pass\n"
        "def f():\n    import raymem.account\n"
    )
    loaded = dict(imports_at_import_time(path, "raymem.m"))
    assert loaded == {1: "raymem.seeds", 5: "raymem.cache", 7: "raymem.linalg.lowrank"}
