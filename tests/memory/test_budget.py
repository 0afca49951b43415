"""Amounts of memory as text, GPUs by name, and verdicts."""

from __future__ import annotations

import pytest

from raymem.errors import BudgetError
from raymem.memory.budget import Exceeds, Fits, bytes_text, parse_bytes, verdict
from raymem.memory.devices import GPUS, gpu_named
from raymem.planner.help import would_help


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("24GiB", 24 << 30), ("80 GB", 80 * 10**9), ("512mib", 512 << 20), ("1.5KiB", 1536), ("123", 123)],
)
def test_amounts(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "24 gigs", "-1GiB", "0", "0.1"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(ValueError, match=r"memory|byte"):
        parse_bytes(text)


def test_amounts_for_people() -> None:
    assert [bytes_text(size) for size in (5, 2048, 3 << 20, 1 << 30)] == ["5 B", "2.00 KiB", "3.00 MiB", "1.00 GiB"]


def test_gpus_are_found_whatever_the_spelling() -> None:
    assert gpu_named("h100-80gb") is gpu_named("H100 80GB") is GPUS["H100-80GB"]


def test_an_unknown_gpu_lists_the_known_ones() -> None:
    with pytest.raises(BudgetError, match=r"--gpu H1000: unknown; .*A100-40GB.*H100-80GB.*give --budget"):
        gpu_named("H1000")


def test_verdicts_say_by_how_much_and_what_is_largest() -> None:
    terms = {"weights": 6, "activations": 9}
    assert verdict(10, 12, terms, would_help) == Fits(headroom_bytes=2)
    exceeds = verdict(15, 12, terms, would_help)
    assert isinstance(exceeds, Exceeds)
    assert (exceeds.by_bytes, exceeds.largest_term) == (3, "activations")
    assert exceeds.would_help[:3] == ("train.micro_batch=1", "activations=checkpoint", "activations=loract")
