"""Noise levels against a printed schedule, another library, and symmetries."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy import stats

from cytodiffusion.diffusion.noise import (
    karras_sigmas,
    log_spaced,
    scaled_linear_alpha_bar,
    sigma_of_alpha_bar,
    stratified_normal,
    time_of_sigma,
    training_sigmas,
)


def test_the_schedule_is_that_of_stable_diffusion():
    theirs = DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
    )
    torch.testing.assert_close(
        scaled_linear_alpha_bar(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-7
    )


def test_a_scaled_noisy_image_is_the_one_that_the_other_library_makes():
    """alpha (clean + sigma noise) = alpha clean + sqrt(1 - alpha^2) noise."""
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    clean, noise = torch.randn(2, 3, 3, 4, 4).double()
    times = torch.tensor([1, 500, 999])
    alpha_bar = scaled_linear_alpha_bar().double()[times]
    sigma = sigma_of_alpha_bar(alpha_bar)[:, None, None, None]
    ours = (clean + sigma * noise) / (1 + sigma**2).sqrt()
    torch.testing.assert_close(ours, theirs.add_noise(clean, noise, times), rtol=1e-4, atol=1e-5)


def test_sigma_squared_is_one_over_the_signal_to_noise_ratio():
    alpha_bar = scaled_linear_alpha_bar().double()
    snr = alpha_bar / (1 - alpha_bar)
    torch.testing.assert_close(sigma_of_alpha_bar(alpha_bar) ** -2, snr)


def test_time_is_the_inverse_of_sigma():
    levels = sigma_of_alpha_bar(scaled_linear_alpha_bar())
    times = torch.tensor([0, 1, 2, 137, 500, 998, 999])
    torch.testing.assert_close(
        time_of_sigma(levels[times], levels), times.float(), atol=2e-3, rtol=0
    )


def test_time_is_linear_in_ln_sigma_and_stays_within_the_schedule():
    levels = torch.tensor([0.1, 1.0, 4.0])
    sigma = torch.tensor([0.001, 0.1**0.5, 2.0, 50.0])
    torch.testing.assert_close(
        time_of_sigma(sigma, levels), torch.tensor([0.0, 0.5, 1.5, 2.0]), atol=1e-6, rtol=1e-6
    )


def test_sampling_levels_by_hand():
    """rho = 1 is a straight line; rho = 7 puts the middle at ((80^(1/7) + .002^(1/7)) / 2)^7."""
    torch.testing.assert_close(
        karras_sigmas(3, 1.0, 5.0, rho=1), torch.tensor([5.0, 3.0, 1.0, 0.0])
    )
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    torch.testing.assert_close(karras_sigmas(3), torch.tensor([80.0, middle, 0.002, 0.0]))


def test_log_spaced_levels_are_the_middles_of_equal_slices():
    torch.testing.assert_close(log_spaced(2, 1.0, math.e**4), torch.tensor([math.e, math.e**3]))
    assert len(log_spaced(7, 0.1, 3.0)) == 7


@pytest.mark.parametrize("count", [1, 2, 64])
def test_one_normal_number_from_each_slice(count):
    drawn = stratified_normal(count, 2.0, 3.0, torch.Generator().manual_seed(1)).double()
    slices = np.floor(stats.norm.cdf(drawn, 2, 3) * count)
    assert sorted(slices) == list(range(count))


def test_slices_come_in_random_order():
    drawn = stratified_normal(64, 0.0, 1.0, torch.Generator().manual_seed(1))
    assert abs(np.corrcoef(drawn, np.arange(64))[0, 1]) < 0.4


def test_training_levels_are_log_normal():
    logs = training_sigmas(4096, -0.9, 1.3, torch.Generator().manual_seed(2)).log()
    assert logs.mean().item() == pytest.approx(-0.9, abs=2e-3)
    assert logs.std().item() == pytest.approx(1.3, abs=5e-3)
    assert stats.kstest((logs + 0.9) / 1.3, "norm").statistic < 1e-3
