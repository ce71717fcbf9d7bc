"""Does a model hold on cells of another laboratory?

No label of the foreign cells is seen. A `Step` is what may be done nevertheless. It works on each frame
(its light), on a batch as a whole (one scale, from its own nuclei) or on the reading: with weights that
were fitted on cells changed as another laboratory might (classify/fit.py), or of the batch as a whole
(classify/adapt.py). `abroad` is what `predict` does unasked where frames are clearly in another light, with
all trials; what `abroad + ...` add was tried, and did not help on the whole or assumes too much. One step
alone changes weights: `self-trained` is `abroad` by the model that `adapt` makes of the unlabelled cells,
for each set its own.

The mean over sets weighs every set alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import softmax

from cytodiffusion.classify.adapt import centred, em_prior
from cytodiffusion.classify.calibrate import change_prior
from cytodiffusion.classify.classifier import Classifier
from cytodiffusion.data.images import Preprocess
from cytodiffusion.data.look import Look, Match, crop_for
from cytodiffusion.evaluate.cost import Measured, spent
from cytodiffusion.evaluate.intervals import balanced_interval, binomial_interval, mean_interval
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

    @property
    def right(self) -> Bool[np.ndarray, " n"]:
        """Whether each cell is named as it is labelled."""
        return self.probabilities.argmax(1) == self.truth


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


def row(told: Told, answers: Sequence[str]) -> dict[str, Any]:
    """Accuracy, balanced accuracy over the classes that the set has, and each recall."""
    truth, n = told.truth, len(told.truth)
    right = told.right
    present = np.unique(truth)
    recall = {answers[k]: float(right[truth == k].mean()) for k in present.tolist()}
    return {
        "cells": n,
        "accuracy": float(right.mean()),
        "accuracy_ci95": list(binomial_interval(int(right.sum()), n)),
        "balanced_accuracy": float(np.mean([*recall.values()])),
        "balanced_accuracy_ci95": list(balanced_interval(truth, right)),
        "recall": recall,
        "cells_of_class": {answers[k]: int((truth == k).sum()) for k in present.tolist()},
        "classes_missing": [name for k, name in enumerate(answers) if k not in present],
        "ece": ece(truth, told.probabilities),
        "passes_per_cell": told.passes,
        "cells_per_second": n / told.seconds,
        "target_labels_used": False,
    }


def mean_row(told: Sequence[Told]) -> dict[str, Any]:
    """Mean over sets, each weighed alike, with the interval of the mean."""
    cells = [np.array([[one.right.sum()], [len(one.truth)]]) for one in told]
    classes = [_recalls(one) for one in told]
    found: dict[str, Any] = {"cells": sum(len(one.truth) for one in told)}
    for name, parts in (("accuracy", cells), ("balanced_accuracy", classes)):
        weights = np.concatenate([np.full(p.shape[1], 1 / p.shape[1] / len(told)) for p in parts])
        hits, n = np.concatenate(parts, axis=1)
        found[name] = float(weights @ (hits / n))
        found[f"{name}_ci95"] = list(mean_interval(hits, n, weights))
    return found | {"passes_per_cell": float(np.mean([one.passes for one in told]))}


def _recalls(told: Told) -> Int[np.ndarray, "two k"]:
    """How many cells of each class that there is are named right, and how many there are."""
    classes = np.unique(told.truth)
    return np.array([
        [told.right[told.truth == k].sum() for k in classes], np.bincount(told.truth)[classes]
    ])  # fmt: skip


def render(title: str, rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The page as text."""
    sets = list(dict.fromkeys(each["set"] for each in rows))
    table: dict[str, dict[str, Any]] = {}
    for each in rows:
        table.setdefault(each["method"], {})[each["set"]] = each
    return fill("shift.html.j2", title=title, rows=rows, sets=sets, table=table, facts=facts)
