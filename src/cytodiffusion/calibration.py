"""Held-out cells in, fitted budgets out: measure them, choose trials, fit; then again on changed cells.

What other laboratories change is not known here, only how far: until the model names about `NAMED` of the
changed cells right, judged on some of them (`_reach`). What is strange there is told from cells whose
colours were changed as usual. classify/fit.py has the fits.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cytodiffusion.classify.calibrate import out_of_fold, scores
from cytodiffusion.classify.classifier import ABROAD, ALARM, Budget
from cytodiffusion.classify.evidence import Meter, features_of
from cytodiffusion.classify.fit import (
    BUDGETS,
    Plan,
    Seen,
    balanced_subset,
    betting_race,
    candidates,
    choose_draws,
    fit_race,
    fit_sequence,
)
from cytodiffusion.classify.measure import Measurement
from cytodiffusion.classify.race import BettingRace, PaperRace, paper_draws
from cytodiffusion.classify.sequential import upper_limit
from cytodiffusion.data.images import Preprocess, to_pixels, to_tensor
from cytodiffusion.data.pixels import Pixels, class_index, load_pixels
from cytodiffusion.data.sample import Sample
from cytodiffusion.data.taxonomy import Taxonomy
from cytodiffusion.data.transforms import POSES, Augmentation, augment
from cytodiffusion.types import PIXELS, Space

CHANGED = 64  # cells that are changed at a time
# What another laboratory may change: size and sharpness as the preset cpu-far does, colours further.
ELSEWHERE = Augmentation(affine=0.7, zoom=0.35, light=0.04, blur=0.3, noise=0.2)
COLOURS = ("brightness", "contrast", "hue", "stain", "light")
NAMED = 0.6  # share of cells that are still named right when colours are changed enough (log 44)
FURTHEST = 16.0  # times the usual change of colour, at most
PROBE = 4  # that is tried on a fourth of the cells,
PROBED_LEVELS = 3  # at every third noise level


def plan_of(together: bool, space: Space, seed: int) -> Plan:
    """How a trained network is calibrated: fewer candidate trials where each class costs a pass."""
    plan = Plan(seed=seed, low=Plan.low * space.scale, high=Plan.high * space.scale)
    if together:
        return plan
    if space is PIXELS:
        return replace(plan, levels=12)
    return replace(plan, levels=8, race_cells=80, abroad_cells=80)


@dataclass(frozen=True)
class Calibrated:
    """Fitted budgets, and how each does on the held-out cells (fitted without the cell)."""

    budgets: dict[str, Budget]
    scores: dict[str, dict[str, float]]
    reach: float | None = None  # how far colours were changed for other laboratories (`elsewhere`)


@dataclass
class Work:
    """What measures the cells of a calibration, and how many it has measured so far."""

    meter: Meter
    every: Measurement  # all candidate trials
    plan: Plan
    workers: int
    done: int = 0

    def measured(
        self, pixels: Pixels, measurement: Measurement
    ) -> Generator[int, None, tuple[Float[np.ndarray, "n t k1"], Float[np.ndarray, "n f"]]]:
        """Yield how many cells are measured in all; returns errors and features of these."""

        def prepare(row: int) -> tuple[Tensor, str]:
            return to_tensor(pixels.images[row]), pixels.digests[row]

        count = len(pixels.labels)
        found = yield from measurement.follow(
            self.meter, count, prepare, self.workers, before=self.done
        )
        self.done += count
        return found


def calibrations(meter: Meter, pixels: Pixels, canvases: Pixels | None, plan: Plan) -> int:
    """How many cells `calibrate` measures."""
    times = 2 if features_of(meter) else 1
    found = times * len(pixels.labels) + 2 * len(balanced_subset(pixels.labels, plan.race_cells))
    if canvases is None:
        return found
    probed = len(balanced_subset(canvases.labels, plan.abroad_cells // PROBE))
    return found + (times + 1) * len(canvases.labels) + plan.probes * probed


def load_canvases(
    samples: Sequence[Sample], classes: Sequence[str], preprocess: Preprocess, plan: Plan,
    workers: int = 2, taxonomy: Taxonomy | None = None,
) -> Generator[int, None, Pixels | None]:  # fmt: skip
    """Yield how many images are loaded; returns about `plan.abroad_cells`, with room to be moved.

    Each class as often. None where fewer than two of a class can be read.
    """
    taxonomy = taxonomy or Taxonomy.load()
    labels = np.array([class_index(sample.label, classes, taxonomy) for sample in samples])
    chosen = [
        samples[row] for row in np.sort(balanced_subset(labels, plan.abroad_cells, plan.seed))
    ]
    margin = elsewhere(1.0).margin
    found = yield from load_pixels(chosen, classes, preprocess, margin, workers, taxonomy)
    return found if np.bincount(found.labels, minlength=len(classes)).min() > 1 else None


def elsewhere(reach: float) -> Augmentation:
    """What another laboratory may change; `reach` multiplies the change of colours."""
    return ELSEWHERE.model_copy(update={name: reach * getattr(ELSEWHERE, name) for name in COLOURS})


def changed(canvases: Pixels, size: int, reach: float, seed: int) -> Pixels:
    """Every cell changed once, as in another laboratory."""
    generator = torch.Generator().manual_seed(seed)
    images = [
        augment(to_tensor(part), size, elsewhere(reach), generator)
        for part in np.split(canvases.images, range(CHANGED, len(canvases.images), CHANGED))
    ]
    return replace(canvases, images=to_pixels(torch.cat(images).nan_to_num(nan=1.0)))


def calibrate(
    meter: Meter, pixels: Pixels, classes: int, together: bool, plan: Plan, workers: int = 1,
    space: Space = PIXELS, canvases: Pixels | None = None,
) -> Generator[int, None, Calibrated]:  # fmt: skip
    """Yield how many held-out cells are measured; returns the fitted budgets.

    `canvases`: from `load_canvases`, for the budgets that serve other laboratories.
    """
    truth, columns = pixels.labels, classes + 1
    latent = space is not PIXELS
    every = Measurement(
        candidates(plan), columns, POSES, together=together, space=space, shared=latent
    )
    work = Work(meter, every, plan, workers)
    budgets = yield from _sequence(work, pixels)
    reach = None
    if canvases is not None:
        size = pixels.images.shape[-1]
        reach = yield from _reach(work, canvases, size)
        far, near = (changed(canvases, size, each, plan.seed) for each in (reach, 1.0))
        found = yield from _sequence(work, far, ABROAD, near)
        budgets |= found

    rows = balanced_subset(truth, plan.race_cells, plan.seed)
    races: dict[str, BettingRace | PaperRace] = {
        "race": betting_race(budgets["full"], plan),
        "paper": PaperRace(paper_draws(plan.paper_most, plan.seed)),
    }
    for name, race in races.items():
        draws = race.draws.first(plan.race_trials)
        short = Measurement(
            draws, columns, POSES, race, together, anyone=together, space=space, shared=latent
        )
        errors, _ = yield from work.measured(pixels.part(rows), short)
        budgets[name] = fit_race(errors, truth[rows], race)
    judged = {name: scores(b.held.probabilities, b.held.truth) for name, b in budgets.items()}
    return Calibrated(budgets, judged, reach)


def cautions(budgets: dict[str, Budget]) -> list[str]:
    """What cannot be had from so few held-out cells; nothing where there are enough."""
    cells = {name: len(budget.held.truth) for name, budget in budgets.items()}
    least = math.ceil(1 / ALARM) - 1
    found = [
        f"{name}: no cell can be flagged anomalous; it takes {least}, here {cells[name]}."
        for name in ("full", "full" + ABROAD, "race", "paper")
        if cells.get(name, least) < least
    ]
    for ending in ("", ABROAD):
        if "full" + ending not in budgets:
            continue
        n = cells["full" + ending]
        for name, haste in BUDGETS.items():
            if haste.allowed and upper_limit(0, n) > haste.allowed:
                found.append(
                    f"{name}{ending}: every cell runs all trials; {n} held-out cells are too few to "
                    f"show that at most {haste.allowed:.1%} of the answers would differ."
                )
    return found


def _sequence(
    work: Work, cells: Pixels, ending: str = "", reference: Pixels | None = None
) -> Generator[int, None, dict[str, Budget]]:
    """Measure the candidate trials, choose among them, and fit the budgets of this ending.

    `reference`: the same cells, changed less, beside which others are strange.
    """
    truth, every = cells.labels, work.every
    errors, features = yield from work.measured(cells, every)
    draws, order = choose_draws(errors, truth, work.plan)
    if features.shape[1]:  # those of the first trial that a cell will run
        _, features = yield from work.measured(cells, replace(every, draws=draws.first(1)))
    seen, usual = Seen(errors[:, order], features), None
    if reference is not None:
        usual = Seen(*(yield from work.measured(reference, replace(every, draws=draws))))
    return fit_sequence(draws, seen, truth, not every.together, ending, usual)


def _reach(work: Work, canvases: Pixels, size: int) -> Generator[int, None, float]:
    """How far colours must change until a share `NAMED` is named right, from 1 to `FURTHEST`.

    By bisection of its log, on a part of the cells and of the noise levels.
    """
    plan, draws = work.plan, work.every.draws
    some = replace(work.every, draws=replace(draws, trials=draws.trials[::PROBED_LEVELS]))
    few = canvases.part(balanced_subset(canvases.labels, plan.abroad_cells // PROBE, plan.seed))
    low, high = 1.0, FURTHEST
    for _ in range(plan.probes):
        middle = math.sqrt(low * high)
        errors, _ = yield from work.measured(changed(few, size, middle, plan.seed), some)
        told = out_of_fold(errors[:, :, :-1], few.labels).argmax(1)
        low, high = (middle, high) if (told == few.labels).mean() > NAMED else (low, middle)
    return math.sqrt(low * high)
