"""What a trainer gives its workers is compared with a plan, before any worker starts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import ray
from ray.train import ScalingConfig

from raymem.cluster.trainers.budget import budget_check
from raymem.errors import BudgetError, BudgetExceeded
from raymem.memory.devices import GIB, GPUS, MIB
from raymem.planner.types import Plan


@pytest.fixture(scope="module")
def on_cpu() -> Plan:
    return Plan(
        device="cpu", gpu=None, num_workers=1, traced=True, note=None, peak_bytes=MIB, step_peak_bytes=MIB, terms={},
        term_peaks={}, phases={}, state={}, reserved_bytes=MIB, capacity_bytes=MIB, expandable_bytes=MIB,
        outside_bytes=0, top=[], timeline=[],
    )  # fmt: skip


def on_gpu(plan: Plan, **changes: Any) -> Plan:
    return dataclasses.replace(plan, **{"device": "cuda", "gpu": "L4", "capacity_bytes": 30 * GIB, **changes})


def test_a_worker_on_a_cpu_has_the_memory_that_it_asks_for(on_cpu: Plan) -> None:
    memory = on_cpu.capacity_bytes + 5
    assert (
        budget_check(ScalingConfig(num_workers=2, resources_per_worker={"memory": memory}), on_cpu).headroom_bytes == 5
    )
    with pytest.raises(BudgetExceeded, match=r"which is 6 B more than it has \(resources_per_worker\['memory'\]: "):
        budget_check(ScalingConfig(num_workers=2, resources_per_worker={"memory": memory - 11}), on_cpu)


def test_without_that_it_has_what_the_largest_node_has(on_cpu: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BudgetError, match="nothing says how much memory a worker has; give resources_per_worker="):
        budget_check(ScalingConfig(num_workers=2), on_cpu)
    nodes = [{"Alive": True, "Resources": {"memory": size}} for size in (1.0, float(on_cpu.capacity_bytes - 1))]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"memory": 1e15}}])
    with pytest.raises(BudgetExceeded, match=r"1 B more than it has \(memory of the largest node"):
        budget_check(ScalingConfig(num_workers=2), on_cpu)


def test_the_gpu_is_the_one_that_is_asked_for(on_cpu: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = on_gpu(on_cpu)
    scaling = ScalingConfig(num_workers=2, use_gpu=True, accelerator_type="A100-40G")
    assert budget_check(scaling, plan).headroom_bytes == GPUS["A100-40GB"].capacity_bytes - 30 * GIB
    half = ScalingConfig(num_workers=2, use_gpu=True, accelerator_type="A100-40G", resources_per_worker={"GPU": 0.5})
    with pytest.raises(BudgetExceeded, match=r"30\.00 GiB, .*\(0\.5 of accelerator_type='A100-40G': 19\.69 GiB"):
        budget_check(half, plan)
    with pytest.raises(BudgetExceeded, match="the planned gpu='L4'"):
        budget_check(ScalingConfig(num_workers=2, use_gpu=True), plan)
    with pytest.raises(BudgetError, match="accelerator 'TPU-V4' is not known"):
        budget_check(ScalingConfig(num_workers=2, use_gpu=True, accelerator_type="TPU-V4"), plan)
    resources = [{"GPU": 1.0, f"accelerator_type:{name}": 1.0} for name in ("H100", "T4")]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": some} for some in resources])
    with pytest.raises(BudgetExceeded, match="the smallest GPU of the cluster, T4"):
        budget_check(ScalingConfig(num_workers=2, use_gpu=True), plan)


def test_what_lies_on_the_host_counts_too(on_cpu: Plan) -> None:
    scaling = ScalingConfig(
        num_workers=1, use_gpu=True, accelerator_type="H200", resources_per_worker={"GPU": 1, "memory": GIB}
    )
    with pytest.raises(BudgetExceeded, match=r"for what it keeps on the host: 1\.00 GiB"):
        budget_check(scaling, on_gpu(on_cpu, host_bytes=2 * GIB))


def test_a_plan_of_something_else_is_refused(on_cpu: Plan) -> None:
    with pytest.raises(BudgetError, match="use_gpu=True, but the plan is of a CPU; plan with gpu="):
        budget_check(ScalingConfig(num_workers=2, use_gpu=True), on_cpu)
    with pytest.raises(BudgetError, match="use_gpu=False, but the plan is of a GPU; set use_gpu=True"):
        budget_check(ScalingConfig(num_workers=2), on_gpu(on_cpu))
    shards = on_gpu(on_cpu, num_workers=4)
    with pytest.raises(BudgetError, match=r"of 4 workers, .* plan with scaling\.num_workers=2"):
        budget_check(ScalingConfig(num_workers=(2, 8), use_gpu=True), shards)
