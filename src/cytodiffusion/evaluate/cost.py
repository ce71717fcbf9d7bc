"""What does a right answer cost?

Procedures name the same cells with the same network, one after another in one run. Counted are full
network passes, as they are run. Cells a second include reading the images. The answer after at most
n trials shows how accuracy grows with passes.

`paper` is the paper's procedure: its noise levels, weights, race and fresh augmentation, and a pass
for every class that is still in, as published; `paper as shipped` adds the RandAugment that its code
ran. A network with a head for each class can give the errors of all classes in one pass: `paper in
one pass` is the same procedure so. What lies between the two is the gain of the heads, and what lies
between it and ours the gain of our procedure. With several models each is compared with its own `paper`
and, on the same cells, with that of the others.

What differs from the paper, since the networks here work on pixels: errors are taken over the whole
image instead of a disc of latents, and a turned image repeats its outermost pixels; its weights were
fitted to latents of unit variance. The view of a trial is the same for every image.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from markupsafe import Markup
from torch import Tensor

from cytodiffusion.classify.classifier import Budget, Classifier, Reader
from cytodiffusion.classify.draws import Draws
from cytodiffusion.classify.measure import Done, Measurement, Policy
from cytodiffusion.classify.race import BettingRace, PaperRace
from cytodiffusion.data.images import Preprocess, to_tensor
from cytodiffusion.data.load import load_one
from cytodiffusion.data.sample import Sample
from cytodiffusion.errors import DataError
from cytodiffusion.evaluate.intervals import balanced_interval, bootstrap, percentiles, share
from cytodiffusion.evaluate.metrics import balanced_accuracy
from cytodiffusion.evaluate.report import fill
from cytodiffusion.evaluate.views import PaperView
from cytodiffusion.files import write_arrays
from cytodiffusion.types import PIXELS

PROCEDURES = (
    "paper", "paper as shipped", "paper in one pass", "full", "balanced", "fast", "race",
)  # fmt: skip
SHARE = 0.95  # of the final accuracy, to which time is measured
POINTS = 60  # of a curve


@dataclass(frozen=True)
class Measured:
    """What one procedure measured on the cells, and how long it took."""

    errors: Float[np.ndarray, "n t k1"]
    features: Float[np.ndarray, "n f"]
    truth: Int[np.ndarray, " n"]
    digests: tuple[str, ...]
    seconds: float

    def save(self, path: Path) -> None:
        """Write one NPZ file. Raises OutputError."""
        write_arrays(
            path, errors=self.errors, features=self.features, truth=self.truth,
            digests=np.array(self.digests), seconds=np.array(self.seconds),
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> Measured:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            digests = tuple(file["digests"].tolist())
            errors, features, truth = (file[name] for name in ("errors", "features", "truth"))
            return cls(errors, features, truth, digests, float(file["seconds"]))


def procedure(classifier: Classifier, name: str) -> tuple[Measurement, Budget]:
    """How a procedure measures, and the budget that reads it."""
    budget = classifier.budget(name.split()[0])
    measurement = classifier.measurement(name.split()[0])
    race = budget.policy
    if not isinstance(race, PaperRace):
        return measurement, budget
    trials = tuple(replace(trial, pose=i) for i, trial in enumerate(race.draws.trials))
    draws = Draws(trials, race.draws.seed)
    shipped, together = name == "paper as shipped", name == "paper in one pass"
    views = tuple(PaperView(draws.seed, i, shipped) for i in range(len(trials)))
    latent = classifier.space is not PIXELS
    work = replace(
        measurement, draws=draws, poses=views, together=together, anyone=False, anew=latent
    )
    return work, budget


def run(
    classifier: Classifier, name: str, samples: Sequence[Sample], truth: Int[np.ndarray, " n"],
    preprocess: Preprocess, workers: int,
) -> Generator[int, None, Measured]:  # fmt: skip
    """Yield how many cells are done; returns what was measured, without the trials that no cell took.

    Unreadable images are left out. Raises DataError where none can be read.
    """
    measurement, _ = procedure(classifier, name)
    found = yield from measure(classifier, measurement, samples, truth, preprocess, workers)
    used = max(1, int((~np.isnan(found.errors)).any((0, 2)).sum()))
    return replace(found, errors=found.errors[:, :used])


def measure(
    classifier: Classifier, measurement: Measurement, samples: Sequence[Sample],
    truth: Int[np.ndarray, " n"], preprocess: Preprocess, workers: int,
) -> Generator[int, None, Measured]:  # fmt: skip
    """Yield how many cells are done; returns their errors, in the order of the samples.

    Unreadable images are left out. Raises DataError where none can be read.
    """
    digests: dict[int, str] = {}

    def prepare(numbered: tuple[int, Sample]) -> tuple[Tensor, str] | None:
        place, sample = numbered
        item = load_one(sample, preprocess)
        if item.pixels is None:
            return None
        digests[place] = item.sha256
        return to_tensor(item.pixels).to(classifier.device), item.sha256

    found: dict[int, Done] = {}
    began = time.perf_counter()
    for cell in measurement.stream(classifier.meter, enumerate(samples), prepare, workers):
        found[cell.place] = cell
        yield len(found)
    seconds = time.perf_counter() - began
    if not found:
        raise DataError(f"None of the {len(samples)} images could be read. Try: data check.")
    order = sorted(found)
    names = tuple(digests[place] for place in order)
    errors, features = (
        np.stack([getattr(found[place], name) for place in order])
        for name in ("errors", "features")
    )
    return Measured(errors, features, truth[order], names, seconds)


def passes(errors: Float[np.ndarray, "n t k1"], together: bool) -> Int[np.ndarray, "n t"]:
    """Network passes that each cell had spent after each trial."""
    ran = ~np.isnan(errors)
    return np.cumsum(ran.any(2) if together else ran.sum(2), axis=1)


def spent(measured: Measured, together: bool) -> float:
    """Mean passes a cell."""
    return float(passes(measured.errors, together)[:, -1].mean())


def row(measured: Measured, budget: Budget, name: str, together: bool) -> dict[str, Any]:
    """Accuracy, cost, and how the one grows with the other. `together`: all classes in one pass."""
    errors, truth = measured.errors, measured.truth
    every, n = passes(errors, together), len(truth)
    mean = float(every[:, -1].mean())
    answers = budget.reader.probabilities(errors)
    right = answers.argmax(1) == truth
    cells_per_second = n / measured.seconds
    curve = _curve(measured, budget, every)
    reached = next(p for p in curve if p["accuracy"] >= SHARE * right.mean())
    return {
        "name": name,
        "cells": n,
        "balanced_accuracy": balanced_accuracy(truth, answers),
        "balanced_accuracy_ci95": list(balanced_interval(truth, right)),
        **share("accuracy", right),
        "passes_per_cell": mean,
        "cells_per_second": cells_per_second,
        "passes_to_95": reached["passes"],
        "seconds_to_95": reached["passes"] / (mean * cells_per_second),
        "curve": curve,
    }


def _curve(
    measured: Measured, budget: Budget, every: Int[np.ndarray, "n t"]
) -> list[dict[str, float]]:
    """Accuracy after at most n trials, for up to `POINTS` n."""
    trials = measured.errors.shape[1]
    caps = np.unique(np.geomspace(1, trials, POINTS).round().astype(int)).tolist()
    found = []
    for cap in caps:
        answers = budget.reader.probabilities(measured.errors[:, :cap])
        found.append(
            {
                "trials": cap,
                "passes": float(every[:, cap - 1].mean()),
                "accuracy": float((answers.argmax(1) == measured.truth).mean()),
                "balanced_accuracy": balanced_accuracy(measured.truth, answers),
            }
        )
    return found


def race_row(
    measured: Measured, budget: Budget, full: Measured | None, reader: Reader
) -> dict[str, Any]:
    """How often a race drops the true class, and the class that `full` names; nothing for no race."""
    race = budget.policy
    if not isinstance(race, PaperRace | BettingRace):
        return {}
    told = share("true_class_dropped", dropped(measured, race, measured.truth))
    if full is not None:
        named = reader.probabilities(full.errors).argmax(1)
        told |= share("full_answer_dropped", dropped(measured, race, named))
    return told | {"drop_bound": race.alpha if isinstance(race, BettingRace) else None}


def dropped(
    measured: Measured, policy: Policy, which: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Whether a race has dropped class `which` of each cell by the end."""
    ran = (~np.isnan(measured.errors)).any(2).sum(1)
    gone = np.zeros(len(measured.truth), dtype=bool)
    for count in np.unique(ran):
        rows = np.flatnonzero(ran == count)
        still = policy(measured.errors[rows, :count], measured.features[rows])
        gone[rows] = ~still[np.arange(len(rows)), which[rows]]
    return gone


def compare(
    ours: Measured, budget: Budget, theirs: Measured, other: Budget, seed: int = 0
) -> dict[str, Any]:
    """Balanced accuracy of ours less theirs on the same cells, with its paired 95 % interval.

    Raises DataError where the cells are not the same.
    """
    if ours.digests != theirs.digests:
        raise DataError("Two procedures have measured different images. Choose another folder.")
    right = {
        name: each.reader.probabilities(m.errors).argmax(1) == m.truth
        for name, m, each in (("ours", ours, budget), ("theirs", theirs, other))
    }
    recall = {name: _balanced(ours.truth, hits) for name, hits in right.items()}
    return {
        "balanced_accuracy_gain": recall["ours"] - recall["theirs"],
        "balanced_accuracy_gain_ci95": _gain_interval(ours.truth, right, seed),
    }


def _balanced(truth: np.ndarray, right: np.ndarray) -> float:
    return float(np.mean([right[truth == k].mean() for k in np.unique(truth)]))


def _gain_interval(
    truth: Int[np.ndarray, " n"], right: dict[str, np.ndarray], seed: int
) -> list[float] | None:
    """Of the balanced accuracy of ours less that of theirs, on the same cells."""
    gain = right["ours"].astype(float) - right["theirs"]
    weight = 1 / np.bincount(truth)[truth] / len(np.unique(truth))

    def measure(samples: np.ndarray) -> np.ndarray:
        return (gain * weight)[samples].sum(1)

    return percentiles(bootstrap(truth, {"gain": measure}, seed=seed)["gain"])


def render(
    title: str, rows: Sequence[dict[str, Any]], across: Sequence[dict[str, Any]],
    facts: dict[str, Any],
) -> str:  # fmt: skip
    """The page as text; `facts` are printed as they are."""
    from cytodiffusion.evaluate import plots  # matplotlib takes a while

    curves = [
        ([p["passes"] for p in each["curve"]], [p["balanced_accuracy"] for p in each["curve"]])
        for each in rows
    ]
    plot, keys = Markup(plots.cost_curves(curves)), [plots.key(i) for i in range(len(rows))]
    return fill(
        "cost.html.j2", title=title, rows=rows, across=across, plot=plot, keys=keys, facts=facts
    )
