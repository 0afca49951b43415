"""What vLLM refuses is found in the files, and the command serves what it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from raymem.errors import ModelError, StorageError
from raymem.training.artifacts.vllm import copy_adapter, lint_vllm


def write_adapter(directory: Path, base: Path, *, modules: tuple[str, ...] = ("q_proj",), **options: Any) -> Path:
    directory.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base), "revision": None}
    (directory / "adapter_config.json").write_text(json.dumps({**config, **options}))
    prefix = "base_model.model.model.layers.0.self_attn"
    names = [f"{prefix}.{name}.lora_{factor}.weight" for name in modules for factor in "AB"]
    save_file({name: torch.zeros(1) for name in names}, directory / "adapter_model.safetensors")
    return directory


def test_a_plain_adapter_is_served(llama: Path, tmp_path: Path) -> None:
    found = lint_vllm(write_adapter(tmp_path / "my run" / "adapter", llama, revision="abc", rank_pattern={"x": 9}))
    assert not found.problems
    assert found.command == (
        f"vllm serve {llama} --enable-lora --max-lora-rank 16 --revision abc "
        f"--lora-modules 'my run={tmp_path}/my run/adapter'"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 513}, r"r: 513 is above 512"),
        ({"rank_pattern": {"q_proj": 600}}, r"r: 600 is above 512"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: \['lm_head'\] is refused; train without it"),
        ({"use_dora": True}, "use_dora: True is refused"),
        ({"bias": "all"}, "bias: 'all' is refused"),
        ({"lora_bias": True}, "lora_bias: True is refused"),
        ({"peft_type": "MORAM"}, "peft_type: MORAM is not served; merge the adapter"),
        ({"modules": ("q_proj", "rotary")}, r"rotary is not among what is adapted of this model \(down_proj"),
        ({"modules": ("lm_head",)}, "lm_head is adapted, which not every model class serves"),
    ],
    ids=str,
)
def test_what_is_refused(options: dict[str, Any], words: str, llama: Path, tmp_path: Path) -> None:
    import re

    found = lint_vllm(write_adapter(tmp_path / "adapter", llama, **options))
    assert len(found.problems) == 1
    assert re.search(words, found.problems[0])


def test_a_head_may_be_allowed(llama: Path, tmp_path: Path) -> None:
    assert not lint_vllm(write_adapter(tmp_path / "adapter", llama, modules=("lm_head",)), allow_lm_head=True).problems


def test_of_unknown_models_names_are_not_checked(tmp_path: Path) -> None:
    assert not lint_vllm(write_adapter(tmp_path / "adapter", Path("org/model"), modules=("odd",))).problems


def test_no_adapter(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no PEFT directory"):
        lint_vllm(llama)
    adapter = write_adapter(tmp_path / "adapter", llama)
    (adapter / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="is no PEFT directory"):
        lint_vllm(adapter)


def test_a_copy_overwrites_nothing(llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", llama)
    copy_adapter(adapter, tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {path.name for path in adapter.iterdir()}
    with pytest.raises(StorageError, match="already exists"):
        copy_adapter(adapter, tmp_path / "copy")
