"""Discriminative baselines: what the same images give a network that only has to name them.

A ResNet, a ConvNeXt or a ViT for small images, from transformers, not pretrained unless a local folder
of weights is given: another baseline's, or transformers'. It sees the augmented images that a diffusion
model sees, and no others, for a number of steps or for a time on the processor. `Baseline` has the
methods of our `Classifier`. Its scores of strangeness, with logits z and features f (higher is stranger):

    softmax       -ln max_k p_k
    energy        -ln sum_k exp z_k
    mahalanobis   smallest distance of f to a class mean of the training images, one pooled covariance

Images without a label (-1) serve where `pseudo` is on: what the network says of an image that is only
turned, where it is sure enough, is what it shall say of the same image augmented.

Source: Hendrycks and Gimpel 2017, arXiv 1610.02136 (softmax); Liu et al. 2020, arXiv 2010.03759
(energy); Lee et al. 2018, arXiv 1807.03888 (mahalanobis); Sohn et al. 2020, FixMatch, arXiv 2001.07685.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import load_file, save
from sklearn.covariance import LedoitWolf
from torch import Tensor, nn
from torch.nn import functional

from cytodiffusion.data.images import Preprocess, to_tensor
from cytodiffusion.data.transforms import Augmentation, augment, random_poses, unmoved
from cytodiffusion.errors import DataError, MissingExtra, ModelError, SettingsError
from cytodiffusion.files import write_file
from cytodiffusion.types import UNLABELLED, Classes

Kind = Literal["resnet", "convnext", "vit"]
Held = tuple[UInt8[np.ndarray, "m 3 size size"], Int[np.ndarray, " m"]]

KINDS: tuple[Kind, ...] = ("resnet", "convnext", "vit")
SCORES = ("softmax", "energy", "mahalanobis")
BATCH = 64  # images a pass when it is used
WARMUP = 0.05  # share of the training over which the learning rate rises
CLIP = 1.0  # largest norm of the gradient
REPORT = 20  # steps between two reports

# Configurations of transformers: ResNet-18 as it is; the others shallower, for 64 px.
SHAPES: dict[Kind, dict[str, Any]] = {
    "resnet": {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
    "convnext": {
        "num_stages": 3, "patch_size": 4, "hidden_sizes": [64, 128, 256], "depths": [3, 6, 3],
    },
    "vit": {
        "patch_size": 8, "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3,
        "intermediate_size": 768,
    },
}  # fmt: skip


class BaselineSettings(BaseModel):
    """One baseline and its training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind = Field("resnet", description="resnet, convnext or vit")
    steps: int | None = Field(None, ge=1, description="optimiser steps, probes included")
    minutes: float | None = Field(
        None, gt=0, description="processor time instead of steps, probes included"
    )
    batch: int = Field(32, ge=2, description="labelled images an optimiser step")
    learning_rates: tuple[float, ...] = Field(
        (3e-4, 1e-3, 3e-3), min_length=1, description="of AdamW; the best in short probes is taken"
    )
    probe: float = Field(0.06, gt=0, lt=1, description="share of the training for each probe")
    weight_decay: float = Field(0.05, ge=0, description="of AdamW")
    balance: float = Field(0.5, ge=0, le=1, description="0: classes as often as they are; 1: equal")
    pseudo: bool = Field(False, description="learn from unlabelled images by pseudo-labels")
    threshold: float = Field(0.95, ge=0, lt=1, description="least confidence of a pseudo-label")
    weights: Path | None = Field(
        None, description="pretrained: a baseline, or transformers' folder"
    )
    seed: int = Field(0, ge=0, description="decides every random number")

    @model_validator(mode="after")
    def _one_limit(self) -> BaselineSettings:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give either steps or minutes")
        return self


@dataclass(frozen=True)
class Progress:
    """What happened since the last report."""

    step: int
    done: float  # share of the training, 0 to 1
    seconds: float  # processor time on a CPU, else time, since the last report
    images: int  # labelled images trained on since the last report
    loss: float  # mean since the last report, nats


# --- the network ---------------------------------------------------------------------------------


def library() -> Any:
    """transformers. Raises MissingExtra naming the pip line."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra(
            f"The baselines need transformers, which is not installed ({error}). "
            "Try: pip install 'cytodiffusion[baselines]'"
        ) from error
    return transformers


class Network(nn.Module):
    """A trunk of transformers and one linear layer."""

    def __init__(self, kind: Kind, trunk: nn.Module, classes: int) -> None:
        super().__init__()
        self.kind, self.trunk = kind, trunk
        config: Any = trunk.config
        self.head = nn.Linear(getattr(config, "hidden_size", 0) or config.hidden_sizes[-1], classes)
        self.register_buffer("mean", torch.zeros(3, 1, 1))  # of what the trunk was trained on
        self.register_buffer("std", torch.ones(3, 1, 1))

    mean: Tensor
    std: Tensor

    def features(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n f"]:
        """What the linear layer sees."""
        scaled = (images - self.mean) / self.std
        if self.kind == "vit":
            return self.trunk(scaled, interpolate_pos_encoding=True).last_hidden_state.mean(1)
        return self.trunk(scaled).pooler_output.flatten(1)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n k"]:
        return self.head(self.features(images))


def _trunk(kind: Kind, config: dict[str, Any]) -> nn.Module:
    """A trunk with random weights."""
    models = library()
    if kind == "resnet":
        return models.ResNetModel(models.ResNetConfig(**config))
    if kind == "convnext":
        return models.ConvNextModel(models.ConvNextConfig(**config))
    return models.ViTModel(models.ViTConfig(**config), add_pooling_layer=False)


def make_network(settings: BaselineSettings, classes: Sequence[str], size: int) -> Network:
    """The network before training. Raises SettingsError, ModelError, MissingExtra."""
    shape = dict(SHAPES[settings.kind])
    if settings.kind == "vit" and settings.weights is None:
        if size % shape["patch_size"]:
            raise SettingsError(
                f"A ViT here needs images of a multiple of 8 px, not {size}. Choose another baseline."
            )
        shape["image_size"] = size
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        if settings.weights is None:
            return Network(settings.kind, _trunk(settings.kind, shape), len(classes))
        if (settings.weights / "baseline.json").is_file():
            return _of_another(settings.kind, settings.weights, classes, size)
        return _pretrained(settings.kind, settings.weights, len(classes))


def _of_another(kind: Kind, folder: Path, classes: Sequence[str], size: int) -> Network:
    """The network of a trained baseline; what it says of classes is matched by their names."""
    begun = Baseline.load(folder)
    if (begun.network.kind, begun.preprocess.size) != (kind, size):
        raise SettingsError(
            f"{folder} has a {begun.network.kind} of {begun.preprocess.size} px; a {kind} of {size} px "
            "cannot begin with it."
        )
    network = Network(kind, begun.network.trunk, len(classes))
    network.mean.copy_(begun.network.mean)
    network.std.copy_(begun.network.std)
    with torch.no_grad():
        for row, name in enumerate(classes):
            if name in begun.classes.names:
                known = begun.classes.index(name)
                network.head.weight[row] = begun.network.head.weight[known]
                network.head.bias[row] = begun.network.head.bias[known]
    return network


def _pretrained(kind: Kind, folder: Path, classes: int) -> Network:
    """Weights that the user has, with the mean and spread of the images they were trained on."""
    models = library()
    name = {"resnet": "ResNetModel", "convnext": "ConvNextModel", "vit": "ViTModel"}[kind]
    more = {"add_pooling_layer": False} if kind == "vit" else {}
    try:
        trunk = getattr(models, name).from_pretrained(folder, local_files_only=True, **more)
        scale = json.loads((folder / "preprocessor_config.json").read_text())
        network = Network(kind, trunk, classes)
        network.mean.copy_(2 * torch.tensor(scale["image_mean"]).view(3, 1, 1) - 1)
        network.std.copy_(2 * torch.tensor(scale["image_std"]).view(3, 1, 1))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{folder} has no weights of a {name} that can be read ({first}). It needs config.json, "
            "model.safetensors and preprocessor_config.json, as transformers saves them."
        ) from error
    return network


# --- in use --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """A trained baseline. Methods take images (n, 3, size, size) in [-1, 1], as `Classifier`'s do."""

    network: Network
    classes: Classes
    preprocess: Preprocess
    settings: BaselineSettings
    means: Float[np.ndarray, "k f"]  # of the features of each class's training images
    precision: Float[np.ndarray, "f f"]
    trained: dict[str, Any]  # steps, images, seconds, learning_rate: how it was made

    def predict(self, images: Tensor | np.ndarray) -> np.ndarray:
        """Name of the most probable class of each image, (n,)."""
        return np.array(self.classes.names)[self.logits(images).argmax(1)]

    def predict_proba(self, images: Tensor | np.ndarray) -> np.ndarray:
        """Probability of each class, (n, classes)."""
        return np.exp(_log_softmax(self.logits(images)))

    def anomaly_score(self, images: Tensor | np.ndarray, method: str = "softmax") -> np.ndarray:
        """How strange each image is, (n,); higher is stranger. Raises SettingsError."""
        if method not in SCORES:
            raise SettingsError(f"There is no score '{method}'. There are: {', '.join(SCORES)}.")
        if method == "mahalanobis":
            gaps = self.features(images)[:, None] - self.means[None]
            return np.sqrt(np.einsum("nkf,fg,nkg->nk", gaps, self.precision, gaps, optimize=True)
                           .min(1).clip(0))  # fmt: skip
        logits = self.logits(images)
        logs = _log_softmax(logits)
        return -logs.max(1) if method == "softmax" else (logs - logits)[:, 0]

    def logits(self, images: Tensor | np.ndarray) -> Float[np.ndarray, "n k"]:
        """What the softmax is of."""
        return _apply(self.network, self.network.forward, images)

    def features(self, images: Tensor | np.ndarray) -> Float[np.ndarray, "n f"]:
        """What the last layer sees."""
        return _apply(self.network, self.network.features, images)

    def save(self, folder: Path) -> None:
        """Write model.safetensors and, last, baseline.json. Raises OutputError."""
        tensors = {name: value.cpu().contiguous() for name, value in self._state().items()}
        trunk: Any = self.network.trunk
        about = {
            "classes": list(self.classes),
            "preprocess": self.preprocess.model_dump(mode="json"),
            "settings": self.settings.model_dump(mode="json"),
            "trunk": trunk.config.to_dict(),
            "trained": self.trained,
        }
        write_file(folder / "model.safetensors", save(tensors), "the baseline")
        write_file(folder / "baseline.json", json.dumps(about, indent=1).encode(), "the baseline")

    def _state(self) -> dict[str, Tensor]:
        fitted = {
            "means": torch.from_numpy(self.means),
            "precision": torch.from_numpy(self.precision),
        }
        return {**self.network.state_dict(prefix="network."), **fitted}

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Baseline:
        """Read what `save` wrote."""
        about = json.loads((folder / "baseline.json").read_text())
        settings = BaselineSettings.model_validate(about["settings"])
        tensors = load_file(folder / "model.safetensors")
        means, precision = (tensors.pop(name).numpy() for name in ("means", "precision"))
        trunk = _trunk(settings.kind, about["trunk"])
        network = Network(settings.kind, trunk, len(about["classes"]))
        network.load_state_dict({name.removeprefix("network."): v for name, v in tensors.items()})
        preprocess = Preprocess.model_validate(about["preprocess"])
        return cls(network.to(device).eval(), Classes(tuple(about["classes"])), preprocess, settings,
                   means, precision, about["trained"])  # fmt: skip


@torch.inference_mode()
def _apply(network: Network, function: Any, images: Tensor | np.ndarray) -> np.ndarray:
    """A function of the network on many images, in double precision."""
    tensor = torch.as_tensor(images, dtype=torch.float32)
    found = [function(part.to(network.mean.device)) for part in tensor.split(BATCH)]
    return torch.cat(found).double().cpu().numpy()


def _log_softmax(logits: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    return functional.log_softmax(torch.from_numpy(logits), dim=1).numpy()


# --- training ------------------------------------------------------------------------------------


class Clock:
    """How much of a training is done: by steps, or by seconds (on a CPU, processor seconds)."""

    def __init__(self, settings: BaselineSettings, share: float, device: str) -> None:
        self.now = time.process_time if device == "cpu" else time.monotonic
        self.steps = settings.steps and max(1, round(share * settings.steps))
        self.limit = 60 * share * (settings.minutes or 0)
        self.step, self.seconds = 0, 0.0

    @property
    def done(self) -> float:
        """Share, 0 to 1."""
        return min(1.0, self.step / self.steps if self.steps else self.seconds / self.limit)


@dataclass
class Training:
    """The images that baselines are trained on, and how far their training is."""

    canvases: UInt8[Tensor, "n 3 s s"]
    labels: Int[Tensor, " n"]
    classes: tuple[str, ...]
    preprocess: Preprocess
    augmentation: Augmentation
    settings: BaselineSettings
    device: str
    done: float = 0.0  # share of the training
    steps: int = 0
    seconds: float = 0.0

    def fit(
        self, rate: float, share: float, rows: Int[np.ndarray, " m"]
    ) -> Generator[Progress, None, Network]:
        """Train a network on these rows for a share of the training, from its first weights."""
        network = make_network(self.settings, self.classes, self.preprocess.size)
        network.to(self.device).train()
        decay = self.settings.weight_decay
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=decay)
        clock = Clock(self.settings, share, self.device)
        before, losses, shown = self.done, list[float](), 0.0
        for step, (known, unknown) in enumerate(self._batches(rows)):
            began = clock.now()
            for group in optimizer.param_groups:
                group["lr"] = rate * _schedule(clock.done)
            losses.append(self._step(network, optimizer, known, unknown, step))
            clock.step, clock.seconds = step + 1, clock.seconds + clock.now() - began
            self.done = before + share * clock.done
            if clock.step % REPORT == 0 or clock.done == 1:
                self.steps, self.seconds = (
                    self.steps + len(losses),
                    self.seconds + clock.seconds - shown,
                )
                yield Progress(self.steps, self.done, clock.seconds - shown,
                               len(losses) * self.settings.batch, float(np.mean(losses)))  # fmt: skip
                losses, shown = [], clock.seconds
            if clock.done == 1:
                return network.eval()
        raise AssertionError("batches never end")

    def _batches(self, rows: Int[np.ndarray, " m"]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows of the labelled and of the unlabelled images of each step."""
        labels, s = self.labels.cpu().numpy()[rows], self.settings
        unknown = rows[labels == UNLABELLED] if s.pseudo else rows[:0]
        known = rows[labels != UNLABELLED]
        first = shuffled(labels[labels != UNLABELLED], s.batch, s.balance, s.seed)
        second = shuffled(np.zeros(len(unknown), dtype=int), s.batch, 0.0, s.seed)
        for chosen in first:
            yield known[chosen], unknown[next(second)] if len(unknown) else unknown

    def _step(
        self, network: Network, optimizer: torch.optim.Optimizer, known: np.ndarray,
        unknown: np.ndarray, step: int,
    ) -> float:  # fmt: skip
        """One optimiser step; returns the loss of the labelled images, nats."""
        seed = int(np.random.SeedSequence((self.settings.seed, step)).generate_state(1)[0])
        generator = torch.Generator(self.device).manual_seed(seed)
        loss = functional.cross_entropy(
            network(self._augmented(known, generator)), self.labels[known]
        )
        total = loss + self._pseudo(network, unknown, generator) if len(unknown) else loss
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    def _pseudo(
        self, network: Network, rows: np.ndarray, generator: torch.Generator
    ) -> Float[Tensor, ""]:
        """FixMatch: a confident answer is the label of the same image, augmented."""
        with torch.no_grad():
            told = network(random_poses(self.plain(rows), generator)).softmax(1)
        sure, label = told.max(1)
        missed = functional.cross_entropy(
            network(self._augmented(rows, generator)), label, reduction="none"
        )
        return (missed * (sure >= self.settings.threshold)).mean()

    def _augmented(self, rows: np.ndarray, generator: torch.Generator) -> Tensor:
        canvases = to_tensor(self.canvases[rows])
        return augment(canvases, self.preprocess.size, self.augmentation, generator)

    def plain(self, rows: np.ndarray) -> Float[Tensor, "m 3 h w"]:
        """The images as they are, the canvas's margin cut off."""
        return unmoved(to_tensor(self.canvases[rows]), self.preprocess.size)


def train_baseline(
    canvases: UInt8[np.ndarray, "n 3 s s"],
    labels: Int[np.ndarray, " n"],
    classes: tuple[str, ...],
    preprocess: Preprocess,
    augmentation: Augmentation,
    settings: BaselineSettings,
    held: Held | None = None,
    device: str = "cpu",
) -> Generator[Progress, None, Baseline]:
    """Train, reporting now and then; returns the baseline.

    `canvases` as for our own training (`Preprocess.canvas` with the augmentation's margin); a label
    of -1 is an unknown one. Of several learning rates, the one is taken that has the lowest NLL on
    `held` (images at the model's size) after a short training; without `held`, on a fifth of the
    images of each class, which the short trainings do without. Raises DataError where a class has
    no image, SettingsError, ModelError, MissingExtra.
    """
    counts = np.bincount(labels[labels != UNLABELLED], minlength=len(classes))
    if (counts == 0).any():
        missing = ", ".join(name for name, n in zip(classes, counts, strict=True) if n == 0)
        raise DataError(f"A baseline needs images of every class; there are none of: {missing}.")
    work = Training(torch.from_numpy(canvases).to(device), torch.from_numpy(labels).long().to(device),
                    classes, preprocess, augmentation, settings, device)  # fmt: skip
    rate = yield from _choose_rate(work, labels, held)
    network = yield from work.fit(rate, 1 - work.done, np.arange(len(labels)))
    means, precision = _gaussian(network, work, labels)
    trained = {"learning_rate": rate, "steps": work.steps, "images": work.steps * settings.batch,
               "seconds": round(work.seconds, 1), "train_images": int(counts.sum()),
               "parameters": sum(p.numel() for p in network.parameters())}  # fmt: skip
    return Baseline(network, Classes(classes), preprocess, settings, means, precision, trained)


def _choose_rate(
    work: Training, labels: np.ndarray, held: Held | None
) -> Generator[Progress, None, float]:
    """The learning rate with the lowest NLL after a short training."""
    settings, nlls = work.settings, dict[float, float]()
    if len(settings.learning_rates) == 1:
        return settings.learning_rates[0]
    rows, aside = np.arange(len(labels)), np.arange(0)
    if held is None:
        aside = set_aside(labels, settings.seed)
        rows, images, truth = np.setdiff1d(rows, aside), work.plain(aside), labels[aside]
    else:
        images, truth = to_tensor(held[0]), held[1]
    for rate in settings.learning_rates:
        network = yield from work.fit(rate, settings.probe, rows)
        logs = _log_softmax(_apply(network, network.forward, images))
        nlls[rate] = float(-logs[np.arange(len(truth)), truth].mean())
    return min(nlls, key=nlls.__getitem__)


def set_aside(labels: Int[np.ndarray, " n"], seed: int) -> Int[np.ndarray, " m"]:
    """Rows of about a fifth of each class, one at the least where there are two."""
    rng = np.random.default_rng(seed)
    each = [rng.permutation(np.flatnonzero(labels == k)) for k in np.unique(labels[labels >= 0])]
    return np.sort(np.concatenate([rows[: max(len(rows) // 5, len(rows) > 1)] for rows in each]))


def shuffled(
    labels: Int[np.ndarray, " n"], batch: int, balance: float, seed: int
) -> Iterator[Int[np.ndarray, " batch"]]:
    """Batches without end. In each shuffled pass, class c comes up as count_c^(1 - balance)."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    share = counts ** (1.0 - balance)
    copies = (len(labels) * share / share.sum() / counts)[inverse]
    left = np.arange(0)
    for epoch in count():
        rng = np.random.default_rng((seed, epoch))
        times = np.floor(copies + rng.random(len(labels))).astype(int)
        left = np.append(left, rng.permutation(np.repeat(np.arange(len(labels)), times)))
        for start in range(0, len(left) - batch + 1, batch):
            yield left[start : start + batch]
        left = left[len(left) // batch * batch :]


def _schedule(done: float) -> float:
    """Of the learning rate: a short rise, then half a cosine."""
    return min(1.0, max(done, 1e-3) / WARMUP) * (1 + math.cos(math.pi * done)) / 2


def _gaussian(
    network: Network, work: Training, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Class means of the features and the inverse of their pooled, shrunk covariance."""
    rows = np.flatnonzero(labels != UNLABELLED)
    parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    found = np.concatenate([_apply(network, network.features, work.plain(part)) for part in parts])
    truth = labels[rows]
    means = np.stack([found[truth == k].mean(0) for k in range(len(work.classes))])
    return means, LedoitWolf().fit(found - means[truth]).precision_
