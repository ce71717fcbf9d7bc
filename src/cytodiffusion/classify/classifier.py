"""Name cells: measure their errors, then read the answer off the table.

    images -> measure -> ErrorTable -> read -> probabilities, conformal set, anomaly, flag

A budget says how many trials a cell gets. `fast`, `balanced` and `full` are prefixes of one list of
trials, read with the weights fitted for that prefix; `paper` is the paper's race, read with its
relative errors and one temperature. Reading needs no network: a saved table gives the same answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.special import softmax
from torch import Tensor

from cytodiffusion.classify.anomaly import AnomalyModel
from cytodiffusion.classify.calibrate import PrefixPosterior
from cytodiffusion.classify.conformal import lac_sets, lac_threshold
from cytodiffusion.classify.draws import Draws
from cytodiffusion.classify.evidence import Policy, Pose, measure
from cytodiffusion.classify.race import last_standing, zeta
from cytodiffusion.errors import SettingsError
from cytodiffusion.types import Answer, Classes, Denoiser, ErrorTable

ALARM = 0.01  # share of normal cells that may be called anomalous
COVERAGE = 0.95  # of the conformal sets


@runtime_checkable
class Reader(Protocol):
    """Reads probabilities and strangeness off measured errors."""

    def probabilities(self, errors: np.ndarray) -> Float[np.ndarray, "n k"]: ...

    def anomaly(self, errors: np.ndarray, probabilities: np.ndarray) -> Float[np.ndarray, " n"]: ...

    def p_value(self, anomaly: np.ndarray) -> Float[np.ndarray, " n"]: ...


@dataclass(frozen=True)
class PrefixReader:
    """Reads a fixed number of trials with fitted weights."""

    posterior: PrefixPosterior
    anomalies: AnomalyModel

    def probabilities(self, errors: np.ndarray) -> Float[np.ndarray, "n k"]:
        """p_n(k | x) of calibrate.py."""
        return self.posterior.probabilities(errors[:, :, :-1])

    def anomaly(self, errors: np.ndarray, probabilities: np.ndarray) -> Float[np.ndarray, " n"]:
        """0 to 1, higher is stranger."""
        used = errors[:, : len(self.posterior.weight)]
        return self.anomalies.anomaly(used, probabilities)

    def p_value(self, anomaly: np.ndarray) -> Float[np.ndarray, " n"]:
        """Share of held-out cells at least as strange."""
        return self.anomalies.p_value(anomaly)


@dataclass(frozen=True)
class RaceReader:
    """Reads the paper's race: relative errors E_c with one temperature, strangeness by zeta."""

    sigmas: np.ndarray
    temperature: float
    scores: np.ndarray  # anomaly of held-out cells, rising

    def probabilities(self, errors: np.ndarray) -> Float[np.ndarray, "n k"]:
        """softmax(-E_c / temperature); a class that left the race ranks behind those that did not."""
        scores = last_standing(errors[:, :, :-1], self.sigmas[: errors.shape[1]])
        return softmax(-scores / self.temperature, axis=1)

    def anomaly(self, errors: np.ndarray, probabilities: np.ndarray) -> Float[np.ndarray, " n"]:
        """1 / (1 + exp(zeta)): the paper's score, turned so that higher is stranger."""
        return 1 / (1 + np.exp(zeta(errors[:, :, :-1], self.sigmas[: errors.shape[1]])))

    def p_value(self, anomaly: np.ndarray) -> Float[np.ndarray, " n"]:
        """Share of held-out cells at least as strange."""
        at_least = len(self.scores) - np.searchsorted(self.scores, anomaly)
        return (1 + at_least) / (1 + len(self.scores))


@dataclass(frozen=True)
class Budget:
    """How cells are measured, and how the errors are read."""

    draws: Draws
    reader: Reader
    conformal: Float[np.ndarray, " n"]  # 1 - p(true class) of held-out cells
    policy: Policy | None = None


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

    def restrict(self, names: Sequence[str]) -> Reading:
        """The same reading with only these classes to answer with; probabilities are rescaled.

        Raises LabelError for a class that the model does not know.
        """
        chosen = [self.classes.index(name) for name in names]
        kept = self.probabilities[:, chosen].clip(1e-300)
        return replace(
            self,
            classes=Classes(tuple(names)),
            probabilities=kept / kept.sum(1, keepdims=True),
            sets=self.sets[:, chosen],
        )

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
    ) -> None:
        self.denoiser, self.classes, self.budgets = denoiser, classes, budgets
        self.poses, self.together, self.name, self.device = poses, together, name, device

    def budget(self, name: str) -> Budget:
        """Raises SettingsError, naming the budgets there are."""
        if name not in self.budgets:
            known = ", ".join(self.budgets)
            raise SettingsError(f"This model has no budget '{name}'. It has: {known}.")
        return self.budgets[name]

    def measure(
        self,
        images: Float[Tensor, "n c h w"] | np.ndarray,
        digests: Sequence[str] | None = None,
        budget: str = "balanced",
    ) -> ErrorTable:
        """Errors of every class in every trial. `digests` default to those of the pixels."""
        chosen = self.budget(budget)
        tensor = torch.as_tensor(images, dtype=torch.float32)
        names = list(digests) if digests is not None else [digest(image) for image in tensor]
        errors = measure(
            self.denoiser, tensor.to(self.device), names, chosen.draws, len(self.classes) + 1,
            poses=self.poses, policy=chosen.policy, together=self.together,
            anyone=chosen.policy is None,
        )  # fmt: skip
        sigmas, seed = chosen.draws.sigmas, chosen.draws.seed
        return ErrorTable(errors, sigmas, tuple(names), self.classes, seed, self.name)

    def read(
        self, table: ErrorTable, budget: str = "balanced", coverage: float = COVERAGE
    ) -> Reading:
        """Answers from a measured, or saved and loaded, table."""
        chosen, errors = self.budget(budget), table.errors
        ran = ~np.isnan(errors)
        probabilities = chosen.reader.probabilities(errors)
        anomaly = chosen.reader.anomaly(errors, probabilities)
        trials = ran.any(2).sum(1)
        return Reading(
            classes=self.classes,
            probabilities=probabilities,
            sets=lac_sets(probabilities, lac_threshold(chosen.conformal, coverage)),
            anomaly=anomaly,
            anomaly_p=chosen.reader.p_value(anomaly),
            trials=trials,
            passes=(trials if self.together else ran.sum((1, 2))).astype(float),
        )

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
