"""An optimizer that is stored and goes on, beside itself undisturbed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from vitrail.checkpoints.resume import load_latest, save_state

Weights = dict[str, nn.Parameter]


def descend(optimizer: Optimizer, weights: Weights, steps: range) -> None:
    """Make an update per number in `steps`, by random gradients that depend on it alone."""
    for step in steps:
        for i, weight in enumerate(weights.values()):
            gradient = np.random.default_rng(100 * step + i).standard_normal(weight.shape).astype(np.float32)
            weight.grad = torch.empty_like(weight).copy_(torch.from_numpy(gradient))
        optimizer.step()


def check_goes_on(make: Callable[[Weights], Optimizer], weights: Callable[[], Weights], folder: Path) -> None:
    """Check that a stored optimizer goes on bit for bit, and that its state is read as it was written."""
    ours, others = weights(), weights()
    optimizer = make(ours)
    descend(optimizer, ours, range(3))
    save_state(folder, {"step": 3, "optimizer": optimizer.state_dict()}, keep=1)
    loaded = load_latest(folder)
    assert loaded is not None
    resumed = make(others)
    resumed.load_state_dict(loaded[0]["optimizer"])
    for name, weight in ours.items():
        others[name].data.copy_(weight.data)
    for state, other in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert {name: tensor.dtype for name, tensor in state.items()} == {n: t.dtype for n, t in other.items()}
        assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    descend(optimizer, ours, range(3, 6))
    descend(resumed, others, range(3, 6))
    for name, weight in ours.items():
        assert torch.equal(weight, others[name]), name
