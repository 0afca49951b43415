"""The public API: what it is, what it costs to import, and that its page tells the truth."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import raymem
from tests.helpers.commands import run_program
from tests.helpers.support import in_processes

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
PUBLIC = {
    "EvaluationResult", "Plan", "Recipe", "SweepResult", "TrainResult", "__version__", "errors", "evaluate", "load",
    "load_recipe", "merge", "plan", "plan_module", "register_activations", "register_adapter", "register_base",
    "register_loss", "register_optimizer", "register_tracker", "sweep", "train",
}  # fmt: skip


def test_the_public_names_are_these_and_documented() -> None:
    assert set(raymem.__all__) == PUBLIC == set(dir(raymem))
    page = PAGE.read_text()
    for name in PUBLIC - {"__version__"}:
        assert inspect.getdoc(getattr(raymem, name)), name
        assert re.search(rf"\b{name}\b", page), f"docs/api.md does not mention {name}"


def test_what_type_checkers_see_is_what_there_is() -> None:
    stub = (Path(raymem.__file__).with_suffix(".pyi")).read_text()
    declared = set(re.findall(r"import \w+ as (\w+)", stub)) | {"__version__"}
    assert declared == PUBLIC


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'trian'; public are .*train"):
        raymem.trian  # type: ignore[attr-defined]  # noqa: B018


def test_importing_it_loads_the_standard_library_alone() -> None:
    program = (
        "import sys; before = set(sys.modules); import raymem; "  # an environment may load packages at start
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['raymem']"


def test_a_dict_is_a_recipe_and_is_left_as_it_is(llama: Path, examples: Path) -> None:
    raw = {"model": {"name": str(llama)}, "data": {"train": str(examples / "train.jsonl")}, "train": {"steps": 1}}
    before = yaml.safe_dump(raw)
    recipe = raymem.load_recipe(raw, ["train.steps=3"])
    assert recipe.name == "run" and recipe.train.steps == 3 and yaml.safe_dump(raw) == before
    assert raymem.load_recipe(recipe) is recipe
    assert raymem.load_recipe(recipe, ["seed=5"]).seed == 5
    with pytest.raises(raymem.errors.RecipeError, match=r"train\.stepz"):
        raymem.load_recipe({**raw, "train": {"stepz": 1}})


def test_a_sweep_without_a_budget_is_refused(llama: Path, examples: Path) -> None:
    raw = {"model": {"name": str(llama)}, "data": {"train": str(examples / "train.jsonl")}, "train": {"steps": 1}}
    with pytest.raises(raymem.errors.BudgetError, match="there is no budget"):
        raymem.sweep(raw, {"adapter.rank": {"type": "choice", "choices": [1, 2]}})


def test_a_sweep_names_what_was_wrong_as_it_was_given(llama: Path, examples: Path, tmp_path: Path) -> None:
    data = {"train": str(examples / "train.jsonl")}
    raw = {"model": {"name": str(llama)}, "data": data, "train": {"steps": 1}, "storage": {"path": str(tmp_path)}}
    space = {"adapter.rank": {"type": "choice", "choices": [1, 2]}}

    def refused(wrong: dict[str, Any], space: Any = space) -> str:
        with pytest.raises(raymem.errors.RaymemError) as error:
            raymem.sweep(raw, space, **{"budget": "1GiB", **wrong})
        assert "--" not in str(error.value)
        return str(error.value)

    assert "give budget='24GiB', gpu='H100-80GB', or `budget`" in refused({"budget": None})
    assert refused({"budget": "lots"}).startswith("budget: 'lots' is no amount of memory")
    assert refused({"metrics": ()}).startswith(
        "metrics: names nothing to look for; give one or more of eval_loss, loss"
    )
    assert "no trial reports that; did you mean 'loss'" in refused({"metrics": "los"})
    assert refused({"algorithm": "tpf"}).startswith("algorithm tpf: there is no such one; did you mean 'tpe'")
    assert refused({"samples": 0}) == "samples=0: nothing would be tried; give at least 1"
    assert refused({"name": "../x"}).startswith("name: name: '../x'")
    assert refused({}, "joind").startswith("space joind: no space of that name ships with raymem")
    assert "give space (" in refused({}, None)
    assert refused({}).endswith("add it, or use metrics='loss'")
    assert refused({"metrics": "loss", "gpu": "H100-80GB"}).endswith("or give budget alone")


def examples_of(page: str) -> dict[str, dict[str, str]]:
    """Title -> file name -> code; a block that names no file is the program that is run."""
    blocks: dict[str, dict[str, str]] = {}
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        for name, code in re.findall(r"```python(?: file=(\S+))?\n(.+?)```", section, flags=re.DOTALL):
            files = blocks.setdefault(title, {})
            assert (name or "example.py") not in files, f"two programs below {title}"
            files[name or "example.py"] = code
    return blocks


BLOCKS = examples_of(PAGE.read_text())


SLOW = ("Will it fit", "Search", "In your own", "Testing")


@pytest.mark.timeout(960)
@pytest.mark.parametrize(
    "title", [pytest.param(t, marks=pytest.mark.slow) if t.startswith(SLOW) else t for t in BLOCKS]
)
def test_the_examples_of_the_page_run(title: str, llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = {
        "model": {"name": str(llama)},
        "data": {"train": str(examples / "train.jsonl"), "eval": str(examples / "eval.jsonl"), "sequence_length": 32},
        "adapter": {"rank": 4},
        "train": {"steps": 2, "global_batch": 4, "micro_batch": 2},
        "scaling": {"num_workers": 0},
        "storage": {"path": str(tmp_path / "runs")},
        "tracking": "none",
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(recipe))
    for name, code in BLOCKS[title].items():
        (tmp_path / name).write_text(code)
    if title.startswith(SLOW):  # a program that ends by itself, or that Ray sends to other processes
        done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"
        printed = done.stdout
    else:
        (printed,) = in_processes(run_program, 0, tmp_path / "meet", tmp_path, "example.py")
    assert printed or title.startswith("The methods")
