"""The Gaussian world itself: its denoiser is the conditional expectation."""

import pytest
import torch
from scipy import stats

from cytodiffusion.networks.exact import GaussianWorld

MEANS = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
WORLD = GaussianWorld(MEANS, 0.3)
SIGMA = torch.tensor([0.05, 0.4, 3.0], dtype=torch.float64)
IMAGES = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
EVERY = torch.arange(4).expand(3, 4)


def test_density_is_scipys():
    found = WORLD.log_density(IMAGES, SIGMA)
    for i in range(3):
        for k in range(3):
            std = (0.3**2 + SIGMA[i].item() ** 2) ** 0.5
            want = stats.norm.logpdf(IMAGES[i].flatten(), MEANS[k].flatten(), std).sum()
            assert found[i, k].item() == pytest.approx(want)


@pytest.mark.parametrize("label", [0, 1, 2, 3])
def test_tweedie(label):
    """E[clean | noisy] = noisy + sigma^2 grad log p_sigma(noisy), the gradient taken by autograd."""
    images = IMAGES.clone().requires_grad_()
    logs = WORLD.log_density(images, SIGMA)
    log_p = logs[:, label] if label < 3 else logs.logsumexp(1)
    (slope,) = torch.autograd.grad(log_p.sum(), images)
    want = IMAGES + SIGMA[:, None, None, None] ** 2 * slope
    found = WORLD(IMAGES, SIGMA, torch.full((3, 1), label))[:, 0]
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


def test_the_mixture_by_brute_force():
    """The expectation over many draws, weighted by how probable each makes the noisy image."""
    world = GaussianWorld(torch.tensor([-1.0, 0.5]).view(2, 1, 1, 1).double(), 0.3)
    grid = torch.linspace(-4, 4, 20001, dtype=torch.float64)
    prior = sum(torch.exp(-((grid - m) ** 2) / (2 * 0.3**2)) for m in (-1.0, 0.5))
    likely = torch.exp(-((0.2 - grid) ** 2) / (2 * 0.7**2))
    want = (grid * prior * likely).sum() / (prior * likely).sum()
    noisy, sigma = (
        torch.full((1, 1, 1, 1), 0.2, dtype=torch.float64),
        torch.tensor([0.7], dtype=torch.float64),
    )
    assert world(noisy, sigma, torch.tensor([[2]])).item() == pytest.approx(want.item(), abs=1e-8)


def test_labels_choose_and_order_the_guesses():
    every = WORLD(IMAGES, SIGMA, EVERY)
    labels = torch.tensor([[3, 0], [1, 1], [2, 3]])
    chosen = WORLD(IMAGES, SIGMA, labels)
    for i in range(3):
        for j in range(2):
            assert chosen[i, j].equal(every[i, labels[i, j]])


def test_posterior_sums_to_one_and_is_bayes():
    found = WORLD.posterior(IMAGES, SIGMA)
    powers = WORLD.log_density(IMAGES, SIGMA).exp()
    torch.testing.assert_close(found, powers / powers.sum(1, keepdim=True))


def test_draws_have_the_mean_and_spread_of_their_class():
    labels = torch.arange(3).repeat_interleave(4000)
    drawn = WORLD.sample(labels, torch.Generator().manual_seed(3)) - MEANS[labels]
    assert drawn.mean().abs().item() < 0.3 * 5 / (12000 * 4) ** 0.5
    assert drawn.std().item() == pytest.approx(0.3, rel=0.02)
