"""Batched training augmentation: what each step does to pixels and targets, and that no picture changes another."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from vitrail.config.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from vitrail.config.run import AugmentConfig
from vitrail.data import open_data
from vitrail.data.augment import Augment, cutout, erase, jitter, shift
from vitrail.data.base import Batch
from vitrail.data.boxes import BoxDraws, random_boxes, training_boxes
from vitrail.data.mix import mix
from vitrail.data.operations import brightness, color, contrast
from vitrail.data.policies import apply_policy
from vitrail.data.random import Draw, choice, normal, sample_keys, uniform
from vitrail.data.stream import Stream
from vitrail.data.view import Box, denormalise, evaluation_view, mean_levels, normalise, resample, view_levels
from vitrail.errors import UserError

PLAIN = AugmentConfig(crop="none", flip=0.0)
SIZE_32 = Preprocessing(image_size=(32, 32), crop_fraction=1.0, mean=IMAGENET_MEAN, std=IMAGENET_STD)
CLASSES = 10


def batch_of(count: int, height: int = 32, width: int = 32, channels: int = 3, *, cropped: bool = False) -> Batch:
    rng = np.random.default_rng(count)
    pixels = rng.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # as streams hand them out: channels last in memory
    targets = torch.arange(count) % CLASSES
    return Batch(images, targets, sample_keys(1, 0, torch.arange(count)), cropped=cropped)


def part(batch: Batch, rows: slice) -> Batch:
    return Batch(batch.images[rows], batch.targets[rows], batch.keys[rows], cropped=batch.cropped)


def keys_of(count: int) -> torch.Tensor:
    return sample_keys(0, 0, torch.arange(count))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 56)])
@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_without_augmentation_the_batch_is_the_evaluation_view(fit, height: int, width: int) -> None:
    batch, preprocessing = batch_of(6, height, width), replace(SIZE_32, fit=fit)
    images, targets = Augment(PLAIN, preprocessing)(batch, classes=CLASSES)
    views = [evaluation_view(image.permute(1, 2, 0).numpy(), preprocessing) for image in batch.images]
    if height == width:
        assert torch.equal(images, torch.stack(views))
    torch.testing.assert_close(images, torch.stack(views), atol=1e-5, rtol=0)
    assert torch.equal(targets.argmax(dim=1), batch.targets) and (targets.sum(dim=1) == 1).all()


def test_without_a_random_crop_the_evaluation_crop_is_taken() -> None:
    batch, preprocessing = batch_of(3), replace(SIZE_32, crop_fraction=0.75)
    images, _ = Augment(PLAIN, preprocessing)(batch, classes=CLASSES)
    assert torch.equal(images, normalise(view_levels(batch.images, preprocessing), preprocessing))
    assert not torch.equal(images, normalise(batch.images, preprocessing))


def test_pictures_that_were_cropped_while_decoding_are_not_cropped_again() -> None:
    batch, preprocessing = batch_of(3, cropped=True), replace(SIZE_32, crop_fraction=0.75)
    for crop in ("resized", "padded", "none"):
        images, _ = Augment(replace(PLAIN, crop=crop, pad=0), preprocessing)(batch, classes=CLASSES)
        assert torch.equal(images, normalise(batch.images, SIZE_32))


EVERYTHING = {
    "resized": AugmentConfig(crop="resized"),
    "padded": AugmentConfig(crop="padded"),
    "randaugment": AugmentConfig(crop="padded", policy="randaugment"),
    "trivialaugment": AugmentConfig(crop="padded", policy="trivialaugment"),
    "jitter": AugmentConfig(crop="padded", color_jitter=0.4),
    "erase": AugmentConfig(crop="padded", erase=0.5),
    "cutout": AugmentConfig(crop="padded", cutout=8),
    "all": AugmentConfig(crop="padded", policy="autoaugment-cifar", color_jitter=0.4, erase=0.25, cutout=5),
}


@pytest.mark.parametrize("config", EVERYTHING.values(), ids=EVERYTHING)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_augmented_alike_alone_and_in_a_batch(config: AugmentConfig, channels: int) -> None:
    preprocessing = Preprocessing(image_size=(32, 32), channels=channels, mean=(0.47,), std=(0.25,))
    augment, batch = Augment(config, preprocessing), batch_of(24, channels=channels)
    together, _ = augment(batch, classes=CLASSES)
    alone = torch.cat([augment(part(batch, slice(i, i + 1)), classes=CLASSES)[0] for i in range(len(batch))])
    # Matrix products of the resized crop may sum in another order; all else is exact.
    torch.testing.assert_close(together, alone, atol=1e-5 if config.crop == "resized" else 0, rtol=0)
    assert not torch.equal(together, Augment(PLAIN, preprocessing)(batch, classes=CLASSES)[0])


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.8, "cutmix": 1.0}])
def test_augmentation_is_a_function_of_the_keys_and_leaves_the_batch_alone(mixing) -> None:
    config = AugmentConfig(crop="padded", policy="randaugment", erase=0.3, **mixing)
    augment, batch = Augment(config, SIZE_32), batch_of(16)
    before = batch.images.clone()
    first, again = augment(batch, classes=CLASSES), augment(batch, classes=CLASSES)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert torch.equal(batch.images, before)
    other = Batch(batch.images, batch.targets, sample_keys(1, 1, torch.arange(16)), cropped=False)
    assert not torch.equal(augment(other, classes=CLASSES)[0], first[0])


def test_flips_happen_to_the_drawn_pictures_at_the_set_rate() -> None:
    batch = batch_of(400, 8, 8)
    preprocessing = replace(SIZE_32, image_size=(8, 8))
    images, _ = Augment(replace(PLAIN, flip=0.3), preprocessing)(batch, classes=CLASSES)
    plain = normalise(batch.images, preprocessing)
    flipped = (images == plain.flip(-1)).flatten(1).all(dim=1)
    assert torch.equal(flipped, uniform(batch.keys, Draw.FLIP) < 0.3)
    assert torch.equal(images[~flipped], plain[~flipped])
    assert flipped.float().mean().item() == pytest.approx(0.3, abs=0.07)


def test_padded_crops_move_pixels_and_show_the_mean_colour_outside() -> None:
    batch = batch_of(200, 10, 12)
    preprocessing = replace(SIZE_32, image_size=(10, 12))
    images, _ = Augment(AugmentConfig(crop="padded", pad=3, flip=0.0), preprocessing)(batch, classes=CLASSES)
    plain = torch.nn.functional.pad(normalise(batch.images, preprocessing), (3, 3, 3, 3))
    top, left = choice(batch.keys, Draw.CROP_TOP, 7).tolist(), choice(batch.keys, Draw.CROP_LEFT, 7).tolist()
    for i in range(len(batch)):
        assert torch.equal(images[i], plain[i, :, top[i] : top[i] + 10, left[i] : left[i] + 12])
    assert len(set(zip(top, left, strict=True))) > 40


def test_padded_crops_of_other_sizes_start_from_the_evaluation_view() -> None:
    batch = batch_of(5, 40, 50)
    images, _ = Augment(AugmentConfig(crop="padded", flip=0.0), SIZE_32)(batch, classes=CLASSES)
    border = mean_levels(SIZE_32, torch.device("cpu"))
    expected = shift(view_levels(batch.images, SIZE_32), batch.keys, 4, border)
    assert torch.equal(images, normalise(expected, SIZE_32))


def test_padded_crops_start_from_the_evaluation_view_at_the_models_own_size_too() -> None:
    batch, preprocessing = batch_of(5, 32, 32), replace(SIZE_32, crop_fraction=0.75)
    images, _ = Augment(AugmentConfig(crop="padded", pad=0, flip=0.0), preprocessing)(batch, classes=CLASSES)
    assert torch.equal(images, normalise(view_levels(batch.images, preprocessing), preprocessing))


def test_padded_crops_come_after_the_policy() -> None:
    batch, config = batch_of(20), AugmentConfig(crop="padded", policy="autoaugment-cifar", flip=0.0)
    images, _ = Augment(config, SIZE_32)(batch, classes=CLASSES)
    border = mean_levels(SIZE_32, torch.device("cpu"))
    changed = apply_policy(batch.images.float().contiguous(), batch.keys, config, border.round())
    assert torch.equal(images, normalise(shift(changed, batch.keys, 4, border), SIZE_32))


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.8}])
def test_augmented_at_a_size_of_their_own_pictures_are_resized_last(mixing) -> None:
    size, large = (32, 32), replace(SIZE_32, image_size=(75, 75), fit="squash")
    settings = AugmentConfig(crop="padded", policy="autoaugment-cifar", cutout=16, **mixing)
    batch = batch_of(20)
    images, targets = Augment(replace(settings, size=size), large)(batch, classes=CLASSES)
    small, expected_targets = Augment(settings, SIZE_32)(batch, classes=CLASSES)
    levels = denormalise(small, SIZE_32)
    for side in ((32, 75), (75, 75)):  # torch's own filter; each axis is clipped to black and white, as in evaluation
        levels = F.interpolate(levels, size=side, mode="bicubic", antialias=True).clamp(0, 255)
    torch.testing.assert_close(images, normalise(levels, SIZE_32), rtol=0, atol=1e-3)
    assert images.shape == (20, 3, 75, 75) and torch.equal(targets, expected_targets)


def test_random_boxes_are_taken_to_the_size_to_augment_at() -> None:
    batch, small = batch_of(6, 40, 50), replace(SIZE_32, image_size=(16, 20))
    config = AugmentConfig(crop="resized", erase=0.5)
    images, _ = Augment(replace(config, size=(16, 20)), SIZE_32)(batch, classes=CLASSES)
    levels = denormalise(Augment(config, small)(batch, classes=CLASSES)[0], small)
    assert torch.equal(images, normalise(resample(levels, Box(0, 0, 16, 20), (32, 32), "bicubic"), SIZE_32))


@pytest.mark.parametrize("crop", ["padded", "none"])
@pytest.mark.parametrize("size", [None, (12, 12)])
def test_pictures_from_files_are_augmented_as_those_in_memory(photos: Path, crop, size) -> None:
    config, source = AugmentConfig(crop=crop, pad=2, size=size), open_data(photos).train
    preprocessing = replace(SIZE_32, crop_fraction=0.75)
    stream = Stream(source, preprocessing=preprocessing, augment=config, batch_size=6, workers=0)
    (batch,) = next(stream)
    assert batch.images.shape[2:] == (size or (32, 32))
    images, _ = Augment(config, preprocessing)(batch, classes=3)
    order = [stream._order.at(i).picture for i in range(6)]
    for row, picture in enumerate(order):
        pixels = torch.from_numpy(source.load(picture)).permute(2, 0, 1)[None]
        stored = Batch(pixels, batch.targets[row : row + 1], batch.keys[row : row + 1], cropped=False)
        alone, _ = Augment(config, preprocessing)(stored, classes=3)
        # Files are decoded to whole levels.
        torch.testing.assert_close(images[row : row + 1], alone, rtol=0, atol=2 / 255 / min(IMAGENET_STD))


def test_resized_crops_are_the_drawn_boxes() -> None:
    batch = batch_of(12, 40, 50)
    config = AugmentConfig(crop="resized", flip=0.0, crop_area=(0.1, 1.0))
    images, _ = Augment(config, SIZE_32)(batch, classes=CLASSES)
    heights, widths = torch.full((12,), 40), torch.full((12,), 50)
    boxes = random_boxes(batch.keys, heights, widths, config.crop_area, config.crop_ratio)
    for image, box, ours in zip(batch.images, boxes.int().tolist(), images, strict=True):
        top, left, height, width = box
        # A box of whole pixels differs from the cut-out picture only near its edges, where the filter reads beyond.
        cut = image[None, :, top : top + height, left : left + width]
        expected = normalise(view_levels(cut, replace(SIZE_32, fit="squash")), SIZE_32)[0]
        torch.testing.assert_close(ours[:, 8:24, 8:24], expected[:, 8:24, 8:24], atol=1e-3, rtol=0)


def test_random_boxes_lie_inside_and_follow_area_and_ratio() -> None:
    count, area, ratio = 20_000, (0.2, 0.5), (0.75, 4 / 3)
    heights, widths = torch.full((count,), 600), torch.full((count,), 800)
    boxes = random_boxes(keys_of(count), heights, widths, area, ratio)
    top, left, height, width = boxes.unbind(dim=1)
    assert torch.equal(boxes, boxes.round())
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 600).all() and (left + width <= 800).all()
    shares = (height * width / 480_000).numpy()
    shapes = (width / height).log().numpy()
    # These always fit at the first try, so the distributions are the plain ones.
    assert stats.kstest(shares, stats.uniform(0.2, 0.3).cdf).pvalue > 1e-3
    assert stats.kstest(shapes, stats.uniform(np.log(0.75), np.log(16 / 9)).cdf).pvalue > 1e-3
    places = (top / (600 - height + 1)).numpy(), (left / (800 - width + 1)).numpy()
    for place in places:
        assert np.histogram(place, bins=4, range=(0, 1))[0] == pytest.approx(count / 4, rel=0.05)
    assert abs(np.corrcoef(places)[0, 1]) < 0.03


def test_boxes_do_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    heights, widths = (torch.randint(1, 3000, (300,), generator=generator) for _ in range(2))
    keys, area, ratio = keys_of(300), (0.08, 1.0), (0.75, 4 / 3)
    together = random_boxes(keys, heights, widths, area, ratio)
    for i in range(300):
        one = slice(i, i + 1)
        assert torch.equal(together[one], random_boxes(keys[one], heights[one], widths[one], area, ratio))
    assert (together[:, 2:] >= 1).all()


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(crop="resized"),
        AugmentConfig(crop="resized", crop_area=(0.9, 1.0)),  # some find no box that fits
        AugmentConfig(crop="resized", crop_area=(0.001, 0.002), crop_ratio=(0.3, 2.9)),
        AugmentConfig(crop="random"),
    ],
)
def test_boxes_drawn_one_by_one_are_those_of_the_batch(config: AugmentConfig) -> None:
    count, view = 2000, replace(SIZE_32, image_size=(40, 32), crop_fraction=0.875)
    generator = torch.Generator().manual_seed(1)
    sides = (2 ** (12 * torch.rand(2, count, generator=generator))).long()
    sides[:, :50] = torch.tensor([1, 7])[:, None]
    together = training_boxes(keys_of(count), sides[0], sides[1], config, view).tolist()
    draws = BoxDraws(keys_of(count), config, view)
    for row, box in enumerate(together):
        assert list(draws.box(row, *sides[:, row].tolist())) == box


@pytest.mark.parametrize(("size", "expected"), [((100, 1000), [0, 433, 100, 133]), ((1000, 100), [433, 0, 133, 100])])
def test_pictures_that_no_box_fits_get_the_largest_centre_box(size, expected) -> None:
    heights, widths = (torch.full((500,), n) for n in size)
    boxes = random_boxes(keys_of(500), heights, widths, (0.9, 1.0), (0.75, 4 / 3))
    assert (boxes == torch.tensor(expected, dtype=torch.float32)).all()


def test_colour_jitter_changes_brightness_contrast_and_saturation_in_turn() -> None:
    batch = batch_of(50)
    images, factors = batch.images.float(), []
    expected = images
    for draw, operation in ((Draw.BRIGHTNESS, brightness), (Draw.CONTRAST, contrast), (Draw.SATURATION, color)):
        factors.append(0.6 + 0.8 * uniform(batch.keys, draw))
        expected = operation(expected, factors[-1])
    assert torch.equal(jitter(images, batch.keys, 0.4), expected)
    assert torch.cat(factors).min() < 0.65 and torch.cat(factors).max() > 1.35
    # Stronger than 1: factors start at 0, not below.
    black = jitter(images, batch.keys, 3.0)
    assert black.min() >= 0 and black.max() <= 255


def test_erasing_puts_normal_noise_into_one_rectangle() -> None:
    keys = keys_of(600)
    images = torch.full((600, 3, 32, 40), 7.0)
    erase(images, keys, 0.5)
    erased = images != 7.0
    hit = erased.flatten(1).any(dim=1)
    assert hit.float().mean().item() == pytest.approx(0.5, abs=0.07)
    assert torch.equal(erased[:, 0], erased[:, 1]) and torch.equal(erased[:, 0], erased[:, 2])
    noise = normal(keys, Draw.ERASE_NOISE, (3, 32, 40))
    assert torch.equal(images, torch.where(erased, noise, 7.0))
    rows, columns = erased[hit, 0].any(dim=2).sum(dim=1), erased[hit, 0].any(dim=1).sum(dim=1)
    assert torch.equal(erased[hit, 0].sum(dim=(1, 2)), rows * columns)  # filled rectangles
    shares = rows * columns / (32 * 40)
    assert shares.min() > 0.01 and shares.max() < 0.35 and shares.max() > 0.28
    assert (rows / columns).max() < 4 and (rows / columns).min() > 0.25


@pytest.mark.parametrize("side", [5, 8])
def test_cutout_sets_a_square_to_zero(side: int) -> None:
    images = torch.ones(500, 1, 20, 24)
    cutout(images, keys_of(500), side)
    hole = images[:, 0] == 0
    rows, columns = hole.any(dim=2).sum(dim=1), hole.any(dim=1).sum(dim=1)
    assert torch.equal(hole.sum(dim=(1, 2)), rows * columns)
    assert rows.max() == side and columns.max() == side
    assert rows.min() < side and rows.min() >= side // 2  # some are cut off, none beyond their middle
    assert hole.any(dim=0).all()  # every pixel is hit now and then


def test_mixup_averages_neighbours_and_targets_alike() -> None:
    keys, targets = keys_of(300), torch.eye(CLASSES)[torch.arange(300) % CLASSES]
    images = torch.randn(300, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    mixed, soft = mix(images.clone(), targets, keys, mixup=0.8, cutmix=0.0)
    shares = soft.gather(1, targets.argmax(dim=1, keepdim=True))[:, 0]
    assert shares.min() >= 0.5 and shares.max() > 0.99 and shares.min() < 0.55
    weights = shares.view(-1, 1, 1, 1)
    torch.testing.assert_close(mixed, weights * images + (1 - weights) * images.roll(1, 0), atol=1e-5, rtol=0)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(300))
    assert torch.equal((soft > 0).sum(dim=1) <= 2, torch.ones(300, dtype=torch.bool))
    folded = stats.beta(0.8, 0.8)
    assert stats.kstest(shares.numpy(), lambda x: folded.cdf(x) - folded.cdf(1 - x)).pvalue > 1e-3


def test_cutmix_targets_match_the_area_really_pasted() -> None:
    keys, targets = keys_of(300), torch.eye(CLASSES)[torch.arange(300) % CLASSES]
    images = torch.arange(300.0).view(-1, 1, 1, 1).expand(-1, 3, 16, 12)
    mixed, soft = mix(images.clone(), targets, keys, mixup=0.0, cutmix=1.0)
    own = mixed[:, 0] == images[:, 0]
    assert torch.equal(torch.where(own[:, None], images, images.roll(1, 0)), mixed)  # own or neighbour, nothing else
    shares = soft.gather(1, targets.argmax(dim=1, keepdim=True))[:, 0]
    torch.testing.assert_close(shares, own.float().mean(dim=(1, 2)))
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(300))
    rows, columns = (~own).any(dim=2).sum(dim=1), (~own).any(dim=1).sum(dim=1)
    assert torch.equal((~own).sum(dim=(1, 2)), rows * columns)
    assert (
        shares.min() < 0.2 and shares.max() == 1.0 and shares.mean().item() == pytest.approx(0.68, abs=0.05)
    )  # 1 - E[(s - s^2 / 4)^2], s^2 uniform


def test_with_mixup_and_cutmix_each_batch_takes_one_of_them() -> None:
    images, targets = torch.rand(4, 1, 8, 8), torch.eye(4)
    mixups = 0
    for index in range(200):
        keys = sample_keys(0, index, torch.arange(4))
        both = mix(images.clone(), targets, keys, mixup=0.5, cutmix=0.5)
        singles = [
            mix(images.clone(), targets, keys, mixup=0.5, cutmix=0.0),
            mix(images.clone(), targets, keys, mixup=0.0, cutmix=0.5),
        ]
        matches = [
            all(torch.allclose(a, b, atol=1e-6) for a, b in zip(both, single, strict=True)) for single in singles
        ]
        assert any(matches)
        mixups += matches[0]
    assert 70 < mixups < 130


def test_several_labels_per_picture_stay_and_mix() -> None:
    batch = batch_of(4)
    labels = torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]])
    many = Batch(batch.images, labels, batch.keys, cropped=False)
    assert torch.equal(Augment(PLAIN, SIZE_32)(many, classes=3)[1], labels)
    _, mixed = Augment(replace(PLAIN, mixup=1.0), SIZE_32)(many, classes=3)
    assert ((mixed >= 0.5) | (labels == 0)).all() and not torch.equal(mixed, labels)


def test_colour_pictures_for_a_grey_model_are_refused() -> None:
    preprocessing = Preprocessing(image_size=(32, 32), channels=1, mean=(0.5,), std=(0.5,))
    for crop in ("resized", "padded", "none"):
        with pytest.raises(UserError, match="the model takes grey"):
            Augment(AugmentConfig(crop=crop), preprocessing)(batch_of(2), classes=CLASSES)


class OnMps(torch.Tensor):
    """Keys that say they are on MPS, which has no fp64."""

    device = torch.device("mps")  # pyright: ignore


def test_boxes_at_a_random_place_need_no_fp64_on_mps(monkeypatch) -> None:
    monkeypatch.setattr("vitrail.data.boxes.uniform", lambda keys, draw: torch.full((2,), 0.5))
    sizes, config = (torch.tensor([40, 90]), torch.tensor([60, 70])), AugmentConfig(crop="random")
    keys = torch.arange(2)
    boxes, exact = (training_boxes(each, *sizes, config, SIZE_32) for each in (keys.as_subclass(OnMps), keys))
    assert boxes.dtype == torch.float32
    assert exact.dtype == torch.float64
    torch.testing.assert_close(boxes.double(), exact)


def test_extreme_pictures_and_crops_still_become_the_models_size() -> None:
    # Extreme boxes: one pixel high pictures, tiny areas.
    config = AugmentConfig(crop="resized", crop_area=(0.001, 0.01), flip=0.5)
    for height, width in ((1, 50), (50, 1), (3, 3)):
        images, _ = Augment(config, SIZE_32)(batch_of(8, height, width), classes=CLASSES)
        assert images.shape == (8, 3, 32, 32) and torch.isfinite(images).all()
