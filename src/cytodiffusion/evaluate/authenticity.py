"""Can people tell drawn cells from real ones?

A reader calls every cell real or drawn. Taking "drawn" as the signal, with H the share of drawn cells
that are called drawn (sensitivity) and F the share of real ones that are (1 - specificity),

    d' = z(H) - z(F)            how well the two are told apart: 0 by a guess, 4.65 with 1 % of mistakes
    c  = -(z(H) + z(F)) / 2     bias: above 0 for who tends to say "real", below 0 for "drawn"

z is the inverse of the normal distribution function. So that no share is 0 or 1, H = (hits + 1/2) /
(drawn cells + 1), and likewise F: the log-linear correction, which draws d' of few cells towards 0.

Shares have exact (binomial) 95 % intervals. Those of d', c and kappa come from resamples of the cells,
within real and within drawn ones. Readers saw the same cells, so their answers are no independent
draws: of all readers together, read `accuracy_cells_ci95`, which resamples cells with all their
answers, rather than the exact one. Neither says how other readers would do.

Agreement beyond chance: Cohen's kappa of two readers, Fleiss' of more, over cells that all of them
answered; 1 is full agreement, 0 that of chance.

Source: Macmillan and Creelman 2005, Detection Theory; Hautus 1995, Behavior Research Methods 27, 46-51;
Cohen 1960; Fleiss 1971, Psychological Bulletin 76, 378-382.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from markupsafe import Markup
from scipy.special import ndtri

from cytodiffusion.evaluate.answers import Answers, Judged
from cytodiffusion.evaluate.blinded import TRUTHS, Answer, Truth
from cytodiffusion.evaluate.intervals import Measure, bootstrap, percentiles, share
from cytodiffusion.evaluate.report import fill
from cytodiffusion.evaluate.uncertainty import Outcome

ALL = "all readers"
GUESS = 0.5  # share right by luck, of two answers
THRESHOLD = 0.75  # accuracy half-way between luck and none wrong


@dataclass(frozen=True)
class Table:
    """Answers of all readers, a column a cell of the key. -1 and NaN: not answered."""

    readers: tuple[str, ...]
    drawn: Bool[np.ndarray, " n"]
    labels: tuple[str, ...]
    said: Int[np.ndarray, "r n"]  # 1 drawn, 0 real
    confidence: Float[np.ndarray, "r n"]
    seconds: Float[np.ndarray, "r n"]

    @classmethod
    def of(cls, key: Mapping[str, Truth], answers: Mapping[str, Mapping[str, Answer]]) -> Table:
        """Gather answers; readers in the order of their names."""
        readers, nothing = tuple(sorted(answers)), (-1.0, np.nan, np.nan)
        rows = [[answers[name].get(cell, nothing) for cell in key] for name in readers]
        values = np.array(rows, float).reshape(len(readers), len(key), 3)
        return cls(
            readers,
            np.array([truth.drawn for truth in key.values()]),
            tuple(truth.label for truth in key.values()),
            values[..., 0].astype(int),
            values[..., 1],
            values[..., 2],
        )

    def rows(self, readers: Sequence[int]) -> Table:
        """Some of the readers."""
        chosen = list(readers)
        names = tuple(self.readers[i] for i in chosen)
        return Table(
            names, self.drawn, self.labels, self.said[chosen], self.confidence[chosen],
            self.seconds[chosen],
        )  # fmt: skip

    def judged(self) -> Judged:
        """Confidence and right or wrong of every answer."""
        given, right = self.said >= 0, self.said == self.drawn
        return Judged.of(self.confidence[given], right[given])


# --- told apart ----------------------------------------------------------------------------------


def discrimination(
    hits: np.ndarray, drawn: np.ndarray, alarms: np.ndarray, real: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(d', c), log-linear: `hits` of `drawn` cells were called drawn, and `alarms` of `real` ones."""
    h = ndtri((np.asarray(hits) + 0.5) / (np.asarray(drawn) + 1))
    f = ndtri((np.asarray(alarms) + 0.5) / (np.asarray(real) + 1))
    return h - f, -(h + f) / 2


def summarise(table: Table, name: str, seed: int = 0) -> dict[str, Any]:
    """What the readers of a table did, taken together: a row of results.json without the curve.

    None stands where there is nothing to divide by, and for an interval where resamples do not differ.
    """
    given = table.said >= 0
    right = (table.said == table.drawn)[given]
    told: dict[str, Any] = {"name": name, "readers": len(table.readers), "n": int(given.sum())}
    told |= {"unanswered": int((~given).sum()), **share("accuracy", right), **_shares(table, given)}
    told |= _resampled(table, given, seed)
    told["median_seconds"] = float(np.median(table.seconds[given]))
    told["classes"] = [
        _of_class(table, given & (np.array(table.labels) == label), label)
        for label in sorted(set(table.labels))
    ]
    return told


def _shares(table: Table, given: Bool[np.ndarray, "r n"]) -> dict[str, Any]:
    """Sensitivity to drawn cells and specificity."""
    found: dict[str, Any] = {}
    for name, side in (("sensitivity", table.drawn), ("specificity", ~table.drawn)):
        of_side = (table.said == table.drawn)[given & side]
        nothing = {name: None, f"{name}_ci95": None, f"{name}_n": 0}
        found |= share(name, of_side) if len(of_side) else nothing
    return found


def _of_class(table: Table, given: Bool[np.ndarray, "r n"], label: str) -> dict[str, Any]:
    right = (table.said == table.drawn)[given]
    nothing = {"accuracy": None, "accuracy_ci95": None, "accuracy_n": 0}
    told = share("accuracy", right) if len(right) else nothing
    return {"class": label, **told, **_shares(table, given)}


def _resampled(table: Table, given: Bool[np.ndarray, "r n"], seed: int) -> dict[str, Any]:
    """d', c and the share right, with intervals from resamples of the cells that were answered."""
    cells = given.any(axis=0)
    drawn, answers = table.drawn[cells], given.sum(axis=0)[cells]
    called = (table.said == 1).sum(axis=0)[cells]
    if len(set(drawn.tolist())) < 2:
        names = ("d_prime", "criterion", "accuracy_cells")
        return {f"{name}{end}": None for name in names for end in ("", "_ci95")}
    sums = [called * drawn, answers * drawn, called * ~drawn, answers * ~drawn]

    def counts(sample: np.ndarray) -> list[np.ndarray]:
        return [values[sample].sum(axis=1) for values in sums]

    def accuracy(sample: np.ndarray) -> np.ndarray:
        hits, n, alarms, m = counts(sample)
        return (hits + m - alarms) / (n + m)

    measures: dict[str, Measure] = {
        "d_prime": lambda sample: discrimination(*counts(sample))[0],
        "criterion": lambda sample: discrimination(*counts(sample))[1],
        "accuracy_cells": accuracy,
    }
    return _with_intervals(drawn, measures, seed)


def _with_intervals(
    drawn: Bool[np.ndarray, " n"], measures: Mapping[str, Measure], seed: int
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    resampled = bootstrap(drawn.astype(int), measures, seed=seed)
    for name, measure in measures.items():
        value = float(measure(np.arange(len(drawn))[None])[0])
        found[name] = value if np.isfinite(value) else None
        found[f"{name}_ci95"] = percentiles(resampled[name])
    return found


# --- agreement -----------------------------------------------------------------------------------


def cohen(first: np.ndarray, second: np.ndarray) -> Measure:
    """Cohen's kappa of two readers' answers, 0 or 1; NaN where both always say the same one thing."""

    def measure(sample: np.ndarray) -> np.ndarray:
        one, two = first[sample], second[sample]
        p, q = one.mean(axis=1), two.mean(axis=1)
        return _beyond((one == two).mean(axis=1), p * q + (1 - p) * (1 - q))

    return measure


def fleiss(counts: Int[np.ndarray, "n k"]) -> Measure:
    """Fleiss' kappa; `counts`: readers who gave each of k answers, as many readers for each cell."""
    readers = counts[0].sum()
    agreed = (counts * (counts - 1)).sum(axis=1) / (readers * (readers - 1))

    def measure(sample: np.ndarray) -> np.ndarray:
        shares = counts[sample].mean(axis=1) / readers
        return _beyond(agreed[sample].mean(axis=1), (shares**2).sum(axis=1))

    return measure


def _beyond(observed: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """The share of what chance leaves over; NaN where it leaves nothing."""
    rest = np.where(chance < 1 - 1e-12, 1 - chance, np.nan)
    return (observed - chance) / rest


def agreement(table: Table, seed: int = 0) -> dict[str, Any]:
    """Kappa of every pair and, of more than two readers, of all; None for those without cells."""
    everyone = range(len(table.readers))
    pairs = [_agree(table.rows(pair), seed) for pair in combinations(everyone, 2)]
    return {"pairs": pairs, "all": _agree(table, seed) if len(everyone) > 2 else None}


def _agree(table: Table, seed: int) -> dict[str, Any]:
    common = (table.said >= 0).all(axis=0)
    told = {"readers": list(table.readers), "n": int(common.sum())}
    if not common.any():
        return {**told, "agreement": None, "kappa": None, "kappa_ci95": None}
    said = table.said[:, common]
    counts = np.stack([(said == k).sum(axis=0) for k in (0, 1)], axis=1)
    r = len(said)
    measure = cohen(said[0], said[1]) if r == 2 else fleiss(counts)
    observed = float((counts * (counts - 1)).sum(axis=1).mean() / (r * (r - 1)))
    found = _with_intervals(table.drawn[common], {"kappa": measure}, seed)
    return {**told, "agreement": observed, **found}


# --- the page ------------------------------------------------------------------------------------


def answers_of(table: Table, name: str) -> Answers:
    """The same answers for the psychometric function."""
    return Answers(name, source=name, judged=table.judged(), classes=len(TRUTHS))


def render(
    title: str, rows: Sequence[Mapping[str, Any]], agreed: Mapping[str, Any],
    outcomes: Sequence[Outcome], problems: Sequence[str], facts: Mapping[str, Any],
) -> str:  # fmt: skip
    """The page as text; a row and an outcome for each reader and, of several, for all at the end."""
    from cytodiffusion.evaluate import plots  # matplotlib takes a while

    pictures = [
        Markup(plots.psychometric_curves([(each.answers.judged, each.analysis)], name=f"curve{i}"))
        for i, each in enumerate(outcomes)
    ]
    return fill(
        "authenticity.html.j2", title=title, rows=rows, agreed=agreed, pictures=pictures,
        problems=problems, facts=facts,
    )  # fmt: skip
