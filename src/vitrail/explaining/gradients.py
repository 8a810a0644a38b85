"""Which places speak for a class, told by gradients: relevance through attention, and Grad-CAM.

The model runs as always, with its fused kernels. What attention reads and mixes is noted on the way; from it and from
the gradient of what was mixed, probabilities and their gradients are computed block by block:
for Y = A V, dL/dA = (dL/dY) V^T.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.errors import UserError
from vitrail.explaining.attention import as_vit, on_grid, token_shares
from vitrail.explaining.methods import require_head
from vitrail.models import CoAtNet, CvT, EfficientNet, ImageModel, WideResNet
from vitrail.models.coatnet import MBConv
from vitrail.models.cvt import Stage


def relevance(
    model: ImageModel, images: Float[Tensor, "b c h w"], labels: Int[Tensor, " b"]
) -> Float[Tensor, "b rows columns"]:
    """Return how much every patch speaks for a class: attention weighted by its gradients, through all blocks.

    Chefer et al., 2021, arXiv 2103.15679, section 3.2: the relevance R of all tokens to each begins as the identity,
    and every block adds A R, where A is the positive part of attention times its gradient (`weighed`). The answer is
    the class token's row of R. Other heads read other rows, in their shares: a mean all of them, less the identity,
    which would tell all places alike. Attention pooling is one step more, with a map A of its own.

    The values are 0 or larger; their scale means nothing.

    Args:
        model: A ViT in evaluation mode, with a head.
        images: Pictures, normalised.
        labels: The class to speak for, of each.

    Raises:
        UserError: When the model is no ViT, or has no head.
    """
    vit = as_vit(model)
    vit.require_places()
    layers, pool = [block.attention for block in vit.blocks()], vit.attention_pool
    outs = [layer.out for layer in layers] + ([] if pool is None else [pool.out])
    with noted(layers, inputs=True) as read, noted(outs, inputs=True) as mixed, noted([vit.norm]) as last:
        score = class_score(vit, images, labels)
    gradients = torch.autograd.grad(score, mixed)
    with torch.no_grad():
        tokens = last[0]
        identity = torch.eye(tokens.shape[1], dtype=tokens.dtype, device=tokens.device)
        total = identity.expand(len(tokens), -1, -1)
        for layer, x, gradient in zip(layers, read, gradients, strict=False):  # attention pooling has one more
            values = layer.qkv(x).chunk(3, dim=-1)[2]
            total = total + weighed(layer.weights(x), _of_weights(gradient, values, layer.heads)) @ total
        if pool is None:
            arrived = token_shares(vit, tokens)[:, None] @ (total - identity)
        else:
            values = pool.key_value(tokens).chunk(2, dim=-1)[1]
            arrived = weighed(pool.weights(tokens), _of_weights(gradients[-1], values, pool.heads)) @ total
        return on_grid(arrived[:, 0], vit, images)


def weighed(attention: Float[Tensor, "b heads q k"], gradients: Float[Tensor, "b heads q k"]) -> Float[Tensor, "b q k"]:
    """Return attention weighted by its gradients: the mean over heads of the positive part of their product.

    Chefer et al., arXiv 2103.15679, equation 5.
    """
    return (attention * gradients).clamp(min=0.0).mean(dim=1)


def grad_cam(
    model: ImageModel, images: Float[Tensor, "b c h w"], labels: Int[Tensor, " b"]
) -> Float[Tensor, "b rows columns"]:
    """Return where the last features speak for a class: Grad-CAM.

    Selvaraju et al., 2017, arXiv 1610.02391, equations 1 and 2: channels are summed, each weighted by the mean gradient
    over its places, and the positive part is kept. The features are those of the last convolutions, as the paper has
    it: what is pooled for the head; in CoAtNet what MBConv blocks hand to attention, in CvT what the last stage's
    convolutional embedding reads. Attention, which may come after them, moves evidence to other places.

    The values are 0 or larger; their scale means nothing.

    Args:
        model: A model in evaluation mode, with a head.
        images: Pictures, normalised.
        labels: The class to speak for, of each.

    Raises:
        UserError: When the model has no head, or no such features, as a ViT.
    """
    module, inputs = _last_convolved(model)
    with noted([module], inputs=inputs) as notes:
        score = class_score(model, images, labels)
    (features,) = notes
    (gradient,) = torch.autograd.grad(score, features)
    with torch.no_grad():
        return (features * gradient.mean(dim=(2, 3), keepdim=True)).sum(dim=1).clamp(min=0.0)


def class_score(model: ImageModel, images: Float[Tensor, "b c h w"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
    """Return the sum over pictures of the logit of each one's class, with its graph, whether weights are frozen or not.

    Raises:
        UserError: When the model has no head.
    """
    require_head(model)
    with torch.enable_grad():
        logits = model(images.detach().requires_grad_())
        return logits.gather(1, labels[:, None]).sum()


@contextmanager
def noted(modules: Sequence[nn.Module], *, inputs: bool = False) -> Iterator[list[Tensor]]:
    """Note what modules answer, or what they read (`inputs`), in the order in which they are called."""
    notes: list[Tensor] = []

    def note_input(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        notes.append(arguments[0])

    def note_answer(module: nn.Module, arguments: tuple[Tensor, ...], answer: Tensor) -> None:
        notes.append(answer)

    handles = [
        module.register_forward_pre_hook(note_input) if inputs else module.register_forward_hook(note_answer)
        for module in modules
    ]
    try:
        yield notes
    finally:
        for handle in handles:
            handle.remove()


def _of_weights(
    gradient: Float[Tensor, "b q d"], values: Float[Tensor, "b k d"], heads: int
) -> Float[Tensor, "b heads q k"]:
    """Return the gradient of attention probabilities from that of what they mixed, the values."""
    gradient, values = (rearrange(x, "b n (heads dh) -> b heads n dh", heads=heads) for x in (gradient, values))
    return einsum(gradient, values, "b heads q dh, b heads k dh -> b heads q k")


def _last_convolved(model: ImageModel) -> tuple[nn.Module, bool]:
    """Return the module that answers with the last features of convolutions, or that reads them (true)."""
    match model:
        case EfficientNet() | WideResNet():
            return model.last, False
        case CoAtNet():
            return [block for block in model.blocks() if isinstance(block, MBConv)][-1], False
        case CvT():
            return cast(Stage, model.stages[-1]).patch_embed.conv, True
        case _:
            raise UserError(f"Grad-CAM needs features of convolutions, which {type(model).__name__} does not have.")
