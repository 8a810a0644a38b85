"""The evaluation view: Pillow's resize without its rounding, crops and borders in the right place, exact identity."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from vitrail.config.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Interpolation, Preprocessing
from vitrail.data.view import (
    Box,
    denormalise,
    evaluation_view,
    normalise,
    resample,
    resample_boxes,
    resize_matrices,
    resize_matrix,
    view_levels,
    view_pixels,
)
from vitrail.errors import UserError

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SIZES = [((375, 500), (224, 224)), ((150, 90), (64, 48)), ((28, 28), (96, 96)), ((33, 200), (40, 40))]


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng([height, width])
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def dots(height: int, width: int, channels: int = 3) -> np.ndarray:
    return (noise(height, width, channels) // 128 * 255).astype(np.uint8)


def pillow(picture: np.ndarray, box: Box, size: tuple[int, int], filter: Interpolation) -> np.ndarray:
    """Resize with Pillow in two calls, as the order of its axes differs between versions."""
    sides = (box.left, 0, box.left + box.width, picture.shape[0])
    narrow = Image.fromarray(picture).resize((size[1], picture.shape[0]), FILTERS[filter], box=sides)
    ends = (0, box.top, size[1], box.top + box.height)
    return np.asarray(narrow.resize((size[1], size[0]), FILTERS[filter], box=ends))


@pytest.mark.parametrize("make", [noise, dots])
@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("source", "size"), SIZES)
def test_resampling_is_within_one_level_of_pillow(make, filter: Interpolation, source, size) -> None:
    picture = make(*source)
    height, width = source
    images = torch.from_numpy(picture).permute(2, 0, 1)[None]
    for box in (Box(0.0, 0.0, height, width), Box(3.25, 1.5, height * 0.7, width * 0.61)):
        ours = resample(images, box, size, filter)[0].round().permute(1, 2, 0).numpy()
        difference = np.abs(ours - pillow(picture, box, size, filter))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.4


@pytest.mark.parametrize("filter", FILTERS)
def test_pillow_itself_agrees_when_only_one_axis_changes(filter: Interpolation) -> None:
    picture = noise(64, 300)
    images = torch.from_numpy(picture).permute(2, 0, 1)[None]
    ours = resample(images, Box(0.0, 0.0, 64, 300), (64, 100), filter)[0].round().permute(1, 2, 0).numpy()
    assert np.abs(ours - np.asarray(Image.fromarray(picture).resize((100, 64), FILTERS[filter]))).max() <= 1


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("source", "target"), [(500, 224), (32, 224), (7, 7), (1, 5), (5, 1)])
def test_rows_of_a_resize_matrix_sum_to_one(filter: Interpolation, source: int, target: int) -> None:
    matrix = resize_matrix(source, target, filter, start=0.1 * source, length=0.8 * source)
    assert matrix.shape == (target, source)
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(target))


def test_a_resize_matrix_without_antialiasing_is_plain_interpolation() -> None:
    line = torch.rand(1, 1, 1, 50)
    expected = F.interpolate(line, (1, 20), mode="bilinear", align_corners=False)
    torch.testing.assert_close(line @ resize_matrix(50, 20, "bilinear", antialias=False).mT, expected)


def test_a_shift_by_whole_pixels_is_a_selection() -> None:
    expected = torch.eye(10)[3:9]
    for filter in FILTERS:
        assert torch.equal(resize_matrix(10, 6, filter, start=3.0, length=6.0), expected)


@pytest.mark.parametrize("filter", FILTERS)
def test_every_picture_of_a_batch_can_have_its_own_box(filter: Interpolation) -> None:
    images = torch.from_numpy(np.stack([noise(40, 56), dots(40, 56)])).permute(0, 3, 1, 2)
    boxes = [Box(3.0, 5.0, 30.0, 20.0), Box(0.0, 0.0, 40.0, 56.0)]
    together = resample_boxes(images, torch.tensor(boxes), (24, 24), filter)
    for image, box, ours in zip(images, boxes, together, strict=True):
        torch.testing.assert_close(ours, resample(image[None], box, (24, 24), filter)[0], atol=1e-2, rtol=0)
    starts, lengths = torch.tensor([3.0, 0.0]), torch.tensor([30.0, 40.0])
    single = resize_matrix(40, 24, filter, start=3.0, length=30.0)
    torch.testing.assert_close(resize_matrices(40, 24, starts, lengths, filter)[0], single, atol=1e-5, rtol=0)


def test_large_pictures_in_bands_equal_the_dense_product() -> None:
    images = torch.from_numpy(noise(700, 900)).permute(2, 0, 1)[None]
    banded = resample(images, Box(0.0, 0.0, 700, 900), (50, 60), "bicubic")
    rows, columns = resize_matrix(700, 50, "bicubic"), resize_matrix(900, 60, "bicubic")
    dense = (rows @ (images.float() @ columns.mT).clamp(0, 255)).clamp(0, 255)
    torch.testing.assert_close(banded, dense, atol=1e-3, rtol=0)


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_of_the_models_size_is_only_normalised(fit, channels: int) -> None:
    preprocessing = Preprocessing(image_size=(30, 20), channels=channels, fit=fit, crop_fraction=1.0, mean=(0.5,))
    picture = noise(30, 20, channels)
    assert np.array_equal(view_pixels(picture, preprocessing), picture)
    expected = normalise(torch.from_numpy(picture).permute(2, 0, 1)[None], preprocessing)[0]
    assert torch.equal(evaluation_view(picture, preprocessing), expected)


def test_the_crop_is_the_centre_at_the_models_aspect_ratio() -> None:
    # 100 x 60 pictures for a 40 x 40 model: 75 % of the largest square, 45 pixels, from (27.5, 7.5).
    preprocessing = Preprocessing(image_size=(40, 40), fit="crop", crop_fraction=0.75)
    picture = noise(100, 60)
    expected = pillow(picture, Box(27.5, 7.5, 45.0, 45.0), (40, 40), "bicubic").astype(int)
    assert np.abs(view_pixels(picture, preprocessing) - expected).max() <= 1


def test_a_crop_without_scaling_copies_pixels() -> None:
    picture = dots(40, 44)
    preprocessing = Preprocessing(image_size=(32, 32), crop_fraction=0.8)
    assert np.array_equal(view_pixels(picture, preprocessing), picture[4:36, 6:38])


def test_squash_keeps_the_whole_picture() -> None:
    preprocessing = Preprocessing(image_size=(20, 50), fit="squash", crop_fraction=0.5, interpolation="bilinear")
    expected = pillow(noise(100, 60), Box(0.0, 0.0, 100, 60), (20, 50), "bilinear").astype(int)
    assert np.abs(view_pixels(noise(100, 60), preprocessing) - expected).max() <= 1


def test_pad_keeps_the_whole_picture_on_a_border_that_is_zero_after_normalisation() -> None:
    preprocessing = Preprocessing(image_size=(40, 40), fit="pad", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    picture = noise(100, 60)
    view = evaluation_view(picture, preprocessing)
    assert (view[:, :, :8] == 0).all() and (view[:, :, 32:] == 0).all()
    inner = denormalise(view[None, :, :, 8:32], preprocessing)[0].round().permute(1, 2, 0).numpy()
    assert np.abs(inner - pillow(picture, Box(0.0, 0.0, 100, 60), (40, 24), "bicubic")).max() <= 1
    border = np.round(np.array(IMAGENET_MEAN) * 255)
    assert (view_pixels(picture, preprocessing)[:, :8] == border).all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(["crop", "pad", "squash"]),
    st.sampled_from(list(FILTERS)),
    st.floats(0.05, 1.0),
)
def test_pictures_of_any_size_become_the_models_size(height, width, fit, filter, fraction) -> None:
    preprocessing = Preprocessing(image_size=(24, 32), fit=fit, crop_fraction=fraction, interpolation=filter)
    levels = view_levels(torch.from_numpy(noise(height, width)).permute(2, 0, 1)[None], preprocessing)
    assert levels.shape == (1, 3, 24, 32)
    assert levels.min() >= 0 and levels.max() <= 255
    flat = evaluation_view(np.full((height, width, 3), 100, dtype=np.uint8), preprocessing)
    inside = flat[0, 11, 15]  # the middle is never border
    torch.testing.assert_close(inside, torch.tensor((100 / 255 - 0.5) / 0.5), atol=1e-5, rtol=0)


def test_training_pixels_are_the_rounded_view() -> None:
    preprocessing = Preprocessing(image_size=(48, 48), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    picture = noise(100, 80)
    levels = denormalise(evaluation_view(picture, preprocessing)[None], preprocessing)[0]
    pixels = view_pixels(picture, preprocessing)
    assert pixels.dtype == np.uint8 and pixels.flags.writeable
    assert np.abs(levels.permute(1, 2, 0).numpy() - pixels).max() <= 0.5 + 1e-3


def test_normalisation_is_the_usual_formula_and_can_be_undone() -> None:
    preprocessing = Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    images = torch.from_numpy(noise(8, 8)).permute(2, 0, 1)[None]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    normalised = normalise(images, preprocessing)
    torch.testing.assert_close(normalised, (images / 255 - mean) / std)
    assert torch.equal(normalised, normalise(images.float(), preprocessing))
    torch.testing.assert_close(denormalise(normalised, preprocessing), images.float(), atol=1e-4, rtol=0)


def test_one_mean_stands_for_all_channels() -> None:
    images = torch.from_numpy(noise(8, 8)).permute(2, 0, 1)[None]
    one, three = (Preprocessing(mean=(0.4,) * n, std=(0.2,) * n) for n in (1, 3))
    assert torch.equal(normalise(images, one), normalise(images, three))


def test_gradients_reach_the_pixels_even_after_inference_mode() -> None:
    preprocessing = Preprocessing(mean=(0.41,), std=(0.21,))
    images = torch.rand(1, 3, 10, 10) * 255
    with torch.inference_mode():
        normalise(images, preprocessing)
    images.requires_grad_()
    normalise(images, preprocessing).sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / (255 * 0.21)))


def test_a_mean_for_other_channels_is_named() -> None:
    preprocessing = Preprocessing(channels=1, mean=IMAGENET_MEAN)
    with pytest.raises(UserError, match="mean has 3 values for pictures of 1 channel"):
        evaluation_view(noise(8, 8, 1), preprocessing)


@pytest.mark.parametrize(("has", "wants"), [(1, 3), (3, 1)])
def test_pictures_with_the_wrong_channels_are_refused(has: int, wants: int) -> None:
    preprocessing = Preprocessing(channels=wants, mean=(0.5,), std=(0.5,))
    for view in (evaluation_view, view_pixels):
        with pytest.raises(UserError, match="the model takes"):
            view(noise(8, 8, has), preprocessing)


def test_arrays_that_are_read_only_or_run_backwards_are_fine() -> None:
    picture = noise(50, 40)
    preprocessing = Preprocessing(image_size=(20, 20))
    frozen = picture.copy()
    frozen.setflags(write=False)
    assert torch.equal(evaluation_view(frozen, preprocessing), evaluation_view(picture, preprocessing))
    mirrored = evaluation_view(picture[:, ::-1], preprocessing)
    torch.testing.assert_close(mirrored, evaluation_view(picture, preprocessing).flip(-1), atol=1e-4, rtol=0)
