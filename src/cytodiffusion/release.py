"""From labelled images to a bundle: load, train, calibrate, write.

Each stage can be cut and run again: training goes on from its checkpoint, and the rest takes minutes.
The command `train` and the recipes both go through here.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cytodiffusion import __version__
from cytodiffusion.classify.calibrate import nll, out_of_fold
from cytodiffusion.classify.classifier import Budget
from cytodiffusion.classify.draws import stratified
from cytodiffusion.classify.fit import (
    Plan,
    candidates,
    fit_budgets,
    fit_race,
    measure_in_parts,
    race_part,
)
from cytodiffusion.classify.race import PaperRace, paper_draws
from cytodiffusion.data.images import Preprocess, to_tensor
from cytodiffusion.data.load import load_images
from cytodiffusion.data.sample import Sample
from cytodiffusion.data.taxonomy import Taxonomy
from cytodiffusion.data.transforms import POSES
from cytodiffusion.diffusion.loss import UNLABELLED
from cytodiffusion.errors import DataError
from cytodiffusion.train.loop import Validate
from cytodiffusion.types import Classes, Denoiser


@dataclass(frozen=True)
class Pixels:
    """Images at a model's size, with their labels and what could not be read."""

    images: np.ndarray  # uint8, (n, 3, s, s)
    labels: Int[np.ndarray, " n"]
    digests: list[str]
    problems: list[str]  # 'name: reason'

    @property
    def sha256(self) -> str:
        """One digest for the whole set, whatever its order."""
        return hashlib.sha256("".join(sorted(self.digests)).encode()).hexdigest()


def load_pixels(
    samples: Sequence[Sample], classes: Sequence[str], preprocess: Preprocess, margin: float = 1.0,
    workers: int = 2, taxonomy: Taxonomy | None = None,
) -> Generator[int, None, Pixels]:  # fmt: skip
    """Yield how many images are loaded, now and then; returns the images."""
    taxonomy = taxonomy or Taxonomy.load()
    images, labels, digests, problems = [], [], [], []
    for done, item in enumerate(load_images(samples, preprocess, margin, workers), start=1):
        if item.pixels is None:
            problems.append(f"{item.sample.name}: {item.problem}")
        else:
            images.append(item.pixels)
            labels.append(class_index(item.sample.label, classes, taxonomy))
            digests.append(item.sha256)
        if done % 64 == 0:
            yield done
    if not images:
        raise DataError(f"None of the {len(samples)} images could be read. Try: data check.")
    return Pixels(np.stack(images), np.array(labels, dtype=np.int64), digests, problems)


def class_index(label: str | None, classes: Sequence[str], taxonomy: Taxonomy) -> int:
    """Column of a label's class; UNLABELLED where there is no label. Raises DataError."""
    if label is None:
        return UNLABELLED
    name = taxonomy.resolve(label, classes)
    if name is None:
        raise DataError(
            f"The label '{label}' is none of the classes {', '.join(classes)} and the taxonomy knows "
            "no class above it that is. Rename it, or give a taxonomy that lists it."
        )
    return list(classes).index(name)


def class_names(samples: Sequence[Sample]) -> tuple[str, ...]:
    """The labels of a data set, sorted. Raises DataError for fewer than two."""
    names = tuple(sorted({sample.label for sample in samples if sample.label is not None}))
    if len(names) < 2:
        raise DataError(
            f"Training needs at least two classes; found {len(names)}. Put each class in a folder "
            "of its own, or give a manifest with the columns path,label."
        )
    return names


def validator(pixels: Pixels, classes: int, together: bool) -> Validate:
    """Scores a denoiser on held-out cells: out-of-fold NLL and accuracies, four frozen trials."""
    images, draws = to_tensor(pixels.images), stratified(4, 0.05, 4.0, frozen=True)

    def validate(denoiser: Denoiser) -> dict[str, float]:
        parts = measure_in_parts(denoiser, images, pixels.digests, draws, classes, POSES, together)
        errors = np.concatenate(list(parts))[:, :, :-1]
        return scores(out_of_fold(errors, pixels.labels), pixels.labels)

    return validate


def scores(
    probabilities: Float[np.ndarray, "n k"], truth: Int[np.ndarray, " n"]
) -> dict[str, float]:
    """NLL, accuracy and balanced accuracy."""
    right = probabilities.argmax(1) == truth
    balanced = np.mean([right[truth == k].mean() for k in np.unique(truth)])
    return {
        "nll": nll(probabilities, truth),
        "accuracy": float(right.mean()),
        "balanced_accuracy": float(balanced),
    }


@dataclass(frozen=True)
class Calibrated:
    """Fitted budgets, and how each does on the held-out cells (fitted without the cell)."""

    budgets: dict[str, Budget]
    scores: dict[str, dict[str, float]]


def calibrate(
    denoiser: Denoiser, pixels: Pixels, classes: int, together: bool, plan: Plan
) -> Generator[int, None, Calibrated]:
    """Yield how many held-out cells are measured; returns the fitted budgets."""
    images, truth, digests = to_tensor(pixels.images), pixels.labels, pixels.digests
    rows = race_part(truth, plan.race_cells, plan.seed)
    race = PaperRace(paper_draws(plan.race_most, plan.seed))
    work = (
        (np.arange(len(truth)), candidates(plan), None),
        (rows, race.draws.first(plan.race_trials), race),
    )
    measured, done = [], 0
    for chosen, draws, policy in work:
        parts, names = [], [digests[i] for i in chosen]
        for part in measure_in_parts(
            denoiser, images[chosen], names, draws, classes, POSES, together, policy
        ):
            parts.append(part)
            done += len(part)
            yield done
        measured.append(np.concatenate(parts))
    budgets, judged = {}, {}
    for name, budget, probabilities in fit_budgets(measured[0], truth, plan):
        budgets[name], judged[name] = budget, scores(probabilities, truth)
    budgets["paper"], probabilities = fit_race(measured[1], truth[rows], race)
    judged["paper"] = scores(probabilities, truth[rows])
    return Calibrated(budgets, judged)


CARD = """# {name}

Names single blood cells: {classes}.

**Research use only. Not a medical device; not for diagnosis.**

| | |
|---|---|
| network | compact U-Net, {form}, {parameters:.1f} M parameters |
| input | centre {crop:.0%} of the shorter side, at {size} px |
| data | {data} ({train_images:,} training images) |
| made by | {recipe}, commit {commit}, seed {seed}, {steps:,} steps |

## On the held-out cells it was calibrated on

Five-fold: weights are fitted without the cell that they name. Validation, not test.

| budget | trials | balanced accuracy | accuracy | NLL, nats |
|---|---|---|---|---|
{rows}
"""


def make_card(
    name: str, classes: Classes, preprocess: Preprocess, form: str, parameters: int,
    calibrated: Calibrated, origin: dict[str, Any],
) -> str:  # fmt: skip
    """The model card: what it is, where it came from, how it did on validation."""
    rows = "\n".join(
        f"| {budget} | {'race' if budget == 'paper' else len(calibrated.budgets[budget].draws)} "
        f"| {s['balanced_accuracy']:.4f} | {s['accuracy']:.4f} | {s['nll']:.4f} |"
        for budget, s in calibrated.scores.items()
    )
    words = {"name": name, "classes": ", ".join(classes), "form": form, "rows": rows}
    shape = {"parameters": parameters / 1e6, "crop": preprocess.crop, "size": preprocess.size}
    return CARD.format(**words, **shape, **origin)


def commit() -> str:
    """The commit this code is at, or the version where there is no checkout."""
    here = Path(__file__).parent
    words = ["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        found = ""
    return found or f"v{__version__}"
