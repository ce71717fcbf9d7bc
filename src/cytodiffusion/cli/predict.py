"""`predict`: a folder in, a table and a report out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cytodiffusion.cli.console import (
    NOTICE,
    Answers,
    Budget,
    Console,
    Context,
    Coverage,
    Crop,
    Device,
    Engine,
    Json,
    Match,
    ModelOrAuto,
    Out,
    Prior,
    Seed,
    Sets,
    call_of,
    cores,
    pick_device,
    read_answers,
    read_prior,
)

FEW = 8  # cells, from which on it is said that
MOST = 0.9  # or more of them are strange: then it may be the frames

if TYPE_CHECKING:
    from cytodiffusion.bundle import Model
    from cytodiffusion.data.sample import Sample
    from cytodiffusion.predictions import Request, Row


def predict(
    context: Context,
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Images, in any form it reads.")],
    out: Out,
    model: ModelOrAuto = None,
    classes: Answers = None,
    budget: Budget = "balanced",
    crop: Crop = None,
    match: Match = "auto",
    coverage: Coverage = 0.95,
    sets: Sets = "all",
    prior: Prior = "training",
    engine: Engine = "auto",
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Name the cells of INPUT: OUT/predictions.csv, .parquet and report.html.

    Run again with the same OUT, it goes on where it stopped.
    """
    from cytodiffusion.bundle import DEFAULT_MODEL, load
    from cytodiffusion.cli.frames import Asked, take
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.predictions import Request

    console = Console(json)
    samples = read_dataset(source)
    loaded = load(model or DEFAULT_MODEL, pick_device(device), engine)
    loaded.classifier.budget(budget)
    answers = read_answers(classes, loaded)
    shares = read_prior(prior, loaded.classes.names)
    console.note(NOTICE)
    asked = Asked(match, crop, budget, model, str(source.resolve()))
    taken = take(asked, loaded, samples, console, out, open_answers=answers is None)
    loaded, call = taken.model, call_of(context, model=model or taken.model.name)
    request = Request(
        taken.budget, taken.fit.crop, coverage, cast("Any", sets), shares, answers, light=taken.fit.light,
        command="predict", source=asked.source, decided=taken.kept, workers=cores(),
    )  # fmt: skip
    rows = name_all(loaded, samples, request, out, console)
    report(loaded, samples, rows, request, out, call, title=f"Cells of {source.name}")
    shown = request.preprocess(loaded)
    finish(rows, out, console, more={"crop": shown.crop, "match": shown.match})


def name_all(
    model: Model, samples: Sequence[Sample], request: Request, out: Path, console: Console,
    labelled: bool = False,
) -> list[Row]:  # fmt: skip
    """Name every sample, going on from what OUT already holds, and write the table.

    Raises OutputError where another process writes to OUT.
    """
    from cytodiffusion.files import alone

    with alone(out):
        return _name_alone(model, samples, request, out, console, labelled)


def _name_alone(
    model: Model, samples: Sequence[Sample], request: Request, out: Path, console: Console,
    labelled: bool,
) -> list[Row]:  # fmt: skip
    from cytodiffusion.predictions import Table, name_cells

    table = Table(out, request, model)
    there = table.begin()
    rows = {sample.name: row for sample in samples if (row := _known(sample, there))}
    todo = [sample for sample in samples if sample.name not in rows]
    before = len(rows)
    if before:
        console.note(f"{before:,} cells are already in {out}; going on with the rest.")
    console.start()
    done = before
    for batch in name_cells(model, todo, request):
        table.append([row for row in batch if row["flag"] != "unreadable"])
        rows.update({row["path"]: row for row in batch})
        done += len(batch)
        console.progress("naming", done, len(samples), "cells", before=before)
    ordered = [dict(rows[sample.name]) for sample in samples]
    if labelled:
        for sample, row in zip(samples, ordered, strict=True):
            row["label"] = sample.label
    table.finish(ordered, extra=("label",) if labelled else ())
    return ordered


def _known(sample: Sample, there: dict[tuple[str, str], Row]) -> Row | None:
    """The row of the image as it is now; None if it was not named yet, or has changed since."""
    from cytodiffusion.data.load import file_sha256

    return there.get((sample.name, file_sha256(sample))) if there else None


def report(
    model: Model, samples: Sequence[Sample], rows: list[Row], request: Request, out: Path,
    call: str, title: str, metrics: dict[str, Any] | None = None, notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write OUT/report.html, with pictures of the cells that need a look."""
    from cytodiffusion.evaluate.report import write_report

    shown = request.preprocess(model)
    facts = {
        "model": model.name,
        "budget": request.budget,
        "asked coverage of the sets": request.coverage,
        "crop": shown.crop,
        "light": "as it is" if shown.match == "nothing" else f"the model's ({shown.match})",
        "command": call,
    }
    said = "The frames were brought to the light of those that the model was trained on. Check the names."
    write_report(
        out / "report.html",
        title=title,
        metrics=metrics,
        rows=rows,
        classes=list(request.answers or model.classes.names),
        thumbnails=_thumbnails(model, samples, rows, request),
        facts=facts,
        notes=[*notes, *([said] if request.light else [])],
    )


def _thumbnails(
    model: Model, samples: Sequence[Sample], rows: list[Row], request: Request, most: int = 150
) -> dict[str, bytes]:
    """PNGs of the strangest, the uncertain and the mistaken cells, as the network sees them."""
    from cytodiffusion.data.load import load_one
    from cytodiffusion.data.sample import png

    preprocess = request.preprocess(model)
    seen = [i for i, row in enumerate(rows) if row["flag"] in ("anomalous", "uncertain")]
    seen.sort(key=lambda i: (rows[i]["flag"] != "anomalous", -float(rows[i]["anomaly"])))
    wrong = [i for i, row in enumerate(rows) if row.get("label") and row["flag"] != "unreadable"
             and row["label"] != row["predicted"]]  # fmt: skip
    wrong.sort(key=lambda i: -float(rows[i]["confidence"]))
    pictures = {}
    for i in dict.fromkeys(seen[: most - 50] + wrong[:50]):
        item = load_one(samples[i], preprocess)
        if item.pixels is not None:
            pictures[samples[i].name] = png(item.pixels.transpose(1, 2, 0).copy())
    return pictures


def finish(
    rows: list[Row], out: Path, console: Console, metrics: dict[str, Any] | None = None,
    measured: Sequence[str] = (), more: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Print the result, or `metrics` where there are any; exit with 1 if some images were not read."""
    flags = Counter(row["flag"] for row in rows)
    names = Counter(row["predicted"] for row in rows if row["flag"] != "unreadable")
    for row in rows:
        if row["flag"] == "unreadable":
            console.note(f"Not read: {row['path']}: {row['problem']}")
    if (read := len(rows) - flags["unreadable"]) >= FEW and flags["anomalous"] >= MOST * read:
        console.note(
            "Nearly all are flagged as unlike the cells of training. Is each file one stained cell, in the "
            "middle of its frame? Frames that hold just the cell take --crop 1."
        )
    lines = [f"{name:<22} {count:>7,}" for name, count in names.most_common()]
    told = ", ".join(f"{count:,} {flag}" for flag, count in flags.most_common())
    values = {"cells": len(rows), "counts": dict(names), "flags": dict(flags), "out": str(out)}
    values |= more or {}
    text = [*lines, f"{len(rows):,} cells: {told}.", *measured, f"See {out}."]
    console.result(metrics or values, "\n".join(text))
    if flags["unreadable"]:
        raise typer.Exit(1)
