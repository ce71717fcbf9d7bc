"""Maps of what would have to change: exact in a Gaussian world, undone exactly, told from noise."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLASSES, cli, contents, disc, tiny_model, write_discs
from PIL import Image

from cytodiffusion.bundle import ZOO, load
from cytodiffusion.diffusion.sample import guided, sample
from cytodiffusion.errors import LabelError
from cytodiffusion.explain import picture
from cytodiffusion.explain.counterfactual import (
    VIEWS,
    Explanation,
    Settings,
    _map,
    beyond_noise,
    explain,
    guesses,
    mean_and_error,
    measure,
    neutral,
    redraw,
)
from cytodiffusion.networks.exact import GaussianWorld
from cytodiffusion.types import Classes

SIZE = 12
STD = 0.3
NAMES = Classes(("disc", "ring", "spot"))
SETTINGS = Settings(levels=(0.4, 0.8), pairs=4, starts=(0.5, 2.0), steps=4)


def world() -> GaussianWorld:
    """Three classes whose means look the same in every view: all poses, all shifts."""
    flat = torch.tensor([-0.5, 0.1, 0.4]).view(3, 1, 1, 1).expand(3, 3, SIZE, SIZE)
    return GaussianWorld(flat * torch.tensor([1.0, 0.5, -1.0]).view(1, 3, 1, 1), STD)


def cell(seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) - 1


class Shifting:
    """Guesses what it sees; label 1 lighter on the left half of that, and darker on the right."""

    def __call__(self, noisy, sigma, labels):
        step = torch.full(noisy.shape[-2:], -0.25)
        step[:, : noisy.shape[-1] // 2] = 0.25
        return noisy[:, None] + labels[:, :, None, None, None] * step


# --- views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_a_view_is_undone_exactly(view):
    image = cell()
    assert view.undo(view(image)).equal(image)
    assert view(view.undo(image)).equal(image)


def test_views_take_every_pose_and_every_shift_once():
    assert len({(view.pose.mirror, view.pose.turns) for view in VIEWS}) == 8
    assert len({(view.down, view.right) for view in VIEWS}) == len(VIEWS) == 16


def test_what_is_read_in_a_view_is_put_back_where_it_was():
    """A denoiser that returns what it sees gives the image back, noise and all, in its own frame."""
    image, draws = cell(), SETTINGS.draws
    found = guesses(lambda noisy, sigma, labels: noisy[:, None], image, "a", [0], draws)
    pairs = found[:, 0].view(-1, 2, 3, SIZE, SIZE).mean(1)  # the noise of a pair cancels
    torch.testing.assert_close(pairs, image.expand_as(pairs), atol=1e-6, rtol=0)


# --- maps ----------------------------------------------------------------------------------------


def test_the_map_of_a_gaussian_world_is_exact():
    """D_B - D_A = sigma^2 / (s^2 + sigma^2) (mu_B - mu_A) in every pixel, whatever the noise."""
    (found,) = measure(world(), cell(), "a", [0, 2], SETTINGS)
    share = np.mean([sigma**2 / (STD**2 + sigma**2) for sigma in SETTINGS.levels])
    gap = (world().means[2] - world().means[0]).numpy()
    np.testing.assert_allclose(found.change, share * gap, atol=1e-6)
    np.testing.assert_allclose(found.error, 0, atol=1e-6)
    np.testing.assert_allclose(found.light, found.change.mean(0), atol=1e-6)
    assert found.shown.all()


def test_the_opposite_question_has_the_opposite_map():
    there, back = (
        measure(world(), cell(), "a", labels, SETTINGS)[0] for labels in ([0, 2], [2, 0])
    )
    np.testing.assert_allclose(there.change, -back.change, atol=1e-6)
    np.testing.assert_allclose(there.support, -back.support, atol=1e-6)


def test_support_is_the_gap_of_the_errors():
    """Its mean is E_B - E_A, the difference that the classifier goes by."""
    image, draws = cell(), SETTINGS.draws
    (found,) = measure(world(), image, "a", [1, 2], SETTINGS)
    errors = (guesses(world(), image, "a", [1, 2], draws) - image).square().mean((0, 2, 3, 4))
    assert found.support.mean() == pytest.approx(float(errors[1] - errors[0]), rel=1e-5)


def test_several_classes_are_measured_as_one_by_one():
    together = measure(world(), cell(), "a", [0, 1, 2], SETTINGS)
    for other, found in zip((1, 2), together, strict=True):
        (alone,) = measure(world(), cell(), "a", [0, other], SETTINGS)
        np.testing.assert_allclose(found.change, alone.change, atol=1e-6)


def test_what_depends_on_the_view_is_in_the_standard_error():
    """The left half of what is shown is another half of the cell in every pose: no finding."""
    (found,) = measure(Shifting(), cell(), "a", [0, 1], Settings(levels=(0.4,), pairs=16))
    assert found.error.min() > 0.05
    assert not found.shown.any()


def test_noise_comes_from_seed_and_image_alone():
    first, again = (measure(Noisy(), cell(), "a", [0, 1], SETTINGS)[0] for _ in range(2))
    assert np.array_equal(first.change, again.change)
    for digest, settings in (("b", SETTINGS), ("a", SETTINGS.model_copy(update={"seed": 1}))):
        (other,) = measure(Noisy(), cell(), digest, [0, 1], settings)
        assert not np.allclose(first.change, other.change)


class Noisy:
    """The guess of label 1 differs by the squared noise, which pairs do not cancel."""

    def __call__(self, noisy, sigma, labels):
        return noisy[:, None] + labels[:, :, None, None, None] * noisy[:, None].square()


# --- standard errors -----------------------------------------------------------------------------


def test_mean_and_error_by_hand():
    """Levels (1, 3) and (10, 10): mean 6; within them variances 2 and 0, over 2 draws and 2 levels."""
    values = np.array([[1.0, 3.0], [10.0, 10.0]])[:, :, None]
    mean, error = mean_and_error(values)
    assert mean.tolist() == [6.0]
    assert error.tolist() == pytest.approx([np.sqrt(2 / 2) / 2])


def test_the_standard_error_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(size=(3, 5, 40_000))
    mean, error = mean_and_error(values)
    assert mean.std() == pytest.approx(1 / np.sqrt(15), rel=0.03)
    assert np.sqrt(np.square(error).mean()) == pytest.approx(1 / np.sqrt(15), rel=0.03)


def test_noise_is_not_shown():
    """Of 100 maps of nothing, a share of about 5 % at the most shows anything at all."""
    rng = np.random.default_rng(1)
    shown = 0
    for _ in range(100):
        mean, error = mean_and_error(rng.normal(size=(2, 8, 16, 16)))
        shown += beyond_noise(mean, error, 14, 0.05).any()
    assert shown <= 11


def test_noise_of_few_pairs_is_not_shown():
    """Two pairs at each of two levels have two degrees of freedom, however many pixels there are."""
    noise = np.random.default_rng(0).normal(size=(8, 3, 40, 40))
    assert not _map(0 * noise, noise, Settings(levels=(0.4, 0.8), pairs=2)).shown.any()


def test_a_finding_is_shown_and_most_of_what_is_shown_is_one():
    rng = np.random.default_rng(2)
    truth = np.zeros((32, 32))
    truth[8:16, 8:16] = 3.0
    mean, error = mean_and_error(truth + rng.normal(size=(2, 8, 32, 32)))
    found = beyond_noise(mean, error, 14, 0.05)
    assert found[truth > 0].all()
    assert found[truth == 0].sum() <= 0.15 * found.sum()


def test_no_scatter_is_certainty_and_nothing_is_nothing():
    mean, error = np.array([[0.0, 1e-3]]), np.zeros((1, 2))
    assert beyond_noise(mean, error, 14, 0.05).tolist() == [[False, True]]


# --- drawing -------------------------------------------------------------------------------------


def test_drawing_is_the_sampler_of_diffusion(monkeypatch):
    """Before the last guess, and in a world that looks the same in every view: DDIM."""
    monkeypatch.setattr("cytodiffusion.explain.counterfactual.GRAIN", 0.0)
    image = cell()
    found = redraw(Seen(), image, "a", [0, 2], SETTINGS)
    from cytodiffusion.classify.draws import standard_normal
    from cytodiffusion.explain.counterfactual import DRAWING

    noise = standard_normal((3, SIZE, SIZE), 0, "a", DRAWING)
    for i, start in enumerate(SETTINGS.starts):
        levels = torch.tensor([*np.geomspace(start, 0.05, SETTINGS.steps), 0.0]).float()
        noisy = (image + start * noise).expand(2, -1, -1, -1)
        guess = guided(Seen(), torch.tensor([0, 2]), 3)
        *_, last = sample(guess, noisy / levels[0], levels, sampler="ddim")
        torch.testing.assert_close(found[i], last, atol=1e-5, rtol=1e-5)


class Seen:
    """The Gaussian world, but for a noise level of 0, where it returns what it sees."""

    def __call__(self, noisy, sigma, labels):
        if sigma.max() == 0:
            return noisy[:, None].expand(-1, labels.shape[1], -1, -1, -1)
        return world()(noisy, sigma, labels)


def test_as_itself_the_difference_is_nothing_and_as_another_it_is_the_way_there():
    drawn = redraw(world(), cell(), "a", [0, 0, 2], SETTINGS)
    assert drawn[:, 0].equal(drawn[:, 1])
    difference = (drawn[:, 2] - drawn[:, 0]).numpy()
    gap = (world().means[2] - world().means[0]).numpy()
    shares = difference / gap
    assert np.ptp(shares, axis=(1, 2, 3)).max() < 1e-4  # the same share of the way in every pixel
    assert 0 < shares[0].mean() < shares[1].mean() < 1  # more of the way from more noise


def test_any_cell_keeps_little_of_a_cell():
    first, second = (neutral(world(), NAMES, cell(seed), "a", 0) for seed in (0, 1))
    assert (first - second).abs().max() < 0.1 * (cell(0) - cell(1)).abs().max()


def test_the_seed_decides_what_any_cell_looks_like():
    first, again, other = (neutral(world(), NAMES, cell(), "a", seed) for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


# --- explanations --------------------------------------------------------------------------------


def explanation() -> Explanation:
    return explain(world(), NAMES, cell(), "a", "disc", ["spot"], SETTINGS)[0]


def test_an_explanation_is_kept_whole(tmp_path: Path):
    before = explanation()
    before.save(tmp_path / "a.npz")
    after = Explanation.load(tmp_path / "a.npz")
    assert (after.own, after.other) == ("disc", "spot")
    for name in ("image", "starts", "as_own", "as_other"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    for name, value in vars(before.map).items():
        np.testing.assert_array_equal(value, getattr(after.map, name))


def test_the_counterfactual_is_the_cell_and_the_difference():
    each = explanation()
    want = np.clip(each.image + each.as_other - each.as_own, -1, 1)
    np.testing.assert_allclose(each.counterfactual, want, atol=1e-6)


def test_a_class_that_is_none_is_refused():
    with pytest.raises(LabelError, match="'blast'"):
        explain(world(), NAMES, cell(), "a", "disc", ["blast"], SETTINGS)


def test_pictures_are_the_same_every_time():
    each = explanation()
    files = [[kind(picture.figure(each, ["one", "two"], ["three", "four"], 0))
              for kind in (picture.png, picture.svg)] for _ in range(2)]  # fmt: skip
    assert files[0] == files[1]
    assert files[0][0].startswith(b"\x89PNG")
    assert b"brightness, % of white" in files[0][1]
    for words in (b"three", b"from noise 2"):
        assert words in files[0][1]


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.getbasetemp()).bundle


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_discs(tmp_path_factory.mktemp("explain") / "cells", each=1, first=60)


@pytest.fixture(scope="module")
def out(bundle: Path, cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain") / "out"
    told = cli("explain", cells, "-m", bundle, "-o", folder, "--device", "cpu", "--json")
    assert told.code == 0, told.err
    (folder / "said.json").write_text(told.out)
    return folder


def test_every_cell_has_a_picture_arrays_and_numbers(bundle: Path, out: Path) -> None:
    rows = json.loads((out / "said.json").read_text())["explanations"]
    assert len(rows) == 3
    for row in rows:
        each = Explanation.load(out / f"{row['files']}.npz")
        assert (each.own, each.other) == (row["predicted"], row["against"])
        assert row["probability"] < row["confidence"]
        assert set(row["faithful"]) == {
            "support",
            "change",
            "random",
            "edges",
            "soft edges",
            "centre",
        }
        for kind in ("png", "svg"):
            assert (out / f"{row['files']}.{kind}").stat().st_size > 1000
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "Research use only" in page


def test_reading_a_map_never_changes_the_classification(
    bundle: Path, cells: Path, out: Path, tmp_path: Path
) -> None:
    told = cli("predict", cells, "-m", bundle, "-o", tmp_path, "--device", "cpu")
    assert told.code == 0, told.err
    with (tmp_path / "predictions.csv").open(newline="") as file:
        table = {line["sha256"]: line for line in csv.DictReader(file)}
    rows = json.loads((out / "said.json").read_text())["explanations"]
    for row in rows:
        line = table[row["sha256"]]
        assert line["predicted"] == row["predicted"]
        assert float(line["confidence"]) == pytest.approx(row["confidence"], rel=1e-5)
    model = load(bundle)
    image = torch.from_numpy(disc(CLASSES[0], 60, 16).transpose(2, 0, 1).copy()).float() / 127.5 - 1
    before = model.classifier.measure(image[None], ["a"], "full").errors
    explain(model.denoiser, model.classes, image, "a", CLASSES[0], [CLASSES[1]], Settings())
    after = model.classifier.measure(image[None], ["a"], "full").errors
    assert np.array_equal(before, after)


def test_a_cell_is_explained_once(bundle: Path, cells: Path, out: Path) -> None:
    before = contents(out / "cells")
    stamps = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    told = cli("explain", cells, "-m", bundle, "-o", out, "--device", "cpu", "--json")
    assert told.code == 0, told.err
    assert "3 of 3 cells were explained before" in told.err
    assert told.json == json.loads((out / "said.json").read_text())
    assert contents(out / "cells") == before
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == stamps


def test_a_torn_record_and_a_lost_picture_are_made_anew(
    bundle: Path, cells: Path, tmp_path: Path
) -> None:
    path = next((cells / CLASSES[0]).iterdir())
    words = ["explain", path, "-m", bundle, "-o", tmp_path, "--device", "cpu", "--no-faithful"]
    assert cli(*words).code == 0
    before = contents(tmp_path / "cells")
    (record,) = (tmp_path / "cells").glob("*.json")
    record.write_text("{")
    assert cli(*words).code == 0
    assert contents(tmp_path / "cells") == before
    next((tmp_path / "cells").glob("*.png")).unlink()
    assert cli(*words).code == 0
    assert contents(tmp_path / "cells") == before


def test_against_several_classes_and_its_own(bundle: Path, cells: Path, tmp_path: Path) -> None:
    path = next((cells / CLASSES[0]).iterdir())
    words = [word for name in CLASSES for word in ("--against", name)]
    told = cli("explain", path, "-m", bundle, "-o", tmp_path, "--device", "cpu", "--no-faithful",
               "--json", *words)  # fmt: skip
    assert told.code == 0, told.err
    rows = told.json["explanations"]
    assert len(rows) == 2
    assert {rows[0]["predicted"], *(row["against"] for row in rows)} == set(CLASSES)
    told = cli("explain", path, "-m", bundle, "-o", tmp_path / "own", "--device", "cpu",
               "--no-faithful", "--against", rows[0]["predicted"])  # fmt: skip
    assert told.code == 0
    assert "already" in told.err


def test_an_unreadable_image_is_named_and_the_rest_is_done(bundle: Path, tmp_path: Path) -> None:
    Image.fromarray(disc(CLASSES[1], 3)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    told = cli("explain", tmp_path / "bad.png", tmp_path / "good.png", "-m", bundle, "-o",
               tmp_path / "out", "--device", "cpu", "--no-faithful", "--json")  # fmt: skip
    assert told.code == 1
    assert "bad.png" in told.err
    assert told.json["cells"] == 1
    assert [row["path"] for row in told.json["explanations"]] == ["good.png"]


def test_nothing_to_explain_leaves_the_report_as_it_was(
    bundle: Path, cells: Path, tmp_path: Path
) -> None:
    """A cell that is already what was asked for, and an image that cannot be read."""
    path, out = next((cells / CLASSES[0]).iterdir()), tmp_path / "out"
    words = ["-m", bundle, "-o", out, "--device", "cpu", "--no-faithful"]
    told = cli("explain", path, *words, "--json")
    assert told.code == 0, told.err
    before = (out / "report.html").read_bytes()
    (tmp_path / "bad.png").write_bytes(b"no image")
    own = told.json["explanations"][0]["predicted"]
    for more, code in (([path, "--against", own], 0), ([tmp_path / "bad.png"], 1)):
        for place in (out, tmp_path / f"new-{code}"):
            again = cli("explain", *more, *words, "-o", place)
            assert again.code == code, again.err
            assert "Nothing was explained" in again.out
        assert (out / "report.html").read_bytes() == before
        assert not (tmp_path / f"new-{code}" / "report.html").exists()


@pytest.mark.parametrize(
    "words", [["--against", "blast"], ["-m", "nonsense"], ["--budget", "huge"]], ids=str
)
def test_a_wrong_call_writes_nothing(bundle: Path, cells: Path, tmp_path: Path, words) -> None:
    told = cli("explain", cells, "-m", bundle, "-o", tmp_path / "out", "--device", "cpu", *words)
    assert told.code == 2
    assert words[1] in told.complaint
    assert not (tmp_path / "out").exists()


# --- the released model --------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.skipif(
    not (ZOO / "pbc8" / "config.json").exists(), reason="pbc8 is not in the zoo yet"
)
def test_real_cells_become_what_was_asked(data_root: Path) -> None:
    """Eosinophils as neutrophils lose their red, and half of them are named so; the map is on the cell."""
    images = sorted((data_root / "pbc" / "eosinophil").glob("*.webp"))[:4]
    if not images:
        pytest.skip(f"no pbc/eosinophil in {data_root}")
    model = load("pbc8", engine="torch")
    settings, named, redder = Settings(starts=(1.0,)), 0, []
    for path in images:
        image, sha = model.prepare(path.read_bytes())
        (each,) = explain(
            model.denoiser, model.classes, image, sha, "eosinophil", ["neutrophil"], settings
        )
        changed = torch.from_numpy(each.counterfactual)
        named += model.classifier.predict(changed, "balanced")[0] == "neutrophil"
        strength, middle = each.map.strength, slice(16, 48)
        assert strength[middle, middle].mean() > 1.5 * strength.mean()
        redder.append((each.map.change[0] - each.map.change[1:].mean(0))[middle, middle].mean())
    assert named >= 2
    assert max(redder) < 0
