"""What pruning holds in memory, in bytes, and what quantised pruned models weigh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from raymem.memory.meter import PeakMeter
from raymem.memory.nf4 import weight_bytes
from raymem.methods.loram import (
    PruneOptions,
    load_pruned,
    plan_pruning,
    prune_model,
    recover_adapter,
    verify_recovery,
)
from raymem.methods.loram.nonuniform import read_config
from raymem.methods.loram.pruning.job import PruneJob, open_job
from raymem.methods.loram.pruning.steps import layerwise_model, memory_bytes, run_step, steps
from tests.helpers.loram_families import save, token_ids

SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "head_dim": 32,
    "num_hidden_layers": 6,
}
IDS = token_ids(2, 8)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers of 1.5 MB in bf16; read only."""
    return save(tmp_path_factory.mktemp("loram") / "full", shard="4MB", dtype=torch.bfloat16, **SHAPE)


def layer_bytes(job: PruneJob) -> int:
    return sum(entry.num_bytes for entry in job.source.layer(job.coupling, 2).values())


def peaks(job: PruneJob) -> dict[str, int]:
    """Highest allocation of every step above what was there before it."""
    found = {}
    model = layerwise_model(job) if job.options.needs_calibration else None
    for step in steps(job):
        with PeakMeter(torch.device("cpu"), lambda: ()) as meter:
            run_step(job, step, model)
        assert meter.peak is not None
        found[step.name] = meter.peak.allocated_bytes
    return found


@pytest.mark.parametrize(
    ("criterion", "layers"), [("random", 0.5), ("magnitude", 1.5), ("wanda", 3.5), ("taylor", 6.0)]
)
def test_a_step_holds_one_layer(full: Path, criterion: Any, layers: float, tmp_path: Path) -> None:
    """Sweeps compute in fp32, twice the stored bytes; taylor adds a gradient of every coupled weight."""
    options = PruneOptions(criterion=criterion, keep_first=1, keep_last=1)
    job = open_job(full, tmp_path / "pruned", options, IDS if options.needs_calibration else None)
    found = peaks(job)
    inside = {name: peak for name, peak in found.items() if name not in ("embed", "loss")}
    used = max(inside.values()) / layer_bytes(job)
    assert 0.5 * layers < used < layers, inside
    said = {step.name: memory_bytes(job, step) for step in steps(job)}
    assert {name: peak for name, peak in found.items() if peak > said[name]} == {}


@pytest.mark.parametrize("criterion", ["random", "taylor"])
def test_what_fitting_holds_is_said(full: Path, criterion: Any, tmp_path: Path) -> None:
    """Beside a layer the Gram matrix of each linear layer that reads units, and the equations of one of them."""
    options = PruneOptions(criterion=criterion, keep_first=1, keep_last=1, refit=True)
    job = open_job(full, tmp_path / "pruned", options, IDS)
    found, said = peaks(job), {step.name: memory_bytes(job, step) for step in steps(job)}
    assert {name: peak for name, peak in found.items() if peak > said[name]} == {}
    where = "backward-2" if criterion == "taylor" else "forward-2"
    assert found[where] > max(0.5 * said[where], 4 * (256**2 + 768**2))


def test_nf4_trains_recovers_and_weighs_what_the_plan_says(tmp_path: Path) -> None:
    """QLoRAM on the CPU: linear layers of the pruned model in 4 bits with double quantisation."""
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    small = {**SHAPE, "hidden_size": 64, "intermediate_size": 192, "head_dim": 8, "num_hidden_layers": 2}
    options = PruneOptions(layer_ratios=(0.0, 0.5))
    full, pruned = save(tmp_path / "full", dtype=torch.bfloat16, **small), tmp_path / "pruned"
    prune_model(full, pruned, options)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = load_pruned(pruned, quantization_config=nf4, dtype=torch.bfloat16)
    stored = linear_parameters = 0
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            pieces = (module.weight.data, state.absmax, state.state2.absmax)
            found = sum(piece.numel() * piece.element_size() for piece in pieces)
            assert found == weight_bytes(state.shape.numel())
            stored += found
            linear_parameters += state.shape.numel()
    plan = plan_pruning(read_config(full), options)
    assert linear_parameters == plan.pruned.linear_parameters
    assert stored + 2 * (plan.pruned.parameters - linear_parameters) == plan.pruned.nf4_bytes

    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj", "lm_head"]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    recover_adapter(tmp_path / "adapter", pruned, tmp_path / "recovered")
    verify_recovery(tmp_path / "adapter", pruned, tmp_path / "recovered", full=full)
