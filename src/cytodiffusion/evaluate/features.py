"""What cells are compared by: numbers that an extractor makes of an image.

    trunk       the diffusion network's own trunk, at two noise levels, without noise, mean over the grid
    baseline    what the last layer of an independent classifier sees (baselines.py)
    a folder    a pretrained network of transformers that the user has, such as DINOv2

An extractor takes images (n, 3, h, w) in [-1, 1] and gives (n, f), in double precision.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from cytodiffusion.errors import ModelError
from cytodiffusion.evaluate.baselines import library

Extractor: TypeAlias = Callable[[Float[Tensor, "n 3 h w"]], Float[np.ndarray, "n f"]]

LEVELS = (0.3, 1.5)  # noise levels told to the trunk: details, and shape with colour
BATCH = 32


@runtime_checkable
class Trunk(Protocol):
    """A network with a trunk, such as networks/compact.py."""

    def features(
        self,
        image: Float[Tensor, "n 3 h w"],
        log_sigma: Float[Tensor, " n"],
        label: Int[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "n f g g"]:
        """What the trunk makes of a scaled image."""
        ...


def trunk_features(network: Trunk, sigma_data: float, any_label: int) -> Extractor:
    """The mean over the grid of what the trunk makes of an image, as "any cell"."""

    def features(images: Tensor) -> Tensor:
        found = []
        for level in LEVELS:
            sigma = torch.full((len(images),), level, device=images.device)
            scaled = images / (level**2 + sigma_data**2) ** 0.5  # as in precondition.py
            label = torch.full_like(sigma, any_label, dtype=torch.long)
            found.append(network.features(scaled, sigma.log() / 4, label).mean((2, 3)))
        return torch.cat(found, dim=1)

    return in_batches(features)


def pretrained_features(folder: Path, device: str = "cpu") -> Extractor:
    """The pooled output of a network that `save_pretrained` wrote. Nothing is downloaded.

    The folder needs config.json, model.safetensors and preprocessor_config.json (image_mean,
    image_std, and size or crop_size). Raises MissingExtra, ModelError.
    """
    models = library()
    try:
        network = models.AutoModel.from_pretrained(folder, local_files_only=True)
        scale = json.loads((folder / "preprocessor_config.json").read_text())
        mean, std = (torch.tensor(scale[f"image_{name}"]).view(3, 1, 1) for name in ("mean", "std"))
        side = _side(scale)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{folder} has no network that can be read ({first}). It needs config.json, "
            "model.safetensors and preprocessor_config.json, as transformers saves them; or give "
            "--features trunk or baseline."
        ) from error
    network = network.to(device).eval()

    def features(images: Tensor) -> Tensor:
        large = functional.interpolate(images, size=(side, side), mode="bicubic", antialias=True)
        scaled = ((large + 1) / 2 - mean.to(images)) / std.to(images)
        return network(scaled.to(device)).pooler_output.flatten(1)

    return in_batches(features)


def _side(scale: dict[str, Any]) -> int:
    """Height and width that the network was trained on, px."""
    size = scale.get("crop_size") or scale["size"]
    return int(size["height"] if "height" in size else size["shortest_edge"])


def in_batches(features: Callable[[Tensor], Tensor]) -> Extractor:
    """A function of a few images as one of many."""

    @torch.inference_mode()
    def every(images: Tensor) -> np.ndarray:
        return torch.cat([features(part).cpu() for part in images.split(BATCH)]).double().numpy()

    return every
