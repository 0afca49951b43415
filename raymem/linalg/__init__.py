"""Low-rank approximation: orthonormal bases, range finders and the factors that they give."""

from raymem.linalg.lowrank import LowRank, expand_rows, row_chunks
from raymem.linalg.orthonormal import orthonormalize, whitening
from raymem.linalg.range_finder import row_sampled_qb
from raymem.linalg.rounding import stochastic_round
from raymem.linalg.streaming import StreamingSketch
from raymem.linalg.truncate import leading_directions

__all__ = [
    "LowRank",
    "StreamingSketch",
    "expand_rows",
    "leading_directions",
    "orthonormalize",
    "row_chunks",
    "row_sampled_qb",
    "stochastic_round",
    "whitening",
]
