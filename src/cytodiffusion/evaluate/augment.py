"""Do drawn cells of a rare class help to learn it, beyond what balancing the classes does?

Of the rare class n real cells are kept, chosen anew in every repeat, and a classifier is trained on

    real      the real cells alone
    drawn     the same, the rare class topped up by drawn cells
    copies    the same, the rare class topped up to as many by copies of its own real cells

all for as long, with the same settings and the same seed. drawn - real is what topping up gives;
drawn - copies is what the drawn cells give, since both see the class as often. All are tested on the same
real cells. Differences are taken within each repeat; intervals are Student's over repeats (low_data.py).

Source: Chawla et al. 2002, SMOTE, JAIR 16 (copies, over-sampling with replacement, as the control).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int, UInt8
from markupsafe import Markup

from cytodiffusion.errors import DataError
from cytodiffusion.evaluate import low_data
from cytodiffusion.evaluate.low_data import interval
from cytodiffusion.evaluate.metrics import balanced_accuracy, per_class
from cytodiffusion.evaluate.report import fill

Arm = Literal["real", "drawn", "copies"]

ARMS: tuple[Arm, ...] = get_args(Arm)
PAIRS: tuple[tuple[Arm, Arm], ...] = (("drawn", "real"), ("drawn", "copies"))
MEASURES = ("balanced_accuracy", "recall", "precision")  # the last two of the rare class
RATE = 1e-3  # learning rate of every baseline here: a choice on held-out cells would meet copies of them
WORDS: dict[Arm, str] = {
    "real": "real cells alone",
    "drawn": "topped up by drawn cells",
    "copies": "topped up by copies",
}


# --- which cells ---------------------------------------------------------------------------------


def choose(
    labels: Int[np.ndarray, " n"], rare: int, count: int, others: int | None, seed: int, repeat: int
) -> Int[np.ndarray, " m"]:
    """Rows of `count` cells of the rare class and of at most `others` of each other class (None: all).

    Those of a smaller count are among them, and the cells of the other classes are the same for all.
    """
    few = low_data.choose(labels, count, seed, repeat)
    many = low_data.choose(labels, len(labels) if others is None else others, seed, repeat)
    return np.sort(np.concatenate([few[labels[few] == rare], many[labels[many] != rare]]))


def missing(labels: Int[np.ndarray, " m"], rare: int) -> int:
    """How many cells the rare class lacks to be as many as the other classes are in the mean.

    Raises DataError where it lacks none.
    """
    own = int((labels == rare).sum())
    counts = np.unique(labels[labels != rare], return_counts=True)[1]
    lacks = round(float(counts.mean())) - own
    if lacks < 1:
        raise DataError(
            f"With {own} cells the class is not rarer than the others are in the mean: there is "
            "nothing to top up. Give smaller numbers with --labels, or say how many with --drawn."
        )
    return lacks


def mirrored(
    images: UInt8[np.ndarray, "n 3 s s"], margin: float
) -> UInt8[np.ndarray, "n 3 wide wide"]:
    """Images made `margin` times as wide by what their edges mirror.

    Nothing is known of what lies around a drawn cell; real ones get the same margin, so that it tells no
    one from the other.
    """
    size = images.shape[-1]
    edge = (round(size * margin) - size) // 2
    return np.pad(images, ((0, 0), (0, 0), (edge, edge), (edge, edge)), mode="reflect")


# --- what came of it -----------------------------------------------------------------------------


def row(
    count: int, repeat: int, kind: str, arm: Arm, truth: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n k"], rare: int, spent: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """One training. Precision is None where no cell was named as the rare class."""
    found = per_class(truth, probabilities, map(str, range(probabilities.shape[1])))[str(rare)]
    return {
        "labels": count,
        "repeat": repeat,
        "classifier": kind,
        "trained_on": arm,
        "balanced_accuracy": balanced_accuracy(truth, probabilities),
        "recall": found["recall"],
        "precision": found["precision"],
        **spent,
    }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over repeats, a row for each number of cells, classifier and arm."""
    return [
        {
            "labels": count, "classifier": kind, "trained_on": arm, "repeats": len(same),
            **_means({name: [r[name] for r in same] for name in MEASURES}, low=0.0),
            "steps": float(np.mean([r["steps"] for r in same])),
            "seconds": float(np.mean([r["seconds"] for r in same])),
        }
        for count, kind in _settings(rows)
        for arm in ARMS
        if (same := _of(rows, count, kind, arm))
    ]  # fmt: skip


def gains(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Differences of two arms, repeat by repeat, for each number of cells and classifier."""
    return [
        {
            "labels": count, "classifier": kind, "gain_of": first, "over": second,
            **_means({name: _less(_of(rows, count, kind, first), _of(rows, count, kind, second), name)
                      for name in MEASURES}, low=-1.0),
        }
        for count, kind in _settings(rows)
        for first, second in PAIRS
    ]  # fmt: skip


def _settings(rows: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    return list(dict.fromkeys((each["labels"], each["classifier"]) for each in rows))


def _of(rows: Sequence[dict[str, Any]], count: int, kind: str, arm: Arm) -> list[dict[str, Any]]:
    """Rows of one arm, by repeat."""
    wanted = (count, kind, arm)
    same = [r for r in rows if (r["labels"], r["classifier"], r["trained_on"]) == wanted]
    return sorted(same, key=lambda each: each["repeat"])


def _less(
    first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], name: str
) -> list[float | None]:
    pairs = [(a[name], b[name]) for a, b in zip(first, second, strict=True)]
    return [None if a is None or b is None else a - b for a, b in pairs]


def _means(values: dict[str, list[float | None]], low: float) -> dict[str, Any]:
    """Mean and interval of each; None where one of the repeats has no value."""
    told: dict[str, Any] = {}
    for name, each in values.items():
        known = [value for value in each if value is not None]
        whole = len(known) == len(each) > 0
        told[name] = float(np.mean(known)) if whole else None
        told[f"{name}_ci95"] = interval(known, low) if whole else None
    return told


def render(title: str, results: dict[str, Any], right: Sequence[str], facts: dict[str, Any]) -> str:
    """The page as text. `right`: commands that train a drawing model on the chosen cells alone."""
    from cytodiffusion.evaluate import plots  # matplotlib takes a while

    rare = facts["rare_class"]
    lines: dict[tuple[str, Arm], list[tuple[int, float, list[float] | None]]] = {}
    for each in results["summary"]:
        point = (each["labels"], each["recall"], each["recall_ci95"])
        lines.setdefault((each["classifier"], each["trained_on"]), []).append(point)
    plot = plots.label_curves(
        list(lines.values()), x=f"real cells of {rare}", y=f"recall of {rare}"
    )
    return fill(
        "augment.html.j2", title=title, rare=rare, facts=facts, results=results, right=right,
        words=WORDS, rate=RATE, plot=Markup(plot),
        keys=[(f"{kind}, {WORDS[arm]}", plots.key(i)) for i, (kind, arm) in enumerate(lines)],
    )  # fmt: skip
