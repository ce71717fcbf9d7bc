"""`generate`: draw marked synthetic cells."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cytodiffusion.cli.console import (
    NOTICE,
    Console,
    Device,
    Json,
    ModelName,
    Out,
    Seed,
    pick_device,
    read_answers,
    threads,
)

if TYPE_CHECKING:
    from cytodiffusion.bundle import Model
    from cytodiffusion.synthesis import Drawing


def generate(
    out: Out,
    model: ModelName = "pbc8",
    per_class: Annotated[int, typer.Option(min=1, help="Cells of each class.")] = 10,
    classes: Annotated[str | None, typer.Option(help="Only these: A,B,...")] = None,
    sampler: Annotated[str | None, typer.Option(help="dpm++, heun or ddim.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Steps from noise to cell.")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help='Push away from "any cell"; 1: none, as is usual with heads; class-conditional: 1.5.',
        ),
    ] = None,
    churn: Annotated[
        float | None, typer.Option(min=0, help="Noise added on the way, over all steps.")
    ] = None,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Draw synthetic cells: OUT/CLASS/SEED.png, marked as such, and manifest.csv.

    Cells that are there are not drawn again; the same seed gives the same cell. --seed is that of the
    first cell of every class. Synthetic cells are refused as test data; to train on these made a classifier
    worse (docs/log.md 36).
    """
    from cytodiffusion.bundle import load
    from cytodiffusion.files import alone
    from cytodiffusion.synthesis import Cell, Folder, draw_all, read_gain
    from cytodiffusion.types import PIXELS

    console = Console(json)
    loaded = load(model, pick_device(device), engine="torch")
    names = read_answers(classes, loaded) or loaded.classes.names
    given = {"sampler": sampler, "steps": steps, "guidance": guidance, "churn": churn}
    drawing = _drawing(given, loaded)
    console.note(NOTICE)
    if loaded.space is PIXELS and read_gain(loaded) is None:
        console.note(
            f"{loaded.name} has no drawing.json, so its cells may be grainy (recipes/drawing.py)."
        )
    cells = [Cell(name, seed + i) for i in range(per_class) for name in names]
    with alone(out):
        folder = Folder(out, loaded, drawing)
        missing = folder.begin(cells)
        before = len(cells) - len(missing)
        if before:
            console.note(f"{before:,} cells are already in {out}; going on with the rest.")
        console.start()
        began, done = time.monotonic(), before
        for files in draw_all(loaded, missing, drawing, threads(loaded)):
            folder.add(files)
            done += len(files)
            console.progress("drawing", done, len(cells), "cells", before=before)
        spent = time.monotonic() - began
        there = folder.write_manifest()
    values = {"out": str(out), "cells": there, "drawn": len(missing), **folder.about,
              "seconds": round(spent, 3)}  # fmt: skip
    told = f"{len(missing):,} cells drawn, {there:,} in {out}."
    console.result(values, told)


def _drawing(given: dict[str, Any], model: Model) -> Drawing:
    """The settings, with those that were given in place of the usual ones. Raises SettingsError."""
    from typing import get_args

    from cytodiffusion.diffusion.sample import Sampler
    from cytodiffusion.errors import SettingsError
    from cytodiffusion.synthesis import usual

    wanted = {name: value for name, value in given.items() if value is not None}
    if wanted.get("sampler", "heun") not in get_args(Sampler):
        known = ", ".join(get_args(Sampler))
        raise SettingsError(f"There is no sampler '{wanted['sampler']}'. There are: {known}.")
    return replace(usual(model), **wanted)
