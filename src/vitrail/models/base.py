"""What every model of the zoo offers, whatever its family."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Generic, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import TypeVar

from vitrail.config.model import ModelConfig
from vitrail.config.preprocessing import Preprocessing
from vitrail.errors import UserError
from vitrail.layers.embedding import PositionResize

Config = TypeVar("Config", bound=ModelConfig, default=ModelConfig, covariant=True)


class WithLoss(NamedTuple):
    """What a model with losses of its own answers while training."""

    logits: Tensor
    loss: Tensor
    """Scalar, weighted, to be added to the mean loss of the batch."""


class ImageModel(nn.Module, ABC, Generic[Config]):
    """An image classifier. Runs, reports and exports use only what stands here."""

    config: Config
    preprocessing: Preprocessing
    """How a picture becomes the input; travels with the weights."""
    labels: tuple[str, ...]
    """Class names in the order of the logits; empty when unknown."""
    multi_label: bool
    """Whether a picture may carry several labels (independent sigmoids) instead of one (softmax)."""
    head: nn.Linear | None
    """The layer that gives the logits; None with `num_classes` 0."""
    position_resize: PositionResize
    """How tables of positions are resized to other picture sizes; the weights' own source decides."""
    input_kernel: str
    """State-dict name of the convolution kernel that reads the picture."""
    input_kernel_sums = True
    """Whether a sum of the kernel over channels reads grey as the kernel reads colour; not where it is standardised."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.preprocessing = Preprocessing(image_size=config.image_size, channels=config.channels)
        self.labels = ()
        self.multi_label = False
        self.position_resize = "official"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The labels, or the numbers of the classes where they are unknown."""
        return self.labels or tuple(map(str, range(self.config.num_classes)))

    @abstractmethod
    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Return the vector per picture that the head classifies."""

    @abstractmethod
    def feature_map(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        """Return the last features that still have a place in the picture, before pooling."""

    def forward(self, images: Float[Tensor, "b c h w"]) -> Tensor | WithLoss:
        """Return logits [b classes] for normalised pictures, features where there is no head.

        While training, a model with a loss of its own answers with it; in evaluation mode with the logits alone.
        """
        features = self.features(images)
        return features if self.head is None else self.head(features)

    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """Return the units to checkpoint, compile and shard, from input to output."""

    @abstractmethod
    def depth_of(self, name: str) -> int:
        """Return a parameter's distance from the input: 0 for the embedding, `len(blocks()) + 1` for the head."""

    @abstractmethod
    def init_weights(self) -> None:
        """Fill every parameter and buffer as the paper does. Needed after construction on the meta device."""

    def fit_input(self, pictures: Callable[[], Float[Tensor, "b c h w"]]) -> None:
        """Set what is calculated from training pictures, not learned, before the first update; most models hold none.

        Args:
            pictures: Gives some hundred of them, as evaluation sees them, when called.
        """

    def attention(self, images: Float[Tensor, "b c h w"]) -> Iterator[Float[Tensor, "b heads q k"]]:
        """Yield the attention probabilities of one block after the other, input to output; rows are queries.

        They are computed beside the fused kernels, one map at a time: all of a large model's may not fit into memory.

        Raises:
            UserError: When the family has no attention.
        """
        raise UserError(f"{type(self).__name__} has no attention to show.")

    def with_classes(self, num_classes: int) -> ModelConfig:
        """Return the configuration of the same body with a fresh head."""
        return replace(self.config, num_classes=num_classes, head_bias=0.0)

    def resize_tables(self, state: dict[str, Tensor], image_size: tuple[int, int], method: PositionResize) -> None:
        """Resample in place what this model's state dict holds for one picture size only; most families hold none."""
