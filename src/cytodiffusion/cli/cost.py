"""`bench cost`: what a right answer costs, the paper's procedure beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cytodiffusion.cli.benches import (
    code_digest,
    digest_of,
    labelled_cells,
    tell_unread,
    write_results,
)
from cytodiffusion.cli.console import (
    NOTICE,
    Console,
    Context,
    Crop,
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
    from cytodiffusion.bundle import Model
    from cytodiffusion.data.sample import Sample
    from cytodiffusion.evaluate.cost import Measured


ONE_PASS = "paper in one pass"


def cost(
    context: Context,
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Labelled images.")],
    out: Out,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="A bundle or a shipped model; give it again for more."),
    ] = None,
    splits: Annotated[Path | None, typer.Option(help="CSV with path,label,split.")] = None,
    split: Annotated[str | None, typer.Option(help="Which split to measure on.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=2, help="About this many cells, as many of each class.")
    ] = None,
    procedures: Annotated[
        str,
        typer.Option(
            help="Some of: paper, paper as shipped, paper in one pass, full, balanced, fast, race."
        ),
    ] = "paper,paper in one pass,full,balanced,fast,race",
    crop: Crop = None,
    engine: Engine = "auto",
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Accuracy, network passes and cells a second of each procedure, in one run.

    OUT/results.json and report.html. Run again, what was measured is not measured anew.
    """
    from cytodiffusion.bundle import load
    from cytodiffusion.evaluate.cost import render
    from cytodiffusion.evaluate.report import write_page

    console = Console(json)
    models = [load(name, pick_device(device), engine) for name in model or ["pbc8"]]
    names = _procedures(procedures, models)
    console.note(NOTICE)
    _check_same_classes(models)
    samples, classes = labelled_cells(source, splits, split, models[0], limit, seed)
    measured = [_measure(each, names, samples, classes, crop, out, console) for each in models]
    rows = [row for each, found in zip(models, measured, strict=True)
            for row in _rows(each, found, seed)]  # fmt: skip
    beside = _across(models, measured, seed)
    facts = {"command": call_of(context), "seed": seed, "cores": cores(), **_origin(models)}
    values = {"procedures": rows, "across": beside, **facts}
    write_results(out, values)
    write_page(out / "report.html", render(f"Cost of naming {source.name}", rows, beside, facts))
    console.result(values, "\n".join([_heading(), *map(_line, rows), f"See {out}."]))
    if console.unread:
        raise typer.Exit(1)


def _procedures(text: str, models: Sequence[Model]) -> list[str]:
    """The procedures asked for. Raises SettingsError for one that there is not."""
    from cytodiffusion.errors import SettingsError
    from cytodiffusion.evaluate.cost import PROCEDURES

    names = [name.strip() for name in text.split(",")]
    if names == [ONE_PASS] and not any(model.classifier.together for model in models):
        raise SettingsError(f"'{ONE_PASS}' needs a network with a head for each class; none has.")
    for name in names:
        if name not in PROCEDURES:
            raise SettingsError(
                f"There is no procedure '{name}'. There are: {', '.join(PROCEDURES)}."
            )
        for model in models:
            model.classifier.budget(name.split()[0])
    return names


def _check_same_classes(models: Sequence[Model]) -> None:
    """Raises DataError."""
    from cytodiffusion.errors import DataError

    for other in models[1:]:
        if other.classes != models[0].classes:
            raise DataError(
                f"{other.name} and {models[0].name} do not know the same classes, so they cannot be "
                "compared on the same cells. Run one at a time."
            )


def _measure(
    model: Model, names: Sequence[str], samples: Sequence[Sample], classes: Sequence[int],
    crop: float | None, out: Path, console: Console,
) -> dict[str, Measured]:  # fmt: skip
    """What each procedure measures with this model; in one pass only where it has heads."""
    import torch

    torch.set_num_threads(1)  # one for each worker
    able = [name for name in names if model.classifier.together or name != ONE_PASS]
    found = {name: _one(model, name, samples, classes, crop, out, console) for name in able}
    for measured in found.values():
        tell_unread(samples, measured.digests, model.fitted(crop), console)
    return found


def _rows(model: Model, found: dict[str, Measured], seed: int) -> list[dict[str, Any]]:
    """A row for each procedure; compared with the model's own `paper` where that was run."""
    from cytodiffusion.evaluate.cost import compare, procedure, race_row, row

    full = model.classifier.budget("full").reader
    rows = []
    for name, measured in found.items():
        measurement, budget = procedure(model.classifier, name)
        told = row(measured, budget, name, measurement.together)
        told |= race_row(measured, budget, found.get("full"), full)
        if name != "paper" and "paper" in found:
            reference = procedure(model.classifier, "paper")[1]
            told |= compare(measured, budget, found["paper"], reference, seed)
        rows.append({"model": model.name, "form": _form(model), **told})
    spent = {each["name"]: each["passes_per_cell"] for each in rows}
    for each in rows:
        for name, key in (
            ("paper", "passes_of_paper"),
            ("paper in one pass", "passes_of_one_pass"),
        ):
            if name in spent:
                each[key] = spent[name] / each["passes_per_cell"]
    return rows


def _form(model: Model) -> str:
    return "heads" if model.classifier.together else "conditional"


def _across(
    models: Sequence[Model], measured: Sequence[dict[str, Measured]], seed: int
) -> list[dict[str, Any]]:
    """Procedures of each model beside `paper` of every other one, on the same cells."""
    from cytodiffusion.evaluate.cost import compare, procedure, spent

    ran = [j for j, each in enumerate(measured) if "paper" in each]
    found = []
    for i, j in ((i, j) for i in range(len(models)) for j in ran if i != j):
        theirs, (whole, reference) = measured[j]["paper"], procedure(models[j].classifier, "paper")
        for name, ours in measured[i].items():
            measurement, budget = procedure(models[i].classifier, name)
            fewer = spent(theirs, whole.together) / spent(ours, measurement.together)
            names = {"model": models[i].name, "name": name, "paper_of": models[j].name}
            told = compare(ours, budget, theirs, reference, seed)
            found.append(names | {"passes_of_paper": fewer} | told)
    return found


def _one(
    model: Model, name: str, samples: Sequence[Sample], classes: Sequence[int],
    crop: float | None, out: Path, console: Console,
) -> Measured:  # fmt: skip
    """What a procedure measures, from OUT where that was measured before."""
    import numpy as np

    from cytodiffusion.data.load import file_sha256
    from cytodiffusion.evaluate.cost import Measured, run
    from cytodiffusion.files import writing_to

    preprocess = model.fitted(crop)
    cells = [(sample.name, file_sha256(sample)) for sample in samples]
    about = (
        model.files_sha256, cells, list(classes), preprocess, model.engine,
        str(model.classifier.device), cores(), code_digest(),
    )  # fmt: skip
    path = out / "measured" / f"{model.name}-{name.replace(' ', '-')}-{digest_of(about)}.npz"
    if path.exists():
        console.note(f"{model.name}, {name}: measured before, see {path}.")
        return Measured.load(path)
    work = run(model.classifier, name, samples, np.array(classes), preprocess, cores())
    measured = console.follow(work, f"{model.name}, {name}", len(samples), "cells")
    with writing_to(path.parent):
        measured.save(path)
    return measured


def _origin(models: Sequence[Model]) -> dict[str, Any]:
    from cytodiffusion.release import commit

    weights = {model.name: model.weights_sha256[:12] for model in models}
    device = str(models[0].classifier.device)
    return {"weights": weights, "engine": models[0].engine, "device": device, "commit": commit()}


def _heading() -> str:
    names = ("balanced acc.", "passes", "cells/s", "paper's are")
    return f"{'model':<16}{'procedure':<18}{names[0]:>14}{names[1]:>10}{names[2]:>10}{names[3]:>12}"


def _line(row: dict[str, Any]) -> str:
    """One procedure for a terminal."""
    ratio = f"{row['passes_of_paper']:>11.1f}x" if "passes_of_paper" in row else ""
    return (
        f"{row['model']:<16}{row['name']:<18}{row['balanced_accuracy']:>14.4f}"
        f"{row['passes_per_cell']:>10.2f}{row['cells_per_second']:>10.1f}{ratio}"
    )
