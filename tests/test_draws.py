"""Noise belongs to the trial and the image, and to nothing else."""

import numpy as np
import pytest
import torch
from scipy import stats

from cytodiffusion.classify.draws import POSES, Draws, Trial, standard_normal, stratified

SHAPE = (3, 4, 4)
DRAWS = Draws((Trial(0.5, 0), Trial(0.5, 0, -1), Trial(2.0, 1), Trial(0.1, 0)), seed=11)


def test_noise_depends_on_seed_image_and_draw():
    base = standard_normal(SHAPE, 1, "a", 2)
    assert standard_normal(SHAPE, 1, "a", 2).equal(base)
    others = [(2, "a", 2), (1, "b", 2), (1, "a", 3), (1, "a|2", 2), (12, "a", 2), (1, "", 2)]
    for seed, digest, draw in others:
        assert not standard_normal(SHAPE, seed, digest, draw).equal(base)


def test_digits_do_not_run_together():
    """Digests are hexadecimal: seed 1 of image 23 is not seed 12 of image 3."""
    drawn = [standard_normal(SHAPE, *key) for key in ((1, "23", 4), (12, "3", 4), (1, "2", 34))]
    assert not drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])


def test_noise_does_not_depend_on_the_rest_of_the_batch_or_on_global_randomness():
    together = DRAWS.noise(2, ["a", "b", "c"], SHAPE)
    torch.manual_seed(99)
    for i, digest in enumerate("abc"):
        assert DRAWS.noise(2, [digest], SHAPE)[0].equal(together[i])


def test_trials_with_one_draw_share_their_noise_whatever_their_level():
    assert DRAWS.noise(0, ["a"], SHAPE).equal(DRAWS.noise(3, ["a"], SHAPE))
    assert not DRAWS.noise(0, ["a"], SHAPE).equal(DRAWS.noise(2, ["a"], SHAPE))


def test_antithetic_noise_is_the_negative():
    assert DRAWS.noise(1, ["a", "b"], SHAPE).equal(-DRAWS.noise(0, ["a", "b"], SHAPE))


def test_frozen_noise_is_the_same_for_every_image():
    frozen = Draws(DRAWS.trials, seed=11, frozen=True)
    noise = frozen.noise(1, ["a", "b"], SHAPE)
    assert noise.shape == (2, *SHAPE)
    assert noise[0].equal(noise[1])
    assert noise.equal(-frozen.noise(0, ["b", "c"], SHAPE))


def test_a_prefix_keeps_the_noise():
    assert DRAWS.first(3).noise(2, ["a"], SHAPE).equal(DRAWS.noise(2, ["a"], SHAPE))
    assert len(DRAWS.first(3)) == 3


def test_noise_is_standard_normal():
    drawn = [standard_normal(SHAPE, 0, str(i), 0).flatten() for i in range(400)]
    assert stats.kstest(torch.cat(drawn), "norm").pvalue > 0.01
    correlation = np.corrcoef(torch.stack(drawn[:100]))
    assert np.abs(correlation - np.eye(100)).mean() < 0.15  # 1/sqrt(48) * sqrt(2/pi) = .115


def test_one_level_in_each_equal_slice_of_ln_sigma():
    draws = stratified(10, 0.01, 10.0)
    slices = np.log(draws.sigmas / 0.01) / np.log(1000) * 10
    np.testing.assert_allclose(slices, np.arange(10) + 0.5, atol=1e-4)
    assert [trial.draw for trial in draws.trials] == list(range(10))


def test_antithetic_levels_come_in_pairs():
    draws = stratified(4, 0.1, 1.0, antithetic=True)
    assert [trial.sign for trial in draws.trials] == [1, -1] * 4
    for first, second in zip(draws.trials[::2], draws.trials[1::2], strict=True):
        assert (first.sigma, first.draw, first.pose) == (second.sigma, second.draw, second.pose)


@pytest.mark.parametrize("poses", [True, False])
def test_successive_levels_take_successive_poses(poses):
    found = [trial.pose for trial in stratified(10, 0.1, 1.0, poses=poses).trials]
    assert found == [i % POSES if poses else 0 for i in range(10)]
