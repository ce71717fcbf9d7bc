"""A model as an ONNX graph, with inputs and the errors they must give, for programs without torch."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cytodiffusion.engines.engine import (
    LEVELS,
    NEEDS,
    ROWS,
    TOLERANCES,
    apart,
    check_difference,
    run_onnxruntime,
)
from cytodiffusion.engines.graph import OPSET, ErrorNetwork, need, noisy_rows, onnx_graph
from cytodiffusion.errors import OutputError
from cytodiffusion.types import Denoiser

README = """# {name}: the errors of every class, as an ONNX graph

Research use only. Not a medical device; not for diagnosis.

`model.onnx` (opset {opset}, any number of rows) tells how far each class's guess of a cell is from the
cell, given the cell with noise on it. The smallest error explains the cell best; one error says
little, so average them over noises and noise levels (see calibration.json of the bundle).

| input | shape | meaning |
|---|---|---|
| `clean` | rows x 3 x {size} x {size}, float32 | the image, RGB: 8-bit value / 127.5 - 1 |
| `noise` | rows x 3 x {size} x {size}, float32 | standard normal; the graph adds sigma x noise |
| `sigma` | rows, float32 | noise level, in units of the image; above 0 |
{label}
| output | shape | meaning |
|---|---|---|
| `errors` | rows x {columns}, float32 | mean squared errors, squared image units; lower is better |
| `features` | rows x {width}, float32 | what the guesses are made from, mean over the grid |

{order}

Preprocessing: {preprocessing}, resized to {size} x {size} px.

`test_vectors.npz` has inputs under the names above, the outputs they must give, and the `tolerance`: the
largest difference allowed, relative to the error, or to the largest feature.

Licence of the model: {license}. Data it was trained on: {data_license}.
"""
LABEL = "| `label` | rows, int64 | the class asked about |\n"


@dataclass(frozen=True)
class About:
    """What an exported graph's README says of the model."""

    name: str
    classes: tuple[str, ...]
    preprocessing: str  # what is done with a frame before it is resized
    license: str
    data_license: str


def export(
    folder: Path, denoiser: Denoiser, images: Float[Tensor, "m c h w"], about: About
) -> float:
    """Write FOLDER/model.onnx, test_vectors.npz and README.md, whole or not at all.

    Returns the largest difference between ONNX Runtime and torch on the test vectors, relative to
    torch. Raises MissingExtra without onnx, ModelError where they disagree, OutputError where the
    folder has other files in it or cannot be written.
    """
    folder = folder.resolve()
    names = {"model.onnx", "test_vectors.npz", "README.md"}
    if folder.exists() and not (folder.is_dir() and names >= {p.name for p in folder.iterdir()}):
        raise OutputError(f"{folder} has other files in it. Choose a new folder.")
    library = [need(module) for module in NEEDS["onnxruntime"]][-1]
    network = copy.deepcopy(ErrorNetwork(denoiser)).eval().requires_grad_(False)
    graph, rows = onnx_graph(network), noisy_rows(images, ROWS, *LEVELS, network)
    with torch.inference_mode():
        wanted = network(*rows)
        found = run_onnxruntime(library, graph, network)(*rows)
    worst = check_difference("onnxruntime", apart(found, wanted))
    vectors = dict(zip(network.inputs, rows, strict=True))
    vectors |= dict(zip(("errors", "features"), wanted, strict=True))
    part = folder.with_name(folder.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        (part / "model.onnx").write_bytes(graph)
        arrays: dict[str, Any] = {name: value.numpy() for name, value in vectors.items()}
        np.savez(part / "test_vectors.npz", **arrays, tolerance=TOLERANCES["onnxruntime"])
        (part / "README.md").write_text(_readme(network, about))
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OutputError(
            f"The graph cannot be written to {folder} ({error}). Free some space or choose another "
            "folder."
        ) from error
    return worst


def _readme(network: ErrorNetwork, about: About) -> str:
    listed = ", ".join(f"{i} {name}" for i, name in enumerate((*about.classes, "any cell")))
    return README.format(
        name=about.name, opset=OPSET, size=network.network.settings.size,
        preprocessing=about.preprocessing,
        label="" if network.heads else LABEL, columns=len(about.classes) + 1 if network.heads else 1,
        width=network.network.settings.width,
        order=f"{'Columns' if network.heads else 'Labels'}: {listed}.",
        license=about.license, data_license=about.data_license,
    )  # fmt: skip
