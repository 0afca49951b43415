"""Computes how many rows of each training source an epoch takes.

A source has n_i rows (or, by tokens, n_i tokens in them) and weight w_i. Without a mix it gives w_i of its rows. With
temperature T it gives the share

    p_i = w_i n_i^(1/T) / sum_j w_j n_j^(1/T)      of      N = sum_j w_j n_j

rows (or tokens), so an epoch is as long as without; T = 1 changes nothing, and for T -> infinity the p_i are the
weights. The share is handed on as a *weight* in rows, p_i N / n_i: all that the sampler and a resumed run
know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from raymem.errors import DataError
from raymem.recipe.data import Mix


def weights_in_rows(mix: Mix | None, sizes: Sequence[tuple[int, int, float]]) -> list[float]:
    """Compute how often an epoch takes each row of a source.

    Args:
        sizes: rows, tokens and weight of each.

    Raises:
        DataError: a source gives no row at all.
    """
    weights = [weight for _, _, weight in sizes]
    if mix is not None:
        amounts = [rows if mix.by == "rows" else tokens for rows, tokens, _ in sizes]
        exponents = [math.log(n) / mix.temperature for n in amounts]
        # Relative to the largest one, because n^(1/T) overflows for a small T.
        terms = [w * math.exp(e - max(exponents)) for w, e in zip(weights, exponents, strict=True)]
        total = math.fsum(w * n for w, n in zip(weights, amounts, strict=True))
        weights = [t / math.fsum(terms) * total / n for t, n in zip(terms, amounts, strict=True)]
    for index, ((rows, _, in_recipe), weight) in enumerate(zip(sizes, weights, strict=True)):
        if round(weight * rows) == 0:
            if mix is None:
                cause, cure = f"weight={in_recipe:g}", f"at least {1 / rows:.3g}"
            else:
                cause, cure = (
                    f"weight={in_recipe:g} with data.mix.temperature={mix.temperature:g}",
                    "more, or raise that",
                )
            raise DataError(
                f"data.train[{index}].{cause} takes none of its {rows} rows per epoch: raise it to {cure}, or remove "
                f"the source."
            )
    return weights
