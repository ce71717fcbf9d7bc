"""Cells of another laboratory in, a model that knows their look out. No label of theirs is used.

    names -> the surer half of each name, taken for labels -> fine-tune -> names -> ...

Self-training in rounds. Every round begins with the weights of the model that is adapted, so that it
learns from better names, not for longer; the cells that are named less surely train "any cell" alone.
How errors are read, probabilities, sets and when to stop, stays as the model's budgets for other
laboratories have it. Strangeness alone is told anew, beside these cells, since the trunk moved: most of
them, nine in ten say, must be cells of the known classes.

What a model is surely wrong about it learns to be wrong about: one class named for another stays so.

Source: Zou, Yu, Kumar and Wang 2018, class-balanced self-training, arXiv 1810.07911; begun anew in each
round as in Lee 2013, pseudo-labels.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from cytodiffusion.bundle import Model, Parts, read_weights, save_bundle
from cytodiffusion.classify.adapt import beside, sure_names
from cytodiffusion.classify.classifier import ABROAD, Budget, Classifier
from cytodiffusion.classify.fit import BUDGETS
from cytodiffusion.data.images import Preprocess, to_tensor
from cytodiffusion.data.pixels import Pixels
from cytodiffusion.diffusion.precondition import NetworkDenoiser
from cytodiffusion.train.loop import Run, TrainingSet
from cytodiffusion.train.settings import TrainSettings

SHARES = (0.5, 0.5)  # of the cells of each name, taken for labelled, round by round


class Cells(NamedTuple):
    """Cells as the model sees them, and with room to be moved."""

    pixels: Pixels
    canvases: UInt8[np.ndarray, "n 3 s s"]


class Seen(NamedTuple):
    """All trials of each cell, and what is made of them."""

    errors: Float[np.ndarray, "n t k1"]
    features: Float[np.ndarray, "n f"]
    probabilities: Float[np.ndarray, "n k"]  # over all classes; 0 for one that cannot be answered


@dataclass(frozen=True)
class Wanted:
    """How the cells are read."""

    budget: str  # one that runs all trials
    answers: tuple[str, ...] | None = None
    workers: int = 1


def with_denoiser(model: Model, denoiser: NetworkDenoiser) -> Classifier:
    """The model's classifier with another denoiser of the same shape, by torch."""
    own = model.classifier
    return Classifier(
        denoiser, own.classes, own.budgets, own.poses, together=own.together, name=own.name,
        device=own.device, space=own.space,
    )  # fmt: skip


def look(classifier: Classifier, pixels: Pixels, wanted: Wanted) -> Generator[int, None, Seen]:
    """Yield how many cells are measured; returns what is seen of them."""

    def prepare(row: int) -> tuple[Tensor, str]:
        return to_tensor(pixels.images[row]).to(classifier.device), pixels.digests[row]

    measurement, count = classifier.measurement(wanted.budget), len(pixels.digests)
    errors, features = yield from measurement.follow(
        classifier.meter, count, prepare, wanted.workers
    )
    table = classifier.table(errors, features, pixels.digests, wanted.budget)
    told = classifier.read(table, wanted.budget, answers=wanted.answers)
    probabilities = np.zeros((count, len(classifier.classes)))
    columns = [classifier.classes.index(name) for name in told.classes]
    probabilities[:, columns] = told.probabilities
    return Seen(errors, features, probabilities)


def begin_round(
    folder: Path, model: Model, cells: Cells, labels: Int[np.ndarray, " n"], settings: TrainSettings
) -> Run:
    """A training that begins with the model's own weights; goes on where it was cut."""
    weights, names = read_weights(model.folder)
    start = {f"denoiser.network.{name}": value for name, value in weights.items()}
    data = TrainingSet(cells.canvases, labels, tuple(names))
    return Run(folder, settings, data, str(model.classifier.device), start)


def labels_of(seen: Seen, number: int) -> Int[np.ndarray, " n"]:
    """What round `number`, from 0 on, takes for labels; -1 where it takes none."""
    return sure_names(seen.probabilities, SHARES[number])


def budgets_of(model: Model, wanted: Wanted, seen: Seen) -> dict[str, Budget]:
    """The sequential budgets of the adapted model, under their plain names."""
    ending = ABROAD if wanted.budget.endswith(ABROAD) else ""
    return {
        name: beside(model.classifier.budget(name + ending), seen.errors, seen.features)
        for name in BUDGETS
    }


CARD = """# {name}

{start}, adapted to {train_images:,} cells of another laboratory, without a label of theirs.

**Research use only. Not a medical device; not for diagnosis.**

| | |
|---|---|
| begun with | {start} |
| cells | {data}, {train_images:,} that could be read |
| made by | {recipe}, commit {commit}, seed {seed}, {count} rounds of {steps:,} steps |
| answers | {answers} |

## What to know

* Nobody has told it whether these names are right. Label some cells and run `cytodiffusion evaluate`.
* It has learned to name {answers}, and hardly names anything else any more. What {start} was surely
  wrong about, it has learned to be wrong about: a class that hardly comes up among the cells may have taken
  over part of another.
* Probabilities and sets are read as {start} reads {whose} (`{budget}` and the like);
  nobody has measured them here.
* `anomalous` is what is far from the cells that it was adapted to: it is meant for that laboratory, and for
  no other. If more than about a tenth of them were none of its classes, fewer strangers are flagged.

The card of what it began with:

---

{before}"""
ABROAD_CELLS = "cells of other laboratories, fitted on changed cells of its own"
HOME_CELLS = "cells of its own laboratory"


def save_adapted(
    folder: Path, name: str, model: Model, denoiser: NetworkDenoiser, preprocess: Preprocess,
    wanted: Wanted, seen: Seen, origin: dict[str, Any],
) -> None:  # fmt: skip
    """Write the bundle of a model that was adapted, by `seen` of it. Raises OutputError.

    `origin` says where it came from; what the model itself came from is kept under `before`.
    """
    texts = {
        one: (model.folder / one).read_text() for one in ("card.md", "LICENSE", "data_license.txt")
    }
    origin = origin | {
        "start": model.name, "start_sha256": model.weights_sha256, "budget": wanted.budget,
        "answers": list(wanted.answers or model.classes.names), "before": model.config["origin"],
    }  # fmt: skip
    whose = ABROAD_CELLS if wanted.budget.endswith(ABROAD) else HOME_CELLS
    told = {"answers": ", ".join(origin["answers"]), "before": texts["card.md"]}
    card = CARD.format(name=name, whose=whose, count=len(origin["rounds"]), **origin | told)
    unsaid = f"\nThe cells it was adapted to ({origin['data']}): no licence has been stated for them yet.\n"
    save_bundle(
        folder,
        Parts(
            name=name, denoiser=denoiser, classes=model.classes, preprocess=preprocess,
            budgets=budgets_of(model, wanted, seen), taxonomy=model.taxonomy, card=card,
            license=texts["LICENSE"], data_license=texts["data_license.txt"] + unsaid, origin=origin,
            space=model.space,
        ),
    )  # fmt: skip
