"""How far can a number measured on these cells be trusted?

A share of cells has an exact interval: with x successes in n (Clopper and Pearson 1934)

    low = the 2.5 % point of Beta(x, n - x + 1),    high = the 97.5 % point of Beta(x + 1, n - x)

A mean of shares, as balanced accuracy is one of recalls, has one made of these: the distances from the
shares to the ends of their intervals, weighed, add up in squares (Zou and Donner 2008, Statistics in
Medicine 27, 1693).

Any other number is measured again on resamples of the cells (the stratified bootstrap, Efron and
Tibshirani 1993), drawn within each class so that the mix of classes stays what it was; 2.5 % of
what comes out lies below the interval and 2.5 % above.

A `Measure` takes samples, an array of row numbers (draws, n), and gives one value a draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import betaincinv

from cytodiffusion.errors import DataError

Sample: TypeAlias = Int[np.ndarray, "draws n"]
Measure: TypeAlias = Callable[[Sample], np.ndarray]

LEVEL = 0.95
DRAWS = 1000  # resamples behind an interval
AT_ONCE = 1_000_000  # cells resampled at a time: bounds the memory at about 100 MB


def binomial_interval(successes: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Exact (Clopper-Pearson) interval of a share, in [0, 1]; (0, 1) when nothing was counted."""
    if not 0 <= successes <= n:
        raise DataError(f"{successes} successes in {n} trials is impossible: give 0 to {n}.")
    tail = (1 - level) / 2
    low = betaincinv(successes, n - successes + 1, tail) if successes > 0 else 0.0
    high = betaincinv(successes + 1, n - successes, 1 - tail) if successes < n else 1.0
    return float(low), float(high)


def mean_interval(
    successes: Int[np.ndarray, " k"],
    n: Int[np.ndarray, " k"],
    weights: Float[np.ndarray, " k"] | None = None,
) -> tuple[float, float]:
    """95 % interval of the mean of independent shares, all of n > 0; `weights` sum to 1.

    Resamples of a class of one or three cells hardly differ, and would promise too much.
    """
    weights = np.full(len(n), 1 / len(n)) if weights is None else weights
    ends = [binomial_interval(*pair) for pair in zip(successes.tolist(), n.tolist(), strict=True)]
    shares, (low, high) = successes / n, np.array(ends).T
    mean = float(weights @ shares)
    below, above = (np.linalg.norm(weights * (shares - end)) for end in (low, high))
    return max(0.0, mean - float(below)), min(1.0, mean + float(above))


def balanced_interval(
    truth: Int[np.ndarray, " n"], right: Bool[np.ndarray, " n"]
) -> tuple[float, float]:
    """95 % interval of balanced accuracy: the mean of the recalls of the classes that there are."""
    present = np.unique(truth)
    counts = np.bincount(truth)[present]
    return mean_interval(np.bincount(truth[right], minlength=truth.max() + 1)[present], counts)


def share(name: str, happened: Bool[np.ndarray, " n"]) -> dict[str, Any]:
    """A share of cells with its exact 95 % interval, and how many there are."""
    events, n = int(happened.sum()), len(happened)
    return {name: events / n, f"{name}_ci95": list(binomial_interval(events, n)), f"{name}_n": n}


def bootstrap(
    truth: Int[np.ndarray, " n"], measures: Mapping[str, Measure], *, seed: int, draws: int = DRAWS
) -> dict[str, Float[np.ndarray, " draws"]]:
    """The value of every measure in every resample; all measures see the same resamples."""
    samples = _resamples(truth, seed, draws)
    parts = [[measure(sample) for measure in measures.values()] for sample in samples]
    return dict(zip(measures, map(np.concatenate, zip(*parts, strict=True)), strict=True))


def _resamples(truth: Int[np.ndarray, " n"], seed: int, draws: int) -> Iterator[Sample]:
    """Row numbers drawn with replacement, each class from its own cells."""
    rng = np.random.default_rng(seed)
    order = np.argsort(truth, kind="stable")
    _, first, column, size = np.unique(
        truth[order], return_index=True, return_inverse=True, return_counts=True
    )
    step = max(1, AT_ONCE // len(truth))
    for start in range(0, draws, step):
        chance = rng.random((min(step, draws - start), len(truth)))
        yield order[first[column] + (chance * size[column]).astype(np.intp)]


def percentiles(drawn: Float[np.ndarray, " draws"]) -> list[float] | None:
    """[low, high] of the draws in which the measure is defined.

    None where there are none, or where they do not differ: that says nothing of the error.
    """
    defined = drawn[np.isfinite(drawn)]
    if len(defined) == 0 or np.ptp(defined) < 1e-12:
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]
