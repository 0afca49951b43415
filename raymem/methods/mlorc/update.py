"""One optimizer step of one matrix whose moments are low-rank factors: pure functions, no state of their own.

The matrix passes by in row blocks. Of each block the moments are reconstructed from the factors, updated with the
gradient, applied to the weights, and taken into the sketch from which the next factors come. No temporary is larger
than a block, apart from the sketches (M x K and K x N).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw

from raymem.linalg import LowRank, StreamingSketch, expand_rows, orthonormalize, row_chunks
from raymem.memory.target import device_kind

# M rows, N columns, C rows of a block, R rank, K = R + P columns of a sketch, P of them fresh

BLOCK_BYTES = {"cpu": 1 << 19, "cuda": 1 << 26}
"""At most: on CPU the buffers of a block stay in a core's cache, on GPU a kernel's launch must not count."""
COLD_PASSES = 2
"""Power iterations before the first step."""
TRANSIENT_SHARE = 0.235
"""Share of the matrix's bytes below which sketches and blocks together should stay."""
LEAST_ELEMENTS = 1 << 17
"""Of a matrix whose room the buffers take, whatever the sketches leave: smaller blocks only cost time."""
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Matrix:
    """This rank's rows of a weight and of its gradient, which a step works on."""

    weight_MN: torch.Tensor
    """Any float dtype; changed in place."""
    grad_MN: torch.Tensor
    sum_over_ranks: Callable[[torch.Tensor], object] | None = None
    """Adds a tensor up, in place, over the ranks that hold other rows; None if this one has all."""
    round_into: Callable[[torch.Tensor, torch.Tensor], object] = torch.Tensor.copy_
    """``round_into(weights, values)`` writes fp32 values into weights of lower precision."""
    sketch_width: int = 0
    """Columns of all sketches of a step together."""

    def blocks(self) -> Iterator[slice]:
        """Row ranges to work through, of which the buffers take the room that the sketches leave."""
        rows, columns = self.weight_MN.shape
        matrix_bytes = self.weight_MN.numel() * self.weight_MN.element_size()
        left_bytes = int(TRANSIENT_SHARE * matrix_bytes) - 4 * self.sketch_width * (rows + 2 * columns)
        # Of lower precision, weights and gradient need fp32 buffers too.
        least_bytes = max(matrix_bytes // 32, LEAST_ELEMENTS * self.weight_MN.element_size())
        buffer_bytes = max(left_bytes, least_bytes) // (2 if self.weight_MN.dtype == torch.float32 else 4)
        most_bytes = BLOCK_BYTES.get(device_kind(self.weight_MN.device), BLOCK_BYTES["cuda"])
        return row_chunks(rows, 4 * columns, min(most_bytes, buffer_bytes))

    def buffer(self) -> torch.Tensor:
        """Room for the values of any block, fp32."""
        rows = max((rows.stop - rows.start for rows in self.blocks()), default=0)
        return torch.empty(rows, self.weight_MN.shape[1], device=self.weight_MN.device)

    def store(self, rows: slice, weight_CN: torch.Tensor) -> None:
        """Write fp32 values of a block back, unless they are the weights themselves."""
        if self.weight_MN.dtype != torch.float32:
            self.round_into(self.weight_MN[rows], weight_CN)


@dataclass(frozen=True)
class Momentum:
    """A compressed moment on its way through a step."""

    factors: LowRank
    """Zero before the first step; overwritten at its end."""
    fresh_columns: int
    """P, random columns of the sketch beside last step's directions."""
    source: torch.Generator
    """Draws those columns; on the CPU, so that they do not depend on the device."""

    def sketch(
        self, matrix: Matrix, cold_values: Callable[[torch.Tensor], torch.Tensor], *, cold: bool
    ) -> StreamingSketch:
        """Return the sketch along last step's directions and the fresh ones.

        Before the first step there are none; passes over the gradient find some, by power iteration.

        Args:
            cold_values: the gradient [C, N] -> what the moment will be proportional to.
        """
        right_RN, num_rows = self.factors.right_RN.float(), matrix.weight_MN.shape[0]
        rank, columns = right_RN.shape
        drawn = self.fresh_columns + (rank if cold else 0)
        fresh_NP = torch.randn(columns, drawn, generator=self.source).to(right_RN.device)
        if not cold:
            return StreamingSketch(_test_matrix(right_RN, fresh_NP), num_rows)
        cold_factors = LowRank(self.factors.left_MR, torch.empty_like(right_RN))
        test_KN = orthonormalize(fresh_NP).mT
        for _ in range(COLD_PASSES):
            sketch = StreamingSketch(test_KN, num_rows)
            for rows in matrix.blocks():
                sketch.add(rows, cold_values(matrix.grad_MN[rows].float()))
            write_factors(matrix, [(sketch, cold_factors)])
            test_KN = _test_matrix(cold_factors.right_RN, fresh_NP[:, rank:])
        return StreamingSketch(test_KN, num_rows)


def _test_matrix(right_RN: torch.Tensor, fresh_NP: torch.Tensor) -> torch.Tensor:
    """Return rows [K, N] of length one: known directions, and fresh ones orthogonal to them.

    Along what is known already the fresh columns would all see the same large singular values, and what is new would
    drown in rounding errors.
    """
    known_NR = right_RN.mT.contiguous()
    # A direction that has died out would stay dead; a unit vector in its place finds what is there by now.
    known_NR.diagonal().add_((known_NR == 0).all(dim=0))
    known_NR /= known_NR.norm(dim=0)
    fresh_NP = torch.addmm(fresh_NP, known_NR, known_NR.mT @ fresh_NP, alpha=-1)
    return torch.cat([known_NR.mT, (fresh_NP / fresh_NP.norm(dim=0)).mT])


def fused_adamw(
    weight: torch.Tensor,
    grad: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    step: torch.Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW exactly as torch has it, in place and in one pass over fp32 tensors of one shape.

    Args:
        step: 0-dim fp32, number of this step, from 1.
    """
    adamw(
        [weight],
        [grad],
        [first],
        [second],
        [],
        [step - 1],  # the function counts it itself
        fused=True,  # needs no temporaries, and never asks the host for the step
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def adamw_step(
    matrix: Matrix,
    first: Momentum,
    second: Momentum,
    step: torch.Tensor,
    *,
    cold: bool,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    root: bool,
) -> None:
    """AdamW with both moments in factors (MLorc, algorithm 1); weights and factors are changed in place.

    Args:
        step: 0-dim fp32 on the device of the matrix: number of this step, from 1.
        cold: this is the first step.
        root: ``second`` stands for the root of the second moment.
    """
    first_sketch = first.sketch(matrix, lambda grad_CN: grad_CN, cold=cold)
    second_sketch = second.sketch(matrix, torch.abs if root else torch.square, cold=cold)
    right_first_RN, right_second_RN = first.factors.right_RN.float(), second.factors.right_RN.float()
    moment_buffer, square_buffer = matrix.buffer(), matrix.buffer()
    cut = torch.ones_like(step) if root or cold else mean_of_cut(matrix, second.factors, square_buffer)
    for rows in matrix.blocks():
        weight_CN, grad_CN = matrix.weight_MN[rows].float(), matrix.grad_MN[rows].float()
        moment_CN, square_CN = moment_buffer[: len(grad_CN)], square_buffer[: len(grad_CN)]
        expand_rows(first.factors.left_MR[rows].float(), right_first_RN, moment_CN)
        # Dividing by `cut` turns the threshold into 1, a number that the host knows without asking the device.
        expand_rows(second.factors.left_MR[rows].float() / cut, right_second_RN, square_CN)
        if root:
            square_CN.square_()
        else:
            torch.threshold_(square_CN, -_TINY, 1.0).mul_(cut)
        fused_adamw(
            weight_CN, grad_CN, moment_CN, square_CN, step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
        matrix.store(rows, weight_CN)
        first_sketch.add(rows, moment_CN)
        second_sketch.add(rows, square_CN.sqrt_() if root else square_CN)
        del weight_CN, grad_CN, moment_CN, square_CN
    del moment_buffer, square_buffer  # what follows needs the room
    write_factors(matrix, [(first_sketch, first.factors), (second_sketch, second.factors)])


def lion_step(
    matrix: Matrix,
    momentum: Momentum,
    *,
    cold: bool,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    """Lion with its momentum in factors (MLorc, algorithm 2); weights and factors are changed in place.

    Args:
        cold: this is the first step.
    """
    beta1, beta2 = betas
    sketch = momentum.sketch(matrix, lambda grad_CN: grad_CN, cold=cold)
    right_RN = momentum.factors.right_RN.float()
    buffer, direction_buffer = matrix.buffer(), matrix.buffer()
    for rows in matrix.blocks():
        weight_CN, grad_CN = matrix.weight_MN[rows].float(), matrix.grad_MN[rows].float()
        moment_CN = expand_rows(momentum.factors.left_MR[rows].float(), right_RN, buffer[: len(grad_CN)])
        direction_CN = torch.lerp(moment_CN, grad_CN, 1 - beta1, out=direction_buffer[: len(grad_CN)]).sign_()
        if weight_decay:
            weight_CN.mul_(1 - lr * weight_decay)
        weight_CN.add_(direction_CN, alpha=-lr)
        matrix.store(rows, weight_CN)
        sketch.add(rows, moment_CN.lerp_(grad_CN, 1 - beta2))
        del weight_CN, grad_CN, moment_CN, direction_CN
    del buffer, direction_buffer  # what follows needs the room
    write_factors(matrix, [(sketch, momentum.factors)])


def mean_of_cut(matrix: Matrix, factors: LowRank, buffer: torch.Tensor) -> torch.Tensor:
    """Mean magnitude of the negative entries of a reconstructed second moment, 0-dim; 1 if there are none.

    A second moment is never negative, its low-rank approximation is. MLorc cuts what is negative off and puts this
    mean in its place.
    """
    sum_and_count = torch.zeros(2, dtype=torch.float64, device=buffer.device)
    right_RN = factors.right_RN.float()
    for rows in matrix.blocks():
        left_CR = factors.left_MR[rows].float()
        negative_CN = expand_rows(left_CR, right_RN, buffer[: len(left_CR)]).clamp_max_(0)
        sum_and_count[0] -= negative_CN.sum()
        sum_and_count[1] -= negative_CN.sign_().sum()
    if matrix.sum_over_ranks is not None:
        matrix.sum_over_ranks(sum_and_count)
    total, count = sum_and_count.float()
    return torch.where(count > 0, total / count, 1.0)


def write_factors(matrix: Matrix, sketches: list[tuple[StreamingSketch, LowRank]]) -> None:
    """Turn finished sketches into factors."""
    grams = [sketch.gram() for sketch, _ in sketches]
    if matrix.sum_over_ranks is not None:
        for part in (*grams, *(sketch.sum_KN for sketch, _ in sketches)):
            matrix.sum_over_ranks(part)
    for (sketch, factors), gram_KK in zip(sketches, grams, strict=True):
        sketch.write_factors(gram_KK, factors)
