"""Does a model notice, under another microscope, what no one should name?

    python recipes/strangers_abroad.py DATA/raabin DATA/bccd -m pbc8-far

Every second cell of each set, or those of a split (--splits, --split), is read as `predict` reads the set,
by the budget it then takes: as it is, and damaged in five ways (evaluate/corruptions.py) before its light
is brought to that of training. Prints the share flagged `anomalous`, its 95 % interval, and the AUROC of
strangeness, damaged cells against whole ones. No label is used.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from cytodiffusion.bundle import Model, load
from cytodiffusion.classify.classifier import Reading
from cytodiffusion.cli.console import Console, cores
from cytodiffusion.data.images import to_tensor
from cytodiffusion.data.look import matched
from cytodiffusion.data.match import Fit, fit_frames
from cytodiffusion.data.pixels import load_pixels
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.data.sample import Sample
from cytodiffusion.evaluate.corruptions import CORRUPTIONS, corrupted
from cytodiffusion.evaluate.intervals import binomial_interval
from cytodiffusion.release import commit

MARGIN = 1.5  # of the canvases on which cells are damaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("-m", "--model", default="pbc8-far")
    parser.add_argument("--budget", default="balanced")
    parser.add_argument("--match", default="auto", help="as of predict")
    parser.add_argument("--splits", type=Path, help="CSV with path,label,split, of one set")
    parser.add_argument("--split", help="which split")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    console, model = Console(as_json=False), load(args.model)
    for folder in args.data:
        every = sorted(read_dataset(folder), key=lambda sample: sample.name)
        fit = fit_frames(every, model.preprocess, args.match)
        chosen = every[::2]
        if args.splits:
            chosen = list(read_dataset(folder, splits=args.splits, split=args.split))
        found = strangers(model, chosen, fit, args.budget, args.seed, console)
        print(json.dumps({"set": folder.name, "model": model.name, "commit": commit(), **found}))


def strangers(
    model: Model, samples: list[Sample], fit: Fit, budget: str, seed: int, console: Console
) -> dict[str, object]:
    """What is flagged of these cells, whole and damaged: share and its 95 % interval."""
    name = model.classifier.abroad(budget) if fit.abroad else budget
    some = [replace(sample, label=None) for sample in samples]
    light = fit.light or model.preprocess.match == "light"
    preprocess = model.fitted(fit.crop).model_copy(update={"match": "nothing"})
    reading = load_pixels(some, model.classes.names, preprocess, MARGIN, cores(), model.taxonomy)
    cells = console.follow(reading, "reading", len(some), "images")
    told = {"whole": _read(model, _shown(model, cells.images, light), cells.digests, name)}
    for kind in CORRUPTIONS:
        harmed = corrupted(kind, cells.images, cells.digests, cells.images.shape[-1], seed)
        told[kind] = _read(model, _shown(model, harmed, light), cells.digests, name)
    whole = told["whole"].anomaly
    count, truth = len(whole), np.repeat([0, 1], len(whole))
    flagged = {kind: reading.flags.count("anomalous") for kind, reading in told.items()}
    return {
        "budget": name,
        "cells": count,
        "flagged": {kind: [k / count, *binomial_interval(k, count)] for kind, k in flagged.items()},
        "auroc": {
            kind: float(roc_auc_score(truth, np.append(whole, told[kind].anomaly)))
            for kind in CORRUPTIONS
        },
    }


def _shown(model: Model, canvases: np.ndarray, light: bool) -> np.ndarray:
    """The centre of each canvas, in the light of training where `predict` would bring it there."""
    match, size = "light" if light else model.preprocess.match, model.preprocess.size
    start = (canvases.shape[-1] - size) // 2
    found = []
    for canvas in canvases:
        image = matched(
            Image.fromarray(canvas.transpose(1, 2, 0)), match, model.preprocess.look, None
        )
        found.append(
            np.asarray(image).transpose(2, 0, 1)[:, start : start + size, start : start + size]
        )
    return np.stack(found)


def _read(model: Model, images: np.ndarray, digests: list[str], budget: str) -> Reading:
    table = model.classifier.measure(to_tensor(np.ascontiguousarray(images)), digests, budget)
    return model.classifier.read(table, budget)


if __name__ == "__main__":
    main()
