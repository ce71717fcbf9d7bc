"""Cells of known place, size and stain; the same real frame at another scale and in another light."""

from __future__ import annotations

import csv
import html
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import cli, write_discs
from PIL import Image

from cytodiffusion.bundle import load
from cytodiffusion.data.find import find_cell, otsu
from cytodiffusion.data.images import Preprocess, decode
from cytodiffusion.data.load import look_of
from cytodiffusion.data.look import Look, crop_for, matched, measure_look
from cytodiffusion.data.match import Fit, fit_frames
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.data.sample import FileBytes, HeldBytes, Sample, png
from cytodiffusion.data.stain import Stain, background, measure_stain, optical_density, restain
from cytodiffusion.errors import DataError, SettingsError, UnreadableImage

FIELD = (240, 220, 200)
NUCLEUS = (90, 40, 130)  # purple: green is held back more than blue
CYTOPLASM = (200, 170, 185)
RED_CELL = (205, 165, 155)


def frame(
    x: float = 100, y: float = 90, cell: float = 80, nucleus: float = 50, size: int = 200,
    neighbours: tuple[tuple[float, float], ...] = ((20, 30), (180, 180), (40, 170)),
) -> Image.Image:  # fmt: skip
    """A white cell of known centre and diameters among red cells of diameter 40."""
    row, column = np.mgrid[:size, :size] + 0.5
    pixels = np.full((size, size, 3), FIELD, dtype=np.uint8)
    for left, top in neighbours:
        pixels[np.hypot(column - left, row - top) < 20] = RED_CELL
    pixels[np.hypot(column - x, row - y) < cell / 2] = CYTOPLASM
    pixels[np.hypot(column - x, row - y) < nucleus / 2] = NUCLEUS
    return Image.fromarray(pixels)


# --- the cell ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x", "y"), [(100, 100), (80, 110), (125, 85)])
@pytest.mark.parametrize(("cell", "nucleus"), [(80, 50), (110, 70), (50, 40)])
def test_a_drawn_cell_is_found(x: float, y: float, cell: float, nucleus: float) -> None:
    found = find_cell(frame(x, y, cell, nucleus))
    assert found is not None
    assert (found.x, found.y) == (pytest.approx(x, abs=3), pytest.approx(y, abs=3))
    assert found.cell == pytest.approx(cell, rel=0.06)
    assert found.nucleus == pytest.approx(nucleus, rel=0.06)
    np.testing.assert_allclose(found.stain.background, FIELD, atol=2)
    np.testing.assert_allclose(found.stain.nucleus, -np.log(np.array(NUCLEUS) / FIELD), atol=0.05)


def test_a_neighbour_in_touch_changes_little() -> None:
    found = find_cell(frame(100, 100, 80, 50, neighbours=((158, 100),)))
    assert found is not None
    assert found.cell == pytest.approx(80, rel=0.08)


def test_lobes_are_one_nucleus_and_what_lies_between_is_cell() -> None:
    """Two lobes in a cell that is as pale as the field."""
    row, column = np.mgrid[:200, :200] + 0.5
    pixels = np.array(frame(cell=0, nucleus=0))
    for left in (85, 115):
        pixels[np.hypot(column - left, row - 100) < 9] = NUCLEUS
    found = find_cell(Image.fromarray(pixels))
    assert found is not None
    assert (found.x, found.y) == (pytest.approx(100, abs=2), pytest.approx(100, abs=2))
    assert found.nucleus == pytest.approx(2 * 9 * np.sqrt(2), rel=0.15)
    assert found.cell > found.nucleus


def test_the_cell_in_the_middle_is_the_one() -> None:
    both = np.minimum(np.asarray(frame(100, 100, 60, 40)), np.asarray(frame(25, 25, 70, 46)))
    found = find_cell(Image.fromarray(both))
    assert found is not None
    assert (found.x, found.y) == (pytest.approx(100, abs=3), pytest.approx(100, abs=3))


@pytest.mark.parametrize("colour", [FIELD, RED_CELL, (128, 128, 128)])
def test_where_there_is_none_none_is_found(colour: tuple[int, int, int]) -> None:
    assert find_cell(Image.new("RGB", (150, 150), colour)) is None


def test_a_frame_of_red_cells_has_no_white_one() -> None:
    assert find_cell(frame(cell=0, nucleus=0)) is None


def test_a_threshold_between_two_heaps() -> None:
    assert 1 < otsu(np.array([0.0, 0.5, 1.0, 9.0, 9.5, 10.0])) < 9


# --- the stain -----------------------------------------------------------------------------------


def test_a_known_gain_is_measured_and_undone() -> None:
    """Twice the dye is the square of what comes through; another lamp is a factor."""
    pixels = np.asarray(frame(), dtype=np.float64)
    mask = (pixels == NUCLEUS).all(2)
    here = measure_stain(pixels, mask)
    gain, lamp = np.array([0.5, 0.8, 1.5]), np.array([0.9, 1.05, 0.8])
    other = FIELD * lamp * (pixels / FIELD) ** gain
    there = measure_stain(other, mask)
    np.testing.assert_allclose(there.background, FIELD * lamp)
    np.testing.assert_allclose(np.array(there.nucleus) / here.nucleus, gain)
    np.testing.assert_allclose(restain(other, there, here), pixels, atol=1e-6)
    np.testing.assert_allclose(restain(restain(pixels, here, there), there, here), pixels)


def test_equal_nuclei_make_it_a_white_balance() -> None:
    pixels = np.asarray(frame(), dtype=np.float64)
    here, there = Stain((240, 220, 200), (1, 1, 1)), Stain((120, 220, 100), (1, 1, 1))
    np.testing.assert_allclose(restain(pixels, here, there), pixels * [0.5, 1, 0.5])


@pytest.mark.parametrize("least", [0, 1e-9, 0.021])
def test_a_colour_without_density_in_the_nuclei_is_changed_within_reason(least: float) -> None:
    """Nothing is divided by nothing, and the other colours are changed as ever."""
    pixels = np.random.default_rng(0).uniform(120, 230, (8, 8, 3))
    here, there = Stain((240, 240, 240), (0.5, 1, least)), Stain((240, 240, 240), (1, 1, 0.7))
    with np.errstate(all="raise"):
        found = restain(pixels, here, there)
        same = restain(pixels, here, here)
    np.testing.assert_allclose(found / 240, (pixels / 240) ** [2, 1, 4])
    np.testing.assert_allclose(same, pixels)


def test_the_field_has_no_density() -> None:
    pixels = np.asarray(frame(), dtype=np.float64)
    light = background(pixels)
    np.testing.assert_allclose(light, FIELD)
    density = optical_density(pixels, light)
    assert density[0, 100].tolist() == [0, 0, 0]
    assert (density >= 0).all()


# --- the look ------------------------------------------------------------------------------------


def test_a_batch_at_another_scale_is_cropped_to_show_the_same() -> None:
    there, _ = measure_look([frame(cell=80, nucleus=50)])
    here, seen = measure_look([frame(cell=120, nucleus=75), Image.new("RGB", (150, 150), FIELD)])
    assert seen == 1
    assert crop_for(0.5, here, there) == pytest.approx(0.75, rel=0.04)
    with pytest.raises(DataError, match="No white cell"):
        measure_look([Image.new("RGB", (150, 150), FIELD)])


def test_the_look_is_that_of_frames_from_the_whole_batch() -> None:
    """A batch whose nuclei grow from 30 px to 69 px, of which ten are looked at."""
    sizes = range(30, 70)
    batch = [
        Sample(str(n), None, source=HeldBytes(png(np.asarray(frame(nucleus=n))))) for n in sizes
    ]
    look, seen = look_of(batch, 10)
    assert seen == 10
    assert look.nucleus * 200 == pytest.approx(np.median(sizes[::4]), abs=3)


def test_frames_are_brought_to_one_light() -> None:
    dim = Image.fromarray((np.asarray(frame()) * [0.7, 0.8, 0.6]).astype(np.uint8))
    look = Look(light=FIELD)
    found = np.asarray(matched(dim, "light", look, None)).astype(int)
    np.testing.assert_allclose(found, np.asarray(frame()), atol=4)
    assert matched(dim, "nothing", look, None) is dim


def test_each_cell_can_be_centred_and_brought_to_one_size() -> None:
    look, _ = measure_look([frame(100, 100, 80, 50)])
    plain = Preprocess(size=32, crop=0.5, look=look).canvas(frame(100, 100, 80, 50)).astype(int)
    one = Preprocess(size=32, crop=0.5, look=look, each=True)
    moved = one.canvas(frame(70, 110, 120, 75, 240, ())).astype(int)
    assert np.abs(moved - plain).mean() < 6
    empty = Image.new("RGB", (60, 60), FIELD)  # no cell: the crop of the model
    np.testing.assert_array_equal(one.canvas(empty)[:, 0, 0], FIELD)


# --- in use --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--match", "size"], ["--match", "scale", "--crop", "1"]], ids=str
)
def test_a_wrong_match_writes_nothing(tmp_path: Path, words: list[str]) -> None:
    cells = write_discs(tmp_path / "in", each=1)
    told = cli("predict", cells, "-o", tmp_path / "out", "--device", "cpu", *words)
    assert told.code == 2
    assert "match" in told.complaint
    assert not (tmp_path / "out").exists()


def frames(folder: Path, count: int, scale: float, light: float) -> Path:
    """Frames of PBC's look, their cells `scale` times as large and `light` times as bright."""
    folder.mkdir()
    for i in range(count):
        cell = frame(100 + i, 100, scale * 84, scale * 54, neighbours=())
        bright = np.asarray(cell) * np.array(Look().light) / FIELD * light
        Image.fromarray(bright.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    ("count", "scale", "light", "words", "same_as"),
    [
        (8, 1.0, 1.0, [], "nothing"),
        (8, 1.2, 0.97, [], "nothing"),  # a batch of monocytes, a lamp a little dimmer
        (8, 0.5, 1.0, [], "nothing"),  # platelets
        (8, 1.5, 1.0, [], "nothing"),  # promyelocytes
        (8, 1.8, 1.0, [], "scale"),
        (8, 1.0, 0.8, [], "light"),
        (8, 1.6, 0.8, [], "light,scale"),
        (8, 1.25, 0.8, [], "light,scale"),  # in other light even that is another scale
        (8, 0.5, 0.8, [], "light"),  # but platelets stay platelets
        (8, 1.6, 0.8, ["--crop", "0.7"], "light"),  # what is given stays
        (7, 1.6, 0.8, [], "nothing"),  # too few to tell
    ],
)
def test_frames_that_look_different_are_matched_unasked(
    tmp_path: Path, count: int, scale: float, light: float, words: list[str], same_as: str
) -> None:
    cells = frames(tmp_path / "in", count, scale, light)
    rows = []
    twin = ["--budget", "balanced-abroad", "-m", "pbc8-far"] * (
        "light" in same_as
    )  # not for scale alone
    for name, more in (("auto", []), ("asked", ["--match", same_as, *twin])):
        told = cli("predict", cells, "-o", tmp_path / name, "--device", "cpu", *words, *more)
        assert told.code == 0, told.err
        rows.append(pq.read_table(tmp_path / name / "predictions.parquet").to_pylist())
        if name == "auto":
            assert ("differ from those" in told.err) == (same_as != "nothing" or count < 8)
            assert ("taken as they are. Set match (--match) to light,scale" in told.err) == (
                count < 8
            )
            assert ("Budget balanced-abroad" in told.err) == bool(twin)
            assert ("Model pbc8-far in place of pbc8" in told.err) == bool(twin)
            assert ("say so with --classes" in told.err) == bool(twin)
    for auto, asked in zip(*rows, strict=True):
        assert auto | {"milliseconds": 0} == asked | {"milliseconds": 0}


def test_a_folder_that_grows_is_matched_as_before(tmp_path: Path) -> None:
    """What the first frames showed stays, so that what was named stays; a crop of one's own does not."""
    cells, words = frames(tmp_path / "in", 8, 1.6, 0.8), ["-o", tmp_path / "out", "--device", "cpu"]
    assert cli("predict", cells, *words).code == 0
    before = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    for path in sorted(frames(tmp_path / "more", 12, 1.8, 0.8).iterdir()):
        path.rename(cells / f"more-{path.name}")
    told = cli("predict", cells, *words)
    assert told.code == 0, told.err
    assert "light brought to that of training; nuclei 1.6 times as large" in told.err  # again
    after = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    assert (len(before), len(after)) == (8, 20)
    assert [row for row in after if not row["path"].startswith("more-")] == before
    assert cli("predict", cells, *words, "--crop", 0.5).code == 2
    (tmp_path / "out" / "request.json").write_text("[]")
    assert "version of this program" in cli("predict", cells, *words).complaint


def test_who_asks_for_light_keeps_the_weights_of_home(tmp_path: Path) -> None:
    """It is said; asked for otherwise, in the same folder, rows are not mixed."""
    cells, words = frames(tmp_path / "in", 8, 1.0, 0.8), ["-o", tmp_path / "out", "--device", "cpu"]
    told = cli("predict", cells, *words, "--match", "light")
    assert told.code == 0, told.err
    assert "Budget balanced has weights from home; balanced-abroad" in told.err
    assert json.loads((tmp_path / "out" / "request.json").read_text())["budget"] == "balanced"
    assert "8 cells are already" in cli("predict", cells, *words, "--match", "light").err
    unasked = cli("predict", cells, *words)
    assert unasked.code == 2
    assert "model (pbc8; now pbc8-far)" in unasked.err


def test_a_model_that_was_asked_for_stays(tmp_path: Path) -> None:
    """In another light too, where pbc8-far is taken unasked; its twin is the model's own."""
    cells, out = frames(tmp_path / "in", 8, 1.0, 0.8), tmp_path / "out"
    told = cli("predict", cells, "-m", "pbc8", "-o", out, "--device", "cpu")
    assert told.code == 0, told.err
    assert "pbc8-far" not in told.err
    request = json.loads((out / "request.json").read_text())
    assert (request["model"], request["budget"]) == ("pbc8", "balanced-abroad")


def test_frames_that_are_foreign_to_one_model_alone_stay_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the edge, where the look of pbc8's own training says so and that of pbc8-far does not."""

    def seen(samples: Any, preprocess: Preprocess, *_: Any) -> Fit:
        foreign = preprocess.look == load("pbc8").preprocess.look
        return Fit(foreign, None, "They differ." * foreign, abroad=foreign)

    monkeypatch.setattr("cytodiffusion.data.match.fit_frames", seen)
    cells, out = frames(tmp_path / "in", 8, 1.0, 0.95), tmp_path / "out"
    for _ in range(2):
        told = cli("predict", cells, "-o", out, "--device", "cpu")
        assert told.code == 0, told.err
        request = json.loads((out / "request.json").read_text())
        taken = (request["model"], request["budget"], request["match"])
        assert taken == ("pbc8", "balanced-abroad", "light")


def test_a_glance_at_too_few_cells_is_taken_again(tmp_path: Path) -> None:
    """What it then shows is not mixed with rows of frames as they were."""
    cells, words = frames(tmp_path / "in", 3, 1.6, 0.8), ["-o", tmp_path / "out", "--device", "cpu"]
    assert "taken as they are" in cli("predict", cells, *words).err
    for file in frames(tmp_path / "more", 9, 1.6, 0.8).iterdir():
        file.rename(cells / f"more-{file.name}")
    again = cli("predict", cells, *words)
    assert again.code == 2
    assert "light brought to that of training" in again.err
    assert "holds predictions made with another model (pbc8; now pbc8-far)" in again.err


def test_a_crop_that_was_asked_for_is_not_taken_over(tmp_path: Path) -> None:
    cells, words = frames(tmp_path / "in", 8, 1.0, 1.0), ["-o", tmp_path / "out", "--device", "cpu"]
    assert cli("predict", cells, *words, "--crop", "0.9").code == 0
    assert "crop (0.9; now 0.55)" in cli("predict", cells, *words).err


def test_what_was_matched_is_written_down(tmp_path: Path) -> None:
    frames(tmp_path / "lymphocyte", 8, 1.6, 0.8)
    told = cli("evaluate", tmp_path, "-o", tmp_path / "out", "--device", "cpu", "--json")
    assert told.code == 0, told.err
    assert told.json["crop"] == pytest.approx(0.88, rel=0.06)
    assert (told.json["match"], told.json["budget"]) == ("light", "balanced-abroad")
    assert told.json["model"] == "pbc8-far"


def test_in_python_frames_are_matched_as_by_the_command(tmp_path: Path) -> None:
    model, paths = load("pbc8"), sorted(frames(tmp_path / "in", 8, 1.6, 0.8).iterdir())
    with pytest.warns(UserWarning, match=r"differ from those .* crop 0\.8") as told:
        unasked = model.read(paths)
    crop = float(re.findall(r"crop ([0-9.]+)\.", str(told[0].message))[0])
    asked = model.read(paths, "balanced-abroad", crop=crop, match="light")
    np.testing.assert_array_equal(unasked.probabilities, asked.probabilities)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left = model.read(paths, match="nothing")
        few = model.read(paths[:1], "balanced-abroad", crop=crop, match="light")
    assert np.abs(left.probabilities - asked.probabilities).max() > 0
    np.testing.assert_allclose(few.probabilities, asked.probabilities[:1], atol=1e-6)
    with pytest.raises(SettingsError, match="match size is not one of"):
        model.read(paths, match="size")


def test_the_report_gives_the_whole_call(tmp_path: Path) -> None:
    cells = write_discs(tmp_path / "two words", each=1)
    words = ["--crop", 0.7, "--sets", "class", "--device", "cpu"]
    assert cli("predict", cells, "-o", tmp_path / "out", *words).code == 0
    page = html.unescape((tmp_path / "out" / "report.html").read_text())
    assert f"cytodiffusion predict '{cells}' --out {tmp_path / 'out'} --model pbc8" in page
    assert "--crop 0.7" in page
    assert "--sets class" in page


@pytest.mark.parametrize(
    ("does", "left"),
    [
        ({}, (True, 0.88)),
        ({"match": "stain"}, (False, 0.88)),
        ({"each": True}, (True, None)),
        ({"match": "light", "each": True}, (False, None)),
    ],
)
def test_what_the_model_does_anyway_is_not_done_twice(
    tmp_path: Path, does: dict[str, Any], left: tuple[bool, float | None]
) -> None:
    samples = read_dataset(frames(tmp_path / "in", 8, 1.6, 0.8))
    fit = fit_frames(samples, Preprocess(crop=0.55, **does))
    assert (fit.light, fit.crop) == (left[0], left[1] and pytest.approx(left[1], rel=0.06))
    assert ("differ from those" in fit.told) == (left != (False, None))


def real(folder: Path, each: int) -> list[Sample]:
    """A few cells of each class, evenly spread."""
    if not folder.is_dir():
        pytest.skip(f"no real cells at {folder}")
    found = [sorted(c.iterdir()) for c in sorted(folder.iterdir()) if c.is_dir()]
    paths = [p for c in found for p in c[:: max(1, len(c) // each)][:each]]
    return [Sample(p.name, None, source=FileBytes(p)) for p in paths]


@pytest.mark.real
def test_real_cells_are_found_at_any_scale_and_in_any_light(data_root: Path) -> None:
    """The same frame at half the pixels and in another light: the same cell."""
    for sample in real(data_root / "raabin", 3):
        image = decode(sample.read())
        first = find_cell(image)
        assert first is not None
        assert 0.2 < first.nucleus / min(image.size) < first.cell / min(image.size) < 1
        assert np.hypot(first.x - image.width / 2, first.y - image.height / 2) < 0.25 * image.width
        half = find_cell(image.resize((image.width // 2, image.height // 2)))
        dim = find_cell(Image.fromarray((np.asarray(image) * [0.8, 0.9, 0.7]).astype(np.uint8)))
        assert half is not None
        assert dim is not None
        assert 2 * half.nucleus == pytest.approx(first.nucleus, rel=0.1)
        assert dim.nucleus == pytest.approx(first.nucleus, rel=0.05)


@pytest.mark.real
def test_the_cells_of_raabin_are_larger_than_those_of_pbc(data_root: Path) -> None:
    look, seen = look_of(real(data_root / "raabin", 6))
    assert seen >= 29
    assert 1.25 < look.nucleus / Look().nucleus < 1.7
    with (data_root / "pbc" / "splits.csv").open(newline="") as file:
        val = [r["path"] for r in csv.DictReader(file) if r["split"] == "val"
               and r["label"] in ("basophil", "lymphocyte", "monocyte", "neutrophil")]  # fmt: skip
    same, _ = look_of([Sample(p, None, source=FileBytes(data_root / "pbc" / p)) for p in val[::20]])
    assert same.nucleus == pytest.approx(Look().nucleus, rel=0.12)
    np.testing.assert_allclose(same.light, Look().light, atol=6)


@pytest.mark.real
def test_matching_is_said_and_kept(data_root: Path, tmp_path: Path) -> None:
    """`predict --match` on real cells: the crop is told, and belongs to the request."""
    (tmp_path / "in").mkdir()
    for i, sample in enumerate(real(data_root / "raabin", 2)):
        decode(sample.read()).save(tmp_path / "in" / f"{i}.png")
    words = ["predict", tmp_path / "in", "-o", tmp_path / "out", "--device", "cpu"]
    far = ["--match", "light,scale", "--budget", "balanced-abroad", "-m", "pbc8-far"]
    told = cli(*words, *far)
    assert told.code == 0, told.err
    assert "match scale: crop 0." in told.err
    again = cli(*words, "--match", "nothing", "-m", "pbc8-far")
    assert again.code == 2
    assert "light" in again.complaint
    auto = cli(*words)  # goes on as before
    assert auto.code == 0, auto.err
    words[3] = tmp_path / "other"
    auto = cli(*words)  # sees the same need
    assert auto.code == 0, auto.err
    assert "1.5 times as large" in auto.err
    requests = [(tmp_path / name / "request.json").read_text() for name in ("out", "other")]
    assert requests[0] == requests[1]


@pytest.mark.real
def test_nothing_is_matched_at_home(data_root: Path, tmp_path: Path) -> None:
    """Every class of PBC alone, and promyelocytes, which have the largest nuclei of all."""
    folders = sorted(path for path in (data_root / "pbc").iterdir() if path.is_dir())
    batches = {folder.name: sorted(folder.iterdir())[::200] for folder in folders}
    batches["PMY"] = sorted((data_root / "pbc" / "immature_granulocyte").glob("PMY*"))[::20]
    for name, paths in batches.items():
        cells = tmp_path / name
        cells.mkdir()
        for path in paths:
            (cells / path.name).write_bytes(path.read_bytes())
        told = cli("predict", cells, "-o", tmp_path / "out" / name, "--device", "cpu")
        assert told.code == 0, told.err
        assert "differ" not in told.err


def test_files_that_are_none_are_said_in_python_too(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="missing"):
        load("pbc8").read([tmp_path / "none.png"])
    with pytest.raises(DataError, match="No image files"):
        load("pbc8").read([])
