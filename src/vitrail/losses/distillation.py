"""How far a student's answers are from a teacher's, one number per picture."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def soft_distance(
    logits: Float[Tensor, "b classes"], teacher_logits: Float[Tensor, "b classes"], temperature: float
) -> Float[Tensor, " b"]:
    """Return the Kullback-Leibler divergence of the probabilities at a temperature from the teacher's.

    Times the squared temperature, by which gradients would shrink (Hinton et al., 2015, arXiv 1503.02531, section 2).
    The paper has the cross-entropy with the teacher's probabilities: the same gradient, and a loss that does not end at
    0. DeiT's released code (`losses.py`) divides by the number of classes as well; its paper, as this, does not.
    """
    ours = F.log_softmax(logits.float() / temperature, dim=-1)
    theirs = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1)


def hard_distance(
    logits: Float[Tensor, "b classes"], teacher_logits: Float[Tensor, "b classes"]
) -> Float[Tensor, " b"]:
    """Return the cross-entropy with the teacher's likeliest class (DeiT, arXiv 2012.12877, section 4)."""
    return F.cross_entropy(logits.float(), teacher_logits.argmax(dim=-1), reduction="none")
