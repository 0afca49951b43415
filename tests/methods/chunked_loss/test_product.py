"""The chunked cross-entropy of a plain head against the whole logits, and against a derivation of its own."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from raymem.memory.target import planned_for
from raymem.memory.trace import Tracer, attribute
from raymem.methods.chunked_loss import cross_entropy_sum, rows
from raymem.methods.chunked_loss.rows import rows_per_chunk

pytestmark = pytest.mark.numerics

N, H, V = 70, 24, 301
TOLERANCE = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-3, 1e-2)}
"""dtype -> relative difference of the loss, and of gradients in norm."""


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 positions, so that there are some, the last one smaller."""
    monkeypatch.setitem(rows.CHUNK_BYTES, "cpu", 1)


def make(dtype: torch.dtype, *, trained: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head, targets and every other position, with logits of size about 5."""
    source = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=source).to(dtype).requires_grad_()
    head = torch.randn(V, H, generator=source).to(dtype).requires_grad_(trained)
    targets = torch.randint(V, (N,), generator=source)
    return hidden, head, targets, torch.arange(0, N, 2)


def whole(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, head).float()
    return F.cross_entropy(logits[positions], targets[positions], reduction="sum")


def gradients(loss: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(0.37 * loss, [t for t in tensors if t.requires_grad]))


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    assert float((found.double() - expected.double()).norm()) <= tolerance * float(expected.double().norm())


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_loss_of_the_whole_logits(dtype: torch.dtype, trained: bool) -> None:
    given = make(dtype, trained=trained)
    expected, found = whole(*given), cross_entropy_sum(*given)
    for_loss, for_gradients = TOLERANCE[dtype]
    assert found.dtype == torch.float32 and found.ndim == 0
    assert_close(found, expected, for_loss)
    for ours, theirs in zip(gradients(found, *given[:2]), gradients(expected, *given[:2]), strict=True):
        assert_close(ours, theirs, for_gradients)
    with torch.no_grad():
        assert torch.equal(cross_entropy_sum(*given), found.detach())


def test_autocast_multiplies_in_bf16_and_sums_gradients_in_the_weights_precision() -> None:
    given = make(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = whole(*given), cross_entropy_sum(*given)
    assert_close(found, expected, 1e-3)
    for ours, theirs in zip(gradients(found, *given[:2]), gradients(expected, *given[:2]), strict=True):
        assert_close(ours, theirs, 1e-2)


def test_it_is_what_the_formulas_say() -> None:
    """dL/dz = softmax(z) - onehot(target), written down in double precision."""
    hidden, head, targets, positions = make(torch.float32)
    logits = hidden.detach().double()[positions] @ head.detach().double().T
    probabilities = torch.exp(logits - logits.logsumexp(1, keepdim=True))
    loss = -torch.log(probabilities[range(len(positions)), targets[positions]]).sum()
    grad_logits = probabilities.clone()
    grad_logits[range(len(positions)), targets[positions]] -= 1
    grad_hidden = torch.zeros(N, H, dtype=torch.float64)
    grad_hidden[positions] = grad_logits @ head.detach().double()
    found = cross_entropy_sum(hidden, head, targets, positions)
    assert float(found) == pytest.approx(float(loss), rel=1e-6)
    ours = torch.autograd.grad(found, [hidden, head])
    assert_close(ours[0].double(), grad_hidden, 1e-6)
    assert_close(ours[1].double(), grad_logits.T @ hidden.detach().double()[positions], 1e-6)


def test_large_logits_do_not_overflow_and_nan_is_not_hidden() -> None:
    hidden, head, targets, positions = make(torch.float32)
    large = (hidden.detach() * 1e4).requires_grad_()
    assert_close(cross_entropy_sum(large, head, targets, positions), whole(large, head, targets, positions), 1e-6)
    broken = hidden.detach().clone()
    broken[4, 0] = float("nan")
    assert torch.isnan(cross_entropy_sum(broken, head, targets, positions))
    assert torch.isfinite(cross_entropy_sum(broken, head, targets, positions + 1))  # it is no position that counts


def test_without_a_target_the_loss_is_zero_and_so_are_the_gradients() -> None:
    hidden, head, targets, positions = make(torch.float32)
    loss = cross_entropy_sum(hidden, head, targets, positions[:0])
    assert float(loss) == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, [hidden, head]))


def test_a_second_backward_pass_is_refused() -> None:
    given = make(torch.float32)
    loss = cross_entropy_sum(*given)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="earlier backward pass"):
        loss.backward()


def test_rows_follow_from_bytes_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setitem(rows.CHUNK_BYTES, "cpu", 64 * 1000 * 4)
    assert rows_per_chunk(1000, 4, cpu) == 64
    assert rows_per_chunk(1001, 4, cpu) == 48
    assert rows_per_chunk(1_000_000, 4, cpu) == rows.FEWEST_ROWS["cpu"]
    with planned_for("cuda"):
        assert rows_per_chunk(128256, 3, cpu) == 336


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_holds_less_than_a_sixteenth_of_the_logits(
    dtype: torch.dtype, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything above the tensors that it is given and the gradients that it gives, in bytes; 128k words."""
    monkeypatch.undo()
    positions, vocabulary, hidden_size = 1024, 131_072, 16
    # Processors without instructions for bf16 take long for its products; bytes are the same without values.
    values = nullcontext() if dtype == torch.float32 else FakeTensorMode()
    with values:
        hidden = torch.randn(positions, hidden_size, dtype=dtype, requires_grad=True)
        head = torch.randn(vocabulary, hidden_size, dtype=dtype).requires_grad_(trained)
        targets = torch.randint(vocabulary, (positions,))
    with values, Tracer() as tracer:
        for given in (hidden, head, targets):
            tracer.adopt(given, "weights", "")
        attribute("loss")
        loss = cross_entropy_sum(hidden, head, targets, torch.arange(positions))
        loss.backward()
    alive = peak = 0
    for change in tracer.changes:
        alive += change.num_bytes * (change.record.category == "loss")
        peak = max(peak, alive)
    gradients_bytes = 4 * head.numel() * trained + hidden.numel() * hidden.itemsize  # of the head in fp32 sums
    blocks_bytes = (head.numel() // 16 + vocabulary) * 4 * trained
    assert peak <= positions * vocabulary * dtype.itemsize // 16 + gradients_bytes + blocks_bytes
    assert peak > 16 * vocabulary * dtype.itemsize  # at least a chunk is there
