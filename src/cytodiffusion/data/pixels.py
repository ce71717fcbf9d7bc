"""Labelled images in memory, all at the size of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from cytodiffusion.data.images import Preprocess
from cytodiffusion.data.load import load_images
from cytodiffusion.data.sample import Sample
from cytodiffusion.data.taxonomy import Taxonomy
from cytodiffusion.errors import DataError
from cytodiffusion.types import UNLABELLED


@dataclass(frozen=True)
class Pixels:
    """Images at a model's size, with their labels and what could not be read."""

    images: np.ndarray  # uint8, (n, 3, s, s)
    labels: Int[np.ndarray, " n"]
    digests: list[str]
    problems: list[str]  # 'name: reason'

    @property
    def sha256(self) -> str:
        """One digest for the whole set, whatever its order."""
        return hashlib.sha256("".join(sorted(self.digests)).encode()).hexdigest()

    def part(self, rows: Int[np.ndarray, " m"]) -> Pixels:
        """These images alone."""
        digests = [self.digests[row] for row in rows]
        return Pixels(self.images[rows], self.labels[rows], digests, self.problems)


def load_pixels(
    samples: Sequence[Sample], classes: Sequence[str], preprocess: Preprocess, margin: float = 1.0,
    workers: int = 2, taxonomy: Taxonomy | None = None,
) -> Generator[int, None, Pixels]:  # fmt: skip
    """Yield how many images are loaded, now and then; returns the images."""
    taxonomy = taxonomy or Taxonomy.load()
    images, labels, digests, problems = [], [], [], []
    for done, item in enumerate(load_images(samples, preprocess, margin, workers), start=1):
        if item.pixels is None:
            problems.append(f"{item.sample.name}: {item.problem}")
        else:
            images.append(item.pixels)
            labels.append(class_index(item.sample.label, classes, taxonomy))
            digests.append(item.sha256)
        if done % 64 == 0 or done == len(samples):
            yield done
    if not images:
        raise DataError(f"None of the {len(samples)} images could be read. Try: data check.")
    return Pixels(np.stack(images), np.array(labels, dtype=np.int64), digests, problems)


def class_index(label: str | None, classes: Sequence[str], taxonomy: Taxonomy) -> int:
    """Column of a label's class; UNLABELLED where there is no label. Raises DataError."""
    if label is None:
        return UNLABELLED
    name = taxonomy.resolve(label, classes)
    if name is None:
        raise DataError(
            f"The label '{label}' is none of the classes {', '.join(classes)} and the taxonomy knows "
            "no class above it that is. Rename it, or give a taxonomy that lists it (--taxonomy)."
        )
    return list(classes).index(name)


def class_names(samples: Sequence[Sample], taxonomy: Taxonomy | None = None) -> tuple[str, ...]:
    """The classes of a data set, sorted; spellings of one class count once.

    Raises DataError for fewer than two.
    """
    spelled = (taxonomy or Taxonomy.load()).respell(samples)
    names = tuple(sorted({sample.label for sample in spelled if sample.label is not None}))
    if len(names) < 2:
        raise DataError(
            f"Training needs at least two classes; found {len(names)}. Put each class in a folder "
            "of its own, or give a manifest with the columns path,label."
        )
    return names
