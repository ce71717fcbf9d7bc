"""Networks of Stable Diffusion's shape, against diffusers' own code and answers known beforehand."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import BUDGETS, CLASSES, Result, cli, contents, write_discs
from safetensors.torch import load_file
from scipy import stats
from test_train import assert_same, cells, go, state
from tiny_diffusion import SCHEDULER, pipeline, unet, vae
from torch import Tensor
from torch.nn import functional

from cytodiffusion import bundle as bundles
from cytodiffusion import calibration
from cytodiffusion.classify.calibrate import HeldOut
from cytodiffusion.classify.classifier import Budget, Classifier, RaceReader
from cytodiffusion.classify.draws import standard_normal
from cytodiffusion.classify.evidence import DenoiserMeter, disc
from cytodiffusion.classify.fit import Plan
from cytodiffusion.classify.race import PaperRace, paper_draws, paper_weight
from cytodiffusion.cli.console import cores, threads
from cytodiffusion.cli.train import first_weights
from cytodiffusion.data.images import Preprocess, to_tensor
from cytodiffusion.data.transforms import POSES, Augmentation
from cytodiffusion.diffusion.noise import karras_sigmas
from cytodiffusion.errors import MissingExtra, ModelError, SettingsError
from cytodiffusion.evaluate.anomaly import spread_trials
from cytodiffusion.evaluate.cost import procedure
from cytodiffusion.explain.counterfactual import Settings, measure, redraw
from cytodiffusion.networks import latent as latent_networks
from cytodiffusion.networks.exact import GaussianWorld
from cytodiffusion.networks.latent import (
    ClassVector,
    LatentNetwork,
    LatentShape,
    LatentSpace,
    folded,
    label_vectors,
    pose_error,
    tokens,
    transformer_blocks,
)
from cytodiffusion.networks.pretrained import Schedule
from cytodiffusion.synthesis import Cell, Drawing, draw, usual
from cytodiffusion.train.latent import LatentLearner, keep_latents, mixed
from cytodiffusion.train.learner import Batch
from cytodiffusion.train.loop import Run
from cytodiffusion.train.settings import LatentSettings, TrainSettings, make_settings
from cytodiffusion.types import UNLABELLED, Classes

K = 3
STILL = Augmentation(
    poses=False, affine=0, zoom=0, shift=0, brightness=0, contrast=0, hue=0, stain=0, blur=0, noise=0
)  # fmt: skip


@pytest.fixture
def tiny(tmp_path_factory) -> Path:
    return pipeline(tmp_path_factory.getbasetemp())


# --- the U-Net, against diffusers ------------------------------------------------------------------

SHAPES = {
    "as it is": {},
    "linear projections": {"use_linear_projection": True},
    "two transformers a block": {"transformer_layers_per_block": 2, "layers_per_block": 2},
    "both": {"transformer_layers_per_block": 2, "use_linear_projection": True},
    "three levels": {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
}
LABELS = [[[0], [2]], [[0, 1, 2, 3], [3, 2, 1, 0]], [[1, 3], [2, 2]]]  # 3: any cell


def theirs(net, noisy: Tensor, time: Tensor, labels: Tensor, count: int) -> Tensor:
    """diffusers' own forward, a row for each label; one-hot by hand, padded to 16 numbers a token."""
    every = torch.zeros(K + 1, 16)
    every[:K, :K] = torch.eye(K)
    every[K, :K] = 1 / K
    told = every[labels.flatten()][:, None].expand(-1, count, -1)
    k = labels.shape[1]
    with torch.no_grad():
        said = net(noisy.repeat_interleave(k, 0), time.repeat_interleave(k), told).sample
    return said.unflatten(0, labels.shape)


@pytest.mark.parametrize("count", [1, 77], ids=["1 token", "77 tokens"])
@pytest.mark.parametrize("size", [4, 9], ids=["4 x 4", "9 x 9"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_network_is_the_unet_of_diffusers(shape, size, count):
    """An odd grid does not divide; every label set, "any cell" too."""
    net = unet(**SHAPES[shape])
    ours = LatentNetwork(folded(net, K), K, Schedule())
    noisy, time = torch.randn(2, 4, size, size), torch.tensor([3.0, 721.0])
    for rows in LABELS:
        labels = torch.tensor(rows)
        wanted = theirs(net, noisy, time, labels, count)
        with torch.no_grad():
            found = ours(noisy, time, labels)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted[0, 0] - wanted[0, 1]).abs().max() > 0.01  # the label does matter


def test_half_precision_is_of_the_weights_and_not_of_the_time():
    """Float16 has no 721.7: half steps end at 512."""
    net = LatentNetwork(folded(unet(), K), K, Schedule())
    noisy, time, labels = (
        torch.randn(2, 4, 4, 4),
        torch.tensor([3.0, 721.7]),
        torch.tensor([[0], [3]]),
    )
    with torch.no_grad():
        wanted = net(noisy, time, labels)
        net.half().unet.time_proj.register_forward_hook(
            lambda layer, given, said: seen.append(given[0])
        )
        seen: list[Tensor] = []
        found = net(noisy, time, labels)
    assert seen[0].equal(time)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.01)


def test_what_comes_before_the_first_label_is_computed_once():
    """Rows of each layer for 2 images of 4 labels: 2 before the first cross-attention, 8 from there."""
    net = LatentNetwork(folded(unet(layers_per_block=2), K), K, Schedule())
    rows: dict[str, list[int]] = {}

    def watch(name):
        return lambda layer, given, said: rows.setdefault(name, []).append(len(said))

    block = net.unet.down_blocks[0]
    first = block.attentions[0].transformer_blocks[0]
    parts = {
        "input": net.unet.conv_in, "residual": block.resnets[0].conv2, "self": first.attn1,
        "class": first.attn2, "after": first.ff, "second": block.resnets[1].conv2,
        "end": net.unet.conv_out,
    }  # fmt: skip
    for name, part in parts.items():
        part.register_forward_hook(watch(name))
    net(torch.randn(2, 4, 4, 4), torch.tensor([1.0, 9.0]), torch.tensor([[0, 1, 2, 3]] * 2))
    once, each = ("input", "residual", "self"), ("class", "after", "second", "end")
    assert rows == {name: [2] for name in once} | {name: [8] for name in each}


def test_attention_over_equal_tokens_is_a_vector():
    """The same at every place and for every image; W_out W_v y + b, as folded."""
    attention = unet().down_blocks[0].attentions[0].transformer_blocks[0].attn2
    label = torch.tensor([[0.3, 0.7, 0.0]])
    told = tokens(label, 16, 77)
    assert told.shape == (1, 77, 16)
    with torch.no_grad():
        one, other = (attention(torch.randn(1, 6, 8), encoder_hidden_states=told) for _ in range(2))
        vector = ClassVector.of(attention, K)(torch.randn(1, 6, 8), label[:, None])
        twice = ClassVector.of(attention, K)(torch.randn(1, 6, 8), 2 * label[:, None])
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one, vector.expand_as(one), rtol=1e-4, atol=1e-6)
    bias = attention.to_out[0].bias
    torch.testing.assert_close(twice - bias, 2 * (vector - bias))


def test_any_cell_is_the_mean_of_the_classes():
    found = label_vectors(torch.tensor([[1, 3]]), 3)
    assert found.tolist() == [[[0, 1, 0], pytest.approx([1 / 3] * 3)]]


def test_folding_leaves_the_unet_as_it_was():
    net = unet()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    made = folded(net, K)
    assert before.keys() == net.state_dict().keys()
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    assert len(transformer_blocks(made)) == 4  # down, middle, twice up
    assert sum(w.numel() for w in made.parameters()) < sum(w.numel() for w in net.parameters())


def test_a_shape_is_built_again_from_json():
    net = LatentNetwork(folded(unet(), K), K, Schedule(prediction="v"))
    shape = LatentShape.of(net, LatentSpace(vae()), 8.0)
    again, space = LatentShape.model_validate_json(shape.model_dump_json()).build()
    again.load_state_dict(net.state_dict())
    space.vae.load_state_dict(vae().state_dict())
    given = torch.randn(1, 4, 4, 4), torch.tensor([7.0]), torch.tensor([[0, 3]])
    torch.testing.assert_close(again(*given), net(*given), rtol=1e-5, atol=2e-6)
    assert (again.schedule.prediction, shape.disc) == ("v", 8.0)


# --- the space -----------------------------------------------------------------------------------


@pytest.fixture
def space() -> LatentSpace:
    return LatentSpace(vae())


@pytest.mark.parametrize("shift", [None, 0.25])
def test_latents_are_those_of_diffusers(shift):
    """The mode, less the shift, times the factor."""
    theirs = vae(shift_factor=shift)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        wanted = (theirs.encode(images).latent_dist.mode() - (shift or 0)) * 3.5
        back = theirs.decode(wanted / 3.5 + (shift or 0)).sample
    ours = LatentSpace(theirs)
    torch.testing.assert_close(ours.encode(images), wanted)
    torch.testing.assert_close(ours.decode(wanted), back)
    assert ours.encode(images).equal(ours.encode(images))  # no random numbers


def test_shapes(space):
    assert space.factor == 4
    assert space.shape(16) == (4, 4, 4) == tuple(space.encode(torch.zeros(1, 3, 16, 16)).shape[1:])
    assert space.decode(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 16, 16)
    assert space.scale == 2.0
    eight = LatentSpace(vae(
        block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ))  # fmt: skip
    assert [eight.shape(size) for size in (360, 224)] == [(4, 45, 45), (4, 28, 28)]  # the paper's


@pytest.mark.parametrize(("size", "advice"), [(18, 16), (19, 20), (2, 4)])
def test_a_size_that_does_not_divide(space, size, advice):
    with pytest.raises(SettingsError, match=rf"multiple of 4 px, not {size}; .*size={advice}\."):
        space.shape(size)
    with pytest.raises(SettingsError, match="multiple of 4"):
        space.encode(torch.zeros(1, 3, size, size))


class Pooled(LatentSpace):
    """A space that is known and commutes with poses: means of 2 x 2 pixels, twice as large."""

    def __init__(self) -> None:
        """Without an autoencoder."""

    @property
    def factor(self) -> int:
        return 2

    def shape(self, size: int) -> tuple[int, int, int]:
        return 3, size // 2, size // 2

    def encode(self, images: Tensor) -> Tensor:
        return 2 * functional.avg_pool2d(images, 2)

    def decode(self, latents: Tensor) -> Tensor:
        return functional.interpolate(latents / 2, scale_factor=2)


def test_the_cost_of_posing_latents(space):
    """None for the identity or a space that commutes; else by hand, in standard deviations."""
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    found = pose_error(space, images, POSES)
    assert found[0] == 0
    assert (found[1:] > 0).all()
    mirrored = space.encode(images.flip(-1)).flip(-1) - space.encode(images)
    assert found[4] == pytest.approx(
        float(mirrored.square().mean().sqrt() / space.encode(images).std())
    )
    torch.testing.assert_close(
        pose_error(Pooled(), images, POSES), torch.zeros(8), atol=1e-6, rtol=0
    )


# --- the disc ------------------------------------------------------------------------------------


def outside(side: int, radius: float):
    """A denoiser that errs by 1 outside the disc, by 0 inside."""
    grid = np.indices((side, side)) - (side - 1) / 2
    beyond = torch.from_numpy(np.hypot(*grid) > radius + 1e-9).float()
    return lambda noisy, sigma, labels: beyond.expand(len(noisy), labels.shape[1], 4, side, side)


@pytest.mark.parametrize(("side", "radius"), [(45, 20.0), (28, 8.0), (5, 2.0), (4, 1.5)])
def test_errors_count_within_the_disc_alone(side, radius):
    clean, labels = torch.zeros(2, 4, side, side), torch.zeros(2, 3, dtype=torch.long)
    given = clean, clean, torch.ones(2), labels
    guess = outside(side, radius)
    assert not DenoiserMeter(guess, radius)(*given).any()
    inner = DenoiserMeter(lambda *asked: 1 - guess(*asked), radius)(*given)
    torch.testing.assert_close(inner, torch.ones(2, 3))
    assert DenoiserMeter(guess, radius + 1)(*given).all()


def test_places_in_the_papers_disc():
    """Gauss's circle problem: 1257 whole points within 20."""
    assert int(disc(45, 20.0).sum()) == 1257


def test_a_large_disc_is_the_mean():
    guess = torch.randn(2, 3, 4, 7, 7)
    given = (
        torch.randn(2, 4, 7, 7),
        torch.randn(2, 4, 7, 7),
        torch.ones(2),
        torch.zeros(2, 3).long(),
    )
    plain, large = (DenoiserMeter(lambda *_: guess, radius)(*given) for radius in (None, 5.0))
    torch.testing.assert_close(plain, large)
    assert (DenoiserMeter(lambda *_: guess, 2.0)(*given) - plain).abs().min() > 1e-3


# --- what training sees ----------------------------------------------------------------------------


def settings(start: Path, **changes) -> TrainSettings:
    latent = {"start": str(start), "disc": 1.6, **changes.pop("latent", {})}
    small = {
        "latent": LatentSettings(**latent), "preprocess": Preprocess(size=16, crop=1.0),
        "augmentation": STILL, "steps": 4, "batch": 6, "warmup": 0, "cooldown": 0.0, "ema": 0.9,
        "learning_rate": 1e-3, "label_dropout": 0.0, "checkpoint_minutes": 1000.0,
        "optimizer": "adamw",
    }  # fmt: skip
    return TrainSettings(**small | changes)


def learner(start: Path, **changes) -> LatentLearner:
    return LatentLearner(settings(start, **changes), K)


def test_mixup_mixes_pixels_and_labels_alike():
    """Image i is label i laid over the pixels, so the shares can be read off both."""
    labels = torch.eye(3000)
    pixels = labels[:, :, None, None]
    images, found = mixed(pixels, labels, 0.3, torch.Generator().manual_seed(0))
    assert images[:, :, 0, 0].equal(found)
    torch.testing.assert_close(found.sum(1), torch.ones(3000))
    own = found.diagonal().double().numpy()
    assert stats.kstest(own, "beta", (0.3, 0.3)).pvalue > 0.01
    assert own.var() == pytest.approx(0.15625, abs=0.005)  # 1/(4 (2a + 1)): not one share for all
    assert ((found > 0).sum(1) <= 2).all()
    same = mixed(pixels, labels, 0.0, torch.Generator())
    assert same[0] is pixels
    assert same[1] is labels


def batch(count: int, labels: Tensor | None = None) -> Batch:
    each = torch.arange(count) % K if labels is None else labels
    return Batch(np.arange(count) % 2, torch.zeros(count, 3, 16, 16, dtype=torch.uint8), each)


@pytest.mark.parametrize("offset", [0.0, 0.1, 1.0])
def test_offset_noise(tiny, offset):
    """The mean of a channel has variance 1/16^2 + offset^2, all else of the noise variance 1."""
    made = learner(
        tiny, preprocess=Preprocess(size=64), latent={"offset_noise": offset, "mixup": 0}
    )
    made.kept = np.zeros((2, 1, 4, 16, 16), np.float16)
    _, noise, sigma, _ = made.draw(batch(900), torch.Generator().manual_seed(0))
    means = noise.mean((2, 3))
    assert float(means.var()) == pytest.approx(1 / 256 + offset**2, rel=0.12)
    between = np.corrcoef(means.numpy().T)[~np.eye(4, dtype=bool)]
    assert np.abs(between).max() < 0.15  # every channel has an offset of its own
    assert float((noise - means[:, :, None, None]).var()) == pytest.approx(255 / 256, rel=0.01)
    times = torch.searchsorted(made.levels, sigma)
    assert made.levels[times].equal(sigma)
    assert stats.kstest(times.numpy() / 1000, "uniform").pvalue > 0.01


def test_labels_that_are_hidden_or_unknown_are_any_cell(tiny):
    made = learner(tiny, label_dropout=0.25, latent={"mixup": 0})
    made.kept = np.zeros((2, 1, 4, 4, 4), np.float16)
    given = torch.arange(4000) % 4 - 1
    *_, labels = made.draw(batch(4000, given), torch.Generator().manual_seed(0))
    anyone = (labels - 1 / K).abs().amax(1) < 1e-6
    assert anyone[given == UNLABELLED].all()
    assert float(anyone[given >= 0].float().mean()) == pytest.approx(0.25, abs=0.03)
    kept = ~anyone
    assert labels[kept].equal(torch.eye(K)[given[kept]])


@pytest.mark.parametrize(
    ("kind", "cached"), [("epsilon", False), ("epsilon", True), ("v_prediction", False)]
)
def test_the_loss_is_the_published_one(tiny, tmp_path, kind, cached):
    """min(snr, 5)/snr x the squared error of the noise, by diffusers' scheduler, U-Net and 77 tokens.

    With v, whose error is that of the clean image over sigma^2/(1 + sigma^2): min(snr, 5) x the latter.
    """
    start = Path(shutil.copytree(tiny, tmp_path / "start"))
    scheduler = DDPMScheduler(**SCHEDULER | {"prediction_type": kind, "clip_sample": False})
    scheduler.save_pretrained(start / "scheduler")
    made = learner(start)
    images, noise = torch.rand(4, 3, 16, 16) * 2 - 1, torch.randn(4, 4, 4, 4)
    labels = torch.tensor([[1.0, 0, 0], [0.2, 0.8, 0], [0, 0, 1], [1 / 3] * 3])
    times = torch.tensor([1, 50, 400, 999])
    with torch.no_grad():
        clean = vae().encode(images).latent_dist.mode() * 3.5
        seen = scheduler.add_noise(clean, noise, times)
        told = functional.pad(labels, (0, 13))[:, None].expand(-1, 77, -1)
        said = unet()(seen, times, told).sample
    alpha_bar = scheduler.alphas_cumprod[times]
    snr = alpha_bar / (1 - alpha_bar)
    capped = snr.clamp(max=5.0)
    if kind == "epsilon":
        wanted = (capped / snr * (said - noise).square().mean((1, 2, 3))).mean()
    else:
        errors = (said - scheduler.get_velocity(clean, noise, times)).square().mean((1, 2, 3))
        wanted = (capped * (1 - alpha_bar) * errors).mean()
    made.kept = np.zeros((1, 1, 4, 4, 4), np.float16) if cached else None
    found = made(clean if cached else images, noise, made.levels[times], labels)
    assert found.total.item() == pytest.approx(float(wanted), rel=1e-3)


# --- what training changes ------------------------------------------------------------------------


def test_the_whole_unet_is_trained_and_nothing_else(tiny, tmp_path):
    run = go(tmp_path, settings(tiny, learning_rate=1e-2))
    before = unet().state_dict()
    for name, value in run.learner.unet.state_dict().items():
        assert not value.equal(before[name]), name
    kept = run.learner.space.vae.state_dict()
    assert all(value.equal(kept[name]) for name, value in vae().state_dict().items())
    assert not any("vae" in name for name in state(tmp_path)[0]["model"])
    assert not any(weight.requires_grad for weight in run.learner.space.vae.parameters())


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory) -> Run:
    start = pipeline(tmp_path_factory.getbasetemp())
    chosen = settings(start, learning_rate=1e-2, latent={"lora": 2})
    return go(tmp_path_factory.mktemp("lora"), chosen)


def test_lora_trains_its_own_matrices_alone(lora_run):
    """Of every attention: q, k, v and out, two matrices each."""
    names = [name for name, w in lora_run.learner.named_parameters() if w.requires_grad]
    assert len(names) == 4 * 2 * 4 * 2  # blocks, attentions, layers, matrices
    assert all("lora_" in name for name in names)
    tensors = state(lora_run.folder)[0]
    assert set(tensors["model"]) == set(tensors["ema"]) == set(names)
    plain = unet().state_dict()
    for name, value in lora_run.learner.unet.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert value.equal(plain[name.replace(".base_layer", "")]), name


def test_lora_merged_is_the_model_of_peft(lora_run):
    """And merging a copy leaves the learner as it was."""
    made = lora_run.learner
    noisy, time = torch.randn(2, 4, 4, 4), torch.tensor([3.0, 700.0])
    labels = torch.tensor([[0, 1, 2, 3]] * 2)
    wanted = theirs(made.unet.eval(), noisy, time, labels, 77)
    with torch.no_grad():
        found = lora_run.denoiser("raw").network(noisy, time, labels)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - theirs(unet(), noisy, time, labels, 77)).abs().max() > 1e-3  # it was trained
    assert theirs(made.unet, noisy, time, labels, 77).equal(wanted)


def test_the_running_mean_is_what_is_used(tiny, tmp_path):
    run = go(tmp_path, settings(tiny, learning_rate=1e-2))
    mean = unet()
    mean.load_state_dict({n.removeprefix("unet."): v for n, v in run.ema.mean.items()})
    given = torch.randn(1, 4, 4, 4), torch.tensor([9.0]), torch.tensor([[0, 3]])
    wanted = theirs(mean, *given, 1)
    torch.testing.assert_close(run.denoiser("ema").network(*given), wanted, rtol=1e-4, atol=1e-5)
    assert (run.denoiser("raw").network(*given) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("lora", [0, 2], ids=["whole", "lora"])
def test_a_run_that_was_killed_ends_with_the_same_weights(tiny, tmp_path, lora):
    """A checkpoint after every step; killed at step 2, and again at 3."""
    chosen = settings(
        tiny, checkpoint_minutes=1e-9, augmentation=Augmentation(), latent={"lora": lora}
    )
    go(tmp_path / "whole", chosen)
    for stop in (2, 3, None):
        run = go(tmp_path / "cut", chosen, stop)
    assert run.step == 4
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_gradients_with_checkpointing_are_the_same(tiny):
    """What is inside is computed twice, for less memory."""
    given = (
        torch.rand(2, 3, 16, 16),
        torch.randn(2, 4, 4, 4),
        torch.tensor([0.1, 5.0]),
        torch.eye(2, K),
    )
    found = []
    for checkpointing, passes in ((False, 1), (True, 2)):
        made, calls = learner(tiny, latent={"checkpointing": checkpointing}), Counter()
        inside = made.unet.down_blocks[0].resnets[0].conv1
        inside.register_forward_hook(lambda *_, calls=calls: calls.update(["pass"]))
        made(*given).total.backward()
        assert calls["pass"] == passes
        found.append({name: weight.grad for name, weight in made.unet.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


@pytest.mark.parametrize(
    ("library", "latent"), [("bitsandbytes", {"eight_bit": True}), ("peft", {"lora": 2})]
)
def test_what_is_not_installed_is_one_line(tiny, monkeypatch, library, latent):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.optim", None)
    chosen = settings(tiny, latent=latent)
    with pytest.raises(MissingExtra, match="Try: pip install") as error:
        LatentLearner(chosen, K).optimizer(chosen)
    assert "\n" not in str(error.value)
    assert f"--set latent.{next(iter(latent))}=" in str(error.value)


def test_a_size_that_does_not_divide_is_refused_before_training(tiny):
    with pytest.raises(SettingsError, match=r"preprocess\.size=16"):
        learner(tiny, preprocess=Preprocess(size=17))


def test_more_classes_than_a_token_holds_are_refused_before_training(tiny):
    with pytest.raises(ModelError, match="17 classes"):
        LatentLearner(settings(tiny), 17)


# --- latents on disk ------------------------------------------------------------------------------

CACHED = {"latent": {"cache": 2}}


def encoded(folder: Path, made: LatentLearner, canvases: np.ndarray, stop: int = 0) -> list[int]:
    """Keep latents, to the end or killed after `stop` images; what was yielded."""
    said = []
    for done in keep_latents(made, canvases, folder, 0):
        said.append(done)
        if done == stop:
            break
    return said


def test_kept_latents_are_those_of_the_images(tiny, tmp_path):
    """Canvases of 24 px, of which the middle 16 are taken."""
    made, canvases = learner(tiny, **CACHED), cells().canvases
    assert encoded(tmp_path, made, canvases) == [16, 18]
    wanted = made.space.encode(to_tensor(canvases[:, :, 4:20, 4:20]))
    assert made.kept.shape == (18, 2, 4, 4, 4)
    for view in (0, 1):
        found = torch.from_numpy(np.array(made.kept[:, view])).float()
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-2)
    given = Batch(np.array([5, 0]), torch.from_numpy(canvases[[5, 0]]), torch.tensor([0, 0]))
    made.latent.__dict__["mixup"] = 0.0
    clean, *_ = made.draw(given, torch.Generator().manual_seed(0))
    torch.testing.assert_close(clean, wanted[[5, 0]], rtol=2e-3, atol=2e-2)


def test_views_differ(tiny, tmp_path):
    """Of an image, and of the same image at the same place of two parts."""
    made, canvases = learner(tiny, augmentation=Augmentation(), **CACHED), cells(11).canvases
    canvases[16] = canvases[0]
    encoded(tmp_path, made, canvases)
    assert (made.kept[:, 0] != made.kept[:, 1]).any((1, 2, 3)).all()
    assert (made.kept[0] != made.kept[16]).any((1, 2, 3)).all()


def test_a_killed_cache_goes_on(tiny, tmp_path):
    canvases = cells(12).canvases  # 36: three parts
    chosen = {"augmentation": Augmentation(), **CACHED}
    encoded(tmp_path, learner(tiny, **chosen), canvases, stop=16)
    again = learner(tiny, **chosen)
    assert encoded(tmp_path, again, canvases) == [32, 36]
    (tmp_path / "whole").mkdir()
    once = learner(tiny, **chosen)
    assert encoded(tmp_path / "whole", once, canvases) == [16, 32, 36]
    assert (again.kept == once.kept).all()
    assert encoded(tmp_path, learner(tiny, **chosen), canvases) == []  # nothing is left to do


@pytest.mark.parametrize(
    "changes",
    [
        {"augmentation": Augmentation(hue=0.5)},
        {"latent": {"cache": 3}},
        {"preprocess": Preprocess(size=20)},
    ],
    ids=str,
)
def test_other_settings_are_encoded_anew(tiny, tmp_path, changes):
    canvases = cells().canvases
    encoded(tmp_path, learner(tiny, **CACHED), canvases)
    other = learner(tiny, **{**CACHED, **changes})
    assert encoded(tmp_path, other, canvases) == [16, 18]
    assert len(other.kept[0]) == other.latent.cache


def test_a_stamp_without_latents_is_not_believed(tiny, tmp_path):
    canvases = cells().canvases
    encoded(tmp_path, learner(tiny, **CACHED), canvases)
    (tmp_path / "latents.npy").unlink()
    assert encoded(tmp_path, learner(tiny, **CACHED), canvases) == [16, 18]


def changed_image(canvases: np.ndarray, place: int) -> np.ndarray:
    other = canvases.copy()
    other[place] = 255 - other[place]
    return other


@pytest.mark.parametrize("place", [0, 1])
def test_other_images_are_encoded_anew(tiny, tmp_path, place):
    canvases = cells(44).canvases[:130]
    encoded(tmp_path, learner(tiny, latent={"cache": 1}), canvases)
    other = learner(tiny, latent={"cache": 1})
    encoded(tmp_path, other, changed_image(canvases, place))
    wanted = other.space.encode(to_tensor(changed_image(canvases, place)[[place], :, 4:20, 4:20]))
    found = torch.from_numpy(np.array(other.kept[[place], 0])).float()
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-2)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "size", "radius", "count", "steps"),
    [
        ("paper-in-domain", 360, 20, 64, 72_000),
        ("paper-low-data", 360, 20, 10, 20_000),
        ("paper-anomaly", 360, 20, 10, 140_000),
        ("paper-shift", 224, 8, 32, 22_000),
    ],
)
def test_presets_are_the_papers_table(preset, size, radius, count, steps):
    s = make_settings(preset)
    assert s.latent is not None
    assert (s.preprocess.size, s.latent.disc, s.batch, s.steps) == (size, radius, count, steps)
    assert "stable-diffusion-v1-5" in s.latent.start
    assert (s.latent.mixup, s.latent.offset_noise, s.latent.gamma, s.latent.lora) == (
        0.3,
        0.1,
        5.0,
        0,
    )
    assert (s.learning_rate, s.weight_decay, s.clip, s.precision) == (1e-5, 1e-2, 1.0, "fp16")
    assert (s.ema, s.warmup, s.cooldown, s.label_dropout) == (0.9999, 0, 0, 0)
    assert not s.together
    a = s.augmentation
    assert (a.affine, a.poses, a.zoom, a.shift) == (
        1.0,
        True,
        0,
        0,
    )  # turned by any angle, mirrored
    # Uniform jitter of .25 has a standard deviation of .25/sqrt(3), hue of .125/sqrt(3).
    assert [a.brightness, a.contrast, a.hue] == pytest.approx(
        [0.25 / 3**0.5, 0.25 / 3**0.5, 0.125 / 3**0.5], abs=0.005
    )
    race = PaperRace(paper_draws(Plan().paper_most))
    assert (len(race.draws), race.least, race.every, race.alpha) == (2000, 20, 5, 2e-3)


def test_noise_levels_of_a_calibration_grow_with_the_latents(tiny, space):
    plan, plain = calibration.plan_of(False, space, seed=0), Plan()
    assert (plan.low, plan.high) == (2 * plain.low, 2 * plain.high)
    assert plan.levels < plain.levels
    assert plan.paper_most == 2000


# --- the race on latents ---------------------------------------------------------------------------


class Counted:
    """A meter that notes what it is asked: (rows, labels a row) of each call."""

    def __init__(self, meter) -> None:
        self.meter, self.calls = meter, list[tuple[int, int]]()

    def __call__(self, clean, noise, sigma, labels):
        self.calls.append(tuple(labels.shape))
        return self.meter(clean, noise, sigma, labels)


def paper_classifier(meter, space, classes: int, race: PaperRace) -> Classifier:
    held = HeldOut(np.arange(classes), np.eye(classes), np.linspace(0, 1, classes))
    budget = Budget(race.draws, RaceReader(race.weights, 0.1), held, race)
    names = Classes(tuple("abcdefgh"[:classes]))
    return Classifier(
        lambda noisy, *_: noisy[:, None], names, {"paper": budget}, POSES, together=False, meter=meter,
        space=space,
    )  # fmt: skip


def test_the_race_on_latents_is_one_that_asks_pair_by_pair():
    """A lax race, so that classes leave at different times: whole cells first, then pairs."""
    net = LatentNetwork(folded(unet(), K), K, Schedule()).denoiser().eval()
    space, meter = LatentSpace(vae()), Counted(DenoiserMeter(net, 1.6))
    race = PaperRace(paper_draws(24), least=3, every=2, alpha=0.3)
    classifier = paper_classifier(meter, space, K, race)
    images = to_tensor(cells(2, size=16).canvases)
    table = classifier.measure(images, list("uvwxyz"), "paper")
    errors, calls = table.errors, meter.calls
    ran = ~np.isnan(errors)
    assert np.isnan(errors[:, :, -1]).all()  # a race does not ask about any cell
    assert ran[:, :, 0].sum(1).min() >= 4
    left = ran.sum(1)[:, :K]
    assert (left.min(1) < left.max(1)).any()

    first = [shape for shape in calls if shape[1] == K]
    assert set(calls) == {(5, K), (16, 1)}  # 16 rows: 5 whole cells, or 16 pairs
    assert calls[:8] == [(5, K)] * 8  # 6 cells in 4 rounds of two calls
    whole = ran[:, :, :K].all(2).sum(0)
    assert len(first) == np.ceil(whole / 5).sum()

    told = classifier.read(table, "paper")
    assert (told.passes == ran.sum((1, 2))).all()
    assert (told.trials == ran.any(2).sum(1)).all()

    apart = Counted(meter.meter)
    plain = replace(
        classifier.measurement("paper"), shared=False
    )  # as with pixels: every pair apart
    wanted = plain.measure(apart, images, list("uvwxyz"))
    assert {shape[1] for shape in apart.calls} == {1}
    np.testing.assert_allclose(errors, wanted, rtol=1e-4)
    assert (np.isnan(errors) == np.isnan(wanted)).all()


def test_errors_of_a_race_are_those_of_diffusers():
    """One cell, all its trials by hand: posed latents, eps and the weight 1/p at the paper's levels."""
    net = LatentNetwork(folded(unet(), K), K, Schedule()).denoiser().eval()
    race = PaperRace(paper_draws(5))
    classifier = paper_classifier(Counted(DenoiserMeter(net)), LatentSpace(vae()), K, race)
    image = to_tensor(cells(1, size=16).canvases[:1])
    found = classifier.measure(image, ["digest"], "paper").errors[0, :, :K]
    times = np.random.default_rng(0).permutation(np.linspace(1, 999, 5)).round().astype(int)
    scheduler = DDPMScheduler(**SCHEDULER)
    with torch.no_grad():
        latents = vae().encode(image).latent_dist.mode() * 3.5
    for trial, time in enumerate(times.tolist()):
        clean = POSES[race.draws.trials[trial].pose](latents)
        noise = standard_normal((4, 4, 4), 0, "digest", trial)[None]
        seen = scheduler.add_noise(clean, noise, torch.tensor([time]))
        said = theirs(unet(), seen, torch.tensor([float(time)]), torch.arange(K)[None], 77)[0]
        losses = (said - noise).square().mean((1, 2, 3)).numpy()
        tau = (1000 - time) / 1000
        p = 0.92706 + 9.83654 * tau - 4.68406 * tau**2 + 6.01854 * tau**3 - 9.33979 * tau**4
        weighted = found[trial] * paper_weight(race.draws.sigmas)[trial]
        np.testing.assert_allclose(weighted, losses / p, rtol=5e-3)


def test_the_published_procedure_encodes_each_view_anew():
    """`bench cost` draws turn and jitter of the cell itself: errors of its encoded views, by hand."""
    net = LatentNetwork(folded(unet(), K), K, Schedule()).denoiser().eval()
    race, space, meter = PaperRace(paper_draws(3)), LatentSpace(vae()), DenoiserMeter(net)
    work, _ = procedure(paper_classifier(meter, space, K, race), "paper")
    image = to_tensor(cells(1, size=16).canvases[:1])
    found = work.measure(meter, image, ["digest"])[0, :, :K]
    plain = [space.encode(view(image)) for view in work.poses]
    assert (plain[0] - plain[1]).abs().max() > 0.1  # every trial has a view of its own
    for trial, (clean, sigma) in enumerate(zip(plain, work.draws.sigmas, strict=True)):
        noise = standard_normal((4, 4, 4), 0, "digest", trial)[None]
        with torch.no_grad():
            wanted = meter(clean, noise, torch.tensor([sigma]), torch.arange(K)[None])[0]
        np.testing.assert_allclose(found[trial], wanted.numpy(), rtol=1e-4)


def test_eight_classes_that_are_told_apart_cost_168_passes():
    """The paper's least: the first check comes after 21 trials of 8 classes, in 2 cells a call."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    means = corners[:, :, None, None].expand(8, 3, 4, 4)  # of one colour: no pose changes them

    def distance(clean, noise, sigma, labels):
        """Of the class from the cell, the same in every trial once it is weighted."""
        far = (clean[:, None] - means[labels]).square().mean((2, 3, 4))
        return far / torch.from_numpy(paper_weight(sigma.numpy())).float()[:, None]

    meter = Counted(distance)
    classifier = paper_classifier(meter, Pooled(), 8, PaperRace(paper_draws(30)))
    images = Pooled().decode(means)
    table = classifier.measure(images, list("abcdefgh"), "paper")
    told = classifier.read(table, "paper")
    assert told.predicted.tolist() == list(range(8))
    assert told.passes.tolist() == [168] * 8
    assert meter.calls == [(2, 8)] * 4 * 21
    assert classifier.predict(images, "paper").tolist() == list("abcdefgh")


# --- maps and drawings on latents -----------------------------------------------------------------


def test_the_map_of_a_gaussian_world_on_latents():
    """D_B - D_A = (1 - s^2/(s^2 + sigma^2)) (mu_B - mu_A), decoded; sigma grows with the latents.

    The means are of one colour each, so that no view changes them.
    """
    means = torch.tensor([[1.0, 0.0, -1.0], [-0.6, 0.4, 0.2]])[:, :, None, None].expand(2, 3, 4, 4)
    world, std = GaussianWorld(means, 0.5), 0.5
    image = Pooled().decode(means[:1])[0]
    chosen = Settings(levels=(0.4, 0.8), pairs=2)
    found = measure(world, image, "digest", [0, 1], chosen, Pooled())[0]
    share = np.mean([1 - std**2 / (std**2 + (2 * level) ** 2) for level in chosen.levels])
    wanted = share * (means[1] - means[0]).numpy()[:, :1, :1] / 2
    np.testing.assert_allclose(found.change, np.broadcast_to(wanted, (3, 8, 8)), atol=1e-5)
    assert (found.support > 0).all()  # the cell is of class A


def test_redrawn_cells_of_a_known_world_are_the_classes():
    """Classes without spread: from any noise, a guess is the mean itself, at the size of the image."""
    means = 0.4 * torch.randn(2, 3, 4, 4)
    image = Pooled().decode(means[:1])[0]
    chosen = Settings(starts=(0.5, 4.0), steps=3)
    found = redraw(GaussianWorld(means, 1e-4), image, "digest", [0, 1], chosen, Pooled())
    wanted = Pooled().decode(means).expand(2, 2, 3, 8, 8)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


# --- from the command line ------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What `train` made of a few cells."""

    source: Path
    splits: Path
    run: Path
    said: Result

    @property
    def bundle(self) -> Path:
        return self.run / "bundle"

    def picture(self, split: str = "test") -> Path:
        rows = csv.DictReader(self.splits.open())
        return next(self.source / row["path"] for row in rows if row["split"] == split)


def some_cells(root: Path | None, base: Path) -> tuple[Path, Path]:
    """A folder and a split of it: 8, 4 and 1 cells of three classes; of real cells, those of `val`."""
    if root is None:
        source = write_discs(base / "discs", each=13)
        found = {name: [f"{name}/{i:02}.png" for i in range(13)] for name in CLASSES}
    else:
        source = root / "pbc"
        every = [
            row for row in csv.DictReader((source / "splits.csv").open()) if row["split"] == "val"
        ]
        found = {name: [r["path"] for r in every if r["label"] == name][:13] for name in CLASSES}
    parts = ["train"] * 8 + ["val"] * 4 + ["test"]
    lines = [
        f"{path},{name},{part}"
        for name in CLASSES
        for path, part in zip(found[name], parts, strict=True)
    ]
    (base / "splits.csv").write_text("\n".join(["path,label,split", *lines]) + "\n")
    return source, base / "splits.csv"


def shorter(plan_of):
    """A plan with few trials."""
    few = {"levels": 4, "trials": 4, "naming": 2, "race_trials": 24, "paper_most": 26}
    return lambda *given: replace(plan_of(*given), **few)


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory) -> Trained:
    """By the preset for few labels, on latents encoded before; real cells where there are some."""
    try:
        root = request.getfixturevalue("data_root")
    except pytest.skip.Exception:
        root = None
    base = tmp_path_factory.mktemp("latent")
    source, splits = some_cells(root, base)
    start = pipeline(tmp_path_factory.getbasetemp())
    changes = {
        "latent.start": start, "latent.disc": 1.6, "latent.cache": 1, "preprocess.size": 16,
        "precision": "no", "steps": 8, "batch": 8, "learning_rate": 0.003, "ema": 0.9,
    }  # fmt: skip
    words = [f"--set={name}={value}" for name, value in changes.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "plan_of", shorter(calibration.plan_of))
        said = cli(
            "train", source, "-o", base / "run", "--splits", splits, "--preset=paper-low-data",
            "--device=cpu", "--json", *words,
        )  # fmt: skip
    return Trained(source, splits, base / "run", said)


def test_train(trained):
    assert trained.said.code == 0, trained.said.err
    assert "encoding" in trained.said.err
    assert set(trained.said.json["validation"]) == BUDGETS
    assert np.load(trained.run / "latents.npy", mmap_mode="r").shape == (24, 1, 4, 4, 4)
    card = (trained.bundle / "card.md").read_text()
    assert "U-Net of Stable Diffusion's shape" in card
    origin = json.loads((trained.bundle / "config.json").read_text())["origin"]
    assert "/" not in origin["pretrained"]  # a folder's name, not where it lies on this machine
    assert (
        origin["pose_error"] > 0.1
    )  # an autoencoder with random weights does not commute with turns
    assert (
        f"| turning latents | differs from encoding the turned cell by {origin['pose_error']}"
        in card
    )
    assert (trained.run / "samples" / "000008.png").stat().st_size
    assert (trained.run / "progress.png").stat().st_size


def test_the_bundle_needs_nothing_else(trained, monkeypatch):
    """Its U-Net, folded, and the whole autoencoder; neither the start nor the hub is asked."""
    monkeypatch.setattr(latent_networks, "read_pretrained", None, raising=False)
    monkeypatch.setattr("cytodiffusion.networks.pretrained.read_pretrained", None)
    weights = load_file(trained.bundle / "model.safetensors")
    own = vae().state_dict()
    assert {n.removeprefix("vae.") for n in weights if n.startswith("vae.")} == own.keys()
    assert all(weights[f"vae.{name}"].equal(value.half()) for name, value in own.items())
    assert not any("to_k" in name for name in weights if ".attn2." in name)
    said = json.loads((trained.bundle / "config.json").read_text())
    assert said["network"] == "latent"
    assert said["settings"]["disc"] == 1.6
    assert "tiny-diffusion" not in json.dumps(said["settings"])
    model = bundles.load(trained.bundle)
    assert model.space.shape(16) == (4, 4, 4)
    assert isinstance(model.classifier.meter, DenoiserMeter)
    assert model.classifier.meter.radius == 1.6
    assert not model.classifier.together
    mean = load_file(next((trained.run / "checkpoint").glob("*/best.safetensors")))
    plain = unet()
    plain.load_state_dict({name.removeprefix("unet."): value for name, value in mean.items()})
    given = torch.randn(1, 4, 4, 4), torch.tensor([9.0]), torch.tensor([[0, 1, 2, 3]])
    found = model.denoiser.network(*given)
    torch.testing.assert_close(found, theirs(plain, *given, 77), rtol=2e-2, atol=5e-3)


def test_predict(trained, tmp_path):
    said = cli("predict", trained.picture(), "-m", trained.bundle, "-o", tmp_path / "out", "--json")
    assert said.code == 0, said.err
    model = bundles.load(trained.bundle)
    told = model.read([trained.picture()]).answers()[0]
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert [row["predicted"] for row in rows] == [told.predicted]


def test_evaluate_by_the_papers_race(trained, tmp_path):
    """Each cell runs at least 21 and at most 26 trials of at most 3 classes."""
    said = cli(
        "evaluate", trained.source, "-m", trained.bundle, "--splits", trained.splits, "--split", "test",
        "--budget", "paper", "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert len(rows) == 3
    assert all(21 <= int(row["trials"]) <= 26 for row in rows)
    assert all(63 <= float(row["passes"]) <= 78 for row in rows)
    assert (tmp_path / "out" / "report.html").stat().st_size


def test_explain(trained, tmp_path):
    """The map is in pixels of the image, whatever the latents."""
    said = cli("explain", trained.picture(), "-m", trained.bundle, "-o", tmp_path / "out", "--json")
    assert said.code == 0, said.err
    with np.load(next((tmp_path / "out").rglob("*.npz"))) as file:
        assert file["change"].shape == file["image"].shape == (3, 16, 16)
        assert np.isfinite(file["as_other"]).all()
    assert (tmp_path / "out" / "report.html").stat().st_size


def test_generate(trained, tmp_path):
    """The same files twice; 2 steps of three cells."""
    for name in ("one", "two"):
        said = cli(
            "generate", "-m", trained.bundle, "-o", tmp_path / name, "--per-class", 1, "--steps", 2,
            "--device=cpu",
        )  # fmt: skip
        assert said.code == 0, said.err
        assert "grainy" not in said.err
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(list((tmp_path / "one").glob("*/000000.png"))) == 3


def test_drawing_by_hand(trained):
    """First order, three levels: guided guesses from the noise of the cell, never turned, decoded."""
    model = bundles.load(trained.bundle)
    told = usual(model)
    assert (told.sampler, told.churn, told.looks, told.guidance) == ("dpm++", 0, 0, 1.5)
    levels = Schedule().levels
    assert (told.sigma_min, told.sigma_max) == (float(levels[0]), float(levels[-1]))
    drawing = Drawing("ddim", 3, churn=0, guidance=1.5, sigma_min=0.1, sigma_max=10, looks=0)
    cell = Cell(model.classes.names[1], 7)
    found = draw(model, [cell], drawing)
    image = 10 * standard_normal((4, 4, 4), 7, cell.label, 0)[None]
    sigmas = karras_sigmas(3, 0.1, 10)
    with torch.no_grad():
        for here, there in pairwise(sigmas):
            own, anyone = model.denoiser(image, here.view(1), torch.tensor([[1, 3]]))[0]
            guess = anyone + 1.5 * (own - anyone)
            image = guess + there / here * (image - guess)
    torch.testing.assert_close(found, model.space.decode(image), rtol=1e-4, atol=1e-4)


def test_verify(trained, tmp_path):
    said = cli("models", "verify", trained.bundle)
    assert said.code == 0, said.err
    assert "every file is as released" in said.out
    spoilt = Path(shutil.copytree(trained.bundle, tmp_path / "spoilt"))
    data = bytearray((spoilt / "model.safetensors").read_bytes())
    data[-7] ^= 1
    (spoilt / "model.safetensors").write_bytes(data)
    refused = cli("models", "verify", spoilt)
    assert refused.code == 2
    assert "model.safetensors is not the file that was released" in refused.complaint


def test_test_vectors_notice_another_autoencoder(trained, tmp_path, monkeypatch):
    """The images of the vectors go through the autoencoder too."""
    encode = LatentSpace.encode
    monkeypatch.setattr(LatentSpace, "encode", lambda self, images: 1.1 * encode(self, images))
    refused = cli("models", "verify", trained.bundle)
    assert refused.code == 2
    assert "does not give its test vectors" in refused.complaint


def test_what_other_engines_say(trained, tmp_path):
    """One line each, and nothing is written."""
    for words in (
        ("models", "export", trained.bundle, "-o", tmp_path / "out"),
        ("models", "verify", trained.bundle, "--engine", "onnxruntime"),
        (
            "predict",
            trained.picture(),
            "-m",
            trained.bundle,
            "-o",
            tmp_path / "out",
            "--engine",
            "onnxruntime",
        ),
    ):
        told = cli(*words)
        assert told.code == 2
        assert "compact network only, not LatentNetwork" in told.complaint
    assert not (tmp_path / "out").exists()


def test_a_folded_bundle_is_no_start(trained):
    with pytest.raises(ModelError, match="folded"):
        first_weights(str(trained.bundle), CLASSES)


def test_a_run_begins_with_the_running_mean_of_another(tiny, tmp_path):
    first = go(tmp_path / "a", settings(tiny))
    start = first_weights(str(tmp_path / "a"), first.data.classes)
    second = Run(tmp_path / "b", settings(tiny, seed=3), cells(), "cpu", start)
    for name, value in second.learner.state_dict().items():
        assert value.equal(first.ema.mean[name]), name


def test_a_run_of_lora_begins_with_that_of_another(lora_run, tmp_path):
    start = first_weights(str(lora_run.folder), lora_run.data.classes)
    second = Run(tmp_path, lora_run.settings, cells(), "cpu", start)
    for name, value in lora_run.ema.mean.items():
        assert value.equal(second.learner.state_dict()[name]), name


# --- what was found by reading ---------------------------------------------------------------------


def test_settings_of_the_other_kind_of_network_are_refused():
    with pytest.raises(SettingsError, match=r"presets paper-"):
        make_settings("cpu", ["latent.cache=8"])
    with pytest.raises(SettingsError, match="preset cpu or gpu"):
        make_settings("paper-shift", ["network.width=64"])
    with pytest.raises(SettingsError, match="optimizer=adamw"):
        make_settings("paper-shift", ["optimizer=muon"])
    with pytest.raises(SettingsError, match=r"latent.disc"):
        make_settings("paper-shift", ["latent.disc=0.5"])  # no latent pixel lies within it


def test_an_interrupted_change_of_images_leaves_no_stamp(tiny, tmp_path):
    """Set A whole, B cut before its first image is done: A is encoded anew, not read from B's file."""
    first, other = cells(3).canvases, cells(3, seed=1).canvases
    encoded(tmp_path, learner(tiny, latent={"cache": 1}), first)
    cut = learner(tiny, latent={"cache": 1})
    cut.space.encode = lambda images: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        encoded(tmp_path, cut, other)
    made = learner(tiny, latent={"cache": 1})
    encoded(tmp_path, made, first)
    assert all(np.abs(one).sum() > 0 for one in made.kept)


def test_weights_of_another_learner_are_refused(tiny):
    made = learner(tiny)
    with pytest.raises(SettingsError, match="not of this network"):
        made.usable({"unet.elsewhere": torch.zeros(1)})


def test_noise_levels_grow_with_the_space():
    np.testing.assert_allclose(spread_trials(0, 2.0).sigmas, 2 * spread_trials(0).sigmas, rtol=1e-6)


def test_a_network_on_latents_has_a_gpu_for_itself(trained):
    model = bundles.load(trained.bundle)
    assert threads(model) == cores()
    assert model.classifier.measurement("full").most is None
    model.classifier.device = torch.device("cuda")  # nothing is computed there
    assert threads(model) == 1
    assert model.classifier.measurement("full").most == 1
