"""How a small member of each family learns CIFAR-100, beside its peer in timm or transformers. About 15 minutes.

.venv-peers/bin/python benchmarks/learning.py CIFAR-100-BINARY [--steps 300]
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from html import escape
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from machine import write_result
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.config.vit import ResNetStem
from vitrail.config.vit_moe import ViTMoEConfig
from vitrail.data import Source, read_cifar
from vitrail.layers.moe import MixtureOfExperts
from vitrail.models import build
from vitrail.models.base import WithLoss
from vitrail.report.charts import HEIGHT, WIDTH, Series, line_chart

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import peers.conftest  # noqa: F401  defines what timm's import of torchvision needs
from peers.test_learning import coatnet_pair, cvt_pair, efficientnet_pair, logits_of, under_their_names, vit_pair

BATCH, DECAY, SMOOTH, TESTED = 64, 0.05, 20, 1000
SMALL, LARGE = ({"image_size": (side, side), "num_classes": 100} for side in (32, 64))
VIT = {"width": 64, "depth": 4, "mlp_dim": 128, "heads": 2, "gelu": "tanh", **SMALL}
STEM = ResNetStem(blocks=(1, 1), width=32)
CVT = {"widths": (32, 64, 96), "mlp_dims": (64, 128, 192), **LARGE}
COATNET = {"widths": (16, 16, 32, 64, 128), "depths": (1, 1, 2, 1), "head_dim": 32, **LARGE}
FAMILIES = (
    ("ViT", "timm", 1e-3, lambda: vit_pair(patch_size=(4, 4), **VIT)),
    ("Hybrid ViT", "timm", 1e-3, lambda: vit_pair(stem=STEM, patch_size=(1, 1), **VIT)),
    ("CvT", "transformers", 1e-3, lambda: cvt_pair(**CVT)),
    ("EfficientNet", "timm", 3e-3, lambda: efficientnet_pair(0.25, 0.5, **LARGE)),
    ("EfficientNet-Lite", "timm", 3e-3, lambda: efficientnet_pair(0.25, 0.5, lite=True, **LARGE)),
    ("CoAtNet", "timm", 3e-4, lambda: coatnet_pair(**COATNET)),
)
VMOE = ViTMoEConfig(patch_size=(4, 4), moe_layers=(1, 3), experts=8, **VIT)

VERSIONS = {name: version(name) for name in ("timm", "transformers")}
PICTURE = Path(__file__).parent / "results" / "learning.svg"
STYLE = """
text { font: 11.5px system-ui, "Segoe UI", "Liberation Sans", "DejaVu Sans", sans-serif; fill: #56606c; }
.title { font-size: 14px; font-weight: 600; fill: #1a1f26; }
.page { fill: #f5f6f8; } .panel { fill: #fff; stroke: #dfe3e8; } .grid { stroke: #e8ebef; } .axis { stroke: #56606c; }
.middle { text-anchor: middle; } .end { text-anchor: end; }
.line { fill: none; stroke-linejoin: round; stroke-width: 4; stroke: #7db8e8; }
.line.s2 { stroke-width: 1.6; stroke: #b4500a; stroke-dasharray: 5 3; }
@media (prefers-color-scheme: dark) {
  text { fill: #a2acb8; } .title { fill: #e7eaee; } .page { fill: #101317; } .grid { stroke: #272d35; }
  .panel { fill: #181c22; stroke: #2c323b; } .axis { stroke: #a2acb8; }
  .line { stroke: #2b6ea8; } .line.s2 { stroke: #f0a05a; }
}"""

TEXT = """![Training losses](learning.svg)

{steps} steps of 64 pictures, float32, one thread. Both networks start from the same weights (ours, under the peer's
names) and see the same pictures in the same order; AdamW with warm-up and cosine decay, weight decay 0.05; no
augmentation, no dropout; at 64 pixels every pixel is doubled. In parentheses, what rounding alone does: the peer's own
training again, after each of its first weights was moved to the next number that float32 has. Last losses and the
largest distance are of means of 20 steps, the first step with losses 0.1 % apart is of the losses themselves. The test
loss is that of 1,000 pictures in evaluation mode, in which BatchNorm takes its running statistics: after so few steps
those of EfficientNet, to which a batch adds 1 %, lag behind. timm {timm}, transformers {transformers}.

| family | peer | parameters | side | rate | first loss | last, ours / peer | test | apart | 0.1 % apart | steps/s |
|---|---|---|---|---|---|---|---|---|---|---|
{rows}

V-MoE has no peer in these libraries. Blocks 2 and 4 of the same ViT have 8 experts each, 2 for a token; first and last
20 steps, mean of both layers.

| | first | last | last, without balancing losses |
|---|---|---|---|
{balance}
"""


class Run:
    """A network in training, and what it said on the way."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.train()
        self.optimizer = torch.optim.AdamW(network.parameters(), weight_decay=DECAY)
        self.losses: list[float] = []
        self.seconds = 0.0

    def step(self, images: Tensor, targets: Tensor, rate: float) -> None:
        """Take one step. The loss that is kept is the cross-entropy alone."""
        began = time.perf_counter()
        answer = self.network(images)
        loss = F.cross_entropy(answer if isinstance(answer, Tensor) else answer.logits, targets)
        self.losses.append(loss.item())
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        (loss + answer.loss if isinstance(answer, WithLoss) else loss).backward()
        self.optimizer.step()
        self.seconds += time.perf_counter() - began


def pictures(source: Source, chosen: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return pictures from -1 to 1 with their classes; a pixel becomes a square where networks want larger ones."""
    images = torch.from_numpy(source.pixels()[chosen.numpy()]).permute(0, 3, 1, 2) / 127.5 - 1.0
    times = side // images.shape[-1]
    targets = torch.from_numpy(source.targets[chosen.numpy()])
    images = images.repeat_interleave(times, 2).repeat_interleave(times, 3)
    # Our convolutions bring them into this order in memory, which decides how sums are rounded.
    return images.contiguous(memory_format=torch.channels_last), targets


def train(networks: Sequence[nn.Module], source: Source, side: int, rate: float, steps: int) -> list[Run]:
    """Train networks side by side, step by step on the same batch, with linear warm-up and cosine decay."""
    runs, warmup = [Run(network) for network in networks], max(steps // 10, 1)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        batch = pictures(source, order[step * BATCH : (step + 1) * BATCH], side)
        decay = 0.5 + 0.5 * math.cos(math.pi * max(step - warmup, 0) / (steps - warmup))
        for run in runs:
            run.step(*batch, rate * min((step + 1) / warmup, decay))
    return runs


def smooth(values: Sequence[float]) -> np.ndarray:
    """Return for every step the mean of the last `SMOOTH` values, as far as there are so many."""
    return np.array([np.mean(values[max(i - SMOOTH, 0) : i]) for i in range(1, len(values) + 1)])


def panel(title: str, note: str, lines: dict[str, Sequence[float]]) -> str:
    """Return a chart of smoothed lines under a title and a note."""
    series = [Series(name, list(enumerate(smooth(line).tolist(), start=1))) for name, line in lines.items()]
    chart = line_chart(series, label=f"{title}. {note}", x_label="training step")
    chart = chart.replace("<svg ", f'<svg x="8" y="52" width="{WIDTH}" height="{HEIGHT}" ', 1)
    texts = f'<text class="title" x="16" y="25">{escape(title)}</text><text x="16" y="44">{escape(note)}</text>'
    return f'<rect class="panel" width="{WIDTH + 16}" height="{HEIGHT + 60}" rx="8"/>{texts}{chart}'


@torch.no_grad()
def nudged(network: nn.Module) -> nn.Module:
    """Return a copy in which every weight is moved, up or down, to the next number that float32 has."""
    network = deepcopy(network)
    for weight in network.parameters():
        weight.copy_(torch.nextafter(weight, torch.where(torch.rand_like(weight) < 0.5, math.inf, -math.inf)))
    return network


def beside_peer(family: tuple, train_set: Source, test_set: Source, steps: int) -> tuple[str, str]:
    """Train a small member, its peer and the nudged peer; return a row of the table and a panel."""
    name, library, rate, pair = family
    torch.manual_seed(0)
    config, theirs = pair()
    ours = build(config)
    theirs.load_state_dict(under_their_names(ours))
    runs = train([ours, theirs, nudged(theirs)], train_set, config.image_size[0], rate, steps)
    a, b, c = (np.array(run.losses) for run in runs)
    far, rounding = (f"{np.abs(smooth(x) - smooth(b)).max():.1g}".replace("e-0", "e-") for x in (a, c))
    parted, nudge = (next((str(i + 1) for i in np.flatnonzero(np.abs(x - b) > 1e-3 * b)), "never") for x in (a, c))
    images, targets = pictures(test_set, torch.arange(TESTED), config.image_size[0])
    with torch.no_grad():
        tested = [F.cross_entropy(logits_of(run.network.eval(), images), targets).item() for run in runs]
    cells = (
        name,
        library,
        f"{sum(p.numel() for p in ours.parameters()):,}",
        f"{config.image_size[0]}",
        f"{rate}",
        f"{a[0]:.3f}",
        f"{smooth(a)[-1]:.4f} / {smooth(b)[-1]:.4f} ({smooth(c)[-1]:.4f})",
        "{:.4f} / {:.4f} ({:.4f})".format(*tested),
        f"{far} ({rounding})",
        f"{parted} ({nudge})",
        f"{steps / runs[0].seconds:.1f} / {steps / runs[1].seconds:.1f}",
    )
    row = f"| {' | '.join(cells)} |"
    print(row, flush=True)
    distance = "equal in every digit" if far == "0" else f"at most {far} apart"
    note = f"Loss; {distance} (rounding alone: {rounding})"
    return row, panel(name, note, {"vitrail": a, library: b})


def watched(config: ViTMoEConfig) -> tuple[nn.Module, list[list[float]]]:
    """Return a V-MoE, and a list that fills with what its mixtures did: [step x layer, figure]."""
    torch.manual_seed(0)
    model, figures = build(config), []

    def note(_layer: nn.Module, _input: object, output: tuple) -> None:
        routing, tokens = output[1], torch.bincount(output[1].experts.flatten(), minlength=config.experts).float()
        lost = 1.0 - routing.kept.float().mean().item()
        figures.append([(tokens.max() / tokens.mean()).item(), lost, *(x.mean().item() for x in routing[3:])])

    for layer in model.modules():
        if isinstance(layer, MixtureOfExperts):
            layer.register_forward_hook(note)
    return model, figures


def mixtures(source: Source, steps: int) -> tuple[list[str], list[str]]:
    """Train V-MoE with and without its balancing losses, and a dense ViT of its shape; return table and panels."""
    (model, on), (free, off) = watched(VMOE), watched(replace(VMOE, importance_loss=0.0, load_loss=0.0))
    torch.manual_seed(0)
    runs = train([model, free, build(vit_pair(patch_size=(4, 4), **VIT)[0])], source, 32, 1e-3, steps)
    loss, loss_off, dense = (run.losses for run in runs)
    on, off = (np.array(figures).reshape(steps, len(VMOE.moe_layers), -1).mean(axis=1).T for figures in (on, off))
    names = ("busiest expert's tokens, in even shares", "choices that found no place", "importance loss", "load loss")
    rows = [
        f"| {name} | {smooth(x)[SMOOTH - 1]:.3f} | {smooth(x)[-1]:.3f} | {smooth(y)[-1]:.3f} |"
        for name, x, y in zip((*names, "cross-entropy"), (*on, loss), (*off, loss_off), strict=True)
    ]
    rows.append(f"| cross-entropy of the dense ViT | {smooth(dense)[SMOOTH - 1]:.3f} | {smooth(dense)[-1]:.3f} | |")
    kinds = ("with balancing losses", "without")
    return rows, [
        panel("V-MoE", "Loss, beside a dense ViT of the same shape", {"vitrail V-MoE": loss, "vitrail ViT": dense}),
        panel("V-MoE: the busiest expert", "Its tokens, in even shares", {kinds[0]: on[0], kinds[1]: off[0]}),
        panel("V-MoE: full experts", "Share of choices without a place", {kinds[0]: on[1], kinds[1]: off[1]}),
    ]


def draw(panels: Sequence[str]) -> str:
    """Return panels in rows of three as one SVG."""
    wide, high = WIDTH + 30, HEIGHT + 74
    places = [(14 + i % 3 * wide, 14 + i // 3 * high) for i in range(len(panels))]
    body = "".join(f'<g transform="translate({x} {y})">{p}</g>' for (x, y), p in zip(places, panels, strict=True))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {14 + 3 * wide} {places[-1][1] + high}" role="img">'
    title = "<title>How a small member of each family learns CIFAR-100, beside its peer</title>"
    return f'{head}{title}<style>{STYLE}</style><rect class="page" width="100%" height="100%"/>{body}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cifar", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = read_cifar(args.cifar)
    rows, panels = zip(*(beside_peer(family, data.train, data.test, args.steps) for family in FAMILIES), strict=True)
    balance, more = mixtures(data.train, args.steps)
    PICTURE.write_text(draw([*panels, *more]), encoding="utf-8")
    body = TEXT.format(steps=args.steps, rows="\n".join(rows), balance="\n".join(balance), **VERSIONS)
    print(write_result("learning", ".venv-peers/bin/python benchmarks/learning.py CIFAR-100-BINARY", body))


if __name__ == "__main__":
    main()
