"""Several ranks: replicas stay the same bit for bit, and row shards train as one process does."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from raymem.methods.mlorc import MLorcAdamW, MLorcLion
from tests.helpers.support import in_processes

CLASSES = {"adamw": MLorcAdamW, "lion": MLorcLion}
ROWS = 16


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    # 99 rows on two ranks are 50 and 49
    return nn.Sequential(nn.Embedding(99, 64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 99))


def batch(number: int) -> torch.Tensor:
    return torch.randint(0, 99, (ROWS,), generator=torch.Generator().manual_seed(number))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    """Each rank has its part of the rows; the mean over ranks is the mean over rows."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for number in numbers:
        ids = batch(number)[rank::world]
        F.cross_entropy(model(ids), (ids + 1) % 99).backward()
        optimizer.step()
        optimizer.zero_grad()


def results(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = whole(parameter)
        found |= {f"{name}.{key}": whole(value) for key, value in optimizer.state[parameter].items()}
    return found


def replicas(kind: str, steps: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(dist.get_rank())  # nothing may depend on the global stream
    model = model_of()
    optimizer = CLASSES[kind](model.named_parameters(), lr=3e-3)
    torch.manual_seed(100 + dist.get_rank())
    advance(DistributedDataParallel(model), optimizer, range(steps))
    return results(model, optimizer)


def sharded(kind: str, steps: range, in_backward: bool) -> dict[str, torch.Tensor]:
    model = model_of()
    for layer in (model[1], model[3]):
        fully_shard(layer)
    fully_shard(model)
    optimizer = CLASSES[kind](model.named_parameters(), lr=3e-3)
    if in_backward:
        optimizer.step_in_backward()
    advance(model, optimizer, steps)
    return results(model, optimizer)


def alone(kind: str, steps: int) -> dict[str, torch.Tensor]:
    model = model_of()
    optimizer = CLASSES[kind](model.named_parameters(), lr=3e-3)
    advance(model, optimizer, range(steps))
    return results(model, optimizer)


@pytest.mark.parametrize("kind", CLASSES)
def test_replicas_hold_the_same_bits_after_50_steps(kind: str, tmp_path: Path) -> None:
    first, second = in_processes(replicas, 2, tmp_path, kind, 50)
    assert any(name.endswith(".left") for name in first)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("in_backward", [False, True], ids=["step", "in backward"])
def test_row_shards_train_as_one_process_does(in_backward: bool, tmp_path: Path) -> None:
    first, second = in_processes(sharded, 2, tmp_path, "adamw", range(4), in_backward)
    expected = alone("adamw", 4)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    for name, value in expected.items():
        if name.endswith((".left", ".right")):
            continue  # their directions may turn within a plane of equal singular values; their product may not
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=2e-5)
    for moment in ("exp_avg", "exp_avg_sq"):
        left, right = (f"1.weight.{moment}.{side}" for side in ("left", "right"))
        torch.testing.assert_close(first[left] @ first[right], expected[left] @ expected[right], rtol=1e-3, atol=1e-6)


def save_and_continue(path: str) -> dict[str, torch.Tensor]:
    """On two ranks: 3 steps, save through torch's own state-dict interface as one whole, 3 steps more."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    model = model_of()
    fully_shard(model)
    optimizer = MLorcAdamW(model.named_parameters(), lr=3e-3)
    advance(model, optimizer, range(3))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    weights = {name: whole(parameter) for name, parameter in model.named_parameters()}
    if dist.get_rank() == 0:
        torch.save({"optimizer": state, "weights": weights}, path)
    advance(model, optimizer, range(3, 6))
    return results(model, optimizer)


def test_saved_on_two_ranks_goes_on_in_one_process(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    expected = in_processes(save_and_continue, 2, tmp_path, str(path))[0]
    saved = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
    model = model_of(seed=1)
    model.load_state_dict(saved["weights"])
    optimizer = MLorcAdamW(model.named_parameters(), lr=3e-3)
    set_optimizer_state_dict(model, optimizer, saved["optimizer"])
    assert optimizer.param_groups[0]["step"] == 3
    advance(model, optimizer, range(3, 6))
    for name, value in results(model, optimizer).items():
        if not name.endswith((".left", ".right")):
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5)


def refuse_in_backward() -> str:
    try:
        MLorcAdamW(model_of().parameters()).step_in_backward()
    except ValueError as error:
        return str(error)
    return ""


def test_stepping_in_backward_is_refused_for_replicas(tmp_path: Path) -> None:
    messages = in_processes(refuse_in_backward, 2, tmp_path)
    assert all("DDP averages gradients" in message for message in messages)
