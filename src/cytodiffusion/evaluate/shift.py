"""Does a model hold on cells of another laboratory?

No label of the foreign cells is seen. A `Step` is what may be done nevertheless. It works on each frame
(its light), on a batch as a whole (one scale, from its own nuclei) or on the reading: with weights that
were fitted on cells changed as another laboratory might (classify/fit.py), or of the batch as a whole
(classify/adapt.py). `abroad` is what `predict` does unasked where frames are clearly in another light, with
all trials; what `abroad + ...` add was tried, and did not help on the whole or assumes too much. One step
alone changes weights: `self-trained` is `abroad` by the model that `adapt` makes of the unlabelled cells,
for each set its own.

The mean over sets weighs every set alike; its interval comes from resamples of the cells of each set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.special import softmax

from cytodiffusion.classify.adapt import centred, em_prior
from cytodiffusion.classify.calibrate import change_prior
from cytodiffusion.classify.classifier import Classifier
from cytodiffusion.data.images import Preprocess
from cytodiffusion.data.look import Look, Match, crop_for
from cytodiffusion.evaluate.cost import Measured, spent
from cytodiffusion.evaluate.intervals import binomial_interval, bootstrap, percentiles
from cytodiffusion.evaluate.metrics import ece
from cytodiffusion.evaluate.report import fill

HOME = "home"  # the set of the training laboratory
MEAN = "mean of foreign sets"


@dataclass(frozen=True)
class Step:
    """What is done to foreign cells."""

    match: Match = "nothing"  # light, or light and stain, of each frame
    scale: Literal["frame", "batch", "each"] = "frame"  # what decides the crop
    weights: bool = False  # the budget's twin for other laboratories
    zooms: tuple[float, ...] = (1.0,)  # crops over which the logits are averaged
    adapt: Literal["", "prior", "centre", "train"] = ""


MATCHED = Step("light", "batch", weights=True)
STEPS = {
    "as trained": Step(),
    "light": Step("light"),
    "scale": Step(scale="batch"),
    "weights": Step(weights=True),
    "light + scale": Step("light", "batch"),
    "light + scale + centre": Step("light", "batch", adapt="centre"),
    "abroad": MATCHED,
    "self-trained": replace(MATCHED, adapt="train"),
    "abroad + prior": replace(MATCHED, adapt="prior"),
    "abroad + centre": replace(MATCHED, adapt="centre"),
    "abroad + stain": replace(MATCHED, match="stain"),
    "abroad + each": replace(MATCHED, scale="each"),
    "abroad + zooms": replace(MATCHED, zooms=(0.87, 1.0, 1.15)),
}
FOR_BASELINES = ("as trained", "light + scale", "light + scale + centre")
TRAINED = "self-trained"  # for baselines too, where ours is


@dataclass(frozen=True)
class Told:
    """What a method says of the cells of one set."""

    truth: Int[np.ndarray, " n"]
    probabilities: Float[np.ndarray, "n k"]
    passes: float  # a cell
    seconds: float  # all cells


def preprocesses(step: Step, plain: Preprocess, look: Look) -> list[Preprocess]:
    """How the frames of a set that looks like `look` are read, once for each zoom."""
    crop = crop_for(plain.crop, look, plain.look) if step.scale == "batch" else plain.crop
    match = plain.match if step.match == "nothing" else step.match
    each = step.scale == "each"
    return [
        plain.model_copy(update={"crop": crop * zoom, "match": match, "each": each})
        for zoom in step.zooms
    ]


def budget(classifier: Classifier, step: Step) -> str:
    """Name of the budget that reads a step: all trials of the model, or of its twin."""
    return classifier.abroad("full") if step.weights else "full"


def logits(
    classifier: Classifier, step: Step, measured: Sequence[Measured], answers: Sequence[str]
) -> Float[np.ndarray, "n k"]:
    """Logits of the classes of `answers`, averaged over zooms; before adaptation."""
    each, name = [], budget(classifier, step)
    for one in measured:
        table = classifier.table(one.errors, one.features, one.digests, name)
        told = classifier.read(table, name, answers=answers).probabilities
        each.append(np.log(told.clip(1e-30)))
    return np.mean(each, axis=0)


def read(
    classifier: Classifier, step: Step, measured: Sequence[Measured], answers: Sequence[str]
) -> Told:
    """Probabilities of the classes of `answers`."""
    told = adapted(logits(classifier, step, measured, answers), step)
    passes = sum(spent(one, classifier.together) for one in measured)
    return Told(measured[0].truth, told, passes, sum(one.seconds for one in measured))


def adapted(logits: Float[np.ndarray, "n k"], step: Step) -> Float[np.ndarray, "n k"]:
    """Probabilities from the logits of a batch."""
    told = softmax(centred(logits) if step.adapt == "centre" else logits, axis=1)
    if step.adapt != "prior":
        return told
    even = np.full(told.shape[1], 1 / told.shape[1])
    return change_prior(told, em_prior(told, even) / even)


def row(told: Told, answers: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Accuracy, balanced accuracy over the classes that the set has, and each recall."""
    truth, n = told.truth, len(told.truth)
    right = told.probabilities.argmax(1) == truth
    drawn = _drawn(told, seed)
    present = np.unique(truth)
    return {
        "cells": n,
        "accuracy": float(right.mean()),
        "accuracy_ci95": list(binomial_interval(int(right.sum()), n)),
        "balanced_accuracy": _value(told, "balanced_accuracy"),
        "balanced_accuracy_ci95": percentiles(drawn["balanced_accuracy"]),
        "recall": {answers[k]: float(right[truth == k].mean()) for k in present.tolist()},
        "cells_of_class": {answers[k]: int((truth == k).sum()) for k in present.tolist()},
        "classes_missing": [name for k, name in enumerate(answers) if k not in present],
        "ece": ece(truth, told.probabilities),
        "passes_per_cell": told.passes,
        "cells_per_second": n / told.seconds,
        "target_labels_used": False,
    }


def mean_row(told: Sequence[Told], seed: int = 0) -> dict[str, Any]:
    """Mean over sets, each weighed alike, with the interval of the mean."""
    found: dict[str, Any] = {"cells": sum(len(one.truth) for one in told)}
    drawn = [_drawn(one, seed + i) for i, one in enumerate(told)]
    for name in ("accuracy", "balanced_accuracy"):
        values = [_value(one, name) for one in told]
        found[name] = float(np.mean(values))
        found[f"{name}_ci95"] = percentiles(np.mean([each[name] for each in drawn], axis=0))
    return found | {"passes_per_cell": float(np.mean([one.passes for one in told]))}


def _weights(truth: Int[np.ndarray, " n"], name: str) -> Float[np.ndarray, " n"]:
    """What each cell counts for: the same, or the same for each class; they sum to 1."""
    if name == "accuracy":
        return np.full(len(truth), 1 / len(truth))
    return 1 / np.bincount(truth)[truth] / len(np.unique(truth))


def _value(told: Told, name: str) -> float:
    right = told.probabilities.argmax(1) == told.truth
    return float((right * _weights(told.truth, name)).sum())


def _drawn(told: Told, seed: int) -> dict[str, Float[np.ndarray, " draws"]]:
    """Both accuracies in resamples of the cells, within classes."""
    right = told.probabilities.argmax(1) == told.truth
    worth = {name: right * _weights(told.truth, name) for name in ("accuracy", "balanced_accuracy")}
    measures = {name: (lambda s, w=w: w[s].sum(1)) for name, w in worth.items()}
    return bootstrap(told.truth, measures, seed=seed)


def render(title: str, rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The page as text."""
    sets = list(dict.fromkeys(each["set"] for each in rows))
    table: dict[str, dict[str, Any]] = {}
    for each in rows:
        table.setdefault(each["method"], {})[each["set"]] = each
    return fill("shift.html.j2", title=title, rows=rows, sets=sets, table=table, facts=facts)
