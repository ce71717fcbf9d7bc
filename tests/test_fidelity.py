"""Fidelity: closed forms, the formulas by hand, copies that must be found, and the bench end to end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLASSES, cli, tiny_model, write_discs
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from cytodiffusion.bundle import ZOO, load
from cytodiffusion.cli.console import Console
from cytodiffusion.cli.fidelity import Cells, _authentic
from cytodiffusion.data.images import to_tensor
from cytodiffusion.data.transforms import POSES
from cytodiffusion.diffusion.precondition import EDMDenoiser
from cytodiffusion.errors import DataError, ModelError
from cytodiffusion.evaluate.baselines import BaselineSettings
from cytodiffusion.evaluate.features import LEVELS, pretrained_features, trunk_features
from cytodiffusion.evaluate.fidelity import (
    agreement,
    compare,
    copies,
    frechet_distance,
    kernel_distance,
    kernel_interval,
    manifold,
    matched,
    nearest_features,
    nearest_pixels,
    real_or_drawn,
)
from cytodiffusion.networks.compact import CompactNetwork, CompactSettings

RNG = np.random.default_rng(0)


def follow(work):
    """What a generator returns, and what it yielded."""
    seen = []
    while True:
        try:
            seen.append(next(work))
        except StopIteration as end:
            return end.value, seen


# --- measures of two sets ------------------------------------------------------------------------


def standardised(n: int, features: int) -> np.ndarray:
    """Points with mean 0 and covariance 1, exactly."""
    points = RNG.normal(size=(n, features))
    points -= points.mean(0)
    return points @ np.linalg.inv(np.linalg.cholesky(np.cov(points.T))).T


def test_frechet_of_gaussians_in_closed_form() -> None:
    """|a - b|^2 + sum (s_i - t_i)^2 where both covariances are diagonal."""
    first, second = standardised(60, 3), standardised(50, 3)
    s, t = np.array([1.0, 2.0, 0.5]), np.array([1.5, 1.0, 3.0])
    shift = np.array([1.0, -2.0, 0.0])
    want = 5 + ((s - t) ** 2).sum()
    assert frechet_distance(first * s, second * t + shift) == pytest.approx(want)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_frechet_as_written() -> None:
    first, second = RNG.normal(size=(40, 4)), RNG.normal(size=(30, 4)) @ RNG.normal(size=(4, 4))
    a, b = np.cov(first.T), np.cov(second.T)
    gap = first.mean(0) - second.mean(0)
    want = gap @ gap + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert frechet_distance(first, second) == pytest.approx(want)


def test_kernel_distance_by_hand() -> None:
    x, y = RNG.normal(size=(5, 3)), RNG.normal(size=(4, 3)) + 1

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    within_x = np.mean([k(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    within_y = np.mean([k(y[i], y[j]) for i in range(4) for j in range(4) if i != j])
    across = np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(within_x + within_y - 2 * across)


def test_kernel_distance_has_no_bias() -> None:
    """Of two halves of one set it is 0 on average, and the interval of 19 in 20 pairs has it."""
    found = [kernel_distance(*RNG.normal(size=(2, 30, 4))) for _ in range(100)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 100**0.5
    hit = 0
    for seed in range(30):
        low, high = kernel_interval(*RNG.normal(size=(2, 100, 4)), seed)
        hit += low <= 0 <= high
    assert hit >= 24
    assert kernel_interval(*RNG.normal(size=(2, 19, 4))) is None


def test_manifold_by_hand() -> None:
    real, drawn, k = RNG.normal(size=(40, 2)), RNG.normal(size=(30, 2)) + 0.8, 5
    reach = {name: np.sort(cdist(x, x), 1)[:, k] for name, x in (("r", real), ("d", drawn))}
    apart = cdist(real, drawn)
    inside = apart <= reach["r"][:, None]
    assert manifold(real, drawn) == pytest.approx({
        "precision": inside.any(0).mean(),
        "recall": (apart <= reach["d"][None]).any(1).mean(),
        "density": inside.sum() / (k * len(drawn)),
        "coverage": inside.any(1).mean(),
    })  # fmt: skip


def test_manifold_at_its_ends() -> None:
    """A set beside itself, and beside one that is far away; one point drawn again and again."""
    real = RNG.normal(size=(50, 3))
    same = manifold(real, real)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert set(manifold(real, real + 100).values()) == {0}
    stuck = manifold(real, np.repeat(real[:1], 50, 0) + 1e-9 * RNG.normal(size=(50, 3)))
    assert stuck["precision"] == 1
    assert stuck["recall"] < 0.1 > stuck["coverage"] - 0.2


def test_too_few_to_compare() -> None:
    with pytest.raises(DataError, match="5 real and 50 drawn cells"):
        compare(RNG.normal(size=(5, 3)), RNG.normal(size=(50, 3)))


# --- copies --------------------------------------------------------------------------------------


def pictures(n: int, size: int = 16) -> np.ndarray:
    return RNG.integers(0, 256, size=(n, 3, size, size), dtype=np.uint8)


def test_a_turned_copy_is_found() -> None:
    training, cells = pictures(1200), pictures(5)
    cells[2] = POSES[5](torch.from_numpy(training[777])).numpy()
    near, seen = follow(nearest_pixels(cells, training))
    assert seen == [500, 1000, 1200]
    assert near.which[2] == 777
    assert near.distance[2] == pytest.approx(0, abs=1e-3)
    assert near.ratio[2] == pytest.approx(0, abs=1e-2)
    assert np.delete(near.ratio, 2).min() > 0.8


def test_nearest_in_pixels_by_hand() -> None:
    """Half the resolution, best pose, rms in image units."""
    training, cells = pictures(30), pictures(4)

    def small(x):
        return x.astype(float).reshape(-1, 3, 8, 2, 8, 2).mean((3, 5)) / 127.5 - 1

    turned = np.stack([small(pose(torch.from_numpy(cells)).numpy()) for pose in POSES], 1)
    rms = ((turned[:, :, None] - small(training)) ** 2).mean((3, 4, 5)) ** 0.5
    best = np.sort(rms.min(1), axis=1)
    near, _ = follow(nearest_pixels(cells, training))
    assert near.which.tolist() == rms.min(1).argmin(1).tolist()
    assert near.distance == pytest.approx(best[:, 0], rel=1e-4)
    assert near.ratio == pytest.approx(best[:, 0] / best[:, 9], rel=1e-4)


def test_copies_stand_out_from_cells_that_took_no_part() -> None:
    training, fresh = RNG.normal(size=(2000, 4)), RNG.normal(size=(400, 4))
    usual = nearest_features(RNG.normal(size=(400, 4)), training)
    honest = copies(nearest_features(fresh, training), usual)
    assert honest["nearer_ci95"][0] < 0.03
    assert honest["distance_to_real"] == pytest.approx(1, abs=0.15)
    fresh[:40] = training[:40] + 1e-4
    caught = copies(nearest_features(fresh, training), usual)
    assert caught["nearer"] >= 0.1
    assert caught["nearer_by_ratio"] >= 0.1
    assert caught["smallest_ratio"] < 0.01 < caught["smallest_ratio_real"]


# --- names, and real or drawn --------------------------------------------------------------------


def test_agreement_by_hand() -> None:
    told = agreement(np.array([0, 0, 2, 2, 2]), np.array([0, 1, 2, 2, 2]), CLASSES)
    assert told["agreement"] == 0.8
    assert [(row["class"], row["agreement"], row["agreement_n"]) for row in told["classes"]] == [
        (CLASSES[0], 0.5, 2), (CLASSES[2], 1.0, 3),
    ]  # fmt: skip
    assert told["agreement_ci95"] == pytest.approx([0.284, 0.995], abs=1e-3)  # Clopper-Pearson


def test_as_many_of_each_class() -> None:
    first, second = np.array([0, 0, 0, 1, 2]), np.array([2, 2, 1, 1, 0, 0])
    rows = matched(first, second)
    assert first[rows[0]].tolist() == second[rows[1]].tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(("shift", "low", "high"), [(60, 0.95, 1.0), (0, 0.25, 0.75)])
def test_real_or_drawn(shift: int, low: float, high: float) -> None:
    """Cells that are brighter are told; cells of one kind are not."""
    real, drawn = (RNG.integers(60, 140, size=(32, 3, 16, 16), dtype=np.uint8) for _ in range(2))
    settings = BaselineSettings(steps=30, batch=8, learning_rates=(1e-3,))
    work = real_or_drawn(real, drawn + np.uint8(shift), np.arange(32) % 2, settings)
    told, _ = follow(work)
    assert told["accuracy_n"] == told["trained_on"] == 32
    assert low <= told["auroc"] <= high


def test_one_cell_cannot_be_halved() -> None:
    with pytest.raises(DataError, match="draw more"):
        next(real_or_drawn(pictures(2), pictures(2), np.array([0, 1]), BaselineSettings(steps=1)))


# --- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["heads", "conditional"])
def test_trunk_features_are_what_the_denoiser_works_with(form: str) -> None:
    """Caught on the way: the input of the last layers, for "any cell"."""
    settings = CompactSettings(classes=3, size=16, form=form, width=16, multipliers=(1,))
    network = CompactNetwork(settings).eval()
    images, caught = torch.randn(40, 3, 16, 16), []
    features = network.features
    network.features = lambda *words: caught.append(features(*words)) or caught[-1]
    found = trunk_features(network, 0.5, 3)(images)
    assert found.shape == (40, 32)
    caught.clear()
    for level in LEVELS:
        sigma = torch.full((40,), level)
        EDMDenoiser(network)(images, sigma, torch.full((40, 1), 3))
    want = torch.cat([each.mean((2, 3)) for each in caught], 1).detach().numpy()
    assert found == pytest.approx(want, abs=1e-5)


def test_a_pretrained_network_from_a_folder(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                          patch_size=14)  # fmt: skip
    network = Dinov2Model(config).eval()
    network.save_pretrained(tmp_path)
    scale = {"image_mean": [0.4] * 3, "image_std": [0.2] * 3, "crop_size": {"height": 28}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(scale))
    images = torch.rand(3, 3, 28, 28) * 2 - 1
    with torch.inference_mode():
        want = network(((images + 1) / 2 - 0.4) / 0.2).pooler_output.numpy()
    assert pretrained_features(tmp_path)(images) == pytest.approx(want, abs=1e-4)


def test_a_folder_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no network that can be read"):
        pretrained_features(tmp_path)


# --- the bench -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The tiny model, cells that it drew, and real ones with splits."""
    bundle = tiny_model(tmp_path_factory.getbasetemp()).bundle
    folder = tmp_path_factory.mktemp("fidelity")
    told = cli("generate", "-m", bundle, "-o", folder / "drawn", "--per-class", 7, "--steps", 4,
               "--device", "cpu")  # fmt: skip
    assert told.code == 0, told.err
    write_discs(folder / "real" / "train", each=14)
    write_discs(folder / "real" / "val", each=7, first=40)
    return bundle, folder / "drawn", folder / "real"


def bench(made: tuple[Path, Path, Path], out: Path, *words: object):
    return cli("bench", "fidelity", made[1], made[2], "-m", made[0], "-o", out, "--steps", 12,
               "--device", "cpu", *words)  # fmt: skip


def test_the_bench(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    told = bench(made, tmp_path, "--features", "baseline")
    assert told.code == 0, told.err
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["cells"] == {"drawn": 21, "real": 21, "matched": 21, "training": 42}
    assert [row["judge"] for row in found["agreement"]] == ["independent", load(made[0]).name]
    assert found["real_or_drawn"]["accuracy_n"] == 18  # 4 of 7 of each class are learned from
    assert found["alike"]["drawn"]["fid"] > 0
    assert set(found["copies"]) == {"pixels", "features"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 24  # twelve pairs
    assert "bench fidelity" in page
    again = bench(made, tmp_path, "--features", "baseline", "--json")
    assert again.err.count("before") == 2
    assert again.json == found
    (judge,) = (tmp_path / "classifiers").iterdir()
    given = bench(made, tmp_path / "given", "--baseline", judge, "--json")
    assert "independent classifier" not in given.err  # it is not trained anew
    assert given.json["agreement"] == found["agreement"]
    assert "that was trained before, on 42 images" in (tmp_path / "given/report.html").read_text()


def test_too_few_cells_are_told_before_training(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    for path in (made[2] / "train").glob("*/*.png"):
        target = tmp_path / "real" / path.relative_to(made[2])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    write_discs(tmp_path / "real" / "val", each=1)
    told = bench((*made[:2], tmp_path / "real"), tmp_path / "out")
    assert told.code == 2
    assert "3 real and 3 drawn cells of the same classes are too few" in told.complaint
    assert "training the" not in told.err


def test_corrected_labels_are_learned_anew(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    real = shutil.copytree(made[2], tmp_path / "real")
    assert bench((*made[:2], real), tmp_path / "out").code == 0
    one, other = (real / "train" / name for name in CLASSES[:2])
    one.rename(tmp_path / "kept")
    other.rename(one)
    (tmp_path / "kept").rename(other)
    again = bench((*made[:2], real), tmp_path / "out")
    assert again.code == 0
    assert "Independent classifier: trained before" not in again.err
    assert len(list((tmp_path / "out" / "classifiers").iterdir())) == 2


def test_a_model_of_another_size_measures_anew(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real or drawn is told at the size of the model: what was found at another is not taken over."""
    sizes, small = [], load(made[0])
    larger = replace(small, preprocess=small.preprocess.model_copy(update={"size": 24}))

    def told(real: np.ndarray, *_: object) -> Iterator[int]:
        sizes.append(real.shape[-1])
        yield from ()
        return {"size": real.shape[-1]}

    monkeypatch.setattr("cytodiffusion.evaluate.fidelity.real_or_drawn", told)
    for model in (small, larger, small, larger):
        size = model.preprocess.size
        pixels, names = np.zeros((4, 3, size, size), np.uint8), list("abcd")
        cells = Cells(pixels, np.zeros(4, int), names, names, pixels)
        found = _authentic(model, (cells, cells), "settings", tmp_path, "cpu", Console(False))
        assert found == {"size": size}
    assert sizes == [16, 24]


def test_wrong_calls_write_nothing(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for words, said in (
        (["--split", "nonsense"], "nonsense"),
        (["--split", "train"], "both 'train'"),
        (["--features", tmp_path], "no network"),
        (["--baseline", tmp_path], "no baseline"),
    ):
        told = bench(made, tmp_path / "out", *words)
        assert told.code == 2
        assert said in told.complaint
    swapped = cli("bench", "fidelity", made[2], made[1], "-m", made[0], "-o", tmp_path / "out")
    assert swapped.code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.real
@pytest.mark.skipif(not (ZOO / "pbc8").is_dir(), reason="pbc8 is not in the zoo yet")
def test_real_cells_are_no_copies_of_each_other(data_root: Path) -> None:
    """The released model's features, 64 cells of val and 200 of train: a copy stands out."""
    if not (data_root / "pbc" / "splits.csv").is_file():
        pytest.skip(f"no pbc/splits.csv in {data_root}")
    from cytodiffusion.data.load import load_images
    from cytodiffusion.data.readers import read_dataset

    model, pbc = load("pbc8"), data_root / "pbc"
    sets = {}
    for split, count in (("val", 64), ("train", 200)):
        samples = read_dataset(pbc, splits=pbc / "splits.csv", split=split)
        chosen = samples[:: len(samples) // count][:count]
        sets[split] = np.stack([item.pixels for item in load_images(chosen, model.preprocess)])
    extractor = trunk_features(model.denoiser.network, model.denoiser.sigma_data, 8)
    val, train = (extractor(to_tensor(sets[name])) for name in ("val", "train"))
    assert compare(val, train)["kid"] < compare(val, val + 0.5 * val.std(0))["kid"]
    forged = sets["val"].copy()
    forged[0] = POSES[3](torch.from_numpy(sets["train"][10])).numpy()
    near, _ = follow(nearest_pixels(forged, sets["train"]))
    assert near.which[0] == 10
    assert near.ratio[0] < 0.05 < near.ratio[1:].min()
