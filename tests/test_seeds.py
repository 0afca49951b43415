from __future__ import annotations

import itertools

import torch

from raymem.seeds import derive, generator


def test_every_purpose_has_a_stream_of_its_own() -> None:
    seeds = [0, 1, 2**31 - 1]
    purposes: list[tuple[int | str, ...]] = [(), ("dropout", 0, 1), ("dropout", 1, 0), ("dropout", 1), ("init",)]
    found = {derive(seed, *purpose) for seed, purpose in itertools.product(seeds, purposes)}
    assert len(found) == len(seeds) * len(purposes)
    assert all(0 <= seed < 2**63 for seed in found), "what torch takes as a seed"


def test_a_generator_repeats_and_leaves_the_global_stream_alone() -> None:
    before = torch.random.get_rng_state()
    first, again = (torch.randn(100, generator=generator(3, "x", 4)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), before)
