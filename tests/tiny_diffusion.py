"""A pipeline of Stable Diffusion's shape in diffusers' layout, with random weights: some hundred kB.

    FOLDER/unet/, vae/, scheduler/      8 and 16 channels, 16 numbers a token, 4 x 4 pixels a latent

Nothing of it was trained: what it says is noise, but it is the same noise as diffusers' own code makes.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

UNET: dict[str, Any] = {
    "sample_size": 4, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "cross_attention_dim": 16, "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3, "norm_num_groups": 4, "latent_channels": 4,
    "sample_size": 16, "scaling_factor": 3.5, "mid_block_add_attention": False,
}  # fmt: skip
SCHEDULER: dict[str, Any] = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "prediction_type": "epsilon",
}  # fmt: skip


@torch.no_grad()
def shaken(module: Any, size: float = 0.1) -> Any:
    """Every weight moved at random: norms and biases begin at 0 and 1, where mistakes do not show."""
    generator = torch.Generator().manual_seed(0)
    for weight in module.parameters():
        weight += size * torch.randn(weight.shape, generator=generator)
    return module.eval()


def unet(**changes: Any) -> Any:
    """A U-Net; the class matters to what it says."""
    torch.manual_seed(1)
    return shaken(UNet2DConditionModel(**UNET | changes))


def vae(**changes: Any) -> Any:
    """An autoencoder whose latents have a standard deviation of about 1 on discs."""
    torch.manual_seed(2)
    return shaken(AutoencoderKL(**VAE | changes), 0.02)


def write_pipeline(folder: Path, **changes: dict[str, Any]) -> Path:
    """unet/, vae/ and scheduler/; `changes`: settings of each part."""
    unet(**changes.get("unet", {})).save_pretrained(folder / "unet")
    vae(**changes.get("vae", {})).save_pretrained(folder / "vae")
    DDPMScheduler(**SCHEDULER | changes.get("scheduler", {})).save_pretrained(folder / "scheduler")
    return folder


@cache
def pipeline(base: Path) -> Path:
    """Written once for each session; `base` is pytest's base folder. To be read only."""
    return write_pipeline(base / "tiny-diffusion")


def change_config(path: Path, **values: Any) -> None:
    """Lay values over a JSON file; None takes a key away."""
    said = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))
