"""The training loop: a generator that can be stopped anywhere and goes on as if it had not been.

    batch -> augment -> add noise -> guess -> loss -> step -> running mean

Every random number of step s comes from (seed, s) alone, so a run that was cut ends with the same
weights as one that was not. A batch is drawn as a whole and shared out, so several processes train
on the same images as one does.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from cytodiffusion.diffusion.loss import Losses
from cytodiffusion.diffusion.precondition import NetworkDenoiser
from cytodiffusion.errors import SettingsError
from cytodiffusion.files import whole
from cytodiffusion.train.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    save_checkpoint,
)
from cytodiffusion.train.ema import EMA
from cytodiffusion.train.learner import Batch, check_names, learned, make_learner
from cytodiffusion.train.settings import TrainSettings, dump_settings, load_settings

WAIT = timedelta(hours=24)
Validate = Callable[[NetworkDenoiser], dict[str, float]]


@dataclass(frozen=True)
class TrainingSet:
    """Canvases (see `Preprocess.canvas`) and class indices; UNLABELLED (-1) where not known."""

    canvases: UInt8[np.ndarray, "n 3 s s"]
    labels: Int[np.ndarray, " n"]
    classes: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """A digest of the images and their labels, in their order."""
        digest = hashlib.sha256(np.ascontiguousarray(self.canvases).data)
        digest.update(np.ascontiguousarray(self.labels, dtype=np.int64).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Progress:
    """What happened since the last report."""

    step: int
    steps: int
    seconds: float  # spent training by this process since the last report
    images: int  # trained on since the last report
    losses: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] | None = None


class Run:
    """Weights, optimiser, running mean and step of one training run, and its folder."""

    def __init__(
        self, folder: Path, settings: TrainSettings, data: TrainingSet, device: str = "auto",
        start: Mapping[str, Tensor] | None = None,
    ):  # fmt: skip
        """`start`: weights to begin with, by name; those that do not fit this network begin anew."""
        self.folder, self.settings, self.data = folder, settings, data
        self.data_sha256 = data.sha256
        self.accelerator = _accelerator(settings, device)
        torch.manual_seed(settings.seed)
        self.learner = make_learner(settings, len(data.classes))
        self.begun = take_fitting(self.learner, start) if start else 0  # weights that were taken
        self.learner.place(self.accelerator.device)
        self.images = _near(data, self.accelerator.device, small=settings.latent is None)
        self.ema = EMA(self.learner, settings.ema)
        self.optimizer = self.learner.optimizer(settings)
        self.step = 0
        self.best: dict[str, Tensor] = {}
        self.best_score = float("inf")
        if self.accelerator.is_main_process:
            self._check()
        self.accelerator.wait_for_everyone()
        self._resume()
        if self.accelerator.is_main_process:
            self._claim()
        self.model, self.optimizer = self.accelerator.prepare(self.learner, self.optimizer)

    def _check(self) -> None:
        """Raises SettingsError where what is there was trained with other settings."""
        path = self.folder / "settings.yaml"
        trained = latest_checkpoint(self.folder / "checkpoint") is not None
        if path.exists() and (trained or (self.folder / "bundle").exists()):
            begun = load_settings(path).model_copy(update={"steps": self.settings.steps})
            if begun != self.settings:
                raise SettingsError(
                    f"{self.folder} was begun with other settings (see settings.yaml there). Give "
                    "the same ones to go on, or another folder to start anew."
                )

    def _claim(self) -> None:
        """Write the settings, once nothing speaks against going on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole(self.folder / "settings.yaml") as part:
            part.write_text(dump_settings(self.settings))

    def _names(self) -> list[str]:
        return [name for name, weight in self.learner.named_parameters() if weight.requires_grad]

    def _resume(self) -> None:
        path = latest_checkpoint(self.folder / "checkpoint")
        if path is None:
            return
        tensors, state = load_checkpoint(path)
        if state["classes"] != list(self.data.classes):
            raise SettingsError(
                f"{self.folder} was begun with the classes {', '.join(state['classes'])}. Give images "
                "of the same classes to go on, or another folder to start anew."
            )
        if state.get("data_sha256", self.data_sha256) != self.data_sha256:
            raise SettingsError(
                f"{self.folder} was begun with other images or labels. Give the same ones to go on, or "
                "another folder to start anew."
            )
        check_names(tensors["model"], learned(self.learner), f"The weights in {path}")
        self.learner.load_state_dict(tensors["model"], strict=False)  # what is frozen is not saved
        self.ema.load_state_dict(tensors["ema"])
        load_optimizer(self.optimizer, self._names(), tensors["optimizer"])
        self.best, self.best_score = tensors.get("best", {}), state["best_score"]
        if self.accelerator.scaler is not None:  # of float16, whose gradients are scaled
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        if self.step > self.settings.steps:
            raise SettingsError(
                f"{self.folder} has done {self.step:,} steps; fewer cannot be asked for. Give at least so "
                "many, or another folder to start anew."
            )

    def save(self) -> None:
        """Write a checkpoint (main process only)."""
        if not self.accelerator.is_main_process:
            return
        tensors = {
            "model": learned(self.learner),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self._names()),
        }
        if self.best:
            tensors["best"] = self.best
        state = {
            "best_score": self.best_score,
            "classes": self.data.classes,
            "data_sha256": self.data_sha256,
        }
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        save_checkpoint(self.folder / "checkpoint", self.step, tensors, state)

    def close(self) -> None:
        """Part from the other processes, if any; what this run does from now on, it does alone.

        A process that ends with threads that listen to the others is at times aborted by PyTorch.
        """
        self.model = self.learner  # what `prepare` wrapped around it holds on to the others
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def denoiser(self, which: str = "ema") -> NetworkDenoiser:
        """A `Denoiser` for use: 'raw' weights, their running mean 'ema', or the 'best' on validation."""
        weights = {"raw": learned(self.learner), "ema": self.ema.mean, "best": self.best}[which]
        return self.learner.usable(weights)

    def consider(self, scores: dict[str, float]) -> None:
        """Keep the running mean as the best so far if its validation NLL is the lowest."""
        if scores["nll"] < self.best_score:
            self.best_score = scores["nll"]
            self.best = {name: value.clone() for name, value in self.ema.mean.items()}


def take_fitting(learner: nn.Module, start: Mapping[str, Tensor]) -> int:
    """Load the weights whose name and shape fit; returns how many of the numbers those are.

    Raises SettingsError where they are less than half of the network: it is another one.
    """
    own = learned(learner)
    fitting = {n: v.float() for n, v in start.items() if n in own and own[n].shape == v.shape}
    taken, needed = (sum(v.numel() for v in each.values()) for each in (fitting, own))
    if 2 * taken < needed:
        raise SettingsError(
            f"Only {taken:,} of the {needed:,} weights of this network can begin with those given. Give "
            "a run with the same network settings, or train anew without --from."
        )
    learner.load_state_dict(own | fitting, strict=False)
    return taken


def _accelerator(settings: TrainSettings, device: str) -> Accelerator:
    """Devices and processes. Raises SettingsError where the settings do not fit them."""
    # If it is first imported once there are other processes, its defaults keep them, and `close` cannot.
    if torch.distributed.is_available():
        import_module("torch.distributed.nn.functional")
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # accelerate takes the current one
    unasked = device == "auto" and not torch.cuda.is_available()  # as elsewhere, not MPS
    try:
        patient = InitProcessGroupKwargs(timeout=WAIT)  # processes wait while one encodes or judges
        accelerator = Accelerator(
            mixed_precision=settings.precision,
            cpu=device == "cpu" or unasked,
            kwargs_handlers=[patient],
        )
    except ValueError as error:
        raise SettingsError(
            f"This device cannot train with precision '{settings.precision}' ({error}). Try "
            "--set precision=no."
        ) from error
    shares = settings.accumulate * accelerator.num_processes
    if settings.batch % shares:
        raise SettingsError(
            f"A batch of {settings.batch} cannot be shared out evenly over "
            f"{accelerator.num_processes} processes in {settings.accumulate} parts; try "
            f"batch={shares * max(1, settings.batch // shares)}."
        )
    return accelerator


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, constant, linear fall to zero over the last share of the run.

    A run that had ended, and is given more steps, goes on at the full rate.
    """
    rise = min(1.0, (step + 1) / max(1, settings.warmup))
    falling = max(1.0, settings.cooldown * settings.steps)
    return settings.learning_rate * min(rise, (settings.steps - step) / falling, 1.0)


def train(run: Run, *, report_every: int = 50, validate: Validate | None = None,
          validate_every: int = 1000) -> Iterator[Progress]:  # fmt: skip
    """Train until the settings' steps are done, reporting now and then."""
    settings = run.settings
    began = saved = time.monotonic()
    sums: dict[str, Tensor] = {}  # read when a report is due: reading waits for the device
    count = 0  # steps of this process since the last report
    run.model.train()
    while run.step < settings.steps:
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.step, settings)
        for name, value in _optimise(run).items():
            sums[name] = sums[name] + value if name in sums else value
        run.ema.update(run.learner, run.step)
        run.step += 1
        count += 1

        last = run.step == settings.steps
        if run.step % report_every == 0 or last:
            means = {name: value.item() / count for name, value in sums.items()}
            if not math.isfinite(means["total"]):
                _refuse_no_numbers(run)
            spent, began = time.monotonic() - began, time.monotonic()
            scores = None
            # From the step alone, so that a run that was cut is judged where one that was not is.
            passed = run.step // validate_every > (run.step - report_every) // validate_every
            if validate is not None and (passed or last):
                scores = validate(run.denoiser("ema"))
                run.consider(scores)
                began = time.monotonic()
            yield Progress(run.step, settings.steps, spent, count * settings.batch, means, scores)
            sums, count = {}, 0
        if last or time.monotonic() - saved > 60 * settings.checkpoint_minutes:
            run.save()
            saved = time.monotonic()


def _refuse_no_numbers(run: Run) -> None:
    """Raises SettingsError where a weight is infinite or no number: it never is one again."""
    if not all(weight.isfinite().all() for weight in run.learner.parameters()):
        raise SettingsError(
            f"The weights are no numbers any more at step {run.step}: training has run away. Choose "
            f"another folder and a learning rate below {run.settings.learning_rate:g}: "
            "--set learning_rate=..."
        )


def _optimise(run: Run) -> dict[str, Tensor]:
    """One optimiser step; returns this process's mean losses."""
    settings, accelerator = run.settings, run.accelerator
    torch.manual_seed(mix(settings.seed, run.step, accelerator.process_index))  # dropout
    parts = [part[accelerator.process_index :: accelerator.num_processes].chunk(settings.accumulate)
             for part in _draw(run)]  # fmt: skip
    sums = dict.fromkeys(Losses._fields, torch.zeros((), device=accelerator.device))
    for index, part in enumerate(zip(*parts, strict=True)):
        final = index == len(parts[0]) - 1
        with accelerator.autocast(), _syncing(run, final):
            losses = run.model(*part)
            accelerator.backward(losses.total / len(parts[0]))
        for name, value in losses._asdict().items():
            sums[name] = sums[name] + value.detach() / len(parts[0])
    accelerator.clip_grad_norm_(run.model.parameters(), settings.clip)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return sums


def _syncing(run: Run, final: bool):  # type: ignore[no-untyped-def]
    """Gradients are averaged over processes once, with the last part of a batch."""
    return torch.enable_grad() if final else run.accelerator.no_sync(run.model)


def _draw(run: Run) -> tuple[Tensor, ...]:
    """The whole batch of this step, as the learner takes it."""
    device, rows = run.accelerator.device, batch_indices(run.data, run.settings, run.step)
    generator = torch.Generator(device).manual_seed(mix(run.settings.seed, run.step))
    canvases, labels = (
        each[torch.from_numpy(rows).to(each.device)].to(device) for each in run.images
    )
    return run.learner.draw(Batch(rows, canvases, labels), generator)


def _near(data: TrainingSet, device: torch.device, small: bool) -> tuple[Tensor, Tensor]:
    """Canvases and labels; for a small network in a GPU's memory, if a quarter of what is free will do."""
    images, labels = torch.from_numpy(data.canvases), torch.from_numpy(data.labels)
    if small and device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        return images.to(device), labels.to(device)
    return images, labels


def batch_indices(data: TrainingSet, settings: TrainSettings, step: int) -> Int[np.ndarray, " b"]:
    """Which images make up the batch of a step: every epoch is one shuffled, balanced pass."""
    steps_an_epoch = max(1, len(data.labels) // settings.batch)
    epoch, place = divmod(step, steps_an_epoch)
    order = _epoch(
        data.labels.astype(np.int64).tobytes(), settings.balance, mix(settings.seed, epoch, 1)
    )
    return np.take(order, range(place * settings.batch, (place + 1) * settings.batch), mode="wrap")


@lru_cache(maxsize=1)
def _epoch(labels: bytes, balance: float, seed: int) -> Int[np.ndarray, " n"]:
    """Indices of an epoch: class c comes up in proportion to count_c^(1 - balance)."""
    every = np.frombuffer(labels, dtype=np.int64)
    rng = np.random.default_rng(seed)
    _, inverse, counts = np.unique(every, return_inverse=True, return_counts=True)
    share = counts ** (1.0 - balance)
    copies = (len(every) * share / share.sum() / counts)[inverse]
    times = np.floor(copies + rng.random(len(every))).astype(int)
    return rng.permutation(np.repeat(np.arange(len(every)), times))


def mix(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(
        np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0]
        >> np.uint64(1)
    )
