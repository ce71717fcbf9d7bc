"""Stable Diffusion's U-Net, asked about classes, in the latents of its autoencoder.

The published method tells the U-Net the class by a one-hot vector, padded with zeros to the width of a
text embedding and copied to all 77 tokens. All tokens being equal, attention over them is uniform:
every cross-attention adds the same vector at every place, and it is linear in the label y,

    attention(h, y)  =  W_out W_v y + b_out                            whatever h is

So one token gives what 77 give, and a cross-attention is one small matrix, `ClassVector`. What comes
before the first of them, the input convolution, a residual block and a self-attention, does not depend on
the class: it is computed once for all labels of a noisy image. Both are exact, and need no training.

"Any cell", label K, is the mean of all classes, y = (1, ..., 1)/K.

Source: Deltadahl et al. 2025, arXiv 2408.08982 (conditioning); Rombach et al. 2022, arXiv 2112.10752.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from cytodiffusion.diffusion.precondition import VPDenoiser
from cytodiffusion.errors import ModelError, SettingsError
from cytodiffusion.networks.pretrained import Schedule, check_shape, library

LATENT = "U-Net of Stable Diffusion's shape, class by class"
UNIT = 2.0  # latents have standard deviation 1, pixels one half


def label_vectors(labels: Int[Tensor, "*n"], classes: int) -> Float[Tensor, "*n {classes}"]:
    """One-hot vectors; the mean of all of them for "any cell"."""
    every = torch.cat([torch.eye(classes), torch.full((1, classes), 1 / classes)])
    return every.to(labels.device)[labels]


def tokens(
    labels: Float[Tensor, "n k"], width: int, count: int = 1
) -> Float[Tensor, "n {count} {width}"]:
    """Labels as the published method gives them: padded with zeros, copied to `count` tokens."""
    return nn.functional.pad(labels, (0, width - labels.shape[1]))[:, None].expand(-1, count, -1)


class ClassVector(nn.Module):
    """A cross-attention whose tokens are all equal: a vector, linear in the label."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.vector = nn.Linear(classes, channels)

    def forward(
        self, hidden: Tensor, encoder_hidden_states: Float[Tensor, "m 1 k"], **_: Any
    ) -> Float[Tensor, "m 1 c"]:
        """Called as diffusers calls a cross-attention; `hidden` does not matter."""
        return self.vector(encoder_hidden_states)

    @classmethod
    @torch.no_grad()
    def of(cls, attention: Any, classes: int) -> ClassVector:
        """What a cross-attention of diffusers does with labels of so many classes."""
        value, out = attention.to_v, attention.to_out[0]
        made = cls(classes, out.out_features)
        shift = torch.zeros(value.out_features) if value.bias is None else value.bias
        made.vector.weight.copy_(out.weight @ value.weight[:, :classes])
        made.vector.bias.copy_(out.weight @ shift.to(out.weight) + out.bias)
        return made.to(out.weight)


def folded(unet: Any, classes: int) -> Any:
    """A copy of a U-Net whose cross-attentions are `ClassVector`s. Raises ModelError."""
    check_unet(unet, classes)
    unet = copy.deepcopy(unet)
    for block in transformer_blocks(unet):
        block.attn2, block.norm2 = ClassVector.of(block.attn2, classes), nn.Identity()
    return unet


def emptied(unet: Any, classes: int) -> Any:
    """The same shape, for weights that were saved of a folded U-Net."""
    for block in transformer_blocks(unet):
        block.attn2 = ClassVector(classes, block.attn2.to_out[0].out_features)
        block.norm2 = nn.Identity()
    return unet


def transformer_blocks(unet: nn.Module) -> list[Any]:
    """Every block with a cross-attention."""
    return [m for m in unet.modules() if getattr(m, "attn2", None) is not None]


def check_unet(unet: Any, classes: int) -> None:
    """Raises ModelError where a U-Net is not of Stable Diffusion's shape, or too narrow."""
    check_shape(unet.config)
    width = unet.config.cross_attention_dim
    if width < classes:
        raise ModelError(
            f"{classes} classes do not fit into a token of {width} numbers. Give a wider U-Net, or join "
            "classes."
        )


class LatentNetwork(nn.Module):
    """F(scaled latents, time step, labels) -> what the U-Net predicts for each label."""

    def __init__(self, unet: nn.Module, classes: int, schedule: Schedule) -> None:
        """`unet` is `folded`, or `emptied` for weights to come."""
        super().__init__()
        self.unet: Any = unet
        self.classes, self.schedule = classes, schedule

    def denoiser(self) -> VPDenoiser:
        """The network as a `Denoiser`."""
        return VPDenoiser(self, self.schedule.levels, self.schedule.prediction)

    def forward(
        self,
        noisy: Float[Tensor, "n c h w"],
        time: Float[Tensor, " n"],
        labels: Int[Tensor, "n k"],
    ) -> Float[Tensor, "n k c h w"]:
        dtype = self.unet.conv_in.weight.dtype
        said_of = label_vectors(labels, self.classes).to(dtype).flatten(0, 1)[:, None]
        said = self._run(noisy.to(dtype), time, said_of, labels.shape[1])
        return said.float().unflatten(0, labels.shape)

    def _run(self, x: Tensor, time: Tensor, label: Float[Tensor, "m 1 k"], k: int) -> Tensor:
        """diffusers' UNet2DConditionModel.forward; the rows of an image part at the first label."""
        unet = self.unet
        embedding = unet.time_embedding(unet.time_proj(time).to(x))
        x = unet.conv_in(x)
        skips = [x.repeat_interleave(k, 0)]
        x, embedding = self._first_block(x, embedding, label, k, skips)
        for block in unet.down_blocks[1:]:
            x, kept = block(x, embedding, **_told(block, label))
            skips += kept
        if unet.mid_block is not None:
            x = unet.mid_block(x, embedding, **_told(unet.mid_block, label))
        for block in unet.up_blocks:
            count = len(block.resnets)
            mine, skips = tuple(skips[-count:]), skips[:-count]
            size = skips[-1].shape[2:] if skips else None
            x = block(x, mine, embedding, upsample_size=size, **_told(block, label))
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))

    def _first_block(
        self, x: Tensor, embedding: Tensor, label: Tensor, k: int, skips: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The first CrossAttnDownBlock2D; the first transformer in it is where the labels come in."""
        block = self.unet.down_blocks[0]
        x = _parted(block.attentions[0], block.resnets[0](x, embedding), label, k)
        embedding = embedding.repeat_interleave(k, 0)
        skips.append(x)
        for resnet, attention in zip(block.resnets[1:], block.attentions[1:], strict=True):
            x = attention(resnet(x, embedding), encoder_hidden_states=label, return_dict=False)[0]
            skips.append(x)
        for smaller in block.downsamplers or ():
            x = smaller(x)
            skips.append(x)
        return x, embedding


def _told(block: Any, label: Tensor) -> dict[str, Tensor]:
    """What a block of diffusers takes besides the image and the time."""
    return {"encoder_hidden_states": label} if getattr(block, "has_cross_attention", False) else {}


def _parted(transformer: Any, x: Tensor, label: Tensor, k: int) -> Tensor:
    """diffusers' Transformer2DModel, whose rows are repeated for k labels after its self-attention."""
    n, _, height, width = x.shape
    first, *others = transformer.transformer_blocks
    hidden = transformer.norm(x)
    hidden = hidden if transformer.use_linear_projection else transformer.proj_in(hidden)
    hidden = hidden.permute(0, 2, 3, 1).reshape(n, height * width, -1)
    hidden = transformer.proj_in(hidden) if transformer.use_linear_projection else hidden
    hidden = hidden + first.attn1(first.norm1(hidden))
    hidden = hidden.repeat_interleave(k, 0)
    hidden = hidden + first.attn2(hidden, encoder_hidden_states=label)
    hidden = hidden + first.ff(first.norm3(hidden))
    for block in others:
        hidden = block(hidden, encoder_hidden_states=label)
    hidden = transformer.proj_out(hidden) if transformer.use_linear_projection else hidden
    hidden = hidden.reshape(n * k, height, width, -1).permute(0, 3, 1, 2)
    hidden = hidden if transformer.use_linear_projection else transformer.proj_out(hidden)
    return hidden + x.repeat_interleave(k, 0)


class LatentShape(BaseModel):
    """All that is needed to build a network and its space again for weights to come."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: int = Field(ge=1, description="number of classes, without 'any cell'")
    unet: dict[str, Any] = Field(description="configuration of diffusers' UNet2DConditionModel")
    vae: dict[str, Any] = Field(description="and of its AutoencoderKL")
    schedule: Schedule = Field(description="of the training")
    disc: float | None = Field(
        None, ge=1, description="errors count within this radius, latent pixels"
    )

    @classmethod
    def of(cls, network: LatentNetwork, space: LatentSpace, disc: float | None) -> LatentShape:
        """The shape of a fine-tuned network."""
        return cls(
            classes=network.classes, unet=_plain(network.unet.config), vae=_plain(space.vae.config),
            schedule=network.schedule, disc=disc,
        )  # fmt: skip

    def build(self) -> tuple[LatentNetwork, LatentSpace]:
        """With random weights. Raises MissingExtra."""
        diffusers = library()
        unet = emptied(diffusers.UNet2DConditionModel.from_config(self.unet), self.classes)
        space = LatentSpace(diffusers.AutoencoderKL.from_config(self.vae))
        return LatentNetwork(unet, self.classes, self.schedule), space


def _plain(config: Any) -> dict[str, Any]:
    """What diffusers was told of a part, without what it noted for itself."""
    return {name: value for name, value in dict(config).items() if not name.startswith("_")}


# --- the space -----------------------------------------------------------------------------------


class LatentSpace:
    """The latents of an autoencoder of diffusers, scaled to a standard deviation of about 1.

    No module: it is never trained, and not part of what is.
    """

    scale: float = UNIT

    def __init__(self, vae: nn.Module) -> None:
        self.vae: Any = vae.eval().requires_grad_(False)

    def to(self, where: torch.device | torch.dtype | str) -> LatentSpace:
        """Move the autoencoder to a device or a precision."""
        self.vae.to(where)
        return self

    @property
    def factor(self) -> int:
        """Pixels of an image to one of the latents, in each direction."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def shape(self, size: int) -> tuple[int, int, int]:
        """Raises SettingsError where the autoencoder cannot take an image of this size whole."""
        if size % self.factor:
            raise SettingsError(
                f"The autoencoder needs images of a multiple of {self.factor} px, not {size}; try "
                f"preprocess.size={self.factor * max(1, round(size / self.factor))}."
            )
        return self.vae.config.latent_channels, size // self.factor, size // self.factor

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n c h w"]:
        """The most probable latents: no random numbers."""
        self.shape(images.shape[-1])
        found = self.vae.encode(images.to(self._like)).latent_dist.mode().float()
        return (found - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 s s"]:
        """Images that may reach a little beyond [-1, 1]."""
        config = self.vae.config
        plain = latents / config.scaling_factor + (config.shift_factor or 0)
        return self.vae.decode(plain.to(self._like)).sample.float()

    @property
    def _like(self) -> Tensor:
        """Its device and precision."""
        return self.vae.encoder.conv_in.weight


@runtime_checkable
class Move(Protocol):
    """A change of an image that can be undone."""

    def __call__(self, image: Tensor) -> Tensor: ...

    def undo(self, image: Tensor) -> Tensor: ...


def pose_error(
    space: LatentSpace, images: Float[Tensor, "n 3 s s"], poses: Sequence[Move]
) -> Float[Tensor, " p"]:
    """How far latents of a posed image, turned back, are from those of the image itself.

    Root mean square, over the standard deviation of the latents; 0 for an autoencoder that commutes with
    the pose. Classification poses latents, so that a cell is encoded once: this is what that costs.
    """
    plain = space.encode(images)
    gaps = [pose.undo(space.encode(pose(images))) - plain for pose in poses]
    return torch.stack([gap.square().mean().sqrt() for gap in gaps]) / plain.std()
