"""Shapes and types are checked while tests run; one torch thread; the real cells, where there are some."""

from __future__ import annotations

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
