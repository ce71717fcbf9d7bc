"""Shapes and types are checked while tests run; one torch thread; the real cells, where there are some."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

checked = beartype(
    conf=BeartypeConf(is_pep484_tower=True)
)  # an int will do for a float, as in mypy

# Before anything imports the package: every annotation is checked at run time, in tests only.
install_import_hook("cytodiffusion", f"{__name__}.checked")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
os.environ["CYTODIFFUSION_ENGINE"] = "torch"  # the reference; tests/test_engines.py has the others


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test that forgets to hand in a generator still gives the same result every time."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real image sets: CYTODIFFUSION_DATA, or shared/data beside the checkout."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    root = Path(os.environ.get("CYTODIFFUSION_DATA") or beside)
    if not root.is_dir():
        pytest.skip(
            f"no real cells at {root}; set CYTODIFFUSION_DATA to the folder that holds pbc/"
        )
    return root


@pytest.fixture(scope="session")
def split_file(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real cells of `val`: 6 of each class to train on, 2 to test on."""
    path = data_root / "pbc" / "splits.csv"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with path.open(newline="") as file:
        listed = [each for each in csv.DictReader(file) if each["split"] == "val"]
    lines = ["path,label,split"]
    for name in sorted({each["label"] for each in listed}):
        chosen = [each["path"] for each in listed if each["label"] == name][:8]
        parts = ["train"] * 6 + ["test"] * 2
        lines += [f"{each},{name},{part}" for each, part in zip(chosen, parts, strict=True)]
    small = tmp_path_factory.mktemp("splits") / "splits.csv"
    small.write_text("\n".join(lines) + "\n")
    return small
