"""What a denoiser is known to get wrong is measured, and undone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cytodiffusion.diffusion.gain import LEVELS, Gain, fit_gain
from cytodiffusion.diffusion.sample import guided
from cytodiffusion.networks.exact import GaussianWorld

SIZE = 16
MEANS = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
WORLD = GaussianWorld(MEANS, 0.5)
LABELS = torch.tensor([0, 1]).repeat(100)
IMAGES = WORLD.sample(LABELS, torch.Generator().manual_seed(2))
FREQUENCY = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None])


class Spoilt:
    """Sees 1 / (1 + 2 f) of the noise of frequency f that is there."""

    factor = torch.from_numpy(1 / (1 + 2 * FREQUENCY)).float()

    def __call__(self, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        seen = torch.fft.rfft2(WORLD(noisy, sigma, labels) - noisy[:, None])
        return noisy[:, None] + torch.fft.irfft2(self.factor * seen)


def fit(denoiser: object, levels: tuple[float, ...] = (0.5, 1.0, 5.0)) -> Gain:
    work = fit_gain(denoiser, IMAGES, LABELS, torch.Generator().manual_seed(3), levels)
    done = []
    while True:
        try:
            done.append(next(work))
        except StopIteration as end:
            assert done == list(range(1, len(levels) + 1))
            return end.value


def test_a_perfect_denoiser_is_left_alone() -> None:
    """The first ring has one entry an image, whose mean scatters by 0.06."""
    values = fit(WORLD).values
    assert values[:, 0] == pytest.approx(1, abs=0.25)
    assert values[:, 1:] == pytest.approx(1, abs=0.03)


def test_what_is_spoilt_is_mended() -> None:
    """u must be 1 + 2 f, and the mended guess the exact one."""
    gain = fit(Spoilt())
    want = np.tile(1 + 2 * gain.frequencies, (3, 1))
    assert gain.values[:, 1:] == pytest.approx(want[:, 1:], rel=0.08)
    noisy, sigma = IMAGES + 0.5 * torch.randn(IMAGES.shape), torch.full((len(IMAGES),), 0.5)
    exact = WORLD(noisy, sigma, LABELS[:, None])[:, 0]
    mended = gain(guided(Spoilt(), LABELS, 2))(noisy, sigma)
    before = (guided(Spoilt(), LABELS, 2)(noisy, sigma) - exact).square().mean().sqrt()
    after = (mended - exact).square().mean().sqrt()
    assert before > 0.1
    assert after < 0.2 * before


def test_linear_between_levels_and_rings() -> None:
    gain = Gain(np.array([0.1, 10.0]), np.array([0.0, 1.0]), np.array([[1.0, 3.0], [5.0, 7.0]]))
    at = gain.at(1.0, SIZE)  # the middle of ln 0.1 and ln 10
    assert at.numpy() == pytest.approx(3 + 2 * FREQUENCY, rel=1e-6)
    assert gain.at(0.001, SIZE)[0, 0] == 1
    assert gain.at(1000, SIZE)[0, 0] == 5


@pytest.mark.parametrize("size", [9, 16])
def test_a_gain_of_one_changes_nothing(size: int) -> None:
    gain = Gain(np.array([0.1, 10.0]), np.array([0.0, 1.0]), np.ones((2, 2)))
    noisy = torch.randn(2, 3, size, size)
    found = gain(lambda noisy, sigma: noisy / 2)(noisy, torch.ones(2))
    torch.testing.assert_close(found, noisy / 2)


def test_json() -> None:
    gain = fit(Spoilt(), LEVELS[:2])
    again = Gain.from_json(gain.to_json())
    for name in vars(gain):
        assert getattr(again, name) == pytest.approx(getattr(gain, name), rel=1e-3)
