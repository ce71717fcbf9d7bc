"""The scalings of EDM, and networks of every kind that must give the same denoiser."""

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor, nn

from cytodiffusion.diffusion.noise import scaled_linear_alpha_bar, sigma_of_alpha_bar
from cytodiffusion.diffusion.precondition import EDMDenoiser, VPDenoiser, spread
from cytodiffusion.networks.exact import GaussianWorld
from cytodiffusion.types import Denoiser

LEVELS = sigma_of_alpha_bar(scaled_linear_alpha_bar()).double()
TIMES = torch.tensor([1, 250, 600, 999])
LABELS = torch.tensor([[0, 2], [1, 2], [2, 0], [1, 1]])
WORLD = GaussianWorld(
    torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3)).double(), 0.4
)


class Says(nn.Module):
    """A network that answers with a fixed tensor and remembers what it was shown."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, image: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        self.seen = image, time, labels
        return self.answer


class ExactVP(nn.Module):
    """What the best network of each kind would say in the Gaussian world."""

    def __init__(self, prediction: str) -> None:
        super().__init__()
        self.prediction = prediction

    def forward(self, image: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        sigma = LEVELS[time.round().long()]
        alpha, std = (1 + sigma**2).rsqrt(), sigma * (1 + sigma**2).rsqrt()
        clean = WORLD(image / spread(alpha, 4), sigma, labels)
        noise = (image[:, None] - spread(alpha, 5) * clean) / spread(std, 5)
        velocity = spread(alpha, 5) * noise - spread(std, 5) * clean
        return {"x0": clean, "eps": noise, "v": velocity}[self.prediction]


class ExactEDM(nn.Module):
    """F solved from D = c_skip noisy + c_out F."""

    def forward(self, image: Tensor, log_sigma: Tensor, labels: Tensor) -> Tensor:
        sigma, sd = (4 * log_sigma).exp(), 0.5
        total = (sigma**2 + sd**2).sqrt()
        noisy = image * spread(total, 4)
        clean = WORLD(noisy, sigma, labels)
        skip, out = sd**2 / total**2, sigma * sd / total
        return (clean - spread(skip, 5) * noisy[:, None]) / spread(out, 5)


def noisy(sigma: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(len(sigma), 3, 4, 4, generator=generator, dtype=torch.float64)
    return images * (0.4 + spread(sigma, 4))


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_every_kind_of_network_gives_the_exact_denoiser(prediction):
    sigma = LEVELS[TIMES]
    denoiser = VPDenoiser(ExactVP(prediction), LEVELS, prediction)
    found = denoiser(noisy(sigma), sigma, LABELS)
    torch.testing.assert_close(found, WORLD(noisy(sigma), sigma, LABELS), rtol=1e-9, atol=1e-9)


def test_edm_gives_the_exact_denoiser():
    sigma = torch.tensor([0.002, 0.1, 1.0, 80.0], dtype=torch.float64)
    found = EDMDenoiser(ExactEDM(), 0.5)(noisy(sigma), sigma, LABELS)
    torch.testing.assert_close(found, WORLD(noisy(sigma), sigma, LABELS), rtol=1e-9, atol=1e-9)


def test_what_the_networks_are_shown():
    sigma = LEVELS[TIMES]
    said = Says(torch.zeros(4, 2, 3, 4, 4).double())
    VPDenoiser(said, LEVELS, "eps")(noisy(sigma), sigma, LABELS)
    image, time, labels = said.seen
    torch.testing.assert_close(image, noisy(sigma) / spread((1 + sigma**2).sqrt(), 4))
    torch.testing.assert_close(time, TIMES.double(), atol=1e-6, rtol=0)
    assert labels.equal(LABELS)
    EDMDenoiser(said, 0.5)(noisy(sigma), sigma, LABELS)
    torch.testing.assert_close(said.seen[1], sigma.log() / 4)


@pytest.mark.parametrize("sigma", [1e-3, 0.3, 30.0])
def test_edm_keeps_unit_variance(sigma):
    """In and out: for data N(0, sd^2), what F sees, and what it must say, have variance 1."""
    sd = 0.5
    generator = torch.Generator().manual_seed(5)
    clean = sd * torch.randn(64, 3, 16, 16, generator=generator)
    seen = clean + sigma * torch.randn(64, 3, 16, 16, generator=generator)
    levels, labels = torch.full((64,), sigma), torch.zeros(64, 1, dtype=torch.long)
    zero, one = Says(torch.zeros(64, 1, 3, 16, 16)), Says(torch.ones(64, 1, 3, 16, 16))
    skipped = EDMDenoiser(zero, sd)(seen, levels, labels)[:, 0]
    out = EDMDenoiser(one, sd)(seen, levels, labels)[:, 0] - skipped
    target = (clean - skipped) / out
    assert zero.seen[0].var().item() == pytest.approx(1, abs=0.02)
    assert target.var().item() == pytest.approx(1, abs=0.02)


def test_edm_without_noise_trusts_the_image_and_with_much_the_network():
    said = Says(torch.full((2, 1, 3, 4, 4), 3.0))
    image, labels = torch.randn(2, 3, 4, 4), torch.zeros(2, 1, dtype=torch.long)
    denoiser = EDMDenoiser(said, 0.5)
    small = denoiser(image, torch.full((2,), 1e-6), labels)[:, 0]
    large = denoiser(image, torch.full((2,), 1e6), labels)[:, 0]
    torch.testing.assert_close(small, image, atol=1e-5, rtol=0)
    torch.testing.assert_close(large, torch.full_like(image, 0.5 * 3), atol=1e-5, rtol=0)


def test_shapes_are_checked_while_tests_run():
    with pytest.raises(TypeCheckError):
        EDMDenoiser(ExactEDM())(noisy(LEVELS[TIMES]), LEVELS[:3], LABELS)


def test_all_are_denoisers():
    assert isinstance(EDMDenoiser(nn.Identity()), Denoiser)
    assert isinstance(WORLD, Denoiser)


def test_levels_are_not_weights():
    """A schedule is a fact, not something that was trained: it is not in the bundle."""
    assert not VPDenoiser(nn.Identity(), LEVELS).state_dict()
