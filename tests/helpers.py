"""Small builders: coloured discs for cells, the command line in this process, one tiny trained model."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("eosinophil", "lymphocyte", "neutrophil")
COLOURS = {"eosinophil": (200, 80, 70), "lymphocyte": (70, 60, 180), "neutrophil": (70, 150, 90)}
BUDGETS = {  # of every calibrated model
    "fast", "balanced", "full", "race", "paper",
    "fast-abroad", "balanced-abroad", "full-abroad",
}  # fmt: skip
TINY = (
    "--preset=tiny", "--device=cpu", "--set=steps=40", "--set=batch=16",
    "--set=preprocess.size=16", "--set=preprocess.crop=1.0", "--set=network.unshuffle=2",
)  # fmt: skip


def disc(name: str, seed: int, size: int = 32) -> np.ndarray:
    """A noisy disc in the colour of its class on a pale ground, uint8 (size, size, 3)."""
    rng = np.random.default_rng([seed, CLASSES.index(name)])
    y, x = np.mgrid[:size, :size] - size / 2 - rng.normal(size=(2, 1, 1)) * size / 20
    inside = np.hypot(x, y) < size * rng.uniform(0.22, 0.32)
    clean = np.where(inside[..., None], COLOURS[name], 225)
    return (clean + rng.normal(0, 8, clean.shape)).clip(0, 255).astype(np.uint8)


def write_discs(folder: Path, each: int, first: int = 0, size: int = 32) -> Path:
    """FOLDER/class/00.png, ...: `each` discs of every class."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + each):
            Image.fromarray(disc(name, i, size)).save(folder / name / f"{i:02}.png")
    return folder


@dataclass(frozen=True)
class Result:
    """What one command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def complaint(self) -> str:
        """The line with the error, with or without --json; there must be one, and it is the last."""
        lines = self.err.strip().splitlines()
        found = [line for line in lines if line.startswith(("Error: ", '{"error": '))]
        assert found == lines[-1:], self.err
        return (
            found[0] if found[0].startswith("Error") else f"Error: {json.loads(found[0])['error']}"
        )


def cli(*words: object) -> Result:
    """Run `cytodiffusion WORDS` in this process: no second import of torch. A bug raises."""
    from cytodiffusion.cli.main import run

    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["cytodiffusion", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return Result(code, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Tiny:
    """Three classes of discs and a model trained on them by the command `train`."""

    cells: Path
    run: Path
    said: Result

    @property
    def bundle(self) -> Path:
        return self.run / "bundle"

    def copy(self, folder: Path) -> Path:
        """A copy of the bundle, to be spoilt."""
        return Path(shutil.copytree(self.bundle, folder))


@cache
def tiny_model(base: Path) -> Tiny:
    """Trained once for each session; `base` is pytest's base folder."""
    cells = write_discs(base / "tiny" / "cells", each=24)
    said = cli("train", cells, "-o", base / "tiny" / "run", *TINY, "--json")
    assert said.code == 0, said.err
    return Tiny(cells, base / "tiny" / "run", said)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
