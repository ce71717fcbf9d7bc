"""Muon: kernels of convolutions take steps that change every direction equally.

A kernel is a matrix, outputs x (inputs, height, width). AdamW scales each number of its gradient alone.
Muon takes the semi-orthogonal matrix nearest to the momentum of the gradient, U V' for U S V': directions
that a batch hardly asks for are learned as quickly as the loud ones. All else (biases, gains, what tells
the noise level, what gives pixels) is left to AdamW. Both share one schedule of the learning rate.

U V' comes of four steps of a Newton-Schulz iteration, X <- (a I + b XX' + c (XX')^2) X, whose singular
values end between about .7 and 1.2. All factors are polynomials of the first XX': they are multiplied as
small square matrices and meet X once.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon (the method, the coefficients); Liu et
al. 2025, arXiv 2502.16982 (the size of a step does not depend on the shape).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)  # a, b, c
ITERATIONS = 4
MOMENTUM = 0.95
SIZE = 0.8  # root mean square of a step / learning rate: four times AdamW's (docs/log.md 56)


class Muon(torch.optim.AdamW):
    """AdamW, but for the parameters `kernels`, which are among `params`."""

    def __init__(
        self, params: Iterable[nn.Parameter], kernels: Iterable[nn.Parameter], **adamw: Any
    ) -> None:
        super().__init__(params, **adamw)
        self.kernels = list(kernels)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both. AdamW passes over what has no gradient any more."""
        (group,) = self.param_groups
        alike = dict[torch.Size, list[nn.Parameter]]()
        for kernel in self.kernels:
            if kernel.grad is not None:
                alike.setdefault(kernel.shape, []).append(kernel)
        for kernels in alike.values():
            steps = orthogonal(torch.stack([self._nesterov(kernel) for kernel in kernels]))
            size = group["lr"] * SIZE * max(steps.shape[1:]) ** 0.5
            for kernel, step in zip(kernels, steps, strict=True):
                kernel.mul_(1 - group["lr"] * group["weight_decay"])
                kernel.sub_(step.view_as(kernel), alpha=size)
                kernel.grad = None
        return super().step(closure)

    def _nesterov(self, kernel: nn.Parameter) -> Float[Tensor, "out rest"]:
        """The gradient, looked at from where the momentum leads."""
        state, grad = self.state[kernel], cast(Tensor, kernel.grad)
        if "momentum" not in state:  # AdamW looks for a number of steps where there is a state
            state |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(kernel)}
        state["momentum"].lerp_(grad, 1 - MOMENTUM)
        return torch.lerp(grad, state["momentum"], MOMENTUM).flatten(1)


def orthogonal(matrices: Float[Tensor, "n r c"]) -> Float[Tensor, "n r c"]:
    """About the nearest semi-orthogonal matrix to each: most singular values between .7 and 1.2.

    Those below a hundredth of the largest fall short of that.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    # Of a gradient as small as those of the first steps the square would vanish.
    matrices = matrices / _size(matrices).clamp(min=1e-20)
    square = matrices @ matrices.mT
    norm = _size(square).sqrt().clamp(min=1e-3)  # no singular value is larger
    square = square / norm / norm
    factor = _quintic(square)
    whole = factor
    for _ in range(ITERATIONS - 1):
        square = factor @ square @ factor
        factor = _quintic(square)
        whole = factor @ whole
    return whole @ (matrices / norm)


def _size(matrices: Float[Tensor, "n r c"]) -> Float[Tensor, "n 1 1"]:
    return matrices.norm(dim=(1, 2), keepdim=True)


def _quintic(square: Float[Tensor, "n r r"]) -> Float[Tensor, "n r r"]:
    a, b, c = QUINTIC
    factor = b * square + c * square @ square
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor
