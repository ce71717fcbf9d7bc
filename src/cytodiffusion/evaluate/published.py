"""What others have published: the figures that ours are laid beside.

Of each it is said what it was measured on, and in which part of its source it stands. The paper's tables
for each set, its accuracies in domain and the parameters of its psychometric curves are not public, so
none is here; a claim without a public figure has `figure` None.

Source: Deltadahl et al. 2025, Deep Generative Classification of Blood Cell Morphology, Nature Machine
Intelligence 7(11), 1791-1803, arXiv 2408.08982; others where they are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Style = Literal["percent", "number", "short", "points"]

PAPER = "the paper"
TSUTSUI = "Tsutsui 2023, arXiv 2303.01777"


@dataclass(frozen=True)
class Figure:
    """A number, its 95 % interval where there is one, and whose it is.

    A `percent` and `points` (a difference of two) are shares in [0, 1].
    """

    value: float
    style: Style = "percent"
    ci95: Sequence[float] | None = None
    unit: str = ""
    of: str = ""


@dataclass(frozen=True)
class Published:
    """A claim and its figure; `rival` is that of the best method beside it in the same source."""

    measure: str
    on: str
    part: str  # of the source
    figure: Figure | None = None
    rival: Figure | None = None
    source: str = PAPER


BLASTS = "blasts held out, Bodzas set"
RAABIN = "trained on Raabin-WBC, tested on its Test-B and on LISC"

ANOMALY = Published(
    "AUROC", BLASTS, "anomaly detection", Figure(0.990, "number"), Figure(0.916, "number")
)
SENSITIVITY = Published(
    "sensitivity", BLASTS, "anomaly detection", Figure(0.905), Figure(0.281, of="ViT")
)
SPECIFICITY = Published("specificity", BLASTS, "anomaly detection", Figure(0.962))
SHIFT = Published("accuracy", RAABIN, "domain shift", Figure(0.854), Figure(0.738))
LOW_DATA = Published(
    "balanced accuracy", "PBC, few images a class", "low data", Figure(0.962), Figure(0.924)
)
EXPERTS = Published(
    "accuracy of ten experts who told real from drawn cells", "2,880 images",
    "synthetic cells", Figure(0.523, ci95=(0.505, 0.542)),
)  # fmt: skip
AS_ASKED = Published(
    "agreement of the experts' labels with the class asked for, about", "drawn cells",
    "synthetic cells", Figure(0.986),
)  # fmt: skip
SECONDS = Published(
    "time a cell", "a data-centre GPU", "cost, its main limitation",
    Figure(1.8, "short", unit="s"),
)  # fmt: skip
FEWEST = Published(
    "network passes a cell, at the least", "8 classes, 21 trials before the first check",
    "classification", Figure(168, "short"),
)  # fmt: skip
MOST = Published(
    "network passes a cell, at the most", "8 classes, 2,000 trials", "classification",
    Figure(16_000, "short"),
)  # fmt: skip
SURE = Published(
    "confidence follows a psychometric function and separates right from wrong better than experts do",
    "not public", "uncertainty",
)  # fmt: skip
MAPS = Published(
    "heat maps show what would have to change for the cell to be of another class",
    "not public", "explanation",
)  # fmt: skip
RESNET = Published(
    "cells named rightly (which accuracy is not said)", "PBC, 8 classes", "in domain",
    Figure(0.959), source="ResNet18",
)  # fmt: skip
BLOODCAPS = Published(
    "cells named rightly (which accuracy is not said)", "PBC, 8 classes", "in domain",
    Figure(0.993), source="BloodCaps",
)  # fmt: skip

PUBLISHED: dict[str, tuple[Published, ...]] = {
    "evaluate": (RESNET, BLOODCAPS),
    "cost": (FEWEST, MOST, SECONDS),
    "anomaly": (ANOMALY, SENSITIVITY, SPECIFICITY),
    "shift": (
        SHIFT,
        *(
            Published(
                "accuracy, mean of 10 seeds, the best of four networks",
                f"trained on Raabin-WBC, tested on {where}", "domain shift",
                Figure(value, of=network), source=TSUTSUI,
            )
            for where, value, network in (
                ("its Test-B", 0.8506, "ViT-B/16"),
                ("LISC", 0.7444, "VGG16"),
                ("BCCD", 0.4912, "ResNet50-GN"),
            )
        ),
    ),
    "augment": (),
    "low-data": (LOW_DATA,),
    "uncertainty": (SURE,),
    "authenticity": (EXPERTS,),
    "fidelity": (AS_ASKED, EXPERTS),
    "explain": (MAPS,),
}  # fmt: skip
