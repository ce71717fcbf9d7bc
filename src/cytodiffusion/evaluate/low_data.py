"""How much is learned from a handful of labels, and how much from the cells that nobody labelled?

Cells of each class are chosen anew in every repeat, and every method gets the same. A method is one of
KINDS with the chosen cells alone, or with the rest of the training cells as well, their labels hidden.

The interval of a mean over repeats is Student's, with repeats - 1 degrees of freedom: it says how much
the choice of cells and the seed matter. The cells that all are tested on stay the same, and so does a
first stage without labels: it does not say how much *they* matter. A difference between methods is taken
within each repeat.

A network that was trained with the classification term carries a posterior of its own, log p(k | trial) =
-beta(sigma) w(sigma) E_k + constant, with beta learned from the labels it was trained on. Averaged over
trials, it needs no cells to be calibrated on (`read`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup
from scipy.special import softmax, stdtrit

from cytodiffusion.classify.draws import Draws, stratified
from cytodiffusion.errors import DataError
from cytodiffusion.evaluate.metrics import balanced_accuracy
from cytodiffusion.evaluate.report import fill

OURS = "ours"
LEVELS, LOW, HIGH = 8, 0.05, 1.6  # noise levels of `read`: where the classes differ, docs/log.md 9
LEVEL = 0.95  # of the intervals


@dataclass(frozen=True)
class Method:
    """What is trained, and whether it sees the unlabelled rest."""

    kind: str  # ours, or one of the baselines
    rest: bool

    def __str__(self) -> str:
        return f"{self.kind} + unlabelled" if self.rest else self.kind


# --- which cells ---------------------------------------------------------------------------------


def choose(
    labels: Int[np.ndarray, " n"], count: int, seed: int, repeat: int
) -> Int[np.ndarray, " m"]:
    """Rows of `count` cells of each class; those of a smaller count are among them. -1: no label."""
    rng = np.random.default_rng((seed, repeat))
    classes = np.unique(labels[labels >= 0])
    every = [rng.permutation(np.flatnonzero(labels == k)) for k in classes]
    return np.sort(np.concatenate([rows[:count] for rows in every]))


def check_counts(labels: Sequence[str], counts: Sequence[int]) -> None:
    """Raises DataError where a class has fewer cells than are asked for."""
    names, found = np.unique(np.array(labels), return_counts=True)
    few = [f"{name} {n}" for name, n in zip(names, found, strict=True) if n < max(counts)]
    if few:
        raise DataError(
            f"{max(counts)} labels a class were asked for; the training cells have fewer of: "
            f"{', '.join(few)}. Give smaller numbers with --labels."
        )


# --- reading without calibration -----------------------------------------------------------------


def draws() -> Draws:
    """The trials of a cell: frozen noise, one at each noise level."""
    return stratified(LEVELS, LOW, HIGH, frozen=True)


def read(
    errors: Float[np.ndarray, "n t k"], nats: Float[np.ndarray, " t"]
) -> Float[np.ndarray, "n k"]:
    """Probabilities from mean squared errors; `nats`: beta(sigma) w(sigma), what a unit is worth."""
    return softmax(-(errors.astype(np.float64) * nats[:, None]).mean(1), axis=1)


# --- what came of it -----------------------------------------------------------------------------


def row(
    count: int, repeat: int, method: Method, truth: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n k"], spent: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """One training. `spent`: what it took."""
    return {
        "labels": count,
        "repeat": repeat,
        "method": str(method),
        "kind": method.kind,
        "unlabelled": method.rest,
        "balanced_accuracy": balanced_accuracy(truth, probabilities),
        "accuracy": float((probabilities.argmax(1) == truth).mean()),
        **spent,
    }


def interval(values: Sequence[float], low: float = -1.0) -> list[float] | None:
    """Student's 95 % interval of the mean, cut off at `low` and 1; None for a single value."""
    if len(values) < 2:
        return None
    half = stdtrit(len(values) - 1, (1 + LEVEL) / 2) * np.std(values, ddof=1)
    half /= np.sqrt(len(values))
    return [float(max(low, np.mean(values) - half)), float(min(1.0, np.mean(values) + half))]


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each number of labels and method, the mean over repeats."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for each in rows:
        found.setdefault((each["labels"], each["method"]), []).append(each)
    return [
        {
            **{name: same[0][name] for name in ("labels", "method", "kind", "unlabelled")},
            "repeats": len(same),
            "balanced_accuracy": float(np.mean(values := [r["balanced_accuracy"] for r in same])),
            "balanced_accuracy_ci95": interval(values, low=0.0),
            "seconds": float(np.mean([r["seconds"] for r in same])),
        }
        for same in found.values()
    ]


def gains(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours less the best baseline that saw the same cells, repeat by repeat.

    The best is the one with the highest mean over the repeats, on the cells that all are tested on: that
    choice is in its favour.
    """
    means = summary(rows)
    found = []
    for mine in (each for each in means if each["kind"] == OURS):
        same = (mine["labels"], mine["unlabelled"])
        rivals = [m for m in means if m["kind"] != OURS and (m["labels"], m["unlabelled"]) == same]
        if rivals:
            best = max(rivals, key=lambda each: each["balanced_accuracy"])
            ours, theirs = (_by_repeat(rows, each) for each in (mine, best))
            less = [ours[repeat] - theirs[repeat] for repeat in ours if repeat in theirs]
            found.append({
                "labels": mine["labels"], "method": mine["method"], "baseline": best["method"],
                "gain": float(np.mean(less)), "gain_ci95": interval(less),
            })  # fmt: skip
    return found


def _by_repeat(rows: Sequence[dict[str, Any]], mean: dict[str, Any]) -> dict[int, float]:
    same = [r for r in rows if (r["labels"], r["method"]) == (mean["labels"], mean["method"])]
    return {each["repeat"]: each["balanced_accuracy"] for each in same}


def render(title: str, results: dict[str, Any], facts: dict[str, Any]) -> str:
    """The page as text."""
    from cytodiffusion.evaluate import plots  # matplotlib takes a while

    table: dict[str, dict[int, dict[str, Any]]] = {}
    for each in results["summary"]:
        table.setdefault(each["method"], {})[each["labels"]] = each
    counts = sorted({each["labels"] for each in results["summary"]})
    curves = [
        [
            (n, mean["balanced_accuracy"], mean["balanced_accuracy_ci95"])
            for n, mean in found.items()
        ]
        for found in table.values()
    ]
    return fill(
        "low_data.html.j2", title=title, facts=facts, counts=counts, table=table,
        gains=results["gains"], rows=results["rows"], pretrained=facts["pretrained"],
        plot=Markup(plots.label_curves(curves)), keys=[plots.key(i) for i in range(len(table))],
    )  # fmt: skip
