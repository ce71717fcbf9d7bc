"""How much quicker is each engine, and what does it change?

    python recipes/bench_engines.py -m pbc8 -o runs/engines
    python recipes/bench_engines.py -m pbc8 -o runs/engines --data DATA/pbc --cells 400

Every installed engine measures the same rows. Engines take turns, batch by batch, so that whatever
else the machine does hits all alike; what counts is the ratio to torch and the median over the turns.
One thread: processor time of the whole process, which other work on the machine does not enter. Two
threads: wall-clock time. With --data, --cells val cells are named with each engine: accuracy, the
share whose name differs from torch's, and the largest change of a probability.

OUT/results.json and OUT/results.md; docs/log.md has the outcome.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cytodiffusion.bundle import Model, load
from cytodiffusion.classify.evidence import DenoiserMeter, Meter
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.engines.engine import ROWS, TOLERANCES, installed, make_engine
from cytodiffusion.engines.graph import ErrorNetwork, noisy_rows
from cytodiffusion.errors import CytoDiffusionError

SEED = 0
DEMO = Path(__file__).parents[1] / "src" / "cytodiffusion" / "demo"


def demo_cells(model: Model) -> Tensor:
    """The shipped synthetic cells: they set the ranges of the 8-bit engines."""
    return torch.stack([model.prepare(path.read_bytes())[0] for path in sorted(DEMO.glob("*.png"))])


def start_engines(model: Model, names: list[str], images: Tensor) -> dict[str, tuple[Meter, float]]:
    """Engines that run here, with the seconds that each took to start."""
    found: dict[str, tuple[Meter, float]] = {}
    for name in names:
        began = time.perf_counter()
        try:
            meter = make_engine(name, model.denoiser, images=images, workers=2)
        except CytoDiffusionError as error:
            print(f"{name}: {error}")
            continue
        found[name] = meter, time.perf_counter() - began
    return found


def inputs(model: Model, images: Tensor, batches: int) -> list[list[Tensor]]:
    """Batches of rows at noise levels from 0.05 to 5, with all labels."""
    network = ErrorNetwork(model.denoiser)
    clean, noise, sigma = noisy_rows(images, ROWS * batches, 0.05, 5.0, network)[:3]
    labels = torch.arange(len(model.classes) + 1).expand(len(clean), -1)
    return [
        list(rows)
        for rows in zip(*(t.split(ROWS) for t in (clean, noise, sigma, labels)), strict=True)
    ]


@torch.inference_mode()
def measure_speed(
    engines: dict[str, tuple[Meter, float]], batches: list[list[Tensor]], repeats: int
) -> dict[str, dict[str, float]]:
    """Rows a second on one thread (processor time) and on two (wall-clock), medians over the turns."""
    one: dict[str, list[float]] = {name: [] for name in engines}
    two: dict[str, list[float]] = {name: [] for name in engines}
    with ThreadPoolExecutor(2) as pool:
        for turn in range(repeats + 1):  # the first warms up
            for name, (meter, _) in engines.items():
                batch = batches[turn % len(batches)]
                began = time.process_time()
                meter(*batch)
                spent = time.process_time() - began
                began = time.perf_counter()
                list(pool.map(lambda _, m=meter, b=batch: m(*b), range(2)))
                both = time.perf_counter() - began
                if turn:
                    one[name].append(ROWS / spent)
                    two[name].append(2 * ROWS / both)
    speed = {
        name: {"one_thread": median(one[name]), "two_threads": median(two[name])}
        for name in engines
    }
    for name, found in speed.items():
        for kind, rates in (("one_thread", one), ("two_threads", two)):
            ratios = [a / b for a, b in zip(rates[name], rates["torch"], strict=True)]
            found[f"{kind}_ratio"] = median(ratios)
    return speed


@torch.inference_mode()
def measure_change(meter: Meter, model: Model, batches: list[list[Tensor]]) -> dict[str, float]:
    """Relative difference of the errors from torch's; and of what tells the classes apart."""
    wanted = torch.cat([DenoiserMeter(model.denoiser)(*batch) for batch in batches])
    found = torch.cat([meter(*batch) for batch in batches])
    relative = (found / wanted - 1).abs()
    apart = [errors[:, :-1] - errors[:, :-1].mean(1, keepdim=True) for errors in (found, wanted)]
    noise = (apart[0] - apart[1]).square().mean(1) / apart[1].square().mean(1)
    return {
        "largest_difference": float(relative.max()),
        "mean_difference": float(relative.mean()),
        "contrast_difference": float(noise.sqrt().median()),
    }


def measure_accuracy(
    engines: dict[str, tuple[Meter, float]], model: Model, root: Path, cells: int, budget: str
) -> dict[str, dict[str, float]]:
    """Names of the same val cells by every engine."""
    samples = read_dataset(root, splits=root / "splits.csv", split="val")
    some = np.random.default_rng(SEED).permutation(len(samples))[:cells]
    truth = np.array([model.classes.index(str(samples[i].label)) for i in some])
    prepared = [model.prepare(samples[i].read()) for i in some]
    images, digests = torch.stack([x for x, _ in prepared]), [sha for _, sha in prepared]
    found: dict[str, np.ndarray] = {}
    for name, (meter, _) in engines.items():
        model.classifier.meter = meter
        table = model.classifier.measure(images, digests, budget)
        found[name] = model.classifier.read(table, budget).probabilities
    base = found["torch"]
    return {
        name: {
            "accuracy": float((p.argmax(1) == truth).mean()),
            "accuracy_change": float(
                (p.argmax(1) == truth).mean() - (base.argmax(1) == truth).mean()
            ),
            "renamed": float((p.argmax(1) != base.argmax(1)).mean()),
            "largest_probability_change": float(np.abs(p - base).max()),
        }
        for name, p in found.items()
    }


def table(results: dict[str, Any]) -> str:
    """The results as markdown."""
    named = "accuracy" in results["engines"]["torch"]
    head = ["engine", "start, s", "rows/s", "x torch", "rows/s, 2 threads", "x torch",
            "largest difference", "mean", "between classes"]  # fmt: skip
    head += ["accuracy", "change", "renamed", "largest change of a probability"] if named else []
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, e in results["engines"].items():
        row = [name, f"{e['start_seconds']:.1f}", f"{e['one_thread']:.0f}", f"{e['one_thread_ratio']:.2f}",
               f"{e['two_threads']:.0f}", f"{e['two_threads_ratio']:.2f}",
               *(f"{e[f'{key}_difference']:.1e}" for key in ("largest", "mean", "contrast"))]  # fmt: skip
        if named:
            row += [f"{e['accuracy']:.4f}", f"{e['accuracy_change']:+.4f}", f"{e['renamed']:.4f}",
                    f"{e['largest_probability_change']:.3f}"]  # fmt: skip
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-m", "--model", default="pbc8")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--engines", default=",".join(n for n in TOLERANCES if n != "compile"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--data", type=Path, help="a data set with splits.csv")
    parser.add_argument("--cells", type=int, default=400)
    parser.add_argument("--budget", default="balanced")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = load(asked.model)
    images = demo_cells(model)
    names = ["torch", *(n for n in asked.engines.split(",") if n != "torch" and installed(n))]
    engines = start_engines(model, names, images)
    batches = inputs(model, images, asked.batches)
    speed = measure_speed(engines, batches, asked.repeats)
    about: dict[str, Any] = {
        name: {"start_seconds": start} | speed[name] | measure_change(meter, model, batches)
        for name, (meter, start) in engines.items()
    }
    if asked.data:
        named = measure_accuracy(engines, model, asked.data, asked.cells, asked.budget)
        about = {name: about[name] | named[name] for name in about}
    results = {"model": model.name, "torch": torch.__version__, "machine": platform.machine(),
               "processors": os.cpu_count(), "rows": ROWS, "repeats": asked.repeats,
               "cells": asked.cells if asked.data else 0, "engines": about}  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (asked.out / "results.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
