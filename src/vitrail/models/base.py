"""What every model of the zoo offers, whatever its family."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from vitrail.config.model import ModelConfig
from vitrail.config.preprocessing import Preprocessing


class ImageModel(nn.Module, ABC):
    """An image classifier. Families are final subclasses; runs, reports and exports use only what stands here."""

    config: ModelConfig
    preprocessing: Preprocessing
    """How a picture becomes the input; travels with the weights."""
    labels: tuple[str, ...]
    """Class names in the order of the logits; empty when unknown."""
    multi_label: bool
    """Whether a picture may carry several labels (independent sigmoids) instead of one (softmax)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.preprocessing = Preprocessing(image_size=config.image_size, channels=config.channels)
        self.labels = ()
        self.multi_label = False

    @abstractmethod
    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Return the vector per picture that the head classifies."""

    @abstractmethod
    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Return logits for normalised pictures."""

    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """Return the units to checkpoint, compile and shard, from input to output."""

    @abstractmethod
    def depth_of(self, name: str) -> int:
        """Return a parameter's distance from the input: 0 for the embedding, `len(blocks()) + 1` for the head."""

    @abstractmethod
    def init_weights(self) -> None:
        """Fill every parameter and buffer as the paper does. Needed after construction on the meta device."""
