"""What published recipes need, as timm has it: TensorFlow's RMSProp, and RandAugment of growing strength."""

import pytest
import timm.data.auto_augment as theirs
import torch
from timm.optim import RMSpropTF
from torch import nn

from vitrail.data import policies
from vitrail.optimizers import RMSProp

NAMES = {
    "Posterize": "PosterizeIncreasing",
    "Solarize": "SolarizeIncreasing",
    "Color": "ColorIncreasing",
    "Contrast": "ContrastIncreasing",
    "Brightness": "BrightnessIncreasing",
    "Sharpness": "SharpnessIncreasing",
    "TranslateX": "TranslateXRel",
    "TranslateY": "TranslateYRel",
}


def test_rmsprop_goes_where_timms_goes() -> None:
    torch.manual_seed(0)
    ours, peer = (nn.Parameter(torch.linspace(-1.0, 1.0, 6)) for _ in range(2))
    optimizers = [
        RMSProp([{"params": [ours], "weight_decay": 0.01}], lr=0.1, momentum=0.9),
        RMSpropTF([peer], lr=0.1, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=0.01),
    ]
    for rate in (0.1, 0.05, 0.2, 0.1):
        ours.grad = torch.randn(6)
        peer.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        torch.testing.assert_close(ours, peer, rtol=1e-6, atol=1e-6)


def test_the_operations_are_timms() -> None:
    assert sorted(NAMES.get(name, name) for name in policies.INCREASING) == sorted(theirs._RAND_INCREASING_TRANSFORMS)


@pytest.mark.parametrize("level", [0.0, 0.5, 4.99, 8.3, 9.0, 9.9, 10.0])
@pytest.mark.parametrize("name", policies.INCREASING)
def test_an_operations_argument_is_timms(monkeypatch, name: str, level: float) -> None:
    rule = theirs.LEVEL_TO_ARG[NAMES.get(name, name)]
    if rule is None:
        assert policies.increasing_argument(name, level, (224, 224)) == 0
        return
    sides = {"TranslateX": 100, "TranslateY": 200}
    for negate, down in ((0.0, False), (1.0, True)):
        monkeypatch.setattr("random.random", lambda negate=negate: negate)
        (argument,) = rule(level, {})
        argument *= sides.get(name, 1)
        ours = policies.increasing_argument(name, level, (200, 100), down=down)
        assert ours == pytest.approx(argument if name in policies.ENHANCE else abs(argument))
