"""The position-wise feed-forward network of a Transformer block."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Gelu(nn.Module):
    """Gaussian error linear unit (Hendrycks and Gimpel, 2016, arXiv 1606.08415), in the flavour the weights expect.

    `tanh`: JAX's default; `erf`: exact, timm and Hugging Face; `quick`: x * sigmoid(1.702 x), CLIP and CvT.
    """

    def __init__(self, flavour: str) -> None:
        super().__init__()
        self.flavour = flavour

    def forward(self, x: Tensor) -> Tensor:
        if self.flavour == "quick":
            return x * torch.sigmoid(1.702 * x)
        return F.gelu(x, approximate="tanh" if self.flavour == "tanh" else "none")

    def extra_repr(self) -> str:
        return self.flavour


class FeedForward(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, hidden: int, *, gelu: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.act = Gelu(gelu)
        self.down = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.dropout(self.down(self.dropout(self.act(self.up(x)))))

    def init_weights(self) -> None:
        for layer in (self.up, self.down):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)
