"""From a configuration and weights to a model, without a random number drawn or a tensor copied."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vitrail.config.model import ModelConfig
from vitrail.errors import UserError
from vitrail.models import ImageModel, build


def empty_model(config: ModelConfig) -> ImageModel:
    """Return the model of a configuration on the meta device: shapes without memory."""
    with torch.device("meta"):
        return build(config)


def check_fit(model: ImageModel, shapes: Mapping[str, tuple[int, ...]], source: object) -> None:
    """Raise a UserError that names the first tensor that is missing, left over, or of another shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in wanted.items():
        if name not in shapes:
            raise UserError(f"{source} lacks the tensor {name!r} of shape {shape} that its configuration asks for.")
        if shapes[name] != shape:
            raise UserError(f"{source}: {name!r} has the shape {shapes[name]}; its configuration asks for {shape}.")
    if left := [name for name in shapes if name not in wanted]:
        shown = ", ".join(left[:8]) + (", ..." if len(left) > 8 else "")
        raise UserError(f"{source} holds tensors that its configuration has no place for: {shown}.")


def assemble(config: ModelConfig, state: Mapping[str, Tensor], source: object) -> ImageModel:
    """Return a model that takes over the tensors of `state`, in evaluation mode.

    Args:
        config: What to build.
        state: Every parameter and buffer; numbers of another precision are converted to the model's.
        source: What to call the weights in errors.

    Raises:
        UserError: When the weights do not fit the configuration.
    """
    model = empty_model(config)
    check_fit(model, {name: tuple(tensor.shape) for name, tensor in state.items()}, source)
    wanted = model.state_dict()
    model.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in state.items()}, assign=True)
    return model.eval()
