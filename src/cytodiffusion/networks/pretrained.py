"""Read a model of Stable Diffusion's shape from a folder in diffusers' layout, or from the hub.

    unet/       config.json, diffusion_pytorch_model[.fp16].safetensors
    vae/        the same
    scheduler/  scheduler_config.json: how noise grows over the time steps, and what the U-Net predicts

The text encoder and the tokenizer are not needed. Weights are read from safetensors alone, never from
pickles. What cannot be used is refused in one line that says what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from cytodiffusion.diffusion.noise import scaled_linear_alpha_bar, sigma_of_alpha_bar
from cytodiffusion.diffusion.precondition import Prediction
from cytodiffusion.errors import MissingExtra, ModelError, one_line

PARTS = ("unet", "vae", "scheduler")
WEIGHTS = "diffusion_pytorch_model"
CONDITIONS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim")
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
TAKEN = "in diffusers' layout: unet/, vae/ and scheduler/, as in stable-diffusion-v1-5"


class Schedule(BaseModel):
    """How a variance-preserving model was trained: its noise over time steps, and what it predicts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(1000, ge=2, description="time steps")
    beta_start: float = Field(0.00085, gt=0, lt=1, description="noise added in the first step")
    beta_end: float = Field(0.012, gt=0, lt=1, description="and in the last")
    growth: Literal["scaled_linear", "linear"] = Field(
        "scaled_linear", description="what is linear between them: the root of beta, or beta"
    )
    prediction: Prediction = Field("eps", description="what the U-Net predicts: eps, v or x0")

    @property
    def levels(self) -> Float[Tensor, " t"]:
        """Noise level of each time step, rising."""
        if self.growth == "scaled_linear":
            return sigma_of_alpha_bar(
                scaled_linear_alpha_bar(self.steps, self.beta_start, self.beta_end)
            )
        betas = torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)
        return sigma_of_alpha_bar(torch.cumprod(1 - betas, dim=0).float())


@dataclass(frozen=True)
class Pretrained:
    """A U-Net, an autoencoder (both diffusers' modules) and the schedule of their training."""

    unet: nn.Module
    vae: nn.Module
    schedule: Schedule


def library() -> Any:
    """diffusers. Raises MissingExtra naming the pip line."""
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtra(
            f"Latent networks need diffusers, which is not installed ({error}). "
            "Try: pip install 'cytodiffusion[latent]'"
        ) from error
    return diffusers


def read_pretrained(where: str | Path, variant: str | None = None) -> Pretrained:
    """Read a local folder, or the repository of that name on the hub.

    `variant` chooses among weights, as "fp16" or "bf16"; numbers are float32 in memory. Raises
    ModelError, MissingExtra.
    """
    folder = _found(where, variant)
    _check_parts(folder)
    schedule = read_schedule(folder / "scheduler" / "scheduler_config.json")
    check_shape(_config(folder / "unet" / "config.json"))
    unet = _read(folder, "unet", "UNet2DConditionModel", variant)
    vae = _read(folder, "vae", "AutoencoderKL", variant)
    if unet.config.in_channels != vae.config.latent_channels:
        raise ModelError(
            f"The U-Net of {where} takes {unet.config.in_channels} channels and its VAE gives "
            f"{vae.config.latent_channels}: it is made for another task. Give a model {TAKEN}."
        )
    return Pretrained(unet, vae, schedule)


def check_shape(config: Mapping[str, Any]) -> None:
    """Raises ModelError where a U-Net of this configuration is not of Stable Diffusion 1's or 2's shape."""
    wrong = [name for name in CONDITIONS if config.get(name) is not None]
    first, *_ = config.get("down_block_types", ["CrossAttnDownBlock2D"]) or ["none"]
    width = config.get("cross_attention_dim", 1280)
    wrong += [first] if first != "CrossAttnDownBlock2D" else []
    wrong += [] if isinstance(width, int) else [f"cross_attention_dim {width}"]
    if wrong:
        raise ModelError(
            f"This U-Net is not of Stable Diffusion 1's or 2's shape ({', '.join(wrong)}): its first block "
            "must have cross-attention, of one width, and nothing but text as its condition."
        )


def _found(where: str | Path, variant: str | None) -> Path:
    """The folder itself, or that of a download."""
    path = Path(where)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(
            f"{where} is a single file. Give a folder {TAKEN}; diffusers' from_single_file and "
            "save_pretrained make one of a checkpoint."
        )
    if len(path.parts) != 2 or path.is_absolute() or str(where).startswith("."):
        raise ModelError(
            f"There is no folder {where}. Give one {TAKEN}, or the name of such a model on the hub, as "
            "owner/name."
        )
    return _downloaded(str(where), variant)


def _downloaded(name: str, variant: str | None) -> Path:
    """A snapshot of the parts that are needed, from the hub or from its cache."""
    library()
    from huggingface_hub import snapshot_download

    weights = [f"{_name(variant)}{end}" for end in (".safetensors", "-0*.safetensors")]
    wanted = [f"{part}/{file}" for part in PARTS for file in ("*.json", *weights)]
    try:
        return Path(snapshot_download(name, allow_patterns=["model_index.json", *wanted]))
    except Exception as error:  # the hub's client raises errors of several libraries
        raise ModelError(
            f"There is no folder {name}, and the hub does not give a model of that name "
            f"({one_line(error)}). Download it where there is internet and give the folder."
        ) from error


def _check_parts(folder: Path) -> None:
    """Raises ModelError naming the part that is missing."""
    configs = {
        part: folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        for part in PARTS
    }
    missing = [f"{part}/" for part, path in configs.items() if not path.is_file()]
    if not missing:
        return
    if _is_text_model(folder):
        raise ModelError(f"{folder} is a model of text alone. Give a whole model {TAKEN}.")
    raise ModelError(f"{folder} has no {', no '.join(missing)}. Give a whole model {TAKEN}.")


def _is_text_model(folder: Path) -> bool:
    alone = (folder / "config.json").is_file() and "text" in (folder / "config.json").read_text()
    return alone or ((folder / "text_encoder").is_dir() and not (folder / "unet").is_dir())


def read_schedule(path: Path) -> Schedule:
    """The schedule of scheduler_config.json. Raises ModelError for one that is not of this kind."""
    config = _config(path)
    name, growth = config.get("_class_name", "scheduler"), config.get("beta_schedule", "linear")
    kind = config.get("prediction_type", "epsilon")
    if not {"beta_start", "beta_end"} <= config.keys() or growth not in ("scaled_linear", "linear"):
        raise ModelError(
            f"{path}: '{name}' adds noise in a way that is not supported (betas {growth}). Give a model "
            "with a DDPM schedule of linear or scaled_linear betas, as Stable Diffusion 1 and 2."
        )
    if config.get("trained_betas") or config.get("rescale_betas_zero_snr"):
        raise ModelError(
            f"{path}: trained betas, or betas rescaled to no signal at the end, are not supported. Give "
            "the model's scheduler without them."
        )
    if kind not in PREDICTIONS:
        raise ModelError(f"{path}: predicts '{kind}'; supported: {', '.join(PREDICTIONS)}.")
    try:
        return Schedule(
            steps=config.get("num_train_timesteps", 1000), beta_start=config["beta_start"],
            beta_end=config["beta_end"], growth=growth, prediction=PREDICTIONS[kind],
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(
            f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}. Download it again."
        ) from error


def _config(path: Path) -> dict[str, Any]:
    """A JSON file of a part. Raises ModelError where it is none."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{path} cannot be read ({one_line(error)}). Download it again."
        ) from error


def _read(folder: Path, part: str, kind: str, variant: str | None) -> Any:
    """A part by diffusers, from safetensors."""
    said = _config(folder / part / "config.json").get("_class_name", kind)
    if said != kind:
        raise ModelError(f"{folder / part} is a {said}; needed is a {kind}. Give a model {TAKEN}.")
    _check_weights(folder / part, variant)
    try:
        found, told = getattr(library(), kind).from_pretrained(
            folder, subfolder=part, variant=variant, use_safetensors=True, local_files_only=True,
            torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder / part} cannot be read as a {kind} ({one_line(error)}). Download it again."
        ) from error
    if missing := sorted(told["missing_keys"]):
        raise ModelError(
            f"{folder / part} lacks {len(missing)} of its weights ({missing[0]}, ...). Download it again."
        )
    return found


def _name(variant: str | None) -> str:
    return f"{WEIGHTS}.{variant}" if variant else WEIGHTS


def _check_weights(folder: Path, variant: str | None) -> None:
    """Raises ModelError where there are no weights of the variant, naming those there are."""
    name = _name(variant)
    if any(path.name.startswith((f"{name}.safetensors", f"{name}-0")) for path in folder.iterdir()):
        return
    there = sorted(path.name for path in folder.glob(f"{WEIGHTS}*"))
    if there and all(path.endswith((".bin", ".pt", ".ckpt")) for path in there):
        raise ModelError(
            f"{folder} has pickled weights only ({', '.join(there)}), which can run code when they are "
            "read. Convert them to safetensors first (diffusers' save_pretrained does)."
        )
    others = sorted(
        {path.split(".")[1] for path in there if path.count(".") == 2} - {"safetensors"}
    )
    hint = f"Try the variant {' or '.join(others)}." if others else "Download the weights too."
    raise ModelError(f"{folder} has no {name}.safetensors. {hint}")
