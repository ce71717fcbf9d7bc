"""What a network of Stable Diffusion 1.5's size costs, with random weights: nothing is downloaded.

    python recipes/latent_speed.py                        arithmetic for every size, then one pass timed
    python recipes/latent_speed.py --device cuda          and memory, naming and training, in half precision

Naming a cell of K classes needs the guesses of K classes. Compared are the U-Net as published (77 equal
tokens, a pass for each class), with one token, and ours (class vectors folded, the beginning shared). All
three give the same guesses; tests/test_latent.py holds them to it. Operations are counted by torch
(multiply-adds count two), so that they do not depend on the machine; the rest does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cytodiffusion.networks.latent import LatentNetwork, folded, label_vectors, tokens
from cytodiffusion.networks.pretrained import Schedule
from cytodiffusion.train.settings import PRESETS, make_settings

CLASSES = 8
SIZES = (224, 256, 360, 512)  # px of the image
FACTOR = 8  # pixels to a latent
UNET: dict[str, Any] = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 512,
}  # fmt: skip
Pass = Callable[[Tensor, Tensor, Tensor], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=360, help="px of the image that is timed")
    parser.add_argument("--batch", type=int, default=8, help="training images a step (GPU)")
    args = parser.parse_args()
    counted = operations()
    print(json.dumps(counted | {"presets": presets(counted)}, indent=1))
    device = torch.device(args.device)
    print(json.dumps(timed(device, args.size), indent=1))
    if device.type == "cuda":
        print(json.dumps(trained(device, args.size, args.batch), indent=1))


def operations() -> dict[str, Any]:
    """GFLOP to name a cell once with all classes, and to encode it."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET).eval(), AutoencoderKL(**VAE).eval()
        ways = ways_of(unet)
    found = {"parameters": sum(weight.numel() for weight in unet.parameters()), "classes": CLASSES}
    for size in SIZES:
        image = torch.zeros(1, 3, size, size, device="meta")
        each = {name: _gflop(way, *inputs(size, "meta")) for name, way in ways.items()}
        found[f"{size} px"] = each | {"encoding": _gflop(vae.encode, image)}
    return found


def presets(counted: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """EFLOP of each training preset: three times the forward pass, and encoding at every step.

    And GB of weights, gradients, two moments and running mean in float32, without activations.
    """
    found = {}
    for name in (name for name in PRESETS if name.startswith("paper-")):
        settings = make_settings(name)
        each = counted[f"{settings.preprocess.size} px"]
        images = settings.steps * settings.batch
        unet = 3 * images * each["one token"] / CLASSES / 1e9
        encoding = images * each["encoding"] / 1e9
        states = 5 * 4 * counted["parameters"] / 1e9
        found[name] = {"images": images, "U-Net, EFLOP": round(unet, 2),
                       "encoding, EFLOP": round(encoding, 2), "states, GB": round(states, 1)}  # fmt: skip
    return found


def ways_of(unet: Any) -> dict[str, Pass]:
    """Guesses for every class of a noisy latent, as published and as here."""
    ours = LatentNetwork(folded(unet, CLASSES), CLASSES, Schedule()).eval()

    def with_tokens(count: int) -> Pass:
        def run(noisy: Tensor, time_step: Tensor, labels: Tensor) -> Any:
            told = tokens(label_vectors(labels[0], CLASSES).to(noisy.dtype), 768, count)
            rows = (noisy.expand(CLASSES, -1, -1, -1), time_step.expand(CLASSES))
            return unet(*rows, encoder_hidden_states=told).sample

        return run

    return {"as published, 77 tokens": with_tokens(77), "one token": with_tokens(1), "ours": ours}


def inputs(size: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """A noisy latent, its time step, and all classes."""
    side = size // FACTOR
    half = torch.float16 if str(device).startswith("cuda") else torch.float32
    noisy = torch.zeros(1, 4, side, side, device=device, dtype=half)
    return noisy, torch.tensor([500.0], device=device), torch.arange(CLASSES, device=device)[None]


@torch.no_grad()
def _gflop(run: Callable[..., Any], *args: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        run(*args)
    return round(counter.get_total_flops() / 1e9, 1)


@torch.inference_mode()
def timed(device: torch.device, size: int) -> dict[str, Any]:
    """Seconds for all classes of one noisy latent: the shortest of three."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET).eval().to(device)
    vae = AutoencoderKL(**VAE).eval().to(device)
    if device.type == "cuda":
        unet, vae = unet.half(), vae.half()
    ways, given = ways_of(unet), inputs(size, device)
    found: dict[str, Any] = {
        "device": _name(device),
        "px": size,
        "threads": torch.get_num_threads(),
    }
    for name, way in ways.items():
        found[name] = round(min(_seconds(lambda w=way: w(*given), device) for _ in range(3)), 4)
    image = torch.zeros(1, 3, size, size, device=device, dtype=given[0].dtype)
    found["encoding"] = round(min(_seconds(lambda: vae.encode(image), device) for _ in range(3)), 4)
    found["passes a second, ours"] = round(CLASSES / found["ours"], 2)
    if device.type == "cuda":
        found["memory, GB"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 1)
    return found


def trained(device: torch.device, size: int, batch: int) -> dict[str, Any]:
    """Images a second and memory of training steps on latents, in half precision."""
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats(device)
    unet = UNet2DConditionModel(**UNET).train().to(device)
    unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True)
    side = size // FACTOR
    latents = torch.randn(batch, 4, side, side, device=device)
    told = tokens(torch.eye(CLASSES, device=device)[torch.arange(batch) % CLASSES], 768)
    times = torch.randint(1000, (batch,), device=device)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            said = unet(latents, times, encoder_hidden_states=told).sample
        (said.float() - latents).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = min(_seconds(step, device) for _ in range(5))
    peak = round(torch.cuda.max_memory_allocated(device) / 1e9, 1)
    return {
        "how": "bfloat16, gradient checkpointing",
        "batch": batch,
        "training images a second": round(batch / seconds, 1),
        "memory, GB": peak,
    }


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"


if __name__ == "__main__":
    main()
