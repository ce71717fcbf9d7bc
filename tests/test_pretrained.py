"""What can be read, as diffusers itself reads it, and what is refused in one line that says what to do."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tiny_diffusion import SCHEDULER, change_config, pipeline, unet, vae, write_pipeline

from cytodiffusion.diffusion.loss import min_snr_weight
from cytodiffusion.diffusion.noise import time_of_sigma
from cytodiffusion.diffusion.precondition import VPDenoiser
from cytodiffusion.errors import MissingExtra, ModelError
from cytodiffusion.networks.latent import LatentNetwork, check_unet, folded, tokens
from cytodiffusion.networks.pretrained import Schedule, read_pretrained, read_schedule

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
Spoil = Callable[[Path], Any]


@pytest.fixture
def tiny(tmp_path_factory) -> Path:
    return pipeline(tmp_path_factory.getbasetemp())


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    """A pipeline to be spoilt."""
    return Path(shutil.copytree(tiny, tmp_path / "pipeline"))


def complaint(where: str | Path, variant: str | None = None) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(ModelError) as refused:
        read_pretrained(where, variant)
    text = str(refused.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


# --- what is read --------------------------------------------------------------------------------


def test_every_weight_is_that_of_the_file(tiny):
    found = read_pretrained(tiny)
    for part, theirs in ((found.unet, unet()), (found.vae, vae())):
        assert part.state_dict().keys() == theirs.state_dict().keys()
        for name, value in part.state_dict().items():
            assert value.equal(theirs.state_dict()[name]), name
    assert found.schedule == Schedule()


def test_weights_of_half_precision_are_float32_in_memory(tiny, tmp_path):
    """Only fp16 files are there, as in much of the hub."""
    shutil.copytree(tiny / "scheduler", tmp_path / "scheduler")
    for name, part in (("unet", unet()), ("vae", vae())):
        part.half().save_pretrained(tmp_path / name, variant="fp16")
    assert "fp16" in complaint(tmp_path)
    found = read_pretrained(tmp_path, "fp16").unet.state_dict()
    for name, value in unet().state_dict().items():
        assert found[name].dtype == torch.float32
        assert found[name].equal(value.half().float()), name


@pytest.mark.parametrize("variant", [None, "bf16"])
def test_weights_in_several_files(tiny, copy, variant):
    """As large U-Nets are saved."""
    (copy / "unet" / WEIGHTS).unlink()
    unet().save_pretrained(copy / "unet", max_shard_size="100KB", variant=variant)
    if variant:
        (copy / "vae" / WEIGHTS).rename(copy / "vae" / WEIGHTS.replace(".safe", ".bf16.safe"))
    assert len(list((copy / "unet").glob("*.safetensors"))) > 1
    one, many = read_pretrained(tiny).unet, read_pretrained(copy, variant).unet
    assert all(value.equal(many.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    ("variant", "taken", "left"),
    [
        (None, f"unet/{STEM}.safetensors", f"unet/{STEM}.fp16.safetensors"),
        (None, f"unet/{STEM}-00001-of-00002.safetensors", f"unet/{STEM}.non_ema.safetensors"),
        ("fp16", f"vae/{STEM}.fp16.safetensors", f"vae/{STEM}.safetensors"),
        ("fp16", "scheduler/scheduler_config.json", f"unet/{STEM}.bin"),
        (None, "vae/config.json", "text_encoder/model.safetensors"),
    ],
)
def test_a_name_on_the_hub_is_asked_for_what_is_needed(tiny, monkeypatch, variant, taken, left):
    """No pickles, no text encoder, and the weights of one variant."""
    asked = {}

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with contextlib.suppress(ModelError):  # the tiny model has no variants
        read_pretrained("owner/name", variant)
    files = [taken, left]
    assert list(filter_repo_objects(files, allow_patterns=asked["owner/name"])) == [taken]


# --- the schedule, against diffusers --------------------------------------------------------------


SCHEDULES = [
    {"beta_schedule": "scaled_linear"},
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "scaled_linear", "num_train_timesteps": 200},
]


def both(tmp_path: Path, **changes: Any) -> tuple[Schedule, DDPMScheduler]:
    """The schedule as read, and diffusers' scheduler that wrote it."""
    theirs = DDPMScheduler(**SCHEDULER | changes)
    theirs.save_pretrained(tmp_path)
    return read_schedule(tmp_path / "scheduler_config.json"), theirs


@pytest.mark.parametrize("changes", SCHEDULES, ids=str)
def test_levels_are_those_of_diffusers(tmp_path, changes):
    """sigma^2 = (1 - alpha_bar)/alpha_bar = 1/snr; a level's time is its place."""
    schedule, theirs = both(tmp_path, **changes)
    times = torch.arange(theirs.config.num_train_timesteps)
    alpha_bar = theirs.alphas_cumprod.double()
    wanted = ((1 - alpha_bar) / alpha_bar).sqrt().float()
    torch.testing.assert_close(schedule.levels, wanted, rtol=2e-4, atol=0)
    torch.testing.assert_close(schedule.levels**-2, compute_snr(theirs, times), rtol=4e-4, atol=0)
    assert (schedule.levels.diff() > 0).all()
    found = time_of_sigma(schedule.levels, schedule.levels)
    torch.testing.assert_close(found, times.float(), atol=5e-3, rtol=0)


@pytest.mark.parametrize("changes", SCHEDULES, ids=str)
def test_the_scaled_noisy_image_is_that_of_diffusers(tmp_path, changes):
    """(clean + sigma noise) / sqrt(1 + sigma^2) = sqrt(alpha_bar) clean + sqrt(1 - alpha_bar) noise."""
    schedule, theirs = both(tmp_path, **changes)
    clean, noise = torch.randn(2, 4, 4, 3, 3)
    times = torch.tensor([0, 10, 100, 199])
    sigma = schedule.levels[times].view(-1, 1, 1, 1)
    ours = (clean + sigma * noise) / (1 + sigma**2).sqrt()
    torch.testing.assert_close(ours, theirs.add_noise(clean, noise, times), rtol=1e-4, atol=1e-5)


def test_min_snr_is_that_of_diffusers_training_scripts(tmp_path):
    """min(snr, 5)/snr on errors of the noise is min(snr, 5) on those of the clean image."""
    schedule, theirs = both(tmp_path)
    snr = compute_snr(theirs, torch.arange(1000))
    on_noise = torch.minimum(snr, torch.tensor(5.0)) / snr
    ours = min_snr_weight(schedule.levels, 5.0) * schedule.levels**2
    torch.testing.assert_close(ours, on_noise, rtol=1e-3, atol=0)


class Says(torch.nn.Module):
    """Says the same whatever it sees, and keeps what that was."""

    def __init__(self, said: torch.Tensor) -> None:
        super().__init__()
        self.said = said

    def forward(self, scaled, time, labels):
        self.told = scaled, float(time)
        return self.said


@pytest.mark.parametrize(
    ("kind", "ours"), [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")]
)
def test_predictions_become_the_clean_image_of_diffusers(tmp_path, kind, ours):
    """Whatever a network says: what diffusers' scheduler takes it to mean."""
    schedule, theirs = both(tmp_path, prediction_type=kind, clip_sample=False)
    assert schedule.prediction == ours
    says = Says(torch.randn(1, 1, 4, 3, 3))
    denoiser = VPDenoiser(says, schedule.levels, schedule.prediction)
    noisy = torch.randn(1, 4, 3, 3)
    for time in (3, 500, 999):
        sigma = schedule.levels[[time]]
        guess = denoiser(noisy, sigma, torch.zeros(1, 1, dtype=torch.long))[0]
        scaled, told_time = says.told
        assert told_time == pytest.approx(time, abs=5e-3)
        wanted = theirs.step(says.said[0], time, scaled).pred_original_sample
        torch.testing.assert_close(guess, wanted, rtol=1e-3, atol=1e-4)


# --- what is refused, and how ---------------------------------------------------------------------


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler"])
def test_a_missing_part_is_named(copy, part):
    shutil.rmtree(copy / part)
    assert f"has no {part}/." in complaint(copy)


def test_an_empty_folder_has_no_part(tmp_path):
    assert "has no unet/, no vae/, no scheduler/" in complaint(tmp_path)


def test_a_part_alone_is_not_a_model(tiny):
    assert "has no unet/" in complaint(tiny / "unet")


def test_a_model_of_text_alone(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}'
    )
    assert "text alone" in complaint(tmp_path)


def test_a_text_encoder_without_a_unet(tmp_path):
    (tmp_path / "text_encoder").mkdir()
    assert "text alone" in complaint(tmp_path)


def test_a_single_file(tmp_path):
    path = tmp_path / "v1-5-pruned.safetensors"
    path.write_bytes(b"0")
    said = complaint(path)
    assert "single file" in said
    assert "from_single_file" in said


@pytest.mark.parametrize("where", ["/nowhere", "../nowhere", "./nothing", "nothing", "a/b/c"])
def test_no_such_folder(where, monkeypatch):
    """The hub is not asked for what cannot be a name on it."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert f"There is no folder {where}." in complaint(where)


def test_a_name_on_the_hub_without_internet(monkeypatch):
    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to host\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    said = complaint("owner/name")
    assert "no route to host" in said
    assert "where there is internet" in said


def test_pickles_are_not_read(copy):
    (copy / "unet" / WEIGHTS).unlink()
    torch.save(unet().state_dict(), copy / "unet" / "diffusion_pytorch_model.bin")
    said = complaint(copy)
    assert "pickled" in said
    assert "diffusion_pytorch_model.bin" in said


def test_a_variant_that_is_not_there_names_the_one_that_is(copy):
    (copy / "vae" / WEIGHTS).rename(copy / "vae" / WEIGHTS.replace(".safe", ".bf16.safe"))
    said = complaint(copy)
    assert "vae" in said
    assert "variant bf16" in said
    assert "fp16" in complaint(copy, "fp16")


def test_weights_that_were_not_downloaded(copy):
    (copy / "unet" / WEIGHTS).unlink()
    assert "Download the weights too" in complaint(copy)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_download_that_was_cut(copy, kept):
    path = copy / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    said = complaint(copy)
    assert f"{copy / 'unet'} cannot be read" in said


def test_a_scheduler_of_another_kind(copy):
    """Flow matching, as Stable Diffusion 3 and FLUX."""
    FlowMatchEulerDiscreteScheduler().save_pretrained(copy / "scheduler")
    said = complaint(copy)
    assert "FlowMatchEulerDiscreteScheduler" in said
    assert "scaled_linear" in said


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"rescale_betas_zero_snr": True}, "rescaled"),
        ({"trained_betas": [0.1, 0.2]}, "trained betas"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ({"prediction_type": "flow"}, "'flow'"),
    ],
    ids=str,
)
def test_betas_and_predictions_that_are_not_supported(copy, values, told):
    change_config(copy / "scheduler" / "scheduler_config.json", **values)
    assert told in complaint(copy)


def test_a_scheduler_that_is_no_json(copy):
    (copy / "scheduler" / "scheduler_config.json").write_text("{")
    assert "cannot be read" in complaint(copy)


def test_inpainting_has_nine_channels(tmp_path):
    said = complaint(write_pipeline(tmp_path, unet={"in_channels": 9}))
    assert "takes 9 channels" in said
    assert "another task" in said


def test_another_kind_of_network(copy):
    change_config(copy / "unet" / "config.json", _class_name="SD3Transformer2DModel")
    assert "SD3Transformer2DModel; needed is a UNet2DConditionModel" in complaint(copy)


def test_diffusers_that_is_not_installed(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'cytodiffusion\[latent\]'"):
        read_pretrained(tiny)


# --- U-Nets of another shape ----------------------------------------------------------------------


def refused(classes: int = 3, **changes: Any) -> str:
    with pytest.raises(ModelError) as error:
        check_unet(unet(**changes), classes)
    return str(error.value)


def test_the_shape_of_stable_diffusion_xl():
    """It wants sizes and a second text besides."""
    said = refused(
        addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )  # fmt: skip
    assert "addition_embed_type" in said
    first = refused(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    assert "first block must have cross-attention" in first


def test_another_shape_is_refused_before_its_weights_are_read(copy):
    """Those of Stable Diffusion XL are 10 GB."""
    change_config(copy / "unet" / "config.json", addition_embed_type="text_time")
    for file in copy.rglob("*.safetensors"):
        file.unlink()
    assert "addition_embed_type" in complaint(copy)


@pytest.mark.parametrize("changes", [
    {"class_embed_type": "timestep"}, {"encoder_hid_dim": 8, "encoder_hid_dim_type": "text_proj"},
], ids=str)  # fmt: skip
def test_other_conditions(changes):
    assert next(iter(changes)) in refused(**changes)


def test_more_classes_than_a_token_has_numbers():
    check_unet(unet(), 16)
    said = refused(17)
    assert "17 classes do not fit into a token of 16 numbers" in said


# --- found wanting -------------------------------------------------------------------------------


def bad_config(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text('{"_class_name": "UNet2D')


def config_of_another_kind(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("[1]")


def betas_without_a_value(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_start": None}))


def betas_out_of_range(folder: Path) -> None:
    change_config(folder / "scheduler" / "scheduler_config.json", beta_end=2.0)


@pytest.mark.parametrize(
    "spoil", [bad_config, config_of_another_kind, betas_without_a_value, betas_out_of_range]
)
def test_a_config_that_makes_no_sense_is_one_line(copy, spoil):
    spoil(copy)
    complaint(copy)


def test_weights_that_are_not_in_the_file_are_missed(copy):
    """diffusers fills them with random numbers and only warns."""
    path = copy / "unet" / WEIGHTS
    weights = load_file(path)
    del weights["conv_out.weight"]
    save_file(weights, path, {"format": "pt"})
    assert "conv_out.weight" in complaint(copy)


def test_weights_of_another_shape(copy):
    change_config(copy / "unet" / "config.json", cross_attention_dim=24)
    assert "cannot be read" in complaint(copy)


def test_a_unet_for_labels_of_its_own():
    """num_class_embeds makes an embedding that diffusers then asks labels for."""
    assert "num_class_embeds" in refused(num_class_embeds=4)


def test_a_unet_without_a_middle():
    """As BK-SDM-Tiny, a distilled Stable Diffusion 1: read, and run as by diffusers."""
    theirs = unet(mid_block_type=None)
    ours = LatentNetwork(folded(theirs, 3), 3, Schedule())
    latents, label = torch.randn(1, 4, 4, 4), torch.tensor([[2]])
    wanted = theirs(latents, 7, tokens(torch.eye(3)[2:], 16)).sample
    torch.testing.assert_close(ours(latents, torch.tensor([7.0]), label)[0], wanted)
