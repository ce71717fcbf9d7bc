"""The graph: errors and features of a compact network without its guesses, in 32-bit floats or on 8 bits.

In the folded space, where the network works, the guess for "any cell" and its changes give

    r = c_skip noisy + c_out base - clean        e_any = mean r^2        e_k = mean (r + c_out h_k)^2

8 bits: inputs, outputs and weights of the trunk's convolutions are rounded; the first and last layers
are not. Ranges are the extremes seen on a few noisy images. Weights take 7 bits, so that no pair of
products overflows 16 bits on processors without dot products of bytes: all add up the same integers.
"""

from __future__ import annotations

import copy
import importlib
import io
import warnings
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from cytodiffusion.diffusion.precondition import EDMDenoiser
from cytodiffusion.errors import MissingExtra, ModelError
from cytodiffusion.networks.compact import CompactNetwork
from cytodiffusion.types import Denoiser

OPSET = 17  # ONNX Runtime 1.12 and later, OpenVINO 2022.2 and later
WEIGHT_STEPS, INPUT_STEPS = 63, 255  # 255 * 63 * 2 < 2^15: see above
CALIBRATION = (
    48,
    0.05,
    5.0,
)  # noisy images that set the ranges, and their lowest and highest sigma
EXTRAS = {"onnx": "onnx", "onnxruntime": "onnx", "openvino": "openvino"}  # library -> extra


def need(library: str, extra: str | None = None) -> Any:
    """Import a library of an extra. Raises MissingExtra naming the pip line."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise MissingExtra(
            f"This needs {library}, which is not installed ({error}). "
            f"Try: pip install 'cytodiffusion[{extra or EXTRAS[library]}]'"
        ) from error


class ErrorNetwork(nn.Module):
    """Errors of an EDM denoiser with a compact network, without its guesses, and its features.

    heads: (clean, noise, sigma) -> n x (K + 1) errors, "any cell" last. conditional: (clean, noise,
    sigma, label) -> n x 1. Mean squared errors in squared image units; lower explains better. Features
    are means of the grid that the guesses are made from, n x f.
    Raises ModelError for any other denoiser.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        network = getattr(denoiser, "network", None)
        if not isinstance(denoiser, EDMDenoiser) or not isinstance(network, CompactNetwork):
            raise ModelError(
                f"Engines run the compact network only, not {type(network or denoiser).__name__}. "
                "Use the engine 'torch', which runs every network."
            )
        self.network, self.sigma_data = network, denoiser.sigma_data
        self.heads = network.change is not None

    def forward(
        self,
        clean: Float[Tensor, "n c h w"],
        noise: Float[Tensor, "n c h w"],
        sigma: Float[Tensor, " n"],
        label: Int[Tensor, " n"] | None = None,
    ) -> tuple[Float[Tensor, "n j"], Float[Tensor, "n f"]]:
        network, fold = self.network, self.network.settings.unshuffle
        s = sigma.view(-1, 1, 1, 1)
        total = (s**2 + self.sigma_data**2).sqrt()
        scaled = (clean + s * noise) / total
        grid = network.features(scaled, sigma.log() / 4, label)
        base = network.shared(grid, scaled, sigma.log() / 4, label)
        seen = functional.pixel_unshuffle(scaled, fold)
        out = s * self.sigma_data / total
        left = self.sigma_data**2 / total * seen + out * base
        left = left - functional.pixel_unshuffle(clean, fold)
        anyone = left.square().mean((1, 2, 3))[:, None]
        features = grid.float().mean((2, 3))
        if network.change is None:
            return anyone, features
        each = left[:, None] + out[:, None] * network.change(grid)
        return torch.cat([each.square().mean((2, 3, 4)), anyone], dim=1), features

    @property
    def inputs(self) -> list[str]:
        """Names of what `forward` takes."""
        return ["clean", "noise", "sigma", *([] if self.heads else ["label"])]


class Rounded(nn.Module):
    """A convolution between 8-bit numbers. The bias is added afterwards, exactly."""

    def __init__(
        self, conv: nn.Conv2d, entering: tuple[float, float], leaving: tuple[float, float]
    ):
        super().__init__()
        self.conv, self.entering, self.leaving = conv, _step(*entering), _step(*leaving)
        peak = conv.weight.detach().abs().amax((1, 2, 3)).clamp_min(1e-12)
        self.register_buffer("scale", peak / WEIGHT_STEPS)
        self.register_buffer("zero", torch.zeros(len(peak), dtype=torch.int32))

    scale: Tensor
    zero: Tensor

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        x = torch.fake_quantize_per_tensor_affine(x, *self.entering, 0, INPUT_STEPS)
        weight = torch.fake_quantize_per_channel_affine(
            conv.weight, self.scale, self.zero, 0, -128, 127
        )
        x = functional.conv2d(x, weight, None, conv.stride, conv.padding)
        x = torch.fake_quantize_per_tensor_affine(x, *self.leaving, 0, INPUT_STEPS)
        return x if conv.bias is None else x + conv.bias[:, None, None]


def _step(low: float, high: float) -> tuple[float, int]:
    """Size of a step and the place of zero, for numbers from `low` to `high`."""
    low, high = min(low, 0.0), max(high, 1e-6)
    step = (high - low) / INPUT_STEPS
    return step, round(-low / step)


@torch.inference_mode()
def rounded(network: ErrorNetwork, images: Float[Tensor, "n c h w"]) -> ErrorNetwork:
    """A copy whose inner convolutions work on 8 bits, with ranges set by these images and noise."""
    network = copy.deepcopy(network)
    ends: list[nn.Module | None] = [network.network.stem, network.network.base]
    ends += [network.network.filters.mix]
    ends += [network.network.change.out] if network.network.change is not None else []
    inner = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d) and not any(layer is end for end in ends)
    }
    ranges: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {}

    def watch(name: str) -> Callable[..., None]:
        def look(layer: nn.Module, entering: tuple[Tensor], leaving: Tensor) -> None:
            bias = cast(nn.Conv2d, layer).bias
            bare = leaving if bias is None else leaving - bias[:, None, None]
            ranges[name] = _extremes(entering[0]), _extremes(bare)

        return look

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in inner.items()]
    network(*noisy_rows(images, *CALIBRATION, network))
    for hook in hooks:
        hook.remove()
    for name, layer in inner.items():
        above, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(above), leaf, Rounded(layer, *ranges[name]))
    return network.eval()


def _extremes(x: Tensor) -> tuple[float, float]:
    return float(x.min()), float(x.max())


def noisy_rows(
    images: Float[Tensor, "m c h w"], rows: int, low: float, high: float, network: ErrorNetwork
) -> list[Tensor]:
    """Inputs for the graph: images in turn, fixed noise, noise levels from low to high, labels in turn."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.arange(rows)
    clean = images[turn % len(images)].float().cpu()
    sigma = torch.from_numpy(np.geomspace(low, high, rows, dtype=np.float32))
    sigma = sigma[torch.randperm(rows, generator=generator)]
    noise = torch.randn(clean.shape, generator=generator)
    label = [] if network.heads else [turn % (network.network.settings.classes + 1)]
    return [clean, noise, sigma, *label]


def discs(size: int) -> Float[Tensor, "n c h w"]:
    """Images for ranges and checks where there are no cells at hand: discs on a pale ground."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    colours = np.array([[120, 60, 150], [160, 120, 180], [90, 40, 110]])[:, :, None, None]
    radius = np.array([0.2, 0.3, 0.4])[:, None, None, None]
    pixels = np.where(np.hypot(x, y) < radius, colours, 220)
    return torch.from_numpy(pixels.astype(np.float32)) / 127.5 - 1


def onnx_graph(network: ErrorNetwork) -> bytes:
    """The graph as an ONNX file, for batches of any size. Raises MissingExtra without onnx.

    By torch's tracing exporter: 1 s and no further library, where the newer one takes 10 s and onnxscript.
    """
    need("onnx")
    size = network.network.settings.size
    network = copy.deepcopy(network).eval()  # the exporter sets the mode of all that is inside
    rows, file = noisy_rows(discs(size), 2, 0.1, 1.0, network), io.BytesIO()
    told = ["errors", "features"]
    axes = {name: {0: "rows"} for name in [*network.inputs, *told]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, tuple(rows), cast(Any, file), input_names=network.inputs,
            output_names=told, dynamic_axes=axes, opset_version=OPSET, dynamo=False,
        )  # fmt: skip
    return file.getvalue()
