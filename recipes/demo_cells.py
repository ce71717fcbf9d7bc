"""Draw the synthetic cells that `cytodiffusion demo` names.

    python recipes/demo_cells.py -m pbc8 -o src/cytodiffusion/demo

Each cell is drawn by the model in MODEL with guidance, from a seed of its own, and marked as
synthetic. manifest.csv names the class that was asked for.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path

import torch

from cytodiffusion.bundle import load
from cytodiffusion.classify.draws import standard_normal
from cytodiffusion.data.images import to_pixels
from cytodiffusion.data.mark import Mark, marked_png
from cytodiffusion.diffusion.noise import karras_sigmas
from cytodiffusion.diffusion.sample import guided, sample

STEPS, SIGMA_MAX = 32, 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", default="pbc8")
    parser.add_argument("-o", "--out", type=Path, default=Path("src/cytodiffusion/demo"))
    parser.add_argument("--per-class", type=int, default=6)
    parser.add_argument("--guidance", type=float, default=1.0)
    args = parser.parse_args()
    model = load(args.model)
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    size, rows = model.preprocess.size, []
    weights = model.weights_sha256
    for column, name in enumerate(model.classes):
        seeds = range(1000 * column, 1000 * column + args.per_class)
        noise = torch.stack([standard_normal((3, size, size), seed, "demo", 0) for seed in seeds])
        labels = torch.full((len(noise),), column)
        guess = guided(model.denoiser, labels, model.classes.any, args.guidance)
        *_, drawn = sample(guess, noise, karras_sigmas(STEPS, sigma_max=SIGMA_MAX))
        for seed, pixels in zip(seeds, to_pixels(drawn), strict=True):
            file = f"{name}_{seed:04}.png"
            mark = Mark(model.name, weights, seed, name)
            (args.out / file).write_bytes(marked_png(pixels, mark))
            rows.append({"path": file, "label": name})
    with (args.out / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"Drew {len(rows)} cells into {args.out}.")


if __name__ == "__main__":
    main()
