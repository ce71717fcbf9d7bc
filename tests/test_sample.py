"""Samplers in the Gaussian world, where the path from noise to image is known.

For N(mu, s^2) the probability-flow equation keeps (x - mu) / sqrt(s^2 + sigma^2) constant.
"""

import pytest
import torch

from cytodiffusion.diffusion.noise import karras_sigmas
from cytodiffusion.diffusion.sample import guided, sample
from cytodiffusion.errors import SettingsError
from cytodiffusion.networks.exact import GaussianWorld

S = 0.5
MEANS = torch.tensor([[-0.6, 0.2, 0.4], [0.5, -0.1, 0.3]]).double().view(2, 3, 1, 1)
WORLD = GaussianWorld(MEANS, S)
LABELS = torch.tensor([0, 1, 1, 0])
NOISE = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def exact(start: torch.Tensor, sigma_max: torch.Tensor, sigma: float) -> torch.Tensor:
    """Where the path that starts at `start` is when the noise has fallen to sigma."""
    mu = MEANS[LABELS]
    return mu + (start - mu) * ((S**2 + sigma**2) / (S**2 + sigma_max**2)) ** 0.5


def error(sampler: str, steps: int) -> float:
    """Distance from the exact path at the last level above 0."""
    sigmas = karras_sigmas(steps, 0.01, 10.0).double()
    path = list(sample(guided(WORLD, LABELS, 2), NOISE, sigmas, sampler=sampler))
    want = exact(NOISE * sigmas[0], sigmas[0], sigmas[-2].item())
    return (path[-2] - want).abs().max().item()


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("heun", 2), ("dpm++", 2)])
def test_order_of_convergence(sampler, order):
    """Twice the steps: half the error (DDIM), a quarter of it (Heun, DPM-Solver++)."""
    coarse, fine = error(sampler, 80), error(sampler, 160)
    assert coarse / fine == pytest.approx(2**order, rel=0.08)


@pytest.mark.parametrize(
    ("sampler", "tolerance"), [("ddim", 2e-2), ("heun", 1e-3), ("dpm++", 2e-3)]
)
def test_end_points(sampler, tolerance):
    sigmas = karras_sigmas(200).double()
    *_, drawn = sample(guided(WORLD, LABELS, 2), NOISE, sigmas, sampler=sampler)
    want = exact(NOISE * sigmas[0], sigmas[0], 0.0)
    torch.testing.assert_close(drawn, want, atol=tolerance, rtol=0)


def test_one_step_goes_to_the_denoisers_guess():
    sigmas = torch.tensor([3.0, 0.0]).double()
    (drawn,) = sample(guided(WORLD, LABELS, 2), NOISE, sigmas)
    want = WORLD(3 * NOISE, torch.full((4,), 3.0).double(), LABELS[:, None])[:, 0]
    torch.testing.assert_close(drawn, want)


def test_an_image_after_every_step():
    assert len(list(sample(guided(WORLD, LABELS, 2), NOISE, karras_sigmas(9).double()))) == 9


@pytest.mark.parametrize(("sampler", "passes"), [("ddim", 5), ("heun", 9), ("dpm++", 5)])
def test_passes(sampler, passes):
    """Heun takes two passes a step, but for the last."""
    seen = []

    def guess(noisy, sigma):
        seen.append(sigma[0].item())
        return noisy * 0

    list(sample(guess, NOISE, karras_sigmas(5).double(), sampler=sampler))
    assert len(seen) == passes


@pytest.mark.parametrize("churn", [0.0, 5.0, 15.0])
def test_drawn_cells_have_the_mean_and_covariance_of_their_class(churn):
    count = 20_000
    generator = torch.Generator().manual_seed(8)
    noise = torch.randn(count, 3, 1, 1, generator=generator)
    world = GaussianWorld(MEANS.float(), S)
    labels = torch.ones(count, dtype=torch.long)
    *_, drawn = sample(
        guided(world, labels, 2), noise, karras_sigmas(60, 0.01, 40.0), churn=churn,
        fresh=lambda _: torch.randn(noise.shape, generator=generator),
    )  # fmt: skip
    flat = drawn.flatten(1)
    torch.testing.assert_close(flat.mean(0), MEANS[1].flatten().float(), atol=0.02, rtol=0)
    torch.testing.assert_close(flat.T.cov(), S**2 * torch.eye(3), atol=0.012, rtol=0)


def test_churn_is_decided_by_its_noise():
    def drawn(seed: int) -> torch.Tensor:
        guess, sigmas = guided(WORLD, LABELS, 2), karras_sigmas(8).double()
        *_, last = sample(
            guess, NOISE, sigmas, churn=8.0, fresh=lambda step: NOISE.roll(step + seed)
        )
        return last

    assert drawn(1).equal(drawn(1))
    assert not drawn(1).equal(drawn(2))


def test_churn_without_noise_is_refused():
    with pytest.raises(SettingsError, match="fresh"):
        list(sample(guided(WORLD, LABELS, 2), NOISE, karras_sigmas(8).double(), churn=1.0))


def test_dpm_as_in_diffusers():
    """The scheduler of another library, fed with the same guesses."""
    from diffusers import EDMDPMSolverMultistepScheduler

    other = EDMDPMSolverMultistepScheduler(0.02, 10.0, sigma_data=S, solver_order=2)
    other.set_timesteps(9)
    sigmas, guess = other.sigmas, guided(WORLD, LABELS, 2)
    ours = list(sample(guess, NOISE, sigmas.double(), sampler="dpm++"))
    image = NOISE * sigmas[0]
    for sigma, time, mine in zip(sigmas, other.timesteps, ours, strict=False):
        clean = guess(image, sigma.double().expand(4))
        skip = S**2 / (S**2 + sigma**2)
        out = sigma * S / (sigma**2 + S**2) ** 0.5
        raw = (clean - skip * image) / out  # what the scheduler takes: the network's own output
        image = other.step(raw, time, image).prev_sample
        torch.testing.assert_close(mine, image, atol=1e-5, rtol=0)


class Counts(torch.nn.Module):
    """Guesses the label's own number everywhere, and remembers what was asked."""

    def forward(self, noisy, sigma, labels):
        self.asked = labels
        return labels[:, :, None, None, None] * torch.ones_like(noisy)[:, None]


def test_guidance_of_one_asks_for_the_class_alone():
    counts = Counts()
    found = guided(counts, LABELS, 5, guidance=1.0)(NOISE, torch.ones(4).double())
    assert counts.asked.tolist() == [[0], [1], [1], [0]]
    assert found[:, 0, 0, 0].tolist() == LABELS.tolist()


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
def test_guidance_by_hand(guidance):
    """D_any + g (D_class - D_any), with D_any = 5 and D_class = the label."""
    found = guided(Counts(), LABELS, 5, guidance)(NOISE, torch.ones(4).double())
    want = 5 + guidance * (LABELS.double() - 5)
    torch.testing.assert_close(found[:, 0, 0, 0], want)
