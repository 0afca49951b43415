"""Proof by machine that a coupling is right, before anything large is read.

A model whose pruned units are zero computes the same as the model without them exactly if the rows and columns of a
unit are what the coupling says. So three layers of the same class, tiny but with the ratios of the real config, are
built with random weights, pruned, and compared. It takes about a second on one core.
"""

from __future__ import annotations

from typing import Any

import torch

from raymem.errors import ModelError
from raymem.methods.loram.coupling import Coupling, couple
from raymem.methods.loram.index_map import Kept, put, take
from raymem.methods.loram.nonuniform import from_config, with_counts
from raymem.methods.tiny_model import VOCABULARY, random_weights, tiny_config
from raymem.seeds import generator

_LENGTH = 12
_TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit. Norms compute in fp32; a wrong spec is off by 0.1."""


def validate_coupling(config: Any) -> float:
    """Check the coupling of a config's architecture on a tiny clone.

    Returns:
        The largest difference of logits between the pruned clone and the one with zeros, relative to the largest logit.

    Raises:
        ModelError: unknown architecture, or the coupling does not hold for this config.
    """
    small = tiny_config(config)
    coupling = couple(small)
    kept: dict[int, dict[str, list[int]]] = {}
    depth = small.num_hidden_layers
    for layer in range(min(1, depth - 1), depth):
        kept[layer] = {group.name: _some(group.num_units, layer, group.name) for group in coupling.groups}
    full = _random_model(small)
    state = full.state_dict()
    try:
        pruned = from_config(with_counts(small, {i: {g: len(u) for g, u in k.items()} for i, k in kept.items()}))
        pruned.load_state_dict({name: take(coupling, kept, name, value) for name, value in state.items()})
        ids = torch.randint(3, VOCABULARY, (2, _LENGTH), generator=generator(0, "loram", "validate"))
        original, actual = _logits(full, ids), _logits(pruned.eval(), ids)
        full.load_state_dict(zeroed(coupling, kept, state))
        expected = _logits(full, ids)
    except (RuntimeError, AttributeError, KeyError) as error:
        raise ModelError(f"{_refused(config)}: a pruned clone cannot be built or run ({error})") from None
    difference = float((actual - expected).abs().max() / expected.abs().max())
    pruning_matters = float((original - expected).abs().max() / expected.abs().max()) > 100 * _TOLERANCE
    if not difference <= _TOLERANCE or not pruning_matters:
        raise ModelError(
            f"{_refused(config)}: on a clone of 3 layers, removing units and zeroing them differ by {difference:.1e} "
            f"of the largest logit (at most {_TOLERANCE:.0e} is right)"
        )
    return difference


def zeroed(coupling: Coupling, kept: Kept, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a full state dict with zeros in all rows, columns and biases of pruned units."""
    return {name: put(coupling, kept, name, take(coupling, kept, name, value)) for name, value in state.items()}


def _some(num_units: int, layer: int, group: str) -> list[int]:
    """Return a random non-empty proper subset where there is one; more than half, so that an order can go wrong."""
    order = torch.randperm(num_units, generator=generator(0, "loram", "validate", layer, group))
    return sorted(order[: max(1, num_units - num_units // 4 - layer + 1)].tolist())


def _random_model(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return random_weights(from_config(config))


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits.double()
    return logits


def _refused(config: Any) -> str:
    return f"model.name: the coupling of model_type {config.model_type!r} does not hold for this config"
