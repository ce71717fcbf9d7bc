"""`bench low-data`: what is learned from few labels, with and without the unlabelled rest."""

from __future__ import annotations

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
    from cytodiffusion.cli.few import Job, World


def low_data(
    context: Context,
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Labelled images.")],
    out: Out,
    labels: Annotated[
        str, typer.Option(help="Labelled cells of each class, separated by commas.")
    ] = "10,20,50",
    repeats: Annotated[int, typer.Option(min=1, help="Choices of the labelled cells.")] = 5,
    baselines: Annotated[
        str, typer.Option(help="Some of resnet, convnext, vit; or none.")
    ] = "resnet,convnext,vit",
    unlabelled: Annotated[
        bool,
        typer.Option(
            "--unlabelled/--no-unlabelled",
            help="Also train with the rest of the training cells, labels hidden.",
        ),
    ] = True,
    first_steps: Annotated[
        int,
        typer.Option(
            min=0, help="Steps of ours on the unlabelled cells alone, once, to begin from; 0: none."
        ),
    ] = 2000,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Processor time for each baseline, instead of what ours took with the same cells.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of each training of ours, instead of the preset's.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Of ours; without it cpu, which is a smaller network here and 1,000 steps, or fine-tune "
            "with --from."
        ),
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=V", help="Change one setting of it.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="Ours begins with its weights, without a first stage.",
        ),
    ] = None,
    baseline_from: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A trained baseline that those of its kind begin with."),
    ] = None,
    classes: Annotated[str | None, typer.Option(help="The only ones to take part: A,B,...")] = None,
    splits: Annotated[Path | None, typer.Option(help="CSV with path,label,split.")] = None,
    split: Annotated[str, typer.Option(help="Which split to test on.")] = "test",
    share: Annotated[
        float, typer.Option(min=0.05, max=0.95, help="Of a set without splits that is tested on.")
    ] = 0.2,
    limit: Annotated[
        int | None, typer.Option(min=2, help="About this many cells of it, as many of each class.")
    ] = 400,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Trainings at a time, instead of one a core; each holds all cells."
        ),
    ] = None,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Balanced accuracy from few labels, ours and baselines, with and without the unlabelled rest.

    OUT/results.json and report.html. Run again, what was trained is kept; a cut training of ours goes
    on. With --repeats 3 --baselines resnet it should take two cores about two and a half hours, with
    --no-unlabelled three quarters of one.
    """
    from cytodiffusion.cli.few import (
        World,
        find_pretrained,
        list_cells,
        read_cells,
        settings_of,
        some,
        start_digest,
        train_first,
    )
    from cytodiffusion.cli.train import at_scale_of, with_look
    from cytodiffusion.data.pixels import class_names
    from cytodiffusion.data.taxonomy import Taxonomy
    from cytodiffusion.evaluate.low_data import OURS, Method, check_counts, gains, render, summary
    from cytodiffusion.evaluate.report import write_page

    console, where, names = Console(json), pick_device(device), Taxonomy.load()
    counts = read_counts(
        labels, least=2
    )  # a baseline sets one aside to choose its learning rate by
    kinds = find_kinds(baselines)
    preset = preset or ("fine-tune" if start else "cpu")
    settings = settings_of(preset, [*([f"steps={steps}"] if steps else []), *(change or [])], start)
    if start is not None:
        start_digest(start)  # what can be wrong is said before anything is written
    pretrained = find_pretrained(baseline_from or [], kinds, start)
    only = [name.strip() for name in (classes or "").split(",") if name.strip()]
    train, test = list_cells(source, splits, split, seed, names, console, share, only)
    if start is not None:
        settings = at_scale_of(start, with_look(settings, train, console), change or [], console)
    answers = class_names(train, names)
    known = [str(sample.label) for sample in train if sample.label is not None]
    check_counts(known, counts)
    console.note(NOTICE)

    margin = settings.augmentation.margin
    cells = read_cells(train, "train", answers, settings.preprocess, margin, names, console)
    if unknown := {str(s.label) for s in test} - set(answers):
        console.note(f"Left out of the test, as none is trained on: {', '.join(sorted(unknown))}.")
    shown = some([s for s in test if s.label in answers], limit, seed)
    asked = read_cells(shown, split, answers, settings.preprocess, 1.0, names, console)
    check_counts([answers[k] for k in cells.labels if k >= 0], counts)
    world = World(
        out, settings, answers, train=cells, test=asked, seed=seed, device=where, start=start,
        first_steps=0 if start else first_steps * unlabelled, pretrained=pretrained,
    )  # fmt: skip
    if world.first_steps:
        train_first(world, console)
    kept = [Method(OURS, rest) for rest in (False, True)[: 1 + unlabelled]]
    kept += [Method(kind, rest) for kind in kinds for rest in (False, True)[: 1 + unlabelled]]
    workers = jobs or (cores() if where == "cpu" else 1)
    rows = _train_all(world, counts, repeats, kept, minutes, workers, console)

    results = {"rows": rows, "summary": summary(rows), "gains": gains(rows)}
    facts = {"command": call_of(context), "seed": seed, **_origin(world)}
    write_results(out, results | facts)
    write_page(out / "report.html", render(f"Few labels: {source.name}", results, facts))
    lines = [*map(_line, results["summary"]), *map(_gain, results["gains"])]
    console.result(results | facts, "\n".join([_heading(), *lines, f"See {out}."]))
    if console.unread:
        raise typer.Exit(1)


def _train_all(
    world: World, counts: Sequence[int], repeats: int, methods: Sequence[Any],
    minutes: float | None, workers: int, console: Console,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for every training: first all of ours, then baselines for as long as those took."""
    from functools import partial

    from cytodiffusion.cli.few import Job, work
    from cytodiffusion.evaluate.low_data import OURS, row

    every = [Job(n, r, method) for n in counts for method in methods for r in range(repeats)]
    found, took = dict[Job, dict[str, Any]](), dict[tuple[int, int, bool], float]()
    console.start()

    def run(some: Sequence[Job]) -> None:
        for job, told in finished(partial(work, world), some, workers):
            spent = {"seconds": told.seconds, "steps": told.steps}
            truth = world.test.labels
            one = row(job.count, job.repeat, job.method, truth, told.probabilities, spent)
            found[job] = one
            took.setdefault((job.count, job.repeat, job.method.rest), told.seconds / 60)
            console.note(f"{job}: balanced accuracy {one['balanced_accuracy']:.4f}")
            console.progress("training", len(found), len(every), "trainings")

    run([job for job in every if job.method.kind == OURS])
    run([
        Job(job.count, job.repeat, job.method,
            minutes or took[job.count, job.repeat, job.method.rest])
        for job in every if job.method.kind != OURS
    ])  # fmt: skip
    order = {(job.count, job.method, job.repeat): i for i, job in enumerate(every)}
    return [found[j] for j in sorted(found, key=lambda j: order[j.count, j.method, j.repeat])]


def _origin(world: World) -> dict[str, Any]:
    from collections import Counter

    from cytodiffusion.cli.few import first_folder, spent
    from cytodiffusion.release import commit

    tested = Counter(world.classes[k] for k in world.test.labels)
    first = round(spent(first_folder(world)), 1) if world.first_steps else 0
    return {
        "training_cells": len(world.train.labels), "training_sha256": world.train.sha256[:12],
        "test_cells": dict(sorted(tested.items())), "test_sha256": world.test.sha256[:12],
        "labels_of_other_cells": "those of what was trained before" if world.start else "none used",
        "seconds_on_unlabelled_cells_alone": first,  # and counted again in each training
        "pretrained": _pretrained(world),
        "device": world.device, "cores": cores(), "commit": commit(),
    }  # fmt: skip


def _pretrained(world: World) -> str:
    """What each method began with, and what that took; empty where all began with nothing."""
    from cytodiffusion.bundle import load

    if world.start is None:
        return ""
    origin = load(world.start).config["origin"]
    told = [f"ours: {world.start}, {origin.get('steps')} steps on {origin.get('data')}"]
    for kind, one in world.pretrained.items():
        spent = f"{one.trained['steps']} steps, {one.trained['seconds'] / 60:.0f} minutes"
        told.append(f"{kind}: {one.folder.name} {one.sha256[:12]}, {spent}")
    return "; ".join(told)


def _heading() -> str:
    return f"{'labels':>6}  {'method':<24}{'repeats':>8}{'balanced':>10}  95 %"


def _line(row: dict[str, Any]) -> str:
    """One method with so many labels, for a terminal."""
    bounds = row["balanced_accuracy_ci95"]
    told = f"[{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else "-"
    head = f"{row['labels']:>6}  {row['method']:<24}{row['repeats']:>8}"
    return f"{head}{row['balanced_accuracy']:>10.4f}  {told}"


def _gain(row: dict[str, Any]) -> str:
    bounds = row["gain_ci95"]
    told = f" [{bounds[0]:+.4f}, {bounds[1]:+.4f}]" if bounds else ""
    return f"{row['labels']:>6}  {row['method']} less {row['baseline']}: {row['gain']:+.4f}{told}"
