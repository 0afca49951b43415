"""``rank: auto``: the smallest rank of every site under a tolerance, from one pass over real data.

The pass tries the very factorisation that training uses, at ranks spread evenly up to the highest allowed, and adds up
squared errors over its batches and over all ranks of the process group, so that every worker chooses the same.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from raymem.memory.target import holds_no_values, worth_visiting
from raymem.methods.loract.eligibility import is_plain, reason_to_keep
from raymem.methods.loract.packer import Key, Site, factorise, key_of, squared_error, weak_storage

CANDIDATES = 16
"""Ranks that are tried per site."""


def candidate_ranks(max_rank: int) -> list[int]:
    """At most :data:`CANDIDATES` ranks, rising evenly to ``max_rank``."""
    count = min(CANDIDATES, max_rank)
    return [math.ceil(max_rank * number / count) for number in range(1, count + 1)]


class Calibration:
    """Squared errors of all candidate ranks at all sites.

    Args:
        sites: in the same order on every process.
        power_iterations, seed: of the factorisation, as in training.
    """

    def __init__(self, sites: list[Site], power_iterations: int, seed: int) -> None:
        self._sites = sites
        self._power_iterations = power_iterations
        self._seed = seed
        self._sums: dict[str, torch.Tensor] = {}
        self._seen: dict[Key, StorageWeakRef] = {}

    def observe(self, tensor: torch.Tensor, site: Site) -> None:
        """Try every candidate on a tensor that nobody showed before."""
        if not is_plain(tensor) or key_of(tensor) in self._seen:
            return
        self._seen[key_of(tensor)] = weak_storage(tensor)
        if reason_to_keep(tensor, 1, site.hidden_size) is not None:
            return
        matrix_TN = tensor.detach().flatten(0, -2)
        squares = [matrix_TN.float().square().sum()]
        for rank in worth_visiting(candidate_ranks(site.rank)):
            wide = site.rank_of(matrix_TN.shape[1], rank)
            low_rank = factorise(matrix_TN, wide, self._power_iterations, self._seed, 0, site.name)
            squares.append(squared_error(matrix_TN, low_rank))
        sums = torch.stack(squares).double()
        self._sums[site.name] = self._sums.get(site.name, 0) + sums

    def choose(self, tolerance: float, device: torch.device) -> dict[str, int]:
        """Site -> rank; the highest where none is good enough or no tensor was seen, and in a plan. Collective.

        Args:
            device: where the process group's collectives run.
        """
        if any(holds_no_values(sums) for sums in self._sums.values()):
            return {site.name: site.rank for site in self._sites}
        width = 1 + max(len(candidate_ranks(site.rank)) for site in self._sites)
        table = torch.zeros(len(self._sites), width, dtype=torch.float64, device=device)
        for row, site in zip(table, self._sites, strict=True):
            sums = self._sums.get(site.name)
            if sums is not None:
                row[: len(sums)] = sums
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(table)
        chosen = {}
        for site, (energy, *errors) in zip(self._sites, table.tolist(), strict=True):
            good = [
                rank
                for rank, error in zip(candidate_ranks(site.rank), errors, strict=False)
                if energy > 0 and error <= tolerance**2 * energy
            ]
            chosen[site.name] = min(good, default=site.rank)
        return chosen
