"""Draw docs/picture.png from the shipped model and one of its synthetic cells.

python docs/make_picture.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from cytodiffusion.bundle import ZOO, load
from cytodiffusion.classify.draws import standard_normal
from cytodiffusion.data.images import to_pixels

CELL = "eosinophil_1003.png"
SIGMA = 0.6
BLUE, GREY = "#2166ac", "#9a9a9a"


def main() -> None:
    model = load("pbc8")
    clean, _ = model.prepare((ZOO.parent / "demo" / CELL).read_bytes(), crop=1.0)
    noisy = clean + SIGMA * standard_normal(tuple(clean.shape), 0, "picture", 0)
    labels = torch.arange(len(model.classes))[None]
    guesses = model.denoiser(noisy[None], torch.tensor([SIGMA]), labels)[0]
    errors = (guesses - clean).square().mean((1, 2, 3)).numpy()
    answer = model.read([ZOO.parent / "demo" / CELL], crop=1.0).answers()[0]

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    grid = figure.add_gridspec(2, 6)
    show(figure.add_subplot(grid[:, 0]), clean, "a cell (synthetic)")
    show(figure.add_subplot(grid[:, 1]), noisy, f"under noise, sigma {SIGMA}")
    order = np.argsort(errors)[[0, 1, 2, -1]]
    for place, k in enumerate(order):
        axes = figure.add_subplot(grid[place // 2, 2 + place % 2])
        axes.imshow(
            (guesses[k] - guesses.mean(0)).mean(0).numpy(), cmap="RdBu_r", vmin=-0.3, vmax=0.3
        )
        axes.set_title(model.classes.names[k].replace("_", " "), fontsize=8)
        axes.set_axis_off()
    bars = figure.add_subplot(grid[:, 4:])
    rank = np.argsort(errors)[::-1]
    bars.barh(range(len(rank)), 1000 * (errors[rank] - errors.min()),
              color=[BLUE if k == errors.argmin() else GREY for k in rank])  # fmt: skip
    bars.set_yticks(range(len(rank)), [model.classes.names[k].replace("_", " ") for k in rank])
    bars.set_title(
        f"error above the least (x 1000), one pass\nafter {answer.trials}: {answer.predicted}, "
        f"p = {answer.confidence:.3f}", fontsize=9,
    )  # fmt: skip
    bars.spines[["top", "right"]].set_visible(False)
    figure.text(0.43, 0.99, "how each class's guess departs from the mean guess", ha="center",
                va="bottom", fontsize=9)  # fmt: skip
    figure.savefig(Path(__file__).with_name("picture.png"), dpi=110, bbox_inches="tight")


def show(axes, image: torch.Tensor, title: str) -> None:  # type: ignore[no-untyped-def]
    """One image with a title."""
    axes.imshow(to_pixels(image).transpose(1, 2, 0))
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


if __name__ == "__main__":
    main()
