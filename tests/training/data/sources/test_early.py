"""Data files that are missing are reported before anything slow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import DataError
from raymem.recipe.load import parse_recipe
from raymem.training.data.sources.early import check_files_are_here

ALL_COMMANDS = """
import sys
from raymem.cli.main import run_app
for command in (["train"], ["data"], ["data", "--split", "eval"], ["evaluate"], ["sweep", "--budget", "1GiB"],
                ["loram", "run"], ["loram", "train"]):
    assert run_app(*command, sys.argv[1]) == 1, command
print(*{"torch", "transformers", "pyarrow", "ray"} & set(sys.modules))
"""


def recipe(train: Any, **sections: Any) -> Any:
    data = {"train": train, **sections.pop("data", {})}
    return parse_recipe({"name": "x", "model": {"name": "m"}, "data": data, "train": {"steps": 1}, **sections})


def test_no_command_loads_a_library_to_say_so(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(
        f"model: {{name: {tmp_path}/model}}\ndata: {{train: {tmp_path}/trian.jsonl, eval: {tmp_path}/evla.jsonl}}\n"
        f"train: {{steps: 1}}\nstorage: {{path: {tmp_path}/runs}}\nbase: {{kind: loram}}\n"
        "space: {adapter.rank: {type: choice, choices: [1, 2]}}\n"
    )
    (tmp_path / "train.jsonl").touch()
    done = subprocess.run([sys.executable, "-c", ALL_COMMANDS, path], capture_output=True, text=True, check=True)
    errors = done.stderr.splitlines()
    assert errors[0].startswith(f"error: data.train[0].path='{tmp_path}/trian.jsonl' does not exist: did you mean ")
    assert len(errors) == 7 and sum("data.eval[0].path" in error for error in errors) == 2, done.stderr
    assert done.stdout.split() == []
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_what_is_not_on_this_machine_is_looked_for_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    here = recipe([str(tmp_path / "a.jsonl"), "s3://bucket/b.jsonl", "owner/name", "demo:functions"])
    check_files_are_here(here)


def test_every_split_and_the_alignment_s_data_count(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "empty").mkdir()
    one = recipe(str(tmp_path / "a.jsonl"), data={"eval": {"math": str(tmp_path / "empty")}})
    check_files_are_here(one, ("train",))
    with pytest.raises(DataError, match=r"^data\.eval\.math\.path='.*empty' has no data files"):
        check_files_are_here(one)
    aligned = {"kind": "loram", "align": {"data": {"train": str(tmp_path / "b.jsonl")}}}
    with pytest.raises(DataError, match=r"^base\.align\.data\.train\[0\]\.path='.*b\.jsonl' does not exist"):
        check_files_are_here(recipe(str(tmp_path / "a.jsonl"), base=aligned))
