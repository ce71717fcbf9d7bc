"""docs/drawn.md: figures of cells whose answers are known, real images untouched, the picture marked."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import contents
from PIL import Image, ImageDraw

from cytodiffusion.bundle import ZOO, load
from cytodiffusion.data.load import load_images
from cytodiffusion.data.mark import Mark, marked_png, read_mark
from cytodiffusion.data.readers import read_dataset
from cytodiffusion.errors import DataError

DOCS = Path(__file__).parent.parent / "docs"
MAKE = SimpleNamespace(**runpy.run_path(str(DOCS / "make_drawn.py")))
FIELD, CYTOPLASM, NUCLEUS = (250, 230, 205), (200, 170, 170), (90, 60, 160)
NUMBERS = {figure.name: i for i, figure in enumerate(MAKE.FIGURES)}


@pytest.fixture(scope="module", autouse=True)
def pbc8() -> None:
    if not (ZOO / "pbc8").exists():
        pytest.skip("the model pbc8 is not in this checkout")


def cell(nucleus: float = 24, whole: float = 40, size: int = 64) -> np.ndarray:
    """A disc in a disc, diameters in px, uint8 (3, size, size); edges as a camera would blur them."""
    big = Image.new("RGB", (8 * size, 8 * size), FIELD)
    for diameter, colour in ((whole, CYTOPLASM), (nucleus, NUCLEUS)):
        box = [4 * (size - diameter), 4 * (size + diameter)]
        ImageDraw.Draw(big).ellipse((box[0], box[0], box[1], box[1]), fill=colour)
    return np.asarray(big.resize((size, size), Image.Resampling.BOX)).transpose(2, 0, 1)


def test_figures_of_a_known_cell() -> None:
    """Areas of two discs; density and hue of the nucleus's colour."""
    found = dict(zip(NUMBERS, MAKE.measure(cell()), strict=True))
    assert found["nucleus"] == pytest.approx(100 * np.pi * 12**2 / 64**2, rel=0.08)
    assert found["cell"] == pytest.approx(100 * np.pi * 20**2 / 64**2, rel=0.08)
    density = -np.log(np.array(NUCLEUS) / FIELD).mean()
    assert found["density"] == pytest.approx(density, abs=0.02)
    assert found["hue"] == pytest.approx(258, abs=1)  # 240 + 60 (90 - 60) / (160 - 60)
    assert found["grain"] == 0
    assert MAKE.measure(np.full((3, 64, 64), 230, np.uint8)) is None


@pytest.mark.parametrize(
    ("light", "degrees"), [((0, 0, 9), 240), ((9, 0, 9), 300), ((9, 0, 0), 360)]
)
def test_hue_does_not_jump_at_red(light: tuple[int, int, int], degrees: int) -> None:
    assert MAKE.hue(np.array(light, dtype=float)) == pytest.approx(degrees)


def test_grain_is_the_noise_of_the_quiet_parts() -> None:
    """Near sigma, whatever cell lies in the middle; a little below, since the quietest is taken."""
    rng = np.random.default_rng(0)
    for sigma in (3, 6):
        noisy = (cell() + rng.normal(0, sigma, (3, 64, 64))).round().astype(np.int64)
        assert 0.75 * sigma < MAKE.grain(noisy) < sigma


def test_fine_detail_is_power_at_high_frequency() -> None:
    """None of a slow wave, all of a fast one, and of white noise what lies outside the circle."""
    x = np.arange(64)
    for cycles, share in ((0.125, 0), (0.4, 100)):
        wave = np.broadcast_to(128 + 50 * np.cos(2 * np.pi * cycles * x), (3, 64, 64))
        assert MAKE.fine_detail(wave) == pytest.approx(share, abs=0.1)
    noise = np.random.default_rng(0).normal(128, 20, (3, 64, 64))
    assert MAKE.fine_detail(noise) == pytest.approx(100 * (1 - np.pi / 16), abs=1.5)


def test_usual_range_leaves_out_one_in_forty_on_either_side() -> None:
    assert MAKE.usual_range(np.arange(1.0, 40)[::-1]) == (1, 39)  # 1 of 40 places lies below 1
    assert MAKE.usual_range(np.arange(1.0, 80)) == (2, 78)
    with pytest.raises(DataError, match="39 at the least"):
        MAKE.usual_range(np.arange(38.0))


def test_outside_and_gap() -> None:
    real = np.arange(1.0, 80)
    one = MAKE.Compared(np.array([0.0, 1, 2, 78, 79]), real)
    assert one.outside() == (2, 1)
    assert one.gap == pytest.approx((32 - 40) / np.sqrt(80 * 79 / 12))


def test_same_cells_on_both_sides_give_equal_columns() -> None:
    """No gap, and no more outside than the range leaves out by its definition: 2 of 79."""
    rng = np.random.default_rng(0)
    table = {"a": rng.normal(9, 2, (79, len(NUMBERS))), "b": rng.normal(5, 1, (79, len(NUMBERS)))}
    text = MAKE.page(MAKE.compare(table, table), {"model": "m"})
    rows = re.findall(r"^\| (\w) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \[", text, re.MULTILINE)
    assert len(rows) == 2 * len(NUMBERS)
    assert all(drawn == real and gap == "+0.0" for _, drawn, real, gap, _ in rows)
    assert {outside for *_, outside in rows} == {f"{200 / 79:.1f} %"}
    assert "Not shown to fall outside more often than real cells in: " + ", ".join(NUMBERS) in text
    moved = table | {"a": table["a"] + np.array([100, 0, 0, 0, 0, 0]), "b": table["b"] + 100}
    text = MAKE.page(MAKE.compare(moved, table), {"model": "m"})
    assert "| 0.0 % | 100.0 % | **100.0 %** [97.7, 100.0] | larger in 2, smaller in 0" in text
    assert "Most drawn cells fall outside in: nucleus" in text


def test_grid_shows_drawn_cells_pixel_for_pixel() -> None:
    shown = MAKE.grid(
        {"a_cell": np.stack([cell(), cell(20)]), "b": np.stack([cell(30)] * 2)}, "line"
    )
    patches = [
        shown[:, y : y + 64, x : x + 64]
        for x in (MAKE.GAP, 2 * MAKE.GAP + 64)
        for y in (MAKE.HEAD, MAKE.HEAD + 64 + MAKE.GAP)
    ]
    for patch, expected in zip(patches, (cell(), cell(20), cell(30), cell(30)), strict=True):
        assert (patch == expected).all()


def write_sets(folder: Path) -> tuple[Path, Path]:
    """Of each class 3 marked cells, the smallest seed last, and 39 real ones in wider frames."""
    model, rng = load("pbc8", "cpu", engine="torch"), np.random.default_rng(0)
    drawn, real = folder / "drawn", folder / "real"
    for name in model.classes.names:
        (drawn / name).mkdir(parents=True)
        (real / name).mkdir(parents=True)
        for i in range(3):
            mark = Mark("pbc8", model.weights_sha256, 9 - i, name)
            (drawn / name / f"{i}.png").write_bytes(marked_png(cell(20 + i), mark))
        for i in range(39):
            frame = cell(*rng.uniform((30, 60), (45, 70)), size=120) - rng.integers(
                9, size=(3, 120, 120)
            )
            pixels = frame.astype(np.uint8).transpose(1, 2, 0)
            Image.fromarray(pixels).save(real / name / f"{i:02}.png")
    named = dict.fromkeys(MAKE.Drawing.__annotations__, 1)
    (drawn / MAKE.REQUEST).write_text(MAKE.json.dumps(named))
    return drawn, real


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["make_drawn.py", *map(str, words)])
    MAKE.main()


def test_real_images_are_read_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files come out; the picture has the first seeds; sets and wrong sets are as they were."""
    drawn, real = write_sets(tmp_path)
    before, out = contents(tmp_path), tmp_path / "out"
    run(monkeypatch, drawn, real, "--shown", 2, "-o", out)
    made = contents(out)
    assert list(made) == ["drawn.md", "drawn.png"]
    assert {name: data for name, data in contents(tmp_path).items() if "out" not in name} == before
    mark = read_mark(made["drawn.png"])
    assert mark is not None
    assert mark.seed == 7
    assert f"weights {mark.weights} |" in made["drawn.md"].decode()
    assert "| 24; a nucleus was found in 24," in made["drawn.md"].decode()
    with Image.open(out / "drawn.png") as image:
        first = np.asarray(image).transpose(2, 0, 1)[:, MAKE.HEAD :, MAKE.GAP :][:, :64, :64]
    assert (first == cell(22)).all()
    with pytest.raises(DataError, match="does not say that pbc8"):
        run(monkeypatch, real, real, "-o", out)
    with pytest.raises(DataError, match="real cells"):
        run(monkeypatch, drawn, drawn, "-o", out)
    assert contents(out) == made


def test_the_picture_and_the_page_belong_together() -> None:
    data = (DOCS / "drawn.png").read_bytes()
    mark = read_mark(data)
    assert mark is not None
    assert len(mark.label.split(", ")) == 8
    assert mark.weights in (DOCS / "drawn.md").read_text()
    assert len(data) < 250_000


@pytest.mark.real
def test_the_page_says_what_is_measured(data_root: Path) -> None:
    """Means of the real basophils of val, measured again."""
    folder = data_root / "pbc"
    samples = read_dataset(folder, splits=folder / "splits.csv", split="val")
    basophils = [sample for sample in samples if sample.label == "basophil"]
    preprocess = load("pbc8", "cpu", engine="torch").preprocess
    loaded = load_images(basophils, preprocess)
    found = np.array([MAKE.measure(item.pixels) for item in loaded])
    text = (DOCS / "drawn.md").read_text()
    written = re.findall(r"^\| basophil \| .+? \| (\S+) ± (\S+) \|", text, re.MULTILINE)
    for figure, told, values in zip(MAKE.FIGURES, written, found.T, strict=True):
        close = 0.6 * 10**-figure.digits
        assert float(told[0]) == pytest.approx(values.mean(), rel=0.01, abs=close)
        assert float(told[1]) == pytest.approx(values.std(ddof=1), rel=0.05, abs=close)
