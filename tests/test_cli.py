"""What the commands say, what they write, and the exit codes: 0 done, 1 some unread, 2 wrong call."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from helpers import (
    BUDGETS,
    CLASSES,
    TINY,
    Result,
    Tiny,
    cli,
    contents,
    disc,
    tiny_model,
    write_discs,
)
from PIL import Image
from typer.testing import CliRunner

from cytodiffusion import __version__, release
from cytodiffusion import bundle as bundles
from cytodiffusion.classify.classifier import Classifier
from cytodiffusion.cli.console import call_of
from cytodiffusion.cli.main import app, main
from cytodiffusion.data.load import look_of
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.data.sample import png
from cytodiffusion.files import alone

CPU = ("--device", "cpu")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_model(tmp_path_factory.getbasetemp())


@pytest.fixture
def shipped(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model in the place of the shipped ones."""
    zoo = tmp_path / "zoo"
    tiny.copy(zoo / "discs")
    monkeypatch.setattr(bundles, "ZOO", zoo)
    return zoo


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def leaves(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every verb with its command."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield words, command
    for name in inner or ():
        yield from leaves(inner[name], (*words, name))


VERBS = dict(leaves(typer.main.get_command(app)))


# --- every verb ----------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_takes_the_common_options(verb: tuple[str, ...]) -> None:
    options = {option for parameter in VERBS[verb].params for option in parameter.opts}
    assert {"--json", "--seed", "--device"} <= options
    assert VERBS[verb].help, "say in one line what it does"


def test_the_verbs_of_the_design_that_are_there() -> None:
    names = {" ".join(verb) for verb in VERBS}
    wanted = {"demo", "data check", "data split", "train", "predict", "evaluate", "doctor"}
    assert wanted | {"models list", "models show", "models verify"} <= names


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["predict"],
        ["predict", "a", "b", "-o", "c"],
        ["predict", "--budge", "fast"],
        ["predict", "a", "-o", "b", "--crop", "0"],
        ["predict", "a", "-o", "b", "--crop", "wide"],
        ["train", "a", "-o", "b", "--seed", "-1"],
        ["data"],
        ["data", "split", "a", "--train", "2"],
        ["models", "verify", "--seed", "x"],
    ],
    ids=" ".join,
)
def test_a_call_that_typer_refuses(words: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = cli(*words)
    assert told.code == 2
    assert "Traceback" not in told.out + told.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "no\nsuch", "-o", "out"],
        ["evaluate", "nowhere", "-o", "out"],
        ["train", "nowhere", "-o", "out", "--set=step=5"],
        ["data", "check", "nowhere"],
        ["models", "show", "nowhere"],
        ["models", "shew"],
        ["predict", "-o", "out"],
        ["predict", "nowhere", "--budgets", "fast"],
        ["predict", "nowhere", "--seed", "-1"],
    ],
    ids=str,
)
def test_an_error_is_json_where_json_was_asked_for(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line on standard error with the one key `error`: what is said without --json."""
    monkeypatch.chdir(tmp_path)
    plainly, told = cli(*words), cli(*words, "--json")
    assert (told.code, told.out) == (2, "")
    (line,) = told.err.splitlines()
    assert json.loads(line) == {"error": plainly.complaint.removeprefix("Error: ")}
    assert list(tmp_path.iterdir()) == []


FULL = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:115] DefaultCPUAllocator: not enough memory: you"
                 " tried to allocate 400000000000 bytes."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate"
                 " memory: you tried to allocate 4 bytes. Error code 12 (Cannot allocate memory)"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
]  # fmt: skip


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_full_memory_is_told_in_one_line(
    error: Exception, as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second and third in the words of torch 1.8 to 2.9 on Linux, the last in those of a GPU."""

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("cytodiffusion.data.readers.read_dataset", full)
    told = cli("predict", tmp_path, "-o", tmp_path / "out", *["--json"] * as_json)
    assert (told.code, told.out) == (2, "")
    (line,) = told.err.splitlines()
    said = json.loads(line)["error"] if as_json else told.complaint
    assert "memory is full" in said


def test_torch_says_that_the_memory_is_full_in_words_that_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No simulation: no machine has so many bytes."""
    monkeypatch.setattr(
        "cytodiffusion.data.readers.read_dataset", lambda *_, **__: torch.empty(2**60)
    )
    told = cli("predict", tmp_path, "-o", tmp_path / "out")
    assert told.code == 2
    assert "memory is full" in told.complaint


def test_another_error_is_a_bug_and_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("cytodiffusion.data.readers.read_dataset", wrong)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        cli("predict", tmp_path, "-o", tmp_path / "out")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_fault_of_the_program_has_a_code_of_its_own(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """1 means that the rest was done."""

    def wrong() -> None:
        raise RuntimeError("mat1 and mat2")

    monkeypatch.setattr("cytodiffusion.cli.main.run", wrong)
    monkeypatch.setattr(sys, "argv", ["cytodiffusion", "doctor", *["--json"] * as_json])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 3
    *trace, last = capsys.readouterr().err.splitlines()
    assert trace[0].startswith("Traceback")
    said = json.loads(last)["error"] if as_json else last.removeprefix("Error: ")
    assert said == "This is a fault of the program: RuntimeError: mat1 and mat2"


def test_version_and_help() -> None:
    import cytodiffusion

    assert cli("--version").out.strip() == cytodiffusion.__version__
    assert cli("--help").code == 0


def test_the_installed_command() -> None:
    """In a process of its own: exit code 2, one line, no traceback."""
    words = ["-m", "cytodiffusion.cli", "data", "check", "there/is/nothing"]
    told = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("Error: There is nothing at there")
    assert told.stderr.count("\n") == 1


# --- wrong calls write nothing -------------------------------------------------------------------

WRONG_PREDICT = {
    "no input": (["{none}"], "There is nothing at"),
    "no images": (["{empty}"], "holds no images"),
    "no such model": (["{cells}", "-m", "nonsense"], "There is no model 'nonsense'"),
    "no such budget": (["{cells}", "--budget", "cheap"], "no budget 'cheap'. It has: fast"),
    "no classes": (["{cells}", "--classes", ""], "--classes names no class. There are: eosinophil, "),
    "nothing but commas": (["{cells}", "--classes", " , "], "--classes names no class"),
    "coverage": (["{cells}", "--coverage", "1.5"], "Coverage must lie between 0 and 1"),
    "device": (["{cells}", "--device", "abacus"], "There is no device 'abacus'"),
    "no number of a device": (["{cells}", "--device", "cpu:zz"], "There is no device 'cpu:zz'"),
    "too high a number": (["{cells}", "--device", "cuda:99"], "There is no device 'cuda:99'"),
    "an unreadable kind": (["{pdf}"], "is not a data set that can be read"),
    "a broken archive": (["{zip}"], ""),
    "a broken manifest": (["{manifest}"], "names no image"),
}  # fmt: skip
WRONG_EVALUATE = {
    "unknown class": (["{cells}", "--classes", "neutrophil,blast"], "does not know the class"),
    "class twice": (
        ["{one}", "--classes", "neutrophil,neutrophil"], "A class is named twice"
    ),
    "labels outside the answers": (["{cells}", "--classes", "neutrophil"], "eosinophil, lympho"),
    "no labels": (["{flat}"], "have no labels to measure against"),
    "no such split": (["{cells}", "--split", "test"], "no images in the split 'test'"),
    "no split file": (["{cells}", "--splits", "{none}"], "cannot be read"),
    "no taxonomy": (["{cells}", "--taxonomy", "{none}"], "The taxonomy"),
    "a taxonomy that is none": (["{cells}", "--taxonomy", "{manifest}"], "is wrong at"),
    "splits of another set": (["{flat}", "--splits", "{splits}"], "does not have"),
}  # fmt: skip
WRONG_TRAIN = {
    "preset": (["{cells}", "--preset", "huge"], "There is no preset 'huge'. There are: tiny"),
    "no such setting": (["{cells}", "--set", "colour=1"], "no setting 'colour'"),
    "nearly a setting": (["{cells}", "--set", "step=5"], "Did you mean one of: steps"),
    "no such inner setting": (["{cells}", "--set", "network.depth=1"], "no setting 'network.depth'"),
    "nearly an inner setting": (["{cells}", "--set", "network.widths=8"], "one of: network.width"),
    "inner setting of a number": (["{cells}", "--set", "steps.x=1"], "'steps'"),
    "no value": (["{cells}", "--set", "steps"], "is not name=value"),
    "a bad value": (["{cells}", "--set", "steps=many"], "Setting 'steps'"),
    "a value out of range": (["{cells}", "--set", "steps=0"], "greater than or equal to 1"),
    "a value that is no YAML": (["{cells}", "--set", "steps=[1"], "cannot be read"),
    "a size that does not fit": (["{cells}", "--set", "preprocess.size=31"], "no multiple of"),
    "no levels": (["{cells}", "--set", "network.multipliers=[]"], "network.multipliers"),
    "device": (["{cells}", "--device", "abacus"], "There is no device 'abacus'"),
    "no input": (["{none}"], "There is nothing at"),
    "no labels": (["{flat}"], "has no labels"),
    "one class": (["{one}"], ""),
    "too few": (["{few}"], ""),
    "one held-out image of a class": (["{cells}", "--splits", "{thin}"], "neutrophil: 1"),
    "no split file": (["{cells}", "--splits", "{none}"], "cannot be read"),
    "no taxonomy": (["{cells}", "--taxonomy", "{none}"], "The taxonomy"),
    "a taxonomy that is none": (["{cells}", "--taxonomy", "{manifest}"], "is wrong at"),
}  # fmt: skip
WRONG = [
    *(pytest.param("predict", *case, id=f"predict-{name}") for name, case in WRONG_PREDICT.items()),
    *(pytest.param("evaluate", *c, id=f"evaluate-{name}") for name, c in WRONG_PREDICT.items()),
    *(pytest.param("evaluate", *c, id=f"evaluate-{name}") for name, c in WRONG_EVALUATE.items()),
    *(pytest.param("train", *case, id=f"train-{name}") for name, case in WRONG_TRAIN.items()),
]


@pytest.fixture(scope="module")
def places(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("places")
    (root / "empty").mkdir()
    (root / "flat").mkdir()
    (root / "one" / "neutrophil").mkdir(parents=True)
    for i in range(2):
        (root / "flat" / f"{i}.png").write_bytes(png(disc("neutrophil", i)))
    for i in range(30):
        (root / "one" / "neutrophil" / f"{i}.png").write_bytes(png(disc("neutrophil", i)))
    write_discs(root / "few", each=3)
    (root / "x.pdf").write_text("%PDF-1.4")
    (root / "x.zip").write_bytes(b"PK\x03\x04 and nothing more")
    (root / "x.csv").write_text("name,kind\na.png,b\n")
    rows = table(tiny.run / "splits.csv")
    lines = [f"{row['path']},{row['label']},{row['split']}\n" for row in rows]
    (root / "splits.csv").write_text("path,label,split\n" + "".join(lines))
    held = [line for line in lines if ",neutrophil,val" in line]
    thin = [line for line in lines if line not in held[1:]]
    (root / "thin.csv").write_text("path,label,split\n" + "".join(thin))
    return {
        "cells": tiny.cells, "none": root / "none", "empty": root / "empty", "flat": root / "flat",
        "one": root / "one", "few": root / "few", "pdf": root / "x.pdf", "zip": root / "x.zip",
        "manifest": root / "x.csv", "splits": root / "splits.csv", "thin": root / "thin.csv",
    }  # fmt: skip


@pytest.mark.parametrize(("verb", "words", "wanted"), WRONG)
def test_a_wrong_call_writes_nothing(
    tiny: Tiny, places: dict[str, Path], tmp_path: Path, verb: str, words: list[str], wanted: str
) -> None:
    words = [word.format(**places) for word in words]
    common = ["-m", tiny.bundle] if verb != "train" else TINY[:1]
    if "-m" in words:
        common = []
    told = cli(verb, words[0], "-o", tmp_path / "out", *common, *words[1:])
    assert told.code == 2, told
    assert told.out == ""
    assert wanted in told.complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--train", "0.9", "--val", "0.9"], "add up to 1"),
        (["--train", "0", "--val", "0", "--test", "0"], "add up to 1"),
        (["--group", "moon"], "--group takes"),
        (["--group", "patient"], "patient"),
        (["--taxonomy", "no/such.yaml"], "The taxonomy no/such.yaml cannot be read"),
    ],
    ids=str,
)
def test_a_wrong_split_writes_nothing(
    tiny: Tiny, tmp_path: Path, words: list[str], wanted: str
) -> None:
    told = cli("data", "split", tiny.cells, "-o", tmp_path / "s" / "splits.csv", *words)
    assert told.code == 2
    assert wanted in told.complaint
    assert not (tmp_path / "s").exists()


# --- data ----------------------------------------------------------------------------------------


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """20 of two classes, a tiny class, a copy, one image under two labels, one unreadable."""
    root = write_discs(tmp_path / "messy", each=20, size=48)
    for i in range(17):
        (root / "neutrophil" / f"{i + 3:02}.png").unlink()
    shutil.copy(root / "eosinophil" / "00.png", root / "eosinophil" / "copy.png")
    shutil.copy(root / "lymphocyte" / "00.png", root / "eosinophil" / "strayed.png")
    (root / "lymphocyte" / "broken.png").write_bytes(b"\x89PNG")
    return root


def test_data_check(messy: Path) -> None:
    told = cli("data", "check", messy, "--json")
    assert told.code == 1
    found = told.json
    assert found["images"] == 46
    assert [line["name"] for line in found["unreadable"]] == ["lymphocyte/broken.png"]
    assert ["eosinophil/00.png", "eosinophil/copy.png"] in found["exact_duplicates"]
    assert found["two_labels"] == [
        {"eosinophil/strayed.png": "eosinophil", "lymphocyte/00.png": "lymphocyte"}
    ]
    assert found["tiny_classes"] == {"neutrophil": 3}
    assert cli("data", "check", messy, "--tiny", "2", "--json").json["tiny_classes"] == {}
    plain = cli("data", "check", messy)
    assert plain.code == 1
    assert "one image under two labels" in plain.out
    assert "lymphocyte/broken.png" in plain.out


def test_data_check_of_a_clean_set(tiny: Tiny) -> None:
    told = cli("data", "check", tiny.cells, "--json")
    assert told.code == 0
    assert told.json["unreadable"] == []


def test_data_split(messy: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "splits.csv"
    told = cli("data", "split", messy, "-o", out, "--json")
    assert told.code == 1
    assert "lymphocyte/broken.png" in told.err
    rows = table(out)
    assert list(rows[0]) == ["path", "label", "split"]
    assert len(rows) == 45
    side = {row["path"]: row["split"] for row in rows}
    assert side["eosinophil/00.png"] == side["eosinophil/copy.png"]
    assert side["eosinophil/strayed.png"] == side["lymphocyte/00.png"]
    assert told.json["counts"] == {
        name: list(side.values()).count(name) for name in set(side.values())
    }
    first = out.read_bytes()
    cli("data", "split", messy, "-o", out)
    assert out.read_bytes() == first
    other = tmp_path / "other.csv"
    cli("data", "split", messy, "-o", other, "--seed", "1")
    assert other.read_bytes() != first


def test_a_split_that_is_there_is_not_replaced(tiny: Tiny, tmp_path: Path) -> None:
    """Results may hang on it. Where it says the same, also in other words, there is nothing to lose."""
    out, words = tmp_path / "s.csv", ("data", "split", tiny.cells, "-o", tmp_path / "s.csv")
    assert cli(*words).code == 0
    first = out.read_bytes()
    told = cli(*words, "--seed", 1)
    assert told.code == 2
    assert str(out) in told.complaint
    assert out.read_bytes() == first
    out.write_bytes(b"\xef\xbb\xbf" + first.replace(b",", b";").replace(b"\n", b"\r\n"))
    assert cli(*words).code == 0
    out.write_text("my notes\n")
    told = cli(*words)
    assert told.code == 2
    assert str(out) in told.complaint
    assert out.read_text() == "my notes\n"


def test_data_check_names_labels_that_no_class_has(tmp_path: Path) -> None:
    """Of the taxonomy in use: ours, or one's own."""
    source = spelled(tmp_path / "in", {"martian": CLASSES[0], "Lymphocytes": CLASSES[1]}, each=2)
    told = cli("data", "check", source)
    assert told.code == 0, told.err
    (line,) = [line for line in told.err.splitlines() if "martian" in line]
    assert "taxonomy" in line
    assert "ymphocyte" not in line
    (tmp_path / "my.yaml").write_text(MARTIANS)
    told = cli("data", "check", source, "--taxonomy", tmp_path / "my.yaml")
    assert "martian" not in told.err


MARTIANS = """classes:
  - {name: martian, synonyms: [EOS, eosinophils]}
  - {name: lymphocyte}
"""


def spelled(root: Path, folders: dict[str, str], each: int = 20) -> Path:
    """ROOT/folder/00.png, ...: discs in the colour of a class, in a folder of any name."""
    first = 0
    for folder, name in folders.items():
        (root / folder).mkdir(parents=True)
        for i in range(first, first + each):
            (root / folder / f"{i:02}.png").write_bytes(png(disc(name, i)))
        first += each
    return root


@pytest.fixture
def two_spellings(tmp_path: Path) -> Path:
    """Two classes in three folders."""
    names = {"EOS": "eosinophil", "eosinophils": "eosinophil", "lymphocyte": "lymphocyte"}
    return spelled(tmp_path / "in", names)


def test_spellings_of_a_class_are_one_class(two_spellings: Path, tmp_path: Path) -> None:
    told = cli("data", "check", two_spellings, "--tiny", "25", "--json").json
    assert told["classes"] == {"eosinophil": 40, "lymphocyte": 20}
    assert told["tiny_classes"] == {"lymphocyte": 20}
    out = tmp_path / "splits.csv"
    assert cli("data", "split", two_spellings, "-o", out).code == 0
    assert {row["label"] for row in table(out)} == {"eosinophil", "lymphocyte"}


def test_a_taxonomy_of_ones_own(two_spellings: Path, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(MARTIANS)
    mine = ["--taxonomy", tmp_path / "my.yaml"]
    told = cli("data", "check", two_spellings, *mine, "--json").json
    assert told["classes"] == {"lymphocyte": 20, "martian": 40}
    out = tmp_path / "splits.csv"
    cli("data", "split", two_spellings, "-o", out, *mine)
    assert {row["label"] for row in table(out)} == {"lymphocyte", "martian"}


@pytest.mark.parametrize("own", [False, True], ids=["ours", "one's own"])
def test_train_on_two_spellings(
    two_spellings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """What the bundle is to be made of; the calibration is left out."""
    import cytodiffusion.cli.train as verb

    seen: list[Any] = []
    (tmp_path / "my.yaml").write_text(MARTIANS)
    monkeypatch.setattr(verb, "write_bundle", lambda *words: seen.extend(words) or {})
    words = ["train", two_spellings, "-o", tmp_path / "run", *TINY, "--set=steps=1"]
    told = cli(*words, *(["--taxonomy", tmp_path / "my.yaml"] * own))
    assert told.code == 0, told.err
    run, held, labels = seen[0], seen[1], seen[6]
    wanted = ("lymphocyte", "martian") if own else ("eosinophil", "lymphocyte")
    assert run.data.classes == wanted
    assert sorted(set(held.labels.tolist())) == [0, 1]
    assert ("martian" in labels.classes) is own
    assert {row["label"] for row in table(tmp_path / "run" / "splits.csv")} == set(wanted)


def test_names_stay_on_their_line(tiny: Tiny, tmp_path: Path) -> None:
    """A newline in a name forges no line, and an escape code does nothing to the terminal."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad\nNot read: \x1b[2J.png").write_text("no image")
    (tmp_path / "in" / "good.png").write_bytes(png(disc("neutrophil", 1)))
    shown = r"bad\nNot read: \x1b[2J.png"
    told = cli("predict", tmp_path / "in", "-m", tiny.bundle, "-o", tmp_path / "out", *CPU)
    assert f"Not read: {shown}: not an image in a known format" in told.err.splitlines()
    assert "\x1b" not in told.err
    assert f"  {shown}: not an image" in cli("data", "check", tmp_path / "in").out
    told = cli("data", "check", tmp_path / "no\nsuch")
    assert r"no\nsuch" in told.complaint
    assert told.err.count("\n") == 1


# --- predict -------------------------------------------------------------------------------------


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few hundred bytes that says it is 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100_000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.fixture(scope="module")
def junk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("junk")
    (root / "good.png").write_bytes(png(disc("neutrophil", 5)))
    (root / "empty.png").write_bytes(b"")
    Image.fromarray(disc("neutrophil", 6)).save(root / "cut.jpg", quality=95)
    (root / "cut.jpg").write_bytes((root / "cut.jpg").read_bytes()[:700])
    (root / "text.png").write_text("I am a text.")
    (root / "bomb.png").write_bytes(bomb())
    (root / "dir.png").mkdir()
    (root / "movie.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    (root / "dangling.png").symlink_to(root / "nowhere.png")
    (root / "notes.txt").write_text("Not meant as an image.")
    return root


UNREAD = ["bomb.png", "cut.jpg", "dangling.png", "empty.png", "movie.mp4", "text.png"]


def test_predict_goes_past_what_it_cannot_read(tiny: Tiny, junk: Path, tmp_path: Path) -> None:
    began = time.process_time()
    told = cli("predict", junk, "-m", tiny.bundle, "-o", tmp_path, *CPU)
    assert time.process_time() - began < 10  # the bomb was not unpacked
    assert told.code == 1
    rows = {row["path"]: row for row in table(tmp_path / "predictions.csv")}
    assert sorted(rows) == sorted([*UNREAD, "good.png"])
    assert rows["good.png"]["predicted"] == "neutrophil"
    assert sorted(n for n, row in rows.items() if row["flag"] == "unreadable") == UNREAD
    lines = [line for line in told.err.splitlines() if line.startswith("Not read: ")]
    assert sorted(line.split(": ")[1] for line in lines) == UNREAD
    assert all(line.split(": ", 2)[2].strip() for line in lines)
    assert "Traceback" not in told.err
    assert "7 cells: 6 unreadable, 1" in told.out
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in UNREAD)


def test_json_is_json(tiny: Tiny, junk: Path, tmp_path: Path) -> None:
    told = cli("predict", junk, "-m", tiny.bundle, "-o", tmp_path, *CPU, "--json")
    assert told.code == 1
    (flag,) = {row["flag"] for row in table(tmp_path / "predictions.csv")} - {"unreadable"}
    assert told.json == {
        "cells": 7, "counts": {"neutrophil": 1}, "out": str(tmp_path),
        "flags": {"unreadable": 6, flag: 1}, "crop": 1.0, "match": "nothing",
    }  # fmt: skip
    for line in told.err.splitlines():
        json.loads(line)


def test_predict_one_image(tiny: Tiny, tmp_path: Path) -> None:
    image = tiny.cells / "lymphocyte" / "03.png"
    told = cli("predict", image, "-m", tiny.bundle, "-o", tmp_path, "--budget", "fast", *CPU)
    assert told.code == 0
    (row,) = table(tmp_path / "predictions.csv")
    assert (row["path"], row["predicted"], row["trials"]) == ("03.png", "lymphocyte", "8")
    assert "not for diagnosis" in told.err


@pytest.mark.parametrize(
    ("anomalous", "ok", "unreadable", "doubted"),
    [
        (8, 0, 0, True),
        (19, 1, 0, True),
        (10, 0, 5, True),
        (7, 0, 0, False),  # too few to say
        (5, 5, 0, False),
        (1, 9, 0, False),
        (0, 9, 0, False),
        (0, 0, 9, False),
    ],
)
def test_frames_are_doubted_where_nearly_all_cells_are_strange(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    anomalous: int, ok: int, unreadable: int, doubted: bool,
) -> None:  # fmt: skip
    """With flags put in: this model was calibrated on too few cells to find any cell strange."""
    import cytodiffusion.cli.predict as verb

    flags = ["anomalous"] * anomalous + ["ok"] * ok + ["unreadable"] * unreadable
    source = write_discs(tmp_path / "in", each=-(-len(flags) // len(CLASSES)))
    for path in sorted(source.rglob("*.png"))[len(flags) :]:
        path.unlink()
    name_all = verb.name_all

    def as_told(*given: Any, **more: Any) -> Any:
        rows = name_all(*given, **more)
        return [
            row | {"flag": flag, "problem": "torn"} for row, flag in zip(rows, flags, strict=True)
        ]

    monkeypatch.setattr(verb, "name_all", as_told)
    told = cli("predict", source, "-m", tiny.bundle, "-o", tmp_path / "out", *CPU)
    assert told.code == bool(unreadable)
    lines = [line for line in told.err.splitlines() if "Nearly all" in line]
    assert len(lines) == doubted
    assert all("frame" in line and "--crop" in line for line in lines)


@pytest.mark.parametrize("budget", ["fast", "balanced", "full"])
def test_budgets(tiny: Tiny, tmp_path: Path, budget: str) -> None:
    """All eight trials: six calibration cells cannot vouch for stopping early."""
    source = tiny.cells / "lymphocyte"
    cli("predict", source, "-m", tiny.bundle, "-o", tmp_path, "--budget", budget, *CPU)
    rows = table(tmp_path / "predictions.csv")
    assert {row["trials"] for row in rows} == {"8"}
    assert {row["predicted"] for row in rows} == {"lymphocyte"}


# --- evaluate ------------------------------------------------------------------------------------

METRICS = {
    "n", "accuracy", "accuracy_ci95", "balanced_accuracy", "balanced_accuracy_ci95", "macro_f1",
    "per_class", "ece", "nll", "brier", "auroc_correct", "coverage", "mean_set_size",
    "passes_per_cell", "cells_per_second", "model", "data_sha256", "seed", "flags",
}  # fmt: skip


def evaluate(tiny: Tiny, source: Path, out: Path, *more: object) -> Result:
    return cli("evaluate", source, "-m", tiny.bundle, "-o", out, *CPU, *more)


def test_evaluate(tiny: Tiny, tmp_path: Path) -> None:
    splits = tiny.run / "splits.csv"
    told = evaluate(
        tiny, tiny.cells, tmp_path, "--splits", splits, "--split", "test", "--seed", 3, "--json"
    )
    assert told.code == 0, told.err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert told.json == metrics
    assert set(metrics) >= METRICS
    test = [row for row in table(splits) if row["split"] == "test"]
    rows = table(tmp_path / "predictions.csv")
    assert [row["path"] for row in rows] == [row["path"] for row in test]
    assert list(rows[0])[:3] == ["path", "label", "sha256"]
    right = [row["label"] == row["predicted"] for row in rows]
    assert metrics["n"] == len(test)
    assert metrics["accuracy"] == pytest.approx(sum(right) / len(right))
    low, high = metrics["accuracy_ci95"]
    assert 0 <= low <= metrics["accuracy"] <= high <= 1
    assert metrics["balanced_accuracy"] > 0.9
    assert (metrics["seed"], metrics["model"], metrics["passes_per_cell"]) == (3, "run", 8)
    assert set(metrics["per_class"]) == set(CLASSES)
    assert (tmp_path / "report.html").read_text().count("<html") == 1


def test_evaluate_measures_the_sets_of_the_budget_that_was_asked_for(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = set[tuple[str, float]](), Classifier.limits

    def spying(self: Classifier, budget: str, coverage: float, **more: Any) -> Any:
        asked.add((budget, coverage))
        return real(self, budget, coverage, **more)

    monkeypatch.setattr(Classifier, "limits", spying)
    told = evaluate(tiny, tiny.cells, tmp_path, "--budget", "fast")
    assert told.code == 0, told.err
    assert asked == {("fast", coverage) for coverage in (0.9, 0.95, 0.99)}


def test_evaluate_again_says_the_same(tiny: Tiny, tmp_path: Path) -> None:
    """Also the speed, which is that of naming the cells and not of reading the table."""
    evaluate(tiny, tiny.cells, tmp_path)
    before = contents(tmp_path)
    evaluate(tiny, tiny.cells, tmp_path)
    assert contents(tmp_path) == before


def test_evaluate_of_another_split_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """Also of the same cells; the table and the measures stay those of the first."""
    splits, out = tiny.run / "splits.csv", tmp_path / "out"
    words = (tiny, tiny.cells, out, "--splits", splits)
    assert evaluate(*words, "--split", "test").code == 0
    before = contents(out)
    again = Path(shutil.copy(splits, tmp_path / "again.csv"))
    for other in ((splits, "val"), (again, "test")):
        told = evaluate(tiny, tiny.cells, out, "--splits", other[0], "--split", other[1])
        assert told.code == 2
        assert "another input" in told.complaint
        assert contents(out) == before
    assert evaluate(*words, "--split", "test").code == 0


def test_evaluate_with_fewer_answers(tiny: Tiny, tmp_path: Path) -> None:
    two = Path(shutil.copytree(tiny.cells, tmp_path / "in"))
    shutil.rmtree(two / "eosinophil")
    told = evaluate(tiny, two, tmp_path / "out", "--classes", "neutrophil, lymphocyte")
    assert told.code == 0, told.err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics["per_class"]) == {"neutrophil", "lymphocyte"}
    rows = table(tmp_path / "out" / "predictions.csv")
    assert "prob_eosinophil" not in rows[0]
    for row in rows:
        assert float(row["prob_neutrophil"]) + float(row["prob_lymphocyte"]) == pytest.approx(
            1, abs=2e-6
        )
        assert "eosinophil" not in row["set"]


@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_classes_in_other_spellings(tiny: Tiny, tmp_path: Path, verb: str) -> None:
    """Capitals, plurals, a comma too much: the same request as in the model's own words."""
    source = tmp_path / "in"
    shutil.copytree(tiny.cells / "neutrophil", source / "neutrophil")
    words = (verb, source, "-m", tiny.bundle, "-o", tmp_path / "out", *CPU, "--classes")
    assert cli(*words, "neutrophil,lymphocyte").code == 0
    before = (tmp_path / "out" / "predictions.csv").read_bytes()
    told = cli(*words, "NEUTROPHIL , Lymphocytes,")
    assert told.code == 0, told.err
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == before
    assert "prob_eosinophil" not in table(tmp_path / "out" / "predictions.csv")[0]


def test_evaluate_takes_other_spellings(tiny: Tiny, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny.cells, tmp_path / "in"))
    (source / "neutrophil").rename(source / "SNE")
    (source / "lymphocyte").rename(source / "Lymphocytes")
    assert evaluate(tiny, source, tmp_path / "out").code == 0
    labels = {row["label"] for row in table(tmp_path / "out" / "predictions.csv")}
    assert labels == set(CLASSES)


def test_evaluate_with_a_taxonomy_of_ones_own(tiny: Tiny, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny.cells, tmp_path / "in"))
    (source / "neutrophil").rename(source / "martian")
    entries = [*CLASSES[:2], "neutrophil, synonyms: [martian]"]
    text = "classes:\n" + "".join(f"  - {{name: {entry}}}\n" for entry in entries)
    (tmp_path / "my.yaml").write_text(text)
    told = evaluate(tiny, source, tmp_path / "out", "--taxonomy", tmp_path / "my.yaml")
    assert told.code == 0, told.err
    labels = {row["label"] for row in table(tmp_path / "out" / "predictions.csv")}
    assert labels == set(CLASSES)
    assert f"--taxonomy {tmp_path / 'my.yaml'}" in (tmp_path / "out" / "report.html").read_text()


def test_evaluate_where_no_image_can_be_read(tiny: Tiny, tmp_path: Path) -> None:
    """As in predict: each is named, and what was found is written. Old measures go."""
    (tmp_path / "in" / "neutrophil").mkdir(parents=True)
    image = tmp_path / "in" / "neutrophil" / "0.png"
    image.write_bytes(png(disc("neutrophil", 0)))
    evaluate(tiny, tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "metrics.json").exists()
    image.write_bytes(b"")
    told = evaluate(tiny, tmp_path / "in", tmp_path / "out")
    assert told.code == 1
    assert "Not read: neutrophil/0.png: the file is empty" in told.err
    assert "nothing to measure" in told.err
    there = {"predictions.csv", "predictions.parquet", "report.html", "request.json"}
    assert set(contents(tmp_path / "out")) == there


def test_evaluate_names_the_labels_that_do_not_fit(tiny: Tiny, tmp_path: Path) -> None:
    """Beside images without a label: it is not their neighbours that are named."""
    source = Path(shutil.copytree(tiny.cells, tmp_path / "in"))
    (source / "a-loose-one.png").write_bytes(png(disc("neutrophil", 1)))
    (source / "neutrophil").rename(source / "martian")
    told = evaluate(tiny, source, tmp_path / "out")
    assert "1 of 73 images have no label" in told.complaint
    assert ": martian." in told.complaint


def test_evaluate_past_an_unreadable_image(tiny: Tiny, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny.cells, tmp_path / "in"))
    (source / "neutrophil" / "00.png").write_bytes(b"")
    told = evaluate(tiny, source, tmp_path / "out", "--json")
    assert told.code == 1
    assert told.json["n"] == 71
    assert "neutrophil/00.png" in told.err


# --- train ---------------------------------------------------------------------------------------


def test_train_leaves_what_it_promises(tiny: Tiny) -> None:
    assert set(tiny.said.json) == {"bundle", "validation"}
    assert set(tiny.said.json["validation"]) == BUDGETS
    there = {path.name for path in tiny.run.iterdir()}
    assert there >= {"bundle", "settings.yaml", "splits.csv", "metrics.jsonl", "checkpoint"}
    for line in tiny.said.err.splitlines():
        json.loads(line)


def test_train_keeps_the_look_of_its_frames(tiny: Tiny) -> None:
    """So that `predict --match` brings others to it, not to PBC's."""
    samples = read_dataset(tiny.cells, splits=tiny.run / "splits.csv", split="train")
    look = bundles.load(str(tiny.bundle)).preprocess.look
    assert look == look_of(samples)[0]
    assert look.cell > 0.8 * 2 * 0.22  # half a frame and more: discs of radius .22 to .32
    assert look.light == pytest.approx((225, 225, 225), abs=8)


def test_train_again_when_done(tiny: Tiny, tmp_path: Path) -> None:
    """Nothing is trained, and the bundle is the same."""
    run = Path(shutil.copytree(tiny.run, tmp_path / "run"))
    told = cli("train", tiny.cells, "-o", run, *TINY)
    assert told.code == 0, told.err
    assert "Going on from step 40." in told.err
    same = {"model.safetensors", "calibration.json", "test_vectors.npz", "labels.yaml"}
    one, other = contents(tiny.bundle), contents(run / "bundle")
    assert all(one[name] == other[name] for name in same)


def test_train_with_other_settings_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny.run, tmp_path / "run"))
    before = contents(run)
    told = cli("train", tiny.cells, "-o", run, *TINY, "--set", "batch=8")
    assert told.code == 2
    assert "begun with other settings" in told.complaint
    assert contents(run) == before


def test_train_again_with_more_cells_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be left out in silence. With the run's own split file, they are left out on purpose."""
    source = Path(shutil.copytree(tiny.cells, tmp_path / "in"))
    run = Path(shutil.copytree(tiny.run, tmp_path / "run"))
    before = contents(run)
    write_discs(source, each=2, first=80)
    told = cli("train", source, "-o", run, *TINY)
    assert told.code == 2
    assert f"6 labelled images are not in {run / 'splits.csv'}" in told.complaint
    assert "eosinophil/80.png" in told.complaint
    assert "another folder" in told.complaint
    assert "--splits" in told.complaint
    assert contents(run) == before
    monkeypatch.setattr("cytodiffusion.cli.train.write_bundle", lambda *_: {"bundle": "left out"})
    told = cli("train", source, "-o", run, *TINY, "--splits", run / "splits.csv")
    assert told.code == 0, told.err
    assert "Going on from step 40." in told.err


def test_train_again_with_corrected_labels_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """The run's own split file has the old ones."""
    source, run = Path(shutil.copytree(tiny.cells, tmp_path / "in")), tmp_path / "run"
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*.png"))
    manifest = source / "manifest.csv"
    manifest.write_text("path,label\n" + "".join(f"{n},{n.split('/')[0]}\n" for n in names))
    shutil.copytree(tiny.run, run)
    before, text = contents(run), manifest.read_text()
    manifest.write_text(
        text.replace("eosinophil/00.png,eosinophil", "eosinophil/00.png,neutrophil")
    )
    assert manifest.read_text() != text
    told = cli("train", source, "-o", run, *TINY, "--set=steps=60")
    assert told.code == 2
    assert f"1 images have another label in {run / 'splits.csv'}" in told.complaint
    assert "'eosinophil/00.png'" in told.complaint
    assert "--splits" not in told.complaint  # which would bring the old one back
    assert contents(run) == before


def test_train_again_with_other_pixels_or_labels_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same names and with the same settings, the look of the frames among them."""
    import cytodiffusion.cli.train as verb

    monkeypatch.setattr(verb, "write_bundle", lambda *_: {"bundle": "left out"})
    monkeypatch.setattr(verb, "with_look", lambda settings, *_: settings)
    source, run = Path(shutil.copytree(tiny.cells, tmp_path / "in")), tmp_path / "run"
    splits = Path(shutil.copy(tiny.run / "splits.csv", tmp_path / "s.csv"))
    words = ("train", source, "-o", run, "--splits", splits, *TINY, "--set=steps=2")
    assert cli(*words).code == 0
    before, rows = contents(run), table(splits)
    changed = next(row["path"] for row in rows if row["split"] == "train")
    pixels = (source / changed).read_bytes()
    (source / changed).write_bytes(png(disc("neutrophil", 700)))
    refused = [cli(*words)]
    (source / changed).write_bytes(pixels)
    text = splits.read_text()
    splits.write_text(text.replace(f"{changed},eosinophil,", f"{changed},neutrophil,"))
    assert splits.read_text() != text
    refused.append(cli(*words))
    for told in refused:
        assert told.code == 2
        assert "other images or labels" in told.complaint
    assert contents(run) == before
    splits.write_text(text)
    assert cli(*words).code == 0


def test_fewer_steps_than_were_done_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny.run, tmp_path / "run"))
    before = contents(run)
    told = cli("train", tiny.cells, "-o", run, *TINY, "--set=steps=30")
    assert told.code == 2
    assert "40 steps" in told.complaint
    assert contents(run) == before


def test_train_goes_on_after_a_kill(tiny: Tiny, tmp_path: Path) -> None:
    """SIGKILL in the middle; run again it goes on from a checkpoint and writes the bundle."""
    words = ["train", str(tiny.cells), "-o", str(tmp_path / "run"), *TINY]
    words += ["--set=steps=400", "--set=checkpoint_minutes=0.003"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "cytodiffusion.cli", *words],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until = time.monotonic() + 400  # on a busy machine
        while not any(p.name.isdigit() for p in (tmp_path / "run").glob("checkpoint/*")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "run" / "bundle").exists()
    stopped = max(int(p.name) for p in (tmp_path / "run").glob("checkpoint/*") if p.name.isdigit())
    assert 0 < stopped < 400
    words[words.index("--set=steps=400")] = f"--set=steps={stopped + 20}"
    told = cli(*words)
    assert told.code == 0, told.err
    assert f"Going on from step {stopped}." in told.err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == stopped + 20
    assert cli("models", "verify", tmp_path / "run" / "bundle").code == 0


def test_train_names_what_it_cannot_read(tiny: Tiny, tmp_path: Path, monkeypatch) -> None:
    """Exit code 1, and the bundle is there. The calibration is left out: it has been seen."""
    import cytodiffusion.cli.train as verb

    source = Path(shutil.copytree(tiny.cells, tmp_path / "in"))
    splits = tiny.run / "splits.csv"
    bad = next(row["path"] for row in table(splits) if row["split"] == "train")
    (source / bad).write_bytes(b"")
    monkeypatch.setattr(verb, "write_bundle", lambda *_: {"bundle": "left out"})
    told = cli("train", source, "-o", tmp_path / "run", "--splits", splits, *TINY, "--set=steps=1")
    assert told.code == 1, told.err
    assert f"Not read: {bad}: the file is empty" in told.err


def test_train_counts_the_held_out_images_that_it_could_read(tiny: Tiny, tmp_path: Path) -> None:
    """Before it trains, not when it calibrates."""
    source = Path(shutil.copytree(tiny.cells, tmp_path / "in"))
    splits = tiny.run / "splits.csv"
    held = [row for row in table(splits) if row["split"] == "val" and row["label"] == CLASSES[0]]
    for row in held[1:]:
        (source / row["path"]).write_bytes(b"")
    told = cli("train", source, "-o", tmp_path / "run", "--splits", splits, *TINY)
    assert told.code == 2, told.err
    assert f"the split 'val', of what could be read, has {CLASSES[0]}: 1." in told.complaint
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_helper_process_leaves_the_complaints_to_the_main_one(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun ends all processes when one of them fails: the bundle would not be written."""
    from accelerate import Accelerator

    source = Path(shutil.copytree(tiny.cells, tmp_path / "in"))
    splits = tiny.run / "splits.csv"
    bad = next(row["path"] for row in table(splits) if row["split"] == "train")
    (source / bad).write_bytes(b"")
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    told = cli("train", source, "-o", tmp_path / "run", "--splits", splits, *TINY, "--set=steps=1")
    assert told.code == 0, told.err
    assert "Not read" not in told.err


@pytest.mark.parametrize("step", ["record", "plot_progress", "draw_samples"])
def test_train_on_a_full_disk(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"cytodiffusion.train.record.{step}", full)
    words = ["--splits", tiny.run / "splits.csv", *TINY, "--set=steps=1"]
    told = cli("train", tiny.cells, "-o", tmp_path / "run", *words)
    assert told.code == 2
    assert "cannot be written to (No space left on device)" in told.complaint


def test_train_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    from cytodiffusion.release import commit

    monkeypatch.setenv("PATH", "")
    assert commit().startswith("v")


def test_train_says_how_many_labelled_cells_it_leaves_out(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest with an empty split, and with a word that is none of ours; `valid` is val."""
    import cytodiffusion.cli.train as verb

    rows = table(tiny.run / "splits.csv")

    def train(val: str, odd: tuple[str, ...]) -> Result:
        words = {"train": "Train", "val": val, "test": "TEST"}
        splits = [words[row["split"]] for row in rows]
        mine = [i for i, row in enumerate(rows) if row["split"] == "train"]
        for i, word in zip(mine, odd, strict=False):
            splits[i] = word
        lines = [
            f"{tiny.cells / row['path']}; {row['label']};{word}"
            for row, word in zip(rows, splits, strict=True)
        ]
        (tmp_path / "cells.csv").write_text("\n".join(["PATH; Label;Split", *lines]) + "\n")
        out = tmp_path / f"run-{val}"
        return cli("train", tmp_path / "cells.csv", "-o", out, *TINY, "--set=steps=1")

    monkeypatch.setattr(verb, "write_bundle", lambda *_: {"bundle": "left out"})
    told = train("valid", ("", "", "holdout", "holdout", "holdout"))
    assert told.code == 0, told.err
    (line,) = [line for line in told.err.splitlines() if "left out" in line]
    assert line.startswith("5 labelled images")
    assert "none 2" in line
    assert "holdout 3" in line
    told = train("holdout", ())
    assert told.code == 2
    assert "'val' is empty" in told.complaint
    assert f"holdout {[row['split'] for row in rows].count('val')}" in told.complaint
    told = train("Validation", ())
    assert told.code == 0, told.err
    assert "left out (" not in told.err


# --- models, doctor ------------------------------------------------------------------------------


def test_models_list(shipped: Path) -> None:
    assert cli("models", "list", "--json").json == {
        "discs": {
            "classes": list(CLASSES),
            "size": 16,
            "megabytes": pytest.approx(0.6, abs=0.6),
            "default": False,
        }
    }
    assert cli("models", "list").out.startswith("discs ")


def test_models_show_and_verify(shipped: Path) -> None:
    assert cli("models", "show", "discs").out.startswith("# run")
    assert cli("models", "show", "discs", "--json").json["classes"] == list(CLASSES)
    told = cli("models", "verify", "discs", "--json", *CPU)
    assert told.code == 0
    assert told.json["largest_difference"] <= told.json["tolerance"]
    assert "every file is as released" in cli("models", "verify", "discs").out


def test_models_that_are_not_there(shipped: Path) -> None:
    for verb in ("show", "verify"):
        told = cli("models", verb, "nonsense")
        assert told.code == 2
        assert "Shipped: discs." in told.complaint


def test_doctor(shipped: Path) -> None:
    told = cli("doctor", "--json", *CPU)
    assert told.code == 0, told.out
    assert all(finding["good"] for finding in told.json.values())
    assert "model discs" in told.json
    assert "BAD" not in cli("doctor").out


def test_doctor_sees_a_changed_model(shipped: Path) -> None:
    (shipped / "discs" / "card.md").write_text("# Better than it is\n")
    told = cli("doctor")
    assert told.code == 2
    assert "BAD  model discs" in told.out
    assert "card.md is not the file that was released" in told.out
    assert "Traceback" not in told.err


def test_doctor_sees_a_missing_device(shipped: Path) -> None:
    told = cli("doctor", "--device", "abacus", "--json")
    assert told.code == 2
    assert not told.json["device"]["good"]


# --- the call, as a report gives it --------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("a -o out", "a --out out --limit 3 --rest"),
        ("'a b' c -o out --json", "'a b' c --out out --limit 3 --rest"),
        ("a -o 'x y' --limit 5 --no-rest", "a --out 'x y' --limit 5 --no-rest"),
        ("a --set b=1 --quick -o out --set c=2 --crop .5",
         "a --out out --limit 3 --crop 0.5 --set b=1 --set c=2 --quick --rest"),
    ],
)  # fmt: skip
def test_a_call_that_is_typed_again_is_the_same_call(typed, told):
    """Arguments first, then what was given or left at a default; --json is for who calls, not for what."""
    app, calls = typer.Typer(), []

    @app.callback()
    def _main() -> None: ...

    @app.command("verb")
    def _verb(
        context: typer.Context,
        names: list[str],
        out: Annotated[Path, typer.Option("--out", "-o")],
        limit: int = 3,
        crop: float | None = None,
        change: Annotated[list[str] | None, typer.Option("--set")] = None,
        quick: Annotated[bool, typer.Option("--quick")] = False,
        rest: Annotated[bool, typer.Option("--rest/--no-rest")] = True,
        json: Annotated[bool, typer.Option("--json")] = False,
    ) -> None:
        calls.append(call_of(context))
        if not typed.startswith("'"):
            assert call_of(context, names=["z"]) == calls[-1].replace(" a ", " z ")

    for words in (shlex.split(typed), shlex.split(told)):
        ended = CliRunner().invoke(app, ["verb", *words])
        assert not ended.exit_code, ended.output
    assert calls == [f"cytodiffusion verb {told}"] * 2


def test_an_argument_that_begins_with_a_dash_stays_an_argument(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_discs(tmp_path / "-cells", each=1)
    told = cli("predict", "./-cells", "-o", "out", *CPU)
    assert told.code == 0, told.err
    page = (tmp_path / "out" / "report.html").read_text()
    assert "cytodiffusion predict ./-cells --out out" in page


# --- which code this is --------------------------------------------------------------------------


def test_the_commit_is_that_of_this_project_alone(tmp_path, monkeypatch):
    """Not that of a repository that has this package installed somewhere inside."""
    words = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*words, "init", "-q"], check=True)
    package = tmp_path / "src" / "cytodiffusion"
    inside = tmp_path / ".venv" / "site-packages" / "cytodiffusion"
    for folder in (package, inside):
        folder.mkdir(parents=True)
        (folder / "release.py").write_text("")
    subprocess.run([*words, "add", "src"], check=True)
    subprocess.run([*words, "commit", "-q", "-m", "first"], check=True)
    monkeypatch.setattr(release, "__file__", str(inside / "release.py"))
    assert release.commit() == f"v{__version__}"
    monkeypatch.setattr(release, "__file__", str(package / "release.py"))
    head = release.commit()
    assert len(head) == 12
    (package / "release.py").write_text("changed")
    assert release.commit() == f"{head}+"


@pytest.mark.parametrize(
    "words",
    [
        *[
            f"bench {verb} cells"
            for verb in ("anomaly", "cost", "explain", "low-data", "uncertainty")
        ],
        "bench augment cells drawn --class disc",
        "bench fidelity drawn cells",
        "bench shift --train cells --foreign others",
        "explain cells",
    ],
)
def test_one_process_at_a_time(words: str, tmp_path: Path) -> None:
    """Nothing is read, written or spoilt in a folder that another process is at work in."""
    with alone(tmp_path / "out"):
        result = cli(*words.split(), "-o", tmp_path / "out")
        assert result.code == 2
        assert "Another process is at work" in result.complaint
