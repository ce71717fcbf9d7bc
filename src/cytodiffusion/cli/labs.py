"""What `bench shift` does with the sets of several laboratories: list, train, measure, keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cytodiffusion.cli.benches import code_digest, digest_of, percent, tell_unread
from cytodiffusion.cli.console import Console, cores

if TYPE_CHECKING:
    import numpy as np

    from cytodiffusion.bundle import Model
    from cytodiffusion.cli.trainings import Told as Answered
    from cytodiffusion.data.look import Look
    from cytodiffusion.data.pixels import Pixels
    from cytodiffusion.data.sample import Sample
    from cytodiffusion.data.taxonomy import Taxonomy
    from cytodiffusion.evaluate.baselines import Kind
    from cytodiffusion.evaluate.cost import Measured
    from cytodiffusion.evaluate.shift import Step, Told
    from cytodiffusion.train.settings import TrainSettings

Parts = dict[str, "Sequence[Sample]"]
COPIES = 8  # of the images of a small set, at most, when sets are trained on together
SHARE = 4  # a set is repeated until it has a fourth of the images of the largest one


@dataclass(frozen=True)
class Lab:
    """The labelled cells of one laboratory whose class is among the answers."""

    name: str
    samples: Sequence[Sample]  # labels are names of answers
    truth: list[int]  # columns of the answers
    look: Look  # of its frames, measured without labels
    answers: tuple[str, ...]

    @property
    def parts(self) -> Parts:
        """Training and held-out cells."""
        return {part: [s for s in self.samples if s.split == part] for part in ("train", "val")}

    def held(self, count: int | None, seed: int) -> Lab:
        """Cells of `test`, or of `val` where there is no such split; `count`: about so many, balanced.

        Of `val` a model was chosen and calibrated on, and baselines found their learning rate.
        """
        import numpy as np

        from cytodiffusion.classify.fit import balanced_subset
        from cytodiffusion.errors import DataError

        there = {sample.split for sample in self.samples}
        part = "test" if "test" in there else "val"
        rows = np.array(
            [i for i, sample in enumerate(self.samples) if sample.split == part], dtype=int
        )
        if not len(rows):
            raise DataError(f"{self.name} has no cells in a split 'test' or 'val' to be asked for.")
        if count is not None:
            rows = rows[np.sort(balanced_subset(np.array(self.truth)[rows], count, seed))]
        chosen = rows.tolist()
        return replace(
            self,
            samples=[self.samples[i] for i in chosen],
            truth=[self.truth[i] for i in chosen],
        )


@dataclass(frozen=True)
class Bench:
    """What all stages share."""

    out: Path
    settings: TrainSettings
    labels: Taxonomy
    seed: int
    device: str
    engine: str
    console: Console

    def home(self, look: Look) -> Bench:
        """The same, with this look as that of training."""
        preprocess = self.settings.preprocess.model_copy(update={"look": look})
        return replace(self, settings=self.settings.model_copy(update={"preprocess": preprocess}))

    def matched(self) -> Bench:
        """The same, training on frames that were brought to one light."""
        preprocess = self.settings.preprocess.model_copy(update={"match": "light"})
        return replace(self, settings=self.settings.model_copy(update={"preprocess": preprocess}))


# --- listing -------------------------------------------------------------------------------------


def list_labs(
    bench: Bench, train: Path, foreign: Sequence[Path], splits: Path | None, model: str | None
) -> tuple[list[Lab], list[str]]:
    """The training laboratory first, and the classes that are asked for.

    Those are the model's, or the training set's, that some foreign set has. Cells of other classes are
    left out, and named. Raises DataError.
    """
    from cytodiffusion.bundle import load
    from cytodiffusion.data.mark import refuse_marked
    from cytodiffusion.data.pixels import class_names
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.errors import DataError

    sets = {train: read_dataset(train, splits=splits)}
    sets |= {folder: read_dataset(folder) for folder in foreign}
    if len(sets) <= len(foreign) or len({folder.resolve().name for folder in sets}) < len(sets):
        raise DataError(
            "Two sets have one name. Give every --foreign once, and folders of their own names."
        )
    for folder in foreign:
        refuse_marked(sets[folder])
    known = (
        load(model).classes.names if model else class_names(_labelled(sets[train]), bench.labels)
    )
    resolved = {
        folder: [bench.labels.resolve(str(s.label), known) for s in _labelled(samples)]
        for folder, samples in sets.items()
    }
    abroad = {name for folder in foreign for name in resolved[folder]}
    answers = [name for name in known if name in abroad]
    if len(answers) < 2:
        raise DataError(
            f"The foreign sets have {len(answers)} of the classes {', '.join(known)}; two are needed."
        )
    labs = [
        _lab(bench, folder, _labelled(samples), resolved[folder], answers)
        for folder, samples in sets.items()
    ]
    return labs, answers


def _labelled(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.label is not None]


def _lab(
    bench: Bench, folder: Path, samples: Sequence[Sample], names: Sequence[str | None],
    answers: Sequence[str],
) -> Lab:  # fmt: skip
    """The cells that can be asked about, dealt into train and val where the set has no splits."""
    from cytodiffusion.cli.train import deal
    from cytodiffusion.data.load import look_of
    from cytodiffusion.data.mark import refuse_marked
    from cytodiffusion.errors import DataError

    kept = [
        replace(sample, label=name)
        for sample, name in zip(samples, names, strict=True)
        if name in answers
    ]
    if not kept:
        raise DataError(f"{folder} has no cell of the classes {', '.join(answers)}.")
    if len(kept) < len(samples):
        others = {
            str(s.label) for s, name in zip(samples, names, strict=True) if name not in answers
        }
        bench.console.note(
            f"{folder.name}: {len(samples) - len(kept)} cells of other classes are left out "
            f"({', '.join(sorted(others))})."
        )
    if all(sample.split is None for sample in kept):
        kept = deal(kept, bench.seed, bench.console, {"train": 0.8, "val": 0.2})
    refuse_marked(sample for sample in kept if sample.split in ("val", "test"))
    look, seen = look_of(kept)
    bench.console.note(
        f"{folder.name}: {len(kept)} cells; nucleus / frame {look.nucleus:.3f} ({seen} seen)."
    )
    truth = [list(answers).index(str(sample.label)) for sample in kept]
    return Lab(folder.resolve().name, kept, truth, look, tuple(answers))


def join(bench: Bench, labs: Sequence[Lab]) -> Parts:
    """Cells of several laboratories at one scale; those of small sets several times."""
    from cytodiffusion.data.load import reframed
    from cytodiffusion.data.look import crop_for

    plain = bench.settings.preprocess
    most = max(len(lab.parts["train"]) for lab in labs)
    parts: dict[str, list[Sample]] = {"train": [], "val": []}
    for lab in labs:
        crop = crop_for(plain.crop, lab.look, plain.look)
        copies = max(1, min(COPIES, round(most / SHARE / max(1, len(lab.parts["train"])))))
        parts["train"] += reframed(lab.parts["train"], crop, plain.crop) * copies
        parts["val"] += reframed(lab.parts["val"], crop, plain.crop)
    return dict(parts)


# --- training ------------------------------------------------------------------------------------


def find_model(bench: Bench, model: str | None, labs: Sequence[Lab]) -> Model:
    """The model that was asked for, or one trained on the first laboratory."""
    from cytodiffusion.bundle import load

    if model is not None:
        return load(model, bench.device, bench.engine)
    return train_model(bench, bench.out, labs[0].parts)


def train_model(bench: Bench, folder: Path, parts: Parts) -> Model:
    """Trained as `train` does, or read where that was done before."""
    import typer

    from cytodiffusion.bundle import load
    from cytodiffusion.cli.train import run_training, write_bundle
    from cytodiffusion.data.load import cells_key

    cells = cells_key(parts["train"]), cells_key(parts["val"])
    run_folder = folder / f"run-{digest_of((bench.settings, cells))}"
    if not (run_folder / "bundle" / "config.json").exists():
        console, labels = bench.console, bench.labels
        run, held = run_training(parts, run_folder, bench.settings, bench.device, labels, console)
        if run is None:
            raise typer.Exit  # a helper process of a run over several
        origin = {"data": folder.name}
        write_bundle(
            run, held, parts["val"], run_folder / "bundle", "ours", origin, labels, console
        )
    return load(run_folder / "bundle", bench.device, bench.engine)


def make_baseline(
    bench: Bench, folder: Path, parts: Parts, answers: Sequence[str], kind: Kind, minutes: float
) -> Path:
    """Trained on the same images and augmentation; its best learning rate is chosen on val."""
    import torch

    from cytodiffusion.data.load import cells_key
    from cytodiffusion.data.pixels import load_pixels
    from cytodiffusion.evaluate.baselines import BaselineSettings, train_baseline
    from cytodiffusion.files import writing_to

    settings, console = bench.settings, bench.console
    wanted = BaselineSettings(kind=kind, minutes=minutes, balance=settings.balance, seed=bench.seed)
    cells = cells_key(parts["train"]), cells_key(parts["val"])
    about = (wanted, settings.preprocess, settings.augmentation, answers, cells)
    place = folder / "baselines" / f"{kind}-{digest_of(about)}"
    if (place / "baseline.json").exists():
        console.note(f"{kind}: trained before, see {place}.")
        return place
    pixels = {}
    for part, margin in (("train", settings.augmentation.margin), ("val", 1.0)):
        work = load_pixels(parts[part], answers, settings.preprocess, margin, cores(), bench.labels)
        pixels[part] = console.follow(work, f"reading {part}", len(parts[part]), "images")
    torch.set_num_threads(1)  # the most work in a minute of the processor
    fitting = train_baseline(
        pixels["train"].images, pixels["train"].labels, tuple(answers), settings.preprocess,
        settings.augmentation, wanted, held=(pixels["val"].images, pixels["val"].labels),
        device=bench.device,
    )  # fmt: skip
    fitted = console.follow(percent(fitting), f"training {kind}", 100, "%")
    with writing_to(place):
        fitted.save(place)
    return place


def adapted_to(bench: Bench, model: Model, lab: Lab, step: Step) -> Path:
    """Where what `adapt` makes of a laboratory's cells is: it does not see their labels."""
    from cytodiffusion.adaptation import SHARES
    from cytodiffusion.evaluate.shift import budget, preprocesses

    (preprocess,) = preprocesses(step, model.preprocess, lab.look)
    about = (
        model.files_sha256, budget(model.classifier, step), lab.answers, preprocess, SHARES, bench.seed,
        bench.settings.precision, _digests(lab),
    )  # fmt: skip
    return bench.out / "adapted" / f"{model.name}-{lab.name}-{digest_of(about)}"


def adapt_to(bench: Bench, model: Model, lab: Lab, step: Step) -> Path:
    """Make it; returns the bundle."""
    from cytodiffusion.bundle import load
    from cytodiffusion.cli.adapt import Way, adapt_model
    from cytodiffusion.evaluate.shift import budget, preprocesses

    plain = load(model.folder, bench.device, engine="torch")
    (preprocess,) = preprocesses(step, model.preprocess, lab.look)
    own = {"nucleus": lab.look.nucleus, "cell": lab.look.cell}  # no crop is looked for again
    look = preprocess.look.model_copy(update=own)
    preprocess = preprocess.model_copy(update={"look": look})
    changes = (f"precision={bench.settings.precision}",)
    way = Way(plain, preprocess, budget(plain.classifier, step), lab.answers, changes, bench.seed)
    bench.console.note(f"{model.name} is adapted to {lab.name}:")
    out = adapted_to(bench, model, lab, step)
    return adapt_model(way, lab.samples, out, lab.name, bench.console)


def not_adapted(model: Model, lab: Lab) -> str:
    """Why the step self-trained is left out for a laboratory; nothing where it is not."""
    from cytodiffusion.cli.adapt import LEAST, why_not

    few = f"{lab.name} has {len(lab.samples)} cells, and it takes {LEAST} to adapt to them."
    return why_not(model) or (few if len(lab.samples) < LEAST else "")


# --- measuring -----------------------------------------------------------------------------------


def ours_on(bench: Bench, model: Model, lab: Lab, step: Step) -> Told:
    """What our model, or what was made of it for this laboratory, says of its cells."""
    from cytodiffusion.bundle import load
    from cytodiffusion.evaluate.shift import Step, read

    if step.adapt == "train":
        model, step = load(adapt_to(bench, model, lab, step), bench.device, bench.engine), Step()
    return read(model.classifier, step, measured(bench, model, lab, step), lab.answers)


def measured(bench: Bench, model: Model, lab: Lab, step: Step) -> list[Measured]:
    """Errors of the cells of a laboratory, once for each zoom, from OUT where they are there already."""
    import numpy as np
    import torch

    from cytodiffusion.evaluate.cost import Measured, measure
    from cytodiffusion.evaluate.shift import budget, preprocesses
    from cytodiffusion.files import writing_to

    torch.set_num_threads(1)  # one for each worker
    truth, found = np.array(lab.truth), []
    measurement = model.classifier.measurement(budget(model.classifier, step))
    for preprocess in preprocesses(step, model.preprocess, lab.look):
        about = (
            model.files_sha256,
            _digests(lab),
            lab.truth,
            preprocess,
            measurement.draws,
            model.engine,
            code_digest(),
        )
        path = bench.out / "measured" / f"{model.name}-{lab.name}-{digest_of(about)}.npz"
        if not path.exists():
            work = measure(model.classifier, measurement, lab.samples, truth, preprocess, cores())
            one = bench.console.follow(work, f"{model.name} on {lab.name}", len(truth), "cells")
            with writing_to(path.parent):
                one.save(path)
        found.append(Measured.load(path))
    tell_unread(lab.samples, found[0].digests, model.preprocess, bench.console)
    return found


def self_trained(bench: Bench, place: Path, lab: Lab, step: Step, seconds: Sequence[float]) -> Told:
    """What a trained baseline says that goes on in rounds, as ours does, for as many seconds in each.

    Cells that are named less surely serve it too, by FixMatch. A class that no cell is named is lost to it.
    """
    import hashlib
    import time

    from cytodiffusion.adaptation import SHARES
    from cytodiffusion.cli.trainings import TUNED, kept
    from cytodiffusion.cli.trainings import Told as Answered
    from cytodiffusion.data.images import to_tensor
    from cytodiffusion.data.pixels import load_pixels
    from cytodiffusion.data.transforms import Augmentation
    from cytodiffusion.evaluate.baselines import Baseline
    from cytodiffusion.evaluate.shift import Told, preprocesses
    from cytodiffusion.train.settings import FINE_TUNE

    baseline = Baseline.load(place, bench.device)
    augmentation = Augmentation(**FINE_TUNE["augmentation"])
    (preprocess,) = preprocesses(step, baseline.preprocess, lab.look)
    pixels, roomy = (
        bench.console.follow(
            load_pixels(lab.samples, lab.answers, preprocess, margin, cores(), bench.labels),
            f"reading {lab.name}", len(lab.samples), "images",
        )
        for margin in (1.0, augmentation.margin)
    )  # fmt: skip
    began = time.perf_counter()
    first = baseline.predict_proba(to_tensor(pixels.images))
    spent = time.perf_counter() - began

    def train() -> Answered:
        told = Answered(first, 0.0, 0)
        for number, (share, length) in enumerate(zip(SHARES, seconds, strict=True)):
            note = f"{place.name} on {lab.name}, round {number + 1}: {length:.0f} s."
            bench.console.note(note)
            told = _go_on(
                bench, place, (pixels, roomy), told.probabilities, share, length / 60, number
            )
        return told

    sha = hashlib.sha256((place / "model.safetensors").read_bytes()).hexdigest()
    about = (
        sha, pixels.digests, lab.answers, preprocess, augmentation, SHARES, TUNED, list(seconds),
        bench.seed,
    )  # fmt: skip
    path = bench.out / "told" / f"{place.name}-{lab.name}-{digest_of(about)}.npz"
    return Told(pixels.labels, kept(path, train).probabilities, 1.0, spent)


def _go_on(
    bench: Bench, place: Path, cells: tuple[Pixels, Pixels], named: np.ndarray, share: float,
    minutes: float, number: int,
) -> Answered:  # fmt: skip
    """One round of a baseline: trained on the surer names, asked for all cells."""
    import numpy as np

    from cytodiffusion.classify.adapt import sure_names
    from cytodiffusion.cli.trainings import TUNED, told_by_baseline
    from cytodiffusion.data.transforms import Augmentation
    from cytodiffusion.evaluate.baselines import Baseline, BaselineSettings
    from cytodiffusion.train.settings import FINE_TUNE
    from cytodiffusion.types import UNLABELLED

    baseline, (pixels, roomy) = Baseline.load(place, bench.device), cells
    labels = sure_names(named, share)
    known = np.unique(labels[labels != UNLABELLED])
    columns = np.full(named.shape[1] + 1, UNLABELLED)  # the last is that of no label
    columns[known] = np.arange(len(known))
    settings = BaselineSettings(
        kind=baseline.settings.kind, minutes=minutes, balance=FINE_TUNE["balance"], pseudo=True,
        seed=bench.seed + number, weights=place, learning_rates=TUNED,
    )  # fmt: skip
    found = told_by_baseline(
        roomy.images, columns[labels], tuple(baseline.classes.names[k] for k in known),
        baseline.preprocess, Augmentation(**FINE_TUNE["augmentation"]), settings, pixels, bench.device,
    )  # fmt: skip
    probabilities = np.zeros_like(named)
    probabilities[:, known] = found.probabilities
    return replace(found, probabilities=probabilities)


def ask(bench: Bench, place: Path, lab: Lab, step: Step) -> Told:
    """What a trained baseline says of the cells of a laboratory."""
    import time

    import numpy as np

    from cytodiffusion.data.images import to_tensor
    from cytodiffusion.data.load import load_images
    from cytodiffusion.errors import DataError
    from cytodiffusion.evaluate.baselines import Baseline
    from cytodiffusion.evaluate.shift import Told, adapted, preprocesses

    began, baseline = time.perf_counter(), Baseline.load(place, bench.device)
    (preprocess,) = preprocesses(step, baseline.preprocess, lab.look)
    items = list(load_images(lab.samples, preprocess, workers=cores()))
    rows = [i for i, item in enumerate(items) if item.pixels is not None]
    if not rows:
        raise DataError(f"None of the images of {lab.name} could be read. Try: data check.")
    images = to_tensor(np.stack([item.pixels for item in items if item.pixels is not None]))
    told = adapted(np.log(baseline.predict_proba(images).clip(1e-30)), step)
    return Told(np.array(lab.truth)[rows], told, 1.0, time.perf_counter() - began)


def _digests(lab: Lab) -> list[str]:
    """sha256 of each file; empty where it cannot be read."""
    from cytodiffusion.data.load import file_sha256

    return [file_sha256(sample) for sample in lab.samples]
