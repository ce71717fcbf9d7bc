"""Read many images at once, keeping going past those that cannot be read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cytodiffusion.data.images import Preprocess, decode
from cytodiffusion.data.look import Look, measure_look
from cytodiffusion.data.sample import Sample, Source, png
from cytodiffusion.errors import UnreadableImage

FRAMES = 300  # of a batch, evenly spread, from which its look is taken


@dataclass(frozen=True)
class Loaded:
    """One image at the size that was asked for, or the reason why there is none."""

    sample: Sample
    sha256: str
    pixels: UInt8[np.ndarray, "3 s s"] | None
    problem: str = ""


def load_one(sample: Sample, preprocess: Preprocess, margin: float = 1.0) -> Loaded:
    """Read, decode, crop and resize one image; never raises for a bad one."""
    sha = ""
    try:
        data = sample.read()
        sha = hashlib.sha256(data).hexdigest()
        return Loaded(sample, sha, preprocess.canvas(decode(data), margin))
    except UnreadableImage as error:
        return Loaded(sample, sha, None, str(error))


def file_sha256(sample: Sample) -> str:
    """sha256 of the image's file; empty where it cannot be read."""
    try:
        return hashlib.sha256(sample.read()).hexdigest()
    except UnreadableImage:
        return ""


def cells_key(samples: Iterable[Sample]) -> str:
    """A digest of images, their names and labels; one that was reframed counts by its file and factor."""
    about = hashlib.sha256()
    for sample in samples:
        factor, frame = 1.0, sample.source
        if isinstance(frame, Reframed):
            factor, sample = frame.factor, replace(sample, source=frame.source)
        about.update(repr((sample.name, sample.label, file_sha256(sample), factor)).encode())
    return about.hexdigest()


def load_images(
    samples: Sequence[Sample], preprocess: Preprocess, margin: float = 1.0, workers: int = 2
) -> Iterator[Loaded]:
    """Load in the order given, decoding in `workers` threads, a bounded number ahead."""
    with ThreadPoolExecutor(workers) as pool:
        for group in _batched(samples, 64 * workers):
            yield from pool.map(lambda sample: load_one(sample, preprocess, margin), group)


def _batched(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def look_of(samples: Sequence[Sample], frames: int = FRAMES) -> tuple[Look, int]:
    """Look of a batch, from up to `frames` of its images, and in how many of them a cell was found.

    Images that cannot be read are passed over. Raises DataError where no cell is found.
    """
    chosen = samples[:: -(-len(samples) // frames)]
    return measure_look(image for sample in chosen if (image := _decoded(sample)) is not None)


def _decoded(sample: Sample) -> Image.Image | None:
    try:
        return decode(sample.read())
    except UnreadableImage:
        return None


@dataclass(frozen=True)
class Reframed:
    """An image file in a frame `factor` times as wide, the outermost pixels repeated where needed.

    So cells of several laboratories have one scale for one crop, and can be trained on together.
    """

    source: Source
    factor: float

    def __call__(self) -> bytes:
        image = decode(self.source())
        side = max(8, round(self.factor * min(image.size)))
        return png(Preprocess(size=side, crop=self.factor).canvas(image).transpose(1, 2, 0).copy())


def reframed(samples: Sequence[Sample], crop: float, wanted: float) -> list[Sample]:
    """Samples that show with the crop `wanted` what they showed with `crop`."""
    factor = crop / wanted
    return [
        sample if sample.source is None else replace(sample, source=Reframed(sample.source, factor))
        for sample in samples
    ]
