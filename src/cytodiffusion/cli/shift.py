"""`bench shift`: trained in one laboratory, tested unchanged in others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cytodiffusion.cli.benches import find_kinds, write_results
from cytodiffusion.cli.console import (
    NOTICE,
    Console,
    Context,
    Device,
    Engine,
    Json,
    Out,
    Seed,
    call_of,
    cores,
    pick_device,
)

if TYPE_CHECKING:
    from cytodiffusion.cli.labs import Bench, Lab
    from cytodiffusion.evaluate.shift import Told


def shift(
    context: Context,
    train: Annotated[
        Path, typer.Option(metavar="DIR", help="Labelled images of the training laboratory.")
    ],
    foreign: Annotated[
        list[Path], typer.Option(metavar="DIR", help="Those of another; give it again for more.")
    ],
    out: Out,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Trained on --train; without it one is trained here."),
    ] = None,
    splits: Annotated[
        Path | None, typer.Option(help="CSV with path,label,split of --train.")
    ] = None,
    steps: Annotated[
        str, typer.Option(help="Some of the steps, separated by commas, or all.")
    ] = "all",
    home: Annotated[
        int, typer.Option(min=2, help="About this many held-out cells of --train.")
    ] = 300,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Also train on all sets but one, for each.")
    ] = False,
    baselines: Annotated[
        str, typer.Option(help="Some of resnet, convnext, vit; or none.")
    ] = "none",
    minutes: Annotated[
        float, typer.Option(min=0.001, help="Processor time for each baseline.")
    ] = 60.0,
    preset: Annotated[str, typer.Option(help="Of what is trained here.")] = "cpu",
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=V", help="Change one setting of it.")
    ] = None,
    engine: Engine = "auto",
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Accuracy on cells of other laboratories, step by step, beside baselines. No label of theirs is used.

    The step self-trained makes a model of its own for each set, from its unlabelled cells: minutes each.

    OUT/results.json and report.html. Run again, what was trained and measured is not done anew.
    """
    from cytodiffusion.cli.labs import Bench, find_model, list_labs
    from cytodiffusion.data.taxonomy import Taxonomy
    from cytodiffusion.evaluate.report import write_page
    from cytodiffusion.evaluate.shift import render
    from cytodiffusion.train.settings import make_settings

    console, labels = Console(json), Taxonomy.load()
    names, kinds = _steps(steps), find_kinds(baselines)
    settings = make_settings(preset, [*(change or []), f"seed={seed}"])
    bench = Bench(out, settings, labels, seed, pick_device(device), engine, console)
    labs, answers = list_labs(bench, train, foreign, splits, model)
    console.note(NOTICE)
    ours = find_model(bench.home(labs[0].look), model, labs)
    bench = bench.home(ours.preprocess.look)
    rows = _step_rows(bench, ours, labs, answers, names, home)
    for kind in kinds:
        rows += _baseline_rows(bench, ours, labs, answers, kind, minutes, home, names)
    if leave_one_out:
        rows += _left_out_rows(bench, labs, answers, kinds, minutes)
    facts = {"command": call_of(context), "seed": seed, "classes": ", ".join(answers),
             "labels of the foreign sets": "none used, but to leave out cells of other classes "
             "and to take as many of each class at home", "cores": cores(), **_origin(ours)}  # fmt: skip
    values = {"rows": rows, **facts}
    write_results(out, values)
    page = render(f"From {train.name} to other laboratories", rows, facts)
    write_page(out / "report.html", page)
    console.result(values, "\n".join([_heading(), *map(_line, rows), f"See {out}."]))
    if console.unread:
        raise typer.Exit(1)


def _steps(text: str) -> list[str]:
    """Raises SettingsError for a step that there is not."""
    from cytodiffusion.errors import SettingsError
    from cytodiffusion.evaluate.shift import STEPS

    names = list(STEPS) if text == "all" else [name.strip() for name in text.split(",")]
    if wrong := [name for name in names if name not in STEPS]:
        raise SettingsError(f"There is no step '{wrong[0]}'. There are: {', '.join(STEPS)}.")
    return names


def _rows_of(
    method: str, told: dict[str, Told], answers: Sequence[str], foreign: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each set, and one for the mean of the foreign ones where all of them are there."""
    from cytodiffusion.evaluate.shift import MEAN, mean_row, row

    head = {"method": method, "repeat": 0}
    rows = [{**head, "set": name, **row(one, answers)} for name, one in told.items()]
    if not set(foreign) <= set(told):
        return rows
    return [*rows, {**head, "set": MEAN, **mean_row([told[name] for name in foreign])}]


def _step_rows(
    bench: Bench, ours: Any, labs: Sequence[Lab], answers: Sequence[str], names: Sequence[str],
    home: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Our model with each step."""
    from cytodiffusion.cli.labs import ours_on
    from cytodiffusion.evaluate.shift import STEPS, TRAINED

    rows, sets = [], _sets(bench, labs, home)
    for name in names:
        fit = _learned_from(bench, ours, sets) if name == TRAINED else sets
        told = {where: ours_on(bench, ours, lab, STEPS[name]) for where, lab in fit.items()}
        rows += _rows_of(f"{ours.name}, {name}", told, answers, [lab.name for lab in labs[1:]])
    return rows


def _sets(bench: Bench, labs: Sequence[Lab], home: int) -> dict[str, Lab]:
    """What is tested on: held-out cells of the training laboratory, and all foreign ones."""
    from cytodiffusion.evaluate.shift import HOME

    return {HOME: labs[0].held(home, bench.seed), **{lab.name: lab for lab in labs[1:]}}


def _learned_from(bench: Bench, ours: Any, sets: dict[str, Lab]) -> dict[str, Lab]:
    """The sets that our model can be adapted to; the others are named."""
    from cytodiffusion.cli.labs import not_adapted

    why = {where: not_adapted(ours, lab) for where, lab in sets.items()}
    for problem in filter(None, dict.fromkeys(why.values())):
        bench.console.note(f"The step self-trained is left out: {problem}")
    return {where: lab for where, lab in sets.items() if not why[where]}


def _baseline_rows(
    bench: Bench, ours: Any, labs: Sequence[Lab], answers: Sequence[str], kind: Any, minutes: float,
    home: int, names: Sequence[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """A baseline trained on the same images and augmentation, with the steps that it can take."""
    from cytodiffusion.cli.adapt import read_rounds
    from cytodiffusion.cli.labs import adapted_to, ask, make_baseline, self_trained
    from cytodiffusion.evaluate.shift import FOR_BASELINES, STEPS, TRAINED

    found = make_baseline(bench, bench.out, labs[0].parts, answers, kind, minutes)
    rows, sets, foreign = [], _sets(bench, labs, home), [lab.name for lab in labs[1:]]
    for name in FOR_BASELINES:
        told = {where: ask(bench, found, lab, STEPS[name]) for where, lab in sets.items()}
        rows += _rows_of(f"{kind}, {name}", told, answers, foreign)
    if TRAINED in names:
        step, told = STEPS[TRAINED], {}
        for where, lab in _learned_from(bench, ours, sets).items():
            rounds = read_rounds(adapted_to(bench, ours, lab, step))
            seconds = [each["seconds"] for each in rounds]
            told[where] = self_trained(bench, found, lab, step, seconds)
        rows += _rows_of(f"{kind}, {TRAINED}", told, answers, foreign)
    return rows


def _left_out_rows(
    bench: Bench, labs: Sequence[Lab], answers: Sequence[str], kinds: Sequence[Any], minutes: float
) -> list[dict[str, Any]]:
    """For each laboratory, models trained on all the others; every set at one scale, in one light."""
    from cytodiffusion.cli.labs import ask, join, make_baseline, measured, train_model
    from cytodiffusion.evaluate.shift import STEPS, read

    told: dict[str, dict[str, Told]] = {}
    for left in labs:
        rest = [lab for lab in labs if lab is not left]
        folder, parts = bench.out / f"without-{left.name}", join(bench, rest)
        one = bench.matched()
        ours, step = train_model(one, folder, parts), STEPS["abroad"]
        cells = left.held(None, bench.seed) if left is labs[0] else left
        found = measured(one, ours, cells, step)
        told.setdefault("ours, all sets but this, abroad", {})[left.name] = read(
            ours.classifier, step, found, answers
        )
        for kind in kinds:
            rival = make_baseline(one, folder, parts, answers, kind, minutes)
            method = f"{kind}, all sets but this, light + scale"
            told.setdefault(method, {})[left.name] = ask(one, rival, cells, STEPS["light + scale"])
    names = [lab.name for lab in labs]
    return [row for method, each in told.items() for row in _rows_of(method, each, answers, names)]


def _origin(ours: Any) -> dict[str, Any]:
    from cytodiffusion.release import commit

    return {"model": ours.name, "weights": ours.weights_sha256[:12], "engine": ours.engine,
            "commit": commit()}  # fmt: skip


def _heading() -> str:
    return f"{'method':<40}{'set':<22}{'cells':>7}{'accuracy':>10}{'balanced':>10}{'passes':>8}"


def _line(row: dict[str, Any]) -> str:
    """One method on one set for a terminal."""
    return (
        f"{row['method']:<40}{row['set']:<22}{row['cells']:>7}{row['accuracy']:>10.4f}"
        f"{row['balanced_accuracy']:>10.4f}{row['passes_per_cell']:>8.2f}"
    )
