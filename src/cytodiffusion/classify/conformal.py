"""Sets of classes that hold the true one as often as was asked.

LAC: on held-out cells the score of a cell is 1 - p(true class). With q the k-th smallest of n scores,
k = ceil((n + 1) coverage), the set of a new cell is every class with 1 - p <= q. Over cells like the
held-out ones it holds the true class with probability `coverage` or a little more; exactly so if the
scores were exchangeable, while here those of held-out cells come from fits without them, and the same cells
chose the checkpoint, the trials and when to stop. A set can be
empty where no class is plausible enough.

By class: a q for each class, from its own held-out cells. Then each class is covered as often as was
asked, rare ones too, and the sets are a little larger.

Where classes come up more or less often than among the held-out cells, each of those cells counts by
how much more often its class now comes up, w_k; a new cell of class k would add w_k. So q is the
smallest score at which  sum of w over scores <= q  >=  coverage (sum of all w + w_k). Where answers are
restricted, the other classes have w = 0.

Source: Sadinle, Lei and Wasserman 2019, Least Ambiguous Set-Valued Classifiers, arXiv 1609.00451;
Podkopaev and Ramdas 2021, Distribution-free uncertainty quantification under label shift, 2103.03323.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from cytodiffusion.errors import SettingsError

Sets = Literal["all", "class"]  # covered over all cells, or class by class


def check_coverage(coverage: float) -> None:
    """Raises SettingsError for what is no share between 0 and 1."""
    if not 0 < coverage < 1:
        raise SettingsError(f"Coverage must lie between 0 and 1, not {coverage}; try 0.95.")


def check_sets(sets: str) -> None:
    """Raises SettingsError for a kind of set that there is not."""
    if sets not in get_args(Sets):
        raise SettingsError(f"There are no sets '{sets}'. There are: {', '.join(get_args(Sets))}.")


def threshold(
    scores: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], own: float, coverage: float
) -> float:
    """q: the largest score that is still let in; `own` is the weight that the new cell would add.

    1.0 (every class) when there are too few scores. All weights 1 give the k-th smallest score.
    """
    check_coverage(coverage)
    order = np.argsort(scores)
    reached = np.cumsum(weights[order])
    wanted = coverage * (weights.sum() + own)
    rank = int(np.searchsorted(reached, wanted))
    return 1.0 if rank >= len(scores) else float(scores[order][rank])


def thresholds(
    probabilities: Float[np.ndarray, "n k"],
    truth: Int[np.ndarray, " n"],
    coverage: float,
    sets: Sets = "all",
    ratio: Float[np.ndarray, " k"] | None = None,
) -> Float[np.ndarray, " k"]:
    """q for each class, from held-out cells; `ratio`: how much more often each class now comes up."""
    check_sets(sets)
    scores, classes = lac_scores(probabilities, truth), probabilities.shape[1]
    w = np.ones(classes) if ratio is None else ratio

    def one(k: int) -> float:
        part = truth == k if sets == "class" else np.ones(len(truth), dtype=bool)
        return threshold(scores[part], w[truth[part]], float(w[k]), coverage)

    return np.array([one(k) for k in range(classes)])


def lac_scores(
    probabilities: Float[np.ndarray, "n k"], truth: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """1 - probability of the true class."""
    return 1 - probabilities[np.arange(len(truth)), truth]


def lac_sets(
    probabilities: Float[np.ndarray, "n k"], limits: Float[np.ndarray, " k"]
) -> Bool[np.ndarray, "n k"]:
    """Which classes belong to the set of each cell."""
    return 1 - probabilities <= limits
