"""`models list | show | verify | calibrate | export`: the shipped models and any other bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cytodiffusion.cli.console import (
    NOTICE,
    Console,
    Device,
    Engine,
    Json,
    ModelName,
    Out,
    Seed,
    cores,
    pick_device,
    threads,
)

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(
    help="List, show, verify, calibrate and export models.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Name = Annotated[str, typer.Argument(metavar="MODEL", help="A bundle folder or a shipped model.")]


@app.command("list")
def list_models(json: Json = False, seed: Seed = 0, device: Device = "auto") -> None:
    """The models that are shipped with the package."""
    import json as json_module

    from cytodiffusion.bundle import DEFAULT_MODEL, ZOO, shipped

    found = {}
    for name in shipped():
        config = json_module.loads((ZOO / name / "config.json").read_text())
        size = (ZOO / name / "model.safetensors").stat().st_size / 1e6
        preprocess = json_module.loads((ZOO / name / "preprocess.json").read_text())
        found[name] = {
            "classes": config["classes"], "size": preprocess["size"],
            "megabytes": round(size, 1), "default": name == DEFAULT_MODEL,
        }  # fmt: skip
    lines = [
        f"{name:<12} {len(about['classes'])} classes, {about['size']} px, {about['megabytes']} MB"
        + ", the default" * about["default"]
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
def calibrate(
    source: Annotated[
        Path, typer.Argument(metavar="DIR", help="Labelled images that it was not trained on.")
    ],
    out: Out,
    model: ModelName = "pbc8",
    splits: Annotated[Path | None, typer.Option(help="CSV with path,label,split.")] = None,
    split: Annotated[str | None, typer.Option(help="Which split to calibrate on.")] = None,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Fit probabilities, sets, strangeness and stopping anew on the labelled cells of DIR.

    OUT is a bundle with the same weights. The cells should be as those that will be named: where their
    frames clearly differ from those of training, they are brought to their look, as by `predict`, and OUT
    does so with every frame.
    """
    import torch

    from cytodiffusion.bundle import CHECKSUMS, check_place, checksums, load, recalibrated
    from cytodiffusion.calibration import calibrate as fit
    from cytodiffusion.calibration import calibrations, cautions, plan_of
    from cytodiffusion.cli.train import check_counts, check_held, read_canvases
    from cytodiffusion.data.mark import refuse_marked
    from cytodiffusion.data.match import fit_frames
    from cytodiffusion.data.pixels import load_pixels
    from cytodiffusion.data.readers import read_dataset
    from cytodiffusion.errors import OutputError
    from cytodiffusion.release import commit, make_card
    from cytodiffusion.types import PIXELS

    console = Console(json)
    check_place(out)
    loaded = load(model, pick_device(device), engine="torch", calibrated=False)
    there = checksums(out) if (out / CHECKSUMS).exists() else {}
    if there and there.get("model.safetensors") != loaded.weights_sha256:
        raise OutputError(
            f"{out} holds another model, not {model}. Choose a new folder, or delete it."
        )
    if loaded.space is PIXELS:
        loaded.denoiser.cpu()  # small, and quicker there on many threads
    names, together = loaded.classes.names, loaded.classifier.together
    found = read_dataset(source, splits=splits, split=split)
    samples = [sample for sample in found if sample.label is not None]
    where = str(source) if split is None else f"the split '{split}' of {source}"
    check_held(samples, names, loaded.taxonomy, where)
    refuse_marked(samples, "cells to calibrate on")
    console.note(NOTICE)
    frames = fit_frames(samples, loaded.preprocess)
    if frames.told:
        console.note(frames.told)
    preprocess = frames.settled(loaded.preprocess)
    work = load_pixels(samples, names, preprocess, 1.0, cores(), loaded.taxonomy)
    held = console.follow(work, "reading", len(samples), "images")
    console.not_read(*held.problems)
    check_counts(held.labels.tolist(), names, f"{where}, of what could be read,")
    plan, meter = plan_of(together, loaded.space, seed), loaded.classifier.meter
    canvases = read_canvases(samples, names, preprocess, plan, loaded.taxonomy, console)
    torch.set_num_threads(1)  # one for each worker
    fitting = fit(meter, held, len(names), together, plan, threads(loaded), loaded.space, canvases)
    count = calibrations(meter, held, canvases, plan)
    calibrated = console.follow(fitting, "calibrating", count, "cells")
    for caution in cautions(calibrated.budgets):
        console.note(caution)
    origin = loaded.config["origin"] | {
        "calibrated_on": source.resolve().name, "calibrated_at": commit(), "val_sha256": held.sha256,
        "abroad_reach": calibrated.reach,
    }  # fmt: skip
    size = sum(weight.numel() for weight in loaded.denoiser.parameters())
    card = make_card(loaded.name, loaded.classes, preprocess, loaded.form, size, calibrated, origin)
    recalibrated(out, loaded, preprocess, calibrated.budgets, card, origin)
    values = {"bundle": str(out), "cells": len(held.labels), "validation": calibrated.scores}
    console.result(values, f"Calibrated on {len(held.labels):,} cells: {out}.")
    if console.unread:
        raise typer.Exit(1)


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
    about = About(loaded.name, loaded.classes.names, loaded.preprocess.describe(), license_, data)
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
