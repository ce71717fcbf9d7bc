"""One image of a data set: its name, what is known of it, and how to get its bytes.

A `Source` fetches the bytes when it is called, so that a list of a million samples holds no image.
Sources are plain values: they can be sent to another process.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from cytodiffusion.errors import UnreadableImage

MAX_BYTES = 256 * 2**20  # of one image file: far more than one cell, far less than the memory

Source = Callable[[], bytes]


@dataclass(frozen=True)
class Sample:
    """One image. `name` is a stable id, unique in its set: the relative path or the row."""

    name: str
    label: str | None
    patient: str | None = None
    slide: str | None = None
    split: str | None = None
    source: Source | None = field(default=None, repr=False, compare=False)

    def read(self) -> bytes:
        """The bytes of the image file. Raises UnreadableImage, saying why, if there are none."""
        if self.source is None:
            raise UnreadableImage("the file is missing")
        return self.source()


@dataclass(frozen=True)
class FileBytes:
    """A file on disk."""

    path: Path

    def __call__(self) -> bytes:
        try:
            if not self.path.exists():
                raise UnreadableImage("the file is missing")
            if not self.path.is_file():
                raise UnreadableImage("not a regular file")
            if self.path.stat().st_size > MAX_BYTES:
                raise UnreadableImage(f"the file is larger than {MAX_BYTES >> 20} MiB")
            return self.path.read_bytes()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UnreadableImage(f"the file cannot be read ({reason})") from error


@dataclass(frozen=True)
class HeldBytes:
    """Bytes that are in memory already."""

    data: bytes = field(repr=False)

    def __call__(self) -> bytes:
        return self.data


@dataclass(frozen=True, eq=False)
class PngOfArray:
    """8-bit pixels in memory, grey (h w) or colour (h w 3), as a PNG file."""

    pixels: np.ndarray = field(repr=False)

    def __call__(self) -> bytes:
        return png(self.pixels)


@dataclass(frozen=True)
class Tree:
    """The files of a folder or of an archive, by their relative path with forward slashes."""

    where: Path
    files: Mapping[str, Source]
    folder: Path | None = None  # None for an archive, which cannot point outside itself

    def source(self, relative: str) -> Source | None:
        """How to read a file named relative to the root; None if an archive does not hold it."""
        if relative in self.files:
            return self.files[relative]
        return None if self.folder is None else FileBytes(self.folder / relative)


def to_text(name: str) -> str:
    """A name as it can be written: bytes of a file name that are no text become \\xe9 and the like."""
    try:
        data = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a character, which JSON can hold
        data = name.encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")


def png(pixels: np.ndarray) -> bytes:
    """8-bit pixels as the bytes of a PNG file; nothing is lost."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
