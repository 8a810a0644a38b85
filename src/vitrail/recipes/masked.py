"""Masked pre-training: a ViT learns from pictures alone, by filling in what was hidden (ViT paper and MAE)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from enum import IntEnum
from typing import NamedTuple, final

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.config.masked import MaskedConfig
from vitrail.config.run import OptimConfig
from vitrail.data.augment import Augment
from vitrail.data.base import Batch
from vitrail.data.random import choice, uniform
from vitrail.data.view import denormalise
from vitrail.errors import UserError
from vitrail.models.base import ImageModel
from vitrail.models.masking import (
    COLOUR_BITS,
    MASK_TOKEN,
    MaskedColours,
    MaskedPixels,
    patch_colours,
    patch_pixels,
    patch_statistics,
)
from vitrail.models.vit import ViT
from vitrail.optim import AveragedWeights, build_optimizer, prepare
from vitrail.parallel import Precision, accumulating, autocast, replicate
from vitrail.recipes.base import Learner, Place, move

MASKED, REPLACED = 0.8, 0.1
"""Shares of the corrupted patches that give way to [mask] and to another patch; the rest stays (BERT, section 3.1)."""


class MaskDraw(IntEnum):
    """Streams of a picture's random numbers (`data.random`), far from those of its augmentation."""

    PLACES = 100
    FATE = 101
    OTHER = 102


class Mask(NamedTuple):
    """Which patches of each picture are hidden; numbers count the patches row by row."""

    hidden: Int[Tensor, "b m"]
    """Rising; equally many in every picture."""
    kept: Int[Tensor, "b k"]
    """The others, rising."""
    shown: Int[Tensor, "b m"]
    """`colour`: the patch whose embedding stands at each hidden place, or `MASK_TOKEN`."""


class Restored(NamedTuple):
    """Pictures with patches hidden, and as the model fills them in: levels in [0, 255]."""

    masked: Float[Tensor, "b c h w"]
    filled: Float[Tensor, "b c h w"]


@final
class MaskedLearner(Learner):
    """One forward and backward pass per micro-batch over masked pictures, then one clipped update.

    Labels are not looked at. What is shipped is the ViT without a head: there is nothing it could name. What helps it
    to learn lies beside it, under `models["decoder"]`. A picture's mask follows from its key, as its augmentation does:
    so neither micro-batches nor processes change what is learned.
    """

    def __init__(
        self,
        model: ImageModel,
        recipe: MaskedConfig,
        optim: OptimConfig,
        *,
        augment: Augment,
        device: torch.device,
        precision: Precision,
        place: Place = move,
    ) -> None:
        """Take the model's head off and put a decoder beside the model.

        Args:
            model: A plain ViT.
            recipe: What to hide, and what to predict.
            optim: Optimizer and schedule.
            augment: From stored pixels to pictures.
            device: Where to compute.
            precision: Of the matrix products.
            place: Puts the model and its decoder onto the device.

        Raises:
            UserError: For another model than a plain ViT, for pictures of a single patch, and for `optim.train="head"`.
        """
        vit = _plain_vit(model, optim)
        _take_head_off(vit)
        prepare(vit, optim)
        if vit.attention_pool is not None:  # behind the tokens that are learned from
            vit.attention_pool.requires_grad_(False)
        self._masked = MaskedPixels(vit, recipe) if recipe.objective == "pixels" else MaskedColours(vit)
        self._masked.decoder.init_weights()
        place(vit, self._masked, device)
        self.models = nn.ModuleDict({"model": vit, "decoder": self._masked.decoder})
        self.optimizers = {"model": _build_optimizer(vit, self._masked.decoder, optim)}
        # Both are averaged: an averaged ViT speaks to a decoder that is averaged alike.
        self.average = AveragedWeights(self.models, optim.ema) if optim.ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.optim = optim
        self._recipe, self._augment, self._device = recipe, augment, device
        self._precision: Precision = precision
        self._replica = replicate(self._masked, device)

    def step(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        optimizer = self.optimizers["model"]
        optimizer.zero_grad(set_to_none=True)
        pictures = sum(len(batch) for batch in micro_batches)
        loss = torch.zeros((), device=self._device)
        for i, batch in enumerate(micro_batches):
            batch = batch.to(self._device)
            # Augmentation mixes labels along; pictures without any have one row of zeros.
            unlabelled = replace(batch, targets=torch.zeros(len(batch), 1, device=self._device))
            images, _ = self._augment(unlabelled, classes=1)
            last = i == len(micro_batches) - 1
            with accumulating(self._replica, last=last), autocast(self._precision, self._device):
                part = self._losses(self._replica, images, batch.keys).sum() / pictures
                self.scaler.scale(part).backward()
            loss += part.detach()
        self.scaler.unscale_(optimizer)
        norm = self.clip(self.models.parameters())
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.models)
        if self.optim.in_backward:
            return {"loss": loss}  # no gradient is left to be measured
        return {"loss": loss, "gradient_norm": norm}

    def shipped_weights(self) -> AbstractContextManager[None]:
        return self.average.applied(self.models) if self.average else nullcontext()

    @property
    def shipped_part(self) -> tuple[str, ...]:
        return ("average", "average", "model.") if self.average else super().shipped_part

    @property
    def judge(self) -> Callable[[Tensor], Tensor]:
        """Ask for each picture's masked loss, [b 1], under a mask that is the picture's own and always the same."""
        return lambda images: self._losses(self._masked, images, picture_keys(images))[:, None]

    @torch.no_grad()
    def restore(self, images: Float[Tensor, "b c h w"]) -> Restored:
        """Return pictures as the model sees them and as it fills them in, to look at.

        Normalised targets have no mean and deviation of their own, so each patch is shown with its true ones, as in the
        figures of the MAE paper.
        """
        vit, mask = self._vit, self._draw(images, picture_keys(images))
        patch, grid = vit.config.patch_size, self._grid(images)
        pixels = patch_pixels(images, patch)
        if isinstance(self._masked, MaskedPixels):
            painted = self._masked.predict(images, mask.kept).float()
            if self._recipe.norm_targets:
                mean, deviation = patch_statistics(pixels)
                painted = painted * deviation + mean
            painted = denormalise(_whole(painted, grid, patch), vit.preprocessing)
        else:
            said = self._masked.predict(images, mask.hidden, mask.shown).argmax(dim=2)
            colours = torch.zeros_like(pixels[:, :, 0], dtype=torch.int64).scatter(1, mask.hidden, said)
            flat = repeat(colour_levels(colours, vit.config.channels), "b n c -> b n (p c)", p=patch[0] * patch[1])
            painted = _whole(flat, grid, patch)
        gone = torch.zeros_like(pixels).scatter(1, repeat(mask.hidden, "b m -> b m d", d=pixels.shape[2]), 1.0)
        gone = _whole(gone, grid, patch).bool()
        true = denormalise(images, vit.preprocessing)[:, :, : gone.shape[2], : gone.shape[3]]
        return Restored(torch.where(gone, 127.5, true), torch.where(gone, painted, true))

    @property
    def _vit(self) -> ViT:
        return self._masked.vit

    def _losses(
        self, module: nn.Module, images: Float[Tensor, "b c h w"], keys: Int[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """Return the loss of each picture under the mask of its key. `module` computes it: `_masked` or its replica."""
        mask = self._draw(images, keys)
        if self._recipe.objective == "pixels":
            return module(images, mask.kept, mask.hidden)
        colours = patch_colours(denormalise(images, self._vit.preprocessing), self._vit.config.patch_size)
        return module(images, colours, mask.hidden, mask.shown)

    def _draw(self, images: Float[Tensor, "b c h w"], keys: Int[Tensor, " b"]) -> Mask:
        rows, columns = self._grid(images)
        return draw_mask(keys, rows * columns, self._recipe.mask_ratio)

    def _grid(self, images: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        return self._vit.config.grid_at((images.shape[2], images.shape[3]))


def draw_mask(keys: Int[Tensor, " b"], patches: int, ratio: float) -> Mask:
    """Return a mask per key: `ratio` of the patches, rounded, at least one and not all.

    A patch that another one replaces gets that of the same picture, any but itself: so a mask is its picture's own
    affair. (The paper leaves open where it comes from.)
    """
    count = min(max(round(ratio * patches), 1), patches - 1)
    order = uniform(keys, MaskDraw.PLACES, (patches,)).argsort(dim=1, stable=True)
    hidden, kept = order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values
    fate = uniform(keys, MaskDraw.FATE, (count,))
    other = (hidden + 1 + choice(keys, MaskDraw.OTHER, patches - 1, (count,))) % patches
    shown = torch.where(fate < MASKED, MASK_TOKEN, torch.where(fate < MASKED + REPLACED, other, hidden))
    return Mask(hidden, kept, shown)


def picture_keys(images: Float[Tensor, "b c h w"]) -> Int[Tensor, " b"]:
    """Return a key per picture that follows from its own pixels, whatever the batch, the order or the device.

    Whole numbers that wrap around: no order of summation changes them.
    """
    bits = rearrange(images.contiguous().view(torch.int32), "b c h w -> b (c h w)").long()
    odd = 2 * torch.arange(bits.shape[1], device=bits.device) + 1
    return (bits * odd).sum(dim=1)


def colour_levels(colours: Int[Tensor, "b n"], channels: int) -> Float[Tensor, "b n c"]:
    """Return the middle of each colour of `patch_colours`, in levels."""
    shifts = COLOUR_BITS * torch.arange(channels - 1, -1, -1, device=colours.device)
    bits = (colours[:, :, None] >> shifts) & (2**COLOUR_BITS - 1)
    return (bits.float() + 0.5) * 2 ** (8 - COLOUR_BITS) - 0.5


def _plain_vit(model: ImageModel, optim: OptimConfig) -> ViT:
    if type(model) is not ViT:
        raise UserError(
            f"masked pre-training hides patches, so it needs a plain ViT, not {type(model).__name__}; take the preset "
            "'masked', or one without weights, with --model, such as vit-s16."
        )
    if model.config.stem is not None:
        raise UserError(
            "masked pre-training needs a ViT that cuts its patches from the picture itself: a hybrid's stem would look "
            "from one patch into the next. Choose a plain one with --model, such as vit-b16."
        )
    model.require_places()
    rows, columns = model.config.grid_at(model.preprocessing.image_size)
    if rows * columns < 2:
        raise UserError("masked pre-training needs pictures of at least two patches; lower --model.patch-size.")
    if optim.train == "head" or optim.head_first:
        raise UserError(
            "masked pre-training trains the body and has no head; leave out --optim.train head and --optim.head-first."
        )
    return model


def _take_head_off(vit: ViT) -> None:
    vit.config = vit.with_classes(0)
    vit.head = vit.pre_logits = None
    vit.labels, vit.multi_label = (), False


def _build_optimizer(vit: ViT, decoder: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer of both. As everywhere, decay touches kernels only; no layer is nearer to the output.

    Everything in the decoder learns as the ViT's last norm does: by Muon's AdamW, if it is Muon.
    """
    optimizer = build_optimizer(vit, optim)
    like = next(group for group in optimizer.param_groups if any(p is vit.norm.bias for p in group["params"]))
    for decays in (True, False):
        members = [p for name, p in decoder.named_parameters() if (p.ndim > 1 and name.endswith(".weight")) == decays]
        decay = optim.weight_decay if decays else 0.0
        optimizer.add_param_group({**like, "params": members, "weight_decay": decay, "lr_scale": 1.0})
    return optimizer


def _whole(pixels: Float[Tensor, "b n values"], grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Return pictures from their patches' pixels, the inverse of `patch_pixels`."""
    return rearrange(pixels, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], p=patch[0], q=patch[1])
