"""Policy operations against Pillow, and the policies' tables and odds."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from vitrail.config.run import AugmentConfig
from vitrail.data import operations as ops
from vitrail.data import policies
from vitrail.data.random import sample_keys

FILL = 128


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:45, :60]
    return [
        rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
        rng.integers(60, 200, (47, 33, 3), dtype=np.uint8),
        np.stack([x * 4, y * 5, (x + y) * 2], axis=-1).astype(np.uint8),
        (rng.random((64, 64, 3)) ** 4 * 255).astype(np.uint8),
        np.full((20, 20, 3), 77, np.uint8),
    ]


def as_modes(picture: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(picture), Image.fromarray(picture).convert("L")]


def tensor(image: Image.Image) -> torch.Tensor:
    pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)[None].float()


def difference(ours: torch.Tensor, theirs: Image.Image) -> torch.Tensor:
    """Return absolute differences in levels, after a check that ours are whole levels."""
    assert torch.equal(ours, ours.round()) and ours.min() >= 0 and ours.max() <= 255
    return (ours - tensor(theirs)).abs()


def one(value: float) -> torch.Tensor:
    return torch.tensor([float(value)])


@pytest.mark.parametrize("picture", pictures())
def test_operations_without_strength_are_pillows(picture: np.ndarray) -> None:
    for image in as_modes(picture):
        images = tensor(image)
        assert difference(ops.equalize(images), ImageOps.equalize(image)).max() == 0
        assert difference(ops.invert(images), ImageOps.invert(image)).max() == 0
        stretched = difference(ops.auto_contrast(images), ImageOps.autocontrast(image))
        assert stretched.max() <= 1 and (stretched > 0).float().mean() < 0.02


@pytest.mark.parametrize("picture", pictures())
def test_posterize_and_solarize_are_pillows(picture: np.ndarray) -> None:
    for image in as_modes(picture):
        images = tensor(image)
        for bits in range(1, 9):
            assert difference(ops.posterize(images, one(bits)), ImageOps.posterize(image, bits)).max() == 0
        assert (ops.posterize(images, one(0)) == 0).all()
        for threshold in (0, 1, 128, 255, 256):
            assert difference(ops.solarize(images, one(threshold)), ImageOps.solarize(image, threshold)).max() == 0


@pytest.mark.parametrize("picture", pictures())
@pytest.mark.parametrize("name", policies.ENHANCE)
def test_enhancements_are_pillows(picture: np.ndarray, name: str) -> None:
    for image in as_modes(picture):
        for factor in (0.0, 0.1, 0.37, 1.0, 1.3, 1.9, 2.5):
            ours = policies.WITH_ARGUMENT[name](tensor(image), one(factor))
            assert difference(ours, getattr(ImageEnhance, name)(image).enhance(factor)).max() == 0


def test_solarize_add_brightens_the_dark_half() -> None:
    levels = torch.arange(256.0).view(1, 1, 16, 16)
    expected = [min(255, level + 110) if level < 128 else level for level in range(256)]
    assert ops.solarize_add(levels, one(110)).flatten().tolist() == expected
    expected = [max(0, level - 50) if level < 128 else level for level in range(256)]
    assert ops.solarize_add(levels, one(-50)).flatten().tolist() == expected


def affine_matrix(name: str, amount: float) -> tuple[float, ...]:
    return {
        "ShearX": (1, amount, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, amount, 1, 0),
        "TranslateX": (1, 0, amount, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, amount),
    }[name]


@pytest.mark.parametrize("picture", pictures())
def test_shears_translations_and_rotations_are_pillows_within_a_level(picture: np.ndarray) -> None:
    bilinear = Image.Resampling.BILINEAR
    amounts = {"ShearX": (-0.7, 0.3), "ShearY": (-0.3, 0.99), "TranslateX": (-7, 40), "TranslateY": (-40, 3)}
    for image in as_modes(picture):
        images, size = tensor(image), (image.height, image.width)
        fill = torch.full((images.shape[1], 1, 1), float(FILL))
        color = (FILL,) * len(image.getbands())
        for name, values in amounts.items():
            for amount in values:
                ours = ops.affine(images, ops.affine_maps(name, one(amount), size), fill)
                matrix = affine_matrix(name, amount)
                theirs = image.transform(image.size, Image.Transform.AFFINE, matrix, bilinear, fillcolor=color)
                assert difference(ours, theirs).max() <= (1 if name.startswith("Shear") else 0)
        for degrees in (-135, -30, 17, 90):
            ours = ops.affine(images, ops.affine_maps("Rotate", one(degrees), size), fill)
            assert difference(ours, image.rotate(degrees, bilinear, fillcolor=color)).max() <= 1


def test_cutout_fills_a_square_that_the_edges_cut_off() -> None:
    fill = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    half, rows, columns = torch.tensor([2.0, 0.0]), torch.tensor([1, 5]), torch.tensor([6, 5])
    out = ops.cutout(torch.full((2, 3, 8, 8), 9.0), half, rows, columns, fill)
    expected = torch.full((2, 3, 8, 8), 9.0)
    expected[0, :, 0:3, 4:8] = fill
    assert torch.equal(out, expected)


def test_strengths_are_per_picture() -> None:
    images = tensor(Image.fromarray(pictures()[0])).repeat(3, 1, 1, 1)
    amounts = {"Posterize": [1.0, 4.0, 8.0], "Solarize": [0.0, 99.0, 256.0], "SolarizeAdd": [0.0, 30.0, 110.0]}
    amounts |= {name: [0.1, 1.0, 1.9] for name in policies.ENHANCE}
    assert amounts.keys() == policies.WITH_ARGUMENT.keys()
    for name, values in amounts.items():
        operation = policies.WITH_ARGUMENT[name]
        alone = [operation(images[:1], one(value)) for value in values]
        assert torch.equal(operation(images, torch.tensor(values)), torch.cat(alone))
        assert not torch.equal(alone[0], alone[2])


def test_randaugment_has_the_ranges_of_the_official_code_at_224_pixels() -> None:
    size = (224, 224)
    at = {
        level: {n: policies.randaugment_argument(n, level, size) for n in policies.RANDAUGMENT}
        for level in (0.0, 10.0, 15.0)
    }
    assert len(at[10]) == 16
    official = {"Rotate": 30, "Posterize": 4, "Solarize": 256, "SolarizeAdd": 110, "Color": 1.9, "Contrast": 1.9}
    official |= {"Brightness": 1.9, "Sharpness": 1.9, "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 100}
    official |= {"TranslateY": 100, "Cutout": 40, "AutoContrast": 0, "Equalize": 0, "Invert": 0}
    assert at[10] == pytest.approx(official)
    # Level 0 still acts: no bits are kept, everything is inverted, colours are nearly gone.
    assert (at[0]["Posterize"], at[0]["Solarize"], at[0]["Color"]) == (0, 0, 0.1)
    assert (at[15]["Posterize"], at[15]["Cutout"], at[15]["ShearX"]) == pytest.approx((6, 60, 0.45))


def test_trivialaugment_has_the_wide_space_of_the_official_code() -> None:
    argument = policies.trivialaugment_argument
    assert len(policies.TRIVIALAUGMENT) == 14
    last = {"ShearX": 0.99, "TranslateY": 32, "Rotate": 135, "Posterize": 2, "Solarize": 0, "Sharpness": 2.0}
    first = {"ShearX": 0, "TranslateY": 0, "Rotate": 0, "Posterize": 8, "Solarize": 256, "Sharpness": 0.01}
    assert {name: argument(name, 30) for name in last} == pytest.approx(last)
    assert {name: argument(name, 0) for name in first} == pytest.approx(first)
    assert argument("Rotate", 7) == 31  # whole degrees


def test_autoaugment_has_25_pairs_and_the_ranges_of_the_paper() -> None:
    for table in (policies.AUTOAUGMENT_IMAGENET, policies.AUTOAUGMENT_CIFAR):
        assert len(table) == 25
        assert all(
            name in policies.OPERATIONS and 0 <= p <= 1 and 0 <= level <= 9 for pair in table for name, p, level in pair
        )
    last = {"ShearY": 0.3, "TranslateX": 150, "Rotate": 30, "Posterize": 4, "Solarize": 0, "Contrast": 1.9}
    assert {name: policies.autoaugment_argument(name, 9, (331, 331)) for name in last} == pytest.approx(last)
    assert policies.autoaugment_argument("Color", 0, (32, 32)) == pytest.approx(0.1)


def test_every_operation_is_drawn_equally_often() -> None:
    keys = sample_keys(0, 0, torch.arange(20_000))
    for policy, names in (("randaugment", policies.RANDAUGMENT), ("trivialaugment", policies.TRIVIALAUGMENT)):
        config = AugmentConfig(policy=policy, operations=3)
        numbers, arguments = policies.plan_policy(keys, config, (32, 32))
        assert numbers.shape == arguments.shape == (20_000, 3 if policy == "randaugment" else 1)
        for turn in numbers.unbind(dim=1):
            shares = torch.bincount(turn, minlength=len(policies.OPERATIONS)) / len(turn)
            for name, share in zip(policies.OPERATIONS, shares.tolist(), strict=True):
                assert share == pytest.approx(1 / len(names) if name in names else 0, abs=0.008)


def test_autoaugment_draws_pairs_evenly_and_operations_with_their_probability() -> None:
    keys = sample_keys(0, 0, torch.arange(40_000))
    config = AugmentConfig(policy="autoaugment-cifar")
    numbers, _ = policies.plan_policy(keys, config, (32, 32))
    for turn in (0, 1):
        expected = dict.fromkeys(policies.OPERATIONS, 0.0)
        for pair in policies.AUTOAUGMENT_CIFAR:
            name, probability, _ = pair[turn]
            expected[name] += probability / 25
            expected["Identity"] += (1 - probability) / 25
        shares = torch.bincount(numbers[:, turn], minlength=len(policies.OPERATIONS)) / len(keys)
        assert shares.tolist() == pytest.approx(list(expected.values()), abs=0.01)


def test_half_of_the_translations_go_the_other_way() -> None:
    keys = sample_keys(0, 0, torch.arange(4000))
    images = torch.zeros(4000, 1, 9, 9)
    images[:, :, 0, 4] = 255.0
    config = AugmentConfig(policy="randaugment", operations=1)
    names = policies.plan_policy(keys, config, (9, 9))[0][:, 0]
    rows = names == policies.OPERATIONS.index("TranslateX")
    moved = policies.apply_policy(images, keys, config, torch.zeros(1, 1, 1))[rows]
    columns = moved[:, 0, 0].argmax(dim=1)
    assert set(columns.tolist()) == {0, 8}  # 100 of 224 pixels are 4 of 9
    assert (columns == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment", "autoaugment-imagenet", "autoaugment-cifar"])
@pytest.mark.parametrize("channels", [1, 3])
def test_policies_treat_every_picture_on_its_own(policy, channels: int) -> None:
    keys = sample_keys(3, 1, torch.arange(60))
    images = torch.randint(0, 256, (60, channels, 24, 20), generator=torch.Generator().manual_seed(0)).float()
    config, fill = AugmentConfig(policy=policy, magnitude=7.0), torch.full((channels, 1, 1), 100.0)
    together = policies.apply_policy(images.clone(), keys, config, fill)
    alone = [policies.apply_policy(images[i : i + 1].clone(), keys[i : i + 1], config, fill) for i in range(60)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, together.round()) and together.min() >= 0 and together.max() <= 255
    changed = (together != images).flatten(1).any(dim=1).float().mean()
    assert changed > 0.6
