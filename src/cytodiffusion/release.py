"""From labelled images to a bundle: load, train, calibrate, write.

Each stage can be cut and run again: training goes on from its checkpoint, and the rest takes minutes.
The command `train` and the recipes both go through here.
"""

from __future__ import annotations

import hashlib
import math
import subprocess
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cytodiffusion import __version__
from cytodiffusion.classify.calibrate import nll, out_of_fold
from cytodiffusion.classify.classifier import ABROAD, Budget, RaceReader
from cytodiffusion.classify.draws import stratified
from cytodiffusion.classify.evidence import DenoiserMeter, Meter, features_of
from cytodiffusion.classify.fit import (
    Plan,
    betting_race,
    candidates,
    choose_draws,
    fit_race,
    fit_sequence,
    race_part,
)
from cytodiffusion.classify.measure import Measurement
from cytodiffusion.classify.race import BettingRace, PaperRace, paper_draws
from cytodiffusion.data.images import Preprocess, to_pixels, to_tensor
from cytodiffusion.data.load import load_images
from cytodiffusion.data.sample import Sample
from cytodiffusion.data.taxonomy import Taxonomy
from cytodiffusion.data.transforms import POSES, Augmentation, augment
from cytodiffusion.diffusion.loss import UNLABELLED
from cytodiffusion.diffusion.precondition import NetworkDenoiser
from cytodiffusion.errors import DataError
from cytodiffusion.train.loop import Validate
from cytodiffusion.types import PIXELS, Classes, Space

FEW = 320  # held-out cells that score a class-conditional network while it trains
CHANGED = 64  # cells that are changed at a time
# What another laboratory may change: size and sharpness as the preset cpu-far does, colours further.
ELSEWHERE = Augmentation(affine=0.7, zoom=0.35, light=0.04, blur=0.3, noise=0.2)
COLOURS = ("brightness", "contrast", "hue", "stain", "light")
NAMED = 0.6  # share of cells that are still named right when colours are changed enough (log 44)
FURTHEST = 16.0  # times the usual change of colour, at most
PROBE = 4  # that is tried on a fourth of the cells,
PROBED_LEVELS = 3  # at every third noise level


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

    def part(self, rows: Int[np.ndarray, " m"]) -> Pixels:
        """These images alone."""
        digests = [self.digests[row] for row in rows]
        return Pixels(self.images[rows], self.labels[rows], digests, self.problems)


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
            "no class above it that is. Rename it, or give a taxonomy that lists it (--taxonomy)."
        )
    return list(classes).index(name)


def class_names(samples: Sequence[Sample], taxonomy: Taxonomy | None = None) -> tuple[str, ...]:
    """The classes of a data set, sorted; spellings of one class count once.

    Raises DataError for fewer than two.
    """
    spelled = (taxonomy or Taxonomy.load()).respell(samples)
    names = tuple(sorted({sample.label for sample in spelled if sample.label is not None}))
    if len(names) < 2:
        raise DataError(
            f"Training needs at least two classes; found {len(names)}. Put each class in a folder "
            "of its own, or give a manifest with the columns path,label."
        )
    return names


def validator(
    pixels: Pixels, classes: int, together: bool, space: Space = PIXELS, radius: float | None = None
) -> Validate:
    """Scores a denoiser on held-out cells: out-of-fold NLL and accuracies, four frozen trials.

    On `FEW` of them where every class costs a pass. `radius`: of the disc within which errors count.
    """
    pixels = pixels if together else pixels.part(race_part(pixels.labels, FEW))
    draws = stratified(4, 0.05 * space.scale, 4.0 * space.scale, frozen=True)
    images = to_tensor(pixels.images)

    def validate(denoiser: NetworkDenoiser) -> dict[str, float]:
        device = next(denoiser.parameters()).device
        measurement = Measurement(
            draws, classes + 1, POSES, together=together, space=space, shared=space is not PIXELS
        )
        errors = measurement.measure(
            DenoiserMeter(denoiser, radius), images.to(device), pixels.digests
        )
        return scores(out_of_fold(errors[:, :, :-1], pixels.labels), pixels.labels)

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
        errors, features = measurement.nothing(self.meter, len(pixels.labels))

        def prepare(row: int) -> tuple[Tensor, str]:
            return to_tensor(pixels.images[row]), pixels.digests[row]

        rows = range(len(pixels.labels))
        for place, *found in measurement.stream(self.meter, rows, prepare, self.workers):
            errors[place], features[place] = found
            self.done += 1
            yield self.done
        return errors, features


def calibrations(meter: Meter, pixels: Pixels, canvases: Pixels | None, plan: Plan) -> int:
    """How many cells `calibrate` measures."""
    times = 2 if features_of(meter) else 1
    found = times * len(pixels.labels) + 2 * len(race_part(pixels.labels, plan.race_cells))
    if canvases is None:
        return found
    probed = len(race_part(canvases.labels, plan.abroad_cells // PROBE))
    return found + times * len(canvases.labels) + plan.probes * probed


def load_canvases(
    samples: Sequence[Sample], classes: Sequence[str], preprocess: Preprocess, plan: Plan,
    workers: int = 2, taxonomy: Taxonomy | None = None,
) -> Generator[int, None, Pixels | None]:  # fmt: skip
    """Yield how many images are loaded; returns about `plan.abroad_cells`, with room to be moved.

    Each class as often. None where fewer than two of a class can be read.
    """
    taxonomy = taxonomy or Taxonomy.load()
    labels = np.array([class_index(sample.label, classes, taxonomy) for sample in samples])
    chosen = [samples[row] for row in np.sort(race_part(labels, plan.abroad_cells, plan.seed))]
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
        found = yield from _sequence(work, changed(canvases, size, reach, plan.seed), ABROAD)
        budgets |= found

    rows = race_part(truth, plan.race_cells, plan.seed)
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


def _sequence(
    work: Work, cells: Pixels, ending: str = ""
) -> Generator[int, None, dict[str, Budget]]:
    """Measure the candidate trials, choose among them, and fit the budgets of this ending."""
    truth, every = cells.labels, work.every
    errors, features = yield from work.measured(cells, every)
    draws, order = choose_draws(errors, truth, work.plan)
    if features.shape[1]:  # those of the first trial that a cell will run
        _, features = yield from work.measured(cells, replace(every, draws=draws.first(1)))
    return fit_sequence(draws, errors[:, order], truth, not every.together, features, ending)


def _reach(work: Work, canvases: Pixels, size: int) -> Generator[int, None, float]:
    """How far colours must change until a share `NAMED` is named right: by bisection of its log."""
    plan, draws = work.plan, work.every.draws
    some = replace(work.every, draws=replace(draws, trials=draws.trials[::PROBED_LEVELS]))
    few = canvases.part(race_part(canvases.labels, plan.abroad_cells // PROBE, plan.seed))
    low, high = 1.0, FURTHEST
    for _ in range(plan.probes):
        middle = math.sqrt(low * high)
        errors, _ = yield from work.measured(changed(few, size, middle, plan.seed), some)
        told = out_of_fold(errors[:, :, :-1], few.labels).argmax(1)
        low, high = (middle, high) if (told == few.labels).mean() > NAMED else (low, middle)
    return math.sqrt(low * high)


CARD = """# {name}

Names single blood cells: {classes}.

**Research use only. Not a medical device; not for diagnosis.**

| | |
|---|---|
| network | {form}, {parameters:.1f} M parameters |
| input | centre {crop:.0%} of the shorter side, at {size} px |
| data | {data} ({train_images:,} training images) |
| made by | {recipe}, commit {commit}, seed {seed}, {steps:,} steps{begun} |
{extra}
## On the held-out cells it was calibrated on

Five-fold: weights are fitted without the cell that they name. Validation, not test. {twins}

| budget | passes | balanced accuracy | accuracy | NLL, nats |
|---|---|---|---|---|
{rows}
"""


TWINS = """\
Budgets that end in
`-abroad` are for frames of another laboratory: they are fitted and judged on cells of the same split whose
colour, size and sharpness were changed, colours {reach:.1f} times as far as usual in training."""
POSED = """\
| turning latents | differs from encoding the turned cell by {pose_error} of their standard deviation |
"""
ANEW = """\
| calibrated anew | on {calibrated_on}, commit {calibrated_at} |
"""


def make_card(
    name: str, classes: Classes, preprocess: Preprocess, form: str, parameters: int,
    calibrated: Calibrated, origin: dict[str, Any],
) -> str:  # fmt: skip
    """The model card: what it is, where it came from, how it did on validation."""
    rows = "\n".join(
        f"| {budget} | {_passes(budget, calibrated.budgets[budget])} "
        f"| {s['balanced_accuracy']:.4f} | {s['accuracy']:.4f} | {s['nll']:.4f} |"
        for budget, s in calibrated.scores.items()
    )
    twins = TWINS.format(reach=calibrated.reach) if calibrated.reach else ""
    words = {
        "twins": twins,
        "name": name,
        "classes": ", ".join(classes),
        "form": form,
        "rows": rows,
    }
    shape = {"parameters": parameters / 1e6, "crop": preprocess.crop, "size": preprocess.size}
    start = origin.get("start") or origin.get("pretrained")
    begun = f", begun with the weights of {start}" if start else ""
    extra = POSED.format(**origin) if "pose_error" in origin else ""
    extra += ANEW.format(**origin) if "calibrated_on" in origin else ""
    return CARD.format(**words, **shape, **origin, begun=begun, extra=extra)


def _passes(name: str, budget: Budget) -> str:
    """How many passes a cell takes, for the card."""
    if isinstance(budget.reader, RaceReader):
        return f"race, on {len(budget.held.truth)} cells, as many of each class"
    said = budget.agreement
    assert said is not None
    if not said.allowed:
        return f"{said.passes:g}"
    full = "full" + ABROAD * name.endswith(ABROAD)
    return f"{said.passes:.2f} in the mean; {said.allowed:.1%} may differ from `{full}`"


def commit() -> str:
    """The commit this code is at, with a + where files differ from it; else the version."""
    package = Path(__file__).resolve().parent
    top = _git(package, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() / "src" / package.name != package:
        return f"v{__version__}"  # no checkout of this project
    changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    return _git(package, "rev-parse", "--short=12", "HEAD") + "+" * bool(changed)


def _git(folder: Path, *words: str) -> str:
    """What git says; nothing where it is not there, or has nothing to say."""
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False
        ).stdout.strip()
    except OSError:
        return ""
