"""The state of a run on disk: safetensors and JSON, whole or not there at all.

    RUN/checkpoint/<step>/{model,ema,optimizer}.safetensors, state.json

A checkpoint is written beside the old one, renamed into place and only then does the old one go, so
a run that is killed at any moment can go on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from cytodiffusion.errors import OutputError


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]
) -> None:
    """Write the checkpoint of `step` and remove older ones. Raises OutputError if it cannot."""
    part = folder / f"{step}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, values in tensors.items():
            plain = {key: value.detach().cpu().contiguous() for key, value in values.items()}
            save_file(plain, part / f"{name}.safetensors")
        (part / "state.json").write_text(json.dumps({"step": step, **state}))
        shutil.rmtree(folder / str(step), ignore_errors=True)
        part.replace(folder / str(step))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OutputError(
            f"The checkpoint cannot be written to {folder} ({error}). Free some "
            "space or choose another folder, and run again: training goes on from the last one."
        ) from error
    for old in folder.iterdir():
        number = old.name.removesuffix(".part")
        if number.isdigit() and int(number) < step:
            shutil.rmtree(old, ignore_errors=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    whole = [path for path in folder.glob("*") if path.name.isdigit()]
    return max(whole, key=lambda path: int(path.name), default=None)


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by file name, and the state."""
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return tensors, json.loads((path / "state.json").read_text())


def optimizer_tensors(optimizer: Optimizer, names: list[str]) -> dict[str, Tensor]:
    """State of an optimiser as 'parameter/quantity' -> tensor; `names` in its parameter order.

    Optimisers of 8 bits keep quantities in groups: 'parameter/group/quantity'.
    """
    found: dict[str, Tensor] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            group = {key: value}
            if isinstance(value, dict):  # parameters share some of these, a file may not
                group = {f"{key}/{n}": torch.as_tensor(v).clone() for n, v in value.items()}
            found |= {f"{names[index]}/{n}": torch.as_tensor(v) for n, v in group.items()}
    return found


def load_optimizer(optimizer: Optimizer, names: list[str], saved: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in saved.items():
        name, *groups, quantity = key.split("/")
        place = state.setdefault(names.index(name), {})
        for group in groups:
            place = place.setdefault(group, {})
        place[quantity] = value
    whole = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
