"""`models list | show | verify | export`: the shipped models and any other bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cytodiffusion.cli.console import Console, Device, Engine, Json, Out, Seed, pick_device

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(
    help="List, show, verify and export models.", no_args_is_help=True, rich_markup_mode=None
)
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
    model: Name = "pbc8",
    engine: Engine = "auto",
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Check every file of a model, and that it gives its test vectors on this machine.

    The engine that runs the network must then give what torch gives, within its own tolerance.
    """
    from cytodiffusion.bundle import TOLERANCE, load
    from cytodiffusion.bundle import verify as verify_bundle
    from cytodiffusion.engines.engine import TOLERANCES, check_difference, difference

    device = pick_device(device)
    worst = verify_bundle(model, device)
    loaded = load(model, device, engine)
    name, images = loaded.engine, _vector_images(loaded.folder)
    found = 0.0
    if name != "torch":
        found = difference(loaded.classifier.meter, loaded.denoiser, images)
    check_difference(name, found)
    text = (
        f"{model}: every file is as released; test vectors agree to {worst:.1e} of their value.\n"
    )
    text += f"Engine {name}: agrees with torch to {found:.1e} ({TOLERANCES[name]:.0e} allowed)."
    values = {"model": model, "largest_difference": worst, "tolerance": TOLERANCE, "engine": name}
    values |= {"engine_difference": found, "engine_tolerance": TOLERANCES[name]}
    Console(json).result(values, text)


@app.command()
def export(
    out: Out, model: Name = "pbc8", json: Json = False, seed: Seed = 0, device: Device = "auto"
) -> None:
    """Write a model as an ONNX graph, for programs without torch.

    OUT/model.onnx takes images, noise and noise levels and gives the error of every class;
    OUT/test_vectors.npz has inputs and what they must give; OUT/README.md says what each means.
    """
    from cytodiffusion.bundle import load
    from cytodiffusion.engines.engine import TOLERANCES
    from cytodiffusion.engines.export import About
    from cytodiffusion.engines.export import export as export_graph

    loaded = load(model)
    texts = [(loaded.folder / name).read_text() for name in ("LICENSE", "data_license.txt")]
    license_, data = (text.strip().split("\n")[0].strip().rstrip(".") for text in texts)
    about = About(loaded.name, loaded.classes.names, loaded.preprocess.crop, license_, data)
    worst = export_graph(out, loaded.denoiser, _vector_images(loaded.folder), about)
    tolerance = TOLERANCES["onnxruntime"]
    values = {"model": loaded.name, "out": str(out), "largest_difference": worst}
    text = f"{out}: model.onnx agrees with torch to {worst:.1e} ({tolerance:.0e} allowed)."
    Console(json).result(values | {"tolerance": tolerance}, text)


def _vector_images(folder: Path) -> Tensor:
    """Images of a bundle's test vectors, in [-1, 1]."""
    import numpy as np

    from cytodiffusion.data.images import to_tensor

    with np.load(folder / "test_vectors.npz", allow_pickle=False) as vectors:
        return to_tensor(vectors["pixels"])
