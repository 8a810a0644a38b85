"""The experiments of `recipes.py`, as data: what is asked, which ways to train answer it, and how they are measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.config.masked import MaskedConfig
from vitrail.config.recipes import SamConfig
from vitrail.config.run import RunConfig, SupervisedConfig
from vitrail.config.semantic import SemanticConfig
from vitrail.config.wide_resnet import WIDE_RESNETS
from vitrail.data import read_parts
from vitrail.embedding import embed
from vitrail.evaluation import evaluate
from vitrail.models import ImageModel
from vitrail.presets import preset
from vitrail.probe import SEEDS as DRAWS
from vitrail.probe import Labelled, few_shot

BASE, PLAIN = "cifar100-10min-cpu", "cifar100-vit"
CIFAR, SMALL, CIFAR10, PHOTOS = "cifar100", "cifar100-5000", "cifar10", "photos"
PER_CLASS, SHOTS = 50, (5, 10)

Places = Mapping[str, Path]
"""Where data lies: official binaries of CIFAR, the first 50 pictures of every class of CIFAR-100, folders of photos."""
Measure = Callable[[ImageModel, str, Places], dict[str, float]]
"""From a model and the name of the data that it was trained on to figures, shares of 1."""


def top1(model: ImageModel, data: str, places: Places) -> dict[str, float]:
    """Return the share of the test pictures that are classified rightly."""
    answers = evaluate(model, places[data if data in (PHOTOS, CIFAR10) else CIFAR], split="test", batch_size=250)
    return {"top-1": float((answers.logits.argmax(axis=1) == answers.targets).mean())}


def shots(model: ImageModel, _data: str, places: Places) -> dict[str, float]:
    """Return what ridge regression makes of the features of a few labelled pictures per class: means of draws."""
    sources = read_parts(places[SMALL]).train, read_parts(places[CIFAR]).for_evaluation("test")[1]
    train, test = (Labelled(embed(model, s, batch_size=250).features, s.targets, s.classes) for s in sources)
    return {
        f"top-1, {count} shots": float(np.mean([few_shot(train, test, count, draw) for draw in range(DRAWS)]))
        for count in SHOTS
    }


@dataclass(frozen=True)
class Arm:
    """One way to train: a preset, and what is changed in it."""

    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """New values by path, as `{"optim.ema": 0.0}`."""
    data: str = CIFAR
    """What is trained on, by its name in `Places`."""
    start: str | None = None
    """The arm whose weights, of the same seed, it starts from."""
    trained: bool = True
    """Whether it is trained at all; else its first weights are measured."""
    measure: Measure = top1

    def config(self, seed: int) -> RunConfig:
        """Return the run, with names in place of the paths to data and weights."""
        config = replace(preset(self.preset).config, seed=seed, data=self.data)
        for path, value in self.changes.items():
            part, _, name = path.partition(".")
            config = replace(config, **{part: replace(getattr(config, part), **{name: value}) if name else value})
        return replace(config, init=self.start) if self.start else config

    def described(self) -> str:
        """Return the preset and what differs from it, in words."""
        start = preset(self.preset).config
        told = [
            f"{path} {value}"
            for path, value in differences(replace(start, data=self.data), self.config(start.seed))
            if path not in UNSEEN and (path, value) not in (("minutes", None), ("loop.steps", None))
        ]
        return ", ".join([f"`{self.preset}`" + ("" if self.trained else ", not trained"), *(f"`{t}`" for t in told)])


@dataclass(frozen=True)
class Experiment:
    """A question, ways to train that answer it, and which of them are set against which."""

    question: str
    note: str
    """What a reader must know of data and settings."""
    arms: Mapping[str, Arm]
    pairs: Sequence[tuple[str, str]] = ()
    """An arm, and the one it is to beat."""
    seeds: Sequence[int] = (0, 1, 2)


LAST: dict[str, Any] = {"optim.ema": 0.0}
"""No averaged weights: in so short a run they lag behind, the more the shorter it is."""
UNSEEN: dict[str, Any] = {"input.val_fraction": 0.002, "loop.eval_every": 10**9, "loop.patience": None}
"""Nothing is chosen on the way, so next to nothing is set aside, and looked at once, at the end."""


def length(epochs: float) -> dict[str, Any]:
    """Return the settings of a run of so many epochs, whatever its preset counts in."""
    return {"minutes": None, "loop.steps": None, "loop.epochs": epochs}


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any]]:
    """Return the settings that differ, by path; a part of another kind is told by what differs from its defaults."""
    if old == new:
        return []
    if is_dataclass(old) and type(old) is type(new):
        names = [f.name for f in fields(old)]
        return [d for n in names for d in differences(getattr(old, n), getattr(new, n), f"{path}.{n}".lstrip("."))]
    if is_dataclass(new):
        told = [f"{f.name}={getattr(new, f.name)!r}" for f in fields(new) if getattr(new, f.name) != f.default]
        return [(path, f"{type(new).__name__}({', '.join(told)})")]
    return [(path, new)]


def ten_minutes(epochs: float | None = None) -> Experiment:
    """From scratch on all of CIFAR-100, as the preset has it."""
    ours = preset(BASE).config.loop.epochs
    assert ours is not None
    common, faster = length(epochs or ours), f"{BASE}, bf16"
    twice = length(2 * (epochs or ours)) | {"loop.precision": "bf16"}
    return Experiment(
        "What does a transformer learn from scratch in ten minutes on two cores?",
        f"`vitrail train {BASE} --data CIFAR-100-BINARY --seed SEED` as it is, in fp32; and in bf16, in which a CPU "
        f"with AMX makes twice the epochs of the time: `--loop.precision bf16 --loop.epochs {2 * ours:g}`. The time to "
        "keep to is 600 seconds; these include reading the data, evaluations on the way and checkpoints, but not the "
        "start of Python.",
        {BASE: Arm(BASE, common), faster: Arm(BASE, twice)},
        [(faster, BASE)],
    )


def sam(epochs: float = 12.0) -> Experiment:
    """Sharpness-aware minimization, where there are so few pictures that overfitting is real."""
    common, smoothing = UNSEEN | LAST | length(epochs), preset(BASE).config.recipe.label_smoothing
    radii = {"sam": 0.1, "asam": 1.0}  # for CIFAR-100, both (ASAM, arXiv 2102.11600, section 5.1)
    recipes = {name: SamConfig(variant=name, rho=rho, label_smoothing=smoothing) for name, rho in radii.items()}
    base, longer = "base", "base, twice the epochs"
    return Experiment(
        "Does SAM help over its base optimizer at equal epochs? At equal time?",
        f"The first {PER_CLASS} training pictures of each of CIFAR-100's classes. SAM takes two passes for an update, "
        "so that the base takes about as long for twice the epochs. Radii for CIFAR-100 are those of ASAM's paper.",
        {base: Arm(BASE, common, SMALL), longer: Arm(BASE, common | length(2 * epochs), SMALL)}
        | {name.upper(): Arm(BASE, common | {"recipe": recipe}, SMALL) for name, recipe in recipes.items()},
        [(name.upper(), other) for name in recipes for other in (base, longer)],
    )


def semantic(epochs: float = 2.0) -> Experiment:
    """Semantic softmax on the 20 superclasses of CIFAR-100."""
    smoothing = preset(BASE).config.recipe.label_smoothing
    common = UNSEEN | LAST | length(epochs) | {"augment.mixup": 0.0, "augment.cutmix": 0.0}
    recipe = SemanticConfig(tree="cifar100", label_smoothing=smoothing)
    return Experiment(
        "Does semantic softmax help over flat softmax?",
        "CIFAR-100, whose 100 classes lie under 20 superclasses. Labels are smoothed alike, and both are measured on "
        "the 100 classes alone.",
        {"flat": Arm(BASE, common), "semantic": Arm(BASE, common | {"recipe": recipe})},
        [("semantic", "flat")],
    )


def masked(epochs: float = 5.0) -> Experiment:
    """Masked pre-training on CIFAR-100 without labels; then probes, and fine-tuning."""
    vit, inputs = preset(PLAIN).config.model, {"input": preset(PLAIN).config.input}
    recipe = MaskedConfig(decoder_width=64, decoder_depth=2, decoder_heads=4)
    pretrain = inputs | UNSEEN | length(epochs) | {"model": vit, "recipe": recipe, "loop.batch_size": 128}
    tune = UNSEEN | LAST | length(2 * epochs)
    return Experiment(
        "Does masked pre-training (MAE) on pictures without labels help?",
        "A ViT of patch 4, width 128 and depth 4 learns from all training pictures of CIFAR-100 without their labels. "
        f"Then ridge regression is given its features of 5 and 10 labelled pictures per class, mean of {DRAWS} draws; "
        f"and it is fine-tuned on the first {PER_CLASS} pictures per class, beside the same training from scratch.",
        {
            "random weights": Arm(PLAIN, UNSEEN, trained=False, measure=shots),
            "pre-trained": Arm("masked", pretrain, measure=shots),
            "from scratch": Arm(PLAIN, tune, SMALL),
            "fine-tuned": Arm(PLAIN, tune, SMALL, start="pre-trained"),
        },
        [("pre-trained", "random weights"), ("fine-tuned", "from scratch")],
    )


def finetune(epochs: float = 2.0) -> Experiment:
    """Pretrained weights on photos of clothing."""
    # Convolutions over single channels, of which EfficientNet has many, are slower in bf16 than in fp32 on CPUs.
    common = UNSEEN | length(epochs) | {"loop.precision": "fp32"}
    fresh = {"init": None, "model": replace(preset("finetune").config.model, frozen_norm=False)}
    fresh |= LAST | {"optim.head_first": 0.0, "optim.layer_decay": 1.0}
    tuned, others = "fine-tuned", ("head alone", "from scratch", "small ViT from scratch")
    return Experiment(
        "Does fine-tuning all of a pretrained network help over its head alone? Over training from scratch?",
        "3,068 training and 372 test photos of clothing, 10 classes (CC0). From scratch in two ways: the same network "
        "for as many epochs, and the preset for it, a small ViT, for five times as many.",
        {
            tuned: Arm("finetune", common, PHOTOS),
            others[0]: Arm("finetune", common | {"optim.train": "head"}, PHOTOS),
            others[1]: Arm("finetune", common | fresh, PHOTOS),
            others[2]: Arm("photos", common | LAST | length(5 * epochs), PHOTOS),
        },
        [(tuned, other) for other in others],
    )


def switches(epochs: float = 1.5) -> Experiment:
    """EMA, mixup and label smoothing, one at a time."""
    off = {"optim.ema": 0.0, "augment.mixup": 0.0, "augment.cutmix": 0.0, "recipe.label_smoothing": 0.0}
    on = {"EMA": {"optim.ema": 0.99}, "mixup": {"augment.mixup": 0.2}, "smoothing": {"recipe.label_smoothing": 0.1}}
    common = UNSEEN | length(epochs) | off
    return Experiment(
        "Do EMA, mixup and label smoothing help in a short run?",
        "CIFAR-100, so few epochs that the model underfits. Each alone against none of them.",
        {"none": Arm(BASE, common)} | {name: Arm(BASE, common | change) for name, change in on.items()},
        [(name, "none") for name in on],
    )


def few_labels(epochs: float = 32.0) -> Experiment:
    """Meta Pseudo Labels and UDA beside labels alone, for as many updates."""
    network = replace(WIDE_RESNETS["wide-resnet-28-2"], widths=(16, 32, 64), depths=(1, 1, 1), dropout=0.0)
    schedule = {"warmup_steps": 100, "ema": 0.99, "lr": 0.05}
    common = UNSEEN | length(epochs) | {f"optim.{name}": value for name, value in schedule.items()}
    common |= {"model": network, "loop.batch_size": 64, "input.val_fraction": 0.1}
    taught = {"recipe.student_wait": 100, "recipe.uda_steps": 200, "recipe.finetune_steps": 100}
    taught |= {"recipe.unlabelled_ratio": 3}
    supervised = {"recipe": SupervisedConfig(label_smoothing=0.15), "augment.policy": "none", "augment.cutout": 0}
    alone, uda, meta = "labels alone", "UDA", "Meta Pseudo Labels"
    return Experiment(
        "What do pictures without labels bring beside 4,000 labelled ones?",
        "CIFAR-10, 4,000 labels, 41,000 pictures without, a Wide-ResNet-10-1 of 0.08 million parameters. In all three "
        "2,000 updates of 64 labelled pictures; UDA and Meta Pseudo Labels see 192 more in each, UDA being the same "
        "teacher and student without the feedback. What is measured is the student, at the end fine-tuned on labels.",
        {
            alone: Arm("wrn28-2-cifar10-4000-mpl", common | supervised, CIFAR10),
            uda: Arm("wrn28-2-cifar10-4000-mpl-feedback-none", common | taught, CIFAR10),
            meta: Arm("wrn28-2-cifar10-4000-mpl", common | taught, CIFAR10),
        },
        [(uda, alone), (meta, alone), (meta, uda)],
    )


EXPERIMENTS: dict[str, Callable[..., Experiment]] = {
    "ten-minutes": ten_minutes,
    "sam": sam,
    "semantic": semantic,
    "masked": masked,
    "finetune": finetune,
    "switches": switches,
    "few-labels": few_labels,
}
"""By name; each takes a number of epochs, its budget, in place of its own."""
