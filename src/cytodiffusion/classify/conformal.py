"""Sets of classes that hold the true one as often as was asked.

LAC: on held-out cells the score of a cell is 1 - p(true class). With q the k-th smallest of n scores,
k = ceil((n + 1) coverage), the set of a new cell is every class with 1 - p <= q. It holds the true
class with probability at least `coverage`, over cells like the held-out ones; it can be empty where
no class is plausible enough.

Source: Sadinle, Lei and Wasserman 2019, Least Ambiguous Set-Valued Classifiers, arXiv 1609.00451.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from cytodiffusion.errors import SettingsError


def check_coverage(coverage: float) -> None:
    """Raises SettingsError for what is no share between 0 and 1."""
    if not 0 < coverage < 1:
        raise SettingsError(f"Coverage must lie between 0 and 1, not {coverage}; try 0.95.")


def lac_threshold(scores: Float[np.ndarray, " n"], coverage: float) -> float:
    """q: the largest score that is still let in. 1.0 (every class) when there are too few scores."""
    check_coverage(coverage)
    rank = int(np.ceil((len(scores) + 1) * coverage))
    return 1.0 if rank > len(scores) else float(np.sort(scores)[rank - 1])


def lac_scores(
    probabilities: Float[np.ndarray, "n k"], truth: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """1 - probability of the true class."""
    return 1 - probabilities[np.arange(len(truth)), truth]


def lac_sets(probabilities: Float[np.ndarray, "n k"], threshold: float) -> Bool[np.ndarray, "n k"]:
    """Which classes belong to the set of each cell."""
    return 1 - probabilities <= threshold
