"""Images inside tables: Parquet with image bytes, MedMNIST's NPZ of arrays.

Parquet is read a row group at a time, when an image of it is asked for. NPZ arrays are held in
memory, and each becomes the bytes of a PNG file when it is read.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cytodiffusion.data.archives import DAMAGED
from cytodiffusion.data.sample import HeldBytes, PngOfArray, Sample, Source
from cytodiffusion.errors import DataError, UnreadableImage, one_line

MAX_ARRAYS = 16 * 2**30  # bytes of an NPZ file in memory


def read_parquet(path: Path, data: bytes | None = None, prefix: str = "") -> list[Sample]:
    """Rows with a column `image` and, where present, label, name, patient, slide and split.

    `image` is bytes or a struct of bytes and path. Whole-number labels become text, or the class
    names that the Hugging Face header gives them. `data` is the file itself if it is in memory.
    """
    try:
        with pq.ParquetFile(path if data is None else pa.BufferReader(data)) as file:
            _check_columns(file, path)
            columns = {
                name: _column(file, name) for name in _TEXT if name in file.schema_arrow.names
            }
            names = _row_names(file, columns.pop("name", None), path, prefix)
            names_of_labels = _label_names(file)
            sources = _sources(file, path, data is not None)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"The Parquet file {path} cannot be read ({one_line(error)}). Fetch it again."
        ) from error
    texts = {name: [_text(value) for value in values] for name, values in columns.items()}
    if "label" in columns:
        texts["label"] = [_label(value, names_of_labels) for value in columns["label"]]
    texts.setdefault("label", [None] * len(names))
    return [
        Sample(name, source=source, **{column: values[i] for column, values in texts.items()})
        for i, (name, source) in enumerate(zip(names, sources, strict=True))
    ]


_TEXT = ("label", "name", "patient", "slide", "split")


@dataclass(frozen=True)
class ParquetCell:
    """The image in one row of a Parquet file."""

    path: Path
    group: int
    row: int

    def __call__(self) -> bytes:
        try:
            changed = self.path.stat().st_mtime_ns
            return _image_bytes(_row_group(self.path, changed, os.getpid(), self.group), self.row)
        except (OSError, pa.ArrowException, IndexError) as error:
            raise UnreadableImage(f"the row cannot be read ({one_line(error)})") from error


@lru_cache(maxsize=2)
def _row_group(path: Path, changed: int, process: int, group: int) -> pa.ChunkedArray:
    """One column of one row group, kept for the next row: they are asked for in order."""
    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, columns=["image"]).column("image")


def _image_bytes(column: pa.ChunkedArray, row: int) -> bytes:
    value: Any = column[row].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not data:
        raise UnreadableImage("the row holds no image bytes")
    return bytes(data)


def _check_columns(file: pq.ParquetFile, path: Path) -> None:
    schema = file.schema_arrow
    kind = schema.field("image").type if "image" in schema.names else None
    if kind is not None and pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        kind = kind.field(index).type if index >= 0 else None
    if kind is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(
            f"The Parquet file {path} has no column `image` of image bytes; it has: "
            f"{', '.join(schema.names)}. Store the bytes of each image file in `image`."
        )


def _column(file: pq.ParquetFile, name: str) -> list[Any]:
    return list(file.read(columns=[name]).column(name).to_pylist())


def _sources(file: pq.ParquetFile, path: Path, held: bool) -> list[Source]:
    if not held:
        return [
            ParquetCell(path, group, row)
            for group in range(file.num_row_groups)
            for row in range(file.metadata.row_group(group).num_rows)
        ]
    values = _column(file, "image")
    blobs = [value.get("bytes") if isinstance(value, dict) else value for value in values]
    return [HeldBytes(blob or b"") for blob in blobs]


def _row_names(
    file: pq.ParquetFile, column: list[Any] | None, path: Path, prefix: str
) -> list[str]:
    if column is None:
        return [f"{prefix}{path.name}#{row}" for row in range(file.metadata.num_rows)]
    names = [str(value) for value in column]
    if len(set(names)) < len(names):
        raise DataError(
            f"The column `name` of {path} repeats a name. Make each unique, or drop the column."
        )
    return [prefix + name for name in names]


def _label_names(file: pq.ParquetFile) -> list[str] | None:
    """Class names from the header that Hugging Face `datasets` writes, if it is there."""
    header = (file.schema_arrow.metadata or {}).get(b"huggingface")
    try:
        names = json.loads(header)["info"]["features"]["label"]["names"] if header else None
    except (ValueError, KeyError, TypeError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _label(value: Any, names: Sequence[str] | None) -> str | None:
    if names is not None and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    return _text(value)


def _text(value: Any) -> str | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None or value == "" else str(value)


def read_npz(path: Path, data: bytes | None = None, prefix: str = "") -> list[Sample]:
    """MedMNIST's layout: train_images, train_labels, val_..., test_...; or images and labels.

    Images are 8-bit, (n, h, w) or (n, h, w, 3); labels are whole numbers, one an image, and become
    text. The split is the part before the underscore.
    """
    arrays = _arrays(path, data)
    parts = [name.removesuffix("images") for name in arrays if name.endswith("images")]
    samples = [sample for part in parts for sample in _part(arrays, part, path, prefix)]
    if not samples:
        raise DataError(
            f"The NPZ file {path} holds no images; it has: {', '.join(arrays) or 'nothing'}. It "
            "needs train_images and train_labels (val_, test_), as MedMNIST has them."
        )
    return samples


def _arrays(path: Path, data: bytes | None) -> dict[str, np.ndarray]:
    try:
        opened: Any = path if data is None else io.BytesIO(data)
        with zipfile.ZipFile(opened) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > MAX_ARRAYS:
            raise DataError(f"The NPZ file {path} unpacks to more than {MAX_ARRAYS >> 30} GiB.")
        with np.load(opened, allow_pickle=False) as file:
            wanted = [name for name in file.files if name.endswith(("images", "labels"))]
            return {name: file[name] for name in wanted}
    except (OSError, ValueError, EOFError, *DAMAGED, MemoryError) as error:
        raise DataError(
            f"The NPZ file {path} cannot be read ({one_line(error)}). Fetch it again."
        ) from error


def _part(arrays: dict[str, np.ndarray], part: str, path: Path, prefix: str) -> list[Sample]:
    images = arrays[f"{part}images"]
    grey, colour = images.ndim == 3, images.ndim == 4 and images.shape[-1] == 3
    if images.dtype != np.uint8 or not (grey or colour):
        raise DataError(
            f"`{part}images` in {path} is {images.dtype} of shape {images.shape}. Images must be "
            "uint8, (n, h, w) or (n, h, w, 3)."
        )
    labels = _npz_labels(arrays.get(f"{part}labels"), part, len(images), path)
    split = part.rstrip("_") or None
    folder = f"{prefix}{split}/" if split else prefix
    return [
        Sample(f"{folder}{i}", label, split=split, source=PngOfArray(image))
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def _npz_labels(labels: np.ndarray | None, part: str, count: int, path: Path) -> list[str | None]:
    if labels is None:
        return [None] * count
    if labels.shape not in ((count,), (count, 1)):
        raise DataError(
            f"`{part}labels` in {path} has shape {labels.shape}; {count} images need ({count},) or "
            f"({count}, 1): one class each."
        )
    return [_text(value) for value in labels.ravel().tolist()]
