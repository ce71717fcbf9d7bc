"""A synthetic image says so, to Pillow too, and is refused wherever a model would be tested on it."""

from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import CLASSES, cli, disc, write_discs
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cytodiffusion.data.mark import SOURCE, Mark, marked_png, read_mark, refuse_marked
from cytodiffusion.data.sample import HeldBytes, Sample
from cytodiffusion.data.split import read_split, split
from cytodiffusion.errors import DataError

MARK = Mark("pbc8", "ab" * 32, 7, "lymphocyte")
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
PIXELS = disc("lymphocyte", 0).transpose(2, 0, 1)
PLAIN = Sample("real.png", "lymphocyte", source=HeldBytes(b""))


def with_marked(folder: Path, each: int = 4, drawn: int = 3) -> Path:
    """Real discs of every class, and synthetic ones of the last."""
    write_discs(folder, each=each)
    for i in range(drawn):
        picture = disc(CLASSES[-1], 900 + i).transpose(2, 0, 1)
        (folder / CLASSES[-1] / f"drawn{i}.png").write_bytes(marked_png(picture, MARK))
    return folder


@pytest.mark.parametrize("label", ["lymphocyte", "a & b", 'say "cell"', "<b>", "größe"])
def test_what_is_marked_is_read(label: str) -> None:
    mark = Mark("m", "00", 3, label)
    data = marked_png(PIXELS, mark)
    assert read_mark(data) == mark
    with Image.open(io.BytesIO(data)) as image:
        assert (np.asarray(image) == PIXELS.transpose(1, 2, 0)).all()
        packet = ElementTree.fromstring(image.info["xmp"])  # well-formed, whatever the label
    (described,) = packet.iter(f"{RDF}Description")
    assert described.attrib[f"{IPTC}DigitalSourceType"] == SOURCE
    assert described.attrib["{urn:cytodiffusion:synthetic:1}label"] == label


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "TIFF"])
def test_the_mark_outlives_a_change_of_format(form: str) -> None:
    with Image.open(io.BytesIO(marked_png(PIXELS, MARK))) as image:
        again = io.BytesIO()
        packet = image.info["xmp"]
        if form == "TIFF":
            image.save(again, form, tiffinfo={700: packet})
        else:
            image.save(again, form, xmp=packet)
    assert read_mark(again.getvalue()) == MARK


def test_another_programs_mark_is_one() -> None:
    """What generators of images in general write: the source type and nothing of ours."""
    info, buffer = PngInfo(), io.BytesIO()
    info.add_itxt("XML:com.adobe.xmp", f'<x Iptc4xmpExt:DigitalSourceType="{SOURCE}"/>')
    Image.fromarray(PIXELS.transpose(1, 2, 0).copy()).save(buffer, "PNG", pnginfo=info)
    assert read_mark(buffer.getvalue()) == Mark("", "", 0, "")


def test_a_real_image_has_none(tmp_path: Path) -> None:
    for path in write_discs(tmp_path, each=1).rglob("*.png"):
        assert read_mark(path.read_bytes()) is None
    assert read_mark(b"no image") is None


def test_refused_by_name() -> None:
    drawn = Sample("drawn.png", "lymphocyte", source=HeldBytes(marked_png(PIXELS, MARK)))
    refuse_marked([PLAIN])
    with pytest.raises(DataError, match=r"1 of these images are marked.*drawn\.png.*test data"):
        refuse_marked([PLAIN, drawn])


def test_a_split_has_them_in_train_alone() -> None:
    samples = [Sample(f"{i}.png", "a") for i in range(40)]
    drawn = {f"{i}.png" for i in range(0, 40, 4)}
    dealt = split(samples, synthetic=drawn)
    sides = {row.name: row.split for row in dealt}
    assert {sides[name] for name in drawn} == {"train"}
    real = [side for name, side in sides.items() if name not in drawn]
    assert [real.count(side) for side in ("train", "val", "test")] == [24, 3, 3]
    assert "10 images are marked as synthetic" in dealt.notes[-1]


def test_a_split_of_nothing_else_is_refused() -> None:
    samples = [Sample(f"{i}.png", "a") for i in range(4)]
    with pytest.raises(DataError, match="4 of 4 images"):
        split(samples, synthetic={sample.name for sample in samples})
    with pytest.raises(DataError, match="train"):
        split(samples, {"val": 0.5, "test": 0.5}, synthetic={"0.png"})


def test_data_split_and_check(tmp_path: Path) -> None:
    cells = with_marked(tmp_path / "cells")
    told = cli("data", "split", cells, "-o", tmp_path / "s.csv")
    assert told.code == 0, told.err
    assert "3 images are marked as synthetic" in told.err
    rows = read_split(tmp_path / "s.csv")
    assert {row.split for row in rows if "drawn" in row.name} == {"train"}
    assert len(rows) == 15
    found = cli("data", "check", cells, "--json").json
    assert found["synthetic"] == [f"{CLASSES[-1]}/drawn{i}.png" for i in range(3)]
