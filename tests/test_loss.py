"""Weights that are equal by algebra, and losses worked out by hand."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import nn

from cytodiffusion.diffusion.loss import (
    UNLABELLED,
    Sharpness,
    class_losses,
    edm_weight,
    min_snr_weight,
)
from cytodiffusion.diffusion.noise import scaled_linear_alpha_bar, sigma_of_alpha_bar
from cytodiffusion.diffusion.precondition import EDMDenoiser

SIGMA = torch.tensor([0.01, 0.3, 1.0, 20.0])


class One(nn.Module):
    def forward(self, image, log_sigma, labels):
        return torch.ones(*labels.shape, *image.shape[1:])


def test_edm_weight_is_one_over_the_square_of_c_out():
    """c_out is what the denoiser adds per unit of the network's answer to a black image."""
    black, labels = torch.zeros(4, 3, 2, 2), torch.zeros(4, 1, dtype=torch.long)
    out = EDMDenoiser(One(), 0.5)(black, SIGMA, labels)[:, 0, 0, 0, 0]
    torch.testing.assert_close(edm_weight(SIGMA, 0.5), out**-2)


def test_an_untrained_network_has_loss_one_at_every_level():
    """The best guess of a network that says 0 leaves error c_out^2 on data N(0, sd^2)."""
    sd = 0.5
    left = (SIGMA * sd) ** 2 / (SIGMA**2 + sd**2)
    torch.testing.assert_close(edm_weight(SIGMA, sd) * left, torch.ones(4))


def test_min_snr_weight_of_the_clean_image_is_that_of_the_noise():
    """Errors of the clean image are sigma^2 times those of the noise: min(snr, g) = min(snr, g)/snr snr."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    times = torch.arange(1000)
    snr = compute_snr(scheduler, times)
    sigma = sigma_of_alpha_bar(scaled_linear_alpha_bar())
    for_noise = snr.clamp(max=5.0) / snr
    torch.testing.assert_close(min_snr_weight(sigma) * sigma**2, for_noise, rtol=1e-4, atol=1e-6)
    assert min_snr_weight(torch.tensor([0.1]), gamma=3.0).item() == 3.0


def by_hand(labels: list[int], any_weight: float = 0.5, classification: float = 0.1):
    """Two classes, one pixel of three colours; errors 1, 4 | 9 and 4, 0 | 1; weights 1 and 2."""
    clean = torch.zeros(2, 3, 1, 1)
    guesses = torch.tensor([[1.0, 2.0, 3.0], [2.0, 0.0, 1.0]])[:, :, None, None, None]
    return class_losses(
        guesses.expand(2, 3, 3, 1, 1), clean, torch.tensor(labels),
        torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25]), any_weight, classification,
    )  # fmt: skip


def test_losses_by_hand():
    """Weighted errors are 1, 4 | 9 and 8, 0 | 2; logits -.5, -2 and -2, 0."""
    found = by_hand([0, 0])
    first = math.log(1 + math.exp(-1.5))
    second = 2 + math.log(1 + math.exp(-2))
    assert found.own.item() == pytest.approx((1 + 8) / 2)
    assert found.any.item() == pytest.approx((9 + 2) / 2)
    assert found.classification.item() == pytest.approx((first + second) / 2)
    total = 4.5 + 0.5 * 5.5 + 0.1 * (first + second) / 2
    assert found.total.item() == pytest.approx(total)


def test_an_unlabelled_image_trains_any_cell_alone():
    found = by_hand([UNLABELLED, 1])
    assert found.own.item() == pytest.approx(0)  # the second image's own error, alone
    assert found.classification.item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert found.any.item() == pytest.approx((9 + 2) / 2)


def test_no_labels_at_all():
    found = by_hand([UNLABELLED, UNLABELLED])
    assert found.own.item() == found.classification.item() == 0
    assert found.total.item() == pytest.approx(0.5 * 5.5)


def test_gradient_of_an_unlabelled_image_reaches_any_cell_alone():
    guesses = torch.ones(1, 3, 3, 2, 2, requires_grad=True)
    losses = class_losses(
        guesses, torch.zeros(1, 3, 2, 2), torch.tensor([UNLABELLED]), torch.ones(1),
        torch.ones(1), 0.5, 0.1,
    )  # fmt: skip
    losses.total.backward()
    moved = guesses.grad.abs().sum((0, 2, 3, 4))
    assert moved[0] == moved[1] == 0
    assert moved[2] > 0


def test_sharpness_is_piecewise_constant_over_equal_bins_of_ln_sigma():
    sharpness = Sharpness(bins=3, low=0.01, high=10.0, start=7.0)
    with torch.no_grad():
        sharpness.log_beta.copy_(torch.tensor([1.0, 2.0, 4.0]).log())
    sigma = torch.tensor([1e-4, 0.011, 0.099, 0.101, 0.99, 1.01, 9.9, 1e3])
    torch.testing.assert_close(
        sharpness(sigma), torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 4.0])
    )
    torch.testing.assert_close(Sharpness(start=7.0)(sigma), torch.full((8,), 7.0))
