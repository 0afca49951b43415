"""MLorc as an ordinary optimizer: state, groups, schedulers, other people's loops, refusals, and bytes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raymem.errors import NonFiniteError
from raymem.memory.meter import PeakMeter
from raymem.methods.mlorc import MLorcAdamW, MLorcLion

BOTH = pytest.mark.parametrize("optimizer_class", [MLorcAdamW, MLorcLion])


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 100))


def loss_of(model: nn.Module, number: int, rows: slice = slice(None)) -> torch.Tensor:
    source = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 100, (16,), generator=source)[rows]
    return F.cross_entropy(model(ids), (ids + 1) % 100, reduction="sum") / 16


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> list[float]:
    losses = []
    for number in numbers:
        optimizer.zero_grad()
        loss = loss_of(model, number)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def transient_bytes(work: Callable[[], object]) -> int:
    """Highest use of memory during ``work`` above what was there before."""
    with PeakMeter(torch.device("cpu"), resident=list) as meter:
        work()
    assert meter.peak is not None
    return meter.peak.allocated_bytes


@BOTH
def test_three_lines_in_a_bare_loop(optimizer_class: Any) -> None:
    model = small_model()
    optimizer = optimizer_class(model.named_parameters(), lr=3e-3, rank=4)
    losses = steps(model, optimizer, range(60))
    assert losses[-1] < 0.8 * losses[0]


@BOTH
def test_in_the_trainer_of_transformers(optimizer_class: Any, llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(llama)
    optimizer = optimizer_class(model.named_parameters(), lr=1e-3, rank=4, min_dim=16)
    ids = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=8,
        logging_steps=1,
        save_steps=6,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert (tmp_path / "checkpoint-6" / "optimizer.pt").exists()


@BOTH
@pytest.mark.parametrize("factor_dtype", ["fp32", "bf16"])
def test_saved_state_continues_bit_for_bit(optimizer_class: Any, factor_dtype: str) -> None:
    model = small_model()
    optimizer = optimizer_class(model.named_parameters(), lr=3e-3, factor_dtype=factor_dtype)
    steps(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    resumed = optimizer_class(other.named_parameters(), lr=1.0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    steps(model, optimizer, range(5, 8))
    steps(other, resumed, range(5, 8))
    assert same(model, other)


@BOTH
def test_state_can_be_made_before_the_first_step(optimizer_class: Any) -> None:
    model, other = small_model(), small_model()
    optimizer, stepped = (optimizer_class(m.named_parameters(), rank=4, min_dim=8) for m in (model, other))
    before = copy.deepcopy(model.state_dict())
    optimizer.allocate_state()
    steps(other, stepped, range(1))
    made, expected = optimizer.state_dict()["state"], stepped.state_dict()["state"]
    assert made.keys() == expected.keys()
    for key, state in made.items():
        assert {n: (v.shape, v.dtype) for n, v in state.items()} == {
            n: (v.shape, v.dtype) for n, v in expected[key].items()
        }
        assert not any(value.any() for value in state.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "nothing was trained"
    steps(other, stepped, range(1, 3))
    optimizer.allocate_state()
    optimizer.load_state_dict(stepped.state_dict())
    model.load_state_dict(other.state_dict())
    steps(model, optimizer, range(3, 6))
    steps(other, stepped, range(3, 6))
    assert same(model, other)


def test_fp32_factors_of_bf16_parameters_are_loaded_as_fp32() -> None:
    def build() -> tuple[nn.Parameter, MLorcAdamW]:
        parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        return parameter, MLorcAdamW([parameter])

    parameter, optimizer = build()
    parameter.grad = torch.randn(64, 64, dtype=torch.bfloat16)
    optimizer.step()
    other, resumed = build()
    resumed.load_state_dict(optimizer.state_dict())
    for key, value in optimizer.state[parameter].items():
        assert resumed.state[other][key].dtype == torch.float32
        assert torch.equal(resumed.state[other][key], value)
        assert resumed.state[other][key].data_ptr() != value.data_ptr()


@BOTH
def test_only_the_seed_and_the_names_decide(optimizer_class: Any) -> None:
    models = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 9)):
        model = small_model()
        optimizer = optimizer_class(model.named_parameters(), lr=3e-3, seed=seed)
        torch.manual_seed(global_seed)
        before = torch.random.get_rng_state()
        steps(model, optimizer, range(3))
        assert torch.equal(torch.random.get_rng_state(), before)
        models.append(model)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


@BOTH
def test_schedulers_and_closures(optimizer_class: Any) -> None:
    model, other = small_model(), small_model()
    optimizer = optimizer_class(model.named_parameters(), lr=1e-2)
    manual = optimizer_class(other.named_parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for number in range(3):
        manual.param_groups[0]["lr"] = 1e-2 * 0.5**number
        steps(other, manual, range(number, number + 1))

        def closure(number: int = number) -> float:
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            return float(loss)

        assert optimizer.step(closure) > 0
        scheduler.step()
    assert same(model, other)


@BOTH
def test_accumulated_gradients_equal_the_large_batch(optimizer_class: Any) -> None:
    model, other = small_model(), small_model()
    whole, parts = (optimizer_class(m.named_parameters(), lr=3e-3) for m in (model, other))
    steps(model, whole, range(1))
    for rows in (slice(0, 8), slice(8, 16)):
        loss_of(other, 0, rows).backward()
    parts.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert (one - two).abs().max() < 1e-3 * 3e-3 or optimizer_class is MLorcLion
        assert ((one - two).abs() > 1e-5).float().mean() < 1e-2


@BOTH
def test_stepping_in_backward_gives_the_same_weights_and_keeps_no_gradient(optimizer_class: Any) -> None:
    model, other = small_model(), small_model()
    ordinary = optimizer_class(model.named_parameters(), lr=3e-3)
    layerwise = optimizer_class(other.named_parameters(), lr=3e-3)
    layerwise.step_in_backward()
    for number in range(4):
        ordinary.zero_grad()
        loss_of(model, number).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        ordinary.step()
        loss_of(other, number).backward()
        assert all(parameter.grad is None for parameter in other.parameters())
        torch.testing.assert_close(layerwise.grad_norm(), norm)
        layerwise.step()
    assert same(model, other)


def test_stepping_in_backward_refuses_accumulation_and_names_nan() -> None:
    model = small_model()
    optimizer = MLorcAdamW(model.named_parameters())
    optimizer.step_in_backward()
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match=r"4\.(weight|bias) got a second gradient before step\(\)"):
        loss_of(model, 1).backward()
    optimizer.step()
    with pytest.raises(NonFiniteError, match=r"gradient of 4\.(weight|bias) has NaN"):
        (loss_of(model, 2) * float("nan")).backward()


def test_stepping_in_backward_holds_one_gradient_at_a_time() -> None:
    peaks = {}
    for layerwise in (False, True):
        model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(8)))
        optimizer = MLorcAdamW(model.parameters())
        if layerwise:
            optimizer.step_in_backward()
        row = torch.randn(1, 512)

        def step(model: nn.Module = model, optimizer: MLorcAdamW = optimizer, row: torch.Tensor = row) -> None:
            model(row).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # the state is there from now on
        peaks[layerwise] = transient_bytes(step)
    one_gradient = 512 * 512 * 4
    assert peaks[False] > 8 * one_gradient
    assert peaks[True] < 3 * one_gradient


@pytest.mark.parametrize(("rank", "itemsize", "dtype"), [(1, 4, "fp32"), (4, 4, "fp32"), (32, 2, "bf16")])
@BOTH
def test_state_bytes(optimizer_class: Any, rank: int, itemsize: int, dtype: str) -> None:
    """Per moment r (m + n) elements, and one step count."""
    parameter = nn.Parameter(torch.randn(256, 384))
    optimizer = optimizer_class([parameter], rank=rank, factor_dtype=dtype)
    parameter.grad = torch.randn(256, 384)
    optimizer.step()
    state = optimizer.state[parameter]
    moments = 2 if optimizer_class is MLorcAdamW else 1
    num_bytes = sum(tensor.numel() * tensor.element_size() for key, tensor in state.items() if key != "step")
    assert num_bytes == moments * rank * (256 + 384) * itemsize == optimizer.summary().compressed_bytes
    assert state["step"].numel() == 1


@pytest.mark.parametrize(
    ("optimizer_class", "options", "dtype"),
    [
        (MLorcAdamW, {}, torch.float32),
        (MLorcAdamW, {"second_moment": "sqrt"}, torch.float32),
        (MLorcAdamW, {"rank": 16}, torch.float32),
        (MLorcAdamW, {"rank": 32}, torch.float32),
        (MLorcLion, {"rank": 32}, torch.bfloat16),
        (MLorcAdamW, {}, torch.bfloat16),
        (MLorcLion, {}, torch.float32),
    ],
)
def test_a_step_needs_less_than_a_quarter_of_the_matrix(optimizer_class: Any, options: Any, dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.randn(1024, 2816, dtype=dtype))
    optimizer = optimizer_class([parameter], **options)
    parameter.grad = torch.randn(1024, 2816, dtype=dtype)
    optimizer.step()
    assert 0 < transient_bytes(optimizer.step) < 0.25 * parameter.numel() * parameter.element_size()


def test_the_log_says_what_is_compressed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="raymem"):
        optimizer = MLorcAdamW(small_model().named_parameters())
    summary = optimizer.summary()
    assert (summary.compressed, summary.plain) == (3, 4)
    assert summary.compressed_bytes == 2 * 4 * 4 * ((100 + 64) + (64 + 128) + (128 + 100))
    assert summary.plain_bytes == 2 * 4 * (128 + 128 + 128 + 100)
    assert "moments of 3 matrices compressed" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: 0 must be at least 1"),
        ({"rank": -1}, "rank: -1 must be at least 1"),
        ({"rank": 65}, r"rank: 65 is above min\(m, n\) = 64 of 0.weight \[100, 64\]"),
        ({"betas": (0.9, 1.0)}, r"betas: \(0.9, 1.0\) must both lie in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, "betas: "),
        ({"lr": -1.0}, "lr: -1.0 must not be negative"),
        ({"weight_decay": -0.1}, "weight_decay: -0.1"),
        ({"oversampling": -1}, "oversampling: -1"),
        ({"min_dim": 0}, "min_dim: 0"),
    ],
)
@BOTH
def test_bad_options(optimizer_class: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer_class(small_model().named_parameters(), **options)


def test_bad_options_of_adamw_and_of_a_group() -> None:
    parameters = list(small_model().parameters())
    with pytest.raises(ValueError, match=r"eps: 0\.0 must be positive"):
        MLorcAdamW(parameters, eps=0.0)
    with pytest.raises(ValueError, match="second_moment: 'cube' is none of raw, sqrt"):
        MLorcAdamW(parameters, second_moment="cube")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank: 0 must be at least 1"):
        MLorcAdamW([{"params": parameters, "rank": 0}])
    with pytest.raises(TypeError, match="maximize"):
        MLorcAdamW(parameters, maximize=True)  # type: ignore[call-arg]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@BOTH
def test_a_bad_gradient_is_named_before_anything_is_written(optimizer_class: Any, bad: float) -> None:
    model = small_model()
    optimizer = optimizer_class(model.named_parameters())
    steps(model, optimizer, range(2))
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    gradient = model.get_parameter("4.weight").grad
    assert gradient is not None
    gradient[3, 3] = bad
    with pytest.raises(NonFiniteError, match=r"gradient of 4\.weight has NaN or infinity; nothing was updated"):
        optimizer.step()
    assert same(model, before)
    for key, saved in state["state"].items():
        for name, value in saved.items():
            assert torch.equal(optimizer.state_dict()["state"][key][name], value)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(100, 64, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"gradient is sparse; use nn.Embedding\(sparse=False\)"):
        MLorcAdamW(embedding.parameters()).step()


def test_state_of_another_kind_is_refused() -> None:
    model = small_model()
    optimizer = MLorcAdamW(model.named_parameters())
    steps(model, optimizer, range(1))
    saved = optimizer.state_dict()
    wider = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 192), nn.LayerNorm(192), nn.GELU(), nn.Linear(192, 100))
    with pytest.raises(ValueError, match=r"1\.weight: the state has .*\(128, 4\).* needs .*\(192, 4\)"):
        MLorcAdamW(wider.named_parameters()).load_state_dict(saved)
    with pytest.raises(ValueError, match="doesn't match the size"):
        MLorcAdamW(model.get_submodule("1").parameters()).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"0\.weight: the state has"):
        MLorcLion(model.named_parameters()).load_state_dict(saved)
    foreign = torch.optim.AdamW(model.parameters()).state_dict()
    with pytest.raises(ValueError, match="version None, this raymem reads 1"):
        MLorcAdamW(model.named_parameters()).load_state_dict(foreign)
