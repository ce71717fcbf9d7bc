"""Everything that decides a training run, as one frozen model.

The field descriptions are the help text; presets are values; `--set a.b=1` overrides one field. A
run folder keeps its settings in settings.yaml, and going on with other settings is refused, except
for `steps`, which may grow: the learning rate is constant until the last part of the run. A run that
had ended goes on at the full rate.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cytodiffusion.data.images import Preprocess
from cytodiffusion.data.transforms import Augmentation
from cytodiffusion.errors import SettingsError
from cytodiffusion.networks.compact import Form


class NetworkSettings(BaseModel):
    """Shape of the network, apart from what the data decide (size and number of classes)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    form: Form = Field("heads", description="a head for each class, or the class as an input")
    unshuffle: int = Field(4, ge=1, description="pixels folded into channels, in each direction")
    width: int = Field(48, ge=8, description="channels of the first level")
    multipliers: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 2, 4), min_length=1, description="channels of each level / width"
    )
    blocks: int = Field(2, ge=1, description="residual blocks a level, down and up")
    attention: int = Field(8, ge=0, description="largest grid side with self-attention")
    head_width: int = Field(32, ge=1, description="hidden channels of each head")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout inside the residual blocks")


class LatentSettings(BaseModel):
    """How a model of Stable Diffusion's shape is fine-tuned, in place of a compact network."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    start: str = Field(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        description="folder in diffusers' layout, or owner/name on the hub",
    )
    variant: str | None = Field(None, description="of the weights: fp16, bf16; none for float32")
    disc: float = Field(20.0, ge=1, description="errors count within this radius, latent pixels")
    lora: int = Field(0, ge=0, description="rank of LoRA; 0 fine-tunes the whole U-Net")
    checkpointing: bool = Field(False, description="less memory, a third more time")
    eight_bit: bool = Field(False, description="states of the optimiser on 8 bits (bitsandbytes)")
    mixup: float = Field(0.3, ge=0, description="images and labels mixed: Beta(a, a); 0: none")
    offset_noise: float = Field(0.1, ge=0, description="noise of each channel as a whole")
    gamma: float = Field(5.0, gt=0, description="of min-SNR")
    cache: int = Field(0, ge=0, description="views of each image encoded once; 0: at every step")


class TrainSettings(BaseModel):
    """One training run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    network: NetworkSettings = NetworkSettings()
    latent: LatentSettings | None = Field(None, description="Stable Diffusion's shape instead")
    preprocess: Preprocess = Preprocess()
    augmentation: Augmentation = Augmentation()

    steps: int = Field(10_000, ge=1, description="optimiser steps")
    batch: int = Field(32, ge=1, description="images an optimiser step, over all processes")
    accumulate: int = Field(1, ge=1, description="parts in which a batch is computed")
    balance: float = Field(0.5, ge=0, le=1, description="0: classes as often as they are; 1: equal")
    optimizer: str = Field(
        "muon", pattern="^(muon|adamw)$", description="muon: for convolutions, AdamW for the rest"
    )
    learning_rate: float = Field(1e-3, gt=0, description="after warm-up")
    warmup: int = Field(200, ge=0, description="steps over which the learning rate rises")
    cooldown: float = Field(0.3, ge=0, le=1, description="last share of the run: falls to zero")
    weight_decay: float = Field(
        0.01, ge=0, description="how much weights shrink a step / learning rate"
    )
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the running mean of the weights")

    sigma_data: float = Field(0.5, gt=0, description="standard deviation of the images")
    sigma_mean: float = Field(-0.9, description="mean of ln sigma")
    sigma_std: float = Field(1.3, gt=0, description="standard deviation of ln sigma")
    any_weight: float = Field(0.5, ge=0, description="weight of the 'any cell' head (heads)")
    classification: float = Field(
        0.2, ge=0, description="weight of the classification term (heads)"
    )
    sharpness: float = Field(50.0, gt=0, description="first beta of the classification term")
    label_dropout: float = Field(0.15, ge=0, lt=1, description="labels hidden (class by class)")

    precision: str = Field("no", pattern="^(no|bf16|fp16)$", description="mixed precision")
    seed: int = Field(0, ge=0, description="decides every random number of the run")
    checkpoint_minutes: float = Field(3, gt=0, description="between two checkpoints")

    @field_validator("precision", mode="before")
    @classmethod
    def _no(cls, value: Any) -> Any:
        """YAML reads an unquoted no as False."""
        return "no" if value is False else value

    @model_validator(mode="after")
    def _fits(self) -> TrainSettings:
        size, unshuffle = self.preprocess.size, self.network.unshuffle
        if self.latent is None and size % unshuffle:
            raise ValueError(
                f"preprocess.size {size} is no multiple of network.unshuffle {unshuffle}; try "
                f"{unshuffle * round(size / unshuffle)}"
            )
        if self.latent is not None and self.optimizer != "adamw":
            raise ValueError("Stable Diffusion's shape is fine-tuned with AdamW: optimizer=adamw")
        return self

    @property
    def together(self) -> bool:
        """Whether one pass of the network gives the guesses of all classes."""
        return self.latent is None and self.network.form == "heads"


# The published fine-tuning of Stable Diffusion 1.5 (arXiv 2408.08982). Its RandAugment is not here: turns,
# mirroring and colour are. "Any cell" is the mean of the classes, so that no label needs hiding.
PAPER: dict[str, Any] = {
    "latent": {},
    "preprocess": {"size": 360, "crop": 1.0},
    "augmentation": {
        "affine": 1.0, "zoom": 0.0, "shift": 0.0, "stain": 0.0, "light": 0.0, "blur": 0.0, "noise": 0.0,
        "brightness": 0.14, "contrast": 0.14, "hue": 0.07,
    },
    "batch": 10, "balance": 0.0, "learning_rate": 1e-5, "warmup": 0, "cooldown": 0.0,
    "ema": 0.9999, "label_dropout": 0.0, "precision": "fp16", "optimizer": "adamw",
    "checkpoint_minutes": 30,
}  # fmt: skip

# For long runs, so that no cell is known by heart: more of them are moved, and colours changed further.
WIDE_AUGMENTATION: dict[str, Any] = {
    "affine": 0.7, "zoom": 0.25, "light": 0.04, "far": 0.25, "blur": 0.2, "noise": 0.2,
}  # fmt: skip

# Learns to draw and to name at once: names nearly as pbc8 does after an hour of two cores (docs/log.md 58).
CPU: dict[str, Any] = {
    "classification": 1.0, "sigma_mean": -1.2, "sigma_std": 1.4, "cooldown": 0.5,
    "augmentation": {"affine": 0.7, "far": 0.25},
}  # fmt: skip

# For cells of other laboratories: better there, a little worse at home (docs/log.md 33, with AdamW).
FAR_AUGMENTATION: dict[str, Any] = {
    "affine": 0.7, "zoom": 0.35, "light": 0.08, "far": 0.5, "blur": 0.3, "noise": 0.2,
}  # fmt: skip

# For a few labelled cells, begun with a released model (train --from): minutes (docs/log.md 51).
FINE_TUNE: dict[str, Any] = {
    "optimizer": "adamw", "steps": 200, "warmup": 20, "cooldown": 0.5, "learning_rate": 3e-4,
    "ema": 0.97, "balance": 1.0,
    "classification": 10.0, "sigma_mean": -1.0, "sigma_std": 1.4, "augmentation": FAR_AUGMENTATION,
}  # fmt: skip

# About the steps of the two runs of recipes/pbc8.py with AdamW (docs/log.md 40); not yet run with Muon.
GPU: dict[str, Any] = {
    "steps": 6_000, "batch": 256, "precision": "bf16", "ema": 0.9995,
    "network": {"width": 64, "multipliers": (1, 2, 3)},
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "steps": 300,
        "network": {"width": 16, "multipliers": (1, 2), "blocks": 1, "head_width": 8},
        "preprocess": {"size": 32},
        "warmup": 20,
        "ema": 0.99,
    },
    "cpu": CPU,
    "cpu-far": CPU | {"augmentation": FAR_AUGMENTATION},
    "fine-tune": FINE_TUNE,
    "gpu": GPU,
    "gpu-large": GPU | {"preprocess": {"size": 96}, "augmentation": WIDE_AUGMENTATION},
    "paper-in-domain": PAPER | {"steps": 72_000, "batch": 64},
    "paper-low-data": PAPER | {"steps": 20_000},
    "paper-anomaly": PAPER | {"steps": 140_000},
    "paper-shift": PAPER
    | {
        "steps": 22_000,
        "batch": 32,
        "preprocess": {"size": 224, "crop": 1.0},
        "latent": {"disc": 8.0},
    },
}


def make_settings(preset: str = "cpu", changes: list[str] | None = None) -> TrainSettings:
    """A preset with `a.b=value` changes laid over it. Raises SettingsError naming the field."""
    if preset not in PRESETS:
        raise SettingsError(f"There is no preset '{preset}'. There are: {', '.join(PRESETS)}.")
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(_plain(PRESETS[preset])))
    for change in changes or []:
        name, separator, value = change.partition("=")
        if not separator:
            raise SettingsError(f"'{change}' is not name=value; try for example steps=5000.")
        _check_kind(name, preset, values)
        place = values
        *outer, last = name.strip().split(".")
        for part in outer:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise SettingsError(f"'{part}' in '{change}' has no fields of its own.")
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingsError(
                f"The value in '{change}' cannot be read; try for example steps=5000."
            ) from error
    return _validated(values, f"preset {preset}")


def _check_kind(name: str, preset: str, values: dict[str, Any]) -> None:
    """Raises SettingsError for a setting of the other kind of network."""
    part, latent = name.strip().split(".")[0], "latent" in values
    if part == "latent" and not latent:
        raise SettingsError(
            f"'{name}' is a setting of Stable Diffusion's shape, and the preset {preset} trains a compact "
            "network. Take one of the presets paper-..."
        )
    if part == "network" and latent:
        raise SettingsError(
            f"'{name}' is a setting of the compact network, and the preset {preset} fine-tunes Stable "
            "Diffusion's shape. Take the preset cpu or gpu."
        )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _validated(values: Any, source: str) -> TrainSettings:
    try:
        return TrainSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            near = get_close_matches(where, setting_names(), cutoff=0.5)
            near = near or [name for name in setting_names() if name.count(".") == where.count(".")]
            raise SettingsError(
                f"There is no setting '{where}' ({source}). Did you mean one of: {', '.join(near)}?"
            ) from error
        named = f"Setting '{where}'" if where else "The settings"
        raise SettingsError(f"{named} ({source}): {first['msg']}.") from error


def setting_names(kind: type[BaseModel] = TrainSettings, within: str = "") -> dict[str, Any]:
    """Every setting by its name, a.b for those inside others, with its field."""
    found = dict[str, Any]()
    for name, field in kind.model_fields.items():
        inner = next(
            (t for t in (field.annotation, *get_args(field.annotation)) if _is_model(t)), None
        )
        found |= setting_names(inner, f"{within}{name}.") if inner else {within + name: field}
    return found


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def load_settings(path: Path) -> TrainSettings:
    """Read settings.yaml of a run. Raises SettingsError."""
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read ({_one_line(error)}).") from error
    if isinstance(values, dict):
        values.setdefault("optimizer", "adamw")  # runs from before there was a choice
    return _validated(values, str(path))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def dump_settings(settings: BaseModel) -> str:
    """Settings as YAML, in the order in which they are declared."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
