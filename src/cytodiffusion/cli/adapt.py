"""`adapt`: cells of another laboratory in, a model that knows their look out. No label is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from cytodiffusion.cli.console import (
    NOTICE,
    Answers,
    Console,
    Crop,
    Device,
    Json,
    Match,
    ModelOrAuto,
    Out,
    cores,
    pick_device,
    read_answers,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from cytodiffusion.adaptation import Cells, Seen, Wanted
    from cytodiffusion.bundle import Model
    from cytodiffusion.classify.classifier import Classifier
    from cytodiffusion.cli.frames import Taken
    from cytodiffusion.data.images import Preprocess
    from cytodiffusion.data.sample import Sample
    from cytodiffusion.train.settings import TrainSettings

LEAST = 50  # cells
FEW = 5  # cells of a name that are taken for labelled, below which it is said
RECORD = "rounds.json"
WORK = "work"  # what is needed only to go on after a cut
FIXED = ("preprocess", "network", "sigma_data", "seed")  # settings that --set cannot change here


def adapt(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="Cells of that laboratory; labels are not read.")
    ],
    out: Out,
    model: ModelOrAuto = None,
    classes: Answers = None,
    splits: Annotated[Path | None, typer.Option(help="CSV with path,label,split.")] = None,
    split: Annotated[str | None, typer.Option(help="Which split to learn from.")] = None,
    crop: Crop = None,
    match: Match = "auto",
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=V", help="Change one setting of the preset fine-tune."),
    ] = None,
    json: Json = False,
    seed: Annotated[int, typer.Option(min=0, help="Decides every random number.")] = 0,
    device: Device = "auto",
) -> None:
    """Learn the look of a laboratory from its cells alone, without a label: OUT/bundle.

    The model names the cells, takes the surer half of each name for labels, and is trained on them for a
    minute or two; then once more, with the better names. Say with --classes which classes come up: it
    forgets the others. Killed and run again, it goes on. Then: predict INPUT -m OUT/bundle.
    """
    from cytodiffusion.bundle import DEFAULT_MODEL, load
    from cytodiffusion.cli.frames import Asked, take
    from cytodiffusion.data.readers import read_dataset

    console = Console(json)
    samples = read_dataset(source, splits=splits, split=split)
    loaded = load(model or DEFAULT_MODEL, pick_device(device), engine="torch")
    answers = _several(read_answers(classes, loaded))
    console.note(NOTICE)
    asked = Asked(match, crop, "full", model)
    taken = take(asked, loaded, samples, console, open_answers=answers is None, adapting=True)
    budget = taken.model.classifier.abroad("full") if taken.fit.light else taken.budget
    if match == "auto" and not taken.fit.abroad:
        console.note(
            f"These cells are not clearly of another laboratory than those that {taken.model.name} was "
            "trained on: adapting to them may cost more than it brings."
        )
    preprocess = _settled(taken, samples, crop)
    if preprocess.crop not in (taken.fit.crop, taken.model.preprocess.crop):
        console.note(f"Crop {preprocess.crop}, from more of the cells than that glance took.")
    way = Way(taken.model, preprocess, budget, answers, tuple(change or ()), seed)
    there = (out / "bundle").exists() and (out / RECORD).exists()
    bundle = adapt_model(way, samples, out, source.resolve().name, console)
    told = f"{bundle} was made before." if there else f"Wrote {bundle}."
    if answers:
        told += f" It hardly names anything but {', '.join(answers)}."
    console.result(
        {"bundle": str(bundle), "rounds": read_rounds(out)},
        f"{told} Try: cytodiffusion predict {source} -m {bundle} -o {out / 'cells'}",
    )
    if console.unread:
        raise typer.Exit(1)


def _several(answers: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The classes in one order, however they were given. Raises SettingsError for one class alone."""
    from cytodiffusion.errors import SettingsError

    if answers is not None and len(answers) < 2:
        raise SettingsError(
            f"--classes names {answers[0]} alone: every cell would be one. Name all that come up."
        )
    return answers and tuple(sorted(answers))


def _settled(taken: Taken, samples: Sequence[Sample], crop: float | None) -> Preprocess:
    """What is done to every frame from now on; `crop` is one that was asked for.

    A crop that was found is found again, from more frames than a glance takes, whatever they are called.
    """
    from cytodiffusion.data.load import file_sha256, look_of
    from cytodiffusion.data.look import crop_for
    from cytodiffusion.errors import DataError

    fit, plain = taken.fit, taken.model.preprocess
    if fit.crop is None:
        return fit.settled(plain)
    try:
        look, _ = look_of(sorted(samples, key=file_sha256))
    except DataError:
        return fit.settled(plain)
    if crop is None:
        fit = fit._replace(crop=crop_for(plain.crop, look, plain.look))
    return fit._replace(look=look).settled(plain)


class Way(NamedTuple):
    """What is adapted, and how its cells are read."""

    model: Model
    preprocess: Preprocess
    budget: str  # one that runs all trials
    answers: tuple[str, ...] | None
    changes: tuple[str, ...] = ()  # of the settings
    seed: int = 0


def adapt_model(
    way: Way, samples: Sequence[Sample], out: Path, data: str, console: Console
) -> Path:
    """All rounds, or those that are left; returns the bundle.

    OUT/rounds.json: how many cells of each class were taken for labelled, and what it took. Raises
    DataError for too few cells, SettingsError where OUT was begun otherwise, OutputError where another
    process is at work in it.
    """
    from cytodiffusion.files import alone

    with alone(out):
        return _adapt_alone(way, samples, out, data, console)


def _adapt_alone(
    way: Way, samples: Sequence[Sample], out: Path, data: str, console: Console
) -> Path:
    import shutil

    from cytodiffusion import adaptation
    from cytodiffusion.files import write_json
    from cytodiffusion.release import commit

    settings = _settings(way)
    cells = _read(way, samples, settings, console)
    about, bundle = _about(way, settings, cells), out / "bundle"
    kept, work = _begun(out, about), out / WORK / about
    if len(kept["rounds"]) == len(adaptation.SHARES) and (bundle / "config.json").exists():
        shutil.rmtree(out / WORK, ignore_errors=True)
        return bundle
    wanted, classifier = adaptation.Wanted(way.budget, way.answers, cores()), way.model.classifier
    seen = _look(classifier, cells, wanted, work / "named-0.npz", console)
    for number in range(len(adaptation.SHARES)):
        labels = adaptation.labels_of(seen, number)
        named = _counts(way, labels, number, console)
        folder = work / f"round-{number + 1}"
        denoiser, seconds = _train(way, cells, labels, settings, folder, console)
        if len(kept["rounds"]) == number:
            kept["rounds"].append(
                {"taken_for_labelled": named, "seconds": max(round(seconds, 1), 0.1)}
            )
            write_json(out / RECORD, kept, "the rounds")
        classifier = adaptation.with_denoiser(way.model, denoiser)
        seen = _look(classifier, cells, wanted, work / f"named-{number + 1}.npz", console)
    origin = {
        "recipe": "cytodiffusion adapt", "commit": commit(), "seed": way.seed, "steps": settings.steps,
        "data": data, "train_images": len(cells.pixels.digests), "cells_sha256": cells.pixels.sha256,
        "changes": list(way.changes), "rounds": kept["rounds"],
    }  # fmt: skip
    adaptation.save_adapted(
        bundle, out.resolve().name, way.model, denoiser, way.preprocess, wanted, seen, origin
    )
    shutil.rmtree(out / WORK, ignore_errors=True)
    return bundle


def _counts(way: Way, labels: np.ndarray, number: int, console: Console) -> dict[str, int]:
    """How many cells of each class a round learns from; said, and where they are few too."""
    import numpy as np

    counts = np.bincount(labels[labels >= 0], minlength=len(way.model.classes)).tolist()
    named = {name: n for name, n in zip(way.model.classes, counts, strict=True) if n}
    told = ", ".join(f"{name} {n}" for name, n in named.items())
    console.note(f"Round {number + 1} learns from {told}.")
    if few := [name for name, n in named.items() if n < FEW]:
        console.note(
            f"So few may all be named wrongly: {', '.join(few)}. A class that does not come up there takes "
            "over part of another; leave it out with --classes."
        )
    return named


def _look(
    classifier: Classifier, cells: Cells, wanted: Wanted, path: Path, console: Console
) -> Seen:
    """What is seen of the cells, or was before a cut."""
    import numpy as np
    import torch

    from cytodiffusion.adaptation import Seen, look
    from cytodiffusion.files import write_arrays

    if path.exists():
        with np.load(path) as found:
            return Seen(*(found[name] for name in Seen._fields))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one for each worker
    work = look(classifier, cells.pixels, wanted)
    seen = console.follow(work, "naming", len(cells.pixels.digests), "cells")
    torch.set_num_threads(threads)
    write_arrays(path, **seen._asdict())
    return seen


def read_rounds(out: Path) -> list[dict[str, Any]]:
    """What each round learned from, and the seconds it took."""
    return list(_read_record(out / RECORD)["rounds"])


def why_not(model: Model) -> str:
    """Why a model cannot be adapted; nothing where it can."""
    if model.classifier.together and model.config["network"] == "compact":
        return ""
    return (
        f"'{model.name}' cannot be adapted: it takes a compact network with a head for each class."
    )


def _settings(way: Way) -> TrainSettings:
    """Raises SettingsError for a network that cannot be adapted, or a setting that is not free here."""
    from cytodiffusion.cli.train import settings_from
    from cytodiffusion.errors import SettingsError

    if problem := why_not(way.model):
        raise SettingsError(f"{problem} pbc8-far can be (-m).")
    for change in way.changes:
        if (name := change.partition("=")[0].strip().split(".")[0]) in FIXED:
            raise SettingsError(
                f"'{name}' comes from the model or has an option of its own here (--crop, --match, --seed)."
            )
    settings = settings_from("fine-tune", [*way.changes, f"seed={way.seed}"], str(way.model.folder))
    return settings.model_copy(update={"preprocess": way.preprocess})


def _read(way: Way, samples: Sequence[Sample], settings: TrainSettings, console: Console) -> Cells:
    """The cells, in an order that does not depend on the listing. Those not read are named."""
    from dataclasses import replace

    import numpy as np

    from cytodiffusion.adaptation import Cells
    from cytodiffusion.data.pixels import load_pixels
    from cytodiffusion.errors import DataError

    bare = [replace(sample, label=None) for sample in samples]
    found = []
    for margin in (1.0, settings.augmentation.margin):
        work = load_pixels(bare, way.model.classes.names, way.preprocess, margin, cores())
        found.append(console.follow(work, "reading", len(bare), "images"))
    pixels, canvases = found
    console.not_read(*pixels.problems)
    if (different := len(set(pixels.digests))) < LEAST:
        raise DataError(
            f"{different} different cells are too few to learn a laboratory's look from; it takes {LEAST}, "
            "a few hundred are better. With a few labelled ones try: train --preset fine-tune."
        )
    order = np.argsort(pixels.digests, kind="stable")
    return Cells(pixels.part(order), canvases.images[order])


def _about(way: Way, settings: TrainSettings, cells: Cells) -> str:
    """A digest of all that decides what comes out."""
    from cytodiffusion.adaptation import SHARES
    from cytodiffusion.cli.benches import digest_of

    model = (way.model.files_sha256, way.budget, way.answers)
    return digest_of((model, settings, SHARES, cells.pixels.sha256))


def _begun(out: Path, about: str) -> dict[str, Any]:
    """What was done in OUT before. Raises SettingsError where that was something else."""
    from cytodiffusion.errors import SettingsError

    path = out / RECORD
    if path.exists():
        begun = _read_record(path)
        if begun.get("about") == about:
            return begun
    elif all(each.name == WORK or each.name.startswith(".") for each in out.glob("*")):
        return {"about": about, "rounds": []}
    raise SettingsError(
        f"{out} holds other files, or was begun with other cells, another model or other settings. Give "
        "the same ones to go on, or another folder to start anew."
    )


def _read_record(path: Path) -> dict[str, Any]:
    """Raises SettingsError where it is not as it was written."""
    import json

    from cytodiffusion.errors import SettingsError

    try:
        found = json.loads(path.read_text())
        list(found["rounds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{path} cannot be read ({error}). Choose another folder to start anew."
        ) from error
    return dict(found)


def _train(
    way: Way, cells: Cells, labels: np.ndarray, settings: TrainSettings, folder: Path,
    console: Console,
) -> tuple[Any, float]:  # fmt: skip
    """One round; returns its denoiser and the seconds it took, of the processor where there is no GPU."""
    from cytodiffusion.adaptation import begin_round
    from cytodiffusion.cli.few import fit, spent
    from cytodiffusion.files import writing_to

    with writing_to(folder):
        run = begin_round(folder, way.model, cells, labels, settings)
    console.follow(fit(run), folder.name.replace("-", " "), settings.steps, "steps")
    denoiser = run.denoiser("ema")
    run.close()
    return denoiser, spent(folder)
