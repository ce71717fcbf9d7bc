"""Does accuracy follow confidence, for a model and for people? What was found, as JSON and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from cytodiffusion.evaluate.answers import Answers
from cytodiffusion.evaluate.intervals import binomial_interval, bootstrap, percentiles
from cytodiffusion.evaluate.metrics import separation
from cytodiffusion.evaluate.psychometric import FAMILIES, Analysis
from cytodiffusion.evaluate.report import DASH, PERCENT, fill

RATES = ("guess", "lapse")


@dataclass(frozen=True)
class Outcome:
    """One set of answers and its curve, or the reason why there is none."""

    answers: Answers
    analysis: Analysis | None
    problem: str | None
    aic: Mapping[str, float]  # of each family that was fitted

    def as_dict(self, seed: int) -> dict[str, Any]:
        """A row of results.json: None, never NaN, stands where something is not known."""
        answers, judged = self.answers, self.answers.judged
        n, right = int(judged.n.sum()), int(judged.right.sum())
        return {
            "name": answers.name,
            "source": answers.source,
            "n": n,
            "left_out": answers.left_out,
            "classes": answers.classes,
            "accuracy": right / n,
            "accuracy_ci95": list(binomial_interval(right, n)),
            **_separation(*judged.one_by_one(), seed),
            "aic_of_family": dict(self.aic),
            "fit": self.analysis.as_dict() if self.analysis else None,
            "problem": self.problem,
            "observed": [asdict(part) for part in judged.bins()],
        }


def _separation(confidence: np.ndarray, right: np.ndarray, seed: int) -> dict[str, Any]:
    """`auroc_correct` and its interval; None where all answers are right, or all wrong."""
    if right.all() or not right.any():
        return {"auroc_correct": None, "auroc_correct_ci95": None}
    measure, together = separation(right, confidence), np.zeros(len(right), int)
    drawn = bootstrap(together, {"auroc_correct": measure}, seed=seed)["auroc_correct"]
    value = float(measure(np.arange(len(right))[None])[0])
    return {"auroc_correct": value, "auroc_correct_ci95": percentiles(drawn)}


def render(title: str, outcomes: Sequence[Outcome], rows: Sequence[Mapping[str, Any]],
           facts: Mapping[str, Any]) -> str:  # fmt: skip
    """The page as text; `rows` are the outcomes' `as_dict`, `facts` are printed as they are."""
    from cytodiffusion.evaluate import plots  # matplotlib takes a while

    pairs = [(outcome.answers.judged, outcome.analysis) for outcome in outcomes]
    pictures = [
        Markup(plots.psychometric_curves([pair], first=i, name=f"curve{i}"))
        for i, pair in enumerate(pairs)
    ]
    analyses = [outcome.analysis for outcome in outcomes if outcome.analysis]
    family = analyses[0].fit.curve.family
    return fill(
        "uncertainty.html.j2",
        title=title,
        family=family,
        names=[*FAMILIES[family].names, *RATES],
        level=f"{100 * analyses[0].level:g}{PERCENT}",
        draws=analyses[0].draws,
        rows=[_row(row, plots.key(i)) for i, row in enumerate(rows)],
        together=Markup(plots.psychometric_curves(pairs)) if len(pairs) > 1 else None,
        pictures=pictures,
        facts=facts,
    )


def _row(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A row with what the page says in words."""
    fit = row["fit"]
    if fit is None:
        return {**row, "key": key, "threshold": "", "doubts": ""}
    low, high = (_reached(end) for end in fit["threshold_ci95"])
    doubts = [f"the answers do not decide {name}" for name in fit["at_bounds"]]
    if fit["fit_p"] is None:
        doubts.append("too few different confidences to judge the fit")
    elif fit["fit_p"] < 0.05:
        doubts.append("the curve does not fit: do not rely on its intervals")
    threshold = f"{_reached(fit['threshold'])} ({low} {DASH} {high})"
    return {**row, "key": key, "threshold": threshold, "doubts": "; ".join(doubts)}


def _reached(confidence: float | None) -> str:
    return "not reached" if confidence is None else f"{confidence:.3f}"
