"""How good are the answers, and can their confidence be used?

Everything starts from `truth` (n,), the column of the right class of each cell, `probabilities`
(n, k), and, where conformal sets were made, `sets` (n, k), true where class k is in the set of
cell n. The answer is the most probable class and the confidence is its probability.

The numbers that need the whole set are measures in the sense of `intervals`: they take samples of
row numbers (draws, n) and give one value a draw, so that a thousand resamples cost one call. The
set itself is the one sample 0, 1, ..., n - 1.

Sources: Guo et al. 2017, arXiv 1706.04599 (calibration error); Brier 1950; Geifman and El-Yaniv
2017, arXiv 1705.08500 (risk and coverage).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from cytodiffusion.errors import DataError
from cytodiffusion.evaluate.intervals import (
    DRAWS,
    Measure,
    Sample,
    balanced_interval,
    binomial_interval,
    bootstrap,
    percentiles,
)

Truth: TypeAlias = Int[np.ndarray, " n"]
Probabilities: TypeAlias = Float[np.ndarray, "n k"]
Sets: TypeAlias = Bool[np.ndarray, "n k"]
Unchecked: TypeAlias = np.ndarray  # of any shape: `_check` says what is wrong with it

BINS = 15  # of the calibration error (Guo et al. 2017)
SMALLEST = 1e-12  # a probability below this counts as this much in `nll`, which stays finite


# ------------------------------------------------------------------------------ shares of cells


def accuracy(truth: Truth, probabilities: Probabilities) -> float:
    """Share of cells named correctly, 0 to 1; higher is better."""
    return float(_judge(truth, probabilities)[0].mean())


def coverage(truth: Truth, sets: Sets) -> float:
    """Share of conformal sets that hold the right class, 0 to 1; best when it is what was asked."""
    return float(_covered(truth, sets).mean())


def coverage_per_class(truth: Truth, sets: Sets) -> list[float | None]:
    """`coverage` of the cells of each class, None for a class without cells."""
    held = _covered(truth, sets)
    return [
        _or_none(held[truth == k].mean()) if (truth == k).any() else None for k in _columns(sets)
    ]


def mean_set_size(sets: Sets) -> float:
    """Classes in a conformal set on average, 0 to k; lower is better at the same coverage."""
    return float(sets.sum(axis=1).mean())


def coverage_table(
    truth: Truth,
    probabilities: Probabilities,
    limits: Mapping[tuple[str, float], Float[np.ndarray, " k"]],
    classes: Iterable[str],
) -> list[dict[str, Any]]:
    """Coverage and size of the sets {k: 1 - p_k <= limit_k}, a row for each (kind of set, asked).

    `furthest` is the class whose own coverage is furthest from what was asked.
    """
    names, rows = tuple(classes), []
    for (kind, asked), limit in limits.items():
        sets = 1 - probabilities <= limit
        held = int(_covered(truth, sets).sum())
        each = [(name, c) for name, c in zip(names, coverage_per_class(truth, sets), strict=True)]
        furthest = max((pair for pair in each if pair[1] is not None),
                       key=lambda pair: abs((pair[1] or 0) - asked))  # fmt: skip
        rows.append(
            {
                "sets": kind,
                "asked": asked,
                "coverage": held / len(truth),
                "coverage_ci95": list(binomial_interval(held, len(truth))),
                "mean_set_size": mean_set_size(sets),
                "empty": float((~sets.any(axis=1)).mean()),
                "furthest": {"class": furthest[0], "coverage": furthest[1]},
            }
        )
    return rows


# -------------------------------------------------------------------------------- class by class


def confusion(truth: Truth, probabilities: Probabilities) -> Int[np.ndarray, "k k"]:
    """Cells of class i (row) that were named j (column)."""
    return _confusions(truth, probabilities)(_everyone(truth))[0]


def balanced_accuracy(truth: Truth, probabilities: Probabilities) -> float:
    """Mean recall of the classes, 0 to 1; higher is better. Classes without cells are left out."""
    return _value(_balanced(truth, probabilities), truth)


def macro_f1(truth: Truth, probabilities: Probabilities) -> float:
    """F1 averaged over classes, 0 to 1; higher is better. Classes without cells are left out.

    A cell wrongly named as one of those still counts against its own class.
    """
    return _value(_macro_f1(truth, probabilities), truth)


def per_class(
    truth: Truth, probabilities: Probabilities, classes: Iterable[str], sets: Sets | None = None
) -> dict[str, dict[str, Any]]:
    """n, recall (with its exact interval), precision, F1 and conformal coverage of each class.

    All are 0 to 1 and better when higher. None where there is nothing to divide by: recall, F1 and
    coverage of a class without cells, precision of a class that was never the answer.
    """
    counts = confusion(truth, probabilities)
    held = coverage_per_class(truth, sets) if sets is not None else [None] * len(counts)
    return {name: _one_class(counts, k) | {"coverage": held[k]} for k, name in enumerate(classes)}


def _one_class(counts: Int[np.ndarray, "k k"], k: int) -> dict[str, Any]:
    hits, n, named = int(counts[k, k]), int(counts[k].sum()), int(counts[:, k].sum())
    return {
        "n": n,
        "recall": hits / n if n else None,
        "recall_ci95": list(binomial_interval(hits, n)) if n else None,
        "precision": hits / named if named else None,
        "f1": 2 * hits / (n + named) if n else None,
    }


# ------------------------------------------------------------------- can the confidence be used?


def ece(
    truth: Truth, probabilities: Probabilities, *, bins: int = BINS, equal_mass: bool = False
) -> float:
    """Expected calibration error, 0 to 1: |confidence - share right|, averaged over bins of cells.

    Lower is better. The bins are equally wide, (0, 1/15] and so on, or hold equally many cells
    with `equal_mass`. Chance alone keeps a finite set above 0, however good the model.
    """
    return _value(_ece(truth, probabilities, bins, equal_mass), truth)


def nll(truth: Truth, probabilities: Probabilities) -> float:
    """Mean -log of the probability of the right class, in nats, 0 and up; lower is better."""
    return float(_surprise(truth, probabilities).mean())


def brier(truth: Truth, probabilities: Probabilities) -> float:
    """Mean over cells of sum_k (p_k - [k is right])^2, 0 to 2; lower is better."""
    return float(_squares(truth, probabilities).mean())


def auroc_correct(truth: Truth, probabilities: Probabilities) -> float | None:
    """Chance that a right answer is more confident than a wrong one, 0.5 (useless) to 1 (best).

    Ties count one half. None when every answer is right, or every one wrong.
    """
    return _or_none(_value(separation(*_judge(truth, probabilities)), truth))


@dataclass(frozen=True)
class ReliabilityBin:
    """The cells whose confidence lies in (low, high]."""

    low: float
    high: float
    n: int
    confidence: float  # mean
    accuracy: float  # share right; the same as the confidence in a calibrated model
    accuracy_ci95: tuple[float, float]


def reliability(
    truth: Truth, probabilities: Probabilities, *, bins: int = BINS
) -> list[ReliabilityBin]:
    """What `ece` averages, equally wide bins; those without cells are left out."""
    return observed(*_judge(truth, probabilities), bins=bins)


def observed(
    right: Bool[np.ndarray, " n"],
    confidence: Float[np.ndarray, " n"],
    *,
    bins: int = BINS,
    equal_mass: bool = False,
) -> list[ReliabilityBin]:
    """The same of answers that were judged before, in bins as `ece` has them."""
    edges = bin_edges(confidence, bins, equal_mass)
    which = np.searchsorted(edges, confidence)
    ends = [0.0, *edges.tolist(), 1.0]
    return [
        ReliabilityBin(
            low=ends[b],
            high=ends[b + 1],
            n=int((which == b).sum()),
            confidence=float(confidence[which == b].mean()),
            accuracy=float(right[which == b].mean()),
            accuracy_ci95=binomial_interval(int(right[which == b].sum()), int((which == b).sum())),
        )
        for b in np.unique(which).tolist()
    ]


def risk_coverage(
    truth: Truth, probabilities: Probabilities
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """(share of cells answered, share of those that are wrong), answering the most certain first.

    Both are 0 to 1. Cells of equal confidence come in no order: each counts as their mean.
    """
    right, confidence = _judge(truth, probabilities)
    _, level, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    wrong = np.bincount(level, weights=~right) / sizes
    answered = np.arange(1, len(right) + 1)
    return answered / len(right), np.cumsum(np.repeat(wrong, sizes)) / answered


# --------------------------------------------------------------------------- all of it, together


def summarise(
    truth: Truth,
    probabilities: Unchecked,
    classes: Iterable[str],
    sets: Unchecked | None = None,
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> dict[str, Any]:
    """Every number above with its `<name>_ci95` [low, high], ready for JSON; the order of the cells
    changes nothing.

    None, never NaN, stands where a number is undefined, and for an interval where the resamples do
    not differ. Draws in which a measure is undefined are left out of its interval. Raises DataError
    for arrays that do not fit each other, an empty set, or rows that are not probabilities.
    """
    names = tuple(classes)
    _check(truth, probabilities, names, sets)
    truth, probabilities, sets = _sorted(truth, probabilities, sets)
    n, right = len(truth), _judge(truth, probabilities)[0]
    found: dict[str, Any] = {"n": n, "accuracy": float(right.mean())}
    found["accuracy_ci95"] = list(binomial_interval(int(right.sum()), n))
    measures = _measures(truth, probabilities, sets)
    for name, drawn in bootstrap(truth, measures, seed=seed, draws=draws).items():
        value = found[name] = _or_none(_value(measures[name], truth))
        found[f"{name}_ci95"] = percentiles(_centred(drawn, value) if name == "ece" else drawn)
    found["balanced_accuracy_ci95"] = list(balanced_interval(truth, right))
    found |= _set_numbers(truth, sets)
    found["per_class"] = per_class(truth, probabilities, names, sets)
    counts = confusion(truth, probabilities).tolist()
    return found | {"confusion": {"classes": list(names), "counts": counts}}


def _set_numbers(truth: Truth, sets: Sets | None) -> dict[str, Any]:
    if sets is None:
        missing = ("coverage", "coverage_ci95", "mean_set_size", "mean_set_size_ci95")
        return dict.fromkeys(missing)
    held = _covered(truth, sets)
    interval = list(binomial_interval(int(held.sum()), len(held)))
    return {"coverage": float(held.mean()), "coverage_ci95": interval}


def _centred(drawn: np.ndarray, value: float | None) -> np.ndarray:
    """Draws of the calibration error, moved so that their mean is the value of the set itself.

    Resampling adds chance to chance, and a sum of absolute values only grows by it.
    """
    return np.maximum(drawn - drawn.mean() + (value or 0), 0)


def _measures(truth: Truth, probabilities: Probabilities, sets: Sets | None) -> dict[str, Measure]:
    measures = {
        "balanced_accuracy": _balanced(truth, probabilities),
        "macro_f1": _macro_f1(truth, probabilities),
        "ece": _ece(truth, probabilities, BINS, False),
        "nll": _mean(_surprise(truth, probabilities)),
        "brier": _mean(_squares(truth, probabilities)),
        "auroc_correct": separation(*_judge(truth, probabilities)),
    }
    return measures if sets is None else measures | {"mean_set_size": _mean(sets.sum(axis=1))}


# ---------------------------------------------------------- measures: a sample in, a number a draw


def _confusions(truth: Truth, probabilities: Probabilities) -> Measure:
    k = probabilities.shape[1]
    cell = truth.astype(np.intp) * k + probabilities.argmax(axis=1)
    return lambda sample: _count(cell, k * k)(sample).reshape(len(sample), k, k)


def _balanced(truth: Truth, probabilities: Probabilities) -> Measure:
    present = np.unique(truth)

    def measure(sample: Sample) -> np.ndarray:
        counts = _confusions(truth, probabilities)(sample)[:, present]
        hits = counts[:, np.arange(len(present)), present]
        return (hits / counts.sum(axis=2)).mean(axis=1)

    return measure


def _macro_f1(truth: Truth, probabilities: Probabilities) -> Measure:
    present = np.unique(truth)

    def measure(sample: Sample) -> np.ndarray:
        counts = _confusions(truth, probabilities)(sample)
        sizes = counts.sum(axis=2) + counts.sum(axis=1)
        return (2 * counts[:, present, present] / sizes[:, present]).mean(axis=1)

    return measure


def _ece(truth: Truth, probabilities: Probabilities, bins: int, equal_mass: bool) -> Measure:
    right, confidence = _judge(truth, probabilities)
    gaps = _count(_bin(confidence, bins, equal_mass), bins, right - confidence)
    return lambda sample: np.abs(gaps(sample)).sum(axis=1) / sample.shape[1]


def separation(right: Bool[np.ndarray, " n"], confidence: Float[np.ndarray, " n"]) -> Measure:
    """`auroc_correct`; NaN in a draw without a wrong answer, or without a right one."""
    levels, level = np.unique(confidence, return_inverse=True)
    rights, wrongs = (_count(level, len(levels), 1.0 * these) for these in (right, ~right))

    def measure(sample: Sample) -> np.ndarray:
        good, bad = rights(sample), wrongs(sample)
        pairs = good.sum(axis=1) * bad.sum(axis=1)
        won = (good * (np.cumsum(bad, axis=1) - bad / 2)).sum(axis=1)
        return np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0)

    return measure


def _mean(values: np.ndarray) -> Measure:
    return lambda sample: values[sample].mean(axis=1)


def _count(which: np.ndarray, k: int, weights: np.ndarray | None = None) -> Measure:
    """(draws, k): the cells of each draw that fall into each of k boxes, or the sum of weights."""

    def measure(sample: Sample) -> np.ndarray:
        box = which[sample] + k * np.arange(len(sample))[:, None]
        weight = None if weights is None else weights[sample].ravel()
        total = np.bincount(box.ravel(), weight, minlength=k * len(sample))
        return total.reshape(len(sample), k)

    return measure


# ---------------------------------------------------------------------------------- small pieces


def _judge(
    truth: Truth, probabilities: Probabilities
) -> tuple[Bool[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """(was the answer right, its confidence)."""
    return probabilities.argmax(axis=1) == truth, probabilities.max(axis=1)


def bin_edges(confidence: np.ndarray, bins: int, equal_mass: bool = False) -> np.ndarray:
    """(bins - 1,): where one bin ends and the next begins; `confidence` decides equal masses."""
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    return np.quantile(confidence, edges) if equal_mass else edges


def _bin(confidence: np.ndarray, bins: int, equal_mass: bool = False) -> np.ndarray:
    return np.searchsorted(bin_edges(confidence, bins, equal_mass), confidence)


def _surprise(truth: Truth, probabilities: Probabilities) -> Float[np.ndarray, " n"]:
    return -np.log(np.clip(probabilities[np.arange(len(truth)), truth], SMALLEST, 1))


def _squares(truth: Truth, probabilities: Probabilities) -> Float[np.ndarray, " n"]:
    return ((probabilities - np.eye(probabilities.shape[1])[truth]) ** 2).sum(axis=1)


def _covered(truth: Truth, sets: Sets) -> Bool[np.ndarray, " n"]:
    return sets[np.arange(len(truth)), truth]


def _columns(table: np.ndarray) -> range:
    return range(table.shape[1])


def _everyone(truth: Truth) -> Sample:
    return np.arange(len(truth))[None]


def _value(measure: Measure, truth: Truth) -> float:
    return float(measure(_everyone(truth))[0])


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _sorted(
    truth: Truth, probabilities: Probabilities, sets: Sets | None
) -> tuple[Truth, Probabilities, Sets | None]:
    """The same cells in an order that depends on nothing but what they hold."""
    extra = () if sets is None else tuple(sets.T)
    order = np.lexsort((*extra, *probabilities.T, truth))
    return truth[order], probabilities[order].astype(float), None if sets is None else sets[order]


def _check(
    truth: Truth, probabilities: Unchecked, names: tuple[str, ...], sets: Unchecked | None
) -> None:
    n, k = len(truth), len(names)
    if n == 0:
        raise DataError("There are no cells to evaluate. Give at least one that has a label.")
    for what, table in (("probabilities", probabilities), ("sets", sets)):
        if table is not None and table.shape != (n, k):
            raise DataError(
                f"The {what} have shape {table.shape}; {n} cells and {k} classes need ({n}, {k})."
            )
    if truth.min() < 0 or truth.max() >= k:
        raise DataError(
            f"Labels run from {truth.min()} to {truth.max()}; {k} classes allow 0 to {k - 1}. "
            "Leave out the cells of other classes."
        )
    if not (probabilities >= 0).all() or np.abs(probabilities.sum(axis=1) - 1).max() > 1e-3:
        raise DataError("Probabilities must be 0 or more and sum to 1 in every row; some do not.")
