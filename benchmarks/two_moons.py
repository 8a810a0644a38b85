"""Two moons with three labels each: from labels alone, UDA, and Meta Pseudo Labels, side by side. About 5 minutes.

python benchmarks/two_moons.py [--seeds 10] [--steps 2000]

The toy problem of Meta Pseudo Labels (arXiv 2003.10580, section 4.1), with our learners and their own step.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from machine import table, write_result
from recipes import compared
from torch import Tensor, nn

from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.run import AugmentConfig, OptimConfig, SupervisedConfig
from vitrail.config.vit import ViTConfig
from vitrail.data.augment import Augment
from vitrail.data.base import Batch
from vitrail.models.base import ImageModel
from vitrail.recipes import Learner
from vitrail.recipes.meta_pseudo_labels import MetaPseudoLabelsLearner
from vitrail.recipes.supervised import SupervisedLearner

POINTS, LABELS, BATCH, NOISE, NUDGE = 2000, 3, 128, 0.04, 0.12
OPTIM = OptimConfig(name="sgd", lr=0.1, momentum=0.0, weight_decay=1e-3, clip_norm=1.0, schedule="constant")
PLAIN = {"student_wait": 0, "finetune_steps": 0, "uda_steps": 0, "label_smoothing": 0.0, "labels": "sampled"}
ARMS: dict[str, MetaPseudoLabelsConfig | None] = {
    "labels alone": None,
    "pseudo labels": MetaPseudoLabelsConfig(feedback="none", uda_weight=0.0, **PLAIN),
    "Meta Pseudo Labels": MetaPseudoLabelsConfig(feedback="meta", uda_weight=0.0, **PLAIN),
    "UDA": MetaPseudoLabelsConfig(feedback="none", uda_weight=1.0, **PLAIN),
    "Meta Pseudo Labels with UDA": MetaPseudoLabelsConfig(feedback="meta", uda_weight=1.0, **PLAIN),
}
PAIRS = (
    ("pseudo labels", "labels alone"),
    ("Meta Pseudo Labels", "labels alone"),
    ("Meta Pseudo Labels", "pseudo labels"),
    ("UDA", "labels alone"),
    ("Meta Pseudo Labels with UDA", "UDA"),
)
PICTURE = Path(__file__).parent / "results" / "two-moons.svg"
COLOURS = ("#2b6ea8", "#b4500a")
STYLE = """text { font: 12px system-ui, sans-serif; fill: #56606c; text-anchor: middle; }
.panel { fill: #fff; stroke: #dfe3e8; }"""

TEXT = """![Two moons](two-moons.svg)

{points:,} points of two half circles with noise of {noise}, {labels} labels each; {steps:,} updates of SGD at a rate of
{lr}. The network has two hidden layers of {width} units. Pseudo labels are drawn from the teacher's probabilities;
UDA's strong view of a point is that point moved by noise of {nudge}. Accuracy is that of the student on {points:,}
other points. Intervals are of 95 % (Student's t) over {seeds} seeds, which share points, labels and initial weights.

{results}

{verdicts}

The picture shows how seed 0 classifies; circles are the labelled points."""


class Plane(ImageModel):
    """A network on the two coordinates of a point, which lie in a picture of two grey pixels."""

    WIDTH = 64

    def __init__(self) -> None:
        super().__init__(ViTConfig(image_size=(1, 2), patch_size=(1, 1), channels=1, num_classes=2))
        width = self.WIDTH
        self.net = nn.Sequential(
            nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(2.5 * self.features(images))

    def feature_map(self, images: Tensor) -> Tensor:
        return images

    def blocks(self) -> Sequence[nn.Module]:
        return ()

    def depth_of(self, name: str) -> int:
        return 1

    def init_weights(self) -> None: ...


class Nudged(Augment):
    """Strong views: every point a little beside where it was."""

    def __call__(self, batch: Batch, *, classes: int) -> tuple[Tensor, Tensor]:
        points, targets = super().__call__(batch, classes=classes)
        return points + NUDGE * torch.randn_like(points), targets


@dataclass(frozen=True)
class Points:
    """Points as levels of two pixels, [n 1 1 2], which normalisation brings to coordinates in [-1, 1]."""

    places: Tensor
    moons: Tensor

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Points":
        """Draw two interleaved half circles of radius 1."""
        moons, turn = np.arange(POINTS) % 2, rng.uniform(0, math.pi, POINTS)
        upper = np.stack([np.cos(turn), np.sin(turn)], axis=1)
        places = np.where(moons[:, None] == 0, upper, np.array([1.0, 0.5]) - upper)
        places = (places - np.array([0.5, 0.25])) / 1.9 + rng.normal(0, NOISE, (POINTS, 2))
        levels = torch.from_numpy(127.5 * (places + 1)).round().clamp(0, 255).to(torch.uint8)
        return cls(levels.view(-1, 1, 1, 2), torch.from_numpy(moons))

    def batch(self, chosen: Tensor) -> Batch:
        """Return some of them."""
        return Batch(self.places[chosen], self.moons[chosen], chosen, cropped=True)

    @property
    def inputs(self) -> Tensor:
        """All points as the model sees them."""
        return self.places.float() / 127.5 - 1


def learner_of(recipe: MetaPseudoLabelsConfig | None, seed: int) -> Learner:
    """Return a learner; students of one seed start alike."""
    torch.manual_seed(seed)
    student, teacher, augment = Plane(), Plane(), AugmentConfig(crop="none", flip=0.0)
    parts = {"device": torch.device("cpu"), "precision": "fp32"}
    if recipe is None:
        plain, counts = Augment(augment, student.preprocessing), np.array([LABELS, LABELS])
        return SupervisedLearner(student, SupervisedConfig(), OPTIM, augment=plain, class_counts=counts, **parts)
    nudged = Nudged(augment, student.preprocessing)
    return MetaPseudoLabelsLearner(student, recipe, OPTIM, augment=nudged, teacher=teacher, **parts)


def train(recipe: MetaPseudoLabelsConfig | None, points: Points, seed: int, steps: int) -> ImageModel:
    """Return the student, trained."""
    learner = learner_of(recipe, seed)
    labelled = points.batch(torch.arange(2 * LABELS))
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        learner.schedule(step, steps)
        chosen = torch.randint(POINTS, (BATCH,), generator=generator)
        # A draw of a label depends on the picture's key: a point is to be labelled anew each time.
        others = replace(points.batch(chosen), keys=torch.randint(2**62, (BATCH,), generator=generator))
        learner.step([labelled if recipe is None else replace(labelled, unlabelled=others)])
    return learner.model.eval()


@torch.no_grad()
def classes(model: ImageModel, points: Points) -> Tensor:
    """Return the moon that the model sees each point in."""
    return model(points.inputs).argmax(dim=1)


def drawing(panels: dict[str, Tensor], points: Points) -> str:
    """Return a picture: a panel for each way to learn, points in the colour of their answer, labelled ones ringed."""
    wide, high, gap, parts = 190, 150, 12, []
    for place, (name, answers) in enumerate(panels.items()):
        left = place * (wide + gap) + gap
        parts.append(f'<text x="{left + wide / 2}" y="20">{escape(name)}</text>')
        parts.append(f'<rect x="{left}" y="30" width="{wide}" height="{high}" class="panel"/>')
        for number, ((x, y), answer) in enumerate(
            zip(points.inputs.view(-1, 2).tolist(), answers.tolist(), strict=True)
        ):
            ring = number < 2 * LABELS
            if number % 8 > 1 and not ring:  # as many points of either moon
                continue
            at = f'cx="{left + wide * (x + 1.2) / 2.4:.1f}" cy="{30 + high * (0.5 - y / 1.8):.1f}"'
            paint = (
                f'r="5" fill="none" stroke="{COLOURS[answer]}" stroke-width="2"'
                if ring
                else f'r="1.6" fill="{COLOURS[answer]}"'
            )
            parts.append(f"<circle {at} {paint}/>")
    size = f"{len(panels) * (wide + gap) + gap} {high + 44}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}"><style>{STYLE}</style>'
    return head + "".join(parts) + "</svg>\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2000)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {name: [] for name in ARMS}
    panels: dict[str, Tensor] = {}
    for seed in range(asked.seeds):
        rng = np.random.default_rng(seed)
        points, test = Points.draw(rng), Points.draw(rng)
        for name, recipe in ARMS.items():
            model = train(recipe, points, seed, asked.steps)
            found[name].append(float((classes(model, test) == test.moons).double().mean()))
            if seed == 0:
                panels[name] = classes(model, points)
        print(seed, {name: f"{values[-1]:.1%}" for name, values in found.items()}, flush=True)
    if asked.seeds < 2:
        return
    rows = [
        (name, f"**{mean(v):.1%}** ± {100 * stdev(v):.1f}", ", ".join(f"{x:.1%}" for x in v))
        for name, v in found.items()
    ]
    verdicts = [(f"{a} over {b}", *compared(found[a], found[b])) for a, b in PAIRS]
    PICTURE.write_text(drawing(panels, Points.draw(np.random.default_rng(0))), encoding="utf-8")
    body = TEXT.format(
        points=POINTS,
        noise=NOISE,
        labels=LABELS,
        steps=asked.steps,
        lr=OPTIM.lr,
        width=Plane.WIDTH,
        nudge=NUDGE,
        seeds=asked.seeds,
        results=table(("student", "accuracy", "by seed"), rows),
        verdicts=table(("", "difference, points", "95 % interval", "verdict"), verdicts),
    )
    print(body)
    print(write_result("two-moons", "python benchmarks/two_moons.py", body))


if __name__ == "__main__":
    main()
