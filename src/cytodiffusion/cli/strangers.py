"""The steps of `bench anomaly`: which images, which models, what they measure.

Each step keeps what it made in OUT, under a name that holds a digest of all that decides it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cytodiffusion.cli.benches import code_digest, digest_of, percent
from cytodiffusion.cli.console import Console, cores

if TYPE_CHECKING:
    from cytodiffusion.bundle import Model
    from cytodiffusion.data.images import Preprocess
    from cytodiffusion.data.sample import Sample
    from cytodiffusion.data.taxonomy import Taxonomy
    from cytodiffusion.evaluate.anomaly import Cells, Measured, Scored
    from cytodiffusion.evaluate.baselines import Baseline, BaselineSettings
    from cytodiffusion.train.settings import TrainSettings

    Parts = dict[str, Sequence[Sample]]

MARGIN = 1.5  # of the canvases on which corruptions are made


@dataclass(frozen=True)
class Bench:
    """What every step needs to know of the call."""

    source: Path
    out: Path
    held: str | None  # the class that is held out
    settings: TrainSettings  # of our training; its augmentation is also the baselines'
    crop: float | None
    foreign_crop: float | None
    labels: Taxonomy
    seed: int
    device: str
    engine: str
    console: Console


# --- images --------------------------------------------------------------------------------------


def list_parts(bench: Bench, splits: Path | None, split: str) -> Parts:
    """Samples to train on, to calibrate on and to measure, in the spelling of our taxonomy."""
    from cytodiffusion.cli.train import split_samples
    from cytodiffusion.data.mark import refuse_marked
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.errors import DataError

    out, labels, seed = bench.out, bench.labels, bench.settings.seed
    parts: Parts = split_samples(bench.source, splits, out, seed, labels, bench.console)
    made = out / "splits.csv"  # by split_samples, where the set has none
    given = splits or (made if made.is_file() else None)
    if made.is_file() and splits is None and not parts.get(split, True):
        raise DataError(
            f"{bench.source} has too few cells of a class for a part to test on. Give more, or a split of "
            "your own with --splits."
        )
    tested = labels.respell(read_dataset(bench.source, splits=given, split=split))
    refuse_marked(tested)
    if bench.held is not None:  # nor of an image without a label is it known that it is not of it
        parts = {
            name: [sample for sample in found if sample.label not in (None, bench.held)]
            for name, found in parts.items()
        }
    return parts | {"test": [sample for sample in tested if sample.label is not None]}


def list_foreign(folders: Sequence[Path]) -> Parts:
    """All images of these sets, without their labels. Raises DataError for synthetic ones."""
    from cytodiffusion.data.mark import refuse_marked
    from cytodiffusion.data.readers import read_dataset

    found: Parts = {}
    for folder in folders:
        name = folder.name if folder.name not in found else str(folder).strip("/").replace("/", " ")
        found[name] = [replace(sample, label=None) for sample in read_dataset(folder)]
        refuse_marked(found[name])
    return found


def read_sets(
    bench: Bench, ours: Model, parts: Parts, foreign: Parts, limit: int | None, corrupted: int
) -> dict[str, Cells]:
    """`known`, `normal`, and every set of strangers. Raises DataError where there are none."""
    from cytodiffusion.errors import DataError
    from cytodiffusion.evaluate.anomaly import KNOWN, NORMAL

    normal: list[Sample] = []
    unknown: dict[str, list[Sample]] = {}
    for sample in parts["test"]:
        if _knows(bench, ours, sample):
            normal.append(sample)
        else:
            unknown.setdefault(str(sample.label), []).append(replace(sample, label=None))
    if not normal:
        raise DataError(f"No image of {bench.source} is of a class that {ours.name} knows.")
    if not unknown and not foreign and not corrupted:
        raise DataError(
            "There are no strangers. Hold out a class, give --foreign DIR, or more than 0 --corrupted."
        )
    chosen = _some(bench, ours, normal, limit)
    held = [sample for sample in parts["val"] if _knows(bench, ours, sample)]
    sets = {
        KNOWN: _read(bench, ours, KNOWN, _some(bench, ours, held, limit)),
        NORMAL: _read(bench, ours, NORMAL, chosen),
    }
    for name, found in unknown.items():
        sets[name] = _read(bench, ours, name, _some(bench, ours, found, limit))
    for name, samples in foreign.items():
        free = f"foreign {name}" if name in sets else name
        sets[free] = _read(bench, ours, free, _some(bench, ours, samples, limit), foreign=True)
    if corrupted:
        sets |= _corrupted(bench, ours, _some(bench, ours, chosen, corrupted))
    return sets


def _knows(bench: Bench, ours: Model, sample: Sample) -> bool:
    """Whether its class is one of the model's."""
    label = str(sample.label)
    return label != bench.held and bench.labels.resolve(label, ours.classes.names) is not None


def _some(
    bench: Bench, ours: Model, samples: Sequence[Sample], count: int | None
) -> Sequence[Sample]:
    """About `count` samples, as many of each class; all where it is None."""
    import numpy as np

    from cytodiffusion.classify.fit import balanced_subset
    from cytodiffusion.data.pixels import class_index

    if count is None:
        return samples
    truth = [class_index(s.label, ours.classes.names, bench.labels) for s in samples]
    return [samples[i] for i in np.sort(balanced_subset(np.array(truth), count, bench.seed))]


def _read(
    bench: Bench, ours: Model, name: str, samples: Sequence[Sample], *, foreign: bool = False,
    margin: float = 1.0,
) -> Cells:  # fmt: skip
    """The images at the model's size. Those that cannot be read are named and left out."""
    from cytodiffusion.data.pixels import load_pixels
    from cytodiffusion.evaluate.anomaly import Cells

    preprocess = _preprocess(bench, ours, foreign)
    work = load_pixels(samples, ours.classes.names, preprocess, margin, cores(), bench.labels)
    found = bench.console.follow(work, f"reading {name}", len(samples), "images")
    bench.console.not_read(*found.problems)
    return Cells(found.images, found.labels, found.digests)


def _preprocess(bench: Bench, ours: Model, foreign: bool = False) -> Preprocess:
    crop = (bench.foreign_crop if foreign else None) or bench.crop
    return ours.preprocess.model_copy(update={"crop": crop}) if crop else ours.preprocess


def _corrupted(bench: Bench, ours: Model, samples: Sequence[Sample]) -> dict[str, Cells]:
    """Copies of these cells, corrupted in every way."""
    import numpy as np

    from cytodiffusion.evaluate.anomaly import Cells
    from cytodiffusion.evaluate.corruptions import CORRUPTIONS, corrupted
    from cytodiffusion.types import UNLABELLED

    wide = _read(bench, ours, "cells to corrupt", samples, margin=MARGIN)
    size, nothing = ours.preprocess.size, np.full(len(wide.digests), UNLABELLED)
    found = {}
    for kind in CORRUPTIONS:
        pixels = corrupted(kind, wide.pixels, wide.digests, size, bench.seed)
        found[kind] = Cells(pixels, nothing, wide.digests)
    return found


# --- models --------------------------------------------------------------------------------------


def run_folder(bench: Bench, parts: Parts) -> Path:
    """Of the run that is trained here: another for other settings, and for other cells."""
    from cytodiffusion.data.load import cells_key

    about = (bench.settings, cells_key(parts["train"]), cells_key(parts["val"]))
    return bench.out / str(bench.held) / f"run-{digest_of(about)}"


def find_model(
    bench: Bench, name: str, folder: Path | None, parts: Parts, trained: bool
) -> tuple[Bench, Model]:
    """The released model, or that of the run in `folder`, trained here unless it is `trained`.

    The bench is given the settings that the run had. Raises SettingsError for a run that is not
    finished, or that knows the class that is held out.
    """
    from cytodiffusion.bundle import load
    from cytodiffusion.errors import SettingsError
    from cytodiffusion.train.settings import load_settings

    if folder is None:
        return bench, load(name, bench.device, bench.engine)
    bundle = folder / "bundle"
    if not (bundle / "config.json").is_file():
        if trained:
            raise SettingsError(f"{folder} has no bundle. Give the folder of a finished run.")
        _train(bench, folder, parts)
    found = load(bundle, bench.device, bench.engine)
    if bench.held in found.classes.names:
        raise SettingsError(
            f"{bundle} knows the class '{bench.held}'. Give a run that was trained without it."
        )
    if "start" in found.config["origin"]:
        start = found.config["origin"]["start"]
        bench.console.note(f"{folder} began with weights of {start}, which may know the class.")
    return replace(bench, settings=load_settings(folder / "settings.yaml")), found


def _train(bench: Bench, folder: Path, parts: Parts) -> None:
    """Train without the class, as `train` does, and write the bundle."""
    from cytodiffusion.cli.train import run_training, with_look, write_bundle

    console, labels = bench.console, bench.labels
    settings = with_look(bench.settings, parts["train"], console)
    run, held = run_training(parts, folder, settings, bench.device, labels, console)
    if run is None:
        raise typer.Exit  # a helper process of a run over several
    origin = {"data": bench.source.resolve().name, "held_out": bench.held}
    name = f"without-{bench.held}"
    write_bundle(run, held, parts["val"], folder / "bundle", name, origin, labels, console)


def read_canvases(bench: Bench, ours: Model, samples: Sequence[Sample]) -> Cells:
    """The training images of the model's classes, with the margin that our augmentation needs."""
    known = [sample for sample in samples if _knows(bench, ours, sample)]
    return _read(bench, ours, "train", known, margin=bench.settings.augmentation.margin)


def make_baseline(
    bench: Bench, ours: Model, train: Cells, known: Cells, settings: BaselineSettings
) -> Baseline:
    """A baseline trained on these images, from OUT where it is there already."""
    import torch

    from cytodiffusion.evaluate.baselines import Baseline, train_baseline
    from cytodiffusion.files import writing_to

    console, augmentation = bench.console, bench.settings.augmentation
    preprocess, names = _preprocess(bench, ours), ours.classes.names
    about = (settings, augmentation, preprocess, names, train.digests, known.digests)
    folder = bench.out / "baselines" / f"{settings.kind}-{digest_of(about)}"
    if (folder / "baseline.json").exists():
        console.note(f"{settings.kind}: trained before, see {folder}.")
        return Baseline.load(folder, bench.device)
    torch.set_num_threads(1)  # the most work in a minute of the processor
    work = train_baseline(
        train.pixels, train.labels, names, preprocess, augmentation, settings,
        held=(known.pixels, known.labels), device=bench.device,
    )  # fmt: skip
    found = console.follow(percent(work), f"training {settings.kind}", 100, "%")
    with writing_to(folder):
        found.save(folder)
    return found


# --- measuring -----------------------------------------------------------------------------------


def score_sets(
    bench: Bench, ours: Model, rivals: Sequence[Baseline], sets: dict[str, Cells]
) -> tuple[Scored, Scored]:
    """Scores of every set but `known`, and the p-values of those of ours that decide on flags."""
    from cytodiffusion.data.images import to_tensor
    from cytodiffusion.evaluate.anomaly import KNOWN, OURS, p_values, scores
    from cytodiffusion.evaluate.baselines import SCORES

    scored: dict[tuple[str, str], dict[str, Any]] = {}
    told: dict[tuple[str, str], dict[str, Any]] = {}
    measured = {name: _measured(bench, ours, name, cells) for name, cells in sets.items()}
    known, truth = measured.pop(KNOWN), sets[KNOWN].labels
    for name, found in measured.items():
        for score, values in scores(ours.classifier, known, truth, found).items():
            scored.setdefault((OURS, score), {})[name] = values
        for score, values in p_values(ours.classifier, found).items():
            told.setdefault((OURS, score), {})[name] = values
        images = to_tensor(sets[name].pixels)
        for rival in rivals:
            for score in SCORES:
                values = rival.anomaly_score(images, score)
                scored.setdefault((rival.settings.kind, score), {})[name] = values
    return scored, told


def _measured(bench: Bench, ours: Model, name: str, cells: Cells) -> Measured:
    """What our model measures of a set, from OUT where that was measured before."""
    import torch

    from cytodiffusion.evaluate.anomaly import Measured, measure
    from cytodiffusion.files import writing_to

    pixels = hashlib.sha256(cells.pixels.tobytes()).hexdigest()
    key = digest_of((ours.files_sha256, pixels, cells.digests, ours.engine, code_digest()))
    path = bench.out / "measured" / f"{name.replace(' ', '-')}-{key}.npz"
    if path.exists():
        bench.console.note(f"{name}: measured before, see {path}.")
        return Measured.load(path)
    torch.set_num_threads(1)  # one for each worker
    work = measure(ours.classifier, cells, cores())
    found = bench.console.follow(work, f"measuring {name}", len(cells.digests), "cells")
    with writing_to(path.parent):
        found.save(path)
    return found
