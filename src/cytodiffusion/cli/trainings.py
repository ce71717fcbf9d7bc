"""Many short trainings: as many at a time as there are cores, and none of them twice.

A training is a job of its own, on one core. What it says of the cells of the test is kept in a file whose
name is a digest of all that decides it; its weights are not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np

    from cytodiffusion.data.images import Preprocess
    from cytodiffusion.data.pixels import Pixels
    from cytodiffusion.data.transforms import Augmentation
    from cytodiffusion.evaluate.baselines import BaselineSettings

J = TypeVar("J")  # a job
TUNED = (1e-4, 3e-4, 1e-3)  # learning rates that a trained baseline chooses from when it goes on


@dataclass(frozen=True)
class Told:
    """What a training says of the cells of the test, and what it took."""

    probabilities: np.ndarray  # (n, k)
    seconds: float
    steps: int


def kept(path: Path, train: Callable[[], Told]) -> Told:
    """Train and test, or read where that was done before. Raises OutputError."""
    import numpy as np
    import torch

    from cytodiffusion.files import write_arrays

    if path.exists():
        with np.load(path) as found:
            return Told(found["probabilities"], float(found["seconds"]), int(found["steps"]))
    torch.set_num_threads(1)  # the most work in a minute of the processor
    told = train()
    write_arrays(path, **vars(told))
    return told


def told_by_baseline(
    canvases: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], preprocess: Preprocess,
    augmentation: Augmentation, settings: BaselineSettings, test: Pixels, device: str,
) -> Told:  # fmt: skip
    """Train a baseline on canvases (n, 3, s, s) and ask it for the cells of the test."""
    from cytodiffusion.data.images import to_tensor
    from cytodiffusion.evaluate.baselines import train_baseline

    fitting = train_baseline(
        canvases, labels, classes, preprocess, augmentation, settings, device=device
    )
    while True:
        try:
            next(fitting)
        except StopIteration as end:
            found = end.value
            break
    told = found.predict_proba(to_tensor(test.images))
    return Told(told, found.trained["seconds"], found.trained["steps"])


def finished(
    work: Callable[[J], Told], jobs: Sequence[J], workers: int
) -> Iterator[tuple[J, Told]]:
    """Each job when it is done, `workers` at a time, each in a process of its own.

    `work` is sent to every process once. Raises SettingsError where the system ends one of them.
    """
    if workers == 1:
        for job in jobs:
            yield job, work(job)
        return
    from multiprocessing import get_context

    from cytodiffusion.errors import SettingsError

    context = get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(work,))
    try:
        waiting = {pool.submit(_work, job): job for job in jobs}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    except BrokenProcessPool as error:
        raise SettingsError(
            "The system ended a training, as it does where memory runs out. What is finished is kept; "
            f"try fewer than {workers} --jobs."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_works = list[Callable[[Any], Told]]()  # of this process: one, sent when it begins


def _begin(work: Callable[[Any], Told]) -> None:
    """Take the work, and leave with the process that sent it, however that ends."""
    from multiprocessing import parent_process

    def follow() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    _works.append(work)
    Thread(target=follow, daemon=True).start()


def _work(job: Any) -> Told:
    return _works[0](job)
