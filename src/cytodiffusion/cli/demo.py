"""`demo`: the main job on the cells and with the model that come with the package."""

from __future__ import annotations

from pathlib import Path

from cytodiffusion.cli.console import NOTICE, Console, Device, Json, Out, Seed, cores, pick_device

DRAWN = (
    "These cells were drawn by the model itself: they show the workings, no accuracy. They are grainy, as "
    "real cells are not, so that many are flagged as anomalous."
)


def demo(
    out: Out = Path("out/demo"), json: Json = False, seed: Seed = 0, device: Device = "auto"
) -> None:
    """Name the shipped synthetic cells with the shipped model and write a report."""
    from cytodiffusion.bundle import ZOO, load
    from cytodiffusion.cli.predict import finish, name_all, report
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.predictions import Request

    console = Console(json)
    console.note(NOTICE)
    console.note(DRAWN)
    model = load("pbc8", pick_device(device))
    samples = read_dataset(ZOO.parent / "demo")
    request = Request(crop=1.0, workers=cores())  # drawn at the model's own crop
    rows = name_all(model, samples, request, out, console)
    title = "Demo: synthetic cells"
    report(model, samples, rows, request, out, "cytodiffusion demo", title, notes=(DRAWN,))
    _table(rows, console)
    console.note(f"Open {out / 'report.html'} in a browser.")
    finish(rows, out, console)


def _table(rows: list[dict[str, object]], console: Console) -> None:
    """The first cells, one a line."""
    for row in rows[:12]:
        console.note(
            f"{row['path']:<40} {row['predicted']:<22} {row['confidence']:.3f}  {row['flag']}"
        )
