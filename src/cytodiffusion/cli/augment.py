"""`bench augment`: a rare class topped up with drawn cells, and what a classifier gains by it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cytodiffusion.cli.benches import find_kinds, read_counts, write_results
from cytodiffusion.cli.console import (
    NOTICE,
    Console,
    Context,
    Device,
    Json,
    Out,
    Seed,
    call_of,
    cores,
    pick_device,
)
from cytodiffusion.cli.trainings import finished

if TYPE_CHECKING:
    from cytodiffusion.cli.topup import Choice, World
    from cytodiffusion.data.sample import Sample
    from cytodiffusion.data.taxonomy import Taxonomy
    from cytodiffusion.evaluate.baselines import Kind

LEAST = 3  # cells of a choice: one to train a drawing model on, two to calibrate it


def augment(
    context: Context,
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Real labelled images.")],
    drawn: Annotated[
        str,
        typer.Argument(
            metavar="DRAWN",
            help="What `generate` wrote; or, for a model of each choice, 'drawn/{labels}-{repeat}'.",
        ),
    ],
    out: Out,
    rare: Annotated[str, typer.Option("--class", metavar="NAME", help="The rare class.")],
    labels: Annotated[
        str, typer.Option(help="Real cells of the rare class, separated by commas.")
    ] = "10,20,50",
    repeats: Annotated[int, typer.Option(min=1, help="Choices of the real cells.")] = 3,
    others: Annotated[
        int | None,
        typer.Option(min=LEAST, help="Real cells of each other class at most, instead of all."),
    ] = None,
    drawn_cells: Annotated[
        int | None,
        typer.Option(
            "--drawn", min=1,
            help="Cells to add, instead of as many as bring the class to the mean of the others.",
        ),
    ] = None,
    baselines: Annotated[str, typer.Option(help="Some of resnet, convnext, vit.")] = "resnet",
    minutes: Annotated[
        float, typer.Option(min=0.001, help="Processor time of each training.")
    ] = 5.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of each training, instead of minutes.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="Real cells are cropped as by this one: the model that drew."
        ),
    ] = "pbc8",
    choices: Annotated[
        bool,
        typer.Option(
            "--choices",
            help="Only write OUT/choices/N-R.csv, the cells of each choice, to train drawing models on.",
        ),
    ] = False,
    splits: Annotated[Path | None, typer.Option(help="CSV with path,label,split.")] = None,
    split: Annotated[str, typer.Option(help="Which split to test on.")] = "test",
    limit: Annotated[
        int | None, typer.Option(min=2, help="About this many cells of it, as many of each class.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Trainings at a time, instead of one a core; each holds all cells."
        ),
    ] = None,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:  # fmt: skip
    """What drawn cells of a rare class are worth in training: OUT/results.json and report.html.

    Trained on few real cells of it alone, topped up by drawn ones, and topped up by copies; all for as
    long. One DRAWN gives an upper bound, as its model has mostly seen more real cells; --choices begins
    the way to do it right. Run again, what was trained is kept.
    """
    from cytodiffusion.bundle import load
    from cytodiffusion.cli.few import read_cells, some
    from cytodiffusion.cli.topup import World, check_drawn, folders, names_of, write_choices
    from cytodiffusion.data.images import Preprocess
    from cytodiffusion.data.pixels import class_names
    from cytodiffusion.data.taxonomy import Taxonomy
    from cytodiffusion.errors import DataError
    from cytodiffusion.evaluate.low_data import check_counts

    console, where, names = Console(json), pick_device(device), Taxonomy.load()
    counts, kinds = read_counts(labels, least=LEAST), _kinds(baselines)
    size = load(model, engine="torch").preprocess
    every = [(n, r) for n in counts for r in range(repeats)]
    places = folders(drawn, every)
    train, test = _listed(source, splits, split, seed, names, console)
    classes = class_names(train, names)
    name = _class(rare, classes, names)
    check_counts([name] * sum(sample.label == name for sample in train), counts)
    listed, drawn_by = ({}, []) if choices else _drawn(drawn, places, name, names)
    console.note(NOTICE)

    whole = Preprocess(size=size.size, crop=1.0)  # drawn cells fill their frame
    cells = read_cells(train, "train", classes, size, 1.0, names, console)
    check_counts([name] * int((cells.labels == classes.index(name)).sum()), counts)
    pixels = {
        place: read_cells(found, f"drawn cells in {place}", classes, whole, 1.0, names, console)
        for place, found in listed.items()
    }
    shown = some([sample for sample in test if sample.label in classes], limit, seed)
    asked = read_cells(shown, split, classes, size, 1.0, names, console)
    if not (asked.labels == classes.index(name)).any():
        raise DataError(f"The split '{split}' has no cell of {name} to test on.")
    world = World(
        out=out, classes=classes, rare=classes.index(name), preprocess=size, real=cells,
        drawn={choice: pixels[place] for choice, place in places.items() if listed}, test=asked,
        others=others, drawn_cells=drawn_cells, minutes=None if steps else minutes, steps=steps,
        seed=seed, device=where,
    )  # fmt: skip
    needed = check_drawn(world, every, places)
    write_choices(world, every, names_of(train, cells, classes))
    then = call_of(context, choices=False, drawn="drawn/{labels}-{repeat}")
    right = [*_draw_anew(source, out, every[0], max(needed.values()), name), then]
    if choices:
        written = {"choices": str(out / "choices"), "files": len(every), "then": right}
        said = f"See {out / 'choices'}. The first two lines for each file there, then the last:"
        console.result(written, "\n".join([said, *right]))
        raise typer.Exit(bool(console.unread))

    workers = jobs or (cores() if where == "cpu" else 1)
    rows = _train_all(world, every, kinds, workers, console)
    facts = {
        "command": call_of(context), "seed": seed, "rare_class": name,
        "drawn_by": drawn_by, "gain_is_an_upper_bound": "{labels}" not in drawn,
        **_origin(world, model),
    }  # fmt: skip
    _show(out, f"Drawn cells of {name}, in training: {source.name}", rows, right, facts, console)
    if console.unread:
        raise typer.Exit(1)


# --- what is given -------------------------------------------------------------------------------


def _class(rare: str, classes: tuple[str, ...], names: Taxonomy) -> str:
    """The class that is meant. Raises SettingsError for one that the training cells do not have."""
    from cytodiffusion.errors import SettingsError

    name = names.canonical(rare) or rare
    if name not in classes:
        raise SettingsError(
            f"There is no class '{rare}' among the training cells. There are: {', '.join(classes)}."
        )
    return name


def _listed(
    source: Path, splits: Path | None, split: str, seed: int, names: Taxonomy, console: Console
) -> tuple[list[Sample], list[Sample]]:
    """Real labelled cells to train on, and to test on. Raises DataError for drawn ones."""
    from cytodiffusion.cli.few import list_cells
    from cytodiffusion.data.mark import refuse_marked

    train, test = list_cells(source, splits, split, seed, names, console)
    train = [sample for sample in train if sample.label is not None]
    refuse_marked(test)
    refuse_marked(train, "real cells")
    return train, test


def _kinds(baselines: str) -> list[Kind]:
    """The classifiers asked for. Raises SettingsError, MissingExtra."""
    from cytodiffusion.errors import SettingsError

    kinds = find_kinds(baselines)
    if not kinds:
        raise SettingsError("This bench trains baselines: name one at least with --baselines.")
    return kinds


def _drawn(
    drawn: str, places: dict[Choice, Path], name: str, names: Taxonomy
) -> tuple[dict[Path, list[Sample]], list[str]]:
    """The drawn cells of the class in each folder, and who drew: models, sha256 of their weights.

    Raises DataError for cells that are not marked as drawn, or not by as many models as promised.
    """
    from cytodiffusion.cli.topup import check_apart, list_drawn

    found = {place: list_drawn(place, name, names) for place in dict.fromkeys(places.values())}
    if "{labels}" in drawn:
        check_apart({choice: found[place][1] for choice, place in places.items()})
    models = {mark for _, marks in found.values() for mark in marks}
    said = sorted({f"{mark.model or 'another program'} ({mark.weights[:12]})" for mark in models})
    return {place: samples for place, (samples, _) in found.items()}, said


# --- the trainings -------------------------------------------------------------------------------


def _train_all(
    world: World, choices: Sequence[Choice], kinds: Sequence[Any], workers: int, console: Console
) -> list[dict[str, Any]]:
    """A row for every training, in order."""
    from functools import partial

    from cytodiffusion.cli.topup import Job, added, work
    from cytodiffusion.evaluate.augment import ARMS, row

    every = [Job(n, r, kind, arm) for n, r in choices for kind in kinds for arm in ARMS]
    found = dict[Job, dict[str, Any]]()
    console.start()
    for job, told in finished(partial(work, world), every, workers):
        more = 0 if job.arm == "real" else added(world, job.count, job.repeat)
        spent = {"added": more, "steps": told.steps, "seconds": told.seconds}
        found[job] = row(job.count, job.repeat, job.kind, job.arm, world.test.labels,
                         told.probabilities, world.rare, spent)  # fmt: skip
        console.note(f"{job}: recall {found[job]['recall']:.4f}")
        console.progress("training", len(found), len(every), "trainings")
    return [found[job] for job in every]


# --- what is shown -------------------------------------------------------------------------------


def _show(
    out: Path, title: str, rows: list[dict[str, Any]], right: list[str], facts: dict[str, Any],
    console: Console,
) -> None:  # fmt: skip
    """OUT/results.json and report.html, and the gains for a terminal. Raises OutputError."""
    from cytodiffusion.evaluate.augment import gains, render, summary
    from cytodiffusion.evaluate.report import write_page

    results = {"rows": rows, "summary": summary(rows), "gains": gains(rows)}
    write_results(out, results | facts)
    write_page(out / "report.html", render(title, results, right, facts))
    lines = [_heading(facts["rare_class"]), *map(_gain, results["gains"])]
    lines.append(f"Drawn by {'; '.join(facts['drawn_by'])}.")
    bound = "The gain is an upper bound: see the report."
    lines += [bound] if facts["gain_is_an_upper_bound"] else []
    console.result(results | facts, "\n".join([*lines, f"See {out}."]))


def _draw_anew(source: Path, out: Path, choice: Choice, need: int, name: str) -> list[str]:
    """Commands that train and draw with the cells of a choice alone."""
    first = "{}-{}".format(*choice)
    train = ["cytodiffusion", "train", source, "--splits", out / "choices" / f"{first}.csv",
             "-o", f"runs/{first}"]  # fmt: skip
    draw = ["cytodiffusion", "generate", "-m", f"runs/{first}/bundle", "--classes", name,
            "--per-class", need, "-o", f"drawn/{first}"]  # fmt: skip
    return [shlex.join(map(str, words)) for words in (train, draw)]


def _origin(world: World, cropped_by: str) -> dict[str, Any]:
    from collections import Counter

    from cytodiffusion.release import commit

    tested = Counter(world.classes[k] for k in world.test.labels)
    return {
        "real_cells_cropped_as_by": cropped_by,
        "training_cells": len(world.real.labels), "training_sha256": world.real.sha256[:12],
        "test_cells": dict(sorted(tested.items())), "test_sha256": world.test.sha256[:12],
        "device": world.device, "cores": cores(), "commit": commit(),
    }  # fmt: skip


def _heading(name: str) -> str:
    return (
        f"{'cells':>5}  {'drawn cells less':<18}{'balanced accuracy':<28}{'recall of ' + name:<28}"
    )


def _gain(row: dict[str, Any]) -> str:
    """One difference, for a terminal."""
    over = {"real": "none added", "copies": "copies"}[row["over"]]
    told = (_points(row, name) for name in ("balanced_accuracy", "recall"))
    return (
        f"{row['labels']:>5}  {over:<18}"
        + "".join(f"{each:<28}" for each in told)
        + row["classifier"]
    )


def _points(row: dict[str, Any], name: str) -> str:
    bounds = row[f"{name}_ci95"]
    return f"{row[name]:+.4f}" + (f" [{bounds[0]:+.4f}, {bounds[1]:+.4f}]" if bounds else "")
