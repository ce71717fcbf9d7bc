"""What a run leaves behind for people: metrics.jsonl, progress.png and grids of drawn cells.

RUN/metrics.jsonl        one line a report: step, losses, images a second, validation
RUN/progress.png         the same as curves
RUN/samples/<step>.png   a column for each class; drawn by the raw weights above, their running
                         mean below
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from cytodiffusion.data.images import to_pixels
from cytodiffusion.diffusion.noise import karras_sigmas
from cytodiffusion.diffusion.sample import guided, sample
from cytodiffusion.files import whole
from cytodiffusion.train.loop import Progress, Run

SAMPLER_STEPS = 18  # Heun steps of a drawn cell


def record(run: Run, progress: Progress) -> None:
    """Add one report to metrics.jsonl; after a cut, lines past the checkpoint are dropped."""
    path = run.folder / "metrics.jsonl"
    kept = [line for line in read_metrics(path) if line["step"] < progress.step]
    line = asdict(progress) | {"images_per_second": round(progress.images / progress.seconds, 2)}
    with whole(path) as part:
        part.write_text("".join(json.dumps(each) + "\n" for each in [*kept, line]))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl; a torn last line is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot_progress(run: Run) -> None:
    """Draw progress.png from metrics.jsonl."""
    lines = read_metrics(run.folder / "metrics.jsonl")
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [line["step"] for line in lines]
    for name in ("own", "any", "classification"):
        left.plot(steps, [line["losses"][name] for line in lines], label=name)  # type: ignore[index]
    left.set(xlabel="step", title="training losses")
    left.legend(frameon=False)
    seen = [line for line in lines if line["validation"]]
    right.plot([line["step"] for line in seen], [line["validation"]["nll"] for line in seen], "o-")  # type: ignore[index]
    right.set(xlabel="step", title="validation NLL, nats")
    with whole(run.folder / "progress.png") as part:
        figure.savefig(part, dpi=120, format="png")


def draw_samples(run: Run) -> None:
    """Write a grid of cells drawn by the raw weights (top rows) and their running mean."""
    rows = [draw_row(run.denoiser(which), run) for which in ("raw", "raw", "ema", "ema")]
    folder = run.folder / "samples"
    folder.mkdir(exist_ok=True)
    with whole(folder / f"{run.step:06}.png") as part:
        Image.fromarray(np.concatenate(rows)).save(part, "PNG")


def draw_row(denoiser: nn.Module, run: Run) -> np.ndarray:
    """One cell of every class, side by side, (size, classes * size, 3)."""
    size, count, space = run.settings.preprocess.size, len(run.data.classes), run.learner.space
    generator = torch.Generator().manual_seed(run.settings.seed)
    noise = torch.randn((count, *space.shape(size)), generator=generator)
    labels = torch.arange(count)
    device = next(denoiser.parameters()).device
    guess = guided(denoiser, labels.to(device), count)
    levels = karras_sigmas(SAMPLER_STEPS, *run.learner.sigmas).to(device)
    *_, drawn = sample(guess, noise.to(device), levels)
    drawn = space.decode(drawn)
    return np.concatenate(list(to_pixels(drawn.cpu()).transpose(0, 2, 3, 1)), axis=1)
