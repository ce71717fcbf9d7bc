"""The nouns of the package: `Classes`, `Denoiser`, `Space`, `ErrorTable`, `Answer`.

A `Denoiser` guesses the clean image behind a noisy one, once for each class it might be. What it
gets wrong is measured into an `ErrorTable` (image x trial x class). From there on everything is
numpy: an `Answer` is read off the table, and a saved table can be replayed on a laptop.

Images are floats in [-1, 1], colour first. sigma is a standard deviation in those units, or in the units
of the latents where a `Space` has its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from cytodiffusion.errors import DataError, LabelError

UNLABELLED = -1  # in place of a class index, where the class is not known


@dataclass(frozen=True)
class Classes:
    """The classes a model can answer with, in the order of its columns.

    Index `len(classes)`, one past the last name, stands for "any cell": the head, or the label, that
    was trained on cells of every class.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names):
            raise LabelError(
                f"A class is named twice: {', '.join(self.names)}. Give each one name."
            )

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def any(self) -> int:
        """The label that means "any cell"."""
        return len(self.names)

    def index(self, name: str) -> int:
        """Column of a class. Raises LabelError for a class that the model does not know."""
        if name not in self.names:
            raise LabelError(
                f"This model does not know the class '{name}'. It was trained on: "
                f"{', '.join(self.names)}. To ask whether a cell is none of these, look at the "
                "column `anomaly`."
            )
        return self.names.index(name)


@runtime_checkable
class Denoiser(Protocol):
    """Guesses the clean image behind a noisy one, once for each class it might be."""

    def __call__(
        self,
        noisy: Float[Tensor, "n c h w"],
        sigma: Float[Tensor, " n"],
        labels: Int[Tensor, "n k"],
    ) -> Float[Tensor, "n k c h w"]:
        """labels[i] lists the k candidate classes of image i; all of them see the same noise."""
        ...


@runtime_checkable
class Space(Protocol):
    """Where noise is added: the pixels themselves, or the latents of an autoencoder."""

    @property
    def scale(self) -> float:
        """Standard deviation of its images / that of pixels: noise levels grow with it."""
        ...

    def encode(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n c h w"]:
        """Images in [-1, 1] to what a `Denoiser` of this space sees."""
        ...

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 s s"]:
        """And back."""
        ...

    def shape(self, size: int) -> tuple[int, int, int]:
        """Shape of what `encode` makes of an image of `size` px."""
        ...


@dataclass(frozen=True)
class PixelSpace:
    """The `Space` of networks that work on pixels."""

    scale: float = 1.0

    def encode(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n 3 s s"]:
        """The same images."""
        return images

    def decode(self, latents: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n 3 s s"]:
        """The same images."""
        return latents

    def shape(self, size: int) -> tuple[int, int, int]:
        """Three colours."""
        return 3, size, size


PIXELS: Space = PixelSpace()


@dataclass(frozen=True)
class ErrorTable:
    """What the network measured: the mean squared error of each guess.

    errors[i, t, k] is the mean over pixels and colours of (guess - clean)^2 for image i, trial t and
    class k, in squared image units; lower means that class k explains the image better. The last
    column is "any cell". An entry that was not computed is NaN. features[i] is what the trunk of a
    network with one for all classes makes of image i in its first trial, averaged over the grid.
    """

    errors: np.ndarray  # float32, (images, trials, classes + 1)
    sigmas: np.ndarray  # float32, (trials,), image units
    digests: tuple[str, ...]  # sha256 of each image file or array
    classes: Classes
    seed: int
    model: str
    features: np.ndarray | None = None  # float32, (images, features)

    def __post_init__(self) -> None:
        expected = (len(self.digests), len(self.sigmas), len(self.classes) + 1)
        if self.errors.shape != expected:
            raise DataError(
                f"An error table of shape {self.errors.shape} does not fit {expected[0]} images, "
                f"{expected[1]} trials and {expected[2]} columns (classes and 'any cell')."
            )
        if self.features is not None and len(self.features) != len(self.digests):
            raise DataError(
                f"Features of {len(self.features)} images do not fit an error table of {len(self.digests)}."
            )

    def __len__(self) -> int:
        return len(self.digests)

    def rows(self, chosen: Sequence[int] | np.ndarray | slice) -> ErrorTable:
        """The same measurement for some of the images."""
        order = np.arange(len(self))[chosen]
        digests = tuple(self.digests[i] for i in order)
        features = None if self.features is None else self.features[order]
        return ErrorTable(
            self.errors[order], self.sigmas, digests, self.classes, self.seed, self.model, features
        )

    def save(self, path: Path | str) -> None:
        """Write one NPZ file: numbers only, no pickle."""
        meta = {
            "digests": self.digests,
            "classes": self.classes.names,
            "seed": self.seed,
            "model": self.model,
        }
        arrays: dict[str, Any] = {"errors": self.errors, "sigmas": self.sigmas}
        arrays |= {} if self.features is None else {"features": self.features}
        with Path(path).open("wb") as file:
            np.savez_compressed(file, meta=np.array(json.dumps(meta)), **arrays)

    @classmethod
    def load(cls, path: Path | str) -> ErrorTable:
        """Read a table that `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            meta: dict[str, Any] = json.loads(str(file["meta"]))
            return cls(
                errors=file["errors"],
                sigmas=file["sigmas"],
                digests=tuple(meta["digests"]),
                classes=Classes(tuple(meta["classes"])),
                seed=meta["seed"],
                model=meta["model"],
                features=file.get("features"),
            )


@dataclass(frozen=True)
class Answer:
    """What is said of one cell."""

    predicted: str
    probabilities: np.ndarray  # (classes,), sums to 1
    conformal_set: tuple[str, ...]
    anomaly: float  # 0 to 1, higher is stranger
    anomaly_p: float  # share of normal cells that are at least as strange
    flag: str  # 'ok', 'uncertain' or 'anomalous'
    trials: int  # noise draws that were used
    passes: float  # full network passes that were spent

    @property
    def confidence(self) -> float:
        """Probability of the predicted class."""
        return float(self.probabilities.max())
