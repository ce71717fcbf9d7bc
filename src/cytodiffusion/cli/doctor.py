"""`doctor`: what is wrong with this installation, and what to do about it."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import typer

from cytodiffusion.cli.console import Console, Device, Json, Seed, pick_device


class Finding(NamedTuple):
    """One check."""

    what: str
    good: bool
    told: str
    advice: str = ""


def doctor(json: Json = False, seed: Seed = 0, device: Device = "auto") -> None:
    """Check Python, the libraries, the device and the shipped models."""
    found = [_python(), *_libraries(), _torchvision(), _device(device), _engine()]
    found += _models(device)
    lines = [f"{'ok ' if f.good else 'BAD'}  {f.what}: {f.told}" for f in found]
    lines += [f"     -> {f.advice}" for f in found if not f.good]
    values = {f.what: {"good": f.good, "told": f.told, "advice": f.advice} for f in found}
    Console(json).result(values, "\n".join(lines))
    if not all(f.good for f in found):
        raise typer.Exit(2)


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding("Python", good, sys.version.split()[0], "Install Python 3.11 or later.")


def _libraries() -> list[Finding]:
    names = ["torch", "numpy", "pillow", "pyarrow", "safetensors", "scikit-learn", "accelerate"]
    findings = []
    for name in names:
        try:
            findings.append(Finding(name, True, version(name)))
        except PackageNotFoundError:
            advice = f"pip install '{name}', or make the environment anew with `make`."
            findings.append(Finding(name, False, "not installed", advice))
    return findings


def _torchvision() -> Finding:
    """Its PyPI build does not match the CPU torch, and its presence breaks diffusers."""
    try:
        told = version("torchvision")
    except PackageNotFoundError:
        return Finding("torchvision", True, "not installed, as it should be")
    import importlib

    try:
        importlib.import_module("torchvision")
    except Exception as error:
        advice = (
            "pip uninstall torchvision: CytoDiffusion does not use it, and it breaks diffusers."
        )
        return Finding("torchvision", False, f"{told} does not import ({error})", advice)
    return Finding("torchvision", True, f"{told}, not used by CytoDiffusion")


def _device(asked: str) -> Finding:
    import torch

    from cytodiffusion.cli.console import cores
    from cytodiffusion.errors import SettingsError

    try:
        pick_device(asked)
    except SettingsError as error:
        return Finding("device", False, str(error), "Take another --device, or install its driver.")
    told = f"cpu with {cores()} cores"
    if torch.cuda.is_available():
        told += f"; cuda: {torch.cuda.get_device_name()}"
    return Finding("device", True, told)


def _engine() -> Finding:
    from cytodiffusion.engines.engine import best_engine

    name = best_engine()
    quicker = " (pip install 'cytodiffusion[onnx]' for a quicker one)" if name == "torch" else ""
    return Finding("engine on the processor", True, name + quicker)


def _models(device: str) -> list[Finding]:
    from cytodiffusion.bundle import shipped, verify
    from cytodiffusion.errors import ModelError, SettingsError

    findings = []
    for name in shipped():
        try:
            told = f"test vectors agree to {verify(name, pick_device(device)):.1e}"
            findings.append(Finding(f"model {name}", True, told))
        except (ModelError, SettingsError) as error:
            findings.append(
                Finding(f"model {name}", False, str(error), "Install the package anew.")
            )
    return findings or [Finding("models", False, "none shipped", "Install the package anew.")]
