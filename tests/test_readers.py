"""Every format, built here with known images; every way each can be damaged."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cytodiffusion.data import archives, sample
from cytodiffusion.data.boxes import crop
from cytodiffusion.data.readers import Sample, read_dataset
from cytodiffusion.errors import DataError, UnreadableImage

DATA = Path(os.environ.get("CYTODIFFUSION_DATA") or Path(__file__).parents[2] / "shared" / "data")
PBC = DATA / "pbc"
real = pytest.mark.skipif(
    not (PBC / "splits.csv").exists(),
    reason=f"no real cells at {DATA}; set CYTODIFFUSION_DATA to the folder that holds pbc/",
)


def image_bytes(shade: int = 0, size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 10, 20)).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def put(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def facts(samples: list[Sample]) -> list[tuple[str, str | None]]:
    return [(sample.name, sample.label) for sample in samples]


CELLS: dict[str, bytes | str] = {
    "mono/a.png": image_bytes(1),
    "mono/b.PNG": image_bytes(2),
    "neutro/deeper/c.webp": image_bytes(3),
}
CELL_FACTS = [("mono/a.png", "mono"), ("mono/b.PNG", "mono"), ("neutro/deeper/c.webp", "neutro")]


def test_class_folders(tmp_path: Path) -> None:
    samples = read_dataset(put(tmp_path, CELLS))
    assert facts(samples) == CELL_FACTS
    assert [sample.read() for sample in samples] == list(CELLS.values())
    assert facts(read_dataset(str(tmp_path))) == CELL_FACTS


def test_what_is_passed_over_and_what_is_named(tmp_path: Path) -> None:
    papers = ["splits.csv", "README.md", "LICENSE", "x.json", "mono/notes.txt", "mono/Thumbs.db"]
    hidden = [".DS_Store", "mono/.a.png", ".cache/x.png", "__MACOSX/mono/a.png"]
    put(tmp_path, {**CELLS, **dict.fromkeys([*papers, *hidden], "?"), "mono/junk.docx": "?"})
    assert facts(read_dataset(tmp_path)) == [
        *CELL_FACTS[:2],
        ("mono/junk.docx", "mono"),
        *CELL_FACTS[2:],
    ]


def test_flat_folder_and_single_image(tmp_path: Path) -> None:
    put(tmp_path, {"b.png": image_bytes(2), "a.png": image_bytes(1), "c.tmp": "junk"})
    assert facts(read_dataset(tmp_path)) == [("a.png", None), ("b.png", None), ("c.tmp", None)]
    (single,) = read_dataset(tmp_path / "a.png")
    assert (single.name, single.label, single.read()) == ("a.png", None, image_bytes(1))


def test_split_folders(tmp_path: Path) -> None:
    put(tmp_path, {"train/mono/a.png": "", "Validation/mono/b.png": "", "test/neutro/c.png": ""})
    samples = read_dataset(tmp_path)
    assert [(s.label, s.split) for s in samples] == [
        ("mono", "val"),
        ("neutro", "test"),
        ("mono", "train"),
    ]
    assert facts(read_dataset(tmp_path, split="test")) == [("test/neutro/c.png", "neutro")]


def test_an_image_beside_split_folders_makes_no_classes_of_them(tmp_path: Path) -> None:
    put(tmp_path, {"train/mono/a.png": "", "val/mono/b.png": "", "val/c.png": "", "d.png": ""})
    samples = read_dataset(tmp_path)
    assert [(s.name, s.label, s.split) for s in samples] == [
        ("d.png", None, None),
        ("train/mono/a.png", "mono", "train"),
        ("val/c.png", None, "val"),
        ("val/mono/b.png", "mono", "val"),
    ]


def test_a_folder_beside_those_of_splits_is_refused(tmp_path: Path) -> None:
    """It would make classes of `train` and `test`."""
    put(tmp_path, {"train/mono/a.png": "", "test/mono/b.png": "", "docs/fig.png": ""})
    with pytest.raises(DataError, match="lie others: docs"):
        read_dataset(tmp_path)


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    put(tmp_path / "store", CELLS)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mono").symlink_to(tmp_path / "store" / "mono")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    assert facts(read_dataset(tmp_path / "set")) == CELL_FACTS[:2]


def test_nothing_is_decoded_or_opened_when_listing(tmp_path: Path) -> None:
    put(tmp_path, {"mono/a.png": "x"})
    (tmp_path / "mono" / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "mono" / "pipe.png")
    first, gone, pipe = read_dataset(tmp_path)
    assert first.read() == b"x"
    with pytest.raises(UnreadableImage, match="missing"):
        gone.read()
    with pytest.raises(UnreadableImage, match="not a regular file"):
        pipe.read()


def test_a_huge_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "MAX_BYTES", 10)
    (big, *_) = read_dataset(put(tmp_path, CELLS))
    with pytest.raises(UnreadableImage, match="larger than"):
        big.read()


@pytest.mark.parametrize(
    "text",
    [
        "path,label,patient,slide,split\nmono/a.png,M,p1,s1,train\n./neutro\\deeper\\c.webp,N,,,\n",
        "\ufeffPath;Class;patient;slide;split\r\nmono/a.png;M;p1;s1;train\r\n"
        "neutro/deeper/c.webp;N;;;\r\n",
    ],
    ids=["commas", "spreadsheet"],
)
def test_csv_manifest(tmp_path: Path, text: str) -> None:
    put(tmp_path, {**CELLS, "manifest.csv": text})
    for path in (tmp_path, tmp_path / "manifest.csv"):
        one, two = read_dataset(path)
        assert one == Sample("mono/a.png", "M", "p1", "s1", "train")
        assert two == Sample("neutro/deeper/c.webp", "N")
        assert (one.read(), two.read()) == (CELLS["mono/a.png"], CELLS["neutro/deeper/c.webp"])


def test_jsonl_manifest(tmp_path: Path) -> None:
    lines = [{"path": "mono/a.png", "label": 3, "patient": 7}, {"path": "none.png"}]
    text = "\n".join(map(json.dumps, lines)) + "\n\n"
    put(tmp_path, {**CELLS, "manifest.jsonl": text, "other.jsonl": text})
    for path in (tmp_path, tmp_path / "other.jsonl"):
        one, two = read_dataset(path)
        assert one == Sample("mono/a.png", "3", "7")
        assert two == Sample("none.png", None)
        with pytest.raises(UnreadableImage, match="missing"):
            two.read()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "", "no images"),
        ("m.csv", "name,label\nx,a\n", "Line 2 .* names no image; its columns are name, label"),
        ("m.csv", "path,label\nx,a\n,b\n", "Line 3"),
        ("m.csv", "path,label\nx,a\nx,b\n", "'x' twice"),
        ("m.csv", b"path,label\n\xff\xfe,a\n", "UTF-8"),
        ("m.jsonl", "{\n", "cannot be read"),
        ("m.jsonl", "[1]\n", "line 1 is not an object"),
        ("m.json", "{}", "not a COCO file"),
        ("m.parquet", "junk", "Parquet file .* cannot be read"),
        ("m.npz", "junk", "NPZ file .* cannot be read"),
        ("m.zip", "junk", "archive .* cannot be read"),
        ("m.tar.gz", "junk", "archive .* cannot be read"),
        ("m.docx", "junk", "not a data set"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | str, message: str) -> None:
    put(tmp_path, {name: content})
    with pytest.raises(DataError, match=message) as caught:
        read_dataset(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mono/closed", ".Trashes"])
def test_a_folder_that_may_not_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One that could hold cells is told; one that is passed over in any case is not."""
    put(tmp_path, {**CELLS, f"{name}/c.png": image_bytes(4)})
    scan = os.scandir

    def refuses(path: str) -> Any:
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuses)
    if name.startswith("."):
        assert facts(read_dataset(tmp_path)) == CELL_FACTS
        return
    with pytest.raises(DataError, match=r"mono/closed cannot be listed \(Permission denied\)"):
        read_dataset(tmp_path)


def test_names_that_are_no_text_can_be_written(tmp_path: Path) -> None:
    """JSON can hold half a character; a file with a byte that is no text is still found."""
    odd = os.fsdecode(b"caf\xe9.png")
    (tmp_path / odd).write_bytes(image_bytes(7))
    lines = [{"path": "\ud800.png", "label": "a\udfff"}, {"path": odd, "patient": "\ud800"}]
    put(tmp_path, {"x.jsonl": "\n".join(map(json.dumps, lines))})
    one, two = read_dataset(tmp_path / "x.jsonl")
    assert (one.name, one.label) == (r"\ud800.png", r"a\udfff")
    assert (two.name, two.patient) == (r"caf\xe9.png", r"\ud800")
    assert two.read() == image_bytes(7)
    with pytest.raises(UnreadableImage):
        one.read()
    content = json.loads(coco([0, 0, 5, 5], "\ud800.png"))
    content["categories"][0]["name"] = "\ud800"
    put(tmp_path / "boxes", {"x.json": json.dumps(content)})
    boxes = read_dataset(tmp_path / "boxes")
    assert facts(boxes)[0] == (r"\ud800.png#11", r"\ud800")


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing at"):
        read_dataset(tmp_path / "none")
    with pytest.raises(DataError, match="holds no images"):
        read_dataset(tmp_path)
    put(tmp_path, {"notes.txt": "hello"})
    with pytest.raises(DataError, match="holds no images"):
        read_dataset(tmp_path)


SPLITS = "path,label,split\nneutro/deeper/c.webp,NEU,test\nmono/a.png,,train\n"


def test_splits_choose_name_and_order(tmp_path: Path) -> None:
    put(tmp_path, {**CELLS, "splits.csv": SPLITS})
    file = tmp_path / "splits.csv"
    samples = read_dataset(tmp_path, splits=file)
    assert [(s.name, s.label, s.split) for s in samples] == [
        ("neutro/deeper/c.webp", "NEU", "test"),
        ("mono/a.png", "mono", "train"),
    ]
    assert facts(read_dataset(tmp_path, splits=file, split="train")) == [("mono/a.png", "mono")]
    with pytest.raises(DataError, match="split 'val'; it has test, train"):
        read_dataset(tmp_path, splits=file, split="val")
    with pytest.raises(DataError, match="it names no splits"):
        read_dataset(tmp_path, split="val")


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    more = "mono/x.png,mono,test\nmono/y.png,mono,test\n"
    put(tmp_path, {**CELLS, "splits.csv": SPLITS + more})
    with pytest.raises(DataError, match=r"lists 2 images .* first: 'mono/x.png'"):
        read_dataset(tmp_path, splits=tmp_path / "splits.csv")
    assert len(read_dataset(tmp_path, splits=tmp_path / "splits.csv", split="train")) == 1


def write_parquet(
    path: Path, columns: dict[str, Any], header: dict[str, str] | None = None
) -> Path:
    table = pa.table(columns)
    if header:
        table = table.replace_schema_metadata(header)
    pq.write_table(table, path, row_group_size=2)
    return path


BLOBS = [image_bytes(shade) for shade in range(5)]


def test_parquet_of_bytes(tmp_path: Path) -> None:
    columns = {"image": BLOBS, "label": [0, 1, 2, 1, None], "patient": ["p", None, "q", "q", "q"]}
    path = write_parquet(tmp_path / "cells.parquet", columns)
    for where in (path, tmp_path):
        samples = read_dataset(where)
        assert [s.name for s in samples] == [f"cells.parquet#{i}" for i in range(5)]
        assert [s.label for s in samples] == ["0", "1", "2", "1", None]
        assert [s.patient for s in samples] == ["p", None, "q", "q", "q"]
        assert [s.read() for s in reversed(samples)] == BLOBS[::-1]


def test_a_parquet_file_that_was_changed_is_read_anew(tmp_path: Path) -> None:
    for time, blob in enumerate(BLOBS[:2]):
        path = write_parquet(tmp_path / "cells.parquet", {"image": [blob]})
        os.utime(path, (time, time))
        assert read_dataset(path)[0].read() == blob


def test_splits_of_tables_have_our_words(tmp_path: Path) -> None:
    words = ["train", "validation", "Test", "valid", None]
    path = write_parquet(tmp_path / "cells.parquet", {"image": BLOBS, "split": words})
    assert [s.split for s in read_dataset(path)] == ["train", "val", "test", "val", None]
    for asked in ("val", "validation", "valid"):
        assert len(read_dataset(path, split=asked)) == 2


def test_parquet_of_hugging_face(tmp_path: Path) -> None:
    images = [{"bytes": blob, "path": None} for blob in BLOBS]
    names = {"info": {"features": {"label": {"names": ["mono", "neutro"]}}}}
    columns = {"image": images, "label": [0, 1, 0, 1, 0], "name": list("abcde")}
    path = tmp_path / "cells.parquet"
    samples = read_dataset(write_parquet(path, columns, {"huggingface": json.dumps(names)}))
    assert facts(samples) == list(zip("abcde", ["mono", "neutro"] * 2 + ["mono"], strict=True))
    assert [s.read() for s in samples] == BLOBS


def test_bad_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"picture": BLOBS, "label": [0] * 5})
    with pytest.raises(DataError, match="no column `image` of image bytes; it has: picture, label"):
        read_dataset(path)
    with pytest.raises(DataError, match="repeats a name"):
        read_dataset(write_parquet(path, {"image": BLOBS, "name": ["a"] * 5}))
    (one, two) = read_dataset(write_parquet(path, {"image": [None, b"x"]}))
    assert two.read() == b"x"
    with pytest.raises(UnreadableImage, match="no image bytes"):
        one.read()


def test_medmnist(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 28, 28, 3)).astype(np.uint8) for n in (3, 2))
    path = tmp_path / "bloodmnist.npz"
    labels = {"train_labels": np.array([[0], [7], [3]]), "test_labels": np.array([1, 2])}
    np.savez(path, train_images=train, test_images=test, **labels)
    samples = read_dataset(path)
    assert [(s.name, s.label, s.split) for s in samples] == [
        ("train/0", "0", "train"),
        ("train/1", "7", "train"),
        ("train/2", "3", "train"),
        ("test/0", "1", "test"),
        ("test/1", "2", "test"),
    ]
    for sample_, image in zip(samples, [*train, *test], strict=True):
        assert np.array_equal(pixels(sample_.read()), image)
    assert len(read_dataset(path, split="test")) == 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "holds no images"),
        ({"images": np.zeros((2, 5, 5), np.float32)}, "must be uint8"),
        ({"images": np.zeros((2, 5, 5, 4), np.uint8)}, "must be uint8"),
        ({"images": np.zeros((2, 5, 5), np.uint8), "labels": np.zeros((2, 3))}, "one class each"),
        ({"images": np.zeros((2, 5, 5), np.uint8), "labels": np.zeros(3)}, "one class each"),
        ({"images": np.array([None])}, "cannot be read"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path / "x.npz")


def pack(path: Path, files: dict[str, bytes | str]) -> Path:
    contents = {k: v.encode() if isinstance(v, str) else v for k, v in files.items()}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


ARCHIVES = pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])


@ARCHIVES
@pytest.mark.parametrize("wrap", ["", "pbc/"])
def test_archive_of_class_folders(tmp_path: Path, name: str, wrap: str) -> None:
    extra = {"__MACOSX/pbc/a.png": "?", f"{wrap}.DS_Store": "?"}
    path = pack(tmp_path / name, {**{wrap + k: v for k, v in CELLS.items()}, **extra})
    samples = read_dataset(path)
    assert facts(samples) == CELL_FACTS
    assert [s.read() for s in samples] == list(CELLS.values())
    assert [s.read() for s in pickle.loads(pickle.dumps(samples))] == list(CELLS.values())
    assert [file.name for file in tmp_path.iterdir()] == [name]


@ARCHIVES
def test_archive_of_one_class_keeps_its_label(tmp_path: Path, name: str) -> None:
    path = pack(tmp_path / name, {"mono/a.png": "1", "mono/b.png": "2"})
    assert facts(read_dataset(path)) == [("mono/a.png", "mono"), ("mono/b.png", "mono")]


@ARCHIVES
def test_archive_of_other_formats(tmp_path: Path, name: str) -> None:
    manifest = "path,label\nmono/a.png,M\n../../secret.png,M\n"
    one, two = read_dataset(pack(tmp_path / name, {**CELLS, "manifest.csv": manifest}))
    assert (one.label, one.read()) == ("M", CELLS["mono/a.png"])
    with pytest.raises(UnreadableImage, match="missing"):
        two.read()
    parquet = write_parquet(tmp_path / "t.parquet", {"image": BLOBS, "label": [1] * 5})
    samples = read_dataset(pack(tmp_path / name, {"data/t.parquet": parquet.read_bytes()}))
    assert samples[0].name == "t.parquet#0" or samples[0].name == "data/t.parquet#0"
    assert [s.read() for s in samples] == BLOBS
    np.savez(tmp_path / "t.npz", train_images=np.zeros((2, 5, 5), np.uint8))
    samples = read_dataset(pack(tmp_path / name, {"t.npz": (tmp_path / "t.npz").read_bytes()}))
    assert [s.name for s in samples] == ["train/0", "train/1"]


@ARCHIVES
@pytest.mark.parametrize("evil", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "C:/e.png"])
def test_names_that_leave_the_archive(tmp_path: Path, name: str, evil: str) -> None:
    with pytest.raises(DataError, match="leaves the archive"):
        read_dataset(pack(tmp_path / name, {"mono/a.png": "1", evil: "2"}))


@ARCHIVES
def test_a_name_that_is_none(tmp_path: Path, name: str) -> None:
    """A file called "." would be the archive itself."""
    with pytest.raises(DataError, match=r"holds '\.'") as told:
        read_dataset(pack(tmp_path / name, {"mono/a.png": "1", ".": "2"}))
    assert "\n" not in str(told.value)


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 1000)
    monkeypatch.setattr(archives, "MAX_HELD", 5000)
    bomb: dict[str, bytes | str] = {"mono/a.png": b"0" * 10_000}
    for name in ("x.zip", "x.tar"):
        (only,) = read_dataset(pack(tmp_path / name, bomb))
        with pytest.raises(UnreadableImage, match="than"):
            only.read()
    with pytest.raises(DataError, match="holds more than"):
        read_dataset(pack(tmp_path / "x.tgz", bomb))


def test_damaged_archives(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.zip", {"mono/a.png": bytes(range(256)) * 4, "mono/b.png": "fine"})
    data = bytearray(path.read_bytes())
    data[45:60] = b"\0" * 15
    path.write_bytes(data)
    bad, good = read_dataset(path)
    assert good.read() == b"fine"
    with pytest.raises(UnreadableImage):
        bad.read()
    path = tmp_path / "y.tar.gz"
    path.write_bytes(gzip.compress(os.urandom(5000))[:3000])
    with pytest.raises(DataError, match="cannot be read"):
        read_dataset(path)
    path = pack(tmp_path / "z.tar", {"mono/a.png": "1" * 3000})
    (cut,) = read_dataset(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UnreadableImage, match="ends before"):
        cut.read()


def test_damaged_lzma(tmp_path: Path) -> None:
    """A tar.xz, a member of a zip, and an array of an NPZ file."""
    path = tmp_path / "x.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        info = tarfile.TarInfo("mono/a.png")
        info.size = 50_000
        tar.addfile(info, io.BytesIO(os.urandom(info.size)))
    data = bytearray(path.read_bytes())
    data[30_000:30_100] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(DataError, match="cannot be read"):
        read_dataset(path)
    np.save(tmp_path / "a.npy", np.zeros((9, 5, 5), np.uint8))
    for name, member in (("y.zip", "mono/a.png"), ("z.npz", "images.npy")):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_LZMA) as archive:
            archive.writestr(member, (tmp_path / "a.npy").read_bytes())
        damaged = bytearray((tmp_path / name).read_bytes())
        damaged[30 + len(member) : 30 + len(member) + 9] = b"\xff" * 9  # after the header
        (tmp_path / name).write_bytes(damaged)
    (bad,) = read_dataset(tmp_path / "y.zip")
    with pytest.raises(UnreadableImage, match="damaged in the archive"):
        bad.read()
    with pytest.raises(DataError, match="cannot be read"):
        read_dataset(tmp_path / "z.npz")


def test_a_zip_with_a_name_twice(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("mono/a.png", "1")
        archive.writestr("mono\\a.png", "2")
    with pytest.raises(DataError, match=r"holds 'mono/a\.png' twice"):
        read_dataset(tmp_path / "x.zip")


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("mono/passwd.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match="no images"):
        read_dataset(tmp_path / "x.tar")


FIELD = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)


def field_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(FIELD).save(buffer, "PNG")
    return buffer.getvalue()


def coco(box: list[float], picture: str = "f.png") -> str:
    return json.dumps(
        {
            "images": [{"id": 5, "file_name": picture}],
            "categories": [{"id": 2, "name": "mono"}],
            "annotations": [
                {"id": 11, "image_id": 5, "category_id": 2, "bbox": box},
                {"id": 12, "image_id": 5, "category_id": 2, "bbox": [0, 0, 60, 40]},
            ],
        }
    )


@pytest.mark.parametrize("place", ["f.png", "images/f.png"])
def test_coco(tmp_path: Path, place: str) -> None:
    put(tmp_path, {place: field_bytes(), "labels.json": coco([10, 20, 8, 4])})
    for path in (tmp_path, tmp_path / "labels.json"):
        one, two = read_dataset(path)
        assert facts([one, two]) == [(f"{place}#11", "mono"), (f"{place}#12", "mono")]
        assert np.array_equal(pixels(one.read()), FIELD[20:24, 10:18])
        assert np.array_equal(pixels(two.read()), FIELD)
    square = read_dataset(tmp_path, margin=0.5)[0]
    assert np.array_equal(pixels(square.read()), FIELD[16:28, 8:20])  # side 8 * 1.5, centre kept


def test_boxes_of_one_picture_are_of_one_slide_and_folders_of_splits_count(tmp_path: Path) -> None:
    files = {f"{part}/f.png": field_bytes() for part in ("train", "valid")}
    files |= {f"{part}/_annotations.coco.json": coco([1, 2, 3, 4]) for part in ("train", "valid")}
    put(tmp_path, files)
    found = [(s.slide, s.split) for s in read_dataset(tmp_path)]
    assert found == [("train/f.png", "train")] * 2 + [("valid/f.png", "val")] * 2


def test_voc_boxes_of_one_picture_are_of_one_slide(tmp_path: Path) -> None:
    put(tmp_path, {"f.png": field_bytes(), "f.xml": voc((11, 21, 18, 24))})
    assert [(s.slide, s.split) for s in read_dataset(tmp_path)] == [("f.png", None)]


def test_coco_in_a_zip(tmp_path: Path) -> None:
    files = {
        "set/train/f.png": field_bytes(),
        "set/train/_annotations.coco.json": coco([1, 2, 3, 4]),
    }
    one, _ = read_dataset(pack(tmp_path / "x.zip", files))
    assert np.array_equal(pixels(one.read()), FIELD[2:6, 1:4])


def test_bad_coco(tmp_path: Path) -> None:
    put(tmp_path, {"x.json": coco([1, 2, 3]), "f.png": field_bytes()})
    with pytest.raises(DataError, match="not whole"):
        read_dataset(tmp_path / "x.json")
    put(tmp_path, {"x.json": coco([1, 2, 3, 4], "gone.png")})
    with pytest.raises(UnreadableImage, match="missing"):
        read_dataset(tmp_path / "x.json")[0].read()
    for box in ([1, 2, 0, 4], [100, 2, 5, 4]):
        put(tmp_path, {"x.json": coco([float(edge) for edge in box])})
        with pytest.raises(UnreadableImage, match="box"):
            read_dataset(tmp_path / "x.json")[0].read()


def voc(box: tuple[object, object, object, object], name: str = "f.png") -> str:
    edges = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    inside = "".join(f"<{edge}>{value}</{edge}>" for edge, value in edges)
    return (
        f"<annotation><filename>{name}</filename>"
        f"<object><name>mono</name><bndbox>{inside}</bndbox></object></annotation>"
    )


@pytest.mark.parametrize("name", ["f.png", "renamed.jpg"])
def test_voc(tmp_path: Path, name: str) -> None:
    put(
        tmp_path,
        {"JPEGImages/f.png": field_bytes(), "Annotations/f.xml": voc((11, 21, 18, 24), name)},
    )
    (one,) = read_dataset(tmp_path)
    assert (one.name, one.label) == ("JPEGImages/f.png#0", "mono")
    assert np.array_equal(pixels(one.read()), FIELD[20:24, 10:18])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", "not XML"),
        (voc((1, 2, "x", 4)), "without a whole box"),
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><annotation/>", "entities"),
    ],
)
def test_bad_voc(tmp_path: Path, text: str, message: str) -> None:
    put(tmp_path, {"f.png": field_bytes(), "f.xml": text})
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path)


def test_a_crop_over_the_edge_repeats_the_last_pixels() -> None:
    cut = crop(FIELD, (-2, -1, 3, 4))
    assert cut.shape == (5, 5, 3)
    assert np.array_equal(cut[1:, 2:], FIELD[:4, :3])
    assert np.array_equal(cut[0], cut[1])
    assert np.array_equal(cut[:, 0], cut[:, 2])
    with pytest.raises(UnreadableImage, match="at most"):
        crop(FIELD, (0, 0, 1e9, 1e9))


@real
def test_pbc_is_a_class_folder_in_spite_of_its_tables() -> None:
    samples = read_dataset(PBC)
    assert len(samples) == 14140
    assert len({sample.label for sample in samples}) == 8
    assert not any(sample.name.endswith(".csv") for sample in samples)


@real
def test_pbc_splits() -> None:
    file = PBC / "splits.csv"
    sizes = [len(read_dataset(PBC, splits=file, split=name)) for name in ("train", "val", "test")]
    assert sizes == [10309, 1335, 2496]
    one = read_dataset(PBC, splits=file, split="val")[0]
    assert pixels(one.read()).shape == (180, 180, 3)
    with file.open(newline="") as lines:
        assert sum(1 for _ in csv.DictReader(lines)) == 14140
