"""Measure once, save the errors, read the answers later: python examples/replay.py IMAGE...

An `ErrorTable` holds everything that is needed for the answers; the network is not asked again.
"""

import sys
import tempfile
from pathlib import Path

import torch

import cytodiffusion

model = cytodiffusion.load("pbc8")
paths = sys.argv[1:] or sorted(Path(cytodiffusion.__file__).parent.glob("demo/*.png"))[:8]
prepared = [model.prepare(Path(path).read_bytes(), crop=1.0) for path in paths]
images = torch.stack([image for image, _ in prepared])

table = model.classifier.measure(images, [sha for _, sha in prepared], budget="full")
with tempfile.TemporaryDirectory() as folder:
    table.save(Path(folder) / "errors.npz")
    again = cytodiffusion.ErrorTable.load(Path(folder) / "errors.npz")

for path, answer in zip(paths, model.classifier.read(again, budget="full").answers(), strict=True):
    print(Path(path).name, answer.predicted, f"{answer.confidence:.3f}", answer.flag)
