"""Do maps look where pathologists say that classes differ?

WBCAtt describes nucleus, granules and cytoplasm of the white cells of PBC in words. The words of a cell and
those that are usual in another class say where it would have to change, and how:

    in the cell   the pixel that changes most lies in the cell: a share of the maps; and how much more a
                  pixel of the cell changes than a pixel anywhere
    kind          nuclei are dark, granules have colours: the more unusual the cell's shape of nucleus is in
                  the other class beside its granules, the more of the change in the cell is of brightness
                  and the less of colour; a rank correlation over the other classes, within each cell
    direction     where the other class has red granules and the cell has not, its cytoplasm must become
                  redder, and the other way round; likewise for the other lines of DIRECTIONS: a share
                  of the maps, .5 by luck

How unusual a word is: 1 - its share among the cells of the other class. Nothing is outlined by hand: the
values of red light fall into three groups; the darkest is nucleus, the middle one cytoplasm, and the
largest piece of both is the cell.

Source: Tsutsui et al. 2023, WBCAtt, arXiv 2306.13531.
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.ndimage import label
from scipy.stats import rankdata
from sklearn.cluster import KMeans

from cytodiffusion.data.taxonomy import Taxonomy
from cytodiffusion.errors import DataError

Image = Float[np.ndarray, "c h w"]
Mask = Bool[np.ndarray, "h w"]

NUCLEUS = ("nucleus_shape",)
GRANULES = ("granule_type", "granule_colour", "granularity")
DIFFERS = 0.5  # by how much the shares of a word must differ to say a direction
LIGHTER, DARKER = (1 / 3, 1 / 3, 1 / 3), (-1 / 3, -1 / 3, -1 / 3)

# A word of an attribute, where it shows, and the mix of red, green and blue that it makes higher there.
DIRECTIONS = {
    "red granules": ("granule_colour", "red", "cytoplasm", (1.0, -0.5, -0.5)),
    "blue cytoplasm": ("cytoplasm_colour", "blue", "cytoplasm", (-0.5, -0.5, 1.0)),
    "loose chromatin": ("chromatin_density", "loosely", "nucleus", LIGHTER),
    "large nucleus": ("nuclear_cytoplasmic_ratio", "high", "cell", DARKER),
}


@dataclass(frozen=True)
class Words:
    """What is said of each cell, and how often in each class."""

    cells: Mapping[str, Mapping[str, str]]  # by the stem of the file name
    shares: Mapping[str, Mapping[tuple[str, str], float]]  # class -> (attribute, word) -> share

    @classmethod
    def read(cls, path: Path, classes: Sequence[str], taxonomy: Taxonomy) -> Words:
        """Read WBCAtt's table: `img_name`, `label` and a column for each attribute.

        Raises DataError for a table that is none.
        """
        needed = {*NUCLEUS, *GRANULES, *(name for name, *_ in DIRECTIONS.values())}
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"The attributes {path} cannot be read ({error}).") from error
        missing = sorted(({"img_name", "label"} | needed) - set(rows[0] if rows else ()))
        if missing:
            raise DataError(
                f"{path} lacks the columns {', '.join(missing)}. Give the table of WBCAtt."
            )
        counts: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        total = Counter[str]()
        for row in rows:
            name = taxonomy.resolve(row["label"], classes)
            if name is not None:
                total[name] += 1
                counts[name].update((attribute, row[attribute]) for attribute in needed)
        shares = {
            name: {word: count / total[name] for word, count in each.items()}
            for name, each in counts.items()
        }
        return cls({PurePosixPath(row["img_name"]).stem: row for row in rows}, shares)

    def surprise(self, cell: Mapping[str, str], other: str, attributes: Sequence[str]) -> float:
        """How unusual the cell's words are in another class, 0 to 1."""
        shares = self.shares[other]
        return float(np.mean([1 - shares.get((name, cell[name]), 0.0) for name in attributes]))


def regions(image: Image) -> dict[str, Mask]:
    """Nucleus, cytoplasm and cell, roughly."""
    red = image[0].reshape(-1, 1)
    start = np.quantile(red, [0.05, 0.3, 0.9])[:, None]
    found = KMeans(3, init=start, n_init=1).fit(red)
    rank = np.argsort(np.argsort(found.cluster_centers_[:, 0]))
    group = rank[found.labels_].reshape(image.shape[1:])
    pieces, _ = label(group < 2)
    cell = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    return {"cell": cell, "nucleus": cell & (group == 0), "cytoplasm": cell & (group == 1)}


def look(
    image: Image, changes: Mapping[str, Image], cell: Mapping[str, str], words: Words
) -> list[dict[str, Any]]:
    """What each map (by the class it leads to) does, beside what the words say it should."""
    masks = regions(image)
    inside = masks["cell"]
    found = []
    for other, change in changes.items():
        power = np.square(change).mean(0)
        strength, light = np.sqrt(power), np.square(change.mean(0))
        found.append(
            {
                "other": other,
                "in_cell": bool(inside.ravel()[strength.argmax()]),
                "enrichment": float(strength[inside].mean() / strength.mean()),
                "brightness": float(light[inside].sum() / power[inside].sum()),
                "expected": words.surprise(cell, other, NUCLEUS)
                - words.surprise(cell, other, GRANULES),
                "directions": _directions(change, masks, cell, words.shares[other]),
            }
        )
    return found


def _directions(
    change: Image, masks: Mapping[str, Mask], cell: Mapping[str, str],
    shares: Mapping[tuple[str, str], float],
) -> dict[str, bool]:  # fmt: skip
    """Whether the map goes the way that the words say, where they say one."""
    found = {}
    for name, (attribute, word, place, mix) in DIRECTIONS.items():
        gain = shares.get((attribute, word), 0.0) - (cell[attribute] == word)
        if abs(gain) >= DIFFERS and masks[place].any():
            done = np.tensordot(mix, change, 1)[masks[place]].mean()
            found[name] = bool(done * gain > 0)
    return found


def rank_agreement(found: Sequence[Mapping[str, Any]]) -> float | None:
    """Spearman's correlation of brightness with what is expected, over the maps of one cell.

    None where either does not vary.
    """
    pairs = rankdata([[m["brightness"], m["expected"]] for m in found], axis=0)
    if len(found) < 2 or np.ptp(pairs, axis=0).min() == 0:
        return None
    return float(np.corrcoef(pairs.T)[0, 1])
