"""The table of predictions: in the order of the input, the same however it came about."""

from __future__ import annotations

import csv
import dataclasses
import errno
import io
import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import CLASSES, Result, Tiny, cli, contents, disc, tiny_model, write_discs
from PIL import Image
from pyarrow import parquet

from cytodiffusion import predictions
from cytodiffusion.bundle import Model, load
from cytodiffusion.classify.classifier import Reading
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.data.sample import HeldBytes, Sample, png
from cytodiffusion.errors import LabelError, OutputError, SettingsError
from cytodiffusion.predictions import PART, Request, Row, Table, name_cells

COLUMNS = [
    "path", "sha256", "predicted", "confidence", *(f"prob_{name}" for name in CLASSES), "set",
    "anomaly", "anomaly_p", "flag", "trials", "passes", "milliseconds", "model", "problem",
]  # fmt: skip
NUMBERS = {"confidence", "anomaly", "anomaly_p", "passes", "milliseconds"} | {
    f"prob_{name}" for name in CLASSES
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_model(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Model:
    return load(tiny.bundle)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve discs, an empty file and a text that says it is a PNG."""
    folder = write_discs(tmp_path_factory.mktemp("cells"), each=4, first=50)
    (folder / "lymphocyte" / "51a.png").write_bytes(b"")
    (folder / "neutrophil" / "zz.png").write_text("not a picture")
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def timeless(rows: list[Row] | list[dict[str, str]]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "milliseconds"} for row in rows]


def name(tiny: Tiny, cells: Path, out: Path, *more: object) -> Result:
    return cli("predict", cells, "-m", tiny.bundle, "-o", out, "--device", "cpu", *more)


def named(model: Model, samples: list[Sample], **request: object) -> list[Row]:
    """Rows in the order of the samples: they come as they are done."""
    rows = {
        row["path"]: row for part in name_cells(model, samples, Request(**request)) for row in part
    }
    return [rows[sample.name] for sample in samples]


def assert_same(one: list[Row], other: list[Row]) -> None:
    """The same table to the last digit, times left out."""
    assert timeless(one) == timeless(other)


def stopped(*_: object, **__: object) -> None:
    """In the place of something that was cut before it could be done."""
    raise KeyboardInterrupt


class Calls:
    """Counts the cells that are measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from cytodiffusion.classify.measure import Measurement

        self.images, enter = 0, Measurement._enter

        def counted(*args):
            self.images += 1
            return enter(*args)

        monkeypatch.setattr(Measurement, "_enter", counted)


# --- the table -----------------------------------------------------------------------------------


def test_the_table(tiny: Tiny, cells: Path, tmp_path: Path) -> None:
    told = name(tiny, cells, tmp_path / "out")
    assert told.code == 1
    rows = rows_of(tmp_path / "out")
    assert list(rows[0]) == COLUMNS
    assert [row["path"] for row in rows] == [sample.name for sample in read_dataset(cells)]
    assert set(contents(tmp_path / "out")) == {
        "predictions.csv", "predictions.parquet", "report.html", "request.json",
    }  # fmt: skip
    read = [row for row in rows if row["flag"] != "unreadable"]
    assert (len(read), len(rows)) == (12, 14)
    for row in read:
        chances = {name: float(row[f"prob_{name}"]) for name in CLASSES}
        assert abs(sum(chances.values()) - 1) < 1e-5
        assert float(row["confidence"]) == max(chances.values()) == chances[row["predicted"]]
        assert set(row["set"].split("|")) <= set(CLASSES)
        assert 0 <= float(row["anomaly"]) <= 1
        assert 0 < float(row["anomaly_p"]) <= 1
        assert row["flag"] in ("ok", "uncertain", "anomalous")
        assert 1 <= int(row["trials"]) == float(row["passes"]) <= 8
        assert row["model"] == "run"
        assert float(row["milliseconds"]) > 0
        assert row["predicted"] == row["path"].split("/")[0]
    for row in rows:
        if row["flag"] == "unreadable":
            filled = {name for name in COLUMNS if row[name]}
            assert filled == {"path", "sha256", "flag", "model", "problem"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(row["problem"][:20] in page for row in rows if row["problem"])


def test_answers_can_be_restricted(tiny: Tiny, cells: Path, tmp_path: Path) -> None:
    name(tiny, cells, tmp_path / "out", "--classes", "lymphocyte, neutrophil")
    read = [row for row in rows_of(tmp_path / "out") if row["flag"] != "unreadable"]
    assert {row["predicted"] for row in read} == {"lymphocyte", "neutrophil"}
    told = name(tiny, cells, tmp_path / "other", "--classes", "lymphocyte,blast")
    assert "does not know the class 'blast'" in told.complaint
    assert not (tmp_path / "other").exists()


def test_rows_whose_request_is_lost_are_not_taken_over(
    tiny: Tiny, cells: Path, tmp_path: Path
) -> None:
    name(tiny, cells, tmp_path)
    (tmp_path / "request.json").unlink()
    before = (tmp_path / "predictions.csv").read_bytes()
    assert "delete " in name(tiny, cells, tmp_path, "--crop", "0.9").complaint
    assert (tmp_path / "predictions.csv").read_bytes() == before


def test_an_evaluation_is_not_written_over(tiny: Tiny, cells: Path, tmp_path: Path) -> None:
    cli("evaluate", cells, "-m", tiny.bundle, "-o", tmp_path, "--device", "cpu")
    assert "another command (evaluate; now predict)" in name(tiny, cells, tmp_path).complaint


def test_parquet_equals_csv(tiny: Tiny, cells: Path, tmp_path: Path) -> None:
    name(tiny, cells, tmp_path)
    table = parquet.read_table(tmp_path / "predictions.parquet")
    assert table.column_names == COLUMNS
    for field in table.schema:
        wanted = pa.float64() if field.name in NUMBERS else pa.string()
        assert field.type == (pa.int64() if field.name == "trials" else wanted), field.name
    for one, other in zip(table.to_pylist(), rows_of(tmp_path), strict=True):
        for column in COLUMNS:
            text, value = other[column], one[column]
            if value is None:
                assert text == ""
            else:
                assert (text if isinstance(value, str) else float(text)) == value


def test_small_probabilities_are_not_rounded_to_nothing(
    model: Model, cells: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A right class told 4e-7 costs 14.7 nats; told 0 it would cost as many as one cares to say."""
    read = predictions._read

    def sharp(*words: object) -> Reading:
        reading = read(*words)
        told = np.tile([4.1234567e-7, 1e-3, 1 - 1e-3 - 4.1234567e-7], (len(reading.anomaly), 1))
        return dataclasses.replace(reading, probabilities=told)

    monkeypatch.setattr(predictions, "_read", sharp)
    samples = [s for s in read_dataset(cells) if s.name.startswith("neutrophil/5")]
    for row in named(model, samples):
        assert [row[f"prob_{name}"] for name in CLASSES] == [4.12346e-7, 1e-3, 0.999]


def test_unreadable_rows_say_why(model: Model, cells: Path) -> None:
    rows = {row["path"]: row for row in named(model, read_dataset(cells))}
    assert rows["lymphocyte/51a.png"]["problem"] == "the file is empty"
    assert rows["neutrophil/zz.png"]["problem"] == "not an image in a known format"
    assert rows["lymphocyte/51a.png"]["flag"] == "unreadable"


def test_nothing_but_unreadable_images(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"")
    told = name(tiny, tmp_path / "in", tmp_path / "out", "--json")
    assert told.code == 1
    assert told.json["flags"] == {"unreadable": 1}
    assert [row["flag"] for row in rows_of(tmp_path / "out")] == ["unreadable"]


@pytest.mark.parametrize("batch", [1, 7, 32])
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_and_workers_change_nothing(
    model: Model, cells: Path, batch: int, workers: int
) -> None:
    samples = read_dataset(cells)
    wanted = named(model, samples, budget="full", batch=14, workers=1)
    found = named(model, samples, budget="full", batch=batch, workers=workers)
    assert_same(wanted, found)


def test_the_order_of_the_input_changes_no_answer(model: Model, cells: Path) -> None:
    samples = read_dataset(cells)
    wanted = {row["path"]: row for row in named(model, samples, budget="paper", batch=3)}
    back = named(model, samples[::-1], budget="paper", batch=5)
    assert [row["path"] for row in back] == [sample.name for sample in samples[::-1]]
    for row in back:
        assert row["predicted" if row["flag"] != "unreadable" else "flag"] == (
            wanted[row["path"]].get("predicted") or "unreadable"
        )
        if row["flag"] != "unreadable":
            assert row["trials"] == wanted[row["path"]]["trials"]
            assert row["confidence"] == wanted[row["path"]]["confidence"]


def test_restricted_answers_are_rescaled(model: Model, cells: Path) -> None:
    samples = [s for s in read_dataset(cells) if s.name.startswith("neutrophil/5")]
    two = ("neutrophil", "eosinophil")
    whole, part = named(model, samples), named(model, samples, answers=two)
    for one, other in zip(whole, part, strict=True):
        sums = sum(one[f"prob_{name}"] for name in two)
        for name_ in two:
            assert other[f"prob_{name_}"] == pytest.approx(one[f"prob_{name_}"] / sums, rel=1e-5)
        assert "prob_lymphocyte" not in other
        assert set(other["set"].split("|")) <= set(two) | {""}
        assert other["anomaly"] == one["anomaly"]


def test_a_ruled_out_class_leaves_the_others_a_sum_of_one(model: Model, cells: Path) -> None:
    """Neutrophils asked whether they are eosinophil or lymphocyte."""
    samples = [s for s in read_dataset(cells) if s.name.startswith("neutrophil/5")]
    for row in named(model, samples, answers=("lymphocyte", "eosinophil")):
        assert row["predicted"] != "neutrophil"
        assert row["prob_lymphocyte"] + row["prob_eosinophil"] == pytest.approx(1, abs=2e-6)


@pytest.mark.parametrize("coverage", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_a_coverage_that_is_none(coverage: float) -> None:
    with pytest.raises(SettingsError, match="Coverage must lie between 0 and 1"):
        Request(coverage=coverage)


def test_an_answer_given_twice() -> None:
    with pytest.raises(LabelError, match="named twice"):
        Request(answers=("neutrophil", "neutrophil"))


# --- run again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [1, 5, 9])
def test_cut_and_run_again(
    tiny: Tiny, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    name(tiny, cells, tmp_path / "whole")
    append, written = Table.append, []

    def killed(table: Table, rows: list[Row]) -> None:
        append(table, rows[: done - len(written)])
        written.extend(rows[: done - len(written)])
        if len(written) >= done:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Table, "append", killed)
        told = name(tiny, cells, tmp_path / "cut")
    assert told.code == 130
    assert "Run the same command again" in told.err
    assert not (tmp_path / "cut" / "predictions.csv").exists()
    calls = Calls(monkeypatch)
    again = name(tiny, cells, tmp_path / "cut")
    assert again.code == 1
    assert f"{done} cells are already in" in again.err
    assert calls.images == 12 - done
    assert_same(rows_of(tmp_path / "cut"), rows_of(tmp_path / "whole"))
    assert not (tmp_path / "cut" / PART).exists()


def test_run_again_when_done(
    tiny: Tiny, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is computed; every file is the same, times included."""
    name(tiny, cells, tmp_path)
    before, calls = contents(tmp_path), Calls(monkeypatch)
    assert name(tiny, cells, tmp_path).code == 1
    assert calls.images == 0
    assert contents(tmp_path) == before


def test_more_cells_than_before(
    tiny: Tiny, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = Path(shutil.copytree(cells, tmp_path / "in"))
    extra = (some / "eosinophil" / "50.png").read_bytes()
    (some / "eosinophil" / "50.png").unlink()
    name(tiny, some, tmp_path / "out")
    (some / "eosinophil" / "50.png").write_bytes(extra)
    calls = Calls(monkeypatch)
    name(tiny, some, tmp_path / "out")
    assert calls.images == 1
    name(tiny, cells, tmp_path / "whole")
    assert_same(rows_of(tmp_path / "out"), rows_of(tmp_path / "whole"))


def test_a_changed_image_is_named_anew(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the run was cut after that, and the image changed back."""
    folder = write_discs(tmp_path / "in", each=1)
    one = folder / "eosinophil" / "00.png"
    first = one.read_bytes()
    name(tiny, folder, tmp_path / "out")
    original = rows_of(tmp_path / "out")
    one.write_bytes(png(disc("lymphocyte", 77)))
    calls = Calls(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Table, "finish", stopped)
        name(tiny, folder, tmp_path / "out")
    assert calls.images == 1
    one.write_bytes(first)
    name(tiny, folder, tmp_path / "out")
    assert timeless(rows_of(tmp_path / "out")) == timeless(original)
    one.write_bytes(png(disc("lymphocyte", 77)))
    name(tiny, folder, tmp_path / "out")
    found = rows_of(tmp_path / "out")[0]
    assert found["predicted"] == "lymphocyte"
    assert found["sha256"] != original[0]["sha256"]


def test_an_unreadable_image_is_tried_again(tiny: Tiny, tmp_path: Path) -> None:
    folder = write_discs(tmp_path / "in", each=1)
    one = folder / "eosinophil" / "00.png"
    good = one.read_bytes()
    one.write_bytes(good[: len(good) // 2])
    assert name(tiny, folder, tmp_path / "out").code == 1
    one.write_bytes(good)
    assert name(tiny, folder, tmp_path / "out").code == 0
    assert "unreadable" not in {row["flag"] for row in rows_of(tmp_path / "out")}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (["--budget", "fast"], "another budget (balanced; now fast) (see"),
        (["--crop", "0.7"], "another crop (1.0; now 0.7) (see"),
        (["--coverage", "0.8"], "another coverage (0.95; now 0.8) (see"),
        (
            ["--prior", "uniform", "--match", "light"],
            "another match (nothing; now light), prior (see",
        ),
    ],
    ids=str,
)
def test_another_request_is_refused(
    tiny: Tiny, cells: Path, tmp_path: Path, other: list[str], said: str
) -> None:
    name(tiny, cells, tmp_path)
    before = contents(tmp_path)
    told = name(tiny, cells, tmp_path, *other)
    assert told.code == 2
    assert said in told.complaint
    assert contents(tmp_path) == before


def test_another_input_is_refused(tiny: Tiny, cells: Path, tmp_path: Path) -> None:
    """Its rows would take the place of the first ones, which stay, times included."""
    other = write_discs(tmp_path / "other", each=1, first=70)
    name(tiny, cells, tmp_path / "out")
    before = contents(tmp_path / "out")
    told = name(tiny, other, tmp_path / "out")
    assert told.code == 2
    assert "another input" in told.complaint
    assert contents(tmp_path / "out") == before


def test_another_way_to_the_same_input_is_the_same_input(
    tiny: Tiny, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name(tiny, cells, tmp_path / "out")
    (tmp_path / "link").symlink_to(cells)
    monkeypatch.chdir(cells.parent)
    calls = Calls(monkeypatch)
    for way in (Path(cells.name), tmp_path / "link"):
        assert name(tiny, way, tmp_path / "out").code == 1  # two images cannot be read
    assert calls.images == 0


def test_another_model_of_the_same_name_is_refused(
    tiny: Tiny, model: Model, cells: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    folder = tiny.copy(tmp_path / "b")
    sums = json.loads((folder / "checksums.json").read_text())
    sums["model.safetensors"] = "0" * 64
    (folder / "checksums.json").write_text(json.dumps(sums))
    Table(tmp_path / "out", Request(), model).begin()
    with pytest.raises(OutputError):
        Table(tmp_path / "out", Request(), replace(model, folder=folder)).begin()


@pytest.mark.parametrize("keep", [3, 40, -30, -3, -2])
def test_a_torn_last_line(
    tiny: Tiny, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    """Cut anywhere, even within the last column or between the two bytes of a letter."""
    folder = Path(shutil.copytree(cells, tmp_path / "in"))
    (folder / "neutrophil" / "50.png").rename(folder / "neutrophil" / "é,\u00e9.png")
    name(tiny, folder, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Table, "finish", stopped)
        name(tiny, folder, tmp_path / "out")
    part = tmp_path / "out" / PART
    *lines, last = part.read_bytes().splitlines(keepends=True)
    for torn in (last[:keep], '"neutrophil/é'.encode()[:-1]):
        part.write_bytes(b"".join(lines) + torn)
        with monkeypatch.context() as patch:
            calls = Calls(patch)
            patch.setattr(Table, "finish", stopped)
            name(tiny, folder, tmp_path / "out")
            assert calls.images == 1
            name(tiny, folder, tmp_path / "out")
            assert calls.images == 1  # and the row it added was whole
    name(tiny, folder, tmp_path / "out")
    assert_same(rows_of(tmp_path / "out"), rows_of(tmp_path / "whole"))


@pytest.mark.parametrize("left", [b"", b"path,sha2"])
def test_a_torn_heading(tiny: Tiny, cells: Path, tmp_path: Path, left: bytes) -> None:
    name(tiny, cells, tmp_path / "whole")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / PART).write_bytes(left)
    assert name(tiny, cells, tmp_path / "out").code == 1
    assert_same(rows_of(tmp_path / "out"), rows_of(tmp_path / "whole"))


@pytest.mark.parametrize("text", ["", '{"model": "ru'])
def test_a_torn_request_is_refused_with_a_line(
    tiny: Tiny, cells: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "request.json").write_text(text)
    assert "request.json" in name(tiny, cells, tmp_path).complaint


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "path,sha256,flag,trials\nx,y,ok,many\n", "\x00"])
def test_a_foreign_table_is_refused_with_a_line(
    tiny: Tiny, cells: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "predictions.csv").write_text(text)
    assert "not a table that this program wrote" in name(tiny, cells, tmp_path).complaint
    assert (tmp_path / "predictions.csv").read_text() == text


# --- names ---------------------------------------------------------------------------------------


def test_odd_names(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    good = png(disc("neutrophil", 1))
    for odd in (b'a,b "c".png', b"new\nline.png", "ünïcode 细胞.png".encode(), b"latin \xe9.png"):
        Path(os.fsdecode(os.path.join(os.fsencode(folder), odd))).write_bytes(good)  # noqa: PTH118
    told = name(tiny, folder, tmp_path / "out")
    assert told.code == 0, told.err
    paths = [row["path"] for row in rows_of(tmp_path / "out")]
    wanted = ['a,b "c".png', "new\nline.png", "ünïcode 细胞.png", r"latin \xe9.png"]
    assert sorted(paths) == sorted(wanted)
    again = name(tiny, folder, tmp_path / "out")
    assert (again.code, "4 cells are already in" in again.err) == (0, True)


# --- a folder that cannot be written -------------------------------------------------------------


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_the_end_keeps_what_was_done(
    tiny: Tiny, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in ("pa_csv.write_csv", "parquet.write_table"):
        with monkeypatch.context() as patch:
            patch.setattr(f"cytodiffusion.predictions.{step}", full_disk)
            told = name(tiny, cells, tmp_path)
        assert told.code == 2
        assert "No space left on device" in told.complaint
        assert "run again to go on" in told.complaint
    calls = Calls(monkeypatch)
    assert name(tiny, cells, tmp_path).code == 1
    assert calls.images == 0
    assert len(rows_of(tmp_path)) == 14


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=repr)
def test_nothing_half_written_stays(
    tiny: Tiny, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Cut in the middle of the table, or of the request."""

    def cut(table: object, path: Path) -> None:
        path.write_text("half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("cytodiffusion.predictions.pa_csv.write_csv", cut)
        assert name(tiny, cells, tmp_path / "out").code in (2, 130)
    assert set(contents(tmp_path / "out")) == {"request.json", PART}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        assert name(tiny, cells, tmp_path / "new").code == 2
    assert contents(tmp_path / "new") == {}


def test_a_full_disk_half_way(
    tiny: Tiny, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third row is torn by it; the first two are kept."""
    name(tiny, cells, tmp_path / "whole")
    append = Table.append

    def fill(table: Table, rows: list[Row]) -> None:
        append(table, rows[:3])
        data = table.part.read_bytes()
        table.part.write_bytes(data[:-20])
        with predictions.writing_to(table.folder):
            full_disk()

    with monkeypatch.context() as patch:
        patch.setattr(Table, "append", fill)
        told = name(tiny, cells, tmp_path / "out")
    assert told.code == 2
    assert "No space left on device" in told.complaint
    calls = Calls(monkeypatch)
    name(tiny, cells, tmp_path / "out")
    assert calls.images == 10
    assert_same(rows_of(tmp_path / "out"), rows_of(tmp_path / "whole"))


def test_a_file_that_may_not_grow(tiny: Tiny, cells: Path, tmp_path: Path) -> None:
    """No simulation: the system refuses bytes past a limit, in the middle of a row."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        told = name(tiny, cells, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told.code == 2
    assert "File too large" in told.complaint
    part = (tmp_path / PART).read_bytes()
    assert len(part) == 1500
    again = name(tiny, cells, tmp_path)
    done = part.count(b"\n") - 1
    assert done > 3
    assert f"{done} cells are already in" in again.err
    assert len(rows_of(tmp_path)) == 14


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_read_only_folder(tiny: Tiny, cells: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(stat.S_IRUSR | stat.S_IXUSR)
    told = name(tiny, cells, tmp_path / "out")
    assert told.code == 2
    assert "Permission denied" in told.complaint


def test_a_folder_that_turns_read_only_keeps_what_was_done(
    tiny: Tiny, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("cytodiffusion.predictions.parquet.write_table", refuse)
        told = name(tiny, cells, tmp_path)
    assert told.code == 2
    assert "cannot be written to (Permission denied)" in told.complaint
    calls = Calls(monkeypatch)
    name(tiny, cells, tmp_path)
    assert calls.images == 0


def test_out_is_a_file(tiny: Tiny, cells: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        told = name(tiny, cells, out)
        assert told.code == 2
        assert "cannot be written to" in told.complaint
    assert (tmp_path / "file").read_text() == "mine"


# --- what a sample can be ------------------------------------------------------------------------


def test_every_form_of_the_same_cells_gives_the_same_answers(
    model: Model, cells: Path, tmp_path: Path
) -> None:
    """A folder, a zip of it, and bytes in memory."""
    from_folder = named(model, read_dataset(cells))
    archive = shutil.make_archive(str(tmp_path / "cells"), "zip", cells)
    assert timeless(named(model, read_dataset(archive))) == timeless(from_folder)
    held = [Sample(s.name, None, source=HeldBytes(s.read())) for s in read_dataset(cells)]
    assert timeless(named(model, held)) == timeless(from_folder)


def test_the_mode_of_an_image_does_not_matter(model: Model) -> None:
    """RGB, RGBA without transparency, and a palette of few colours: the same pixels."""
    flat = Image.fromarray(disc("neutrophil", 3)).quantize(16)
    rows = []
    for mode in ("P", "RGB", "RGBA"):
        buffer = io.BytesIO()
        flat.convert(mode).save(buffer, "PNG")
        rows += named(model, [Sample("x", None, source=HeldBytes(buffer.getvalue()))])
    assert {row["predicted"] for row in rows} == {"neutrophil"}
    assert len({row["confidence"] for row in rows}) == 1
