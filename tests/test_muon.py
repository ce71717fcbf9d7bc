"""Muon: kernels take steps of one size in every direction, all else is AdamW's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cytodiffusion.train.compact import CompactLearner
from cytodiffusion.train.muon import SIZE, Muon, orthogonal
from cytodiffusion.train.settings import make_settings


def uneven(rows: int, columns: int, smallest: float, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall evenly from 1 to `smallest`."""
    generator = torch.Generator().manual_seed(seed)
    left, _, right = torch.linalg.svd(
        torch.randn(rows, columns, generator=generator), full_matrices=False
    )
    return left * torch.linspace(1, smallest, min(rows, columns)) @ right


@pytest.mark.parametrize(("rows", "columns"), [(8, 72), (72, 8), (32, 32), (1, 9)])
def test_orthogonal_keeps_directions_and_evens_out_their_sizes(rows: int, columns: int) -> None:
    given = 1e-4 * uneven(rows, columns, 0.03)
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    seen = left.T @ orthogonal(given[None])[0] @ right.T
    sizes = seen.diagonal()
    assert ((sizes > 0.6) & (sizes < 1.25)).all()
    torch.testing.assert_close(seen, torch.diag(sizes), atol=1e-3, rtol=0)


def test_each_matrix_of_a_batch_is_as_if_alone() -> None:
    first, second = uneven(6, 20, 0.1), 50 * uneven(6, 20, 0.5, seed=1)
    both = orthogonal(torch.stack([first, second]))
    torch.testing.assert_close(both[0], orthogonal(first[None])[0])
    torch.testing.assert_close(both[1], orthogonal(second[None])[0])


@pytest.mark.parametrize("scale", [1e-18, 1e-13, 1e-6, 1e6])
def test_how_large_a_gradient_is_does_not_matter(scale: float) -> None:
    """Those of the first steps, behind weights that begin with nothing, are as small as this."""
    given = uneven(8, 72, 0.1)
    torch.testing.assert_close(
        orthogonal(scale * given[None]), orthogonal(given[None]), atol=1e-4, rtol=0
    )


def test_nothing_asks_for_nothing() -> None:
    assert orthogonal(torch.zeros(1, 4, 9)).count_nonzero() == 0


def little_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 8))


def take_steps(network: nn.Sequential, optimizer: torch.optim.Optimizer, count: int) -> None:
    images = torch.randn(count, 16, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    for batch in images:
        network(batch).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_step_of_a_kernel_has_the_size_asked_for_and_all_else_is_adamws() -> None:
    """After one step, as the second sees other gradients."""
    ours, theirs = little_network(), little_network()
    before = ours[0].weight.detach().clone()
    take_steps(ours, Muon(ours.parameters(), [ours[0].weight], lr=1e-2, weight_decay=0), 1)
    take_steps(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0), 1)
    size = (ours[0].weight - before).square().mean().sqrt().item()
    assert 0.7 * 1e-2 * SIZE < size < 1.2 * 1e-2 * SIZE
    for mine, other in ((ours[0].bias, theirs[0].bias), (ours[2].weight, theirs[2].weight)):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_weight_decay_shrinks_kernels() -> None:
    network = little_network()
    before = network[0].weight.detach().clone()
    optimizer = Muon(network.parameters(), [network[0].weight], lr=0.1, weight_decay=0.5)
    network[0].weight.grad = torch.zeros_like(before)
    optimizer.step()
    torch.testing.assert_close(network[0].weight.detach(), 0.95 * before)


def test_a_kernel_without_a_gradient_stays() -> None:
    network = little_network()
    before = network[0].weight.detach().clone()
    optimizer = Muon(network.parameters(), [network[0].weight], lr=0.1)
    network[2].weight.grad = torch.ones_like(network[2].weight)
    optimizer.step()
    assert torch.equal(network[0].weight, before)


def test_its_state_can_be_taken_and_put_back() -> None:
    """Three steps, and two with one more after the state went into another optimiser: the same."""
    ours, theirs = little_network(), little_network()
    optimizer = Muon(ours.parameters(), [ours[0].weight], lr=1e-2)
    take_steps(ours, optimizer, 3)
    half = Muon(theirs.parameters(), [theirs[0].weight], lr=1e-2)
    images = torch.randn(3, 16, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    for index, batch in enumerate(images):
        if index == 2:
            again = Muon(theirs.parameters(), [theirs[0].weight], lr=1e-2)
            again.load_state_dict(half.state_dict())
            half = again
        theirs(batch).square().sum().backward()
        half.step()
        half.zero_grad()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_quiet_directions_are_learned_sooner_than_by_adamw() -> None:
    """y = W x, where x varies a hundred times less in some directions than in others."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(8, 32, generator=generator)
    spread = torch.logspace(0, -2, 32)
    mixed = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]

    def distance(muon: bool) -> float:
        """To the truth, in the quarter of the directions where x varies least."""
        layer = nn.Conv2d(32, 8, 1, bias=False)
        nn.init.zeros_(layer.weight)
        kernels = [layer.weight] if muon else []
        optimizer = Muon(layer.parameters(), kernels, weight_decay=0)
        draw = torch.Generator().manual_seed(2)
        for step in range(300):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
            x = torch.randn(64, 32, generator=draw) * spread @ mixed
            guess = layer(x[:, :, None, None])[:, :, 0, 0]
            (guess - x @ truth.T).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        missed = (layer.weight[:, :, 0, 0].detach() - truth) @ mixed.T
        return missed[:, 24:].square().mean().item()

    assert distance(muon=True) < 0.8 * distance(muon=False)


@pytest.mark.parametrize("form", ["heads", "conditional"])
def test_kernels_of_a_network_are_those_inside_it(form: str) -> None:
    """Not what gives pixels, which begins with nothing, nor what tells the noise level."""
    settings = make_settings("tiny", [f"network.form={form}"])
    learner = CompactLearner(settings, 3)
    names = {id(weight): name for name, weight in learner.named_parameters()}
    optimizer = learner.optimizer(settings)
    assert isinstance(optimizer, Muon)
    chosen = {names[id(weight)].removeprefix("denoiser.network.") for weight in optimizer.kernels}
    assert {name.split(".")[0] for name in chosen} == {"stem", "trunk"} | (
        {"change"} if form == "heads" else set()
    )
    assert not any(name.startswith(("change.out", "base", "filters", "embed")) for name in chosen)
    assert not any("modulate" in name or name.endswith("bias") for name in chosen)


def test_adamw_alone_can_be_asked_for() -> None:
    settings = make_settings("tiny", ["optimizer=adamw"])
    assert type(CompactLearner(settings, 3).optimizer(settings)) is torch.optim.AdamW
