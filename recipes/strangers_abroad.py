"""Does a model notice, under another microscope, what no one should name?

    python recipes/strangers_abroad.py DATA/raabin DATA/bccd -m pbc8-far

Every second cell of each set is read as `predict` reads the set, by the budget it then takes: as it is, and
damaged in five ways (evaluate/corruptions.py). Prints how many are flagged `anomalous`, and the AUROC of
strangeness, damaged cells against whole ones. No label is used.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from cytodiffusion.bundle import Model, load
from cytodiffusion.classify.classifier import Reading
from cytodiffusion.cli.console import Console, cores
from cytodiffusion.data.images import to_tensor
from cytodiffusion.data.match import fit_frames
from cytodiffusion.data.pixels import load_pixels
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.evaluate.corruptions import CORRUPTIONS, corrupted
from cytodiffusion.release import commit

MARGIN = 1.5  # of the canvases on which cells are damaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("-m", "--model", default="pbc8-far")
    parser.add_argument("--budget", default="balanced")
    parser.add_argument("--match", default="auto", help="as of predict")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    console, model = Console(as_json=False), load(args.model)
    for folder in args.data:
        found = strangers(model, folder, args.budget, args.match, args.seed, console)
        print(json.dumps({"set": folder.name, "model": model.name, "commit": commit(), **found}))


def strangers(
    model: Model, folder: Path, budget: str, match: str, seed: int, console: Console
) -> dict[str, object]:
    """What is flagged of one set, whole and damaged."""
    samples = sorted(read_dataset(folder), key=lambda sample: sample.name)
    fit = fit_frames(samples, model.preprocess, match)
    preprocess, name = model.fitted(fit.crop, fit.light), budget
    if fit.abroad:
        name = model.classifier.abroad(budget)
    some = samples[::2]
    reading = load_pixels(some, model.classes.names, preprocess, MARGIN, cores(), model.taxonomy)
    cells = console.follow(reading, f"reading {folder.name}", len(some), "images")
    size = preprocess.size
    start = (cells.images.shape[-1] - size) // 2
    shown = {"whole": cells.images[:, :, start : start + size, start : start + size]}
    for kind in CORRUPTIONS:
        shown[kind] = corrupted(kind, cells.images, cells.digests, size, seed)
    told = {kind: _read(model, images, cells.digests, name) for kind, images in shown.items()}
    whole = told["whole"].anomaly
    truth = np.repeat([0, 1], len(whole))
    return {
        "budget": name,
        "cells": len(whole),
        "flagged": {
            k: round(float(np.mean(np.array(r.flags) == "anomalous")), 3) for k, r in told.items()
        },
        "auroc": {
            kind: round(float(roc_auc_score(truth, np.append(whole, told[kind].anomaly))), 3)
            for kind in CORRUPTIONS
        },
    }


def _read(model: Model, images: np.ndarray, digests: list[str], budget: str) -> Reading:
    table = model.classifier.measure(to_tensor(np.ascontiguousarray(images)), digests, budget)
    return model.classifier.read(table, budget)


if __name__ == "__main__":
    main()
