"""What docs/integrations.md shows, runs: each of its programs, with a tiny model and the trainer's own parts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from raymem.integrations.applied import apply
from tests.helpers.support import make_recipe, run_fragment
from tests.helpers.trainers import arguments_for, rows_of

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
README = Path(__file__).parents[2] / "README.md"
BLOCKS: dict[str, str] = {
    section.partition("\n")[0]: code
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    for code in re.findall(r"```(?:python|yaml)\n(.+?)```", section, flags=re.DOTALL)
}


def parts_of(title: str, llama: Path, examples: Path, tmp_path: Path) -> dict[str, Any]:
    """The names that a program of the page takes as given."""
    steps = {"data": {"packing": "none"}, "train": {"steps": 2}}
    recipe = make_recipe(run_fragment(examples, tmp_path), steps, model=llama)
    rows: Any = rows_of(recipe)
    kind: Any = TrainingArguments
    more: dict[str, Any] = {}
    if title == "TRL":
        from datasets import Dataset
        from trl import SFTConfig

        kind, more = SFTConfig, {"gradient_checkpointing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        rows = Dataset.from_list([{name: row[name].tolist() for name in ("input_ids", "labels")} for row in rows])
    options = {
        "default_root_dir": tmp_path, "accelerator": "cpu", "max_steps": 2, "logger": False, "devices": 1,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    return {
        "model": AutoModelForCausalLM.from_pretrained(llama), "rows": rows, "options": options,
        "args": arguments_for(recipe, tmp_path, kind, **more), "tokenizer": AutoTokenizer.from_pretrained(llama),
        "loader": DataLoader(rows, batch_size=2),
    }  # fmt: skip


@pytest.mark.parametrize(("title", "package"), [("Hugging Face Trainer", "transformers"), ("TRL", "trl"),
                                                ("Lightning", "lightning")])  # fmt: skip
def test_the_programs_of_the_page_run(title: str, package: str, llama: Path, examples: Path, tmp_path: Path) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed (pip install 'raymem[{package}]')")
    names = {**parts_of(title, llama, examples, tmp_path), "__name__": "page"}
    exec(compile(BLOCKS[title], f"{PAGE.name}: {title}", "exec"), names)
    trained = names["module"].run if title == "Lightning" else names["run"]
    assert trained.model.training and trained.settings.budget_bytes == 8 << 30


def test_the_section_of_axolotl_is_what_apply_takes(llama: Path) -> None:
    section = yaml.safe_load(BLOCKS["axolotl"])
    run = apply(AutoModelForCausalLM.from_pretrained(llama), section["raymem"])
    assert run.settings.asked == {"adapter", "activations", "loss", "optimizer"}
    module, _, name = section["plugins"][0].rpartition(".")
    assert f"class {name}(" in (Path(__file__).parents[2] / f"{module.replace('.', '/')}.py").read_text()


def test_the_readme_shows_three_lines_of_each() -> None:
    text = README.read_text().partition("## In your own trainer")[2].partition("\n## ")[0]
    for line in ("RaymemCallback(run)", "raymem.integrations.lightning", "raymem.integrations.axolotl.RaymemPlugin"):
        assert line in text
