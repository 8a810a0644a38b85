"""Where and how the models of a run compute: recomputed, compiled and spread over processes, in this order."""

import torch
from torch import nn

from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.run import RunConfig
from vitrail.config.vit_moe import ViTMoEConfig
from vitrail.errors import UserError
from vitrail.models import ImageModel
from vitrail.models.blocks import compile_blocks, recompute_blocks
from vitrail.parallel import Precision, world_size
from vitrail.sharding import shard


def spreads(config: RunConfig) -> bool:
    """Return whether weights are spread over processes: there must be several."""
    return config.loop.sharding != "none" and world_size() > 1


def place(config: RunConfig, precision: Precision, model: ImageModel, root: nn.Module, device: torch.device) -> None:
    """Put a model that is to learn onto a device, to compute as the loop's settings say.

    The order matters: what a block computes again is compiled with it, and its weights are gathered around both.

    Args:
        config: The run.
        precision: Of the matrix products.
        model: Still in the state of its making.
        root: What is called in training: the model, or what holds it.
        device: Of this process.

    Raises:
        UserError: When the model cannot be spread as the settings ask.
    """
    recompute_blocks(model, config.loop.activation_checkpointing)
    if config.loop.compile == "on":
        compile_blocks(model)
    if config.loop.sharding == "none" or world_size() == 1:  # as `spreads` has it
        root.to(device)
        return
    if _normalises_by_batch(model):
        if device.type != "cuda":
            raise UserError(
                "BatchNorm would have other statistics in each process; it can share them on GPUs only. Leave out "
                "--loop.sharding, or freeze them (--model.frozen-norm, in EfficientNets)."
            )
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision) if gathers_in_half(config, model) else None
    shard(root, model.blocks(), config.loop.sharding, device, half)


def gathers_in_half(config: RunConfig, model: ImageModel) -> bool:
    """Return whether a half precision may be that in which weights of blocks are gathered where they are spread.

    Not where something reads them in fp32: BatchNorm, the router of a mixture, and Meta Pseudo Labels, which compares
    losses that half precision cannot tell apart.
    """
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    mixture = isinstance(model.config, ViTMoEConfig)
    return not (norms or mixture or isinstance(config.recipe, MetaPseudoLabelsConfig))


def _normalises_by_batch(model: nn.Module) -> bool:
    """Return whether a model has BatchNorm that is not frozen."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())
