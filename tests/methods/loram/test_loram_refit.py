"""Weights that are fitted to the kept units, against straight-line least squares on the whole model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from raymem.errors import DataError
from raymem.methods.loram import PruneOptions, load_pruned, prune_model, recover_adapter, verify_recovery
from raymem.methods.loram.coupling import couple
from raymem.methods.loram.manifest import read_manifest
from raymem.methods.loram.pruning import layer_passes, refit
from raymem.methods.loram.pruning.job import open_job
from raymem.methods.loram.pruning.refit import readers, refitted
from raymem.methods.loram.pruning.steps import run_step, steps
from raymem.storage.safetensors_io import digest, read_header
from tests.helpers.loram_families import config_of, random_model, run_turned, save, token_ids

IDS = token_ids(16, 16)
CRITERIA = ["random", "magnitude", "wanda", "taylor"]
KEPT = torch.tensor([0, 2, 3, 6, 9])


def straight_line(weight_OI: torch.Tensor, inputs_TI: torch.Tensor, kept_K: torch.Tensor) -> torch.Tensor:
    """The definition as one stacked least-squares problem: every token a row, and a row for each damped weight."""
    weight_OI, inputs_TI = weight_OI.double(), inputs_TI.double()
    energy_K = inputs_TI[:, kept_K].square().sum(0)
    damping = 0.5 * len(kept_K) / len(inputs_TI)
    damping_KK = (damping * energy_K + 1e-6 * energy_K.mean()).sqrt().diag()
    rows = torch.cat([inputs_TI[:, kept_K], damping_KK])
    wanted = torch.cat([inputs_TI @ weight_OI.T, damping_KK @ weight_OI[:, kept_K].T])
    return torch.linalg.lstsq(rows, wanted).solution.T


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [7, 10], inputs [40, 10]), one of which is a thousand times larger than the others."""
    source = torch.Generator().manual_seed(0)
    inputs_TI = torch.randn(40, 10, generator=source)
    inputs_TI[:, 3] *= 1000
    return torch.randn(7, 10, generator=source), inputs_TI


def test_it_is_the_damped_least_squares_solution(case: Any) -> None:
    weight_OI, inputs_TI = case
    found = refitted(weight_OI, inputs_TI.double().T @ inputs_TI.double(), KEPT, 40)
    torch.testing.assert_close(found.double(), straight_line(weight_OI, inputs_TI, KEPT), rtol=1e-6, atol=1e-6)


def test_where_nothing_is_pruned_or_nothing_fires_nothing_changes(case: Any) -> None:
    weight_OI, inputs_TI = case
    assert torch.equal(refitted(weight_OI, inputs_TI.T @ inputs_TI, torch.arange(10), 40), weight_OI)
    assert torch.equal(refitted(weight_OI, torch.zeros(10, 10), KEPT, 40), weight_OI[:, KEPT])
    assert refitted(weight_OI.bfloat16(), inputs_TI.T @ inputs_TI, KEPT, 40).dtype == torch.bfloat16


def test_what_the_kept_inputs_tell_is_made_up_for(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input that is the double of a kept one: without damping its whole share goes to that one."""
    monkeypatch.setattr(refit, "_DAMPING", 1e-8)
    monkeypatch.setattr(refit, "_FLOOR", 0.0)
    weight_OI, inputs_TI = case
    inputs_TI[:, 1] = 2 * inputs_TI[:, 2]
    kept = torch.tensor([0, 2, 3, 4, 5, 6, 7, 8, 9])
    found = refitted(weight_OI, inputs_TI.double().T @ inputs_TI.double(), kept, 40)
    wanted_TO = inputs_TI @ weight_OI.T
    cut, fitted = (inputs_TI[:, kept] @ one.T - wanted_TO for one in (weight_OI[:, kept], found))
    assert float(fitted.norm()) < 1e-4 * float(cut.norm())


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("phi3", "opt"))])
def test_a_pruned_layer_holds_the_fitted_weights(family: str, criterion: Any, tmp_path: Path) -> None:
    """Of the full model's own activations, whatever chooses the units; all other weights are as without."""
    options = {"criterion": criterion, "keep_first": 1, "keep_last": 1}
    full = save(tmp_path / "full", family, shard="30KB")
    prune_model(full, tmp_path / "cut", PruneOptions(**options), None if criterion in CRITERIA[:2] else IDS)
    manifest = prune_model(full, tmp_path / "fitted", PruneOptions(**options, refit=True), IDS)
    assert manifest.kept == read_manifest(tmp_path / "cut").kept
    model, coupling = random_model(family), couple(config_of(family))
    inputs: dict[str, torch.Tensor] = {}
    for layer in (1, 2):
        for path in readers(coupling):
            name = f"{coupling.prefix(layer)}{path}"
            model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: inputs.update({name: args[0].flatten(0, -2)})
            )
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    assert len(inputs) == 4
    cut, fitted = load_pruned(tmp_path / "cut").state_dict(), load_pruned(tmp_path / "fitted").state_dict()
    for name, tensor in fitted.items():
        module = name.removesuffix(".weight")
        if module not in inputs:
            assert torch.equal(tensor, cut[name]), name
            continue
        layer, path = coupling.locate(module)  # type: ignore[misc]
        group, member = coupling.member(path, "in")  # type: ignore[misc]
        kept_K = member.indices(torch.tensor(manifest.kept[layer][group.name]))
        expected = straight_line(model.get_submodule(module).weight, inputs[module], kept_K)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(tensor, cut[name])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_any_order_that_after_allows_ends_the_same(criterion: Any, tmp_path: Path) -> None:
    full = save(tmp_path / "full", "llama", shard="30KB")
    options = PruneOptions(criterion=criterion, keep_first=1, keep_last=1, refit=True)
    results = []
    for name, turned in (("one", False), ("two", True)):
        job = open_job(full, tmp_path / name, options, IDS)
        if turned:
            run_turned(job)
        else:
            for step in steps(job):
                run_step(job, step)
        results.append({path.name: path.read_bytes() for path in sorted(job.workspace.glob("*.safetensors"))})
        assert layer_passes.fitted(job, 1) and not layer_passes.fitted(job, 0)
    assert results[0].keys() == results[1].keys()
    for name, contents in results[0].items():
        assert contents[-4096:] == results[1][name][-4096:], name  # behind the header with the job's name


def test_an_adapter_of_a_fitted_model_is_recovered_and_verified(tmp_path: Path) -> None:
    full = save(tmp_path / "full", "llama")
    options = PruneOptions(criterion="wanda", keep_first=1, keep_last=1, refit=True)
    prune_model(full, tmp_path / "pruned", options, IDS)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load_pruned(tmp_path / "pruned"), config).save_pretrained(tmp_path / "adapter")
    recover_adapter(tmp_path / "adapter", tmp_path / "pruned", tmp_path / "recovered")
    found = verify_recovery(tmp_path / "adapter", tmp_path / "pruned", tmp_path / "recovered", full=full)
    tensors = read_header(full, "model.safetensors")[1]
    assert found.num_weights == len(tensors) - 4, "all but two of each pruned layer"
    assert found.logit_difference is not None and found.logit_difference < 1e-4


def test_bad_input(tmp_path: Path) -> None:
    full = save(tmp_path / "full", "llama")
    with pytest.raises(ValueError, match=r"refit: true contradicts structure: 2:4; leave it out"):
        PruneOptions(criterion="wanda", structure="2:4", refit=True)
    with pytest.raises(DataError, match=r"calibration: refit: true needs token ids"):
        open_job(full, tmp_path / "pruned", PruneOptions(keep_first=1, keep_last=1, refit=True))
    with pytest.raises(Exception, match="its activations give no usable Gram matrix"):
        refitted(torch.ones(2, 2), torch.full((2, 2), torch.nan), torch.tensor([0]), 1)


def test_models_pruned_before_keep_their_keys(tmp_path: Path) -> None:
    """As they were when there was no refit: of all other options, the weights and the calibration."""
    full = save(tmp_path / "full", "llama")
    before = {
        "structure": "units", "criterion": "random", "ratio": 0.5, "keep_first": 1, "keep_last": 1,
        "layer_ratios": None, "round_to": 1, "seed": 0,
    }  # fmt: skip
    plain = open_job(full, tmp_path / "plain", PruneOptions(keep_first=1, keep_last=1))
    assert plain.key == digest([1, before, plain.source.identity, None, None])
    assert (
        plain.key != open_job(full, tmp_path / "fitted", PruneOptions(keep_first=1, keep_last=1, refit=True), IDS).key
    )
