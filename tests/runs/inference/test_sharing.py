"""How many workers share a model, decided by the recipe, its budget or the GPU, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.errors import BudgetExceeded, OutOfMemory
from raymem.memory.devices import GIB, UNKNOWN_GPU
from raymem.planner.plan import outside_bytes
from raymem.planner.types import Target
from raymem.recipe.schema import ScalingSection
from raymem.runs.inference import generate as generating
from raymem.runs.inference import sharing as deciding
from raymem.runs.inference.sharing import Sizes, more_workers, named_memory, shared, sharing
from raymem.training.dist_env import DistEnv
from raymem.training.model.build import load_config, on_meta
from tests.helpers.support import make_recipe, save_model

LLAMA_70B = Sizes(weights=141 * 10**9, block=171 * 10**7, rest=42 * 10**8)
"""In bf16."""


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


def asked_of(scaling: ScalingSection, sizes: Sizes, device_bytes: int) -> tuple[ScalingSection, list[str]]:
    told: list[str] = []
    return shared(scaling, sizes, device_bytes, told.append), told


def test_a_model_that_one_gpu_holds_is_left_alone() -> None:
    scaling = ScalingSection(num_workers=2, use_gpu=True)
    needed = int((LLAMA_70B.weights + UNKNOWN_GPU.context_bytes) / 0.9) + 1
    assert asked_of(scaling, LLAMA_70B, needed) == (scaling, [])
    assert asked_of(scaling, LLAMA_70B, needed - 10)[0].shares_model


@pytest.mark.parametrize("own", [0, 1])
def test_as_many_workers_share_it_as_hold_it(own: int) -> None:
    found, told = asked_of(ScalingSection(num_workers=own, use_gpu=True), LLAMA_70B, 80 * GIB)
    assert (found.num_workers, found.strategy, found.use_gpu) == (3, "fsdp2", True)
    (line,) = told
    assert line == "the weights take 131.32 GiB, and a device has 80.00 GiB: 3 FSDP2 workers share the model"
    left = 80 * GIB * 0.9 - outside_bytes(Target("cuda", 3), None) - LLAMA_70B.gathered
    assert LLAMA_70B.weights / 3 <= left < LLAMA_70B.weights / 2, "no fewer would do"


def test_the_recipes_own_workers_are_kept_where_they_are_more() -> None:
    assert asked_of(ScalingSection(num_workers=4, use_gpu=True), LLAMA_70B, 80 * GIB)[0].num_workers == 4


def test_too_few_gpus_and_too_small_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = ScalingSection(num_workers=0, use_gpu=True)
    monkeypatch.setattr(deciding, "gpu_bytes", lambda: 20 * GIB)
    with pytest.raises(BudgetExceeded, match=r": 16 FSDP2 workers would hold .* has 4 GPUs; run it on a Ray cluster"):
        asked_of(scaling, LLAMA_70B, 20 * GIB)
    with pytest.raises(BudgetExceeded, match=r"too little even for .*\(8\.69 GiB\); use devices with more memory"):
        asked_of(scaling, LLAMA_70B, 8 * GIB)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert asked_of(scaling, LLAMA_70B, 20 * GIB)[0].num_workers == 16


def test_what_cannot_be_shared_is_tried_where_the_weights_themselves_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    scaling = ScalingSection(num_workers=1, use_gpu=True)
    tight = LLAMA_70B.weights + 2 * GIB
    monkeypatch.setattr(deciding, "gpu_bytes", lambda: tight)
    for device_bytes in (tight, 24 * GIB, 8 * GIB):  # the last two as a budget may have it
        assert asked_of(scaling, LLAMA_70B, device_bytes) == (scaling, [])
    on_cpu = ScalingSection(num_workers=1)
    assert asked_of(on_cpu, LLAMA_70B, 8 * GIB) == (on_cpu, [])


def test_the_units_of_a_model_are_its_blocks_and_what_is_in_none(tmp_path: Path) -> None:
    def sizes(**options: Any) -> Sizes:
        recipe = make_recipe(model=save_model(tmp_path / "model", **options))
        return Sizes.of(on_meta(load_config(recipe), recipe))

    shallow, deep, wordy = sizes(num_hidden_layers=2), sizes(num_hidden_layers=5), sizes(vocab_size=4096)
    block = (deep.weights - shallow.weights) // 3
    assert (deep.block, deep.rest) == (block, deep.weights - 5 * block)
    assert (wordy.block, wordy.rest) == (block, wordy.weights - 2 * block)
    assert deep.gathered == deep.rest + 3 * block
    assert wordy.gathered == 2 * wordy.rest


def budgeted(model: Path, budget: str | None, **scaling: Any) -> Any:
    return make_recipe({"scaling": scaling, "budget": budget}, model=model)


def test_a_budget_is_the_memory_of_a_device(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=12)
    recipe = budgeted(model, "1GiB", num_workers=1)
    weights = Sizes.of(on_meta(load_config(recipe), recipe)).weights
    assert sharing(recipe, print) == recipe.scaling
    told: list[str] = []
    found = sharing(budgeted(model, str(weights), num_workers=1), told.append)
    assert (found.num_workers, found.strategy) == (2, "fsdp2")
    assert len(told) == 1
    here = budgeted(model, str(weights), num_workers=0)
    assert sharing(here, print) == here.scaling, "others would share the memory of this process"
    own = budgeted(model, str(weights), num_workers=3, strategy="fsdp2")
    assert sharing(own, print) == own.scaling


def test_weights_in_4_bits_count_as_such(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    dense = budgeted(model, None, num_workers=1)
    weights = Sizes.of(on_meta(load_config(dense), dense)).weights
    tight = make_recipe(
        {"base": {"quantize": "nf4"}, "scaling": {"num_workers": 1}, "budget": str(weights // 2)}, model=model
    )
    assert sharing(tight, print) == tight.scaling


def test_memory_that_ends_is_named_with_what_helps() -> None:
    whole, third = DistEnv(), DistEnv(rank=2, world_size=3, strategy="fsdp2")
    of_one = r"on rank 0 of 1, which holds the whole model: give --workers 2, so that more"
    with pytest.raises(OutOfMemory, match=of_one), named_memory(whole, more_workers("give --workers", whole)):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    of_three = r"rank 2 of 3, which holds a share of 1/3 of the model: N: 6, so"
    with pytest.raises(OutOfMemory, match=of_three), named_memory(third, more_workers("N:", third)):
        raise MemoryError
    with pytest.raises(RuntimeError, match="something else"), named_memory(whole, ""):
        raise RuntimeError("something else")


def test_the_workers_of_a_cluster_get_what_those_of_the_training_got(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling = {"num_workers": 8, "strategy": "fsdp2", "use_gpu": True, "resources_per_worker": {"GPU": 1, "CPU": 4}}
    recipe = make_recipe({"scaling": scaling}).to_dict()
    (tmp_path / "raymem.json").write_text(json.dumps({"recipe": recipe}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    alone = generating._scaling(str(tmp_path), 2, print)
    assert (alone.num_workers, alone.shares_model, alone.use_gpu, alone.resources_per_worker) == (2, True, False, None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    on_cluster = generating._scaling(str(tmp_path), 2, print)
    assert (on_cluster.num_workers, on_cluster.use_gpu) == (2, True)
    assert on_cluster.resources_per_worker == {"GPU": 1.0, "CPU": 4.0}
    for damaged in ("{}", '{"recipe": {"scaling": {"num_workers": -1}}}'):
        (tmp_path / "raymem.json").write_text(damaged)
        assert generating._scaling(str(tmp_path), 2, print).resources_per_worker is None


def test_generating_here_needs_no_gpu_and_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for workers in (None, 1):
        assert generating._scaling("anywhere", workers, print).num_workers == 0


def test_what_one_gpu_cannot_hold_is_generated_by_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model")
    measured: list[str] = []

    def sizes(bare: Any) -> Sizes:
        measured.append(type(bare).__name__)
        return LLAMA_70B

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Sizes, "of", sizes)
    told: list[str] = []
    for device_bytes, workers in ((200 * GIB, 0), (80 * GIB, 3)):
        monkeypatch.setattr(generating, "gpu_bytes", lambda device_bytes=device_bytes: device_bytes)
        found = generating._scaling(str(model), None, told.append)
        assert (found.num_workers, found.use_gpu, found.shares_model, len(told)) == (
            workers,
            True,
            workers > 0,
            workers > 0,
        )
    assert measured == ["LlamaForCausalLM"] * 2
