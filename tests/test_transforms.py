"""Each change beside its undo, and the settings under which it must do nothing."""

import math

import pytest
import torch

from cytodiffusion.data.transforms import (
    HED,
    POSES,
    Augmentation,
    _moves,
    augment,
    blur,
    camera_noise,
    change_stain,
    random_poses,
    resample,
    turn_hue,
)

IMAGE = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
NOTHING = Augmentation(
    poses=False,
    affine=0,
    zoom=0,
    shift=0,
    brightness=0,
    contrast=0,
    hue=0,
    stain=0,
    blur=0,
    noise=0,
)
IDENTITY = torch.eye(2, 3)[None]


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# --- poses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pose", POSES, ids=str)
def test_undo(pose):
    assert pose.undo(pose(IMAGE)).equal(IMAGE)
    assert pose(pose.undo(IMAGE)).equal(IMAGE)


def test_there_are_eight_different_poses():
    assert len({tuple(pose(IMAGE).flatten().tolist()) for pose in POSES}) == 8
    assert POSES[0](IMAGE).equal(IMAGE)


def test_poses_by_hand():
    """Mirror left to right, then a quarter turn counter-clockwise."""
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    quarter, mirrored = POSES[1](image)[0, 0], POSES[5](image)[0, 0]
    assert quarter.tolist() == [[2, 4], [1, 3]]
    assert mirrored.tolist() == [[1, 3], [2, 4]]


def test_random_poses_are_poses_and_all_of_them():
    images = IMAGE[:1].expand(400, -1, -1, -1)
    turned = random_poses(images, seed())
    which = [[pose(IMAGE[0]).equal(one) for pose in POSES].index(True) for one in turned]
    counts = torch.tensor(which).bincount(minlength=8)
    assert counts.min() > 25  # 50 expected


# --- affine --------------------------------------------------------------------------------------


def test_the_identity_is_the_centre_crop():
    canvas = torch.rand(2, 3, 12, 12, generator=seed())
    found = resample(canvas, 8, IDENTITY.expand(2, -1, -1))
    torch.testing.assert_close(found, canvas[:, :, 2:10, 2:10], atol=1e-6, rtol=0)


def test_a_quarter_turn_is_a_pose():
    quarter = torch.tensor([[[0.0, -1, 0], [1, 0, 0]]])
    found = resample(IMAGE[:1], 6, quarter)
    either = [torch.rot90(IMAGE[:1], turns, (-2, -1)) for turns in (1, 3)]
    assert any(found.allclose(turned, atol=1e-5) for turned in either)


def test_a_shift_by_whole_pixels_moves_the_crop():
    """A shift of 2/size in affine units is one pixel of the crop."""
    canvas = torch.rand(1, 3, 12, 12, generator=seed())
    move = torch.tensor([[[1.0, 0, 2 / 8], [0, 1, -4 / 8]]])
    found = resample(canvas, 8, move)
    torch.testing.assert_close(found, canvas[:, :, 0:8, 3:11], atol=1e-5, rtol=0)


def test_a_shift_is_a_share_of_the_side():
    """A side is 2 in affine units; the largest of many shifts is near the largest allowed."""
    settings = NOTHING.model_copy(update={"affine": 1.0, "shift": 0.1})
    shifts = _moves(2000, settings, seed())[:, :, 2]
    assert shifts.abs().max().item() == pytest.approx(2 * 0.1, rel=0.01)


def test_what_lies_beyond_the_canvas_repeats_its_edge():
    canvas = torch.arange(4.0).expand(1, 3, 4, 4).contiguous()
    found = resample(canvas, 4, torch.tensor([[[1.0, 0, 4.0], [0, 1, 0]]]))
    torch.testing.assert_close(found, torch.full_like(found, 3.0))


# --- all together --------------------------------------------------------------------------------


def test_zero_settings_change_nothing():
    torch.testing.assert_close(augment(IMAGE, 6, NOTHING, seed()), IMAGE, atol=2e-6, rtol=0)
    assert NOTHING.margin == 1.0
    assert Augmentation().margin > 1.0


@pytest.mark.parametrize(
    "change",
    [
        {"poses": True},
        {"affine": 1.0},
        {"brightness": 0.1},
        {"contrast": 0.2},
        {"hue": 0.1},
        {"stain": 0.2},
        {"light": 0.2},
        {"blur": 1.0},
        {"noise": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_does_something_and_its_generator_decides_what(change):
    settings = NOTHING.model_copy(update=change)
    found = augment(IMAGE, 6, settings, seed(3))
    assert (found - IMAGE).abs().max() > 1e-3
    torch.manual_seed(123)
    assert augment(IMAGE, 6, settings, seed(3)).equal(found)
    assert not augment(IMAGE, 6, settings, seed(4)).equal(found)


def test_every_image_is_changed_in_its_own_way():
    same = IMAGE[:1].expand(3, -1, -1, -1)
    found = augment(same, 6, Augmentation(affine=1.0), seed())
    assert not found[0].allclose(found[1])


# --- colour --------------------------------------------------------------------------------------

GREY = torch.linspace(-0.9, 0.9, 5).view(1, 1, 5, 1).expand(1, 3, 5, 4).contiguous()


@pytest.mark.parametrize("turns", [0.0, 1.0, -1.0])
def test_a_full_circle_of_hue_is_the_identity(turns):
    found = turn_hue(IMAGE, torch.full((2,), turns))
    torch.testing.assert_close(found, IMAGE, atol=2e-6, rtol=0)


def test_grey_stays_grey():
    torch.testing.assert_close(turn_hue(GREY, torch.tensor([0.3])), GREY)


def test_a_third_of_the_circle_takes_red_to_green_or_blue():
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    found = turn_hue(red, torch.tensor([1 / 3])).flatten()
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)


def test_hue_is_undone_and_keeps_lightness_and_length():
    there = turn_hue(IMAGE, torch.tensor([0.1, 0.4]))
    torch.testing.assert_close(turn_hue(there, torch.tensor([-0.1, -0.4])), IMAGE)
    torch.testing.assert_close(there.sum(1), IMAGE.sum(1))
    torch.testing.assert_close(there.norm(dim=1), IMAGE.norm(dim=1))


def test_stain_scales_the_amount_of_each_dye():
    """Optical density is a mix of three dyes; each image's amounts are multiplied by three gains."""
    amounts = torch.rand(1, 3, 5, 5, generator=seed()) * 0.5 + 0.05
    density = torch.einsum("ndhw,dc->nchw", amounts, HED)
    images = 2 * (-density).exp() - 1
    settings = NOTHING.model_copy(update={"stain": 0.2})
    changed = change_stain(images, settings, seed(6))
    found = -((changed + 1) / 2).log()
    gains = torch.einsum("nchw,cd->ndhw", found, torch.linalg.inv(HED)) / amounts
    spread = gains.flatten(2).std(2)
    torch.testing.assert_close(spread, torch.zeros_like(spread), atol=1e-3, rtol=0)
    want = (0.2 * torch.randn(1, 3, generator=seed(6))).exp()
    torch.testing.assert_close(gains.flatten(2).mean(2), want, atol=1e-3, rtol=0)


def test_white_stays_white():
    """No dye, no density: gains change nothing."""
    white = torch.ones(1, 3, 2, 2)
    settings = NOTHING.model_copy(update={"stain": 0.5})
    torch.testing.assert_close(change_stain(white, settings, seed()), white)


def test_light_adds_one_density_to_each_colour():
    settings = NOTHING.model_copy(update={"light": 0.1})
    soft = IMAGE * 0.3
    changed = change_stain(soft, settings, seed(6))
    added = (((soft + 1) / 2).log() - ((changed + 1) / 2).log()).flatten(2)
    torch.testing.assert_close(added, added[..., :1].expand_as(added))
    assert added[..., 0].unique().numel() == 6  # of its own for each image and colour


def test_far_makes_the_changes_of_a_share_three_times_as_large():
    near = NOTHING.model_copy(update={"brightness": 0.02})
    far = near.model_copy(update={"far": 0.25})
    grey = torch.zeros(4000, 3, 1, 1)

    def spread(settings: Augmentation) -> float:
        return float(change_stain(grey, settings, seed())[:, 0].std())

    assert spread(near) == pytest.approx(0.02, rel=0.05)
    assert spread(far) == pytest.approx(0.02 * (0.75 + 0.25 * 9) ** 0.5, rel=0.05)
    assert spread(near.model_copy(update={"far": 1.0})) == pytest.approx(0.06, rel=0.05)


def test_contrast_keeps_the_mean_and_brightness_the_differences():
    soft = IMAGE * 0.3
    contrast = change_stain(soft, NOTHING.model_copy(update={"contrast": 0.2}), seed())
    torch.testing.assert_close(contrast.mean((2, 3)), soft.mean((2, 3)))
    light = change_stain(soft, NOTHING.model_copy(update={"brightness": 0.1}), seed())
    difference = (light - soft).flatten(1)
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference))


# --- blur and noise ------------------------------------------------------------------------------


def test_blur_keeps_flat_images_and_lowers_detail():
    flat = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(blur(flat, 1.0, seed()), flat)
    assert (blur(IMAGE, 1.0, seed()).var((2, 3)) < IMAGE.var((2, 3))).all()


def test_blur_is_a_gaussian_for_every_image_by_itself():
    """A point becomes an outer product, the same in all colours; its width lies in 0.4 to 1 px."""
    point = torch.zeros(6, 3, 9, 9)
    point[:, :, 4, 4] = 1
    found = blur(point, 1.0, seed())
    assert found[:, 0].equal(found[:, 1])
    row = found[:, 0].sum(1)
    torch.testing.assert_close(found[:, 0], row[:, :, None] * row[:, None])
    width = (1 / (2 * (row[:, 4] / row[:, 5]).log())).sqrt()
    assert ((width >= 0.4) & (width <= 1.0)).all()
    assert width.std() > 0.05


def test_blur_leaves_the_others_alone():
    images = IMAGE[:1].repeat(300, 1, 1, 1)
    same = (blur(images, 0.25, seed()) == images).flatten(1).all(1).float().mean().item()
    assert same == pytest.approx(0.75, abs=0.1)


def test_camera_noise_has_the_stated_strength():
    found = camera_noise(torch.zeros(500, 3, 8, 8), 0.5, seed()).flatten(1).std(1)
    assert (found == 0).float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert found.max() < 0.05
    noisy = found[found > 0]
    assert noisy.mean().item() == pytest.approx(0.02, rel=0.1)
    assert math.isclose(noisy.max().item(), 0.04, rel_tol=0.2)
