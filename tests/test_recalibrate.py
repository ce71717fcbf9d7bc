"""`models calibrate`: the same weights, fitted anew on other cells."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BUDGETS, CLASSES, Result, Tiny, cli, contents, tiny_model, write_discs
from safetensors.torch import load_file, save_file

from cytodiffusion import bundle as bundles
from cytodiffusion import calibration, release
from cytodiffusion.bundle import load, verify
from cytodiffusion.classify.fit import Plan
from cytodiffusion.cli import models
from cytodiffusion.data.look import Look
from cytodiffusion.data.match import Fit, fit_frames
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.errors import ModelError

FITTED = {
    "calibration.json",
    "card.md",
    "config.json",
    "checksums.json",
}  # the rest is of the weights
GAIN = '{"gain": 1.0}\n'


@dataclass(frozen=True)
class Short(Plan):
    """A quick calibration: few trials, short races."""

    levels: int = 3
    trials: int = 2
    naming: int = 1
    race_cells: int = 6
    race_trials: int = 22
    paper_most: int = 22


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "Plan", Short)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_model(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def before(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with a file more, as of a model that draws."""
    folder = tiny.copy(tmp_path_factory.mktemp("before") / "discs")
    (folder / "drawing.json").write_text(GAIN)
    bundles._write_checksums(folder)
    return folder


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_discs(tmp_path_factory.mktemp("new") / "other-lab", each=6, first=100)


@pytest.fixture(scope="module")
def after(before: Path, cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("after") / "bundle"
    told = cli("models", "calibrate", cells, "-m", before, "-o", out, "--json", "--device", "cpu")
    assert told.code == 0, told.err
    assert told.json["cells"] == 18
    assert told.json["bundle"] == str(out)
    assert set(told.json["validation"]) == BUDGETS
    assert "not for diagnosis" in told.err
    return out


def calibrate(cells: Path, model: Path, out: Path, *words: object) -> Result:
    return cli("models", "calibrate", cells, "-m", model, "-o", out, "--device", "cpu", *words)


# --- what is written -----------------------------------------------------------------------------


def test_all_that_is_of_the_weights_is_as_it_was(before: Path, after: Path) -> None:
    """To the byte; drawing.json too."""
    old, new = contents(before), contents(after)
    assert set(old) == set(new)
    assert {name for name in old if old[name] != new[name]} == FITTED
    assert new["drawing.json"].decode() == GAIN
    assert [path.name for path in after.parent.iterdir()] == ["bundle"]


def test_it_is_a_bundle_like_any_other(after: Path, cells: Path, tmp_path: Path) -> None:
    assert verify(after) <= 1e-5
    assert cli("models", "verify", after, "--device", "cpu").code == 0
    told = cli("predict", cells, "-m", after, "-o", tmp_path, "--device", "cpu", "--json")
    assert told.code == 0, told.err
    assert told.json["cells"] == 18


def test_it_says_what_it_was_calibrated_on(before: Path, after: Path) -> None:
    card = (after / "card.md").read_text()
    assert "| calibrated anew | on other-lab, commit " in card
    assert "calibrated anew" not in (before / "card.md").read_text()
    old, new = (json.loads((each / "config.json").read_text()) for each in (before, after))
    assert new["origin"].pop("calibrated_on") == "other-lab"
    assert new["origin"].pop("calibrated_at") == release.commit()
    assert new["origin"].pop("val_sha256") != old["origin"].pop("val_sha256")
    reaches = [each["origin"].pop("abroad_reach") for each in (old, new)]
    assert all(f"{reach:.1f} times as far" in text for reach, text in zip(
        reaches, ((before / "card.md").read_text(), card), strict=True
    ))  # fmt: skip
    assert new == old
    same = [line for line in (before / "card.md").read_text().splitlines() if line[:2] == "| "][:5]
    assert all(line in card for line in same)  # the network, the input, how it was made


def test_strangeness_rests_on_features(after: Path) -> None:
    """A few discs of known kinds are less strange than grey fields, by the features of the first pass."""
    found = load(after).classifier
    held = found.budget("full").held
    assert held.truth.tolist().count(0) == 6
    width = found.meter.features
    assert width > 0
    depths = found.budget("full").reader.depths
    assert [d.anomalies.means.shape for d in depths] == [(3, 4 + width), (3, 8 + width)]
    table = found.measure(torch.full((2, 3, 16, 16), -0.9), budget="full")
    assert found.read(table, "full").anomaly.min() > np.median(held.anomaly)


@pytest.mark.parametrize("workers", [1, 3])
def test_calibrated_twice_the_bytes_are_the_same(
    before: Path, after: Path, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:  # fmt: skip
    """However many threads measure."""
    monkeypatch.setattr(models, "threads", lambda _: workers)
    told = calibrate(cells, before, tmp_path / "b")
    assert told.code == 0, told.err
    assert contents(tmp_path / "b") == contents(after)


def test_another_seed_draws_other_noise(
    before: Path, after: Path, cells: Path, tmp_path: Path
) -> None:
    assert calibrate(cells, before, tmp_path / "b", "--seed", 5).code == 0
    assert load(tmp_path / "b").classifier.budget("full").draws.seed == 5
    assert load(after).classifier.budget("full").draws.seed == 0


def test_a_split_alone(before: Path, cells: Path, tmp_path: Path) -> None:
    lines = ["path,label,split"]
    for name in CLASSES:
        lines += [f"{name}/{i}.png,{name},{'val' if i < 103 else 'test'}" for i in range(100, 106)]
    (tmp_path / "s.csv").write_text("\n".join(lines) + "\n")
    words = ("--splits", tmp_path / "s.csv", "--split", "val", "--json")
    told = calibrate(cells, before, tmp_path / "b", *words)
    assert told.code == 0, told.err
    assert told.json["cells"] == 9


def test_a_bundle_gives_way_to_its_successor(before: Path, cells: Path, tmp_path: Path) -> None:
    """Also in its own folder: what else it holds stays."""
    own = Path(shutil.copytree(before, tmp_path / "own"))
    told = calibrate(cells, own, own)
    assert told.code == 0, told.err
    assert set(contents(own)) == set(contents(before))
    assert (own / "drawing.json").read_text() == GAIN
    verify(own)
    assert load(own).config["origin"]["calibrated_on"] == "other-lab"


@pytest.mark.usefixtures("nothing_measured")
def test_another_model_is_not_replaced(before: Path, cells: Path, tmp_path: Path) -> None:
    """A bundle with other weights is not a predecessor: it would be lost."""
    other = Path(shutil.copytree(before, tmp_path / "other"))
    save_file(
        {name: value + 1 for name, value in load_file(other / "model.safetensors").items()},
        other / "model.safetensors",
    )
    bundles._write_checksums(other)
    kept = contents(other)
    told = calibrate(cells, before, other)
    assert told.code == 2
    assert f"{other} holds another model" in told.complaint
    assert contents(other) == kept


def test_a_bundle_of_the_same_weights_is_replaced(
    before: Path, after: Path, cells: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(before, tmp_path / "out"))
    told = calibrate(cells, before, out)
    assert told.code == 0, told.err
    assert contents(out) == contents(after)


def test_unreadable_images_are_named_and_the_rest_is_done(
    before: Path, cells: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(cells, tmp_path / "in"))
    (source / "neutrophil" / "103.png").write_bytes(b"")
    told = calibrate(source, before, tmp_path / "b", "--json")
    assert told.code == 1
    assert "Not read: neutrophil/103.png: the file is empty" in told.err
    assert told.json["cells"] == 17
    assert verify(tmp_path / "b") <= 1e-5


def test_it_is_said_what_so_few_cells_cannot_give(
    before: Path, cells: Path, tmp_path: Path
) -> None:
    """98 cells or fewer: 1/99 is the smallest p-value, and the flag asks for 1 %."""
    told = cli("models", "calibrate", cells, "-m", before, "-o", tmp_path / "b", "--device", "cpu")
    assert told.code == 0, told.err
    few = "no cell can be flagged anomalous; it takes 99"
    assert few in told.err
    assert few in (tmp_path / "b" / "card.md").read_text()
    assert f"race: {few}" in told.err
    assert "balanced: every cell runs all trials" in told.err


# --- refused -------------------------------------------------------------------------------------


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(calibration, "calibrate", refuse)


@pytest.mark.usefixtures("nothing_measured")
def test_a_class_with_too_few_cells(before: Path, cells: Path, tmp_path: Path) -> None:
    """One image, none, or but one that can be read."""
    source = Path(shutil.copytree(cells, tmp_path / "in"))
    for i in range(101, 106):
        (source / "neutrophil" / f"{i}.png").unlink()
    told = calibrate(source, before, tmp_path / "b")
    assert told.code == 2
    assert f"at least two images of every class; {source} has neutrophil: 1." in told.complaint
    shutil.rmtree(source / "neutrophil")
    told = calibrate(source, before, tmp_path / "b")
    assert "neutrophil: 0." in told.complaint
    (source / "lymphocyte" / "100.png").write_bytes(b"")
    shutil.copytree(cells / "neutrophil", source / "neutrophil")
    for i in range(101, 106):
        (source / "neutrophil" / f"{i}.png").write_bytes(b"")
    told = calibrate(source, before, tmp_path / "b")
    assert told.code == 2
    assert "of what could be read, has neutrophil: 1." in told.complaint
    assert told.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.usefixtures("nothing_measured")
def test_a_split_with_too_few_cells_is_named(before: Path, cells: Path, tmp_path: Path) -> None:
    rows = [f"{name}/10{i}.png,{name},val" for name in CLASSES for i in range(2)]
    (tmp_path / "s.csv").write_text("\n".join(["path,label,split", *rows[:-1]]) + "\n")
    words = ("--splits", tmp_path / "s.csv", "--split", "val")
    told = calibrate(cells, before, tmp_path / "b", *words)
    assert told.code == 2
    assert f"the split 'val' of {cells} has neutrophil: 1." in told.complaint


@pytest.mark.usefixtures("nothing_measured")
def test_a_label_that_the_model_does_not_know(before: Path, cells: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(cells, tmp_path / "in"))
    shutil.copytree(source / "neutrophil", source / "platelet")
    told = calibrate(source, before, tmp_path / "b")
    assert told.code == 2
    assert "'platelet' is none of the classes" in told.complaint
    assert not (tmp_path / "b").exists()


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize("kind", ["images", "file", "bundle with more"])
def test_what_is_in_the_way_is_not_lost(
    before: Path, cells: Path, tmp_path: Path, kind: str
) -> None:
    """As the images themselves, given for OUT by mistake."""
    out = tmp_path / "out"
    if kind == "images":
        shutil.copytree(cells, out)
    elif kind == "file":
        out.write_text("years of work")
    else:
        shutil.copytree(before, out)
        (out / "thesis.txt").write_text("years of work")
    kept = out.read_bytes() if kind == "file" else contents(out)
    told = calibrate(cells, before, out)
    assert told.code == 2
    assert str(out) in told.complaint
    assert "Choose a" in told.complaint
    assert (out.read_bytes() if kind == "file" else contents(out)) == kept


def test_a_full_disk_leaves_nothing(
    before: Path, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundles, "_write_checksums", full)
    told = calibrate(cells, before, tmp_path / "b")
    assert told.code == 2
    assert "cannot be written" in told.complaint
    assert list(tmp_path.iterdir()) == []


def older(before: Path, folder: Path, version: int) -> Path:
    """The bundle as one of an older version, with nothing in its calibration that is known today."""
    shutil.copytree(before, folder)
    config = json.loads((folder / "config.json").read_text()) | {"format": version}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "calibration.json").write_text("{}")
    bundles._write_checksums(folder)
    return folder


def test_a_bundle_of_an_older_version_can_be_calibrated_anew(
    before: Path, after: Path, cells: Path, tmp_path: Path
) -> None:
    folder = older(before, tmp_path / "old", bundles.SAME_WEIGHTS)
    with pytest.raises(ModelError, match=r"older cytodiffusion.* Calibrate it anew"):
        load(folder)
    told = calibrate(cells, folder, tmp_path / "new")
    assert told.code == 0, told.err
    assert contents(tmp_path / "new") == contents(after)
    told = calibrate(
        cells, older(before, tmp_path / "older", bundles.SAME_WEIGHTS - 1), tmp_path / "b"
    )
    assert told.code == 2
    assert "Train it anew" in told.complaint


def test_what_is_found_for_frames_is_kept(
    before: Path, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Fit(True, 0.9, "These frames differ", Look(nucleus=0.4, cell=0.5))
    monkeypatch.setattr("cytodiffusion.data.match.fit_frames", lambda *_: found)
    told = calibrate(cells, before, tmp_path / "b")
    assert told.code == 0, told.err
    assert "These frames differ" in told.err
    old, new = (load(each).preprocess for each in (before, tmp_path / "b"))
    look = old.look.model_copy(update={"nucleus": 0.4, "cell": 0.5})
    assert new == old.model_copy(update={"match": "light", "crop": 0.9, "look": look})


@pytest.mark.real
def test_frames_of_another_laboratory_are_calibrated_on_as_they_are_named(data_root: Path) -> None:
    """OUT brings every frame to the look of training, one alone too, and finds nothing left to match."""
    raabin = data_root / "raabin"
    if not raabin.is_dir():
        pytest.skip(f"no real cells at {raabin}")
    frames, plain = read_dataset(raabin), load("pbc8").preprocess
    fit = fit_frames(frames, plain)
    settled = fit.settled(plain)
    assert fit.light
    assert fit.crop is not None
    assert (settled.match, settled.crop) == ("light", fit.crop)
    assert settled.look.light == plain.look.light
    again = fit_frames(frames, settled)
    assert (again.light, again.crop, again.told) == (False, None, "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_the_same_bytes(before: Path, after: Path, cells: Path, tmp_path: Path) -> None:
    told = cli("models", "calibrate", cells, "-m", before, "-o", tmp_path / "b", "--device", "cuda")
    assert told.code == 0, told.err
    assert contents(tmp_path / "b") == contents(after)
