"""Presets made small: what a run of hours on many accelerators does, done in a second."""

from dataclasses import replace
from typing import Any, assert_never

from vitrail.config.coatnet import CoAtNetConfig
from vitrail.config.cvt import CvTConfig
from vitrail.config.efficientnet import EfficientNetConfig
from vitrail.config.masked import MaskedConfig
from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.model import ModelConfig
from vitrail.config.run import InputConfig, LoopConfig, OptimConfig, RecipeConfig, RunConfig
from vitrail.config.vit import ConvStem, ResNetStem, ViTConfig
from vitrail.config.vit_moe import ViTMoEConfig
from vitrail.config.wide_resnet import WideResNetConfig

STEPS = 5
"""Warm-up and its like take at most a fifth of a run: with fewer updates there would be none."""
BATCH_SIZE = 4


def tiny(config: RunConfig) -> RunConfig:
    """Return the same run, small enough to end in seconds on a CPU: a few updates of a tiny model of the same kind.

    Every switch stays as it is, and every phase of a schedule that is there lasts one update. So the run goes through
    the same code; what it learns is worth nothing. `data`, `out`, `init` and a teacher are the caller's to name.
    """
    return replace(
        config,
        minutes=None,
        find_lr=False,
        find_batch_size=False,
        model=tiny_model(config.model),
        input=_tiny_input(config.input),
        recipe=_tiny_recipe(config.recipe),
        optim=_tiny_optim(config.optim),
        loop=_tiny_loop(config.loop),
    )


def tiny_model(config: ModelConfig) -> ModelConfig:
    """Return a model of the same family and with the same switches, of at most some 100,000 parameters."""
    match config:
        case ViTConfig():  # and ViTMoEConfig
            return _tiny_vit(config)
        case CvTConfig():
            stages = range(1, len(config.widths) + 1)
            return replace(
                config,
                image_size=(32, 32),
                widths=tuple(8 * stage for stage in stages),
                depths=(1,) * len(stages),
                heads=tuple(stages),
                mlp_dims=tuple(16 * stage for stage in stages),
            )
        case CoAtNetConfig():
            return replace(
                config,
                image_size=(64, 64),
                widths=(4, 4, 8, 8, 16),
                depths=(1, 1, 1, 1),
                mbconv_before_s3=(1, 8) if config.mbconv_before_s3[0] else (0, 0),
                head_dim=4,
            )
        case EfficientNetConfig():
            stages = len(config.widths)
            return replace(
                config, image_size=(32, 32), stem_width=8, widths=(8,) * stages, depths=(1,) * stages, head_width=16
            )
        case WideResNetConfig():
            stages = len(config.widths)
            return replace(config, image_size=(32, 32), stem_width=4, widths=(8,) * stages, depths=(1,) * stages)
        case _:
            assert_never(config)


def _tiny_vit(config: ViTConfig) -> ViTConfig:
    small: dict[str, Any] = {
        "width": 16,
        "depth": 2,
        "mlp_dim": 32,
        "heads": 2,
        "pre_logits": 16 if config.pre_logits else 0,
    }
    small["image_size"], small["patch_size"] = (32, 32), (8, 8) if config.stem is None else (1, 1)
    match config.stem:
        case ResNetStem(blocks=blocks):
            small["stem"] = ResNetStem(blocks=(1,) * min(len(blocks), 2), width=32)
        case ConvStem(widths=widths):
            small["stem"] = ConvStem(filters=8, widths=(8,) * len(widths))
        case None:
            pass
    if isinstance(config, ViTMoEConfig):
        small |= {"moe_layers": (1,), "experts": 4, "experts_per_token": min(config.experts_per_token, 4)}
        small["group_size"] = config.group_size and 16
    return replace(config, **small)


def _tiny_input(config: InputConfig) -> InputConfig:
    return replace(config, workers=0, labelled=None if config.labelled is None else 0.5)


def _tiny_recipe(config: RecipeConfig) -> RecipeConfig:
    match config:
        case MaskedConfig():
            return replace(config, decoder_width=16, decoder_depth=1, decoder_heads=2)
        case MetaPseudoLabelsConfig():
            return replace(
                config,
                unlabelled_ratio=min(config.unlabelled_ratio, 2),
                uda_steps=min(config.uda_steps, 1),
                student_wait=min(config.student_wait, 1),
                finetune_steps=min(config.finetune_steps, 1),
            )
        case _:
            return config


def _tiny_optim(config: OptimConfig) -> OptimConfig:
    return replace(
        config,
        warmup_steps=min(config.warmup_steps, 1),
        cooldown_steps=min(config.cooldown_steps, 1),
        rsqrt_timescale=1,
        decay_steps=1,
    )


def _tiny_loop(config: LoopConfig) -> LoopConfig:
    return replace(
        config,
        steps=STEPS,
        batch_size=BATCH_SIZE,
        accumulation=min(config.accumulation, 2),
        eval_every=STEPS,
        save_every=STEPS,
        log_every=1,
        precision="fp32",  # half precision without hardware for it is slow
    )
