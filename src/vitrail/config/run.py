"""A run: everything that decides its result, in one frozen tree. Presets are values of `RunConfig`."""

import math
import os
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast, get_args

from vitrail.config.distillation import DistillationConfig
from vitrail.config.masked import MaskedConfig
from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.model import ModelConfig
from vitrail.config.preprocessing import Fit, Interpolation
from vitrail.config.recipes import SamConfig, SupervisedConfig
from vitrail.config.semantic import SemanticConfig
from vitrail.config.vit import ViTConfig
from vitrail.errors import UserError


def decoding_threads() -> int:
    """Return how many threads decode by default: one for each core that this process may use, at most 16.

    Processes that torchrun started on one machine share its cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@dataclass(frozen=True, kw_only=True, slots=True)
class InputConfig:
    """Which pictures, and how they reach the model."""

    val: str | None = None
    """Data to validate on, where it lies apart from `--data`."""
    val_fraction: float = 0.1
    """Share of the training pictures set aside, class by class, when the data has no validation part."""
    fit: Fit = "crop"
    """Evaluation view: centre crop, pad to the whole picture, or squash."""
    crop_fraction: float = 0.875
    """Evaluation view: share of the shorter side that a centre crop keeps."""
    interpolation: Interpolation = "bicubic"
    """Filter of the resize, in training and evaluation."""
    mean: tuple[float, ...] = (0.5,)
    """Mean of the normalisation, for values in [0, 1]; one value stands for all channels."""
    std: tuple[float, ...] = (0.5,)
    """Standard deviation of the normalisation."""
    renormalise: bool = False
    """Normalise by `mean` and `std` even where the weights to start from were trained with others, which else win."""
    workers: int = field(default_factory=decoding_threads)
    """Decoding threads, by default as many as there are cores; 0 decodes in the training thread. The result does not
    depend on it."""
    packed: bool = True
    """Keep small pictures (256 x 256 pixels or fewer) of a folder of 1,000 or more decoded in a file, which this run
    and later ones read instead; the run says where and how large. The result does not depend on it."""
    max_broken: float = 0.01
    """Share of pictures that may be unreadable before the run stops."""
    balanced: bool = False
    """Draw every class equally often, instead of every picture once per epoch."""
    labelled: float | None = None
    """Keep the labels of so many training pictures only, equally many of each class, drawn by seed; a number below 1 is
    a share of every class. Meta Pseudo Labels learns from the others, too, any other recipe leaves them out."""
    unlabelled: str | None = None
    """Meta Pseudo Labels: the pictures without labels; data as for `--data`, whose labels are not looked at. Left out:
    the training pictures whose labels `labelled` does not keep."""

    def __post_init__(self) -> None:
        _require_finite(self, "input.")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--input.val-fraction must lie between 0 and 1, not {self.val_fraction}.")
        if not 0 < self.crop_fraction <= 1:
            raise UserError(f"--input.crop-fraction must lie in (0, 1], not {self.crop_fraction}.")
        if self.labelled is not None and (self.labelled <= 0 or (self.labelled >= 1 and self.labelled % 1)):
            raise UserError(f"--input.labelled must be a share below 1 or a whole number, not {self.labelled}.")
        if not 0 <= self.max_broken <= 1:
            raise UserError(f"--input.max-broken must lie in [0, 1], not {self.max_broken}.")
        if self.workers < 0:
            raise UserError(f"--input.workers must not be negative, not {self.workers}.")
        if min(self.std) <= 0:
            raise UserError(f"--input.std must be positive, not {self.std}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Training augmentation; every picture draws its own parameters."""

    crop: Literal["resized", "padded", "random", "none"] = "resized"
    """Random resized crop (Inception), pad-and-crop (CIFAR; after the policy), or the evaluation view's crop: at a
    `random` place, or as it is."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """`resized`: share of the picture's area that is kept, from and to."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    """`resized`: aspect ratio of the crop (width over height), from and to."""
    pad: int = 4
    """`padded`: pixels of border."""
    size: tuple[int, int] | None = None
    """Height and width in pixels at which pictures are augmented, where that is not the model's size; to that they are
    resized last. So small pictures for a large model cost little, and look as the policy expects them."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    policy: Literal[
        "none",
        "randaugment",
        "randaugment-increasing",
        "randaugment-cifar",
        "trivialaugment",
        "autoaugment-imagenet",
        "autoaugment-v0",
        "autoaugment-cifar",
    ] = "none"
    """Learned or random policy of picture operations. `randaugment` is Google's, `-increasing` is timm's: stronger with
    every step of the strength, each operation in half of the pictures; `-cifar` is Google's of Meta Pseudo Labels:
    small shifts, each operation in 20 to 80 % of the pictures; `autoaugment-v0` is that of EfficientNet's code."""
    operations: int = 2
    """`randaugment`: operations per picture (N)."""
    magnitude: float = 10.0
    """`randaugment`: strength (M), from 0 to 10 as in the AutoAugment code; higher values go on linearly, but for
    `-increasing`."""
    magnitude_std: float = 0.0
    """`randaugment-increasing`: deviation of the strength from operation to operation."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    erase: float = 0.0
    """Probability that a random rectangle is replaced by noise (random erasing)."""
    cutout: int = 0
    """Side in pixels of a square set to the mean colour (Cutout); 0 is off."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 is off."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution; 0 is off. With mixup on as well, each batch draws one of both."""

    def __post_init__(self) -> None:
        _require_finite(self, "augment.")
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise UserError(f"--augment.crop-area must rise from above 0 to at most 1, not {self.crop_area}.")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise UserError(f"--augment.crop-ratio must be positive and rising, not {self.crop_ratio}.")
        if self.size is not None and min(self.size) < 1:
            raise UserError(f"--augment.size must be two positive numbers, height and width, not {self.size}.")
        for name in ("flip", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--augment.{name} is a probability, not {getattr(self, name)}.")
        for name in ("pad", "operations", "magnitude", "magnitude_std", "color_jitter", "cutout", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise UserError(f"--augment.{name.replace('_', '-')} must not be negative, not {getattr(self, name)}.")


RecipeConfig = (
    SupervisedConfig | SamConfig | SemanticConfig | MaskedConfig | DistillationConfig | MetaPseudoLabelsConfig
)
RECIPES: dict[str, type[RecipeConfig]] = {
    re.sub(r"(?<!^)(?=[A-Z])", "-", kind.__name__.removesuffix("Config")).lower(): kind
    for kind in get_args(RecipeConfig)
}
"""Every recipe by the name that `--recipe` takes, its configuration's: `sam`, `meta-pseudo-labels`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "sgd", "muon", "adafactor", "adam", "rmsprop"] = "adamw"
    """AdamW, SGD with momentum, Muon (hidden matrices; AdamW for the rest), Adafactor as ViT-G trains with it, Adam
    with its decay in the gradient (L2), or RMSProp as TensorFlow has it."""
    train: Literal["all", "head"] = "all"
    """`head`: only the head learns; the body answers as in evaluation, and nothing in it changes."""
    head_first: float = 0.0
    """Share of the run in which, at its start, only the head learns, at the peak learning rate; then the schedule. With
    `train` `head` there is no second phase, and the whole run has the schedule."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Decay of weight matrices; biases, norms, positions and class token are left alone, unless `decay` says `all`."""
    decay: Literal["kernels", "all"] = "kernels"
    """What decays: weight matrices, or every parameter."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW, Adam: decay of both moments."""
    head_decay: float | None = None
    """Decay of the head's weight matrix, where it differs from `weight_decay`."""
    momentum: float = 0.9
    """SGD, Muon, RMSProp: momentum."""
    nesterov: bool = False
    """SGD: Nesterov momentum; Muon always has it."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 is off."""
    layer_decay: float = 1.0
    """Factor on the learning rate per layer away from the head; 1 is off."""
    schedule: Literal["cosine", "linear", "rsqrt", "constant", "exponential"] = "cosine"
    """Course of the learning rate after warm-up."""
    min_lr: float = 0.0
    """`cosine`, `linear`: learning rate at the end, where that is below the peak."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0; at most a fifth of the run."""
    cooldown_steps: int = 0
    """`rsqrt`, `constant`: steps of linear descent to 0 at the end."""
    rsqrt_timescale: int = 10_000
    """`rsqrt`: 1 / sqrt(1 + steps after warm-up / timescale)."""
    decay_factor: float = 0.97
    """`exponential`: factor on the learning rate at every `decay_steps`-th step."""
    decay_steps: int = 1000
    """`exponential`: steps at one learning rate."""
    ema: float = 0.0
    """Decay of the averaged weights (EMA, Polyak), which are then evaluated and shipped; 0 is off."""
    moments: Literal["full", "8bit"] = "full"
    """AdamW, Adafactor: `8bit` holds what is averaged over gradients in a byte per weight, for models that would not
    fit otherwise: AdamW in 2 bytes where it takes 8, Adafactor in 1 where it takes 2."""
    in_backward: bool = False
    """Update each weight as soon as the backward pass has its gradient, and forget that: 4 bytes less per weight. There
    is one backward pass per update then, in one process, and no `clip_norm`."""

    def __post_init__(self) -> None:
        _require_finite(self, "optim.")
        if self.lr <= 0:
            raise UserError(f"--optim.lr must be positive, not {self.lr}.")
        if not 0 <= self.ema < 1:
            raise UserError(f"--optim.ema must lie in [0, 1), not {self.ema}.")
        if not 0 <= self.head_first < 1:
            raise UserError(f"--optim.head-first is a share of the run, in [0, 1), not {self.head_first}.")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"--optim.layer-decay must lie in (0, 1], not {self.layer_decay}.")
        for name in ("rsqrt_timescale", "decay_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--optim.{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}.")
        if not 0 < self.decay_factor <= 1:
            raise UserError(f"--optim.decay-factor must lie in (0, 1], not {self.decay_factor}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--optim.betas must lie in [0, 1), not {self.betas}.")
        if not 0 <= self.momentum < 1:
            raise UserError(f"--optim.momentum must lie in [0, 1), not {self.momentum}.")
        if self.moments == "8bit" and self.name not in ("adamw", "adafactor"):
            raise UserError(f"--optim.moments 8bit needs --optim.name adamw or adafactor, not {self.name}.")
        if self.in_backward and self.clip_norm:
            raise UserError(
                "--optim.in-backward comes before the norm of all gradients is known: add --optim.clip-norm 0."
            )
        if self.nesterov and (self.name != "sgd" or not self.momentum):
            raise UserError("--optim.nesterov needs --optim.name sgd and --optim.momentum above 0.")
        if self.head_decay is not None and self.head_decay < 0:
            raise UserError(f"--optim.head-decay must not be negative, not {self.head_decay}.")
        for name in ("weight_decay", "clip_norm", "min_lr", "warmup_steps", "cooldown_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"--optim.{name.replace('_', '-')} must not be negative, not {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """Length of the run, and what happens on the way. Schedules count steps, never minutes."""

    batch_size: int = 128
    """Pictures per update, over all processes and micro-batches."""
    accumulation: int = 1
    """Micro-batches per update: less memory at the same result."""
    epochs: float | None = 10.0
    """Passes over the training pictures; gives way to `steps`."""
    steps: int | None = None
    """Updates of the weights."""
    eval_every: int = 0
    """Updates between evaluations; 0: ten times in the run."""
    save_every: int = 0
    """Updates between checkpoints; 0: twenty times in the run, at least every 200 updates."""
    keep: int = 2
    """Checkpoints kept."""
    log_every: int = 0
    """Updates per line of `metrics.jsonl`; 0: fifty lines in the run, at least one in 20 updates."""
    patience: int | None = None
    """Stop after this many evaluations without a better one."""
    tensorboard: bool = False
    """Write TensorBoard scalars into the run folder."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 on GPUs that have it, fp16 on older ones, fp32 elsewhere."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the model's blocks with torch.compile. `auto`: on GPUs, in runs of ten minutes or more, where a trial of
    one block says that it pays back twice what it takes."""
    activation_checkpointing: float = 0.0
    """Share of the model's blocks, counted from the input, whose activations are not kept but computed again: less
    memory, up to a third more time, the same result."""
    sharding: Literal["none", "full", "hybrid"] = "none"
    """What each process holds under torchrun: the whole model (`none`: DDP), or its part of weights, gradient, moments
    and averages (FSDP), a block's weights being gathered when it is due: `full` spreads them over all processes,
    `hybrid` over those of a machine."""

    def __post_init__(self) -> None:
        _require_finite(self, "loop.")
        for name in ("batch_size", "accumulation", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"--loop.{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}.")
        for name in ("eval_every", "save_every", "log_every"):
            if getattr(self, name) < 0:
                raise UserError(f"--loop.{name.replace('_', '-')} must not be negative, not {getattr(self, name)}.")
        if not 0 <= self.activation_checkpointing <= 1:
            raise UserError(
                f"--loop.activation-checkpointing is a share, in [0, 1], not {self.activation_checkpointing}."
            )
        if self.patience is not None and self.patience < 1:
            raise UserError(f"--loop.patience must be at least 1, not {self.patience}; leave it out to turn it off.")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"--loop.batch-size {self.batch_size} is not a multiple of --loop.accumulation {self.accumulation}."
            )
        if self.steps is None and self.epochs is None:
            raise UserError("a run needs --loop.epochs or --loop.steps.")
        if (self.steps is not None and self.steps < 1) or (self.epochs is not None and self.epochs <= 0):
            raise UserError("--loop.epochs and --loop.steps must be positive.")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One training run. `vitrail train PRESET` starts from a preset; any field is a flag."""

    data: str | None = None
    """Folder of pictures, CSV manifest, CIFAR or IDX folder, or .npz of arrays."""
    out: str | None = None
    """Folder of the run; default: runs/PRESET, or runs/PRESET-2 and so on when that exists; to resume, the last one."""
    init: str | None = None
    """Weights to start from: a model folder, a weight file, or a name with weights at hand. They bring their model; the
    head is replaced when classes differ. In place of a preset's own weights they bring their picture size, too, where
    --model.image-size says nothing else."""
    resume: bool = False
    """Continue the run in `--out` exactly where its last good checkpoint stands."""
    minutes: float | None = None
    """Length of the run; measured into a number of steps once, at the start."""
    find_lr: bool = False
    """Measure the learning rate (`--optim.lr`) once, before the run: a third of the one at which the loss stops falling
    while the rate rises."""
    find_batch_size: bool = False
    """Measure the batch size (`--loop.batch-size`) once, before the run: on a GPU the largest that fits and is no
    slower per picture, on a CPU the smallest that is as fast as any. Other settings stay."""
    seed: int = 0
    """Seed of everything random."""
    model: ModelConfig = field(default_factory=ViTConfig)
    """The model. Classes come from the data."""
    input: InputConfig = field(default_factory=InputConfig)
    """Pictures and how they reach the model."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Training augmentation."""
    recipe: RecipeConfig = field(default_factory=SupervisedConfig)
    """Learning method."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Length, evaluation, checkpoints."""

    def __post_init__(self) -> None:
        _require_finite(self, "")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must lie in [0, 2**63), not {self.seed}.")
        if self.minutes is not None and self.minutes <= 0:
            raise UserError(f"--minutes must be positive, not {self.minutes}.")


def _require_finite(config: object, section: str) -> None:
    """Raise UserError for NaN and infinity, which slip through comparisons and fail far from where they were set."""
    for f in fields(config):  # pyright: ignore[reportArgumentType]
        value = getattr(config, f.name)
        numbers = cast(tuple[Any, ...], value) if isinstance(value, tuple) else (value,)
        for number in numbers:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"--{section}{f.name.replace('_', '-')} must be a finite number, not {number}.")
