"""The steps of `bench low-data`: which cells, which trainings, what each says of the cells of the test.

What a training says is kept in OUT/told (trainings.py).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cytodiffusion.cli.benches import digest_of
from cytodiffusion.cli.console import Console, cores
from cytodiffusion.cli.trainings import TUNED, Told, kept, told_by_baseline

if TYPE_CHECKING:
    import numpy as np

    from cytodiffusion.data.images import Preprocess
    from cytodiffusion.data.pixels import Pixels
    from cytodiffusion.data.sample import Sample
    from cytodiffusion.data.taxonomy import Taxonomy
    from cytodiffusion.evaluate.low_data import Method
    from cytodiffusion.train.loop import Run
    from cytodiffusion.train.settings import TrainSettings

# The preset cpu here: minutes a training, with a network of half the work, and most weight on naming
# (docs/log.md 37). --set goes over it.
SHORT = (
    "steps=1000", "warmup=30", "ema=0.98", "cooldown=0.5", "checkpoint_minutes=0.5", "balance=1",
    "classification=10", "sigma_mean=-1.8", "sigma_std=0.9",
    "network.width=32", "network.multipliers=[1,2,2]", "network.blocks=1",
    "augmentation.affine=0.5", "augmentation.far=0",
)  # fmt: skip
# Without labels there is nothing to name: all noise levels that drawing takes.
UNNAMED = {"classification": 0.0, "balance": 0.0, "sigma_mean": -0.9, "sigma_std": 1.3}


@dataclass(frozen=True)
class Pretrained:
    """A baseline that was trained before."""

    folder: Path
    sha256: str  # of its weights
    trained: dict[str, Any]  # how


@dataclass(frozen=True)
class World:
    """What every job needs; sent to every process."""

    out: Path
    settings: TrainSettings  # of ours; its augmentation is also the baselines'
    classes: tuple[str, ...]
    train: Pixels  # canvases, all of them labelled: a job hides labels
    test: Pixels
    seed: int
    first_steps: int  # of ours on the unlabelled cells alone; 0: none
    device: str
    start: str | None = None  # model that ours begins with
    pretrained: dict[str, Pretrained] = field(default_factory=dict)  # by kind of baseline


@dataclass(frozen=True)
class Job:
    """One training."""

    count: int  # labels a class
    repeat: int
    method: Method
    minutes: float | None = None  # of a baseline

    def __str__(self) -> str:
        return f"{self.count} labels, repeat {self.repeat}, {self.method}"


def settings_of(preset: str, changes: Sequence[str], start: str | None = None) -> TrainSettings:
    """Settings of ours, which may begin with a model. Raises SettingsError, ModelError."""
    from cytodiffusion.cli.train import settings_from
    from cytodiffusion.errors import SettingsError

    short = SHORT if preset == "cpu" and start is None else ()
    settings = settings_from(preset, [*short, *changes], start)
    if not settings.together:
        raise SettingsError("This bench trains a network with a head for each class: form=heads.")
    return settings


def start_digest(start: str) -> str:
    """sha256 of the weights of a model, as released. Raises ModelError."""
    from cytodiffusion.bundle import find_bundle, weights_of

    return weights_of(find_bundle(start))


def find_pretrained(
    folders: Sequence[Path], kinds: Sequence[str], start: str | None
) -> dict[str, Pretrained]:
    """Trained baselines by their kind: with `start` one for each kind, without it none.

    Raises SettingsError, and DataError for a folder that has none.
    """
    import hashlib

    from cytodiffusion.errors import DataError, SettingsError
    from cytodiffusion.evaluate.baselines import Baseline

    found = dict[str, Pretrained]()
    for folder in folders:
        try:
            baseline = Baseline.load(folder)
            weights = (folder / "model.safetensors").read_bytes()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder} has no trained baseline ({error}). Give a folder of OUT/baselines, as bench "
                "shift and bench anomaly write them."
            ) from error
        sha, kind = hashlib.sha256(weights).hexdigest(), baseline.settings.kind
        if kind in found:
            raise SettingsError(f"Two trained baselines are of one kind, {kind}. Give one.")
        found[kind] = Pretrained(folder.resolve(), sha, baseline.trained)
    if set(found) != (set(kinds) if start else set()):
        raise SettingsError(
            "All begin with what was trained before, or none: --from MODEL takes a --baseline-from for "
            f"each of the --baselines ({', '.join(kinds) or 'none'}), and no other."
        )
    return found


# --- cells ---------------------------------------------------------------------------------------


def list_cells(
    source: Path, splits: Path | None, split: str, seed: int, labels: Taxonomy, console: Console,
    share: float = 0.2, classes: Sequence[str] | None = None,
) -> tuple[list[Sample], list[Sample]]:  # fmt: skip
    """Samples to train on (some without labels) and labelled ones to test on.

    Of a set without splits, `share` is tested on. `classes`: the only ones that take part. Raises
    DataError, SettingsError.
    """
    from cytodiffusion.cli.train import deal
    from cytodiffusion.data.mark import refuse_marked
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.errors import DataError, SettingsError

    if split == "train":
        raise SettingsError("The cells of `train` are trained on. Give another split to test on.")
    samples = labels.respell(read_dataset(source, splits=splits))
    known = [sample for sample in samples if sample.label is not None]
    if classes:
        classes = [labels.canonical(name) or name for name in classes]
        named = {sample.label: labels.resolve(str(sample.label), classes) for sample in known}
        known = [replace(s, label=named[s.label]) for s in known if named[s.label] is not None]
        if none := set(classes) - set(named.values()):
            raise DataError(f"{source} has no cell of: {', '.join(sorted(none))}.")
    if known and all(sample.split is None for sample in known):
        known = deal(known, seed, console, {"train": 1 - share, split: share})
    train, test = ([s for s in known if s.split == name] for name in ("train", split))
    for name, found in (("train", train), (split, test)):
        if not found:
            raise DataError(f"{source} has no labelled cell in the split '{name}'.")
    refuse_marked(test)
    bare = [s for s in samples if s.label is None and s.split in (None, "train")]
    return [*train, *bare], test


def read_cells(
    samples: Sequence[Sample], what: str, classes: tuple[str, ...], preprocess: Preprocess,
    margin: float, labels: Taxonomy, console: Console,
) -> Pixels:  # fmt: skip
    """The images, in an order that does not depend on the listing. Those not read are named."""
    import numpy as np

    from cytodiffusion.data.pixels import load_pixels

    work = load_pixels(samples, classes, preprocess, margin, cores(), labels)
    found = console.follow(work, f"reading {what}", len(samples), "images")
    console.not_read(*found.problems)
    return found.part(np.argsort(found.digests, kind="stable"))


def some(samples: Sequence[Sample], count: int | None, seed: int) -> Sequence[Sample]:
    """About `count` cells, as many of each class; all where it is None."""
    import numpy as np

    from cytodiffusion.classify.fit import balanced_subset

    if count is None:
        return samples
    truth = np.unique([str(sample.label) for sample in samples], return_inverse=True)[1]
    return [samples[i] for i in np.sort(balanced_subset(truth, count, seed))]


def given_to(world: World, job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training cells that a job sees, and their labels; -1: hidden."""
    import numpy as np

    from cytodiffusion.evaluate.low_data import choose

    chosen = choose(world.train.labels, job.count, world.seed, job.repeat)
    if not job.method.rest:
        return chosen, world.train.labels[chosen]
    hidden = np.full(len(world.train.labels), -1)
    hidden[chosen] = world.train.labels[chosen]
    return np.arange(len(hidden)), hidden


# --- one training --------------------------------------------------------------------------------


def place(world: World, job: Job) -> Path:
    """Where what it says is kept."""
    from cytodiffusion.evaluate.low_data import OURS, draws

    rows, labels = given_to(world, job)
    cells = [(world.train.digests[i], int(k)) for i, k in zip(rows, labels, strict=True)]
    first = first_settings(world) if job.method.rest and world.first_steps else None
    if job.method.kind == OURS:
        own: Any = (world.settings, first, draws())
        own += (start_digest(world.start),) if world.start else ()
    else:
        own = _baseline(world, job)
        if begun := world.pretrained.get(job.method.kind):
            own = (own.model_copy(update={"weights": None}), begun.sha256)
    light = (world.settings.preprocess, world.settings.augmentation, world.classes)
    about = (job.repeat, world.seed, own, light, cells, world.test.sha256)
    name = f"{job.count}-{job.repeat}-{str(job.method).replace(' + ', '-')}-{digest_of(about)}"
    return world.out / "told" / f"{name}.npz"


def work(world: World, job: Job) -> Told:
    """Train and test, or read where that was done before."""
    from cytodiffusion.evaluate.low_data import OURS

    path = place(world, job)
    folder = world.out / "runs" / path.stem

    def train() -> Told:
        ours = job.method.kind == OURS
        return _train_ours(world, job, folder) if ours else _train_baseline(world, job)

    told = kept(path, train)
    shutil.rmtree(folder, ignore_errors=True)
    return told


def _train_ours(world: World, job: Job, folder: Path) -> Told:
    from cytodiffusion.cli.train import first_weights
    from cytodiffusion.train.loop import Run, TrainingSet

    rows, labels = given_to(world, job)
    canvases = world.train.images if job.method.rest else world.train.images[rows]
    first = first_folder(world) if job.method.rest and world.first_steps else None
    settings = world.settings.model_copy(update={"seed": world.seed + job.repeat})
    begin = str(first) if first else world.start
    start = first_weights(begin, world.classes) if begin else None
    run = Run(folder, settings, TrainingSet(canvases, labels, world.classes), world.device, start)
    for _ in fit(run):
        pass
    seconds = spent(folder) + (spent(first) if first else 0)
    seconds = max(round(seconds, 1), 0.1)  # a baseline takes as long, and some time it must have
    return Told(_ask(run, world.test), seconds, run.step)


def fit(run: Run) -> Generator[int, None, None]:
    """Yield steps. Seconds in metrics.jsonl are the processor's where there is no GPU."""
    from cytodiffusion.files import writing_to
    from cytodiffusion.train.loop import train
    from cytodiffusion.train.record import record

    clock = time.process_time if run.accelerator.device.type == "cpu" else time.monotonic
    began = clock()
    for progress in train(run, report_every=10):
        taken, began = clock() - began, clock()
        with writing_to(run.folder):
            record(run, replace(progress, seconds=max(taken, 1e-9)))
        yield progress.step


def spent(folder: Path) -> float:
    """Seconds of a training, what was before a cut included."""
    from cytodiffusion.train.record import read_metrics

    return sum(line["seconds"] for line in read_metrics(folder / "metrics.jsonl"))


def _ask(run: Run, cells: Pixels) -> np.ndarray:
    """Probabilities by the running mean of the weights and of the classification term."""
    import numpy as np
    import torch

    from cytodiffusion.classify.evidence import DenoiserMeter
    from cytodiffusion.classify.measure import Measurement
    from cytodiffusion.data.images import to_tensor
    from cytodiffusion.data.transforms import POSES
    from cytodiffusion.diffusion.loss import Sharpness, edm_weight
    from cytodiffusion.evaluate.low_data import draws, read

    trials, device = draws(), run.accelerator.device
    sharpness, sigmas = Sharpness(), torch.from_numpy(trials.sigmas)
    sharpness.load_state_dict({"log_beta": run.ema.mean["sharpness.log_beta"].cpu()})
    with torch.no_grad():
        nats = sharpness(sigmas) * edm_weight(sigmas, run.settings.sigma_data)
    measurement = Measurement(trials, len(run.data.classes) + 1, POSES)
    meter = DenoiserMeter(run.denoiser("ema"))
    errors = measurement.measure(meter, to_tensor(cells.images).to(device), cells.digests)
    return read(errors[:, :, :-1], nats.numpy().astype(np.float64))


def _baseline(world: World, job: Job) -> Any:
    from cytodiffusion.evaluate.baselines import BaselineSettings

    begun = world.pretrained.get(job.method.kind)
    tuned = {"weights": begun.folder, "learning_rates": TUNED} if begun else {}
    return BaselineSettings(
        kind=job.method.kind, minutes=job.minutes, balance=world.settings.balance,
        pseudo=job.method.rest, seed=world.seed + job.repeat, **tuned,
    )  # fmt: skip


def _train_baseline(world: World, job: Job) -> Told:
    rows, labels = given_to(world, job)
    canvases = world.train.images if job.method.rest else world.train.images[rows]
    return told_by_baseline(
        canvases, labels, world.classes, world.settings.preprocess, world.settings.augmentation,
        _baseline(world, job), world.test, world.device,
    )  # fmt: skip


# --- the unlabelled cells alone ------------------------------------------------------------------


def first_folder(world: World) -> Path:
    """The run on the unlabelled cells alone, from which those of all repeats begin."""
    about = (first_settings(world), world.classes, world.train.sha256)
    return world.out / f"first-{digest_of(about)}"


def first_settings(world: World) -> TrainSettings:
    """Settings of the run without labels, one for all repeats; what is named does not count there."""
    return world.settings.model_copy(
        update={**UNNAMED, "steps": world.first_steps, "seed": world.seed}
    )


def train_first(world: World, console: Console) -> None:
    """Train on all training cells without any label; what was trained before is not trained anew."""
    import numpy as np
    import torch

    from cytodiffusion.train.loop import Run, TrainingSet

    torch.set_num_threads(1)  # as in every other training
    nothing = np.full(len(world.train.labels), -1)
    data = TrainingSet(world.train.images, nothing, world.classes)
    run = Run(first_folder(world), first_settings(world), data, world.device)
    console.follow(fit(run), "training without labels", world.first_steps, "steps")
