"""Amounts of memory as text, GPUs by name, and verdicts."""

from __future__ import annotations

import pytest

from raymem.errors import BudgetError
from raymem.memory.budget import Exceeds, Fits, bytes_text, parse_bytes, verdict
from raymem.memory.devices import GPUS, gpu_key, gpu_named


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


@pytest.mark.parametrize(
    ("written", "gpu"),
    [
        ("4090", "RTX4090"), ("RTX 4090", "RTX4090"), ("NVIDIA GeForce RTX 3090", "RTX3090"), ("h100", "H100-80GB"),
        ("a100-40", "A100-40GB"), ("A100 40 GB", "A100-40GB"), ("NVIDIA A100-SXM4-80GB", "A100-80GB"), ("l4", "L4"),
        ("l40s", "L40S"), ("Tesla-V100-SXM2-32GB", "V100-32GB"), ("NVIDIA H100 80GB HBM3", "H100-80GB"),
    ],
)  # fmt: skip
def test_gpus_are_known_by_the_names_that_people_and_drivers_use(written: str, gpu: str) -> None:
    assert gpu_key(written) == gpu


def test_every_gpu_is_known_by_its_own_name() -> None:
    assert {gpu_key(name) for name in GPUS} == set(GPUS)


def test_an_unknown_gpu_lists_the_nearest_and_the_known_ones() -> None:
    with pytest.raises(BudgetError, match=r"--gpu H1000: unknown; did you mean H100.*A100-40GB.*give --budget"):
        gpu_named("H1000")
    with pytest.raises(BudgetError, match="did you mean RTX4090 or RTX3090"):
        gpu_named("5090")


def test_verdicts_say_by_how_much_and_what_is_largest() -> None:
    terms = {"weights": 6, "activations": 9}

    def helping(term: str) -> tuple[str, ...]:
        return (f"less {term}",)

    assert verdict(10, 12, terms, helping) == Fits(headroom_bytes=2)
    assert verdict(15, 12, terms, helping) == Exceeds(3, "activations", ("less activations",))
