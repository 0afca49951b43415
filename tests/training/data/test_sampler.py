from __future__ import annotations

import numpy as np
import pytest

from raymem.errors import DataError
from raymem.training.data.packed.sampler import Sampler


def stream(sampler: Sampler, steps: int) -> list[int]:
    return [int(i) for step in range(steps) for i in sampler.ids(step)]


@pytest.mark.parametrize("global_batch", [1, 4, 7, 10, 33])
def test_every_row_once_per_epoch_across_batch_borders(global_batch: int) -> None:
    sampler = Sampler(3, [(10, 1.0)], global_batch)
    ids = stream(sampler, 40 // global_batch + 1)
    for epoch in range(len(ids) // 10):
        assert sorted(ids[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert sampler.ids(0).dtype == np.int64 and sampler.ids(0).shape == (global_batch,)


def test_the_order_does_not_depend_on_the_batch_size_or_the_way_there() -> None:
    sizes = [(10, 1.0), (6, 1.5)]
    assert stream(Sampler(3, sizes, 3), 20) == stream(Sampler(3, sizes, 5), 12)
    sampler = Sampler(3, sizes, 7)
    forward = [sampler.ids(step).tolist() for step in range(12)]
    backward = [sampler.ids(step).tolist() for step in reversed(range(12))]
    assert forward == backward[::-1]
    assert [Sampler(3, sizes, 7).ids(step).tolist() for step in range(12)] == forward


def test_epochs_and_seeds_differ() -> None:
    sampler = Sampler(3, [(100, 1.0)], 100)
    assert sampler.ids(0).tolist() != sampler.ids(1).tolist()
    assert sampler.ids(0).tolist() != Sampler(4, [(100, 1.0)], 100).ids(0).tolist()
    assert sampler.ids(0).tolist() != sorted(sampler.ids(0).tolist())


def test_weights_are_repeats_and_a_fresh_random_part() -> None:
    sampler = Sampler(0, [(10, 2.5), (20, 0.25), (4, 1.0)], 34)
    assert sampler.epoch_size == 25 + 5 + 4
    halves = set()
    for epoch in range(4):
        ids, counts = np.unique(sampler.ids(epoch), return_counts=True)
        seen = dict(zip(ids.tolist(), counts.tolist(), strict=True))
        assert sorted(seen[i] for i in range(10)) == [2] * 5 + [3] * 5
        assert sum(seen.get(i, 0) for i in range(10, 30)) == 5 and max(seen.get(i, 0) for i in range(10, 30)) == 1
        assert all(seen[i] == 1 for i in range(30, 34))
        halves.add(tuple(i for i in range(10, 30) if i in seen))
    assert len(halves) > 1


def test_steps_for_rounds_up_without_rounding_errors() -> None:
    sampler = Sampler(0, [(10, 1.0)], 5)
    assert [sampler.steps_for(epochs) for epochs in (0.01, 0.5, 0.6, 1, 3, 3.01)] == [1, 1, 2, 2, 6, 6]
    assert Sampler(0, [(10, 1.0)], 1).steps_for(0.1 + 0.2) == 3


def test_memory_is_bounded_by_the_epochs_at_hand() -> None:
    sampler = Sampler(0, [(10, 1.0)], 4)
    for step in range(100):
        sampler.ids(step)
    assert len(sampler._orders) <= 2


def test_a_weight_that_takes_nothing_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.train\[1\]\.weight=0\.01 takes none of its 20 rows .* at least 0\.05"):
        Sampler(0, [(10, 1.0), (20, 0.01)], 4)
