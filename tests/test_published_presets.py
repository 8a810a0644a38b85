"""Published recipes say what their papers say: sizes, lengths, schedules; and what they needed new is exact."""

import re
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from families import TINY
from PIL import Image
from torch import nn

from vitrail.checkpoints import save_model
from vitrail.config.model import ALIASES, MODELS
from vitrail.config.preprocessing import Preprocessing
from vitrail.config.run import AugmentConfig, OptimConfig, RunConfig, SupervisedConfig
from vitrail.data import open_data, policies
from vitrail.data.augment import Augment, training_boxes
from vitrail.data.base import Batch
from vitrail.data.random import sample_keys
from vitrail.data.stream import Stream
from vitrail.errors import UserError
from vitrail.models import build
from vitrail.optim import build_optimizer, learning_rate, parameter_groups
from vitrail.optimizers import RMSProp
from vitrail.presets import PRESETS, Preset, preset
from vitrail.presets.augreg import AUGREG_PRESETS, LEVELS
from vitrail.presets.big_vision import BIG_VISION_PRESETS
from vitrail.presets.coatnet import COATNET_PRESETS
from vitrail.presets.cvt import CVT_PRESETS
from vitrail.presets.data_sets import DATA_SETS
from vitrail.presets.efficientnet import EFFICIENTNET_PRESETS
from vitrail.presets.imagenet21k import IMAGENET21K_PRESETS
from vitrail.presets.mae import MAE_PRESETS
from vitrail.presets.plain_vit import PLAIN_VIT_PRESETS
from vitrail.presets.vit import VIT_PRESETS
from vitrail.presets.vit_g import VIT_G_PRESETS
from vitrail.presets.vmoe import VMOE_PRESETS
from vitrail.training.setup import build_model

PARTS = (
    VIT_PRESETS,
    AUGREG_PRESETS,
    PLAIN_VIT_PRESETS,
    BIG_VISION_PRESETS,
    VIT_G_PRESETS,
    VMOE_PRESETS,
    CVT_PRESETS,
    COATNET_PRESETS,
    EFFICIENTNET_PRESETS,
    IMAGENET21K_PRESETS,
    MAE_PRESETS,
)
PUBLISHED: dict[str, Preset] = {name: each for part in PARTS for name, each in part.items()}
# What a recipe, not a size, says of a model.
OF_RECIPES = {"image_size", "num_classes", "dropout", "drop_path", "head_bias", "pre_logits", "pool", "positions"}
OF_RECIPES |= {"gelu", "expert_dropout", "train_capacity_factor", "experts", "stride_in"}


def steps_of(config: RunConfig, pictures: int) -> int:
    assert config.loop.epochs is not None
    return int(config.loop.epochs * pictures / config.loop.batch_size)


def count(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(PUBLISHED[name].config.model).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_told_by_its_name_at_its_published_size(name: str) -> None:
    config = PUBLISHED[name].config
    size = max((size for size in MODELS if name.startswith(f"{size}-")), key=len)
    own = {f.name: getattr(config.model, f.name) for f in fields(config.model)}
    for field, value in own.items():
        if field not in OF_RECIPES:
            assert value == getattr(MODELS[size], field), field
    task = name.partition("-from-")[0]
    data = max((data for data in DATA_SETS if re.search(rf"-{data}(-|$)", task)), key=len)
    assert config.input.val_fraction == DATA_SETS[data].held_out
    if "masked" not in name and "mae" not in name:
        assert config.model.num_classes == DATA_SETS[data].classes
    pixels = re.search(r"-(\d{3})$", task)
    if pixels:
        assert config.model.image_size == (int(pixels[1]),) * 2


# Parameters with the head of the task: computed from the official code, and in print.
PARAMETERS = {
    "vit-b16-imagenet-384": 86_859_496,
    "vit-h14-imagenet-518": 633_470_440,
    "vit-l16-imagenet21k": 326_740_307,
    "vit-gigantic14-jft3b": 1_930_404_761,
    "vmoe-15b-jft3b": 14_705_071_769,
    "cvt-w24-imagenet-384": 277_196_392,
    "coatnet-5-jft300m": 687_052_952 + 17_291 * 2049,
    "vit-b16-21kp-imagenet21kp": 94_399_957,
    "efficientnet-b7-imagenet": 66_347_960,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_of_presets_have_the_published_number_of_parameters(name: str) -> None:
    assert count(name) == PARAMETERS[name]


def test_presets_of_several_papers_do_not_share_a_name() -> None:
    assert sum(map(len, PARTS)) == len(PUBLISHED)
    assert all(PRESETS[name] is each for name, each in PUBLISHED.items())


def test_the_leaderboards_names_stand_for_one_preset_each() -> None:
    aliases = Counter(each.alias for each in PRESETS.values() if each.alias)
    assert set(aliases.values()) == {1}
    elsewhere = {"EffNet-L2 (SAM)", "Meta Pseudo Labels (EfficientNet-L2)"}
    models = {"ViT-B/16", "ViT-g/14"}  # no rows of the leaderboards
    here = {each.alias: name for name, each in PUBLISHED.items() if each.alias}
    assert here.keys() == ALIASES.keys() - elsewhere - models
    for alias, name in here.items():
        assert name.startswith(ALIASES[alias])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_says_whose_it_is_and_what_it_reached(name: str) -> None:
    each = PUBLISHED[name]
    assert "arXiv" in each.source
    # Of figure 4 of AugReg only the best cells have numbers.
    assert each.published or (name in AUGREG_PRESETS and each.group == "pre-train")
    assert not each.measured
    assert each.config.data is None and each.config.out is None and each.config.init is None
    assert ("(--init)" in each.purpose) == each.needs_init
    if each.group == "fine-tune":
        assert each.needs_init


@pytest.mark.parametrize(
    ("name", "pictures", "steps"),
    [
        ("vit-s16-imagenet-90ep", 0.99 * 1_281_167, 111_500),  # as derived from big_vision's configuration
        ("vit-b16-jft300m-masked", 303e6, 1_000_000),  # "ca. 14 epochs", ViT paper B.1.2
        ("efficientnet-b0-imagenet", 1_281_167, 218_949 / 2),  # the flag's steps are of batches half as large
        ("vit-l16-imagenet-mae-800ep", 1_281_167, 800 * 312),  # whole batches in an epoch, main_pretrain.py
    ],
)
def test_epochs_come_to_the_published_number_of_updates(name: str, pictures: float, steps: float) -> None:
    assert steps_of(PUBLISHED[name].config, int(pictures)) == pytest.approx(steps, rel=0.04)


def rates(name: str, total: int) -> dict[int, float]:
    """A preset's learning rates, relative to the peak, at a few updates."""
    optim = PUBLISHED[name].config.optim
    return {step: learning_rate(optim, step, total) / optim.lr for step in range(0, total + 1, 5_000)}


def test_vit_g_follows_the_official_rates() -> None:
    """big_vision `create_learning_rate_schedule`; it counts the first update as 0, here it does something."""
    for name in ("vit-giant14-jft3b", "vit-gigantic14-jft3b"):
        config = PUBLISHED[name].config
        assert config.loop.steps == 1_000_000
        ours = rates(name, 1_000_000)
        official = {0: 0, 5_000: 0.5, 10_000: 1, 20_000: 0.70711, 500_000: 0.14142, 950_000: 0.10260}
        official |= {975_000: 0.05064, 1_000_000: 0}
        assert {step: ours[step] for step in official} == pytest.approx(official, abs=1.1e-4)


def test_vit_g_decays_its_head_a_hundred_times_as_much() -> None:
    optim = PUBLISHED["vit-gigantic14-jft3b"].config.optim
    vit = build(replace(TINY["vit"], pool="map"))
    decays = {name: g["weight_decay"] for g in parameter_groups(vit, optim) for name in names_in(vit, g)}
    assert decays["head.weight"] == 3.0
    assert decays["encoder.0.mlp.up.weight"] == 0.03
    assert decays["head.bias"] == decays["encoder.0.norm1.weight"] == 0.0


def names_in(model: nn.Module, group: dict) -> list[str]:
    members = {id(parameter) for parameter in group["params"]}
    return [name for name, parameter in model.named_parameters() if id(parameter) in members]


def test_vit_g_is_fine_tuned_at_a_flat_rate_and_averaged() -> None:
    optim = PUBLISHED["vit-gigantic14-imagenet"].config.optim
    assert {learning_rate(optim, step, 20_000) for step in (499, 500, 10_000, 19_999)} == {optim.lr}
    assert optim.ema == 0.9999


@pytest.mark.parametrize("name", [name for name in PUBLISHED if PUBLISHED[name].config.optim.min_lr])
def test_schedules_end_at_their_floor(name: str) -> None:
    optim = PUBLISHED[name].config.optim
    warmup = optim.warmup_steps
    total = 10 * warmup
    assert learning_rate(optim, warmup, total) == pytest.approx(optim.lr)
    assert learning_rate(optim, total, total) == pytest.approx(optim.min_lr)
    middle = warmup + (total - warmup) // 2
    assert learning_rate(optim, middle, total) == pytest.approx((optim.lr + optim.min_lr) / 2, rel=1e-3)


def test_a_peak_below_the_floor_stays_where_it_is() -> None:
    for schedule in ("cosine", "linear"):
        optim = OptimConfig(lr=1e-6, min_lr=1e-5, schedule=schedule)
        assert {learning_rate(optim, step, 100) for step in (0, 50, 99)} == {1e-6}


def test_efficientnets_rate_falls_by_three_percent_every_2_4_epochs() -> None:
    """tensorflow/tpu `build_learning_rate`: counted from the first update, in stairs, after five epochs of warm-up."""
    config = PUBLISHED["efficientnet-b0-imagenet"].config
    epoch, total = 1_281_167 / 4096, steps_of(config, 1_281_167)
    assert config.optim.lr == pytest.approx(0.256)
    assert learning_rate(config.optim, int(2.5 * epoch), total) == pytest.approx(0.128, rel=1e-2)
    for epochs in (5.1, 7.0, 7.3, 100.7, 349.0):
        official = 0.256 * 0.97 ** (epochs // 2.4)
        assert learning_rate(config.optim, int(epochs * epoch), total) == pytest.approx(official, rel=1e-6)


def test_of_augregs_pre_trainings_only_the_best_of_a_size_carry_its_figure() -> None:
    published = {name for name, each in AUGREG_PRESETS.items() if each.group == "pre-train" and each.published}
    assert published == {"vit-b16-imagenet21k-medium1"}  # others were best at a level or decay that is no preset
    assert "85.49" in AUGREG_PRESETS["vit-b16-imagenet21k-medium1"].published


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_warm_up_that_a_run_is_too_short_for_is_told(name: str) -> None:
    config = PUBLISHED[name].config
    data = max((data for data in DATA_SETS if re.search(rf"-{data}(-|$)", name)), key=len)
    pictures = int(DATA_SETS[data].pictures * (1 - config.input.val_fraction))
    steps = config.loop.steps or int((config.loop.epochs or 0) * (pictures // config.loop.batch_size))
    assert config.optim.warmup_steps <= steps // 5 or f"{steps // 5:,} updates" in PUBLISHED[name].departs


def test_augreg_turns_augmentation_up_level_by_level() -> None:
    for data in ("imagenet", "imagenet21k"):
        runs = [PUBLISHED[f"vit-b16-{data}-{level}"].config for level in LEVELS]
        assert len(runs) == 7
        strengths = [r.augment.magnitude if r.augment.policy == "randaugment" else -1.0 for r in runs]
        assert strengths == [-1.0, 0.0, 10.0, 15.0, 15.0, 20.0, 20.0]
        assert [r.augment.mixup for r in runs] == [0.0, 0.0, 0.2, 0.2, 0.5, 0.5, 0.8]
        plain = {replace(r, augment=AugmentConfig()) for r in runs}
        assert len(plain) == 1
        assert isinstance(runs[0].recipe, SupervisedConfig) and runs[0].recipe.loss == "sigmoid"


@pytest.mark.parametrize("name", [n for n in PUBLISHED if n.startswith("vit") and PUBLISHED[n].config.loop.steps])
def test_fine_tuning_as_the_vit_paper(name: str) -> None:
    each = PUBLISHED[name].config
    if each.optim.name == "adafactor":
        return
    assert (each.optim.name, each.optim.momentum, each.optim.clip_norm) == ("sgd", 0.9, 1.0)
    assert (each.optim.weight_decay, each.model.dropout, each.augment.policy) == (0.0, 0.0, "none")
    steps = {"imagenet": 20_000, "cifar10": 10_000, "cifar100": 10_000, "pets": 500, "flowers": 500}
    data = next(data for data in steps if re.search(rf"-{data}(-|$)", name))
    assert (each.loop.batch_size, each.loop.steps) == (512, steps[data])
    assert each.optim.warmup_steps == (100 if steps[data] == 500 else 500)


def test_coatnet_6_and_7_take_the_column_of_5_and_say_so() -> None:
    five = PUBLISHED["coatnet-5-imagenet-512-from-jft300m"].config
    for size in (6, 7):
        each = preset(f"CoAtNet-{size}")
        assert "no recipe" in each.departs
        assert replace(each.config, model=five.model) == five


def test_fine_tuned_mixtures_keep_what_is_of_the_run(photos, tmp_path) -> None:
    """Room in the experts and dropout are the preset's, not the weights'."""
    released = replace(TINY["vit-moe"], train_capacity_factor=1.05, expert_dropout=0.0)
    save_model(build(released), tmp_path / "weights")
    wanted = replace(released, train_capacity_factor=1.5, expert_dropout=0.1)
    run = RunConfig(data=str(photos), init=str(tmp_path / "weights"), model=wanted)
    model = build_model(run, open_data(str(photos), val_fraction=0.2))
    assert model.config == replace(wanted, num_classes=3, head_bias=0.0, pre_logits=0)


def test_all_parameters_decay_where_they_are_to() -> None:
    model = build(TINY["vit-moe"])
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1, decay="all"))
    assert [group["weight_decay"] for group in groups] == [0.1]
    assert len(groups[0]["params"]) == len(list(model.parameters()))


def gradients(steps: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).normal(size=(steps, 6)))


def test_rmsprop_makes_tensorflows_steps() -> None:
    """`tf.train.RMSPropOptimizer(lr, 0.9, 0.9, 1e-3)`, with half the squared weights times 1e-2 in the loss."""
    weight = nn.Parameter(torch.linspace(-1.0, 1.0, 6, dtype=torch.float64))
    optimizer = RMSProp([{"params": [weight], "weight_decay": 1e-2}], lr=0.1, momentum=0.9)
    expected, square, step = weight.detach().numpy().copy(), np.ones(6), np.zeros(6)
    for i, gradient in enumerate(gradients(5)):
        optimizer.param_groups[0]["lr"] = rate = 0.1 * 0.5**i
        weight.grad = torch.from_numpy(gradient)
        optimizer.step()
        full = gradient + 1e-2 * expected
        square += (1 - 0.9) * (full**2 - square)
        step = 0.9 * step + rate * full / np.sqrt(square + 1e-3)
        expected = expected - step
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-10)


def test_rmsprop_goes_on_where_it_stopped() -> None:
    def run(stop: int | None) -> torch.Tensor:
        weight = nn.Parameter(torch.ones(6, dtype=torch.float64))
        optimizer = RMSProp([weight], lr=0.1)
        for i, gradient in enumerate(gradients(6)):
            if i == stop:
                state, optimizer = optimizer.state_dict(), RMSProp([weight], lr=0.1)
                optimizer.load_state_dict(state)
            weight.grad = torch.from_numpy(gradient)
            optimizer.step()
        return weight.detach()

    assert torch.equal(run(None), run(3))


def test_adam_has_its_decay_in_the_gradient() -> None:
    model = build(TINY["vit"])
    optimizer = build_optimizer(model, OptimConfig(name="adam", lr=0.01, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    kernel = "encoder.0.mlp.up.weight"  # a gradient of decay alone: Adam's first step is the rate, whatever its size
    moved = dict(model.named_parameters())
    torch.testing.assert_close(moved[kernel], before[kernel] - 0.01 * before[kernel].sign(), atol=1e-5, rtol=0)
    assert torch.equal(moved["norm.weight"], before["norm.weight"])


@pytest.mark.parametrize("wrong", [{"min_lr": -1.0}, {"decay_steps": 0}, {"decay_factor": 0.0}, {"decay_factor": 1.5}])
def test_schedules_that_cannot_be_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong)).replace("_", "-")):
        OptimConfig(**wrong)


def test_timms_randaugment_has_its_ranges() -> None:
    """timm data/auto_augment.py, `_RAND_INCREASING_TRANSFORMS`, at strength 9, and at 0."""
    size = (224, 112)
    nine = {name: policies.increasing_argument(name, 9.0, size) for name in policies.INCREASING}
    assert len(nine) == 15
    official = {"Rotate": 27, "Posterize": 1, "Solarize": 26, "SolarizeAdd": 99, "ShearX": 0.27, "ShearY": 0.27}
    official |= {"TranslateX": 0.405 * 112, "TranslateY": 0.405 * 224, "AutoContrast": 0, "Equalize": 0, "Invert": 0}
    official |= dict.fromkeys(policies.ENHANCE, 1.81)
    assert nine == pytest.approx(official)
    assert policies.increasing_argument("Color", 9.0, size, down=True) == pytest.approx(0.19)
    assert policies.increasing_argument("Color", 10.0, size, down=True) == pytest.approx(0.1)
    assert policies.increasing_argument("Solarize", 0.0, size) == 256


def test_timms_randaugment_acts_on_half_and_with_a_strength_of_its_own() -> None:
    keys = sample_keys(0, 0, torch.arange(40_000))
    config = AugmentConfig(policy="randaugment-increasing", magnitude=9.0, magnitude_std=0.5)
    numbers, arguments = policies.plan_policy(keys, config, (100, 100))
    assert numbers.shape == arguments.shape == (40_000, 2)
    shares = torch.bincount(numbers.flatten(), minlength=len(policies.OPERATIONS)) / numbers.numel()
    for name, share in zip(policies.OPERATIONS, shares.tolist(), strict=True):
        expected = 0.5 if name == "Identity" else 0.5 / 15 * (name in policies.INCREASING)
        assert share == pytest.approx(expected, abs=0.006)
    strengths = arguments[numbers == policies.OPERATIONS.index("Rotate")] / 3
    assert strengths.max() == 10.0  # a normal distribution, cut off
    assert strengths.median().item() == pytest.approx(9.0, abs=0.05)
    assert ((strengths - 9).abs() < 0.5).float().mean().item() == pytest.approx(0.683, abs=0.03)
    factors = arguments[numbers == policies.OPERATIONS.index("Color")]
    assert (factors > 1).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_timms_randaugment_treats_every_picture_on_its_own() -> None:
    keys = sample_keys(3, 1, torch.arange(40))
    images = torch.randint(0, 256, (40, 3, 24, 20), generator=torch.Generator().manual_seed(0)).float()
    config = AugmentConfig(policy="randaugment-increasing", magnitude=9.0, magnitude_std=0.5)
    fill = torch.full((3, 1, 1), 100.0)
    together = policies.apply_policy(images.clone(), keys, config, fill)
    alone = [policies.apply_policy(images[i : i + 1].clone(), keys[i : i + 1], config, fill) for i in range(40)]
    assert torch.equal(together, torch.cat(alone))
    assert (together != images).flatten(1).any(dim=1).float().mean() > 0.5


def test_efficientnets_autoaugment_has_the_arguments_of_its_code() -> None:
    """tensorflow/tpu autoaugment.py, `level_to_arg` with `translate_const` 250."""
    size = (300, 300)
    used = [(name, level) for pair in policies.AUTOAUGMENT_V0 for name, _, level in pair]
    at = {(name, level): policies.v0_argument(name, level, size) for name, level in used}
    official = {("Color", 0): 0.1, ("Color", 9): 1.72, ("Rotate", 8): 24, ("ShearY", 4): 0.12, ("TranslateY", 9): 225}
    official |= {("Posterize", 2): 0, ("Posterize", 6): 2, ("Solarize", 8): 204, ("Solarize", 10): 256}
    official |= {("SolarizeAdd", 3): 33, ("SolarizeAdd", 7): 77}
    assert {key: at[key] for key in official} == pytest.approx(official)


def test_efficientnets_autoaugment_draws_its_25_pairs_evenly() -> None:
    keys = sample_keys(0, 0, torch.arange(40_000))
    numbers, _ = policies.plan_policy(keys, AugmentConfig(policy="autoaugment-v0"), (32, 32))
    assert len(policies.AUTOAUGMENT_V0) == 25
    for turn in (0, 1):
        expected = dict.fromkeys(policies.OPERATIONS, 0.0)
        for pair in policies.AUTOAUGMENT_V0:
            name, probability, _ = pair[turn]
            expected[name] += probability / 25
            expected["Identity"] += (1 - probability) / 25
        shares = torch.bincount(numbers[:, turn], minlength=len(policies.OPERATIONS)) / len(keys)
        assert shares.tolist() == pytest.approx(list(expected.values()), abs=0.01)


def test_a_random_crop_is_the_evaluation_views_anywhere() -> None:
    keys = sample_keys(0, 0, torch.arange(2000))
    config = AugmentConfig(crop="random")
    view = Preprocessing(image_size=(384, 384), crop_fraction=384 / 448)
    heights, widths = torch.full_like(keys, 500), torch.full_like(keys, 700)
    top, left, height, width = training_boxes(keys, heights, widths, config, view).unbind(dim=1)
    side = 500 * 384 / 448  # of 448 pixels in a picture whose shorter side is resized to that
    assert torch.allclose(height, torch.full_like(height, side)) and torch.equal(height, width)
    assert top.min() >= 0 and (top + height).max() <= 500
    assert left.min() >= 0 and (left + width).max() <= 700
    assert top.mean().item() == pytest.approx((500 - side) / 2, abs=2)
    assert left.mean().item() == pytest.approx((700 - side) / 2, abs=8)


@pytest.mark.parametrize("fraction", [0.6, 1.0])
def test_a_random_crop_is_the_same_from_memory_and_from_files(tmp_path, fraction: float) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 30, 41, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        (tmp_path / "folder" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "folder" / "ab"[i % 2] / f"{i}.png")
    view = Preprocessing(image_size=(16, 16), crop_fraction=fraction)
    config = AugmentConfig(crop="random", flip=0.0)
    data = open_data(str(tmp_path / "folder"), val_fraction=0.3).train
    stream = Stream(data, preprocessing=view, augment=config, batch_size=2, workers=0)
    [batch] = next(stream)
    stored = [data.load(index) for index in order_of(stream, 2)]
    whole = Batch(torch.from_numpy(np.stack(stored)).permute(0, 3, 1, 2), batch.targets, batch.keys, cropped=False)
    augment = Augment(config, view)
    files, memory = (augment(each, classes=2)[0] for each in (batch, whole))
    torch.testing.assert_close(files, memory, atol=1.01 / 127.5, rtol=0)  # files are rounded to whole levels


def order_of(stream: Stream, count: int) -> list[int]:
    return [stream._order.at(position).picture for position in range(count)]
