"""Shapes, sizes and symmetries of the compact network."""

import pytest
import torch

from cytodiffusion.diffusion.precondition import EDMDenoiser
from cytodiffusion.networks.compact import Change, CompactNetwork, CompactSettings, Filters

K = 3
FORMS = ("heads", "conditional")


def settings(form: str = "heads", **more) -> CompactSettings:
    small = {"classes": K, "size": 16, "unshuffle": 2, "width": 16, "multipliers": (1, 2)}
    return CompactSettings(**small | {"blocks": 1, "head_width": 4, "form": form} | more)


def network(form: str = "heads", **more) -> CompactNetwork:
    """A network in which no weight is zero."""
    torch.manual_seed(1)
    made = CompactNetwork(settings(form, **more)).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return made


IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
LOG_SIGMA = torch.tensor([-0.5, 0.3])
EVERY = torch.arange(K + 1).expand(2, -1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("asked", [1, 2, K + 1])
def test_a_guess_for_each_label(form, asked):
    found = network(form)(IMAGE, LOG_SIGMA, EVERY[:, :asked])
    assert found.shape == (2, asked, 3, 16, 16)


@pytest.mark.parametrize("form", FORMS)
def test_labels_choose_and_order_the_guesses(form):
    net = network(form)
    every = net(IMAGE, LOG_SIGMA, EVERY)
    labels = torch.tensor([[K, 0, 0], [2, 1, K]])
    chosen = net(IMAGE, LOG_SIGMA, labels)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(chosen[i, j], every[i, labels[i, j]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_every_label_has_a_guess_of_its_own(form):
    every = network(form)(IMAGE, LOG_SIGMA, EVERY)[0].flatten(1)
    assert torch.cdist(every, every)[~torch.eye(K + 1, dtype=bool)].min() > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_images_and_noise_levels_do_not_mix(form):
    net = network(form)
    both = net(IMAGE, LOG_SIGMA, EVERY)
    alone = net(IMAGE[1:], LOG_SIGMA[1:], EVERY[1:])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)
    other = net(IMAGE, LOG_SIGMA + 0.2, EVERY)
    assert (other - both).abs().max() > 1e-3


@pytest.mark.parametrize(("form", "images"), [("heads", 2), ("conditional", 2 * (K + 1))])
def test_images_through_the_trunk(form, images):
    """Heads: one pass for all labels. Conditional: one for each."""
    net, seen = network(form), []
    net.trunk.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    net(IMAGE, LOG_SIGMA, EVERY)
    assert seen == [images]


def test_heads_do_not_see_each_other():
    """The gradient of one class's guess stays within its own head."""
    head = Change(settings(), 12)
    torch.nn.init.normal_(head.out.weight)
    head(torch.randn(1, 16, 8, 8))[:, 1].square().sum().backward()
    moved = head.spread.weight.grad.view(K, -1).abs().sum(1)
    assert moved[1] > 0
    assert moved[0] == moved[2] == 0


@pytest.mark.parametrize("form", FORMS)
def test_any_cell_is_not_touched_by_the_class_heads(form):
    net = network(form)
    if net.change is not None:
        before = net(IMAGE, LOG_SIGMA, EVERY)
        torch.nn.init.normal_(net.change.out.weight)
        after = net(IMAGE, LOG_SIGMA, EVERY)
        assert after[:, K].equal(before[:, K])
        assert not after[:, 0].allclose(before[:, 0])
    else:
        assert net.label.num_embeddings == K + 1


@pytest.mark.parametrize("form", FORMS)
def test_untrained_it_says_nothing(form):
    """D = c_skip noisy, exactly: the last layers start at zero."""
    torch.manual_seed(1)
    denoiser = EDMDenoiser(CompactNetwork(settings(form)), 0.5).eval()
    sigma = torch.tensor([0.1, 2.0])
    skip = (0.25 / (sigma**2 + 0.25))[:, None, None, None, None]
    found = denoiser(IMAGE, sigma, EVERY)
    torch.testing.assert_close(found, (skip * IMAGE[:, None]).expand_as(found))


@pytest.mark.parametrize("form", FORMS)
def test_the_default_fits_in_25_megabytes(form):
    with torch.device("meta"):
        net = CompactNetwork(CompactSettings(classes=8, form=form))
    assert sum(value.numel() for value in net.state_dict().values()) < 12.5e6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape",
    [
        {"size": 20, "unshuffle": 4, "multipliers": (1, 2, 3)},  # an odd grid: 5, 3, 2
        {"size": 16, "unshuffle": 1, "multipliers": (1,)},
        {"width": 24, "attention": 0},
        {"classes": 1},
    ],
)
def test_other_shapes(form, shape):
    made = settings(form, **shape)
    images = torch.randn(1, 3, made.size, made.size)
    labels = torch.tensor([[0, made.classes]])
    found = CompactNetwork(made)(images, torch.zeros(1), labels)
    assert found.shape == (1, 2, 3, made.size, made.size)


def test_dropout_is_for_training_alone():
    net = network(dropout=0.5)
    assert net(IMAGE, LOG_SIGMA, EVERY).equal(net(IMAGE, LOG_SIGMA, EVERY))
    net.train()
    assert not net(IMAGE, LOG_SIGMA, EVERY).equal(net(IMAGE, LOG_SIGMA, EVERY))


def test_fourier_features_are_the_same_in_every_process():
    """They are buffers, saved with the weights, and do not depend on the seed."""
    torch.manual_seed(5)
    one = CompactNetwork(settings()).fourier.frequency
    torch.manual_seed(6)
    assert CompactNetwork(settings()).fourier.frequency.equal(one)


def test_the_filters_learn_what_no_fixed_filter_can():
    """White noise of variance 1 is kept at one noise level and turned round at the other."""
    torch.manual_seed(0)
    filters = Filters(pixels=4, embedding=2)
    optimiser = torch.optim.Adam(filters.parameters(), lr=0.05)
    levels = torch.eye(2).repeat(8, 1)  # embeddings of two noise levels in turn
    sign = (levels[:, 0] - levels[:, 1])[:, None, None, None]
    assert not filters(torch.randn(16, 4, 4, 4), levels).any()  # begins with no guess
    for _ in range(200):
        folded = torch.randn(16, 4, 4, 4)
        loss = (filters(folded, levels) - sign * folded).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.05  # the best fixed filter leaves 1
