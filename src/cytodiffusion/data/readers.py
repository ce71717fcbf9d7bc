"""Whatever a data set comes as, it becomes a list of samples.

    folder      DIR/class/image; the splits of DIR/train/class/image; images alone, without labels
    manifest    CSV or JSONL: path, label, and where present patient, slide, split
    tables      Parquet with image bytes, MedMNIST's NPZ            (tables.py)
    boxes       COCO JSON or Pascal VOC XML, cut into crops         (boxes.py)
    archive     zip or tar of any of these, read where it lies      (archives.py)
    one image

Listing decodes nothing. A file that is no image is listed all the same and fails when it is read, so that
it is named and not passed over in silence; what commonly lies beside images (`PAPERS`) is left alone.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from cytodiffusion.data.archives import is_archive, open_archive
from cytodiffusion.data.boxes import is_coco, parse_json, read_coco, read_voc
from cytodiffusion.data.sample import FileBytes, Sample, Source, Tree, to_text
from cytodiffusion.data.split import SPLITS, csv_lines, read_split, split_word
from cytodiffusion.data.tables import read_npz, read_parquet
from cytodiffusion.errors import DataError, UnreadableImage

__all__ = ["Sample", "read_dataset"]

IMAGES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"))
TABLES = frozenset((".csv", ".tsv", ".json", ".jsonl", ".npz", ".npy", ".parquet", ".xml"))
TEXTS = frozenset((".txt", ".md", ".yaml", ".yml", ".html", ".py"))
PAPERS = TABLES | TEXTS  # what may lie beside images without being meant as one
PAPER_NAMES = frozenset(("license", "licence", "readme", "notice", "thumbs.db", "desktop.ini"))
COLUMNS = {  # accepted headings, best first; in the order of a Sample's fields
    "path": ("path", "file", "filename", "file_name", "image"),
    "label": ("label", "class"),
    "patient": ("patient", "patient_id"),
    "slide": ("slide", "slide_id"),
    "split": ("split",),
}


def read_dataset(
    path: Path | str,
    *,
    splits: Path | str | None = None,
    split: str | None = None,
    margin: float | None = None,
) -> list[Sample]:
    """List the images of a data set, in a fixed order, without decoding them.

    `splits` is a CSV file (path, label, split): its images alone are taken, in its order, with its
    labels and splits. `split` keeps the images of one split. `margin` widens boxes (boxes.py).

    Raises DataError if there is nothing to read, if a table is malformed, or if `splits` lists
    images that the set does not have.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"There is nothing at {path}. Give a folder of images (with a subfolder per class, where there "
            "are labels), a manifest, an archive or an image."
        )
    samples = [replace(sample, split=split_word(sample.split)) for sample in _read(path, margin)]
    split = split_word(split)
    if splits is not None:
        samples = _apply_splits(samples, Path(splits), split, path)
    elif split is not None:
        samples = _one_split(samples, split, path)
    if not samples:
        raise DataError(
            f"{path} holds no images. Images end in {', '.join(sorted(IMAGES))}; where there are "
            "labels, each class is in a subfolder of its own."
        )
    return samples


def _read(path: Path, margin: float | None) -> list[Sample]:
    if path.is_dir():
        return _read_tree(_folder(path), margin)
    if is_archive(path):
        return _read_tree(open_archive(path), margin)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv", ".jsonl", ".json"):
        tree = Tree(path.parent, {}, path.parent)
        if suffix == ".json":
            return _read_coco_file(path, margin)
        return _read_manifest(tree, path.name, _bytes(FileBytes(path), path))
    if suffix == ".parquet":
        return read_parquet(path)
    if suffix == ".npz":
        return read_npz(path)
    if suffix in IMAGES:
        return [Sample(path.name, None, source=FileBytes(path))]
    raise DataError(
        f"{path} is not a data set that can be read. Give a folder, a CSV or JSONL manifest, "
        "Parquet, NPZ, COCO JSON, zip, tar, or an image."
    )


def _folder(root: Path) -> Tree:
    return Tree(root, {to_text(name): FileBytes(root / name) for name in sorted(_walk(root))}, root)


def _walk(root: Path) -> Iterator[str]:
    """Relative paths of the files, linked folders included, each folder once."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"The folder {error.filename} cannot be listed ({error.strerror}). Give it read "
            "permission, or take it out of the data set."
        )

    seen: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if not _hidden(name))
        relative = Path(folder).relative_to(root)
        yield from ((relative / file).as_posix() for file in files)


def _read_tree(tree: Tree, margin: float | None) -> list[Sample]:
    files = [name for name in sorted(tree.files) if not _hidden(name)]
    for name in ("manifest.csv", "manifest.jsonl"):
        if name in tree.files:
            return _read_manifest(tree, name, _bytes(tree.files[name], tree.where / name))
    if boxes := _read_boxes(tree, files, margin):
        return boxes
    images = [name for name in files if not _is_paper(name)]
    return _class_folders(tree, images) if images else _read_tables(tree, files)


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def _is_paper(name: str) -> bool:
    path = PurePosixPath(name.lower())
    return path.suffix in PAPERS or path.name in PAPER_NAMES


def _class_folders(tree: Tree, files: Sequence[str]) -> list[Sample]:
    """The label is the first folder; folders named after splits may come before it.

    An image in no folder of a class has no label.
    """
    by_split = _by_split(files)
    samples = []
    for name in files:
        folders = PurePosixPath(name).parts[:-1]
        split = SPLITS[folders[0].lower()] if by_split and folders else None
        label = next(iter(folders[1 if by_split else 0 :]), None)
        samples.append(Sample(name, label and label.strip(), split=split, source=tree.files[name]))
    return samples


def _by_split(files: Iterable[str]) -> bool:
    """Whether the first folders are named after splits. Raises DataError where other folders lie beside."""
    tops = {name.partition("/")[0] for name in files if "/" in name}
    splits = {top for top in tops if top.lower() in SPLITS}
    if len(splits) > 1 and (others := tops - splits):
        raise DataError(
            f"Beside the folders {', '.join(sorted(splits))}, which are splits, lie others: "
            f"{', '.join(sorted(others))}. Move these away, or deal the images with --splits."
        )
    return bool(tops) and splits == tops


def _read_tables(tree: Tree, files: Sequence[str]) -> list[Sample]:
    """Parquet and NPZ files in a folder or archive that holds no images."""
    samples: list[Sample] = []
    for name in files:
        suffix = PurePosixPath(name).suffix.lower()
        if suffix not in (".parquet", ".npz"):
            continue
        read = read_parquet if suffix == ".parquet" else read_npz
        if tree.folder is not None:
            samples += read(tree.folder / name, prefix=_parent(name))
        else:
            data = _bytes(tree.files[name], tree.where / name)
            samples += read(tree.where / name, data, _parent(name))
    _refuse_repeats([sample.name for sample in samples], tree.where)
    return samples


def _parent(name: str) -> str:
    parent = PurePosixPath(name).parent.as_posix()
    return "" if parent == "." else f"{parent}/"


def _read_boxes(tree: Tree, files: Sequence[str], margin: float | None) -> list[Sample]:
    """Boxes, if the tree has COCO files within two folders or VOC files anywhere."""
    samples: list[Sample] = []
    for name in files:
        if name.lower().endswith(".json") and name.count("/") <= 2:
            content = parse_json(_bytes(tree.files[name], tree.where / name))
            if is_coco(content):
                samples += read_coco(tree, name, content, margin)
    xml = [name for name in files if name.lower().endswith(".xml")]
    if not samples and xml:
        notes = [name for name in xml if b"<annotation" in _bytes(tree.files[name], tree.where)]
        samples = read_voc(tree, notes, margin)
    _refuse_repeats([sample.name for sample in samples], tree.where)
    if _by_split(sample.name for sample in samples):
        splits = [SPLITS.get(sample.name.partition("/")[0].lower()) for sample in samples]
        return [replace(sample, split=split) for sample, split in zip(samples, splits, strict=True)]
    return samples


def _read_coco_file(path: Path, margin: float | None) -> list[Sample]:
    content = parse_json(_bytes(FileBytes(path), path))
    return read_coco(_folder(path.parent), path.name, content, margin)


def _bytes(source: Source, where: Path) -> bytes:
    try:
        return source()
    except UnreadableImage as error:
        raise DataError(
            f"{where} cannot be read: {error}. Check the file and try again."
        ) from error


def _read_manifest(tree: Tree, name: str, data: bytes) -> list[Sample]:
    where = tree.where / name
    try:
        text = data.decode("utf-8-sig")
        lines = _json_lines(text) if name.lower().endswith("l") else csv_lines(text)
    except (ValueError, RecursionError, csv.Error) as error:
        raise DataError(
            f"The manifest {where} cannot be read ({error}). It must be UTF-8 text: CSV with a "
            "first line path,label or one JSON object a line."
        ) from error
    if not lines:
        raise DataError(
            f"The manifest {where} lists no images. Each line names one, and its label."
        )
    rows = [_fields(line, number, where) for number, line in lines]
    samples = [_manifest_sample(row, tree) for row in rows]
    _refuse_repeats([sample.name for sample in samples], where)
    return samples


def _manifest_sample(row: Mapping[str, str | None], tree: Tree) -> Sample:
    path = str(row["path"])
    label, patient, slide, split = (
        value and to_text(value) for column, value in row.items() if column != "path"
    )
    return Sample(to_text(path), label, patient, slide, split, source=tree.source(path))


def _json_lines(text: str) -> list[tuple[int, Mapping[str, Any]]]:
    lines = [(i, json.loads(line)) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, line in lines:
        if not isinstance(line, dict):
            raise ValueError(f"line {number} is not an object")
    return lines


def _fields(line: Mapping[str, Any], number: int, where: Path) -> dict[str, str | None]:
    given = {str(name).strip().lower(): value for name, value in line.items()}
    row: dict[str, str | None] = {}
    for column, headings in COLUMNS.items():
        values = (given[heading] for heading in headings if heading in given)
        value = next(values, None)
        row[column] = str(value).strip() or None if value is not None else None
    if row["path"] is None:
        raise DataError(
            f"Line {number} of {where} names no image; its columns are {', '.join(given)}. Each "
            "line needs a `path`, relative to the manifest, and a `label`."
        )
    row["path"] = row["path"].replace("\\", "/").removeprefix("./")
    return row


def _refuse_repeats(names: Iterable[str], where: Path) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"{where} lists '{name}' twice. Give each image one line and one name.")
        seen.add(name)


def _apply_splits(samples: list[Sample], file: Path, split: str | None, path: Path) -> list[Sample]:
    by_name = {sample.name: sample for sample in samples}
    rows = read_split(file, by_name.keys())
    chosen = [row for row in rows if split in (None, row.split)]
    if not chosen:
        _no_such_split(split, {row.split for row in rows}, file)
    absent = [row.name for row in chosen if row.name not in by_name]
    if absent:
        raise DataError(
            f"{file} lists {len(absent)} images that {path} does not have, first: '{absent[0]}'. "
            "Paths must be relative to the data set; give the set that the split was made for."
        )
    return [
        replace(by_name[row.name], label=row.label or by_name[row.name].label, split=row.split)
        for row in chosen
    ]


def _one_split(samples: list[Sample], split: str, path: Path) -> list[Sample]:
    chosen = [sample for sample in samples if sample.split == split]
    if samples and not chosen:
        _no_such_split(split, {sample.split for sample in samples if sample.split}, path)
    return chosen


def _no_such_split(split: str | None, known: set[str], where: Path) -> None:
    has = f"it has {', '.join(sorted(known))}" if known else "it names no splits"
    raise DataError(
        f"{where} has no images in the split '{split}'; {has}. Give one of these, or a split file."
    )
