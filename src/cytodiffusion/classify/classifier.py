"""Name cells: measure their errors, then read the answer off the table.

    images -> measure -> ErrorTable -> read -> probabilities, conformal set, anomaly, flag

A budget says how many trials a cell gets. `fast`, `balanced` and `full` run one list of trials and
stop when more of them would not change the answer (sequential.py): `full` never does so early, and
`balanced` not where a cell looks strange.
Each of them has a twin for frames of another laboratory, `balanced-abroad` say.
`paper` is the paper's race and `race` one with a bound, both read with the paper's relative errors
and one temperature. Reading needs no network: a saved table gives the same answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.special import softmax
from torch import Tensor

from cytodiffusion.classify.calibrate import HeldOut, change_prior
from cytodiffusion.classify.conformal import Sets, lac_sets, thresholds
from cytodiffusion.classify.draws import Draws
from cytodiffusion.classify.evidence import DenoiserMeter, Meter
from cytodiffusion.classify.measure import BATCH, Measurement, Policy, Pose
from cytodiffusion.classify.race import last_standing, zeta
from cytodiffusion.classify.sequential import Agreement
from cytodiffusion.errors import SettingsError
from cytodiffusion.types import PIXELS, Answer, Classes, Denoiser, ErrorTable, Space

ALARM = 0.01  # share of normal cells that may be called anomalous
COVERAGE = 0.95  # of the conformal sets
ABROAD = "-abroad"  # ends the name of a budget for cells of another laboratory (fit.py)
GPU_BATCH = 256  # rows a pass where there is a GPU


@runtime_checkable
class Reader(Protocol):
    """Reads probabilities and strangeness off measured errors."""

    def probabilities(self, errors: np.ndarray) -> Float[np.ndarray, "n k"]: ...

    def anomaly(
        self, errors: np.ndarray, features: np.ndarray | None = None
    ) -> Float[np.ndarray, " n"]: ...


@dataclass(frozen=True)
class RaceReader:
    """Reads a race: the paper's relative errors E_c with one temperature, strangeness by zeta."""

    weights: np.ndarray  # of the trials
    temperature: float

    def probabilities(self, errors: np.ndarray) -> Float[np.ndarray, "n k"]:
        """softmax(-E_c / temperature); a class that left the race ranks behind those that did not."""
        scores = last_standing(errors[:, :, :-1], self.weights[: errors.shape[1]])
        return softmax(-scores / self.temperature, axis=1)

    def anomaly(
        self, errors: np.ndarray, features: np.ndarray | None = None
    ) -> Float[np.ndarray, " n"]:
        """1 / (1 + exp(zeta)): the paper's score, turned so that higher is stranger."""
        return 1 / (1 + np.exp(zeta(errors[:, :, :-1], self.weights[: errors.shape[1]])))


@dataclass(frozen=True)
class Budget:
    """How cells are measured, and how the errors are read."""

    draws: Draws
    reader: Reader
    held: HeldOut
    policy: Policy | None = None
    agreement: Agreement | None = None  # with the answer of all trials, where it may stop early


@dataclass(frozen=True)
class Reading:
    """Answers for many cells, as arrays; `answers` gives them one by one."""

    classes: Classes
    probabilities: Float[np.ndarray, "n k"]
    sets: Bool[np.ndarray, "n k"]
    anomaly: Float[np.ndarray, " n"]
    anomaly_p: Float[np.ndarray, " n"]
    trials: Int[np.ndarray, " n"]
    passes: Float[np.ndarray, " n"]

    @property
    def predicted(self) -> np.ndarray:
        """Index of the most probable class."""
        return self.probabilities.argmax(1)

    @property
    def flags(self) -> list[str]:
        """'anomalous' (stranger than 99 % of normal cells), 'uncertain' (no single class), or 'ok'."""
        single = self.sets.sum(1) == 1
        return [
            "anomalous" if p <= ALARM else "ok" if alone else "uncertain"
            for p, alone in zip(self.anomaly_p, single, strict=True)
        ]

    def answers(self) -> list[Answer]:
        """One `Answer` for each cell."""
        names = np.array(self.classes.names)
        return [
            Answer(
                predicted=str(names[self.predicted[i]]),
                probabilities=self.probabilities[i],
                conformal_set=tuple(names[self.sets[i]].tolist()),
                anomaly=float(self.anomaly[i]),
                anomaly_p=float(self.anomaly_p[i]),
                flag=flag,
                trials=int(self.trials[i]),
                passes=float(self.passes[i]),
            )
            for i, flag in enumerate(self.flags)
        ]


class Classifier:
    """Names cells by how well each class takes noise away.

    Methods take images (n, 3, h, w) in [-1, 1] at the model's size, and follow scikit-learn's names.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        classes: Classes,
        budgets: dict[str, Budget],
        poses: tuple[Pose, ...],
        *,
        together: bool = True,
        name: str = "",
        device: str | torch.device = "cpu",
        meter: Meter | None = None,
        space: Space = PIXELS,
    ) -> None:
        self.denoiser, self.classes, self.budgets = denoiser, classes, budgets
        self.poses, self.together, self.name, self.device = poses, together, name, device
        self.meter, self.space = meter or DenoiserMeter(denoiser), space

    def budget(self, name: str) -> Budget:
        """Raises SettingsError, naming the budgets there are."""
        if name not in self.budgets:
            known = ", ".join(self.budgets)
            raise SettingsError(f"This model has no budget '{name}'. It has: {known}.")
        return self.budgets[name]

    def abroad(self, budget: str) -> str:
        """Name of a budget's twin for frames of another laboratory; its own where it has none."""
        return budget + ABROAD if budget + ABROAD in self.budgets else budget

    def measurement(self, budget: str = "balanced") -> Measurement:
        """How the cells of a budget are measured."""
        chosen, latent = self.budget(budget), self.space is not PIXELS
        on_cpu = torch.device(self.device).type == "cpu"
        return Measurement(
            chosen.draws, len(self.classes) + 1, self.poses, chosen.policy, self.together,
            anyone=self.together or not isinstance(chosen.reader, RaceReader),
            batch=BATCH if on_cpu or latent else GPU_BATCH, space=self.space, shared=latent,
            most=1 if latent and not on_cpu else None,  # a large network fills a GPU by itself
        )  # fmt: skip

    def measure(
        self,
        images: Float[Tensor, "n c h w"] | np.ndarray,
        digests: Sequence[str] | None = None,
        budget: str = "balanced",
    ) -> ErrorTable:
        """Errors of every class in every trial. `digests` default to those of the pixels."""
        tensor = torch.as_tensor(images, dtype=torch.float32)
        names = list(digests) if digests is not None else [digest(image) for image in tensor]
        found = self.measurement(budget).look(self.meter, tensor.to(self.device), names)
        return self.table(*found, names, budget)

    def table(
        self, errors: np.ndarray, features: np.ndarray, digests: Sequence[str], budget: str
    ) -> ErrorTable:
        """Measured errors and features with what belongs to them."""
        draws = self.budget(budget).draws
        return ErrorTable(
            errors, draws.sigmas, tuple(digests), self.classes, draws.seed, self.name, features
        )

    def read(
        self,
        table: ErrorTable,
        budget: str = "balanced",
        coverage: float = COVERAGE,
        *,
        sets: Sets = "all",
        prior: Float[np.ndarray, " k"] | None = None,
        answers: Sequence[str] | None = None,
    ) -> Reading:
        """Answers from a measured, or saved and loaded, table.

        `prior`: how often each class comes up where the cells are from, any positive numbers;
        without one, as often as among the budget's calibration cells: as in training, or for the
        races and for other laboratories equally often. `answers`: the only classes that can come up.
        When to stop was decided without either. Raises LabelError for a class that the model does not
        know, SettingsError for a prior or a coverage that is none.
        """
        chosen, errors = self.budget(budget), table.errors
        ran = ~np.isnan(errors)
        fitted = chosen.reader.probabilities(errors)
        anomaly = chosen.reader.anomaly(errors, table.features)
        columns = self._columns(answers)
        probabilities = change_prior(fitted, self._ratio(prior, answers, budget))[:, columns]
        limits = self.limits(budget, coverage, sets=sets, prior=prior, answers=answers)
        trials = ran.any(2).sum(1)
        return Reading(
            classes=Classes(tuple(self.classes.names[k] for k in columns)),
            probabilities=probabilities,
            sets=lac_sets(probabilities, limits),
            anomaly=anomaly,
            anomaly_p=chosen.held.p_value(anomaly),
            trials=trials,
            passes=(trials if self.together else ran.sum((1, 2))).astype(float),
        )

    def limits(
        self,
        budget: str = "balanced",
        coverage: float = COVERAGE,
        *,
        sets: Sets = "all",
        prior: Float[np.ndarray, " k"] | None = None,
        answers: Sequence[str] | None = None,
    ) -> Float[np.ndarray, " k"]:
        """Largest 1 - p at which each class, or each of `answers`, still belongs to a conformal set."""
        held, ratio = self.budget(budget).held, self._ratio(prior, answers, budget)
        moved = change_prior(held.probabilities, ratio)
        return thresholds(moved, held.truth, coverage, sets, ratio)[self._columns(answers)]

    def _columns(self, answers: Sequence[str] | None) -> list[int]:
        return [self.classes.index(name) for name in answers or self.classes]

    def _ratio(
        self, prior: Float[np.ndarray, " k"] | None, answers: Sequence[str] | None, budget: str
    ) -> Float[np.ndarray, " k"]:
        """How much more often than in the fit each class comes up; 0 for one that cannot."""
        ratio = np.ones(len(self.classes))
        if prior is not None:
            if not (np.isfinite(prior).all() and (prior > 0).all()):
                raise SettingsError(
                    "A prior needs a positive number for every class; for a class that cannot come "
                    "up, restrict the answers instead."
                )
            ratio = prior / prior.sum() / self.budget(budget).held.prior
        possible = np.zeros(len(self.classes))
        possible[self._columns(answers)] = 1
        return ratio * possible

    def predict(self, images: Tensor | np.ndarray, budget: str = "balanced") -> np.ndarray:
        """Name of the most probable class of each image, (n,)."""
        names = np.array(self.classes.names)
        return names[self.read(self.measure(images, budget=budget), budget).predicted]

    def predict_proba(self, images: Tensor | np.ndarray, budget: str = "balanced") -> np.ndarray:
        """Probability of each class, (n, classes), in the order of `classes`."""
        return self.read(self.measure(images, budget=budget), budget).probabilities

    def anomaly_score(self, images: Tensor | np.ndarray, budget: str = "balanced") -> np.ndarray:
        """How strange each image is, (n,), 0 to 1; higher is stranger."""
        return self.read(self.measure(images, budget=budget), budget).anomaly


def digest(image: Tensor) -> str:
    """sha256 of an image's pixels."""
    return hashlib.sha256(np.ascontiguousarray(image.cpu().numpy()).tobytes()).hexdigest()
