"""Which compact network? Variants of one recipe, each trained for the same processor time.

    python recipes/compact_choices.py DATA/pbc -o runs/choices --minutes 4

Every variant starts from scratch on the train split and is measured on the same cells of val: 80 of
each class, six frozen trials from sigma 0.05 to 4, weights learned without the cell (five folds).
One core, processor time of the training loop alone; results.json and results.md grow by a line a
variant, and a variant that is there is not run again. docs/log.md has the outcome.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from torch import nn

from cytodiffusion.classify.calibrate import out_of_fold, scores
from cytodiffusion.classify.draws import stratified
from cytodiffusion.classify.evidence import DenoiserMeter
from cytodiffusion.classify.fit import balanced_subset
from cytodiffusion.classify.measure import Measurement
from cytodiffusion.data.images import to_tensor
from cytodiffusion.data.pixels import Pixels, class_names, load_pixels
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.data.transforms import POSES
from cytodiffusion.networks import compact as network
from cytodiffusion.networks.compact import CompactSettings, Trunk
from cytodiffusion.train import compact, loop
from cytodiffusion.train.settings import TrainSettings, make_settings

SEED = 0
VARIANTS: dict[str, list[str]] = {
    "heads + classification term": [],
    "AdamW for all weights (released)": ["optimizer=adamw"],
    "heads, no classification term": ["classification=0"],
    "class-conditional": ["network.form=conditional"],
    "whole frame instead of the centre 55 %": ["preprocess.crop=1.0"],
    "32 px, unshuffle 2": ["preprocess.size=32", "network.unshuffle=2"],
    "96 px, unshuffle 4": ["preprocess.size=96"],
    "trunk: diffusers UNet2DModel": [],
}


class DiffusersTrunk(nn.Module):
    """diffusers' UNet2DModel in the place of our trunk, at the same widths."""

    def __init__(self, settings: CompactSettings, embedding: int) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        widths = tuple(settings.width * m for m in settings.multipliers)
        sides = [settings.grid // 2**level for level in range(len(widths))]
        attend = [side <= settings.attention for side in sides]
        self.unet = UNet2DModel(
            sample_size=settings.grid,
            in_channels=settings.width,
            out_channels=settings.width,
            layers_per_block=settings.blocks,
            block_out_channels=widths,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attend),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attend)),
            attention_head_dim=32,
            norm_num_groups=settings.width // 16,
            dropout=settings.dropout,
        )
        self.time = nn.Linear(embedding, 1)  # the embedding of ln sigma, as a time of its own

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        return self.unet(x, 100 * self.time(embedding)[:, 0]).sample


def load(root: Path, split: str, settings: TrainSettings, margin: float) -> tuple[Pixels, tuple]:
    """Pixels of one split, and the classes."""
    samples = read_dataset(root, splits=root / "splits.csv", split=split)
    classes = class_names(samples)
    work = load_pixels(samples, classes, settings.preprocess, margin)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value, classes


def run_variant(root: Path, name: str, minutes: float, folder: Path) -> dict[str, object]:
    """Train one variant for `minutes` of processor time and measure it."""
    settings = make_settings("cpu", [*VARIANTS[name], "cooldown=0", f"seed={SEED}"])
    fitted, classes = load(root, "train", settings, settings.augmentation.margin)
    held, _ = load(root, "val", settings, 1.0)
    data = loop.TrainingSet(fitted.images, fitted.labels, classes)
    shutil.rmtree(folder, ignore_errors=True)  # of a variant that was cut: it gets its minutes anew
    run = loop.Run(folder / "run", settings, data, "cpu")
    began = time.process_time()
    for _ in loop.train(run, report_every=5):
        if time.process_time() - began > 60 * minutes:
            break
    rows = balanced_subset(held.labels, 80 * len(classes), SEED)
    images, truth = to_tensor(held.images[rows]), held.labels[rows]
    digests = [held.digests[i] for i in rows]
    together = settings.network.form == "heads"
    draws = stratified(6, 0.05, 4.0, frozen=True)
    began = time.process_time()
    measurement = Measurement(draws, len(classes) + 1, POSES, together=together)
    errors = measurement.measure(DenoiserMeter(run.denoiser("ema")), images, digests)[:, :, :-1]
    spent = time.process_time() - began
    single = [(errors[:, t].argmin(1) == truth).mean() for t in range(len(draws))]
    return {
        "variant": name,
        "changes": VARIANTS[name],
        "steps": run.step,
        "parameters": sum(weight.numel() for weight in run.learner.parameters()),
        "milliseconds_per_trial": round(1000 * spent / len(truth) / len(draws), 2),
        "best_single_trial": float(max(single)),
        **scores(out_of_fold(errors, truth), truth),
        "cells": len(truth),
        "minutes": minutes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/choices"))
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--only", default="", help="variants whose names have this in them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    done = json.loads(path.read_text()) if path.exists() else []
    ours = compact.CompactNetwork
    for index, name in enumerate(VARIANTS):
        told = [result["variant"] for result in done if result["minutes"] == args.minutes]
        if name in told or args.only not in name:
            continue
        compact.CompactNetwork = swap_trunk if "UNet2DModel" in name else ours  # type: ignore[misc]
        done.append(run_variant(args.root, name, args.minutes, args.out / str(index)))
        path.write_text(json.dumps(done, indent=1) + "\n")
        print(json.dumps(done[-1]), flush=True)
    table = [
        "| variant | minutes | steps | ms a trial | best single trial | NLL | accuracy |",
        "|" + "---|" * 7,
    ]
    table += [
        f"| {r['variant']} | {r['minutes']:g} | {r['steps']} | {r['milliseconds_per_trial']} | "
        f"{r['best_single_trial']:.3f} | {r['nll']:.3f} | {r['accuracy']:.3f} |"
        for r in done
    ]
    (args.out / "results.md").write_text("\n".join(table) + "\n")


def swap_trunk(settings: CompactSettings) -> nn.Module:
    """Our network with diffusers' U-Net as its trunk."""
    network.Trunk = DiffusersTrunk  # type: ignore[misc,assignment]
    try:
        return network.CompactNetwork(settings)
    finally:
        network.Trunk = Trunk  # type: ignore[misc]


if __name__ == "__main__":
    main()
