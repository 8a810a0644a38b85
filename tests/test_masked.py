"""Masked pre-training: what is hidden, what is predicted, what learns, and what a run leaves behind."""

import copy
import json
import math
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import TINY
from small_data import put
from test_processes import environment, torchrun, write_script
from torch import nn

from vitrail.checkpoints import load_model
from vitrail.compare import compare
from vitrail.compare.show import write_page
from vitrail.config.masked import MaskedConfig
from vitrail.config.run import AugmentConfig, OptimConfig, RunConfig
from vitrail.config.vit import ViTConfig
from vitrail.data import open_data
from vitrail.data.augment import Augment
from vitrail.data.base import Batch
from vitrail.data.random import sample_keys
from vitrail.errors import Interrupted, UserError
from vitrail.metrics import judged_by, mean_loss, score
from vitrail.models import ViT, build
from vitrail.models.masking import (
    MASK_TOKEN,
    MaskedColours,
    MaskedPixels,
    PixelDecoder,
    encode,
    patch_colours,
    patch_pixels,
    patch_statistics,
    patch_tokens,
    take,
)
from vitrail.recipes.masked import MaskedLearner, colour_levels, draw_mask, picture_keys
from vitrail.runs import train
from vitrail.training import Callback, run_training

CPU = torch.device("cpu")
SMALL = ViTConfig(image_size=(16, 24), patch_size=(4, 8), num_classes=5, width=16, depth=2, mlp_dim=32, heads=2)
PIXELS = MaskedConfig(decoder_width=16, decoder_depth=1, decoder_heads=2)
COLOUR = MaskedConfig(objective="colour", mask_ratio=0.5)
RECIPES = {"pixels": PIXELS, "colour": COLOUR}
KINDS = {
    "token, learned": {},
    "token, sin-cos": {"positions": "sincos"},
    "gap, learned": {"pool": "gap"},
    "gap, sin-cos": {"pool": "gap", "positions": "sincos"},
    "attention pooling": {"pool": "map"},
    "pre-logits": {"pre_logits": 8},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def vit(**changes) -> ViT:
    model = build(replace(SMALL, **changes))
    assert isinstance(model, ViT)
    return model


def learner(recipe: MaskedConfig, model: nn.Module | None = None, *, precision="fp32", **optim) -> MaskedLearner:
    model = vit() if model is None else model
    augment = Augment(AugmentConfig(crop="none", flip=0.0), model.preprocessing)
    return MaskedLearner(
        model, recipe, OptimConfig(**({"lr": 3e-3} | optim)), augment=augment, device=CPU, precision=precision
    )


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return sample_keys(seed, 0, torch.arange(count))


def batch(count: int, seed: int = 0) -> Batch:
    """Pictures of random flat colours with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randint(20, 236, (count, 3, 1, 1), generator=generator)
    images = (flat + torch.randint(-20, 20, (count, 3, 16, 24), generator=generator)).byte()
    return Batch(images, torch.zeros(count, dtype=torch.int64), keys(count, seed), cropped=False)


def parts(whole: Batch, size: int) -> list[Batch]:
    return [
        Batch(whole.images[i : i + size], whole.targets[i : i + size], whole.keys[i : i + size], cropped=False)
        for i in range(0, len(whole), size)
    ]


@pytest.mark.parametrize(("patches", "ratio", "count"), [(196, 0.75, 147), (196, 0.5, 98), (49, 0.75, 37), (2, 0.9, 1)])
def test_a_mask_hides_exactly_its_share_and_keeps_the_rest(patches, ratio, count) -> None:
    mask = draw_mask(keys(40), patches, ratio)
    assert mask.hidden.shape == (40, count)
    both = torch.cat([mask.hidden, mask.kept], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(patches).expand(40, -1))
    assert (mask.kept.diff(dim=1) > 0).all()


def test_every_place_is_hidden_equally_often_and_independently() -> None:
    gone = torch.zeros(8000, 12).scatter(1, draw_mask(keys(8000), 12, 0.5).hidden, 1.0)
    assert torch.allclose(gone.mean(dim=0), torch.tensor(0.5), atol=4 * 0.5 / math.sqrt(8000))
    expected = (6 * 5) / (12 * 11)  # of two places both are hidden
    together = (gone.T @ gone / 8000)[~torch.eye(12, dtype=torch.bool)]
    assert torch.allclose(together, torch.tensor(expected), atol=5 * math.sqrt(expected / 8000))


def test_corrupted_patches_are_masked_replaced_and_kept_eighty_ten_ten() -> None:
    mask = draw_mask(keys(2000), 64, 0.5)
    masked, own = mask.shown == MASK_TOKEN, mask.shown == mask.hidden
    n = mask.shown.numel()
    for share, wanted in ((masked, 0.8), (own, 0.1), (~masked & ~own, 0.1)):
        assert float(share.float().mean()) == pytest.approx(wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / n))
    others = (mask.shown - mask.hidden)[~masked & ~own] % 64
    assert set(others.tolist()) == set(range(1, 64))  # any other patch, never the same


def test_a_mask_is_its_pictures_own_whatever_the_batch() -> None:
    together = draw_mask(keys(6), 12, 0.5)
    alone = [draw_mask(keys(6)[i : i + 1], 12, 0.5) for i in range(6)]
    for whole, *rows in zip(together, *alone, strict=True):
        assert torch.equal(whole, torch.cat(rows))
    assert len({tuple(row) for row in together.hidden.tolist()}) > 1


def test_a_validation_picture_has_one_mask_for_ever_and_others_have_others() -> None:
    images = torch.randn(5, 3, 16, 24)
    assert torch.equal(picture_keys(images)[2:3], picture_keys(images[2:3].clone(memory_format=torch.channels_last)))
    assert picture_keys(images).unique().numel() == 5
    swapped = images[:1].clone()
    swapped[0, 0, 0, :2] = swapped[0, 0, 0, :2].flip(0)  # the same values elsewhere
    assert picture_keys(swapped) != picture_keys(images[:1])


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_are_those_of_a_slow_definition(channels: int) -> None:
    levels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, channels, 13, 26)).astype(np.float32))
    levels[0] = 255.0
    levels[1, :, :4, :8] = 32.0  # on an edge between two colours
    found = patch_colours(levels, (4, 8))
    assert found.shape == (3, 3 * 3)  # what is left over at the edges is left out
    for picture in range(3):
        for row in range(3):
            for column in range(3):
                colour = 0
                for c in range(channels):
                    values = levels[picture, c, 4 * row : 4 * row + 4, 8 * column : 8 * column + 8]
                    colour = colour * 8 + round(float(values.double().mean())) // 32
                assert found[picture, 3 * row + column] == colour
    assert int(found[0, 0]) == 8**channels - 1


def test_the_middle_of_a_colour_has_that_colour() -> None:
    colours = torch.arange(512)[None]
    levels = colour_levels(colours, 3)
    pictures = levels[0, :, :, None, None].expand(-1, -1, 4, 8).contiguous()
    assert torch.equal(patch_colours(pictures, (4, 8))[:, 0], colours[0])


def test_patches_are_those_that_the_model_embeds() -> None:
    model, images = vit(), torch.randn(2, 3, 16, 24)
    flat = patch_pixels(images, (4, 8))
    kernel = model.patch_embed.weight.permute(2, 3, 1, 0).reshape(-1, 16)
    patches, _ = patch_tokens(model, images)
    torch.testing.assert_close(flat @ kernel + model.patch_embed.bias, patches, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_with_nothing_hidden_the_encoder_is_the_model(kind: str) -> None:
    model, images = vit(**KINDS[kind]).eval(), torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    patches, positions = patch_tokens(model, images)
    torch.testing.assert_close(encode(model, patches + positions), model.tokens(images), rtol=1e-5, atol=1e-5)


def test_the_autoencoder_sees_visible_patches_only_and_is_asked_for_the_others() -> None:
    module = MaskedPixels(vit(), PIXELS)
    module.decoder.init_weights()
    images, mask = torch.randn(2, 3, 16, 24), draw_mask(keys(2), 12, 0.75)
    places = torch.arange(12)
    hidden = torch.stack([torch.isin(places, row) for row in mask.hidden]).view(2, 1, 4, 3)
    pixels = hidden.repeat_interleave(4, dim=2).repeat_interleave(8, dim=3).expand_as(images)
    other = torch.where(pixels, torch.randn_like(images), images)
    torch.testing.assert_close(module.predict(other, mask.kept), module.predict(images, mask.kept), rtol=0, atol=0)
    assert (module(other, mask.kept, mask.hidden) != module(images, mask.kept, mask.hidden)).all()
    seen = torch.where(pixels, images, torch.randn_like(images))
    assert (module.predict(seen, mask.kept) != module.predict(images, mask.kept)).any()


@pytest.mark.parametrize("normalised", [True, False])
def test_the_pixel_loss_is_that_of_hidden_patches_alone(normalised: bool) -> None:
    module = MaskedPixels(vit(), replace(PIXELS, norm_targets=normalised))
    module.decoder.init_weights()
    images, mask = torch.randn(3, 3, 16, 24), draw_mask(keys(3), 12, 0.75)
    painted = module.predict(images, mask.kept).detach()
    wanted = []
    for picture in range(3):
        total = 0.0
        for place in mask.hidden[picture].tolist():
            top, left = 4 * (place // 3), 8 * (place % 3)
            patch = images[picture, :, top : top + 4, left : left + 8].permute(1, 2, 0).flatten()
            if normalised:
                patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            total += float(((painted[picture, place] - patch) ** 2).mean())
        wanted.append(total / 9)
    torch.testing.assert_close(module(images, mask.kept, mask.hidden), torch.tensor(wanted))


def test_the_decoder_puts_tokens_back_in_place() -> None:
    """Without blocks, and with a head that copies, every place shows its own token, and mask tokens stand elsewhere."""
    decoder = PixelDecoder(SMALL, replace(PIXELS, decoder_width=96))
    decoder.init_weights()
    decoder.blocks, decoder.norm = nn.ModuleList(), nn.Identity()
    kept = torch.tensor([[1, 4, 5], [0, 2, 11]])
    tokens = torch.randn(2, 1 + 3, 16)
    with torch.no_grad():
        decoder.head.weight.copy_(torch.eye(96))
        x = decoder(tokens, kept, (4, 3)) - decoder(torch.zeros(2, 4, 16), kept, (4, 3))
        projected = decoder.embed(tokens[:, 1:]) - decoder.embed.bias
    torch.testing.assert_close(take(x, kept), projected, rtol=1e-5, atol=1e-5)
    elsewhere = torch.tensor([[0, 2, 3, 6, 7, 8, 9, 10, 11], [1, 3, 4, 5, 6, 7, 8, 9, 10]])
    assert take(x, elsewhere).abs().max() == 0.0


def test_a_corrupted_patch_shows_the_mask_another_patch_or_itself() -> None:
    """The paper's corruption, patch by patch, in front of the same encoder."""
    module = MaskedColours(vit())
    module.decoder.init_weights()
    nn.init.normal_(module.decoder.head.weight)
    images = torch.randn(1, 3, 16, 24)
    hidden, shown = torch.tensor([[0, 3, 7]]), torch.tensor([[MASK_TOKEN, 9, 7]])
    patches, positions = patch_tokens(module.vit, images)
    rows = list(patches[0])
    rows[0], rows[3] = module.decoder.mask_token[0, 0], patches[0, 9]
    tokens = encode(module.vit, torch.stack(rows)[None] + positions)
    wanted = module.decoder.head(tokens[:, 1:][:, [0, 3, 7]])
    torch.testing.assert_close(module.predict(images, hidden, shown), wanted)


def test_the_colour_loss_begins_at_that_of_512_equal_chances() -> None:
    one = learner(COLOUR)
    loss = one.step([batch(4)])["loss"]
    assert float(loss) == pytest.approx(math.log(512), rel=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_that_learns_gets_a_gradient(kind: str, recipe: str) -> None:
    """DistributedDataParallel waits for each of them; what lies behind the tokens is frozen."""
    one = learner(RECIPES[recipe], vit(**KINDS[kind]))
    one.step([batch(4)])
    missing = [name for name, p in one.models.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    frozen = {name.split(".")[1] for name, p in one.models.named_parameters() if not p.requires_grad}
    assert frozen == ({"attention_pool"} if kind == "attention pooling" else set())
    known = {id(p) for group in one.optimizers["model"].param_groups for p in group["params"]}
    assert known == {id(p) for p in one.models.parameters() if p.requires_grad}


def test_decay_touches_the_decoders_kernels_only() -> None:
    one = learner(PIXELS, weight_decay=0.1, layer_decay=0.5)
    decayed = {id(p) for g in one.optimizers["model"].param_groups if g["weight_decay"] for p in g["params"]}
    names = {name for name, p in one.models["decoder"].named_parameters() if id(p) in decayed}
    assert names == {
        "embed.weight",
        "head.weight",
        *(f"blocks.0.{layer}.weight" for layer in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")),
    }
    one.schedule(50, 100)
    groups, head = one.optimizers["model"].param_groups, one.models["decoder"].head.weight
    assert [g["lr"] for g in groups if any(p is head for p in g["params"])] == [max(g["lr"] for g in groups)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_learns(recipe: str) -> None:
    """On flat pictures, what is left tells everything of what is hidden, but for the noise."""
    one = learner(replace(RECIPES[recipe], norm_targets=False), lr=1e-2)
    pictures = batch(16)
    losses = [float(one.step([pictures])["loss"]) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_accumulation_equals_one_large_batch(recipe: str) -> None:
    gradients = []
    for size in (6, 2):
        torch.manual_seed(0)
        one = learner(RECIPES[recipe], clip_norm=0.0)
        scalars = one.step(parts(batch(6), size))
        gradients.append({name: p.grad for name, p in one.models.named_parameters()} | scalars)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "muon", "adafactor"])
def test_every_optimizer_moves_the_whole_decoder(name: str) -> None:
    one = learner(PIXELS, name=name, lr=1e-2)
    before = {name: p.clone() for name, p in one.models["decoder"].named_parameters()}
    one.schedule(0, 10)
    for _ in range(2):
        one.step([batch(4)])
    assert [name for name, p in one.models["decoder"].named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_restored_learner_goes_on_bit_for_bit(recipe: str, ema: float) -> None:
    first = learner(RECIPES[recipe], vit(dropout=0.1), ema=ema)
    first.step([batch(4)])
    saved = copy.deepcopy(first.state_dict())
    second = learner(RECIPES[recipe], vit(dropout=0.1), ema=ema)
    second.load_state_dict(saved)
    for one in (first, second):
        torch.manual_seed(3)
        one.step([batch(4, seed=1)])
    with first.shipped_weights(), second.shipped_weights():
        for (name, a), b in zip(first.models.state_dict().items(), second.models.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def test_the_average_is_of_model_and_decoder_alike() -> None:
    one = learner(PIXELS, ema=0.9)
    own = {name: tensor.clone() for name, tensor in one.models.state_dict().items()}
    for _ in range(3):
        one.step([batch(4)])
    with one.shipped_weights():
        moved = {name for name, tensor in one.models.state_dict().items() if not torch.equal(tensor, own[name])}
        averaged = one.models["decoder"].head.weight.clone()
    assert {"model.patch_embed.weight", "decoder.head.weight"} <= moved
    assert not torch.equal(averaged, one.models["decoder"].head.weight)


@pytest.mark.parametrize("recipe", RECIPES)
def test_half_precision_learns_too(recipe: str) -> None:
    one = learner(RECIPES[recipe], precision="bf16")
    assert torch.isfinite(one.step([batch(2)])["loss"])
    assert {p.dtype for p in one.models.parameters()} == {torch.float32}


def test_the_judge_gives_a_picture_the_same_loss_in_any_batch() -> None:
    one = learner(PIXELS)
    images = torch.randn(5, 3, 16, 24)
    with torch.no_grad():
        together = one.judge(images)
        alone = torch.cat([one.judge(image[None]) for image in images.flip(0)]).flip(0)
    assert together.shape == (5, 1)
    torch.testing.assert_close(alone, together)


@pytest.mark.parametrize("family", ["hybrid", "vit-moe", "cvt", "coatnet", "efficientnet"])
def test_other_models_than_plain_vits_are_refused(family: str) -> None:
    with pytest.raises(UserError, match="plain"):
        learner(PIXELS, build(TINY[family]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 1.0}, "mask-ratio"),
        ({"mask_ratio": 0.0}, "mask-ratio"),
        ({"decoder_depth": 0}, "decoder_depth"),
        ({"decoder_width": 18, "decoder_heads": 2}, "multiple of 4"),
        ({"decoder_width": 20, "decoder_heads": 3}, "decoder-heads 3"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MaskedConfig(**settings)


def test_pictures_of_one_patch_and_training_the_head_alone_are_refused() -> None:
    with pytest.raises(UserError, match="two patches"):
        learner(PIXELS, vit(patch_size=(16, 24)))
    with pytest.raises(UserError, match="train head"):
        learner(PIXELS, train="head")


def test_pictures_are_filled_in_where_they_were_hidden() -> None:
    model = vit()
    one = learner(PIXELS, model)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    restored = one.restore(images)
    levels = (images + 1) * 127.5
    gone = (restored.masked - 127.5).abs().amax(dim=1, keepdim=True) < 1e-3
    assert float(gone.float().mean()) == pytest.approx(0.75, abs=0.01)
    assert torch.allclose(torch.where(gone, levels, restored.masked), levels, atol=1e-3)
    assert torch.allclose(torch.where(gone, levels, restored.filled), levels, atol=1e-3)
    assert not torch.allclose(restored.filled, levels, atol=1.0)


def test_filled_in_pixels_have_the_true_patchs_mean_and_deviation() -> None:
    """A decoder that says 0 everywhere paints every hidden patch in its mean."""
    one = learner(PIXELS)
    nn.init.zeros_(one.models["decoder"].head.weight)
    images = torch.rand(1, 3, 16, 24) * 2 - 1
    filled = patch_pixels(one.restore(images).filled, (4, 8))
    mean, _ = patch_statistics(patch_pixels((images + 1) * 127.5, (4, 8)))
    hidden = draw_mask(picture_keys(images), 12, 0.75).hidden
    torch.testing.assert_close(take(filled, hidden), take(mean, hidden).expand(-1, -1, 96), rtol=1e-4, atol=1e-2)


def test_a_colour_model_fills_in_one_colour_per_patch() -> None:
    one = learner(COLOUR)
    filled = patch_pixels(one.restore(torch.rand(1, 3, 16, 24)).filled, (4, 8))[0].view(12, 32, 3)
    flat = (filled - filled[:, :1]).abs().amax(dim=(1, 2)) < 1e-3
    assert int(flat.sum()) == 6


def test_a_lower_loss_is_better() -> None:
    low, high = mean_loss(np.array([[1.0], [2.0]], np.float32)), mean_loss(np.array([[3.0]], np.float32))
    assert low == {"masked_loss": 1.5}
    assert score(low) > score(high)
    assert judged_by(low) == "masked_loss"
    with pytest.raises(UserError, match="NaN"):
        mean_loss(np.array([[np.nan]], np.float32))


# Data without labels.


def test_loose_and_nested_pictures_are_read_without_labels(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "a/2.png", "a/b/3.png", "c/4.png", "5.png")
    (tmp_path / "notes.txt").write_text("x")
    data = open_data(tmp_path, labelled=False, val_fraction=0.4)
    assert data.train.classes == ("pictures",)
    assert data.val is not None
    names = {Path(part.name(i)).name for part in (data.train, data.val) for i in range(len(part))}
    assert names == {f"{i}.png" for i in range(1, 6)}
    assert (len(data.train), len(data.val)) == (3, 2)


def test_parts_without_class_folders_are_parts(tmp_path: Path) -> None:
    put(tmp_path, "train/1.png", "train/x/2.png", "val/3.png", "other/4.png")
    data = open_data(tmp_path, labelled=False)
    assert (len(data.train), len(data.val or ())) == (2, 1)


def test_without_a_training_part_all_pictures_are_for_training(tmp_path: Path) -> None:
    put(tmp_path, "test/1.png", "2.png", "cat/3.png")
    data = open_data(tmp_path, labelled=False)
    assert (len(data.train) + len(data.val or ()), data.test) == (3, None)


def test_labels_of_labelled_data_are_left_aside(photos: Path, tmp_path: Path) -> None:
    put(tmp_path, "1.png", "2.png")
    data = open_data(photos, labelled=False, val=str(tmp_path))
    assert data.train.classes == ("pictures",)
    assert set(data.train.targets.tolist()) == {0}
    assert (len(data.train), len(data.val or ())) == (60, 2)
    embedded = open_data("clothing", labelled=False)
    assert embedded.train.class_counts().tolist() == [len(embedded.train)]


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="no pictures below"):
        open_data(tmp_path, labelled=False)


def test_with_labels_a_flat_folder_is_refused_as_before(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "2.png")
    with pytest.raises(UserError, match="no class folders"):
        open_data(tmp_path)


# Whole runs.


@pytest.fixture
def flat_photos(photos: Path, tmp_path: Path) -> Path:
    """The pictures of `photos` in one folder."""
    root = tmp_path / "flat"
    root.mkdir()
    for file in photos.rglob("*.png"):
        (root / f"{file.parent.name}-{file.name}").write_bytes(file.read_bytes())
    return root


def masked_run(tiny_run, out: str, **changes) -> RunConfig:
    settings = {"recipe": replace(PIXELS, mask_ratio=0.5), "augment__policy": "none", "augment__mixup": 0.0}
    return tiny_run(out, **(settings | changes))


class StopAfter(Callback):
    def __init__(self, step: int) -> None:
        self.stop = step

    def metrics(self, row: dict) -> None:
        if row["step"] == self.stop and "val" not in row:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_on_a_flat_folder_leaves_a_body_to_start_from(tiny_run, flat_photos: Path, recipe: str) -> None:
    config = masked_run(tiny_run, "masked", data=str(flat_photos), recipe=RECIPES[recipe], optim__ema=0.9)
    result = train(config)
    assert result.val is not None
    assert result.val.keys() == {"masked_loss"}
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert result.val["masked_loss"] == min(row["val"]["masked_loss"] for row in rows if "val" in row)
    model = load_model(result.folder / "best")
    assert (model.config.num_classes, model.labels) == (0, ())
    stored = json.loads((result.folder / "evaluation.json").read_text())
    assert stored["metrics"] == result.val
    page = (result.folder / "report.html").read_text()
    assert page.count("filled in by the model") == 12
    assert ("no merit of the model" in page) == (recipe == "pixels")
    assert "Class by class" not in page
    [run] = compare([result.folder]).runs
    assert (run.metric, run.val) == ("masked_loss", result.val)
    tuned = run_training(tiny_run("tuned", init=str(result.folder / "best"), loop__steps=2))
    assert load_model(tuned.folder / "last").labels == ("apple", "leaf", "sky")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stopped_run_goes_on_bit_for_bit(tiny_run, accumulation: int) -> None:
    settings = {"loop__accumulation": accumulation, "optim__ema": 0.9, "loop__steps": 8, "loop__eval_every": 4}
    straight, stopped = (masked_run(tiny_run, out, **settings) for out in ("straight", "stopped"))
    run_training(straight)
    with pytest.raises(Interrupted):
        run_training(stopped, [StopAfter(5)])
    run_training(replace(stopped, resume=True))
    for name in ("metrics.jsonl", "last/model.safetensors", "best/model.safetensors"):
        assert (Path(str(stopped.out)) / name).read_bytes() == (Path(str(straight.out)) / name).read_bytes(), name


def test_minutes_are_measured_on_copies(tiny_run, monkeypatch) -> None:
    monkeypatch.setattr("vitrail.training.setup.seconds_per_step.__defaults__", (0.05,))
    result = run_training(masked_run(tiny_run, "measured", minutes=0.005))
    assert result.step >= 1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_equal_one_at_the_same_global_batch(tiny_run, tmp_path: Path, recipe: str) -> None:
    settings = {
        "recipe": RECIPES[recipe],
        "model__dropout": 0.0,
        "model__qkv_bias": False,  # a key's bias has no gradient but noise, which Adam blows up
        "optim__ema": 0.9,
        "loop__accumulation": 2,
    }
    one, two = (masked_run(tiny_run, out, **settings) for out in ("one", "two"))
    run_training(one)
    subprocess.run(torchrun(2, write_script(tmp_path, two)), env=environment(), check=True, timeout=180)
    alone, together = (load_model(Path(str(c.out)) / "last").state_dict() for c in (one, two))
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-5, atol=1e-5)
    rows = [[json.loads(x) for x in (Path(str(c.out)) / "metrics.jsonl").read_text().splitlines()] for c in (one, two)]
    for a, b in zip(*rows, strict=True):
        loss = a["val"]["masked_loss"] if "val" in a else a["loss"]
        assert (b["val"]["masked_loss"] if "val" in b else b["loss"]) == pytest.approx(loss, rel=1e-5)


def test_two_masked_runs_compare_on_a_page(tiny_run, tmp_path: Path) -> None:
    folders = [
        run_training(masked_run(tiny_run, out, seed=seed, loop__steps=3)).folder for out, seed in (("a", 0), ("b", 1))
    ]
    comparison = compare(folders)
    assert comparison.runs[0].val["masked_loss"] <= comparison.runs[1].val["masked_loss"]
    write_page(comparison, tmp_path / "c.html")
    assert "Loss on validation pictures" in (tmp_path / "c.html").read_text()
