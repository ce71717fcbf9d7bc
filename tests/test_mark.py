"""A synthetic image says so, to Pillow too, and is refused wherever a model would be tested on it."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import CLASSES, Tiny, cli, contents, disc, tiny_model, write_discs
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cytodiffusion.cli import few
from cytodiffusion.cli.console import Console
from cytodiffusion.cli.labs import Bench, list_labs
from cytodiffusion.cli.strangers import list_foreign
from cytodiffusion.cli.train import split_samples
from cytodiffusion.data.images import decode
from cytodiffusion.data.mark import SOURCE, Mark, marked_png, read_mark, refuse_marked
from cytodiffusion.data.sample import HeldBytes, Sample
from cytodiffusion.data.split import read_split, split
from cytodiffusion.data.taxonomy import Taxonomy
from cytodiffusion.errors import DataError, UnreadableImage
from cytodiffusion.train.settings import make_settings

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


# --- where a model is tested, and where one is trained -------------------------------------------

DRAWN = [f"{CLASSES[-1]}/drawn{i}.png" for i in range(3)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_model(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_marked(tmp_path_factory.mktemp("mark") / "mixed", each=6)


def refused(out: Path, *words: object) -> str:
    """The line with which they are refused; nothing is written."""
    told = cli(*words, "-o", out, "--device", "cpu")
    assert told.code == 2, told.err
    assert not out.exists() or contents(out) == {}
    assert f"3 of these images are marked as synthetic, first '{DRAWN[0]}'" in told.complaint
    return told.complaint


def test_evaluate_refuses_them(tiny: Tiny, mixed: Path, tmp_path: Path) -> None:
    words = ("evaluate", mixed, "-m", tiny.bundle)
    assert "test data" in refused(tmp_path / "out", *words)
    real = [path for path in sorted(mixed.rglob("*.png")) if "drawn" not in path.name]
    lines = [f"{path.relative_to(mixed)},{path.parent.name},test\n" for path in real]
    lines += [f"{name},{CLASSES[-1]},train\n" for name in DRAWN]
    (tmp_path / "s.csv").write_text("path,label,split\n" + "".join(lines))
    refused(tmp_path / "out", *words, "--splits", tmp_path / "s.csv")
    told = cli(*words, "--splits", tmp_path / "s.csv", "--split", "test", "-o", tmp_path / "real",
               "--device", "cpu")  # fmt: skip
    assert told.code == 0, told.err


def test_models_calibrate_refuses_them(tiny: Tiny, mixed: Path, tmp_path: Path) -> None:
    words = ("models", "calibrate", mixed, "-m", tiny.bundle)
    assert "calibrate on" in refused(tmp_path / "b", *words)


def test_a_foreign_set_of_bench_shift_has_none(tiny: Tiny, mixed: Path, tmp_path: Path) -> None:
    words = ("bench", "shift", "--train", tiny.cells, "--foreign", mixed, "-m", tiny.bundle)
    refused(tmp_path / "out", *words)


def test_the_home_set_of_bench_shift_is_measured_without_them(tiny: Tiny, tmp_path: Path) -> None:
    source = with_marked(tmp_path / "in", each=12, drawn=20)
    bench = Bench(
        tmp_path, make_settings("tiny"), Taxonomy.load(), 0, "cpu", "torch", Console(False)
    )
    labs, _ = list_labs(bench, source, [tiny.cells], None, str(tiny.bundle))
    assert sum("drawn" in sample.name for sample in labs[0].parts["train"]) == 20
    assert labs[0].parts["val"]
    assert not any("drawn" in sample.name for sample in labs[0].parts["val"])


def test_train_is_not_calibrated_on_them(mixed: Path, tmp_path: Path) -> None:
    real = [path for path in sorted(mixed.rglob("*.png")) if "drawn" not in path.name]
    sides = {path: ("train", "val")[i % 2] for i, path in enumerate(real)}
    lines = [f"{p.relative_to(mixed)},{p.parent.name},{side}\n" for p, side in sides.items()]
    lines += [f"{name},{CLASSES[-1]},val\n" for name in DRAWN]
    (tmp_path / "s.csv").write_text("path,label,split\n" + "".join(lines))
    words = ("train", mixed, "--splits", tmp_path / "s.csv", "--preset", "tiny")
    assert "calibrate on" in refused(tmp_path / "run", *words)


def test_strangers_of_bench_anomaly_are_real(mixed: Path) -> None:
    with pytest.raises(DataError, match="3 of these images are marked as synthetic"):
        list_foreign([mixed])


@pytest.mark.parametrize("each", [6, 24])
def test_the_split_that_train_makes_has_them_in_train_alone(tmp_path: Path, each: int) -> None:
    """Of few cells, of which none are left to test on, and of more."""
    source = with_marked(tmp_path / "in", each=each, drawn=30)
    parts = split_samples(source, None, tmp_path, 0, Taxonomy.load(), Console(False))
    sides = {sample.name: side for side, found in parts.items() for sample in found}
    drawn = {name for name in sides if "drawn" in name}
    assert len(drawn) == 30
    assert {sides[name] for name in drawn} == {"train"}
    assert {row.split for row in read_split(tmp_path / "splits.csv") if row.name in drawn} == {
        "train"
    }
    real = [side for name, side in sides.items() if name not in drawn]
    assert len(real) == 3 * each
    assert bool(real.count("test")) is (each > 20)  # as without the drawn ones
    assert real.count("val") >= 6


def test_the_split_of_bench_low_data_has_them_in_train_alone(tmp_path: Path) -> None:
    source = with_marked(tmp_path / "in", each=8, drawn=20)
    train, test = few.list_cells(source, None, "test", 0, Taxonomy.load(), Console(False))
    assert sum("drawn" in sample.name for sample in train) == 20
    assert not [sample.name for sample in test if "drawn" in sample.name]
    assert len(test) == 6


def test_bench_low_data_refuses_a_split_that_tests_on_them(mixed: Path, tmp_path: Path) -> None:
    names = sorted(path.relative_to(mixed).as_posix() for path in mixed.rglob("*.png"))
    lines = [
        f"{name},{name.partition('/')[0]},{('train', 'test')[i % 2]}\n"
        for i, name in enumerate(names)
    ]
    (tmp_path / "s.csv").write_text("path,label,split\n" + "".join(lines))
    with pytest.raises(DataError, match="marked as synthetic"):
        few.list_cells(mixed, tmp_path / "s.csv", "test", 0, Taxonomy.load(), Console(False))


def test_a_picture_too_large_to_open_has_no_mark() -> None:
    """Pillow refuses it with an error that is none of its others."""
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(head)) + chunk
    png += struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 0) + b"IEND\xaeB`\x82"
    assert read_mark(png) is None
    with pytest.raises(UnreadableImage, match="crop single cells first"):
        decode(png)
