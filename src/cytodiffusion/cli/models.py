"""`models list | show | verify`: the shipped models and any other bundle."""

from __future__ import annotations

from typing import Annotated

import typer

from cytodiffusion.cli.console import Console, Device, Json, Seed, pick_device

app = typer.Typer(help="List, show and verify models.", no_args_is_help=True, rich_markup_mode=None)
Name = Annotated[str, typer.Argument(metavar="MODEL", help="A bundle folder or a shipped model.")]


@app.command("list")
def list_models(json: Json = False, seed: Seed = 0, device: Device = "auto") -> None:
    """The models that are shipped with the package."""
    import json as json_module

    from cytodiffusion.bundle import ZOO, shipped

    found = {}
    for name in shipped():
        config = json_module.loads((ZOO / name / "config.json").read_text())
        size = (ZOO / name / "model.safetensors").stat().st_size / 1e6
        found[name] = {"classes": config["classes"], "megabytes": round(size, 1)}
    lines = [
        f"{name:<12} {len(about['classes'])} classes, {about['megabytes']} MB"
        for name, about in found.items()
    ]
    Console(json).result(found, "\n".join(lines) or "No models are shipped.")


@app.command()
def show(model: Name = "pbc8", json: Json = False, seed: Seed = 0, device: Device = "auto") -> None:
    """The card of a model: what it was trained on, how good it is, and its limits."""
    import json as json_module

    from cytodiffusion.bundle import check_files, find_bundle

    folder = find_bundle(model)
    check_files(folder)
    config = json_module.loads((folder / "config.json").read_text())
    Console(json).result(config, (folder / "card.md").read_text().rstrip())


@app.command()
def verify(
    model: Name = "pbc8", json: Json = False, seed: Seed = 0, device: Device = "auto"
) -> None:
    """Check every file of a model, and that it gives its test vectors on this machine."""
    from cytodiffusion.bundle import TOLERANCE
    from cytodiffusion.bundle import verify as verify_bundle

    worst = verify_bundle(model, pick_device(device))
    text = f"{model}: every file is as released; test vectors agree to {worst:.1e} of their value."
    values = {"model": model, "largest_difference": worst, "tolerance": TOLERANCE}
    Console(json).result(values, text)
