"""A layer of mixed experts beside the dense layer of equal arithmetic, beside a loop over experts, and its parts.

python benchmarks/experts.py

The dense layer has k times the hidden width and takes the same tokens: tokens x 2 x width x k mlp multiply-accumulates,
as many as k experts for each token. Evaluation drops no token; training has room for 1.05 times an even share.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from unittest import mock

import torch
from machine import table, write_result
from torch import Tensor, nn

from vitrail.benchmark.limits import computes_in_bf16
from vitrail.benchmark.timing import Timing, Work, take_turns
from vitrail.config.vit_moe import ViTMoEConfig
from vitrail.layers import moe
from vitrail.layers.feedforward import FeedForward
from vitrail.layers.moe import MixtureOfExperts, combine, dispatch
from vitrail.parallel import Precision, autocast

EXPERTS, CHOICES = 8, 2
GOAL = 1.25
"""Time of the mixture, in times of the dense layer, at most."""
CPU = torch.device("cpu")
Answer = Callable[..., Tensor | tuple[Tensor, ...]]
PARTS = ("router", "seats", "dispatch", "experts", "combine")
NOTE = f"""{EXPERTS} experts, {CHOICES} a token. The dense layer has {CHOICES} times the hidden width and takes the same
tokens: as many multiply-accumulates, tokens x 2 x width x {CHOICES} mlp. Training is forward and backward with room for
1.05 times an even share; evaluation drops no token. "In blocks" is the mixture with a block of equal size for each
expert, as it is exported; the loop finds each expert's tokens and drops none. Median ± quartiles of turns."""


@dataclass(frozen=True)
class Shape:
    """What a layer works on."""

    name: str
    width: int
    mlp_dim: int
    tokens: int
    pictures: int

    @property
    def label(self) -> str:
        return f"{self.name}, {self.pictures} pictures"


SHAPES = (
    Shape("V-MoE-B/16", 768, 3072, tokens=197, pictures=8),
    Shape("V-MoE-B/16", 768, 3072, tokens=197, pictures=32),
    Shape("V-MoE-S/32", 512, 2048, tokens=50, pictures=64),
)
TINY = (Shape("tiny", 32, 64, tokens=10, pictures=8),)


def mixture_of(shape: Shape) -> MixtureOfExperts:
    config = ViTMoEConfig(
        width=shape.width,
        mlp_dim=shape.mlp_dim,
        heads=8,
        experts=EXPERTS,
        experts_per_token=CHOICES,
    )
    mixture = MixtureOfExperts(config)
    with torch.no_grad():
        mixture.init_weights()
    return mixture


def loop_over_experts(mixture: MixtureOfExperts, x: Tensor) -> Tensor:
    """Return the mixture's answer as it is often written: find the tokens of each expert, work, add up. None drops."""
    tokens, layer = x.flatten(0, 1), mixture.experts
    experts, gates, *_ = mixture.router(tokens[None])
    experts, gates = experts[0], gates[0]
    sums = torch.zeros_like(tokens)
    weights = zip(layer.up.weight, layer.up.bias, layer.down.weight, layer.down.bias, strict=True)
    for number, (up, up_bias, down, down_bias) in enumerate(weights):
        token, choice = torch.where(experts == number)
        hidden = layer.act(torch.addmm(up_bias, tokens[token], up))
        answers = torch.addmm(down_bias, hidden, down) * gates[token, choice, None]
        sums = sums.index_add(0, token, answers.to(sums.dtype))
    return sums.view_as(x)


def working(
    module: nn.Module, answer: Answer, inputs: Sequence[Tensor], precision: Precision, *, training: bool
) -> Work:
    """Return one answer to these inputs; in training with the backward pass, to weights and inputs."""
    module.train(training)
    inputs = [tensor.detach().requires_grad_(training and tensor.is_floating_point()) for tensor in inputs]

    def work() -> int:
        module.train(training)
        with torch.set_grad_enabled(training), autocast(precision, CPU):
            answers = answer(*inputs)
        if training:
            answers = answers if isinstance(answers, tuple) else (answers,)
            torch.autograd.backward(answers, [torch.ones_like(one) for one in answers])
            for leaf in (*module.parameters(), *inputs):
                leaf.grad = None
        return 1

    return work


def layers(shape: Shape, precision: Precision, *, training: bool) -> dict[str, Work]:
    """Return the layers to compare."""
    torch.manual_seed(0)
    mixture, x = mixture_of(shape), torch.randn(shape.pictures, shape.tokens, shape.width)
    dense = FeedForward(shape.width, CHOICES * shape.mlp_dim, gelu="tanh")
    with torch.no_grad():
        dense.init_weights()

    def whole(tokens: Tensor) -> tuple[Tensor, ...]:
        y, routing = mixture(tokens)
        return (y, routing.importance, routing.load)  # all that is learned from

    def in_blocks(tokens: Tensor) -> tuple[Tensor, ...]:
        with mock.patch.object(moe, "multiple_of_rows", lambda *_: None):
            return whole(tokens)

    answers: dict[str, tuple[nn.Module, Answer]] = {
        "dense": (dense, dense),
        "mixture": (mixture, whole),
        "mixture, blocks of equal size": (mixture, in_blocks),
        "loop over experts": (mixture, lambda tokens: loop_over_experts(mixture, tokens)),
    }
    return {name: working(part, answer, [x], precision, training=training) for name, (part, answer) in answers.items()}


def parts(shape: Shape, precision: Precision, *, training: bool) -> dict[str, Work]:
    """Return the parts of the mixture, each for itself."""
    torch.manual_seed(0)
    mixture, x = mixture_of(shape).train(training), torch.randn(shape.pictures, shape.tokens, shape.width)
    with torch.no_grad(), autocast(precision, CPU):
        tokens, filling = mixture._grouped(x)
        experts, gates, *_ = mixture.router(tokens, filling)
        multiple = mixture.experts.multiple_of_rows(x)
        seats = mixture._seats(experts, gates, multiple)
        buffer = dispatch(tokens, seats)
        y = mixture.experts(buffer, seats)

    def routing(tokens: Tensor) -> tuple[Tensor, ...]:
        return mixture.router(tokens)[1:]

    def seat() -> int:
        mixture._seats(experts, gates, multiple)
        return 1

    none = nn.Module()
    works: dict[str, Work] = {
        "router": working(mixture, routing, [tokens], precision, training=training),
        "seats": seat,
        "dispatch": working(none, lambda tokens: dispatch(tokens, seats), [tokens], precision, training=training),
        "experts": working(mixture, lambda rows: mixture.experts(rows, seats), [buffer], precision, training=training),
        "combine": working(none, lambda y, gates: combine(y, gates, seats), [y, gates], precision, training=training),
    }
    return works


def compared(times: dict[str, Timing]) -> list[str]:
    """Return the columns of the first table."""
    ratio = {name: times["dense"].times(timing) for name, timing in times.items()}
    return [
        *(f"{1e3 / times[name].rate:.2f} ± {times[name].spread:.0%}" for name in ("dense", "mixture")),
        f"{ratio['mixture']:.2f}",
        "reached" if ratio["mixture"] <= GOAL else "not reached",
        f"{ratio['mixture, blocks of equal size']:.2f}",
        f"{ratio['loop over experts']:.2f}",
    ]


def shares(times: dict[str, Timing]) -> list[str]:
    """Return the columns of the second table."""
    total = sum(1 / timing.rate for timing in times.values())
    return [f"{1 / times[name].rate / total:.1%}" for name in PARTS]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="rehearse in seconds; nothing is written")
    options = parser.parse_args(arguments)
    turns, seconds = (2, 0.001) if options.tiny else (7, 0.3)
    precisions: list[Precision] = ["fp32", "bf16"] if options.tiny or computes_in_bf16() else ["fp32"]
    labels = ["layer", "pass", "precision"]
    whole = [
        [*labels, "dense, ms", "mixture, ms", "mixture / dense", f"at most {GOAL}", "in blocks / dense", "loop / dense"]
    ]
    pieces = [[*labels, *PARTS]]
    for shape, training, precision in product(TINY if options.tiny else SHAPES, (True, False), precisions):
        row = [shape.label, "training" if training else "evaluation", precision]
        whole.append(
            row + compared(take_turns(layers(shape, precision, training=training), turns=turns, seconds=seconds))
        )
        pieces.append(
            row + shares(take_turns(parts(shape, precision, training=training), turns=turns, seconds=seconds / 4))
        )
    parted = f"Parts, each timed for itself, as shares of their sum:\n\n{table(pieces[0], pieces[1:])}"
    body = f"{NOTE}\n\n{table(whole[0], whole[1:])}\n\n{parted}"
    print(body)
    if not options.tiny:
        write_result("experts", "python benchmarks/experts.py", body)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
