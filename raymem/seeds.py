"""Owned randomness: every stream is a function of (seed, what it is for), never of who drew before."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *purpose: int | str) -> int:
    """Return a 63-bit seed for one purpose, for example ``derive(0, "dropout", step, rank)``."""
    text = "/".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a private generator; the global stream is untouched."""
    return torch.Generator(device).manual_seed(derive(seed, *purpose))
