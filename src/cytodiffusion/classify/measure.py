"""Measure cells in full batches, each cell for no longer than it needs.

A pool of cells is in flight. In every round each of them runs its next trial, for the classes that
are still in; a cell that its policy calls done leaves, and the next one takes its place:

    waiting cells -> pool -> rows (cell, labels) -> batches of one size -> errors -> policy -> done

All batches have the same number of rows, the last of a round filled up with copies. So what is
computed for a cell does not depend, to the bit, on the cells that happen to be beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from queue import Empty, Queue
from threading import Lock, Thread
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cytodiffusion.classify.draws import Draws
from cytodiffusion.classify.evidence import LookingMeter, Meter, features_of
from cytodiffusion.types import PIXELS, Space

T = TypeVar("T")
Pose = Callable[[Tensor], Tensor]
Policy = Callable[[Float[np.ndarray, "n t k1"], Float[np.ndarray, "n f"]], Bool[np.ndarray, "n k"]]

BATCH = 16  # rows a pass
POOL = 4  # batches of cells in flight


class Done(NamedTuple):
    """What was measured of one cell."""

    place: int  # among the sources
    errors: Float[np.ndarray, "t k"]
    features: Float[np.ndarray, " f"]


@dataclass
class Cell:
    """One cell in the pool: what has been measured of it, and which labels are still in."""

    index: int
    image: Float[Tensor, "c h w"]  # in the space where noise is added, or before it (`anew`)
    digest: str
    errors: Float[np.ndarray, "t k"]  # NaN: not computed
    features: Float[np.ndarray, " f"]  # of its first trial; none where the meter tells none
    alive: Bool[np.ndarray, " k"]
    trials: int = 0

    @property
    def done(self) -> bool:
        """Whether one class is left, or the trials are used up."""
        return self.trials == len(self.errors) or int(self.alive[:-1].sum()) <= 1


class Waiting(Generic[T]):
    """Sources that no thread has taken yet, numbered."""

    def __init__(self, sources: Iterable[T]) -> None:
        self._left, self._lock = enumerate(sources), Lock()
        self.closed = False

    def next(self) -> tuple[int, T] | None:
        """The next one; None when there are no more, or nobody listens any more."""
        with self._lock:
            return None if self.closed else next(self._left, None)


@dataclass(frozen=True)
class Measurement:
    """How cells are measured. `columns` labels: the classes, then "any cell".

    After each trial `policy` is shown the errors so far, all columns, and the features of the first
    trial, and says which classes are still in; what has left stays NaN from then on, and a cell with
    fewer than two classes in is done. `together` says that all labels come from one pass, so that a cell
    is computed whole; otherwise every living (cell, label) pair is a pass of its own, and "any cell",
    which is only compared with all classes, leaves with the first of them. Both give the same. `space` is
    where noise is added. With `shared`, all labels of a cell are asked for in one call as long as all are
    in, so that a network can share work between them; at most `most` threads measure at a time. A cell is
    encoded once and its latents are posed; with `anew`, the cell itself is posed, and encoded in every
    trial.
    """

    draws: Draws
    columns: int
    poses: tuple[Pose, ...]
    policy: Policy | None = None
    together: bool = True
    anyone: bool = True  # whether "any cell" is measured
    batch: int = BATCH
    space: Space = PIXELS
    shared: bool = False
    most: int | None = None
    anew: bool = False

    def stream(
        self,
        meter: Meter,
        sources: Iterable[T],
        prepare: Callable[[T], tuple[Tensor, str] | None],
        workers: int = 1,
    ) -> Iterator[Done]:
        """Each cell's place in `sources`, errors and features, in the order in which they are done.

        `prepare` makes (image, digest) of a source; where it makes None, the source is passed over.
        Each of `workers` threads prepares and measures cells of its own.
        """
        waiting, workers = Waiting(sources), min(workers, self.most or workers)
        if workers == 1:
            yield from self._run(meter, waiting, prepare)
            return
        done: Queue[Done | BaseException | None] = Queue(POOL * self.batch)

        def work() -> None:
            try:
                for cell in self._run(meter, waiting, prepare):
                    done.put(cell)
                done.put(None)
            except BaseException as error:  # raised again by the caller's thread
                done.put(error)

        threads = [Thread(target=work, daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        try:
            while workers:
                cell = done.get()
                if isinstance(cell, BaseException):
                    raise cell
                if cell is None:
                    workers -= 1
                else:
                    yield cell
        finally:
            waiting.closed = True  # threads leave their cells after the round they are in
            while any(thread.is_alive() for thread in threads):
                with suppress(Empty):
                    done.get(timeout=0.05)

    def _run(
        self, meter: Meter, waiting: Waiting[T], prepare: Callable[[T], tuple[Tensor, str] | None]
    ) -> Iterator[Done]:
        """One thread's share: keep the pool full, run a trial, let go of what is done."""
        pool = list[Cell]()
        while True:
            while len(pool) < POOL * self.batch and (item := waiting.next()) is not None:
                cell = prepare(item[1])
                if cell is not None:
                    pool.append(self._enter(item[0], *cell, features_of(meter)))
            if not pool or waiting.closed:
                return
            self._run_trial(meter, pool)
            self._decide(pool)
            yield from (Done(c.index, c.errors, c.features) for c in pool if c.done)
            pool = [cell for cell in pool if not cell.done]

    def _enter(self, index: int, image: Tensor, digest: str, features: int) -> Cell:
        errors = np.full((len(self.draws), self.columns), np.nan, dtype=np.float32)
        alive = np.ones(self.columns, dtype=bool)
        alive[-1] = self.anyone
        if not self.anew:
            with torch.inference_mode():
                image = self.space.encode(image[None])[0]
        return Cell(index, image, digest, errors, np.zeros(features, np.float32), alive)

    @torch.inference_mode()
    def _run_trial(self, meter: Meter, pool: list[Cell]) -> None:
        """The next trial of every cell in the pool."""
        pool.sort(key=lambda cell: cell.trials)
        groups = [(t, list(cells)) for t, cells in groupby(pool, key=lambda cell: cell.trials)]
        clean = torch.cat([self._posed(t, cells) for t, cells in groups])
        noise = torch.cat([self._noise(t, cells) for t, cells in groups]).to(clean)
        sigma = torch.tensor([self.draws.trials[cell.trials].sigma for cell in pool]).to(clean)
        for some, asked, size in self._calls(np.stack([cell.alive for cell in pool])):
            filled = torch.from_numpy(np.resize(some, size)).to(clean.device)
            wanted = torch.from_numpy(np.resize(asked, (size, asked.shape[1])))
            rows = clean[filled], noise[filled], sigma[filled], wanted.to(clean.device)
            found, features = _look(meter, *rows)
            for row, label, error, seen in zip(some, asked, found, features, strict=False):
                pool[row].errors[pool[row].trials, label] = error
                if pool[row].trials == 0:
                    pool[row].features = seen
        for cell in pool:
            cell.errors[cell.trials, ~cell.alive] = np.nan
            cell.trials += 1

    def _posed(self, trial: int, cells: list[Cell]) -> Float[Tensor, "n c h w"]:
        posed = self.poses[self.draws.trials[trial].pose](torch.stack([c.image for c in cells]))
        return self.space.encode(posed) if self.anew else posed

    def _noise(self, trial: int, cells: list[Cell]) -> Float[Tensor, "n c h w"]:
        shape = tuple(cells[0].image.shape)
        shape = self.space.shape(shape[-1]) if self.anew else shape
        return self.draws.noise(trial, [cell.digest for cell in cells], shape)

    def _calls(
        self, alive: Bool[np.ndarray, "n k"]
    ) -> Iterator[tuple[Int[np.ndarray, " p"], Int[np.ndarray, "p j"], int]]:
        """The calls of the meter in a round: cells, the labels of each, and the size to fill up to."""
        if self.together:
            every = np.arange(self.columns)
            yield from _batches(np.arange(len(alive)), np.tile(every, (len(alive), 1)), self.batch)
            return
        whole = np.logical_and(alive[:, :-1].all(1), self.shared)
        if whole.any():
            rows = np.flatnonzero(whole)
            labels = np.nonzero(alive[rows])[1].reshape(len(rows), -1)
            yield from _batches(rows, labels, max(1, self.batch // labels.shape[1]))
        row, label = np.nonzero(alive & ~whole[:, None])
        yield from _batches(row, label[:, None], self.batch)

    def _decide(self, pool: list[Cell]) -> None:
        """Ask the policy about the cells that have run as many trials as each other."""
        if self.policy is None:
            return
        for trials, group in groupby(pool, key=lambda cell: cell.trials):
            cells = list(group)
            errors = np.stack([cell.errors[:trials] for cell in cells])
            still = self.policy(errors, np.stack([cell.features for cell in cells]))
            for cell, stays in zip(cells, still, strict=True):
                cell.alive[:-1] &= stays
                cell.alive[-1] &= self.together or bool(cell.alive[:-1].all())

    def measure(
        self, meter: Meter, images: Float[Tensor, "n c h w"], digests: list[str]
    ) -> Float[np.ndarray, "n t k"]:
        """Errors of all these images, in their order."""
        return self.look(meter, images, digests)[0]

    def look(
        self, meter: Meter, images: Float[Tensor, "n c h w"], digests: list[str]
    ) -> tuple[Float[np.ndarray, "n t k"], Float[np.ndarray, "n f"]]:
        """Errors and features of all these images, in their order."""
        errors, features = self.nothing(meter, len(images))
        for i, *found in self.stream(meter, zip(images, digests, strict=True), lambda cell: cell):
            errors[i], features[i] = found
        return errors, features

    def follow(
        self,
        meter: Meter,
        count: int,
        prepare: Callable[[int], tuple[Tensor, str]],
        workers: int = 1,
        before: int = 0,
    ) -> Generator[int, None, tuple[Float[np.ndarray, "n t k"], Float[np.ndarray, "n f"]]]:
        """Yield how many cells are done, and `before`; returns errors and features, in their order.

        `prepare` makes (image, digest) of a place, 0 to `count` - 1.
        """
        errors, features = self.nothing(meter, count)
        cells = self.stream(meter, range(count), prepare, workers)
        for done, (place, *found) in enumerate(cells, start=before + 1):
            errors[place], features[place] = found
            yield done
        return errors, features

    def nothing(
        self, meter: Meter, count: int
    ) -> tuple[Float[np.ndarray, "n t k"], Float[np.ndarray, "n f"]]:
        """Errors and features of so many cells, to be filled in."""
        errors = np.full((count, len(self.draws), self.columns), np.nan, dtype=np.float32)
        return errors, np.zeros((count, features_of(meter)), dtype=np.float32)


def _look(
    meter: Meter, clean: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor
) -> tuple[Float[np.ndarray, "n k"], Float[np.ndarray, "n f"]]:
    """What a meter tells of a batch: errors, and features where it tells any."""
    if isinstance(meter, LookingMeter) and meter.features:
        errors, features = meter.look(clean, noise, sigma, labels)
        return errors.float().cpu().numpy(), features.float().cpu().numpy()
    errors = meter(clean, noise, sigma, labels)
    return errors.float().cpu().numpy(), np.zeros((len(errors), 0), dtype=np.float32)


def _batches(
    rows: Int[np.ndarray, " p"], labels: Int[np.ndarray, "p j"], size: int
) -> Iterator[tuple[Int[np.ndarray, " q"], Int[np.ndarray, "q j"], int]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size], labels[start : start + size], size
