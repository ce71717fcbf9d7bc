"""A running mean of the weights, which names and draws cells better than the last weights do.

    mean <- decay mean + (1 - decay) weights,      decay = min(target, (1 + step) / (10 + step))

The warm-up keeps the first, random weights from lingering in the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cytodiffusion.train.learner import learned


class EMA:
    """The mean of a module's parameters and buffers, without those that are frozen."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.mean = {name: value.detach().clone() for name, value in learned(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the mean towards the weights after optimiser step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        now = learned(module)
        for name, value in now.items():
            if not value.is_floating_point():
                self.mean[name].copy_(value)
        moving = [name for name, value in now.items() if value.is_floating_point()]
        torch._foreach_lerp_(  # in one go: on a GPU a call for each tensor costs more than the sum
            [self.mean[n] for n in moving], [now[n].to(self.mean[n]) for n in moving], 1 - decay
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The mean weights, by name."""
        return self.mean

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved mean."""
        for name, value in state.items():
            self.mean[name].copy_(value)
