"""Measure by how much a model misjudges noise, on held-out cells, for what it draws.

    python recipes/drawing.py DATA/pbc -m pbc8 --splits DATA/pbc/splits.csv

Writes drawing.json into the bundle, and its checksum (src/cytodiffusion/diffusion/gain.py says what it
is). The split `val` is used: test cells take no part.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from cytodiffusion.bundle import load
from cytodiffusion.cli.console import Console, cores
from cytodiffusion.data.images import to_tensor
from cytodiffusion.data.pixels import load_pixels
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.diffusion.gain import LEVELS, fit_gain
from cytodiffusion.synthesis import save_gain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("-m", "--model", default="pbc8")
    parser.add_argument("--splits", type=Path)
    parser.add_argument("--cells", type=int, default=320, help="at most so many")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console = Console(as_json=False)
    model = load(args.model, engine="torch")
    samples = read_dataset(args.data, splits=args.splits, split="val")
    samples = [sample for sample in samples if sample.label is not None]
    chosen = samples[:: -(-len(samples) // args.cells)]
    reading = load_pixels(chosen, model.classes.names, model.preprocess, workers=cores())
    pixels = console.follow(reading, "reading", len(chosen), "images")
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = to_tensor(pixels.images), torch.from_numpy(pixels.labels)
    work = fit_gain(model.denoiser, images, labels, generator)
    gain = console.follow(work, "measuring", len(LEVELS), "noise levels")
    save_gain(model.folder, gain)
    console.note(
        f"{len(images)} cells of {pixels.sha256[:12]}; wrote {model.folder / 'drawing.json'}."
    )


if __name__ == "__main__":
    main()
