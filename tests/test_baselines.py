"""Baselines: scores by hand, batches, a training that ends as it must, files, pseudo-labels."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLASSES, disc
from torch.distributions import MultivariateNormal

from cytodiffusion.data.images import Preprocess, to_tensor
from cytodiffusion.data.transforms import Augmentation
from cytodiffusion.errors import DataError, MissingExtra, ModelError, SettingsError
from cytodiffusion.evaluate.baselines import (
    KINDS,
    SHAPES,
    UNLABELLED,
    Baseline,
    BaselineSettings,
    Training,
    make_network,
    set_aside,
    shuffled,
    train_baseline,
)

PREPROCESS, AUGMENTATION = Preprocess(size=16, crop=1.0), Augmentation()
STEPS = BaselineSettings(kind="resnet", steps=30, batch=16, learning_rates=(1e-3,))


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Networks of the same make, but quicker."""
    with pytest.MonkeyPatch.context() as patch:
        for kind, sizes in {
            "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
            "convnext": {"hidden_sizes": [16, 16, 32], "depths": [1, 1, 1]},
            "vit": {"hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 32},
        }.items():
            patch.setitem(SHAPES, kind, SHAPES[kind] | sizes)
        yield


def discs(each: int, first: int = 0, size: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Canvases and labels: `each` discs of every class, with the margin that is cut off."""
    images = [disc(name, i, size) for i in range(first, first + each) for name in CLASSES]
    return np.stack(images).transpose(0, 3, 1, 2), np.tile(np.arange(3), each)


def end(work: Generator) -> tuple[list, Baseline]:
    """All reports and what was returned."""
    reports = []
    while True:
        try:
            reports.append(next(work))
        except StopIteration as stop:
            return reports, stop.value


def fit(settings: BaselineSettings, canvases: np.ndarray, labels: np.ndarray, **more):
    return end(
        train_baseline(canvases, labels, CLASSES, PREPROCESS, AUGMENTATION, settings, **more)
    )


@pytest.fixture(scope="module")
def trained() -> Baseline:
    return fit(STEPS, *discs(12))[1]


@pytest.fixture(scope="module")
def fresh() -> tuple[torch.Tensor, np.ndarray]:
    canvases, labels = discs(8, first=50)
    return to_tensor(canvases[:, :, 4:20, 4:20]), labels


# --- in use --------------------------------------------------------------------------------------


def test_it_names_discs(trained: Baseline, fresh: tuple[torch.Tensor, np.ndarray]) -> None:
    images, truth = fresh
    assert (trained.predict(images) == np.array(CLASSES)[truth]).mean() > 0.8
    np.testing.assert_allclose(trained.predict_proba(images).sum(1), 1)


def test_scores_are_those_of_their_formulas(
    trained: Baseline, fresh: tuple[torch.Tensor, np.ndarray]
) -> None:
    """Against the softmax itself, log-sum-exp, and torch's Gaussian density."""
    images = fresh[0]
    probabilities = trained.predict_proba(images)
    np.testing.assert_allclose(np.exp(-trained.anomaly_score(images)), probabilities.max(1))
    energy = -torch.logsumexp(torch.from_numpy(trained.logits(images)), 1).numpy()
    np.testing.assert_allclose(trained.anomaly_score(images, "energy"), energy)
    features = torch.from_numpy(trained.features(images))
    precision = torch.from_numpy(trained.precision)
    density = np.stack([
        MultivariateNormal(torch.from_numpy(mean), precision_matrix=(precision + precision.T) / 2)
        .log_prob(features).numpy() for mean in trained.means
    ])  # fmt: skip
    squared = trained.anomaly_score(images, "mahalanobis") ** 2
    constant = density.max(0) + squared / 2
    np.testing.assert_allclose(constant, constant[0], rtol=1e-6)


def test_a_score_that_there_is_not(trained: Baseline, fresh: tuple) -> None:
    with pytest.raises(SettingsError, match="softmax, energy, mahalanobis"):
        trained.anomaly_score(fresh[0], "odin")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_was_written(kind: str, tmp_path: Path, fresh: tuple) -> None:
    settings = STEPS.model_copy(update={"kind": kind, "steps": 2})
    (_, first), images = fit(settings, *discs(4)), fresh[0]
    first.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "baseline.json",
        "model.safetensors",
    ]
    again = Baseline.load(tmp_path)
    np.testing.assert_array_equal(again.logits(images), first.logits(images))
    np.testing.assert_array_equal(again.anomaly_score(images, "mahalanobis"),
                                  first.anomaly_score(images, "mahalanobis"))  # fmt: skip
    assert (again.classes, again.settings, again.trained) == (
        first.classes, settings, first.trained,
    )  # fmt: skip


# --- training ------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights() -> None:
    settings = STEPS.model_copy(update={"steps": 5, "learning_rates": (1e-3, 1e-2), "probe": 0.2})
    torch.manual_seed(1)
    (reports, one), _ = fit(settings, *discs(5)), torch.manual_seed(2)
    two = fit(settings, *discs(5))[1]
    for name, value in one.network.state_dict().items():
        assert value.equal(two.network.state_dict()[name]), name
    assert reports[-1].done == 1
    assert reports[-1].step == one.trained["steps"] == 5  # two probes of one step, then three
    assert one.trained["images"] == 80


def test_the_learning_rate_that_learns_is_taken() -> None:
    canvases, labels = discs(12)
    held = (canvases[:, :, 4:20, 4:20], labels)
    settings = STEPS.model_copy(update={"learning_rates": (1e-9, 2e-3), "probe": 0.4})
    for more in ({"held": held}, {}):
        assert fit(settings, canvases, labels, **more)[1].trained["learning_rate"] == 2e-3


def test_what_is_set_aside_is_trained_on_only_when_the_rate_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two learning rates are tried without it."""
    seen, real = list[np.ndarray](), Training.fit

    def spying(self: Training, rate: float, share: float, rows: np.ndarray) -> Generator:
        seen.append(rows)
        return (yield from real(self, rate, share, rows))

    monkeypatch.setattr(Training, "fit", spying)
    canvases, labels = discs(5)
    settings = STEPS.model_copy(update={"learning_rates": (1e-3, 2e-3), "steps": 10, "probe": 0.2})
    fit(settings, canvases, labels)
    first, second, last = seen
    assert not set(set_aside(labels, settings.seed)) & {*first, *second}
    assert len(last) == len(labels)


def test_a_time_on_the_processor_is_kept() -> None:
    settings = STEPS.model_copy(update={"steps": None, "minutes": 0.01})
    reports, found = fit(settings, *discs(4))
    assert 0.6 <= sum(report.seconds for report in reports) < 1.5
    assert found.trained["seconds"] == pytest.approx(sum(r.seconds for r in reports), abs=0.1)


def test_every_class_comes_up_as_often_as_it_should() -> None:
    """400 and 100 images: as they are 4 to 1, by roots 2 to 1, or equally often."""
    labels = np.repeat([0, 1], [400, 100])
    for balance, ratio in ((0.0, 4.0), (0.5, 2.0), (1.0, 1.0)):
        batches = shuffled(labels, 50, balance, seed=0)
        seen = labels[np.concatenate([next(batches) for _ in range(100)])]
        assert (seen == 0).sum() / (seen == 1).sum() == pytest.approx(ratio, rel=0.05)
    first = next(shuffled(labels, 500, 0.0, seed=0))
    assert sorted(first) == list(range(500))  # one pass


def test_a_fifth_of_each_class_is_set_aside() -> None:
    labels = np.array([0] * 10 + [1] * 3 + [2] + [UNLABELLED] * 9)
    aside = set_aside(labels, 0)
    assert np.bincount(labels[aside], minlength=3).tolist() == [2, 1, 0]


def test_images_without_a_label_teach_where_that_is_asked() -> None:
    """One labelled disc of each class, many without: only with `pseudo` do those change anything."""
    canvases, labels = discs(8)
    hidden = np.where(np.arange(len(labels)) < 3, labels, UNLABELLED)
    settings = STEPS.model_copy(update={"steps": 10, "batch": 4, "threshold": 0.0})
    alone = fit(settings, canvases[:3], labels[:3])[1]
    passed_over = fit(settings, canvases, hidden)[1]
    taught = fit(settings.model_copy(update={"pseudo": True}), canvases, hidden)[1]
    assert passed_over.network.head.weight.equal(alone.network.head.weight)
    assert not taught.network.head.weight.equal(alone.network.head.weight)
    assert taught.trained["train_images"] == 3


def test_a_pseudo_label_must_be_confident() -> None:
    """No answer of an untrained network is so sure; if all count, the loss is about ln 3."""
    canvases, labels = discs(4)
    losses = []
    for threshold in (0.999, 0.0):
        settings = STEPS.model_copy(update={"pseudo": True, "threshold": threshold})
        work = Training(torch.from_numpy(canvases), torch.from_numpy(labels).long(), CLASSES,
                        PREPROCESS, AUGMENTATION, settings, "cpu")  # fmt: skip
        network = make_network(settings, CLASSES, 16)
        losses.append(work._pseudo(network, np.arange(12), torch.Generator()).item())
    assert losses[0] == 0
    assert 0.3 < losses[1] < 3


def test_the_margin_is_cut_off() -> None:
    canvases, labels = discs(2)
    work = Training(torch.from_numpy(canvases), torch.from_numpy(labels).long(), CLASSES,
                    PREPROCESS, AUGMENTATION, STEPS, "cpu")  # fmt: skip
    torch.testing.assert_close(work.plain(np.arange(6)), to_tensor(canvases[:, :, 4:20, 4:20]))


# --- what can go wrong ---------------------------------------------------------------------------


def test_a_class_without_images() -> None:
    canvases, labels = discs(2)
    with pytest.raises(DataError, match="none of: neutrophil"):
        fit(STEPS, canvases, np.where(labels == 2, UNLABELLED, labels))


def test_a_missing_library_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'cytodiffusion\[baselines\]'"):
        make_network(STEPS, CLASSES, 16)


def test_a_vit_needs_whole_patches() -> None:
    with pytest.raises(SettingsError, match="multiple of 8 px, not 20"):
        make_network(STEPS.model_copy(update={"kind": "vit"}), CLASSES, 20)


def test_no_torchvision() -> None:
    for kind in KINDS:
        make_network(STEPS.model_copy(update={"kind": kind}), CLASSES, 16)
    assert "torchvision" not in sys.modules


def test_weights_of_the_user(tmp_path: Path) -> None:
    """Written by transformers itself; the images are scaled as those weights expect."""
    import transformers

    torch.manual_seed(0)
    trunk = transformers.ResNetModel(
        transformers.ResNetConfig(
            layer_type="basic", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]
        )
    )
    trunk.save_pretrained(tmp_path)
    settings = STEPS.model_copy(update={"weights": tmp_path})
    with pytest.raises(ModelError, match="preprocessor_config"):
        make_network(settings, CLASSES, 16)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    (tmp_path / "preprocessor_config.json").write_text(
        f'{{"image_mean": {mean}, "image_std": {std}}}'
    )
    network = make_network(settings, CLASSES, 16).eval()
    light = torch.rand(2, 3, 16, 16)
    scaled = (light - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(network.features(2 * light - 1),
                               trunk.eval()(scaled).pooler_output.flatten(1))  # fmt: skip
    with pytest.raises(ModelError, match="needs config"):
        make_network(settings.model_copy(update={"weights": tmp_path / "nowhere"}), CLASSES, 16)


def test_a_baseline_begins_with_another(trained: Baseline, tmp_path: Path) -> None:
    """Before it learns it says the same of the classes that both know, whatever their order."""
    trained.save(tmp_path)
    settings = STEPS.model_copy(update={"weights": tmp_path})
    images = to_tensor(discs(2, first=90)[0])[:, :, 4:20, 4:20]
    wanted = (CLASSES[2], "blast", CLASSES[0])
    with torch.inference_mode():
        told = make_network(settings, wanted, 16).eval()(images).numpy()
    np.testing.assert_allclose(told[:, [0, 2]], trained.logits(images)[:, [2, 0]], atol=1e-5)
    with pytest.raises(SettingsError, match="has a resnet of 16 px; a vit of 16 px cannot begin"):
        make_network(settings.model_copy(update={"kind": "vit"}), wanted, 16)
