"""How a network of Stable Diffusion's shape is fine-tuned, as published or lighter.

    image -> augment -> mix with another image and label -> encode -> add noise -> guess -> loss

Mixed are pixels and one-hot labels, x = l x1 + (1 - l) x2 with l ~ Beta(a, a). The noise has an offset,
one number a channel, N(0, I) + 0.1 N(0, 1). Errors count min-SNR. Fine-tuned is the whole U-Net, or small
matrices beside those of its attentions (LoRA), which are merged into it afterwards.

Encoding an image costs about as much as a pass of the U-Net. With `cache`, so many augmented views of
every image are encoded once, before training, and kept in RUN/latents.npy; then latents are mixed.

Source: Deltadahl et al. 2025, arXiv 2408.08982; Hu et al. 2021, LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cytodiffusion.data.images import to_tensor
from cytodiffusion.data.transforms import augment
from cytodiffusion.diffusion.loss import Losses, min_snr_weight
from cytodiffusion.diffusion.noise import time_of_sigma
from cytodiffusion.diffusion.precondition import VPDenoiser, clean_guess, spread
from cytodiffusion.errors import MissingExtra
from cytodiffusion.files import whole
from cytodiffusion.networks.latent import (
    LATENT,
    LatentNetwork,
    LatentSpace,
    check_unet,
    folded,
    label_vectors,
    tokens,
)
from cytodiffusion.networks.pretrained import read_pretrained
from cytodiffusion.train.learner import Batch, Learner, check_names, learned
from cytodiffusion.train.settings import LatentSettings, TrainSettings
from cytodiffusion.types import UNLABELLED

ATTENTIONS = ["to_q", "to_k", "to_v", "to_out.0"]  # the layers that LoRA changes
CACHE = "latents.npy"
ROWS = 16  # images encoded at a time


class LatentLearner(Learner):
    """A U-Net of diffusers, the frozen autoencoder before it, and its loss."""

    form = LATENT

    def __init__(self, settings: TrainSettings, classes: int) -> None:
        super().__init__()
        assert settings.latent is not None
        self.settings, self.latent, self.classes = settings, settings.latent, classes
        self.radius = settings.latent.disc
        found = read_pretrained(settings.latent.start, settings.latent.variant)
        check_unet(found.unet, classes)
        self.space: LatentSpace = LatentSpace(found.vae)
        self.space.shape(settings.preprocess.size)
        self.schedule = found.schedule
        self.register_buffer("levels", found.schedule.levels, persistent=False)
        self.sigmas = float(self.levels[0]), float(self.levels[-1])
        self.unet: Any = _trainable(found.unet, settings.latent)
        self.kept: np.ndarray | None = None  # encoded views, (images, views, c, h, w)

    levels: Tensor

    def place(self, device: torch.device) -> None:
        """Move everything to a device, the autoencoder too."""
        self.to(device)
        self.space.to(device)

    def optimizer(self, settings: TrainSettings) -> torch.optim.Optimizer:
        """AdamW as published; with states of 8 bits where that is asked for."""
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        if not self.latent.eight_bit:
            return torch.optim.AdamW(trained, weight_decay=settings.weight_decay, fused=True)
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise MissingExtra(
                f"An optimiser of 8 bits needs bitsandbytes, which is not installed ({error}). Try: pip "
                "install bitsandbytes, or --set latent.eight_bit=false."
            ) from error
        return cast(torch.optim.Optimizer, AdamW8bit(trained, weight_decay=settings.weight_decay))

    def draw(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Images (latents where they are kept), noise, sigma and soft labels."""
        device, size = batch.labels.device, self.settings.preprocess.size
        clean = self._views(batch, generator)
        labels = self._soft(batch.labels, generator)
        clean, labels = mixed(clean, labels, self.latent.mixup, generator)
        shape = (len(clean), *self.space.shape(size))
        noise = torch.randn(shape, generator=generator, device=device)
        offset = torch.randn((*shape[:2], 1, 1), generator=generator, device=device)
        time = torch.randint(len(self.levels), (len(clean),), generator=generator, device=device)
        return clean, noise + self.latent.offset_noise * offset, self.levels[time], labels

    def _views(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Augmented images, or latents of one of the views that are kept."""
        s = self.settings
        if self.kept is None:
            return augment(to_tensor(batch.canvases), s.preprocess.size, s.augmentation, generator)
        view = torch.randint(
            self.kept.shape[1], (len(batch.rows),), generator=generator, device=generator.device
        )
        found = self.kept[batch.rows, view.cpu().numpy()]
        return torch.from_numpy(found).to(batch.labels.device).float()

    def _soft(
        self, labels: Int[Tensor, " n"], generator: torch.Generator
    ) -> Float[Tensor, "n {self.classes}"]:
        """Label vectors: "any cell" where the label is not known, or hidden."""
        luck = torch.rand(len(labels), generator=generator, device=labels.device)
        hidden = (labels == UNLABELLED) | (luck < self.settings.label_dropout)
        return label_vectors(labels.masked_fill(hidden, self.classes), self.classes)

    def forward(self, clean: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor) -> Losses:
        clean = clean if self.kept is not None else self.space.encode(clean)
        s = spread(sigma, 4)
        noisy = clean + s * noise
        said = self.unet(
            noisy / (1 + s**2).sqrt(), time_of_sigma(sigma, self.levels),
            tokens(labels, self.unet.config.cross_attention_dim),
        ).sample.float()  # fmt: skip
        guess = clean_guess(said, noisy, s, self.schedule.prediction)
        weight = min_snr_weight(sigma, self.latent.gamma)
        own = ((guess - clean).square().mean((1, 2, 3)) * weight).mean()
        zero = torch.zeros_like(own)
        return Losses(own, own, zero, zero)

    def usable(self, weights: Mapping[str, Tensor]) -> VPDenoiser:
        """The U-Net with these weights, LoRA merged into it and its class vectors folded."""
        made = copy.deepcopy(self.unet)
        own = {name.removeprefix("unet."): value for name, value in weights.items()}
        check_names(own, learned(made), "these weights")
        made.load_state_dict(own, strict=False)
        plain = made.merge_and_unload() if self.latent.lora else made
        network = LatentNetwork(folded(plain, self.classes), self.classes, self.schedule)
        return network.denoiser().eval().requires_grad_(False).to(self.levels.device)


def _trainable(unet: Any, latent: LatentSettings) -> nn.Module:
    """The U-Net with what is trained of it marked so."""
    if latent.checkpointing:
        unet.enable_gradient_checkpointing()
    if not latent.lora:
        return unet.requires_grad_(True).train()
    try:
        import peft
    except ImportError as error:
        raise MissingExtra(
            f"LoRA needs peft, which is not installed ({error}). Try: pip install "
            "'cytodiffusion[latent]', or --set latent.lora=0 to fine-tune the whole U-Net."
        ) from error
    config = peft.LoraConfig(r=latent.lora, lora_alpha=latent.lora, target_modules=ATTENTIONS)
    return peft.get_peft_model(unet, config).train()


def mixed(
    images: Float[Tensor, "n c h w"], labels: Float[Tensor, "n k"], concentration: float,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n k"]]:  # fmt: skip
    """Each image and its label mixed with another of the batch; 0 leaves them (Zhang et al. 2018)."""
    if not concentration:
        return images, labels
    device, count = images.device, len(images)
    seed = int(torch.randint(2**62, (1,), generator=generator, device=device))
    share = np.random.default_rng(seed).beta(concentration, concentration, count)
    own = torch.from_numpy(share).to(images)
    other = torch.randperm(count, generator=generator, device=device)
    parts = ((x, spread(own, x.ndim)) for x in (images, labels))
    first, second = (part * x + (1 - part) * x[other] for x, part in parts)
    return first, second


# --- latents on disk -----------------------------------------------------------------------------


def keep_latents(
    learner: LatentLearner, canvases: np.ndarray, folder: Path, seed: int
) -> Generator[int, None, None]:
    """Encode views of every image into FOLDER/latents.npy; yields how many images are done.

    Run again, it goes on where it stopped; what was encoded with other settings is encoded anew.
    """
    path, stamp, about = folder / CACHE, folder / f"{CACHE}.json", _about(learner, canvases, seed)
    size, views = learner.settings.preprocess.size, learner.latent.cache
    done = _done(stamp, about) if path.exists() else 0
    if not done:
        stamp.unlink(missing_ok=True)
    shape = (len(canvases), views, *learner.space.shape(size))
    kept = np.lib.format.open_memmap(path, "r+" if done else "w+", np.float16, shape)
    for start in range(done, len(canvases), ROWS):
        part = torch.from_numpy(canvases[start : start + ROWS]).to(learner.levels.device)
        for view in range(views):
            kept[start : start + ROWS, view] = _encoded(learner, part, seed + start, view)
        kept.flush()
        done = min(start + ROWS, len(canvases))
        with whole(stamp) as file:
            file.write_text(json.dumps({"of": about, "images": done}))
        yield done
    learner.kept = np.load(path, mmap_mode="r")


def _about(learner: LatentLearner, canvases: np.ndarray, seed: int) -> str:
    """A digest of all that decides the latents; the autoencoder counts by its first weights."""
    s = learner.settings
    first = learner.space.vae.encoder.conv_in.weight.sum().item()
    about = (canvases.shape, s.preprocess, s.augmentation, s.latent, seed, first)
    found = hashlib.sha256(repr(about).encode())
    for canvas in canvases:
        found.update(np.ascontiguousarray(canvas).data)
    return found.hexdigest()


def _encoded(learner: LatentLearner, canvases: Tensor, seed: int, view: int) -> np.ndarray:
    s = learner.settings
    generator = torch.Generator(canvases.device).manual_seed(1_000_003 * view + seed)
    images = augment(to_tensor(canvases), s.preprocess.size, s.augmentation, generator)
    return learner.space.encode(images).half().cpu().numpy()


def _done(stamp: Path, of: str) -> int:
    """How many images are encoded, with these settings."""
    try:
        said = json.loads(stamp.read_text())
    except (OSError, ValueError):
        return 0
    return int(said["images"]) if said.get("of") == of else 0
