"""Cells marked by boxes in larger pictures: COCO's JSON and Pascal VOC's XML become crops.

A box is (left, top, right, bottom) in pixels, edges between pixels, from the upper left corner.
COCO writes x, y, width, height from 0; VOC counts pixels from 1, the last included.

The crop is the box itself, or with `margin` the square around its centre with the side
(1 + margin) * the longer side of the box. Beyond the picture's edge the outermost pixels repeat.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from cytodiffusion.data.images import decode
from cytodiffusion.data.sample import Sample, Source, Tree, png, to_text
from cytodiffusion.errors import DataError, UnreadableImage

Box = tuple[float, float, float, float]

MAX_SIDE = 8192  # px of one crop: a larger box is a mistake


@dataclass(frozen=True)
class BoxCrop:
    """A box of a larger picture, as a PNG file."""

    picture: Source
    box: Box
    margin: float | None = None

    def __call__(self) -> bytes:
        return png(crop(_whole(self.picture), self.box, self.margin))


@lru_cache(maxsize=2)
def _whole(picture: Source) -> np.ndarray:
    """The pixels of a picture, kept for its next box."""
    return np.asarray(decode(picture()))


def crop(pixels: np.ndarray, box: Box, margin: float | None = None) -> np.ndarray:
    """Cut a box out of a picture (h w 3). Raises UnreadableImage for a box that holds no pixel."""
    left, top, right, bottom = box
    height, width = pixels.shape[:2]
    if not all(np.isfinite(box)) or right <= left or bottom <= top:
        raise UnreadableImage(f"the box {_text(box)} has no area")
    if left >= width or top >= height or right <= 0 or bottom <= 0:
        raise UnreadableImage(f"the box {_text(box)} lies outside the {width} x {height} picture")
    if margin is not None:
        side = max(right - left, bottom - top) * (1 + margin)
        left, top = (left + right - side) / 2, (top + bottom - side) / 2
        right, bottom = left + side, top + side
    columns, rows = _pixels(left, right), _pixels(top, bottom)
    cut: np.ndarray = pixels[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)]
    return cut


def _pixels(start: float, end: float) -> np.ndarray:
    """Indices of the pixels from one edge to the other, at least one."""
    first, count = round(start), max(1, round(end - start))
    if count > MAX_SIDE:
        raise UnreadableImage(f"the box is {count} px wide or high; at most {MAX_SIDE} would do")
    return np.arange(first, first + count)


def _text(box: Box) -> str:
    return "(" + ", ".join(f"{edge:g}" for edge in box) + ")"


def is_coco(content: Any) -> bool:
    """Whether parsed JSON has COCO's three lists."""
    return isinstance(content, Mapping) and all(
        isinstance(content.get(name), list) for name in ("images", "annotations", "categories")
    )


def read_coco(tree: Tree, file: str, content: Any, margin: float | None = None) -> list[Sample]:
    """The boxes of one COCO file, named `picture#annotation id`. `file` is its path in the tree."""
    if not is_coco(content):
        raise DataError(
            f"{tree.where / file} is not a COCO file: it needs the lists images, annotations and "
            "categories. For a table of image files give a CSV or JSONL manifest."
        )
    try:
        labels = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        pictures = {entry["id"]: str(entry["file_name"]) for entry in content["images"]}
        find = _Finder(tree, PurePosixPath(file).parent)
        return [
            _coco_sample(entry, number, pictures, labels, find, margin)
            for number, entry in enumerate(content["annotations"])
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{tree.where / file} is not whole: {type(error).__name__} {error} in its lists. Each "
            "annotation needs image_id, category_id and bbox [x, y, width, height]."
        ) from error


def _coco_sample(
    entry: Mapping[str, Any],
    number: int,
    pictures: Mapping[Any, str],
    labels: Mapping[Any, str],
    find: _Finder,
    margin: float | None,
) -> Sample:
    x, y, width, height = (float(value) for value in entry["bbox"])
    name, source = find(pictures[entry["image_id"]])
    box = (x, y, x + width, y + height)
    cut = None if source is None else BoxCrop(source, box, margin)
    label = to_text(labels[entry["category_id"]])
    return Sample(to_text(f"{name}#{entry.get('id', number)}"), label, slide=name, source=cut)


def read_voc(tree: Tree, files: list[str], margin: float | None = None) -> list[Sample]:
    """The boxes of Pascal VOC files, named `picture#index of the box`."""
    return [sample for file in files for sample in _voc_file(tree, file, margin)]


def _voc_file(tree: Tree, file: str, margin: float | None) -> list[Sample]:
    root = _parse_xml(tree.files[file](), f"{tree.where / file}")
    find = _Finder(tree, PurePosixPath(file).parent)
    name, source = find(root.findtext("filename") or "", stem=PurePosixPath(file).stem)
    samples = []
    for index, entry in enumerate(root.iter("object")):
        box = _voc_box(entry, f"{tree.where / file}")
        cut = None if source is None else BoxCrop(source, box, margin)
        samples.append(Sample(f"{name}#{index}", entry.findtext("name"), slide=name, source=cut))
    return samples


def _parse_xml(data: bytes, where: str) -> ElementTree.Element:
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise DataError(f"{where} declares XML entities, which are refused. Remove them.")
    try:
        return ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise DataError(f"{where} is not XML ({error}). Mend it or take it away.") from error


def _voc_box(entry: ElementTree.Element, where: str) -> Box:
    try:
        left, top, right, bottom = (
            float(entry.findtext(f"bndbox/{edge}") or "missing")
            for edge in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError as error:
        raise DataError(
            f"{where} has an object without a whole box. It needs bndbox with xmin, ymin, xmax and "
            "ymax in pixels."
        ) from error
    return (max(0.0, left - 1), max(0.0, top - 1), right, bottom)


class _Finder:
    """Finds a picture that an annotation names: beside it, from the root, or by file name."""

    def __init__(self, tree: Tree, folder: PurePosixPath) -> None:
        self.tree, self.folder = tree, folder
        self.by_name: dict[str, list[str]] = {}
        self.by_stem: dict[str, list[str]] = {}
        for file in tree.files:
            path = PurePosixPath(file)
            if path.suffix.lower() not in (".xml", ".json", ".txt", ".csv"):
                self.by_name.setdefault(path.name, []).append(file)
                self.by_stem.setdefault(path.stem, []).append(file)

    def __call__(self, picture: str, stem: str | None = None) -> tuple[str, Source | None]:
        """Name in the tree and source; the source is None if no one picture answers."""
        picture = picture.replace("\\", "/").removeprefix("./")
        for name in ((self.folder / picture).as_posix(), picture):
            if name in self.tree.files:
                return name, self.tree.files[name]
        named = self.by_name.get(PurePosixPath(picture).name, [])
        found = named if named or stem is None else self.by_stem.get(stem, [])
        if len(found) == 1:
            return found[0], self.tree.files[found[0]]
        return picture or f"{stem}", None


def parse_json(data: bytes) -> Any:
    """Parsed JSON, or None for what is not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
