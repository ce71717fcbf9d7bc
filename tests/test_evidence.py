"""Evidence against densities that are known, and what a policy leaves out.

In a world of classes N(mu_k, s^2 I), with a = s^2 / (s^2 + sigma^2), the error of class k is

    D_k(x + sigma eps) - x  =  (1 - a) (mu_k - x)  +  a sigma eps

and the mean over (eps, -eps) of its square has no mixed term. Divided by sigma^3 and integrated,

    first term    |mu_k - x|^2 [-1/2 / (s^2 + sigma^2)]
    second term   |eps|^2 [ln(sigma^2 / (s^2 + sigma^2)) / 2  +  s^2 / (s^2 + sigma^2) / 2]
"""

import math
import threading

import numpy as np
import pytest
import torch

from cytodiffusion.classify.draws import Draws, Trial, stratified
from cytodiffusion.classify.evidence import DenoiserMeter, log_evidence
from cytodiffusion.classify.measure import POOL, Measurement
from cytodiffusion.data.transforms import POSES
from cytodiffusion.diffusion.noise import log_spaced
from cytodiffusion.networks.exact import GaussianWorld

S, LOW, HIGH, K, PIXELS = 0.3, 0.01, 30.0, 3, 3 * 4 * 4
MEANS = 0.5 * torch.randn(K, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()
WORLD = GaussianWorld(MEANS, S)
IMAGES = WORLD.sample(torch.tensor([0, 1, 2, 1]), torch.Generator().manual_seed(2))
NAMES = ["a", "b", "c", "d"]
PLAIN = (POSES[0],) * 8


def measure(world, images, names, draws, columns, **settings) -> np.ndarray:
    return Measurement(draws, columns, **settings).measure(DenoiserMeter(world), images, names)


def squares() -> np.ndarray:
    return (IMAGES[:, None] - MEANS).square().sum((2, 3, 4)).numpy()


def evidence(draws: Draws) -> np.ndarray:
    errors = measure(WORLD, IMAGES, NAMES, draws, K + 1, poses=PLAIN)
    return log_evidence(errors, draws.sigmas, PIXELS)[:, :K]


def test_the_gap_is_the_log_likelihood_ratio_of_the_levels_measured():
    """Antithetic pairs: the noise cancels to rounding, whatever it is."""
    draws = stratified(400, LOW, HIGH, antithetic=True, poses=False)
    found = evidence(draws)
    covered = (1 / (S**2 + LOW**2) - 1 / (S**2 + HIGH**2)) / 2
    want = -covered * squares()
    np.testing.assert_allclose(found - found[:, :1], want - want[:, :1], rtol=1e-3, atol=2e-3)


def test_the_gap_tends_to_the_log_likelihood_ratio():
    draws = stratified(400, 1e-3, 1e3, antithetic=True, poses=False)
    found, exact = evidence(draws), WORLD.log_density(IMAGES).numpy()
    np.testing.assert_allclose(found - found[:, :1], exact - exact[:, :1], rtol=1e-3, atol=1e-2)


def one_noise(levels: int) -> Draws:
    """The same noise and its negative at every level, so that |eps|^2 is one number an image."""
    sigmas = log_spaced(levels, LOW, HIGH).tolist()
    return Draws(tuple(Trial(sigma, 0, sign) for sigma in sigmas for sign in (1, -1)))


def test_the_evidence_itself():
    """Not only the gap: the gap cannot see how much noise was added."""
    draws = one_noise(400)
    length = draws.noise(0, NAMES, (3, 4, 4)).square().sum((1, 2, 3)).numpy()

    def first(sigma: float) -> float:
        return -1 / (2 * (S**2 + sigma**2))

    def second(sigma: float) -> float:
        share = S**2 / (S**2 + sigma**2)
        return (math.log(sigma**2 / (S**2 + sigma**2)) + share) / 2

    want = -squares() * (first(HIGH) - first(LOW)) - length[:, None] * (second(HIGH) - second(LOW))
    np.testing.assert_allclose(evidence(draws), want, rtol=2e-4)


def test_evidence_in_the_mean_is_the_likelihood_of_the_channel():
    """Over the noise E|eps|^2 = pixels: the mean gap to the exact value is sampling error."""
    found = np.mean(
        [evidence(stratified(100, LOW, HIGH, seed=s, poses=False)) for s in range(6)], 0
    )
    share = [S**2 / (S**2 + x**2) for x in (LOW, HIGH)]
    noise = PIXELS * (math.log((1 - share[1]) / (1 - share[0])) + share[1] - share[0]) / 2
    covered = (1 / (S**2 + LOW**2) - 1 / (S**2 + HIGH**2)) / 2
    np.testing.assert_allclose(found, -covered * squares() - noise, rtol=0.03)


def test_poses_change_nothing_where_the_world_has_none():
    """A world of flat colours looks the same in all eight poses."""
    flat = GaussianWorld(MEANS[:, :, :1, :1].expand(-1, -1, 4, 4), S)
    draws = Draws(tuple(Trial(0.5, 0, sign, pose) for pose in (0, 5) for sign in (1, -1)))
    errors = measure(flat, IMAGES, NAMES, draws, K, poses=POSES).reshape(4, 2, 2, K).mean(2)
    np.testing.assert_allclose(errors[:, 0], errors[:, 1], rtol=1e-5)


def test_log_evidence_by_hand():
    """Two levels a factor e apart, one of them measured twice: slices of 1 in ln sigma."""
    sigmas = np.array([1.0, math.e, 1.0], dtype=np.float32)
    errors = np.array([[[2.0], [7.0], [4.0]]], dtype=np.float32)
    want = -5 * (3.0 + 7.0 / math.e**2)
    np.testing.assert_allclose(log_evidence(errors, sigmas, 5), [[want]], rtol=1e-5)


def test_log_evidence_of_one_level():
    found = log_evidence(np.array([[[2.0], [4.0]]]), np.array([0.5, 0.5]), 10)
    np.testing.assert_allclose(found, [[-10 * 3 / 0.25]])


def test_a_class_that_was_not_measured_has_no_evidence():
    errors = np.array([[[1.0, np.nan], [1.0, 1.0]]])
    found = log_evidence(errors, np.array([0.5, 1.0]), 10)
    assert np.isnan(found).tolist() == [[False, True]]


def test_errors_of_a_denoiser_by_hand():
    def guesses(noisy, sigma, labels):
        return torch.stack([noisy, torch.zeros_like(noisy)], 1)

    clean, noise = torch.full((1, 1, 1, 2), 3.0), torch.tensor([1.0, -2.0]).view(1, 1, 1, 2)
    both, sigma = (2, 1, 1, 1), torch.tensor([0.5, 2.0])  # each image at its own level
    labels = torch.tensor([[0, 1], [0, 1]])
    found = DenoiserMeter(guesses)(clean.repeat(both), noise.repeat(both), sigma, labels)
    torch.testing.assert_close(found, torch.tensor([[0.25 * 2.5, 9.0], [4.0 * 2.5, 9.0]]))


# --- measure -------------------------------------------------------------------------------------

DRAWS = stratified(5, 0.1, 2.0)


class Counted(torch.nn.Module):
    """The world, and how many guesses it has been asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.guesses = 0

    def forward(self, noisy, sigma, labels):
        self.guesses += labels.numel()
        return WORLD(noisy, sigma, labels)


def dropping(errors: np.ndarray, features: np.ndarray) -> np.ndarray:
    """After trial 1 (the second) class 2 leaves image 'a'; after trial 2, class 0 too.

    Images are told apart by their first error, so the answer does not depend on their order.
    """
    trials = errors.shape[1]
    alive = np.ones((len(errors), K), dtype=bool)
    is_a = np.isclose(errors[:, 0, 0], FULL[0, 0, 0])
    alive[is_a, 2] = trials < 2
    alive[is_a, 0] = trials < 3
    return alive


FULL = measure(WORLD, IMAGES, NAMES, DRAWS, K + 1, poses=POSES)


def left_out(together: bool) -> np.ndarray:
    """FULL with what the policy leaves out: image a is done after three trials.

    Where every class costs a pass, "any cell" leaves with the first of them.
    """
    want = FULL.copy()
    want[0, 2:, 2] = np.nan
    want[0, 2:, K] = FULL[0, 2:, K] if together else np.nan
    want[0, 3:] = np.nan
    return want


def test_measure_is_what_it_says():
    """One entry, computed by itself."""
    t, i = 3, 2
    clean = POSES[DRAWS.trials[t].pose](IMAGES[i : i + 1])
    noise = DRAWS.noise(t, [NAMES[i]], (3, 4, 4)).double()
    levels = torch.tensor([DRAWS.trials[t].sigma]).double()
    guess = WORLD(clean + levels * noise, levels, torch.tensor([[1]]))[:, 0]
    assert FULL[i, t, 1] == pytest.approx((guess - clean).square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("before", [0, 7])
def test_followed_it_is_the_same(before, workers):
    """To the bit, and told cell by cell; the policy makes some cells end before others."""
    work = Measurement(DRAWS, K + 1, POSES, policy=dropping, batch=2)
    wanted = work.look(DenoiserMeter(WORLD), IMAGES, NAMES)
    following = work.follow(
        DenoiserMeter(WORLD), 4, lambda place: (IMAGES[place], NAMES[place]), workers, before
    )
    told = []
    while True:
        try:
            told.append(next(following))
        except StopIteration as end:
            found = end.value
            break
    assert told == [before + done for done in (1, 2, 3, 4)]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.isnan(found[0]).any()


def test_followed_without_cells():
    work = Measurement(DRAWS, K + 1, POSES)
    following = work.follow(DenoiserMeter(WORLD), 0, lambda place: (IMAGES[place], NAMES[place]))
    with pytest.raises(StopIteration) as end:
        next(following)
    errors, features = end.value.value
    assert (len(errors), len(features)) == (0, 0)


@pytest.mark.parametrize("together", [True, False])
def test_what_has_left_is_missing(together):
    found = measure(
        WORLD, IMAGES, NAMES, DRAWS, K + 1, poses=POSES, policy=dropping, together=together
    )
    np.testing.assert_allclose(found, left_out(together), rtol=1e-6)


def test_what_has_left_is_not_computed():
    counted = Counted()
    found = measure(
        counted, IMAGES, NAMES, DRAWS, K + 1, poses=POSES, policy=dropping, together=False, batch=1
    )
    assert counted.guesses == (~np.isnan(found)).sum()


@pytest.mark.parametrize("together", [True, False])
def test_nothing_is_computed_when_every_image_is_done(together):
    counted = Counted()

    def all_but_one(errors, features):
        return np.arange(K) == np.zeros((len(errors), 1))

    found = measure(
        counted, IMAGES, NAMES, DRAWS, K + 1, poses=POSES, policy=all_but_one, together=together,
        batch=1,
    )  # fmt: skip
    assert counted.guesses == len(IMAGES) * (K + 1)
    assert np.isnan(found[:, 1:]).all()
    assert not np.isnan(found[:, 0]).any()


@pytest.mark.parametrize("policy", [None, dropping])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batches_and_order_change_nothing(together, batch, policy):
    want = FULL if policy is None else left_out(together)
    order = [2, 0, 3, 1]
    found = measure(
        WORLD, IMAGES[order], [NAMES[i] for i in order], DRAWS, K + 1, poses=POSES,
        policy=policy, together=together, batch=batch,
    )  # fmt: skip
    np.testing.assert_allclose(found, want[order], rtol=1e-6)


def test_when_nobody_listens_threads_end_with_the_round_they_are_in():
    """As after Ctrl-C: two threads, each held up within its second round, finish it and stop.

    Of the 32 cells of the first rounds the queue holds 16: the others are taken, so that none waits.
    """
    gate, held_up, passes, prepared = threading.Event(), threading.Semaphore(0), [], []
    own = threading.local()

    def meter(images, noise, sigma, labels):
        passes.append(len(images))
        own.passes = getattr(own, "passes", 0) + 1
        if own.passes > POOL:
            held_up.release()
            gate.wait()
        return torch.zeros(labels.shape)

    def prepare(number):
        prepared.append(number)
        return IMAGES[0], str(number)

    once = Measurement(stratified(1, 0.5, 2.0), K + 1, POSES, batch=4)
    stream = once.stream(meter, range(100_000), prepare, workers=2)
    for _ in range(16):
        next(stream)
    assert held_up.acquire(timeout=60)
    assert held_up.acquire(timeout=60)
    before, began = len(prepared), len(passes)
    threading.Timer(0.2, gate.set).start()
    stream.close()
    assert len(prepared) == before
    assert len(passes) - began <= 2 * (POOL - 1)
