"""Adapters of other kinds on ranks that share their base: computed with as in one process, or refused with a cure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from raymem.errors import ModelError
from raymem.recipe.axes import ADAPTERS
from raymem.training.artifacts.load import load_artifact
from raymem.training.dist_env import DistEnv
from tests.helpers import toy_kinds
from tests.helpers.peft_adapters import save_peft
from tests.helpers.support import in_processes, make_recipe, run_fragment, save_model, train

pytestmark = pytest.mark.slow

TARGETS = ["q_proj", "v_proj"]
SHARED: dict[str, Any] = {
    "loha": peft.LoHaConfig(r=4, target_modules=TARGETS),
    "ia3": peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "rslora": peft.LoraConfig(r=4, target_modules="all-linear", use_rslora=True, rank_pattern={"q_proj": 8}),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "vera": (peft.VeraConfig(r=4, target_modules=TARGETS), "vera_A.default is not in its file but made when a VERA"),
    "pissa": (
        peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"),
        "Workers that share a base have no values yet at that point",
    ),
}
IDS = torch.arange(3, 15)[None]


@pytest.fixture
def shifting() -> Iterator[None]:
    ADAPTERS.register(toy_kinds.ShiftKind)
    yield
    ADAPTERS.unregister("toy_shift")


def logits(directory: str, dist_env: DistEnv | None) -> Any:
    try:
        model, _ = load_artifact(directory, dist_env=dist_env)
    except ModelError as error:
        return str(error)
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def shared_logits(directories: dict[str, str]) -> dict[str, Any]:
    import torch.distributed as dist

    if "toy_shift" not in ADAPTERS:
        ADAPTERS.register(toy_kinds.ShiftKind)
    dist_env = DistEnv(rank=dist.get_rank(), world_size=dist.get_world_size(), strategy="fsdp2")
    return {name: logits(directory, dist_env) for name, directory in directories.items()}


def test_they_are_shared_or_refused(shifting: None, examples: Path, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    configs = {**SHARED, **{name: config for name, (config, _) in REFUSED.items()}}
    directories = {name: str(save_peft(tmp_path / name, base, config)) for name, config in configs.items()}
    own = make_recipe(run_fragment(examples, tmp_path), {"adapter": {"kind": "toy_shift"}}, model=base)
    outcome, _ = train(own)
    assert outcome is not None
    directories["a kind of its own"] = outcome.artifact
    directories["bf16"] = str(save_peft(tmp_path / "bf16", as_bf16(base, tmp_path / "half"), SHARED["rslora"]))
    first, second = in_processes(shared_logits, 2, tmp_path / "meet", directories)
    plain = logits(str(base), None)
    for name in (*SHARED, "a kind of its own", "bf16"):
        expected = logits(directories[name], None)
        assert torch.equal(first[name], second[name])
        assert first[name].dtype == expected.dtype
        torch.testing.assert_close(first[name], expected, rtol=0, atol=2e-2 if name == "bf16" else 1e-5)
        assert (expected - plain).abs().max() > 2e-2
    for name, (_, reason) in REFUSED.items():
        assert reason in first[name] and reason in second[name]
        assert "use one worker, or merge it into its base (raymem merge" in first[name]
        assert isinstance(logits(directories[name], None), torch.Tensor), "one process takes it"


def as_bf16(base: Path, directory: Path) -> Path:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(directory)
    return directory
